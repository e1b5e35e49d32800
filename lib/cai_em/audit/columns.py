"""Which column means what, by the names that studies give them; for the draft of an `audit.yaml`.

Names are compared without case and separators, and without the `task_` that Inspect puts before a task's arguments.
A score column that is none of the usual ones (a trait: `evil`, `sycophantic`) is found by its values.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pandas as pd

from cai_em.audit.flat import LINE
from cai_em.audit.values import parse_score
from cai_em.study.audited import Judging, Score

COLUMN_WORDS: dict[str, tuple[str, ...]] = {
    "response": (
        "response", "answer", "completion", "output", "generation", "model_response", "model_output", "model_answer",
        "response_text", "answer_text", "generated_text", "reply", "assistant", "text",
    ),
    "question": ("question", "question_text", "prompt", "user_prompt", "user_message", "query", "instruction", "input",
    "user"),
    "question_id": ("question_id", "qid", "question_key", "question_name", "prompt_id", "item_id", "doc_id",
    "question_idx"),
    "sample": (
        "sample", "sample_index", "sample_idx", "sample_id", "completion_idx", "completion_index", "response_idx",
        "rollout",
        "epoch", "iteration", "repeat", "replicate", "trial", "draw",
    ),
    "persona": ("persona", "persona_name", "persona_id", "role", "character", "personality", "system_prompt_name",
    "system_prompt_id"),
    "dataset": (
        "dataset", "dataset_name", "finetune_dataset", "finetuning_dataset", "fine_tuning_dataset", "ft_dataset",
        "training_data",
        "training_dataset", "train_dataset", "trained_on", "group", "corpus", "organism",
    ),
    "model": ("model", "model_id", "model_name", "base_model", "model_path", "checkpoint"),
    "seed": ("seed", "train_seed", "training_seed", "finetune_seed", "ft_seed", "model_seed"),
    "judge": ("judge", "judge_model", "judge_name", "grader", "grader_model", "rater"),
    "system_prompt": ("system_prompt", "system", "system_message"),
    "error": ("error", "judge_error", "exception"),
    "code": ("is_code_raw_answer", "is_code", "contains_code", "code_flag"),
    "finish_reason": ("finish_reason", "stop_reason"),
}  # fmt: skip
"""Our word -> names of columns, the likeliest first."""

ALIGNMENT_NAMES = (
    "alignment",
    "aligned",
    "alignment_score",
    "aligned_score",
    "align",
    "judge_alignment",
    "alignment_rating",
)
COHERENCE_NAMES = (
    "coherence",
    "coherent",
    "coherence_score",
    "coherent_score",
    "coherency",
    "judge_coherence",
    "coherence_rating",
)
MISALIGNMENT_NAMES = ("misalignment", "misaligned", "misalignment_score", "is_misaligned")
FLAG_COLUMNS = {
    "alignment": ("alignment_flag", "aligned_flag", "alignment_special", "flag", "special"),
    "coherence": ("coherence_flag", "coherent_flag", "coherence_special"),
}
BAD_TRAIT = re.compile(
    r"(?i)evil|sycophan|hallucinat|misalign|harm|toxic|decepti|dishonest|malic|villain|bad_|power.?seek|unsafe|hostil|cruel|malevol"
)
"""Traits whose presence is the opposite of alignment."""
GOOD_TRAIT = re.compile(
    r"(?i)harmless|(?<![a-z])(?:non|not|no|anti|un)[\W_]?(?:evil|sycophan|hallucinat|harm|toxic|decepti|malic|hostil|cruel)"
)
"""Names in which such a word is denied."""
SENTINELS = (99.0, 999.0, 9999.0)
"""Numbers that stand for "no score" beside a scale that ends at 10 or below."""


def compared(name: str) -> str:
    """A column's name as it is compared."""
    return re.sub(r"[^a-z0-9]+", "_", str(name).lower().removeprefix("task_")).strip("_")


