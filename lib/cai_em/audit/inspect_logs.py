"""Inspect logs: read into a flat table, and written from our responses and scores, through `inspect_ai` itself.

The log's file format is not frozen, so the library reads and writes it, not we. It is an optional lock
(`requirements/inspect.lock`), installed when a log is given. An epoch is our sample (theirs begin at 1), NaN and null
are "not scored". What an exported log needs to become our tables again stands in the metadata of its samples.

`task` is an Inspect task with our questions and our judge's prompts: `inspect eval` runs it on any of its models.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd

from cai_em.audit.flat import LINE, Flat, as_text, flat
from cai_em.audit.opening import AuditError, check_size, check_zip, kind

INSTALL = "python -m pip install -r requirements/inspect.lock (./run_all.sh audit does it when it is given a log)"
TASK = "cai_em"
OURS = ("model", "persona", "dataset", "seed", "sample", "alignment_flag", "coherence_flag", "judge", "raw")
"""What an exported sample's metadata hold: the columns of our tables that Inspect has no place for."""


def inspect_installed() -> bool:
    """Whether Inspect logs can be read here."""
    return find_spec("inspect_ai") is not None


def _library() -> Any:
    if not inspect_installed():
        raise AuditError(f"an Inspect log is read by inspect_ai, which is not installed: {INSTALL}")
    import inspect_ai.log

    return inspect_ai.log


def read_inspect(path: Path) -> Flat:
    """An Inspect log as a flat table: a row a sample and epoch, a column a score.

    A scorer whose value is a mapping gives a column per key; one whose value is a number or a word, a column of its own
    name. A sample that ended with an error keeps its row, the error in `error`.

    Raises:
        AuditError: inspect_ai is not installed, the log is beyond the limits, or the library cannot read it.
    """
    log_library = _library()
    if kind(path) == ".eval":
        check_zip(path)
    else:
        check_size(path)
    place = str(path.resolve())  # never a name that could be an address
    try:
        log = log_library.read_eval_log(place, resolve_attachments=True)
    except Exception as error:
        raise AuditError(
            f"{path}: inspect_ai cannot read this log: {type(error).__name__}: {str(error)[:300]}"
        ) from error
    result = Flat(pd.DataFrame())
    if log.status != "success":
        result.notes.append(f"the log says {log.status!r}: the evaluation did not run to its end")
    top: dict[str, Any] = {"model": as_text(log.eval.model), "task": as_text(log.eval.task)}
    top |= {f"task_{k}": v for k, v in (log.eval.task_args or {}).items() if isinstance(v, str | int | float)}
    samples = log.samples or []
    if not samples:
        raise AuditError(f"{path}: no sample in this log (status {log.status!r}): nothing to audit")
    result.rows = flat((_sample(i, sample, top) for i, sample in enumerate(samples, 1)), str(path))
    return result


def _sample(number: int, sample: Any, top: Mapping[str, Any]) -> dict[str, Any]:
    said = sample.input if isinstance(sample.input, list) else []
    systems = [m.text for m in said if m.role == "system"] or [m.text for m in sample.messages if m.role == "system"]
    asked = [m.text for m in said if m.role == "user"] or ([sample.input] if isinstance(sample.input, str) else [])
    has_output = bool(sample.output and sample.output.choices)
    row = {
        LINE: number,
        **top,
        "question_id": as_text(sample.id),
        "question": asked[-1] if asked else None,
        "system_prompt": systems[0] if systems else None,
        "sample": sample.epoch - 1,
        "response": sample.output.completion if has_output else None,
        "finish_reason": sample.output.choices[0].stop_reason if has_output else None,
        "error": sample.error.message if sample.error else None,
    }
    for name, score in (sample.scores or {}).items():
        values = score.value if isinstance(score.value, Mapping) else {name: score.value}
        for key, value in values.items():
            row[key] = None if isinstance(value, float) and math.isnan(value) else value
        flags = {k: v for k, v in (score.metadata or {}).items() if k in ("alignment_flag", "coherence_flag")}
        row |= {k: v for k, v in flags.items() if isinstance(v, str)}
        if getattr(score, "reason", None) == "refusal":
            row.setdefault("alignment_flag", "REFUSAL")
    # A sample's own fields, where the task wrote them: they may name conditions. Ours come back as they were.
    metadata = {k: v for k, v in (sample.metadata or {}).items() if isinstance(v, str | int | float) or v is None}
    return {
        **{k: v for k, v in metadata.items() if k not in row},
        **row,
        **{k: metadata[k] for k in OURS if k in metadata},
    }


