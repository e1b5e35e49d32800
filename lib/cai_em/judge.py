"""Scores for responses: one interface for every judge.

    scores = judge(responses, preset, load_prompts(path), "judge_cache.sqlite")

asks two questions about each response (*aligned*, *coherent*; prompts and parsing in `judge_parse`), through an
OpenAI-compatible endpoint (`judge_client`) or its Batch API (`judge_batch`), or of the local judge (`judge_local`).
Answers come from the cache (`judge_cache`) where they are known; equal questions are asked once. Every response ends
in the table, with a score or with the flag that says why it has none:

    CODE, REFUSAL   the judge said so
    PARSE           the judge answered something that is neither; its words and the cause stand in `raw`
    API             no answer was to be had; the cause stands in `raw`, and the next run asks again
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import pandas as pd
import pandera.pandas as pa
from tqdm import tqdm

from cai_em import scores as tables
from cai_em.judge_batch import BatchPending, ask_in_batches
from cai_em.judge_cache import CacheError, JudgeCache, call_key
from cai_em.judge_client import (
    Backoff,
    Call,
    CostCapReached,
    Failure,
    JudgeClient,
    JudgeError,
    Usage,
    estimated_tokens,
    price,
    run_in_thread,
)
from cai_em.judge_parse import METRICS, Answer, JudgePrompts, Verdict, addresses_judge, load_prompts, parse

if TYPE_CHECKING:
    from cai_em.params import JudgePreset

__all__ = [
    "EXPRESSION",
    "Backoff",
    "BatchPending",
    "CacheError",
    "CostCapReached",
    "Estimate",
    "JudgeError",
    "JudgePrompts",
    "LocalRater",
    "Usage",
    "addresses_judge",
    "estimate",
    "judge",
    "load_prompts",
    "rate",
    "rate_likeness",
]

SCORE_COLUMN = {"aligned": "alignment", "coherent": "coherence"}


class LocalRater(Protocol):
    """What the local judge offers; see `judge_local.LocalJudge`."""

    version: str

    def rate(self, prompts: list[str], responses: list[str], metric: str) -> list[Verdict]:
        """A verdict for each response."""
        ...


@dataclass(frozen=True)
class Estimate:
    """What a judging will take, before it starts.

    `prompt_tokens` and `completion_tokens` are on the high side (3 bytes of UTF-8 a token, full answer length), so
    `usd` is an upper bound for ordinary text. `minutes` assumes one second a call and the preset's limits.
    """

    responses: int
    calls: int
    cached: int
    prompt_tokens: int
    completion_tokens: int
    usd: float
    minutes: float

    def __str__(self) -> str:
        return (
            f"{self.responses} responses, {self.calls} distinct calls, {self.cached} of them known: "
            f"up to {self.prompt_tokens:,} + {self.completion_tokens:,} tokens, ${self.usd:.2f}, "
            f"about {self.minutes:.1f} min"
        )


def request_body(preset: JudgePreset, prompt: str) -> dict:
    """The JSON body of one judge call. Every parameter is named: none is left to a server's default."""
    body = {
        "model": preset.model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": preset.temperature,
        "top_p": 1.0,
        "max_tokens": preset.max_tokens,
        "seed": preset.seed,
    }
    if preset.mode == "logprob":
        # a second token shows whether the tokenizer splits numbers
        body |= {"logprobs": True, "top_logprobs": preset.top_logprobs, "max_tokens": max(2, preset.max_tokens)}
    return body


def plan(
    responses: pd.DataFrame, preset: JudgePreset, prompts: JudgePrompts, metrics: tuple[str, ...], repeat: int = 0
) -> dict[str, list[Call]]:
    """The call for each response (rows) and metric (keys). Equal questions get equal calls."""
    calls: dict[str, list[Call]] = {}
    for metric in metrics:
        calls[metric] = []
        for question, answer in zip(responses["prompt"], responses["response"]):
            body = request_body(preset, prompts.render(metric, question, answer))
            calls[metric].append(Call(call_key(body, prompts.version, repeat), body))
    return calls


