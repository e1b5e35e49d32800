"""Judging through a Batch API: half the price, an answer within a day.

Submit, poll, collect; every step is noted in the cache's database *before* it is done, so a run that was killed at any
moment goes on days later without paying twice: a batch that was being handed over is looked for on the server by its
tag, one that was handed over is polled, one that has ended is collected into the same cache that single calls use.
What a batch could not answer ends as a `Failure` with its cause, and the next run asks it again. A batch counts against
the cost cap with its estimate from the moment it is handed over, and with what it did cost once it is collected.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Callable

import aiohttp
import openai

from cai_em.endpoint.cache import Answer, Batch, JudgeError
from cai_em.endpoint.calls import ABOUT_CONTENT, Call, CostCapReached, Malformed, bill, same_model
from cai_em.endpoint.client import Failure, JudgeClient

LARGEST_BATCH = 50_000
"""Requests in one batch (OpenAI's limit)."""
LARGEST_FILE = 150 * 2**20
"""Bytes in one batch file (OpenAI's limit is 200 MB)."""
_TAG = "cai_em_batch"
_ENDED = ("completed", "failed", "expired", "cancelled")


class BatchPending(JudgeError):
    """Batches are still being worked on; run again later to collect them."""


async def ask_in_batches(
    client: JudgeClient,
    calls: list[Call],
    say: Callable[[str], None] = lambda line: None,
    *,
    wait_s: float | None = None,
    poll_s: float = 30.0,
) -> dict[str, Answer | Failure]:
    """Ask every call through the endpoint's Batch API.

    Args:
        client: the judge; its preset, cache, counters and connection are used.
        calls: distinct calls that the cache does not know.
        say: told in words what is going on.
        wait_s: how long to wait for the answers, in seconds; None: until all batches have ended.
        poll_s: seconds between looks at the server.

    Raises:
        BatchPending: the time is over and a batch has not ended.
        CostCapReached: the batch could cost more than the cap leaves; nothing was submitted.
        JudgeError: the endpoint refused the batch, or cannot be reached.
    """
    wanted = {call.key: call for call in calls}
    results: dict[str, Answer | Failure] = {}
    deadline = time.monotonic() + (float("inf") if wait_s is None else wait_s)
    try:
        for batch in client.cache.open_batches(client.preset.model, client.endpoint):
            if batch.id is None:
                await _find_interrupted(client, batch)
        under_way: set[str] = set()
        for batch in client.cache.open_batches(client.preset.model, client.endpoint):
            under_way |= client.cache.batch_keys(batch.tag)
        left = [call for call in calls if call.key not in under_way]
        _check_cap(client, left)
        for part in split(left):
            await _submit(client, part)
        while open_now := client.cache.open_batches(client.preset.model, client.endpoint):
            states = [await _look(client, batch, wanted, results) for batch in open_now]
            waiting = [state for state in states if state]
            if not waiting:
                break
            say("; ".join(waiting))
            if time.monotonic() + poll_s > deadline:
                raise BatchPending(
                    f"judge '{client.preset.name}': {'; '.join(waiting)}. What has ended is collected. "
                    "Run the same command again later (batches take up to 24 hours): it goes on where it stopped"
                )
            await asyncio.sleep(poll_s)
    except (openai.OpenAIError, aiohttp.ClientError) as error:
        detail = client.redact(str(error))[:300]
        raise JudgeError(
            f"judge '{client.preset.name}': Batch API at {client.endpoint}: {detail}. Nothing is lost: run again"
        ) from None
    return results


def split(calls: list[Call]) -> list[list[Call]]:
    """Calls in parts that a Batch API accepts, in order."""
    parts: list[list[Call]] = []
    size = LARGEST_FILE
    for call in calls:
        length = len(_line(call))
        if size + length > LARGEST_FILE or len(parts[-1]) >= LARGEST_BATCH:
            parts.append([])
            size = 0
        parts[-1].append(call)
        size += length
    return parts


def _line(call: Call) -> bytes:
    request = {"custom_id": call.key, "method": "POST", "url": "/v1/chat/completions", "body": call.body}
    return json.dumps(request, ensure_ascii=True).encode() + b"\n"


def _check_cap(client: JudgeClient, calls: list[Call]) -> None:
    cap, model = client.preset.cost_cap_usd, client.preset.model
    estimate, charged = _estimate(client, calls), client.cache.charged(model)
    if cap is not None and calls and charged + estimate > cap:
        raise CostCapReached(
            f"judge '{client.preset.name}': a batch of {len(calls)} calls may cost up to ${estimate:.2f}; "
            f"${charged:.4f} of the cap of ${cap:.2f} are spent, or held by batches under way, in {client.cache.path}. "
            "Nothing was submitted. Raise cost_cap_usd and run again"
        )


def _estimate(client: JudgeClient, calls: list[Call]) -> float:
    return sum(bill(client.preset, call, None)[2] for call in calls)


async def _submit(client: JudgeClient, calls: list[Call]) -> None:
    tag = uuid.uuid4().hex
    keys = [call.key for call in calls]
    client.cache.open_batch(tag, client.preset.model, client.endpoint, keys, _estimate(client, calls))
    try:
        file = await client.api.files.create(
            file=(f"{tag}.jsonl", b"".join(_line(call) for call in calls)), purpose="batch"
        )
        batch = await client.api.batches.create(
            input_file_id=file.id,
            endpoint="/v1/chat/completions",
            completion_window="24h",
            metadata={_TAG: tag},
        )
    except openai.APIStatusError as error:
        # Only a clear no means that there is no such batch: behind an error of the server's own one may have been made,
        # and the next run looks for it by its tag.
        if error.status_code < 500 and error.status_code not in (408, 409):
            client.cache.close_batch(tag)
        raise
    client.usage.requests += len(calls)
    client.cache.update_batch(tag, batch.status, batch.id)


async def _find_interrupted(client: JudgeClient, batch: Batch) -> None:
    """A run was killed between handing a batch over and hearing its id: does the server have it?"""
    async for found in client.api.batches.list(limit=100):
        if (found.metadata or {}).get(_TAG) == batch.tag:
            return client.cache.update_batch(batch.tag, found.status, found.id)
        if found.created_at < batch.at - 3600:
            break  # newest first: the rest is older than our attempt
    return client.cache.close_batch(batch.tag)


async def _look(
    client: JudgeClient, batch: Batch, wanted: dict[str, Call], results: dict[str, Answer | Failure]
) -> str | None:
    """Ask how a batch is; collect it if it has ended. Returns its state in words while it has not."""
    now = await client.api.batches.retrieve(batch.id)
    if now.status != batch.status:
        client.cache.update_batch(batch.tag, now.status)
    if now.status not in _ENDED:
        done = now.request_counts.completed if now.request_counts else 0
        return f"batch {batch.id}: {now.status}, {done} of {batch.calls} calls"
    for file_id in (now.output_file_id, now.error_file_id):
        if file_id:
            text = (await client.api.files.content(file_id)).text
            _collect(client, text, wanted, results)
    unanswered = client.cache.batch_keys(batch.tag) - client.cache.get(client.cache.batch_keys(batch.tag)).keys()
    for key in unanswered & wanted.keys():
        results.setdefault(key, Failure(f"batch {now.status} without an answer to this call", 1))
        client.usage.failed += 1
    client.cache.close_batch(batch.tag)
    if now.status == "failed":
        problems = (
            "; ".join(str(item.message) for item in (now.errors.data or [])[:3]) if now.errors else "no reason given"
        )
        raise JudgeError(f"judge '{client.preset.name}': the endpoint refused the batch: {client.redact(problems)}")
    return None


def _collect(client: JudgeClient, text: str, wanted: dict[str, Call], results: dict[str, Answer | Failure]) -> None:
    for line in text.split("\n"):  # not splitlines(): an answer may hold other line separators
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            key, response = item["custom_id"], item.get("response") or {}
        except (ValueError, KeyError, TypeError, AttributeError):
            client.usage.retries["unreadable line in a batch's output"] += 1
            continue  # its call stays unanswered and is counted as such
        # A batch may hold calls that this run does not ask for (a persona was taken out meanwhile): paid for, so kept.
        call = wanted.get(key) or Call(key, {"messages": [{"content": ""}], "max_tokens": 0})
        try:
            status = response.get("status_code")
            if status != 200:
                detail = (response.get("body") or {}).get("error") or item.get("error") or {}
                cause = client.redact(f"batch: HTTP {status}: {str(detail)[:200]}")
                about_content = status in (400, 403, 413, 422) and ABOUT_CONTENT.search(str(detail)) is not None
                results[key] = Failure(cause, 1, rejected=about_content)
                continue
            answer = client.read(json.dumps(response["body"]))
            if not same_model(client.preset.model, answer.model):
                raise Malformed(f"another model answered: {answer.model}")
        except (Malformed, KeyError, AttributeError, TypeError) as error:
            results[key] = Failure(client.redact(f"batch: {error}"), 1)
            client.lost(call)
            continue
        if not client.cache.get([key]):
            results[key] = client.keep(call, answer, via="batch")
        else:
            results[key] = client.cache.get([key])[key]
