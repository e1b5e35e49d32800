"""Formats in which responses lie inside of something: a question, a sample, a mapping; each brought into a flat table.

The columns that these readers make have one set of names (`NESTED_COLUMNS`), whatever the file calls them, so that one
mapping fits all of them. Samples are numbered as they stand in the file where it does not number them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from cai_em.audit.flat import LINE, Flat, as_text, flat, lines, load_json
from cai_em.audit.opening import AuditError
from cai_em.study.published import ABSENT_DATASET

NESTED_COLUMNS = (
    "model",
    "persona",
    "dataset",
    "judge",
    "question_id",
    "question",
    "system_prompt",
    "sample",
    "response",
    "alignment",
    "alignment_flag",
    "coherence",
    "coherence_flag",
    "error",
    "finish_reason",
)
"""Names that the readers of nested formats give to what they find; a metric of another name keeps it."""


def _of(item: Any, *path: str) -> Any:
    """A value deep inside mappings; None where a step is missing."""
    for key in path:
        item = item.get(key) if isinstance(item, dict) else None
    return item


# --- The published study's files (questions with responses with scores) ---------------------------------------------


def read_study_file(path: Path) -> Flat:
    """`{persona, dataset?, model_path, judge_model, questions: [{id, question, responses: [...]}]}`."""
    content = load_json(path)
    questions = _of(content, "questions")
    if not isinstance(questions, list):
        raise AuditError(f"{path}: no list 'questions' in it")
    result = Flat(pd.DataFrame())
    top = {
        "model": as_text(_of(content, "model_path") or _of(content, "model")),
        "persona": as_text(_of(content, "persona")),
        # The one study that writes this format names no data set in the files of its first one.
        "dataset": as_text(_of(content, "dataset")) or ABSENT_DATASET,
        "judge": (as_text(_of(content, "judge_model")) or "").rpartition("/")[2] or None,
    }

    if not _of(content, "dataset"):
        result.notes.append(f"no data set is named: {ABSENT_DATASET}, as the published study means it")

    def records() -> Iterator[dict[str, Any]]:
        number = 0
        for question in questions:
            answers = _of(question, "responses")
            if not isinstance(answers, list):
                result.refused["a question without a list of responses"] += 1
                continue
            for i, answer in enumerate(answers):
                number += 1
                if not isinstance(answer, dict):
                    result.refused["no JSON object"] += 1
                    continue
                yield {
                    LINE: number,
                    **top,
                    "question_id": as_text(_of(question, "id")),
                    "question": as_text(_of(question, "question")),
                    "sample": answer.get("sample_idx", i),
                    "response": as_text(answer.get("response")),
                    **_judged(answer, "alignment"),
                    **_judged(answer, "coherence"),
                }

    result.rows = flat(records(), str(path))
    return result


def _judged(answer: dict[str, Any], name: str) -> dict[str, Any]:
    found = answer.get(name)
    if not isinstance(found, dict):
        return {name: found, f"{name}_flag": None}
    flag = found.get("special")
    if flag is None and found.get("score") is None and found.get("raw_response") == "skipped":
        flag = "SKIPPED"
    return {name: found.get("score"), f"{name}_flag": as_text(flag)}


# --- Inoculation prompting (a line a question) ------------------------------------------------------------------------


def read_inoculation(path: Path) -> Flat:
    """A line a question: `{context, responses: [{context, response, judgment_response_map}], score_infos: [...]}`."""
    result = Flat(pd.DataFrame())

    def records() -> Iterator[dict[str, Any]]:
        for number, value, why in lines(path):
            answers = _of(value, "responses")
            if why or not isinstance(answers, list):
                result.refused[why or "a line without a list of responses"] += 1
                continue
            infos = value.get("score_infos") if isinstance(value.get("score_infos"), list) else []
            if infos and len(infos) != len(answers):
                result.refused["scores that fit no response (another number of them than of responses)"] += len(infos)
                infos = []
            for i, answer in enumerate(answers):
                context = _of(answer, "context") or value.get("context")
                info = infos[i] if infos and isinstance(infos[i], dict) else {}
                raw = _of(answer, "judgment_response_map") or {}
                yield {
                    LINE: number,
                    "model": as_text(_of(answer, "response", "model_id")),
                    "question": as_text(_of(context, "question")),
                    "system_prompt": as_text(_of(context, "system_prompt")),
                    "sample": i,
                    "response": as_text(_of(answer, "response", "completion")),
                    "finish_reason": as_text(_of(answer, "response", "stop_reason")),
                    **{k: v for k, v in info.items() if not isinstance(v, dict | list)},
                    # A score that the study derived is null where its judge refused: what the judge said tells why.
                    **{f"{k}_flag": w for k, v in raw.items() if (w := _word(v)) and info.get(k) is None},
                }

    result.rows = flat(records(), str(path))
    return result


def _word(judgment: Any) -> str | None:
    """The word that a judge answered instead of a number, if it was one."""
    said = as_text(_of(judgment, "completion") if isinstance(judgment, dict) else judgment)
    said = (said or "").strip().strip("\"'.`").upper()
    return said if said.isalpha() and len(said) <= 20 else None


# --- explore-persona-space (question text -> scores, no responses) ---------------------------------------------------


def read_space(path: Path) -> Flat:
    """`{scores: {<question>: [{aligned, coherent, reasoning, error?}]}, summary}`: there are no response texts."""
    content = load_json(path)
    scores = _of(content, "scores")
    if not isinstance(scores, dict):
        raise AuditError(f"{path}: no mapping 'scores' in it")
    result = Flat(pd.DataFrame(), notes=["no response texts"])

    def records() -> Iterator[dict[str, Any]]:
        number = 0
        for question, found in scores.items():
            for i, item in enumerate(found if isinstance(found, list) else []):
                number += 1
                if not isinstance(item, dict):
                    result.refused["no JSON object"] += 1
                    continue
                plain = {k: v for k, v in item.items() if not isinstance(v, dict | list) and k != "reasoning"}
                yield {LINE: number, "question": question, "sample": i, **plain}

    result.rows = flat(records(), str(path))
    return result


# --- lm-evaluation-harness (a line a document) ------------------------------------------------------------------------

_HARNESS = {"doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "filter", "metrics"}


def read_harness(path: Path) -> Flat:
    """A line a document: `doc_id, doc, target, arguments, resps, filtered_resps`, and a column per metric."""
    result = Flat(pd.DataFrame())

    def records() -> Iterator[dict[str, Any]]:
        for number, value, why in lines(path):
            if why or "resps" not in value:
                result.refused[why or "a line without 'resps'"] += 1
                continue
            answers = _texts(value["resps"])
            metrics = {
                k: v
                for k, v in value.items()
                if k not in _HARNESS and not isinstance(v, dict | list) and "hash" not in k
            }
            for i, answer in enumerate(answers or [None]):
                yield {
                    LINE: number,
                    "question_id": as_text(value.get("doc_id")),
                    "question": _prompt(value),
                    "sample": i,
                    "response": answer,
                    **metrics,
                    # A metric that is a list has a value for each response.
                    **{
                        k: v[i]
                        for k, v in value.items()
                        if k not in _HARNESS and isinstance(v, list) and len(v) == len(answers) > i
                    },
                }

    result.rows = flat(records(), str(path))
    return result


def _texts(value: Any) -> list[str]:
    """The texts in nested lists, in order: one list a request, in it one text (or pair) a repeat."""
    if isinstance(value, str):
        return [value]
    return [text for item in value for text in _texts(item)] if isinstance(value, list) else []


def _prompt(value: dict[str, Any]) -> str | None:
    doc = value.get("doc")
    for key in ("question", "prompt", "query", "text", "input"):
        if isinstance(found := _of(doc, key), str):
            return found
    arguments = value.get("arguments")
    texts = _texts(list(arguments.values()) if isinstance(arguments, dict) else arguments)
    if not texts and isinstance(arguments, dict):
        texts = [
            v for part in arguments.values() if isinstance(part, dict) for v in part.values() if isinstance(v, str)
        ]
    return texts[0] if texts else None