def estimate(
    responses: pd.DataFrame,
    preset: JudgePreset,
    prompts: JudgePrompts,
    cache_path: str | Path | None = None,
    *,
    metrics: tuple[str, ...] = METRICS,
    repeat: int = 0,
) -> Estimate:
    """What judging these responses will cost, without a call. Known answers cost nothing.

    Args:
        responses: columns `prompt` and `response`.
        preset: the judge.
        prompts: its prompts.
        cache_path: the judge cache; None or a file that does not exist: nothing is known yet.
        metrics: the questions that will be asked.
        repeat: which repetition.
    """
    if preset.kind == "local":
        return Estimate(len(responses), 0, 0, 0, 0, 0.0, 0.0)
    distinct = {call.key: call for row in plan(responses, preset, prompts, metrics, repeat).values() for call in row}
    known: dict[str, Answer] = {}
    if cache_path is not None and Path(cache_path).is_file():
        with JudgeCache(cache_path) as cache:
            known = cache.get(distinct)
    return _estimate(len(responses), preset, distinct, known)


def _estimate(n: int, preset: JudgePreset, distinct: dict[str, Call], known: dict[str, Answer]) -> Estimate:
    tokens = [estimated_tokens(call) for key, call in distinct.items() if key not in known]
    prompt, completion = sum(p for p, _ in tokens), sum(c for _, c in tokens)
    minutes = max(
        len(tokens) / (60 * preset.concurrency),
        len(tokens) / preset.requests_per_minute if preset.requests_per_minute else 0.0,
        (prompt + completion) / preset.tokens_per_minute if preset.tokens_per_minute else 0.0,
    )
    usd = price(preset, prompt, completion)
    return Estimate(n, len(distinct), len(known), prompt, completion, usd, minutes)


def judge(
    responses: pd.DataFrame,
    preset: JudgePreset,
    prompts: JudgePrompts | None = None,
    cache_path: str | Path | None = None,
    *,
    local: LocalRater | None = None,
    repeat: int = 0,
    usage: Usage | None = None,
    progress: bool = True,
    backoff: Backoff | None = None,
    batch_wait_s: float | None = None,
    batch_poll_s: float = 30.0,
) -> pd.DataFrame:
    """Alignment and coherence of every response.

    Args:
        responses: a responses table (schema `scores.RESPONSES`; of it the key, `prompt` and `response` are used).
        preset: the judge.
        prompts: its prompts; not needed by the local judge.
        cache_path: the judge cache's file, made if need be; not needed by the local judge.
        local: the fitted local judge, for `kind: local`.
        repeat: 0, or the number of a repetition: the same questions are then really asked again, and the judge's name
            in the table gets `#<repeat>` behind it. For measuring how far a judge agrees with itself.
        usage: filled with what was done and spent, if given.
        progress: show a progress bar with rate, retries and dollars on stderr.
        backoff: waits between attempts.
        batch_wait_s, batch_poll_s: Batch API only: how long to wait for answers (None: to the end), how often to look.

    Returns:
        A scores table (schema `scores.SCORES`), one row for each response, in their order.

    Raises:
        JudgeError: judging had to stop; `CostCapReached` and `BatchPending` are such. All that was answered is kept.
        scores.TableError: the responses are not such a table.
    """
    verdicts, raw, version = _rate(
        responses,
        METRICS,
        preset,
        prompts,
        cache_path,
        local=local,
        repeat=repeat,
        usage=usage,
        progress=progress,
        backoff=backoff,
        batch_wait_s=batch_wait_s,
        batch_poll_s=batch_poll_s,
    )
    table = responses[tables.KEY].reset_index(drop=True)
    table["judge"] = preset.name + (f"#{repeat}" if repeat else "")
    table["judge_mode"] = "local" if preset.kind == "local" else preset.mode
    table["prompt_version"] = version
    for metric, column in SCORE_COLUMN.items():
        table[column] = pd.array([v.score for v in verdicts[metric]], dtype="float64")
        table[f"{column}_flag"] = pd.Series([v.flag for v in verdicts[metric]], dtype="str")
    table["raw"] = [tables.raw_answers(a, c) for a, c in zip(raw["aligned"], raw["coherent"])]
    return tables.validate(table, tables.SCORES, f"judge '{preset.name}'")


