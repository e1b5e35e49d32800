"""Asking many calls: what is known, what the rest will cost, progress, and what to do where no answer was to be had.

    answers = ask(calls, preset, "judge_cache.sqlite", usage=usage)

A judge asks this way (`judge`), and so does the teacher of the preference pairs (`pairs`). Progress is printed as
lines, one every half minute, for what a job of the grid prints goes to a log; `tail -f` shows

    judge gpt-4.1-mini: 1,240 of 8,000 calls (16%; 0 were known), 41.2 calls/s, 3 retries (HTTP 429: 3), 0 failed, ...
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from cai_em.endpoint.cache import Answer, JudgeCache, JudgeError
from cai_em.endpoint.calls import Call, Usage, check_endpoint, estimate_calls
from cai_em.endpoint.client import Backoff, Failure, JudgeClient
from cai_em.study.entries import JudgePreset

PROGRESS_EVERY_S = 30.0
"""Seconds between two lines of progress."""
T = TypeVar("T")
AskPending = Callable[[JudgeClient, list[Call], Callable[[str], None]], Awaitable[dict[str, Answer | Failure]]]
"""How calls that are not known are asked: given the client, the calls, and whom to tell in words what is going on."""


class Unanswered(JudgeError):
    """Calls had no answer, for causes that may pass. What was answered is kept."""


# --- Asking -------------------------------------------------------------------------------------------------------


def ask(
    calls: Iterable[Call],
    preset: JudgePreset,
    cache_path: str | Path,
    *,
    texts: int | None = None,
    usage: Usage | None = None,
    progress: bool = True,
    backoff: Backoff | None = None,
    role: str = "judge",
    check_first: Callable[[Answer], None] | None = None,
    ask_pending: AskPending | None = None,
) -> dict[str, Answer | Failure]:
    """Every distinct call's answer, from the cache or from the endpoint.

    Args:
        calls: equal ones are asked once.
        preset: the endpoint. Calls without an answer are accepted up to its `accept_failures`, a share of all.
        cache_path: the cache's file, made if need be.
        texts: how many texts the calls are about, for the estimate; else as many as there are calls.
        usage: what is done and spent is added to it.
        progress: print the estimate, and progress every half minute and at the end.
        backoff: waits between attempts.
        role: what the endpoint is, for messages.
        check_first: looks at the first new answer (`JudgeClient`).
        ask_pending: another way to ask, such as a Batch API; else one request per call.

    Returns:
        By key; `Failure` for calls that the server refused for their content or length, and for accepted failures.

    Raises:
        Unanswered: more calls than are accepted had no answer.
        JudgeError: asking had to stop. All that was answered is kept.
    """
    distinct = {call.key: call for call in calls}
    part = Usage(calls=len(distinct))
    with JudgeCache(cache_path) as cache:
        known: dict[str, Answer | Failure] = dict(cache.get(distinct))
        expected = estimate_calls(len(distinct) if texts is None else texts, preset, distinct, known)
        part.cached, part.estimated_usd = len(known), expected.usd
        pending = [call for key, call in distinct.items() if key not in known]
        report = _Progress(f"{role} {preset.name}", part, progress)

        async def work(on_stop: Callable[[Callable[[], None]], None]) -> dict[str, Answer | Failure]:
            client = JudgeClient(preset, cache, part, backoff, role=role, check_first=check_first)
            on_stop(client.stop)
            try:
                if ask_pending:
                    return await ask_pending(client, pending, report.say)
                return await client.ask_all(pending)
            finally:
                await client.close()

        try:
            if not pending:
                return known
            check_endpoint(preset, role)
            report.say(str(expected))
            try:
                answers = run_in_thread(work, report.tick)
            finally:
                report.tick(last=True)
            _accept(answers, preset, len(distinct), role)
            return known | answers
        finally:
            if usage is not None:
                usage.merge(part)


def _accept(answers: dict[str, Answer | Failure], preset: JudgePreset, calls: int, role: str) -> None:
    failed = [a for a in answers.values() if isinstance(a, Failure) and not a.rejected]
    if len(failed) <= preset.accept_failures * calls:
        return
    causes = "; ".join(f"{n} x {cause}" for cause, n in Counter(f.cause for f in failed).most_common(3))
    file = "judges.yaml" if role == "judge" else "generators.yaml"
    raise Unanswered(
        f"{role} '{preset.name}' (model {preset.model}): {len(failed)} of {calls} calls had no answer: {causes}. "
        "What was answered is kept; run again, and only these are asked. To go on without them, flagged as missing, "
        f"set accept_failures (a share of the calls, now {preset.accept_failures:g}) in params/{file}"
    )


# --- Progress -----------------------------------------------------------------------------------------------------


class _Progress:
    """Lines of progress on stdout."""

    def __init__(self, name: str, usage: Usage, shown: bool) -> None:
        self._name, self._usage, self._shown = name, usage, shown
        self._began = self._last = time.monotonic()
        self._waiting: list[str] = []

    def say(self, line: str) -> None:
        """Print a line with the next look; may be called from another thread."""
        self._waiting.append(line)

    def tick(self, last: bool = False) -> None:
        """Print what waits, and how far it is if that is due."""
        now = time.monotonic()
        while self._waiting:
            self._print(self._waiting.pop(0))
        if last or now - self._last >= PROGRESS_EVERY_S:
            self._last = now
            self._print(progress_line(self._usage, now - self._began) + (", ended" if last else ""))

    def _print(self, line: str) -> None:
        if self._shown:
            print(f"{self._name}: {line}", flush=True)


def progress_line(usage: Usage, seconds: float) -> str:
    """How far an asking is: calls, rate, retries with their causes, failures, dollars so far and expected, time left.

    Args:
        usage: of this asking alone.
        seconds: since it began.
    """
    ended = usage.answered + usage.failed
    left = usage.calls - usage.cached - ended
    rate = ended / seconds if seconds > 0 else 0.0
    causes = ", ".join(f"{cause}: {n}" for cause, n in usage.retries.most_common(3))
    retries = sum(usage.retries.values())
    line = (
        f"{usage.cached + ended:,} of {usage.calls:,} calls ({(usage.cached + ended) / max(1, usage.calls):.0%}; "
        f"{usage.cached:,} were known), {rate:.1f} calls/s, {retries:,} retries{f' ({causes})' if causes else ''}, "
        f"{usage.failed:,} failed, ${usage.usd:.4f} of about ${usage.projected_usd:.4f}"
    )
    return line + (f", about {left / rate / 60:.0f} min left" if left and rate else "")


def run_in_thread(work: Callable[[Callable[[Callable[[], None]], None]], Awaitable[T]], tick: Callable[[], None]) -> T:
    """Run a coroutine in a thread with an event loop of its own, so that it works inside a Jupyter kernel as well.

    The first Ctrl-C (or kernel interrupt) stops gently: requests on their way are waited for and kept. A second one
    leaves at once.

    Args:
        work: called with a function `on_stop(callback)`; returns the coroutine to run.
        tick: called in the calling thread a few times a second, to show progress.
    """
    outcome: dict[str, Any] = {}
    done = threading.Event()  # Thread.join forgets a running thread when it is interrupted (Python 3.11)
    stops: list[Callable[[], object]] = []

    def main() -> None:
        async def run() -> T:
            loop = asyncio.get_running_loop()
            return await work(lambda stop: stops.append(lambda: loop.call_soon_threadsafe(stop)))

        try:
            outcome["result"] = asyncio.run(run())
        except BaseException as error:  # noqa: BLE001 - raised again in the calling thread
            outcome["error"] = error
        finally:
            done.set()

    thread = threading.Thread(target=main, name="judge", daemon=True)
    thread.start()

    def watch() -> None:
        while not done.wait(0.2):
            tick()

    interrupted = False
    while True:
        try:  # all of the watching lies in here: an interrupt between two ticks is one too
            watch()
            break
        except KeyboardInterrupt:
            if interrupted:
                raise
            interrupted = True
            for stop in stops:
                stop()
    if interrupted:
        raise KeyboardInterrupt
    if "error" in outcome:
        raise outcome["error"]
    return outcome["result"]