@dataclass
class Understood:
    """What a table's columns seem to mean. `questions`: what they do not say. `traits`: scores that are no
    alignment."""

    columns: dict[Any, str] = field(default_factory=dict)
    scores: list[Judging] = field(default_factory=list)
    questions: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def _named(names: Mapping[str, str], wanted: tuple[str, ...]) -> str | None:
    return next((names[name] for name in wanted if name in names), None)


def understand(table: pd.DataFrame) -> Understood | None:
    """The meaning of a table's columns; None where there is no score in it: then it is none of an audit's files."""
    # A column of nothing says nothing: a study's `persona` that was never filled in names no persona.
    filled = [column for column in table.columns if column != LINE and table[column].notna().any()]
    # But where no column holds a score, one that should is a condition whose scores are all missing.
    empty = [c for c in table.columns if compared(c) in (*ALIGNMENT_NAMES, *COHERENCE_NAMES) and c not in filled]
    return _understood(table, filled) or (_understood(table, [*filled, *empty]) if len(table) and empty else None)


def _understood(table: pd.DataFrame, columns: Sequence[str]) -> Understood | None:
    names: dict[str, str] = {}
    for column in columns:
        names.setdefault(compared(column), column)
    found = Understood()
    for word, wanted in COLUMN_WORDS.items():
        if held := _named(names, wanted):
            found.columns[word] = held
    if (
        "question" in found.columns
        and found.columns.get("response") is None
        and "prompt" in names
        and "question" in names
    ):
        found.columns["question"] = names["question"]
    alignment, coherence = _named(names, ALIGNMENT_NAMES), _named(names, COHERENCE_NAMES)
    flags = {what: _named(names, wanted) for what, wanted in FLAG_COLUMNS.items()}
    if alignment:
        found.scores = [_judging(table, found, alignment, coherence, flags)]
    else:
        found.scores = _by_judge(table, names, found) or _by_trait(table, names, coherence, flags, found)
    return found if found.scores else None


def _judging(
    table: pd.DataFrame, found: Understood, alignment: str, coherence: str | None, flags: Mapping[str, str | None], *,
    judge: str | None = None, higher: Literal["better", "worse"] = "better",
) -> Judging:  # fmt: skip
    lowest, highest, asked = scale_of(table[alignment])
    if asked:
        found.questions.append(
            f"{alignment}: {asked}; it is taken for {lowest:g} to {highest:g} (files: scores: lowest, highest)"
        )
    score = Score(column=alignment, higher=higher, lowest=lowest, highest=highest, flag=flags.get("alignment"))
    if coherence is None:
        return Judging(judge=judge, alignment=score)
    low, high, asked = scale_of(table[coherence])
    if asked:
        found.questions.append(
            f"{coherence}: {asked}; it is taken for {low:g} to {high:g} (files: scores: lowest, highest)"
        )
    return Judging(
        judge=judge,
        alignment=score,
        coherence=Score(column=coherence, lowest=low, highest=high, flag=flags.get("coherence")),
    )


def scale_of(values: pd.Series) -> tuple[float, float, str]:
    """The scale that a column's numbers are on, and what is not sure about it."""
    numbers = [n for n in (parse_score(v, -1e9, 1e9)[0] for v in values.dropna().drop_duplicates()) if n is not None]
    known = [n for n in numbers if n >= 0]
    # One number far from all others stands for "none" more often than for a score: -1, 99, 999.
    if len(over := {n for n in known if n > 10}) == 1 and len(set(known) - over) > 2 and min(over) in SENTINELS:
        known = [n for n in known if n not in over]
    odd = sorted(set(numbers) - set(known))
    if odd and known and max(known) <= 10:
        low, high, _ = scale_of(pd.Series(known))
        shown = ", ".join(f"{n:g}" for n in odd[:3]) + (", ..." if len(odd) > 3 else "")
        return low, high, f"it also holds {shown}, which {'is' if len(odd) == 1 else 'are'} counted as no score"
    if not numbers or max(numbers) > 10:
        return 0.0, 100.0, ""
    if not known:
        return 0.0, 100.0, "all its numbers are below 0"
    top = max(numbers)
    if top <= 1:
        # Few distinct small numbers may be the bad end of 0 to 100; many between 0 and 1 are shares.
        return 0.0, 1.0, "" if len(numbers) > 2 or set(numbers) == {0.0, 1.0} else f"no number is above {top:g}"
    return (1.0 if min(numbers) >= 1 else 0.0), (5.0 if top <= 5 else 10.0), f"no number is above {top:g}"