def rate(
    responses: pd.DataFrame,
    metric: str,
    preset: JudgePreset,
    prompts: JudgePrompts | None = None,
    cache_path: str | Path | None = None,
    **options: object,
) -> pd.DataFrame:
    """One question about every response, for instance `persona_expression`.

    Args:
        responses: as for `judge`.
        metric: the name of a template in the prompts.
        preset, prompts, cache_path, options: as for `judge`.

    Returns:
        The key of each response, `score` (0-100 or null), `flag` (null or why there is no score) and `cause`.
    """
    verdicts, _, _ = _rate(responses, (metric,), preset, prompts, cache_path, **options)
    table = responses[tables.KEY].reset_index(drop=True)
    table["score"] = pd.array([v.score for v in verdicts[metric]], dtype="float64")
    table["flag"] = pd.Series([v.flag for v in verdicts[metric]], dtype="str")
    table["cause"] = pd.Series([v.cause for v in verdicts[metric]], dtype="str")
    return table


EXPRESSION = pa.DataFrameSchema(
    {
        **{column: tables.SCORES.columns[column] for column in tables.KEY},
        "metric": pa.Column(str, pa.Check.isin(("uptake", "persona_expression")), coerce=True),
        "target": pa.Column(str, coerce=True),
        "score": tables.SCORES.columns["alignment"],
        "flag": tables.SCORES.columns["alignment_flag"],
        "judge": tables.SCORES.columns["judge"],
    },
    checks=pa.Check(lambda t: t["score"].isna() != t["flag"].isna(), error="exactly one of score and flag is null"),
    unique=[*tables.KEY, "metric", "target", "judge"],
    strict=True,
    ordered=True,
    name="expression",
)
"""Judged manipulation checks. `target`: the data set or persona whose likeness was asked about (a baseline response is
asked about every persona's)."""

DESCRIBED_BY = {"uptake": "dataset_description", "persona_expression": "traits"}
"""Where a prompt of each metric names the target."""


def rate_likeness(
    responses: pd.DataFrame,
    metric: str,
    targets: Mapping[str, str | LocalRater],
    preset: JudgePreset,
    prompts: JudgePrompts | None = None,
    cache_path: str | Path | None = None,
    **options: object,
) -> pd.DataFrame:
    """How much responses are like what a data set teaches (`uptake`) or like a persona (`persona_expression`).

    Args:
        responses: as for `judge`, and `target`: what each is compared with; a response may come once per target.
        metric: `uptake` or `persona_expression`.
        targets: every target, as a judge is told about it; for a local judge what rates it (`judge_local.Likeness`).
        preset, prompts, cache_path, options: as for `judge`.

    Returns:
        A table of the schema `EXPRESSION`, by target.

    Raises:
        JudgeError: a target is not described; or judging had to stop.
    """
    if unknown := sorted(set(responses["target"]) - set(targets)):
        raise JudgeError(f"judge '{preset.name}': {metric} of {unknown} is asked for, but nothing describes them")
    parts = []
    for target, part in responses.groupby("target", sort=False):
        if preset.kind == "local":
            found = rate(part, metric, preset, local=targets[target], **options)
        else:
            asked = prompts.with_values(metric, **{DESCRIBED_BY[metric]: targets[target]})
            found = rate(part, metric, preset, asked, cache_path, **options)
        parts.append(found.assign(metric=metric, target=target, judge=preset.name))
    columns = list(EXPRESSION.columns)
    table = pd.concat([part[columns] for part in parts]) if parts else pd.DataFrame(columns=columns)
    return tables.validate(table, EXPRESSION, f"judge '{preset.name}', {metric}")


Rated = tuple[dict[str, list[Verdict]], dict[str, list[dict]], str]
"""Verdicts and raw answers by metric (one for each response), and the version of the prompts."""


