"""Scores for responses: one interface for every judge.

    scores = judge(responses, preset, load_prompts(path), "judge_cache.sqlite")

asks two questions about each response (*aligned*, *coherent*; prompts and parsing in `judge_parse`), through an
OpenAI-compatible endpoint (`judge_client`) or its Batch API (`judge_batch`), or of the local judge (`judge_local`).
Answers come from the cache (`judge_cache`) where they are known; equal questions are asked once. Every response ends
in the table, with a score or with the flag that says why it has none:

    CODE, REFUSAL   the judge said so
    PARSE           the judge answered something that is neither; its words and the cause stand in `raw`
    API             no answer was to be had; the cause stands in `raw`

A table with API flags is a rare thing. Where the server refuses a response for its content or its length, asking again
would be in vain: it is flagged. Any other failure, once the retries are used up, raises (`Unanswered`) before there is
a table; what was answered is kept, and the next run asks the rest. Who wants to go on without them says how large a
share of the calls may be missing (`accept_failures` of the judge's preset); with another share, the stage runs again.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
import pandera.pandas as pa

from cai_em.endpoint.asking import ask
from cai_em.endpoint.batch import ask_in_batches
from cai_em.endpoint.cache import Answer, JudgeCache, JudgeError, call_key
from cai_em.endpoint.calls import Call, Estimate, Usage, estimate_calls
from cai_em.endpoint.client import Backoff, Failure
from cai_em.judge.prompts import METRICS, Judgement, JudgePrompts, parse, splits_numbers
from cai_em.records import tables
from cai_em.records.keys import KEY
from cai_em.study.entries import JudgePreset

SCORE_COLUMN = {"aligned": "alignment", "coherent": "coherence"}


class LocalRater(Protocol):
    """What the local judge offers; see `cai_em.judge.local.LocalJudge`."""

    @property
    def version(self) -> str:
        """Names the training texts."""
        ...

    def rate(self, prompts: list[str], responses: list[str], metric: str) -> list[Judgement]:
        """A verdict for each response."""
        ...


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


def plan_judging(
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
    distinct = {
        call.key: call for row in plan_judging(responses, preset, prompts, metrics, repeat).values() for call in row
    }
    known: dict[str, Answer] = {}
    if cache_path is not None and Path(cache_path).is_file():
        with JudgeCache(cache_path) as cache:
            known = cache.get(distinct)
    return estimate_calls(len(responses), preset, distinct, known)


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
        usage: what was done and spent is added to it, if given.
        progress: print the estimate, and every half minute rate, retries and dollars.
        backoff: waits between attempts.
        batch_wait_s, batch_poll_s: Batch API only: how long to wait for answers (None: to the end), how often to look.

    Returns:
        A scores table (schema `scores.SCORES`), one row for each response, in their order.

    Raises:
        JudgeError: judging had to stop; `CostCapReached`, `BatchPending`, `Unanswered` and `CacheError` are such. All
            that was answered is kept.
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
    table = responses[KEY].reset_index(drop=True)
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
    **options: Any,
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
    table = responses[KEY].reset_index(drop=True)
    table["score"] = pd.array([v.score for v in verdicts[metric]], dtype="float64")
    table["flag"] = pd.Series([v.flag for v in verdicts[metric]], dtype="str")
    table["cause"] = pd.Series([v.cause for v in verdicts[metric]], dtype="str")
    return table


EXPRESSION = pa.DataFrameSchema(
    {
        **{column: tables.SCORES.columns[column] for column in KEY},
        "metric": pa.Column(str, pa.Check.isin(("uptake", "persona_expression")), coerce=True),
        "target": pa.Column(str, coerce=True),
        "score": tables.SCORES.columns["alignment"],
        "flag": tables.SCORES.columns["alignment_flag"],
        "judge": tables.SCORES.columns["judge"],
    },
    checks=pa.Check(lambda t: t["score"].isna() != t["flag"].isna(), error="exactly one of score and flag is null"),
    unique=[*KEY, "metric", "target", "judge"],
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
    **options: Any,
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
            asked = prompts.with_values(metric, **{DESCRIBED_BY[metric]: str(targets[target])})
            found = rate(part, metric, preset, asked, cache_path, **options)
        parts.append(found.assign(metric=metric, target=target, judge=preset.name))
    columns = list(EXPRESSION.columns)
    table = pd.concat([part[columns] for part in parts]) if parts else pd.DataFrame(columns=columns)
    return tables.validate(table, EXPRESSION, f"judge '{preset.name}', {metric}")


def estimate_likeness(
    responses: pd.DataFrame,
    metric: str,
    targets: Mapping[str, str],
    preset: JudgePreset,
    prompts: JudgePrompts,
    cache_path: str | Path | None = None,
) -> Estimate:
    """What `rate_likeness` will cost, without a call; arguments as there (responses of unknown targets: nothing)."""
    found = Estimate()
    for target, part in responses.groupby("target", sort=False) if preset.kind != "local" else ():
        if target in targets:
            asked = prompts.with_values(metric, **{DESCRIBED_BY[metric]: targets[target]})
            found += estimate(part, preset, asked, cache_path, metrics=(metric,))
    return found


Rated = tuple[dict[str, list[Judgement]], dict[str, list[dict]], str]
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
    missing = [column for column in (*KEY, "prompt", "response") if column not in responses.columns]
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
    calls = plan_judging(responses, preset, prompts, metrics, repeat)
    in_batches = partial(ask_in_batches, wait_s=batch_wait_s, poll_s=batch_poll_s)
    answers = ask(
        (call for row in calls.values() for call in row),
        preset,
        cache_path,
        texts=len(responses),
        usage=usage,
        progress=progress,
        backoff=backoff,
        check_first=partial(_check_logprobs, preset) if preset.mode == "logprob" else None,
        ask_pending=in_batches if preset.batch_api else None,
    )
    verdicts: dict[str, list[Judgement]] = {}
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


def _read(answer: Answer | Failure, preset: JudgePreset) -> tuple[Judgement, dict]:
    """The verdict on one answer, and what the table keeps of it."""
    if isinstance(answer, Failure):
        return Judgement(flag="API", cause=answer.cause), {"cause": answer.cause, "attempts": answer.attempts}
    verdict = parse(answer, preset.mode, preset.min_numeric_mass)
    raw = {"text": answer.text[:500], "model": answer.model}
    return verdict, raw | ({"cause": verdict.cause} if verdict.cause else {})


def _check_logprobs(preset: JudgePreset, first: Answer) -> None:
    """Whether log-probabilities of this judge can be read, by its first answer."""
    if not first.top:
        raise JudgeError(f"judge '{preset.name}' gives no log-probabilities; set mode: integer or another endpoint")
    if splits_numbers(first):
        raise JudgeError(f"judge '{preset.name}': its tokenizer splits numbers into digits; set mode: integer")
