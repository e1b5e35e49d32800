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
import email.utils
import json
import math
import os
import random
import re
import ssl
import time
import urllib.request
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import aiohttp
import certifi
import openai

from cai_em.judge_cache import Answer, JudgeCache, JudgeError
from cai_em.run import valid_unicode

if TYPE_CHECKING:
    from cai_em.params import JudgePreset

DEFAULT_BASE_URL = "https://api.openai.com/v1"
LONGEST_WAIT_S = 300.0
"""A server that asks for a longer wait than this (Retry-After) ends the run instead; nothing is lost by resuming."""
GIVE_UP_AFTER = 20
"""So many calls in a row that failed after all their retries, or were refused in the same words, stop the run."""
PROBES = 3
"""So many calls go alone, where others were answered before, until it is believed that none will be."""


class CostCapReached(JudgeError):
    """The next call could have cost more than the cap leaves."""


@dataclass(frozen=True)
class Call:
    """One request: its address in the cache and its JSON body."""

    key: str
    body: dict

    @property
    def prompt(self) -> str:
        """What is sent: the text of all messages."""
        return "\n".join(message["content"] for message in self.body["messages"])


@dataclass(frozen=True)
class Failure:
    """A call without an answer, and why. `rejected`: the server refused this very request, for content or length."""

    cause: str
    attempts: int
    rejected: bool = False