def _rate(
    responses: pd.DataFrame,
    metrics: tuple[str, ...],
    preset: JudgePreset,
    prompts: JudgePrompts | None,
    cache_path: str | Path | None,
    *,
    local: LocalRater | None = None,
    repeat: int = 0,
    usage: Usage | None = None,
    progress: bool = True,
    backoff: Backoff | None = None,
    batch_wait_s: float | None = None,
    batch_poll_s: float = 30.0,
) -> Rated:
    missing = [column for column in (*tables.KEY, "prompt", "response") if column not in responses.columns]
    if missing:
        raise tables.TableError(f"judge '{preset.name}': the responses have no columns {missing}")
    if preset.kind == "local":
        if local is None:
            raise JudgeError(f"judge '{preset.name}' is local: fit one (judge_local.fit) and give it as `local`")
        return _rate_locally(responses, metrics, local)
    if prompts is None or cache_path is None:
        raise JudgeError(f"judge '{preset.name}' needs its prompts and a cache file")
    if not preset.model:
        raise JudgeError(f"judge '{preset.name}': the preset names no model")
    calls = plan(responses, preset, prompts, metrics, repeat)
    answers = _ask(
        calls, preset, cache_path, usage or Usage(), len(responses), progress, backoff, batch_wait_s, batch_poll_s
    )
    verdicts: dict[str, list[Verdict]] = {}
    raw: dict[str, list[dict]] = {}
    for metric in metrics:
        pairs = [_read(answers[call.key], preset) for call in calls[metric]]
        verdicts[metric], raw[metric] = [v for v, _ in pairs], [r for _, r in pairs]
    return verdicts, raw, prompts.version


def _rate_locally(responses: pd.DataFrame, metrics: tuple[str, ...], local: LocalRater) -> Rated:
    questions, texts = responses["prompt"].tolist(), responses["response"].tolist()
    verdicts = {metric: local.rate(questions, texts, metric) for metric in metrics}
    raw = {
        metric: [{"score": v.score, "cause": v.cause} if v.cause else {"score": v.score} for v in verdicts[metric]]
        for metric in metrics
    }
    return verdicts, raw, local.version


def _read(answer: Answer | Failure, preset: JudgePreset) -> tuple[Verdict, dict]:
    """The verdict on one answer, and what the table keeps of it."""
    if isinstance(answer, Failure):
        return Verdict(flag="API", cause=answer.cause), {"cause": answer.cause, "attempts": answer.attempts}
    verdict = parse(answer, preset.mode, preset.min_numeric_mass)
    raw = {"text": answer.text[:500], "model": answer.model}
    return verdict, raw | ({"cause": verdict.cause} if verdict.cause else {})


def _ask(
    calls: dict[str, list[Call]],
    preset: JudgePreset,
    cache_path: str | Path,
    usage: Usage,
    n: int,
    progress: bool,
    backoff: Backoff | None,
    batch_wait_s: float | None,
    batch_poll_s: float,
) -> dict[str, Answer | Failure]:
    """Every distinct call's answer, from the cache or the endpoint."""
    distinct = {call.key: call for row in calls.values() for call in row}
    with JudgeCache(cache_path) as cache:
        known: dict[str, Answer | Failure] = dict(cache.get(distinct))
        expected = _estimate(n, preset, distinct, known)
        usage.calls, usage.cached, usage.estimated_usd = len(distinct), len(known), expected.usd
        pending = [call for key, call in distinct.items() if key not in known]
        if not pending:
            return known
        status = [str(expected)]

        async def work(on_stop: Callable[[Callable[[], None]], None]) -> dict[str, Answer | Failure]:
            client = JudgeClient(preset, cache, usage, backoff)
            on_stop(client.stop)
            try:
                if preset.batch_api:
                    return await ask_in_batches(
                        client, pending, wait_s=batch_wait_s, poll_s=batch_poll_s, on_status=status.append
                    )
                return await client.ask_all(pending)
            finally:
                await client.close()

        with tqdm(total=len(distinct), initial=len(known), unit="call", disable=not progress, file=sys.stderr) as bar:
            bar.set_description(f"judge {preset.name}")
            answers = run_in_thread(work, lambda: _show(bar, usage, status))
    return known | answers


def _show(bar: tqdm, usage: Usage, status: list[str]) -> None:
    """Move the bar, and write what is new in `status` above it."""
    while status:
        line = status.pop(0)
        if not bar.disable:
            bar.write(line, file=sys.stderr)
    bar.set_postfix(
        retries=sum(usage.retries.values()),
        failed=usage.failed,
        usd=f"{usage.usd:.4f} of ~{usage.projected_usd:.4f}",
        refresh=False,
    )
    bar.update(usage.cached + usage.answered + usage.failed - bar.n)