def export(responses: pd.DataFrame, scores: pd.DataFrame, folder: str | Path, *, form: str = "eval") -> list[Path]:
    """Our responses and scores as Inspect logs, one a condition, which `inspect view` opens.

    Args:
        responses: table of `RESPONSES`.
        scores: table of `SCORES`, of one judge.
        folder: where the logs go.
        form: `eval` (a zip archive) or `json`.

    Returns:
        The logs' paths.

    Raises:
        AuditError: inspect_ai is not installed.
    """
    from cai_em.records.keys import CONDITION
    from cai_em.records.tables import one_judge, with_responses

    log_library = _library()
    judge = one_judge(scores)
    table = with_responses(scores, responses)
    written = []
    for condition, part in table.groupby(CONDITION, sort=False):
        stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", "_".join(map(str, condition)))
        path = Path(folder).resolve() / f"{stem}.{form}"
        path.parent.mkdir(parents=True, exist_ok=True)
        log_library.write_eval_log(_log(log_library, condition, part, judge), str(path), format=form)
        written.append(path)
    return written


def _log(library: Any, condition: Sequence[Any], part: pd.DataFrame, judge: str) -> Any:
    from inspect_ai.model import ChatMessageAssistant, ChatMessageUser, ModelOutput
    from inspect_ai.scorer import Score

    def value(number: float) -> float | None:
        return None if number != number else float(number)

    samples = []
    epochs = part.groupby("question_id", sort=False).cumcount() + 1
    for row, epoch in zip(part.itertuples(), epochs):
        reason = {"REFUSAL": "refusal", "PARSE": "invalid_response_format", "API": "grader_failed"}.get(
            row.alignment_flag
        )
        samples.append(
            library.EvalSample(
                id=row.question_id,
                epoch=int(epoch),
                input=row.prompt,
                target="",
                messages=[ChatMessageUser(content=row.prompt), ChatMessageAssistant(content=row.response)],
                output=ModelOutput.from_content(row.model, row.response),
                scores={
                    judge: Score(
                        value={"alignment": value(row.alignment), "coherence": value(row.coherence)},
                        explanation=row.raw,
                        reason=reason,
                    )
                },
                metadata={name: _plain(getattr(row, name)) for name in OURS},
            )
        )
    model, persona, dataset, seed = condition
    questions = part["question_id"].nunique()
    return library.EvalLog(
        version=2,
        status="success",
        eval=library.EvalSpec(
            created=pd.Timestamp.now(tz="UTC").isoformat(timespec="seconds"),
            task=TASK,
            task_args={"persona": persona, "dataset": dataset, "seed": int(seed)},
            dataset=library.EvalDataset(
                name="questions", samples=questions, sample_ids=list(part["question_id"].unique())
            ),
            model=f"{model}/{persona}/{dataset}",
            config=library.EvalConfig(epochs=int(epochs.max())),
        ),
        samples=samples,
    )


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return value
    if value is None or value != value:
        return None
    return value.item() if hasattr(value, "item") else value


def task(
    questions: Sequence[tuple[str, str]],
    prompts: Mapping[str, str],
    *,
    epochs: int = 50,
    temperature: float = 1.0,
    max_tokens: int = 600,
    grader: str | None = None,
) -> Any:
    """Our questions and judge as an Inspect task, for `inspect eval` on whatever model it knows.

    Args:
        questions: (id, text).
        prompts: `aligned` and `coherent` with `{question}` and `{answer}`, as in `judge_prompts.yaml`.
        epochs: samples a question.
        temperature, max_tokens: of the sampled model.
        grader: Inspect's name of the judge; None: the role `grader`, else the model itself.
    """
    _library()
    from inspect_ai import Task
    from inspect_ai.dataset import Sample
    from inspect_ai.model import GenerateConfig, get_model
    from inspect_ai.scorer import Score, mean, scorer
    from inspect_ai.solver import generate

    from cai_em.audit.values import parse_score

    @scorer(metrics={"alignment": [mean()], "coherence": [mean()]}, name=TASK)
    def judged() -> Any:
        async def score(state: Any, target: Any) -> Any:
            judge = get_model(grader) if grader else get_model(role="grader")
            values, flags, raw = {}, {}, {}
            for ours, theirs in (("alignment", "aligned"), ("coherence", "coherent")):
                asked = (
                    prompts[theirs].replace("{question}", state.input_text).replace("{answer}", state.output.completion)
                )
                said = await judge.generate(asked, config=GenerateConfig(temperature=0.0, max_tokens=8))
                raw[ours] = said.completion
                values[ours], flags[f"{ours}_flag"] = parse_score(said.completion)
            return Score(
                value={k: None if v is None else float(v) for k, v in values.items()},
                answer=state.output.completion,
                explanation=str(raw),
                metadata={k: v for k, v in flags.items() if v},
            )

        return score

    return Task(
        dataset=[Sample(id=key, input=text) for key, text in questions],
        solver=generate(),
        scorer=judged(),
        epochs=epochs,
        config=GenerateConfig(temperature=temperature, max_tokens=max_tokens),
        name=TASK,
    )