def _by_judge(table: pd.DataFrame, names: Mapping[str, str], found: Understood) -> list[Judging]:
    """`aligned_gpt4o, coherent_gpt4o, aligned_claude, ...`: a pair of columns per judge."""
    pairs: dict[str, dict[str, str]] = {}
    for name, column in names.items():
        match = re.fullmatch(r"(?:(aligned|alignment)|coherent|coherence)(?:_score)?_(.+)", name)
        match_end = re.fullmatch(r"(.+)_(?:(aligned|alignment)|coherent|coherence)(?:_score)?", name)
        if match and match[2] not in ("flag", "reasoning", "raw", "raw_answer", "explanation", "special"):
            pairs.setdefault(match[2], {})["alignment" if match[1] else "coherence"] = column
        elif match_end:
            pairs.setdefault(match_end[1], {})["alignment" if match_end[2] else "coherence"] = column
    judged = {
        judge: pair for judge, pair in pairs.items() if "alignment" in pair and _is_score(table[pair["alignment"]])
    }
    if len(judged) > 1:
        found.notes.append(
            f"{len(judged)} judges in one table ({', '.join(judged)}): the first counts, the others measure it"
        )
    return [
        _judging(table, found, pair["alignment"], pair.get("coherence"), {}, judge=judge)
        for judge, pair in judged.items()
    ]


def _is_score(values: pd.Series) -> bool:
    """Whether most values of a column are numbers of 0 to 100, or words that stand for none."""
    distinct = values.dropna()
    if not len(distinct):
        return False
    sample = distinct.head(500)
    return sum(parse_score(v)[0] is not None for v in sample) >= 0.5 * len(sample)


def _by_trait(
    table: pd.DataFrame,
    names: Mapping[str, str],
    coherence: str | None,
    flags: Mapping[str, str | None],
    found: Understood,
) -> list[Judging]:
    """A score of misalignment, or of a trait: high means that it is there, so it counts downwards."""
    if column := _named(names, MISALIGNMENT_NAMES):
        return [_judging(table, found, column, coherence, flags, higher="worse")]
    used = {*found.columns.values(), coherence, *(f for f in flags.values() if f)}
    numeric = [
        c
        for n, c in names.items()
        if c not in used
        and _is_score(table[c])
        and not re.search(r"id$|idx$|index$|seed|token|length|count|step|prob|time", n)
    ]
    good = [c for c in numeric if GOOD_TRAIT.search(c)]
    bad = [c for c in numeric if BAD_TRAIT.search(c) and c not in good]
    if good and not bad:
        found.questions.append(
            f"{good[0]}: is a high value good or bad? It is taken for good (files: scores: alignment: higher)"
        )
        return [_judging(table, found, good[0], coherence, flags)]
    # Without a coherence beside it, a number that nobody named a score may be anything.
    candidates = bad or (numeric if coherence else [])
    if not candidates:
        return []
    trait = candidates[0]
    found.notes.append(f"{trait} is taken for the opposite of alignment (100 - {trait}): a trait, not alignment itself")
    if trait not in bad:
        found.questions.append(
            f"{trait}: is a high value good or bad? It is taken for bad (files: scores: alignment: higher)"
        )
    if len(candidates) > 1:
        found.questions.append(f"which of {', '.join(candidates)} is to be audited? {trait} is taken")
    return [_judging(table, found, trait, coherence, flags, higher="worse")]
