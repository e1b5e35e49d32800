"""Calls to an OpenAI-compatible endpoint: what is asked, what an answer or a refusal means, what it costs."""

from __future__ import annotations

import email.utils
import json
import math
import os
import re
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from cai_em.endpoint.cache import Answer, JudgeError
from cai_em.records.files import valid_unicode
from cai_em.study.entries import JudgePreset

DEFAULT_BASE_URL = "https://api.openai.com/v1"
LONGEST_WAIT_S = 300.0
"""A server that asks for a longer wait than this (Retry-After) ends the run instead; nothing is lost by resuming."""


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


def check_endpoint(preset: JudgePreset, role: str = "judge") -> None:
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


def classify_trouble(error: Exception, key: str = "") -> Trouble:
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


# --- Before -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """What asking will take, before it starts. Estimates of different questions can be added.

    `prompt_tokens` and `completion_tokens` are on the high side (3 bytes of UTF-8 a token, full answer length), so
    `usd` is an upper bound for ordinary text. `minutes` assumes one second a call and the preset's limits.
    """

    responses: int = 0
    calls: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    usd: float = 0.0
    minutes: float = 0.0

    def __add__(self, other: Estimate) -> Estimate:
        return Estimate(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __str__(self) -> str:
        return (
            f"{self.responses} texts, {self.calls} distinct calls, {self.cached} of them known: "
            f"up to {self.prompt_tokens:,} + {self.completion_tokens:,} tokens, ${self.usd:.2f}, "
            f"about {self.minutes:.1f} min"
        )


def estimate_calls(n: int, preset: JudgePreset, calls: dict[str, Call], known: Iterable[str]) -> Estimate:
    """What asking distinct calls about `n` texts will take where some are known already."""
    known = set(known)
    tokens = [estimated_tokens(call) for key, call in calls.items() if key not in known]
    prompt, completion = sum(p for p, _ in tokens), sum(c for _, c in tokens)
    minutes = max(
        len(tokens) / (60 * preset.concurrency),
        len(tokens) / preset.requests_per_minute if preset.requests_per_minute else 0.0,
        (prompt + completion) / preset.tokens_per_minute if preset.tokens_per_minute else 0.0,
    )
    return Estimate(n, len(calls), len(known), prompt, completion, price(preset, prompt, completion), minutes)
