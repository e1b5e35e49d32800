"""The way to an OpenAI-compatible endpoint, a judge's or a teacher's: fast, bounded, seldom in vain.

A pool of workers keeps `concurrency` calls on their way, without barriers. Requests and tokens per minute are paced;
429 holds all workers for as long as the server asks; other passing troubles are retried with jittered exponential
back-off; a call that still fails ends as a `Failure` with its cause. What no retry can mend (wrong key, unknown model,
quota used up, cost cap) stops the run, and the calls that are on their way then are still waited for and kept.

Calls go alone until one is answered: a wrong key is noticed once, not ten thousand times. That a server refuses a
request for its content or its length is an outcome of that request; other refusals, where many in a row are the same,
are no matter of the request and stop the run.

What may have been billed is counted as spent: a request that ran into the timeout, or whose connection broke after it
was sent, costs its estimate.

An API key is read from the environment, lives in the client object only, and is taken out of every text that leaves
this module.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import ssl
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from urllib.parse import urlsplit

import aiohttp
import certifi
import openai

from cai_em.endpoint.cache import Answer, JudgeCache, JudgeError
from cai_em.endpoint.calls import (
    Call,
    CostCapReached,
    Malformed,
    Refused,
    Trouble,
    Usage,
    _api_key,
    _proxy,
    base_url,
    bill,
    classify_trouble,
    read_completion,
    redact,
    same_model,
)
from cai_em.study.entries import JudgePreset

GIVE_UP_AFTER = 20
"""So many calls in a row that failed after all their retries, or were refused in the same words, stop the run."""
PROBES = 3
"""So many calls go alone, where others were answered before, until it is believed that none will be."""


@dataclass(frozen=True)
class Failure:
    """A call without an answer, and why. `rejected`: the server refused this very request, for content or length."""

    cause: str
    attempts: int
    rejected: bool = False


@dataclass(frozen=True)
class Backoff:
    """Waits between attempts: `base_s * 2**(attempt - 1)` up to `longest_s`, times a random share of 50-100 %."""

    base_s: float = 0.5
    longest_s: float = 30.0

    def delay(self, attempt: int, rng: random.Random) -> float:
        """Seconds to wait before attempt number `attempt` (1 = the first retry)."""
        return min(self.longest_s, self.base_s * 2 ** (attempt - 1)) * rng.uniform(0.5, 1.0)


class Pace:
    """Spreads amounts evenly over time so that no minute exceeds a limit (a virtual schedule without bursts)."""

    def __init__(self, per_minute: float | None):
        self._seconds_each = 60.0 / per_minute if per_minute else 0.0
        self._free_at = 0.0

    def wait_s(self, amount: float, now: float) -> float:
        """Take a place for `amount` and return how many seconds to wait for it."""
        start = max(self._free_at, now)
        self._free_at = start + amount * self._seconds_each
        return start - now


# --- The pool -----------------------------------------------------------------------------------------------------


class JudgeClient:
    """Calls to one endpoint. Made inside a running event loop, closed with `await client.close()`.

    Args:
        preset: the endpoint, its limits and prices.
        cache: where answers are kept and dollars counted.
        usage: filled with what is done and spent.
        backoff: waits between attempts.
        role: what the endpoint is, for messages: `judge` or `teacher`.
        check_first: looks at the first answer, and raises where all others would be of no use either.
    """

    def __init__(
        self,
        preset: JudgePreset,
        cache: JudgeCache,
        usage: Usage,
        backoff: Backoff | None = None,
        *,
        role: str = "judge",
        check_first: Callable[[Answer], None] | None = None,
    ) -> None:
        url = base_url(preset, role)
        key = _api_key(preset, url, role)
        self.preset, self.cache, self.usage, self.role = preset, cache, usage, role
        self.endpoint = urlsplit(url).netloc
        self.redact = lambda text: redact(text, key)
        self._classify = lambda error: classify_trouble(error, key)
        self.read = lambda text: read_completion(text, key)
        self._url, self._key = url, key
        self._proxy = _proxy(url)
        self._check_first = check_first
        self._connections = preset.concurrency + 4
        self._backoff = backoff or Backoff()
        self._rng = random.Random()  # jitter must differ between processes; it touches no result
        self._requests = Pace(preset.requests_per_minute)
        self._tokens = Pace(preset.tokens_per_minute)
        self._held_until = 0.0
        self._reserved_usd = 0.0
        self._failed_in_a_row = 0
        self._refused_in_a_row: tuple[str, int] = ("", 0)
        self._stop = asyncio.Event()
        self._fatal: Exception | None = None

    @cached_property
    def _http(self) -> aiohttp.ClientSession:
        """Plain connections for chat completions: the openai package spends several times their work on each call."""
        headers = {"Authorization": f"Bearer {self._key}", "Content-Type": "application/json"}
        for name, header in (("OPENAI_ORG_ID", "OpenAI-Organization"), ("OPENAI_PROJECT_ID", "OpenAI-Project")):
            if value := os.environ.get(name):
                headers[header] = value
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self._connections, ssl=self._tls),
            headers=headers,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None),  # a request's own, in `_attempt`
        )

    @cached_property
    def _tls(self) -> ssl.SSLContext | bool:
        if not self._url.startswith("https"):
            return True
        return ssl.create_default_context(cafile=os.environ.get("SSL_CERT_FILE") or certifi.where())

    @cached_property
    def api(self) -> openai.AsyncOpenAI:
        """The openai package's client, for files and batches."""
        http = openai.DefaultAioHttpClient(
            timeout=self.preset.timeout_s, trust_env=False, proxy=self._proxy, verify=self._tls
        )
        return openai.AsyncOpenAI(base_url=self._url, api_key=self._key, max_retries=0, http_client=http)

    async def close(self) -> None:
        """Close all connections that were opened."""
        opened = vars(self)
        if "_http" in opened:
            await self._http.close()
        if "api" in opened:
            await self.api.close()

    async def _post(self, body: dict) -> str:
        """A chat completion's text.

        Raises:
            Refused: the answer is no success.
            aiohttp.ClientError: there is none.
        """
        data = json.dumps(body).encode()
        address = f"{self._url.rstrip('/')}/chat/completions"
        async with self._http.post(address, data=data, proxy=self._proxy, allow_redirects=False) as response:
            text = (await response.read()).decode("utf-8", "replace")
            if not 200 <= response.status < 300:
                raise Refused(response.status, response.headers, text)
            return text

    def stop(self) -> None:
        """Start no further request; those on their way are finished and kept."""
        self._stop.set()

    async def ask_all(self, calls: list[Call]) -> dict[str, Answer | Failure]:
        """Ask every call (distinct keys); each answer is committed to the cache before the next is asked for.

        Raises:
            JudgeError: the run had to stop (wrong key, unknown model, no quota, endpoint down, cost cap, cache file).
            What was answered is in the cache.
        """
        queue = deque(calls)
        results: dict[str, Answer | Failure] = {}

        async def work() -> None:
            while queue and not self._stop.is_set():
                call = queue.popleft()
                try:
                    result = await self._ask(call)
                except Exception as error:  # noqa: BLE001 - raised below, once the calls on their way are kept
                    self._fatal = self._fatal or error
                    self._stop.set()
                    return
                if result is not None:
                    results[call.key] = result

        results |= await self._first(queue)
        async with asyncio.TaskGroup() as group:
            for _ in range(min(self.preset.concurrency, len(queue))):
                group.create_task(work())
        if self._fatal is not None:
            raise self._fatal
        return results

    async def _first(self, queue: deque[Call]) -> dict[str, Answer | Failure]:
        """Ask alone until a call is answered, the shortest first: no length limit can refuse it.

        Calls that are refused for their content say nothing about the others, unless nothing else comes. For others
        that fail, the run stops at the first; where answers are known from before, so that key, model and parameters
        were good once, at the third: a call that fails every time must not keep its neighbours from being asked.
        """
        found: dict[str, Answer | Failure] = {}
        failed: list[Failure] = []
        probes = PROBES if self.usage.cached else 1
        shortest = sorted(queue, key=lambda call: len(call.prompt))
        few = self.usage.cached and len(queue) <= self.preset.accept_failures * self.usage.calls  # and may all fail
        for call in shortest:
            result = await self._ask(call)
            if result is None:
                return found
            queue.remove(call)
            found[call.key] = result
            if isinstance(result, Answer):
                if self._check_first:
                    self._check_first(result)
                return found
            failed += [] if result.rejected else [result]
            if len(found) == GIVE_UP_AFTER and not self.usage.cached:
                raise JudgeError(f"{self.who}: the first {len(found)} calls were all refused, the last: {result.cause}")
            if failed and not few and (len(failed) == probes or not queue):
                raise JudgeError(
                    f"{self.who}: the first call{'s' if len(failed) > 1 else ''} failed: {failed[-1].cause} "
                    f"(attempts: {failed[-1].attempts})"
                )
        return found

    @property
    def who(self) -> str:
        """The endpoint, for messages."""
        return f"{self.role} '{self.preset.name}' (model {self.preset.model} at {self.endpoint})"

    async def _ask(self, call: Call) -> Answer | Failure | None:
        """One call with its retries. None: stopped before it was asked."""
        known = self.cache.get([call.key])  # another process may have asked it since the start
        if known:
            self.usage.answered += 1
            return known[call.key]
        trouble = Trouble("not tried")
        for attempt in range(self.preset.max_retries + 1):
            if attempt:
                self.usage.retries[trouble.cause] += 1
                wait = max(self._backoff.delay(attempt, self._rng), trouble.retry_after_s or 0.0)
                if await self._stopped_within(wait):
                    return None
            outcome = await self._attempt(call)
            if outcome is None:
                return None
            if isinstance(outcome, Answer):
                self._failed_in_a_row, self._refused_in_a_row = 0, ("", 0)
                return outcome
            trouble = outcome
            if trouble.verdict == "stop":
                raise JudgeError(f"{self.who} cannot be used: {trouble.cause}")
            if trouble.verdict.startswith("reject"):
                self.usage.failed += 1
                if trouble.verdict == "reject":
                    self._count_refusal(trouble.cause)
                return Failure(trouble.cause, attempt + 1, rejected=trouble.verdict == "reject content")
        self.usage.failed += 1
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= GIVE_UP_AFTER:
            raise JudgeError(
                f"{self.who}: {self._failed_in_a_row} calls in a row failed after all retries, the last one: "
                f"{trouble.cause}. What was answered is kept; run again when the endpoint is well"
            )
        return Failure(trouble.cause, self.preset.max_retries + 1)

    def _count_refusal(self, cause: str) -> None:
        before, times = self._refused_in_a_row
        self._refused_in_a_row = (cause, times + 1 if cause == before else 1)
        if self._refused_in_a_row[1] >= GIVE_UP_AFTER:
            raise JudgeError(
                f"{self.who}: {GIVE_UP_AFTER} calls in a row were refused in the same words: {cause}. "
                "What was answered is kept; mend the cause (key, account, parameters) and run again"
            )

    async def _attempt(self, call: Call) -> Answer | Trouble | None:
        """One request. None: stopped before it was sent."""
        estimate = bill(self.preset, call, None)
        if await self._wait_for_turn(sum(estimate[:2])):
            return None
        self._reserve(estimate[2])
        self.usage.requests += 1
        try:
            try:
                async with asyncio.timeout(self.preset.timeout_s):
                    text = await self._post(call.body)
                answer = self.read(text)
            except (Refused, aiohttp.ClientError, TimeoutError, Malformed) as error:
                trouble = self._classify(error)
            else:
                if same_model(self.preset.model, answer.model):
                    return self.keep(call, answer)
                trouble = Trouble(f"another model answered: {answer.model}", billed=True)
        finally:
            self._reserved_usd -= estimate[2]
        if trouble.billed:
            self.lost(call)
        if trouble.hold_all:
            wait = trouble.retry_after_s or 0.0
            self._held_until = max(self._held_until, time.monotonic() + wait)
        return trouble

    def lost(self, call: Call) -> None:
        """Count a call that may have been billed and gave nothing to be kept."""
        estimate = bill(self.preset, call, None)
        self.cache.lost(self.preset.model, estimate)
        self.usage.add(estimate)

    def keep(self, call: Call, answer: Answer, via: str = "chat") -> Answer:
        """Commit an answer and count it."""
        billed = bill(self.preset, call, answer)
        kept = self.cache.put(call.key, self.preset.model, answer, billed, self.endpoint, via)
        self.usage.add(billed)
        self.usage.answered += 1
        self.usage.uncounted += answer.prompt_tokens is None or answer.completion_tokens is None
        self.usage.models[answer.model] += 1
        return kept

    async def _wait_for_turn(self, tokens: int) -> bool:
        """Wait for limits and holds; True if the run was stopped meanwhile."""
        now = time.monotonic()
        wait = max(self._requests.wait_s(1, now), self._tokens.wait_s(tokens, now), self._held_until - now)
        while wait > 0:
            if await self._stopped_within(wait):
                return True
            held = self._held_until - time.monotonic()  # may have been prolonged meanwhile
            wait = held + self._rng.uniform(0, 0.1) if held > 0 else 0.0
        return self._stop.is_set()

    async def _stopped_within(self, seconds: float) -> bool:
        try:
            await asyncio.wait_for(self._stop.wait(), seconds)
        except TimeoutError:
            return False
        return True

    def _reserve(self, usd: float) -> None:
        cap = self.preset.cost_cap_usd
        if cap is not None:
            charged = self.cache.charged(self.preset.model)
            if charged + self._reserved_usd + usd > cap:
                raise CostCapReached(
                    f"{self.who}: cost cap of ${cap:.2f} reached: ${charged:.4f} spent in {self.cache.path} "
                    f"({self.usage.answered} calls answered in this run, all kept). "
                    "Raise cost_cap_usd and run again: it goes on where it stopped"
                )
        self._reserved_usd += usd