@dataclass
class Usage:
    """What a judging did and cost; filled while it runs.

    Attributes:
        calls: distinct calls that the responses need.
        cached: how many of them were known already.
        answered, failed: how the others ended.
        requests: HTTP requests sent, retries included.
        retries: why requests were repeated, counted by cause.
        prompt_tokens, completion_tokens, usd: as counted by the server (estimated where it did not count).
        uncounted: answers whose usage the server did not report sensibly.
        estimated_usd: the estimate before the start, for the calls that were not cached.
        models: the model names that the server answered with, counted.
    """

    calls: int = 0
    cached: int = 0
    answered: int = 0
    failed: int = 0
    requests: int = 0
    retries: Counter = field(default_factory=Counter)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    usd: float = 0.0
    uncounted: int = 0
    estimated_usd: float = 0.0
    models: Counter = field(default_factory=Counter)

    def add(self, usage: tuple[int, int, float]) -> None:
        """Count the tokens and dollars of one call."""
        self.prompt_tokens += usage[0]
        self.completion_tokens += usage[1]
        self.usd += usage[2]

    def merge(self, other: Usage) -> None:
        """Count what another asking did and cost, too."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    @property
    def projected_usd(self) -> float:
        """Dollars that this run will have cost at its end, at the mean price of the calls so far."""
        left = self.calls - self.cached - self.answered - self.failed
        return self.usd * (1 + left / self.answered) if self.answered else self.estimated_usd


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


# --- Address, key, redaction --------------------------------------------------------------------------------------


def base_url(preset: JudgePreset, role: str = "judge") -> str:
    """The endpoint: what `base_url_env` names, else the preset's, else `OPENAI_BASE_URL`, else OpenAI's.

    Raises:
        JudgeError: it is not an http(s) address, it carries a user name or password, or the variable is not set.
    """
    named = os.environ.get(preset.base_url_env, "").strip() if preset.base_url_env else ""
    if preset.base_url_env and not (named or preset.base_url):
        raise JudgeError(
            f"{role} '{preset.name}' needs an endpoint: set the environment variable {preset.base_url_env} to its "
            "address, such as http://127.0.0.1:8000/v1"
        )
    url = named or preset.base_url or os.environ.get("OPENAI_BASE_URL") or DEFAULT_BASE_URL
    parts = urlsplit(url)
    if parts.username or parts.password:
        raise JudgeError(
            f"{role} '{preset.name}': base_url must not carry credentials; put the key into the environment"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise JudgeError(f"{role} '{preset.name}': base_url must be an http(s) address, not {url!r}")
    return url


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")


def _api_key(preset: JudgePreset, url: str, role: str) -> str:
    key = os.environ.get(preset.api_key_env, "").strip()
    if not key and _is_loopback(url):
        return "none"
    if not key:
        raise JudgeError(
            f"{role} '{preset.name}' needs an API key: set the environment variable {preset.api_key_env} "
            f"(export it in the shell that starts the run), or choose another {role} in the profile"
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        raise JudgeError(f"the value of {preset.api_key_env} is not an API key (white space or non-ASCII in it)")
    return key


def check(preset: JudgePreset, role: str = "judge") -> None:
    """Whether a preset's address and key can be used, before any work.

    Raises:
        JudgeError: they cannot; the message says why.
    """
    _api_key(preset, base_url(preset, role), role)


def _proxy(url: str) -> str | None:
    """The proxy that the environment names for an address (`https_proxy`, `no_proxy`, ...).

    Looked up here, for the libraries would read `~/.netrc` as well, and put what stands there in the key's place.
    """
    parts = urlsplit(url)
    if _is_loopback(url) or urllib.request.proxy_bypass(parts.netloc):
        return None
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy and urlsplit(proxy).scheme not in ("http", "https"):
        raise JudgeError(
            f"the environment's {parts.scheme}_proxy is no http(s) proxy; name one, or add {parts.hostname} to no_proxy"
        )
    return proxy


_LOOKS_LIKE_KEY = re.compile(r"\b(sk|pk|rk)-[\w*.\-]{6,}|(?i:bearer)\s+[\w*.\-]{6,}")


def without_key(text: str, key: str) -> str:
    """The text without the key."""
    return text.replace(key, "[key removed]") if len(key) >= 8 else text


def redact(text: str, key: str = "") -> str:
    """The text without the key and without anything that looks like one (servers quote keys in part): for messages."""
    return _LOOKS_LIKE_KEY.sub("[key removed]", without_key(text, key))


# --- What a server said -------------------------------------------------------------------------------------------


class Malformed(ValueError):
    """A successful HTTP answer that holds no usable completion."""


def read_completion(text: str, key: str = "") -> Answer:
    """A chat completion's JSON text as an `Answer`; nothing in it is trusted to have the right type.

    No text of it holds the key or a lone surrogate.

    Raises:
        Malformed: no JSON, an error object, no choice, or content that is not text.
    """
    try:
        data = json.loads(text)
    except ValueError as error:
        raise Malformed("truncated or invalid JSON") from error
    if not isinstance(data, dict):
        raise Malformed("the JSON is not an object")
    if data.get("error"):
        raise Malformed(f"error in a successful answer: {redact(str(data['error']), key)[:200]}")
    choices = data.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict):
        raise Malformed("no choice with a message in the answer")
    content = message.get("content")
    if content is None:
        content = ""
    if not isinstance(content, str):
        raise Malformed(f"content is {type(content).__name__}, not text")

    def clean(value: object) -> str:
        return without_key(valid_unicode(str(value)), key)

    def short(value: object) -> str | None:
        return clean(value)[:200] if isinstance(value, str) else None

    tokens, top = _read_logprobs(choice.get("logprobs"), clean)
    usage = data.get("usage") if isinstance(data.get("usage"), dict) else {}
    return Answer(
        text=clean(content),
        finish_reason=short(choice.get("finish_reason")),
        model=short(data.get("model")),
        tokens=tokens,
        top=top,
        prompt_tokens=_count_or_none(usage.get("prompt_tokens")),
        completion_tokens=_count_or_none(usage.get("completion_tokens")),
    )


def _count_or_none(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**9 else None


def _read_logprobs(data: Any, clean: Callable[[object], str]) -> tuple[tuple[str, ...], tuple[tuple[str, float], ...]]:
    content = data.get("content") if isinstance(data, dict) else None
    if not isinstance(content, list) or not all(isinstance(item, dict) for item in content) or not content:
        return (), ()
    tokens = tuple(clean(item.get("token", "")) for item in content[:2])
    top = []
    for item in content[0].get("top_logprobs") or []:
        logprob = item.get("logprob") if isinstance(item, dict) else None
        number = isinstance(logprob, int | float) and not isinstance(logprob, bool)
        top.append((clean(item.get("token", "")), float(logprob)) if number else ("", math.nan))
    return tokens, tuple(top)


_SNAPSHOT = re.compile(r"-(\d{4}-\d{2}-\d{2}|\d{4,8}|\d{2}-\d{2,4}|latest)")


def same_model(asked: str, answered: str | None) -> bool:
    """Whether the name that a server answers with is the model that was asked for.

    A provider's prefix (`openai/`), a variant after a colon and a snapshot's date are no difference; `gpt-4.1` and
    `gpt-4.1-mini` are. A server that names no model is believed.
    """
    if answered is None:
        return True
    plain = [name.lower().rstrip("/").rsplit("/", 1)[-1].split(":")[0] for name in (asked, answered)]
    rest = plain[1].removeprefix(plain[0])
    return rest == "" or (plain[1].startswith(plain[0]) and _SNAPSHOT.fullmatch(rest) is not None)


class Refused(Exception):
    """An HTTP answer that is no success.

    Attributes:
        status: its HTTP status.
        headers: of the answer.
        message, code: of the error object in its body, where it has one.
    """

    def __init__(self, status: int, headers: Any, text: str) -> None:
        super().__init__(f"HTTP {status}")
        self.status, self.headers = status, headers
        try:
            data = json.loads(text)
        except ValueError:
            data = None
        error = data.get("error", data) if isinstance(data, dict) else None
        self.message, self.code = (error.get("message"), error.get("code")) if isinstance(error, dict) else (None, None)


@dataclass(frozen=True)
class Trouble:
    """An attempt that gave no answer.

    Attributes:
        cause: in words, without the key.
        verdict: `stop` the run, `retry`, or give up on this call: `reject` (refused), `reject content` (refused for
            its content or its length).
        retry_after_s: the wait that the server asks for.
        hold_all: whether all workers must wait.
        billed: whether it may have been billed.
    """

    cause: str
    verdict: str = "retry"
    retry_after_s: float | None = None
    hold_all: bool = False
    billed: bool = False


def classify(error: Exception, key: str = "") -> Trouble:
    """What an exception of a request means. Anything that is not a trouble of the network or the server is raised."""
    if isinstance(error, Malformed):
        return Trouble(str(error), billed=True)
    if isinstance(error, Refused):
        return _classify_status(error, key)
    if isinstance(error, TimeoutError):  # aiohttp's own timeouts are connection errors too
        return Trouble("timeout", billed=True)
    if isinstance(error, aiohttp.ClientError):
        return Trouble("connection failed or closed", billed=not isinstance(error, aiohttp.ClientConnectorError))
    raise error


ABOUT_CONTENT = re.compile(
    r"context.{0,3}length|context.{0,3}window|too (long|large|many tokens)|maximum.{0,20}(length|tokens)"
    r"|string.above.max|content.{0,3}(filter|policy|management)|safety|moderation|flagged|invalid.prompt",
    re.IGNORECASE,
)
"""Words and codes by which servers refuse one request for its length or its content."""


def _classify_status(error: Refused, key: str) -> Trouble:
    status = error.status
    cause = f"HTTP {status}" + (f": {redact(str(error.message), key)[:300]}" if error.message else "")
    wait = retry_after(error.headers)
    about_content = status == 413 or ABOUT_CONTENT.search(f"{error.code} {error.message}") is not None
    if status == 403 and about_content:  # some say so when their moderation does not like a request
        return Trouble(cause, "reject content")
    if status in (401, 402, 403, 404) or (status == 429 and error.code == "insufficient_quota"):
        return Trouble(cause, "stop")
    if 300 <= status < 400:
        return Trouble(f"{cause}: it sends requests elsewhere; give the right base_url", "stop")
    if status == 429 or status in (408, 409) or status >= 500:
        if wait is not None and wait > LONGEST_WAIT_S:
            return Trouble(f"{cause} (the server asks to wait {wait:.0f} s)", "stop")
        return Trouble(f"HTTP {status}", "retry", wait, hold_all=status == 429, billed=status == 504)
    return Trouble(cause, "reject content" if about_content else "reject")


def retry_after(headers: Any) -> float | None:
    """Seconds that a server asks to wait: `retry-after-ms`, or `retry-after` in seconds or as a date."""
    for name, scale in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            seconds = float(value) * scale
        except ValueError:
            date = email.utils.parsedate_tz(value)
            seconds = email.utils.mktime_tz(date) - time.time() if date else math.nan
        if math.isfinite(seconds):
            return max(0.0, seconds)
    return None


# --- Cost ---------------------------------------------------------------------------------------------------------


def estimated_tokens(call: Call) -> tuple[int, int]:
    """Prompt and completion tokens of a call, on the high side: 3 bytes of UTF-8 a token, the full answer length."""
    return math.ceil(len(call.prompt.encode()) / 3) + 8, call.body["max_tokens"]


def price(preset: JudgePreset, prompt_tokens: int, completion_tokens: int) -> float:
    """US dollars at the preset's prices (a preset for a Batch API states that API's)."""
    return (prompt_tokens * preset.usd_per_1m_input + completion_tokens * preset.usd_per_1m_output) / 1e6


def bill(preset: JudgePreset, call: Call, answer: Answer | None) -> tuple[int, int, float]:
    """Tokens and dollars of a call: as counted by the server, else estimated."""
    prompt, completion = estimated_tokens(call)
    if answer is not None:
        prompt = prompt if answer.prompt_tokens is None else answer.prompt_tokens
        completion = completion if answer.completion_tokens is None else answer.completion_tokens
    return prompt, completion, price(preset, prompt, completion)


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
        self._classify = lambda error: classify(error, key)
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
