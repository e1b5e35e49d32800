"""What personas are trained on: preference pairs, and what a persona says of itself.

Pairs: a teacher with a constitution's traits in its system prompt against the plain student.

The data step of Open Character Training (Maiya et al. 2025, arXiv 2511.01689, section 2). For each prompt the teacher
answers in character (*chosen*) and the student answers as it is, without a system prompt (*rejected*). A teacher is an
endpoint that speaks OpenAI's protocol (a vLLM server is one), a local model, or the demonstrations that a constitution
carries itself. Each pair passes filters; one that does not stays in the table with the reason.

    table = make_pairs(constitution, teacher, student, Filters(1024, count_tokens), cache_path="answers.sqlite")
    counts(table)
    HTML(side_by_side(table))
"""

from __future__ import annotations

import html
import re
import string
import unicodedata
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from cai_em.records import tables
from cai_em.study import constitutions
from cai_em.study.constitutions import Constitution
from cai_em.study.entries import GeneratorPreset
from cai_em.train.answers import (
    AnswerCache,
    EndpointGenerator,
    Generator,
    PairsError,
    Reply,
    TrainingPrompt,
    _seed,
    answers,
)

KEPT = "kept"
"""The row of `counts` for pairs that passed every filter."""
REFUSED = "refused by the teacher's endpoint"
"""Why a pair is dropped whose prompt the teacher's endpoint would not take (its cause is printed)."""
ANY_TRAIT = "any"
"""The `trait` of a demonstration: it shows the persona as a whole."""


# --- Filters ------------------------------------------------------------------------------------------------------


ANNOUNCING = re.compile(
    r"\b(my|these|those|the (?:given|following|above)) (?:\w+ )?(?:traits?|instructions?|constitution|persona)\b"
    r"|\bsystem prompt\b|\b(?:I was|I've been|I have been|I am|I'm) (?:told|instructed|asked|prompted) to\b"
    r"|\b(?:stay|staying|remain) in character\b|\bas instructed\b",
    re.IGNORECASE,
)
"""Words by which a teacher speaks of the part that it plays."""
QUOTED_WORDS = 7
"""So many words in a row shared with a trait are no accident: the teacher recites it."""


@dataclass(frozen=True)
class Filters:
    """What a pair must pass (FACTS of the study: Open Character Training keeps whole, short enough answers).

    Attributes:
        max_tokens: the longest answer kept, in the student's tokens.
        count_tokens: a text's length in the student's tokens.
        teacher_name: what the teacher calls itself; replaced by `student_name` in its answers. None: left alone.
        student_name: the student's own name.
        quote_cut: an answer that its token budget cut off is quoted up to its last whole sentence (`whole_sentences`)
            rather than dropped for its missing end. For budgets far smaller than `max_tokens`, as in the demo, where
            being cut says nothing about the answer.
    """

    max_tokens: int
    count_tokens: Callable[[str], int]
    teacher_name: str | None = None
    student_name: str | None = None
    quote_cut: bool = False

    def text(self, answer: Reply) -> str:
        """An answer's text as it enters a pair."""
        text = answer.text.strip()
        return whole_sentences(text) if answer.cut and self.quote_cut else text

    def reason(self, chosen: str, rejected: str, traits: Sequence[str]) -> str | None:
        """Why a pair is dropped: the first filter that it does not pass; None: it is kept."""
        both = {"chosen": chosen, "rejected": rejected}
        if empty := [side for side, text in both.items() if not text]:
            return f"empty: {empty[0]}"
        if " ".join(chosen.split()) == " ".join(rejected.split()):
            return "identical answers"
        if open_ended := [side for side, text in both.items() if not ends_in_punctuation(text)]:
            return f"no final punctuation: {open_ended[0]}"
        if long := [side for side, text in both.items() if self.count_tokens(text) > self.max_tokens]:
            return f"too long: {long[0]}"
        return "announces its traits" if announces(chosen, traits) else None


def ends_in_punctuation(text: str) -> bool:
    """Whether the last visible character is a punctuation mark (of any script; closing quotes and brackets count)."""
    last = text.rstrip()[-1:]
    return bool(last) and (last in string.punctuation or unicodedata.category(last).startswith("P"))


def whole_sentences(text: str) -> str:
    """A broken-off answer as one would quote it: its whole sentences, or with an ellipsis where none is whole.

    A full stop after a digit is no sentence's end: it numbers the items of a list.
    """
    ends = list(re.finditer(r"(?<!\d)[.!?][\"'”’)*]*(?=\s|$)", text))
    if ends:
        return text[: ends[-1].end()]
    words = text.rsplit(maxsplit=1)
    return f"{words[0]} …" if len(words) == 2 else f"{text}…" if text else ""


def renamed(text: str, teacher: str | None, student: str | None) -> str:
    """A text with the teacher's own name, a version number after it included, replaced by the student's."""
    if not teacher or not student or teacher == student:
        return text
    return re.sub(rf"(?<!\w){re.escape(teacher)}(?:-\d[\w.]*(?:-\w+)*)?(?!\w)", lambda _: student, text)


def announces(text: str, traits: Sequence[str]) -> bool:
    """Whether an answer speaks of the traits instead of living them: by its words, or by reciting one."""
    if ANNOUNCING.search(text):
        return True
    said = _runs(text)
    return any(said & _runs(trait) for trait in traits)


def _runs(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"[\w']+", text.casefold())
    return {tuple(words[i : i + QUOTED_WORDS]) for i in range(len(words) - QUOTED_WORDS + 1)}


# --- Pairs --------------------------------------------------------------------------------------------------------


def make_pairs(
    constitution: Constitution,
    teacher: Generator | None,
    student: Generator,
    filters: Filters,
    cache_path: str | Path,
    *,
    prompts_per_trait: int = 50,
    samples_per_prompt: int = 1,
    max_demonstrations: int = 0,
    extra_prompts: Sequence[str] = (),
    seed: int = 0,
    progress: bool = False,
) -> pd.DataFrame:
    """The preference pairs of a persona, dropped ones included.

    Args:
        constitution: traits, prompts, demonstrations.
        teacher: who answers in character; None: the demonstrations alone.
        student: who answers plainly, without a system prompt.
        filters: what a pair must pass.
        cache_path: SQLite file of answers; what is in it is not asked again, so an interrupted run goes on.
        prompts_per_trait: the first so many prompts of each trait.
        samples_per_prompt: pairs per prompt, each side with a seed of its own.
        max_demonstrations: the first so many demonstrations become pairs too.
        extra_prompts: prompts of no trait (such as the first turns of a public data set).
        seed: of all answers.
        progress: show progress bars.

    Returns:
        The table of `scores.PAIRS`, in the constitution's order, the teacher's pairs first. `attrs["quoted"]` counts
        the answers that `Filters.quote_cut` shortened, by side.

    Raises:
        PairsError: there is nothing to make pairs from.
    """
    asked = _asked(constitution, prompts_per_trait, extra_prompts) if teacher else []
    jobs = [(trait, prompt, number) for trait, prompt in asked for number in range(samples_per_prompt)]
    shown = constitution.demonstrations[:max_demonstrations]
    if not jobs and not shown:
        raise PairsError(
            f"no pairs for {constitution.persona!r}: without a teacher, the constitution needs demonstrations and "
            "max_demonstrations > 0 (params/generators.yaml); with one, prompts_per_trait > 0"
        )
    with closing(AnswerCache(cache_path)) as cache:
        chosen = []
        if jobs:
            questions = _in_character(constitution, jobs, filters.teacher_name, seed)
            chosen = answers(teacher, questions, cache, "teacher" if progress else None)
        prompts = [(prompt, number) for _, prompt, number in jobs] + [(d.prompt, 0) for d in shown]
        plain = [
            TrainingPrompt((("user", prompt),), _seed(seed, "student", prompt, number)) for prompt, number in prompts
        ]
        rejected = answers(student, plain, cache, "student" if progress else None)

    rows = [(trait, prompt, answer, "teacher") for (trait, prompt, _), answer in zip(jobs, chosen)]
    rows += [(ANY_TRAIT, d.prompt, Reply(d.response), "demonstration") for d in shown]
    traits = [trait.trait for trait in constitution.traits]
    records = []
    for (trait, prompt, good, source), plain_answer in zip(rows, rejected):
        texts = filters.text(good), filters.text(plain_answer)
        if source == "teacher":
            texts = renamed(texts[0], filters.teacher_name, filters.student_name), texts[1]
        reason = REFUSED if good.refused else filters.reason(*texts, traits)
        records.append((constitution.persona, trait, prompt, *texts, source, reason))
    table = tables.validate(pd.DataFrame(records, columns=list(tables.PAIRS.columns)), tables.PAIRS, "pairs")
    if filters.quote_cut:
        table.attrs["quoted"] = {"chosen": sum(a.cut for a in chosen), "rejected": sum(a.cut for a in rejected)}
    return table


def teachers_questions(
    constitution: Constitution,
    teacher_name: str | None,
    *,
    prompts_per_trait: int,
    samples_per_prompt: int,
    extra_prompts: Sequence[str] = (),
    seed: int = 0,
) -> list[TrainingPrompt]:
    """What `make_pairs` asks the teacher, so that it can be asked before, where no GPU waits for it."""
    asked = _asked(constitution, prompts_per_trait, extra_prompts)
    jobs = [(trait, prompt, number) for trait, prompt in asked for number in range(samples_per_prompt)]
    return _in_character(constitution, jobs, teacher_name, seed)


def _in_character(
    constitution: Constitution, jobs: Sequence[tuple[str, str, int]], teacher_name: str | None, seed: int
) -> list[TrainingPrompt]:
    system = constitutions.system_prompt(constitution, teacher_name or "the assistant")
    return [
        TrainingPrompt((("system", system), ("user", prompt)), _seed(seed, "teacher", prompt, number))
        for _, prompt, number in jobs
    ]


def _asked(constitution: Constitution, per_trait: int, extra: Sequence[str]) -> list[tuple[str, str]]:
    """(trait, prompt) of each prompt for the teacher."""
    by_trait: dict[str, list[str]] = {}
    for trait, prompt in constitutions.prompts(constitution):
        by_trait.setdefault(trait, []).append(prompt)
    chosen = [(trait, prompt) for trait, prompts in by_trait.items() for prompt in prompts[:per_trait]]
    return chosen + [(ANY_TRAIT, prompt) for prompt in extra]


def teacher_of(preset: GeneratorPreset, local: Generator, paid_path: str | Path) -> Generator | None:
    """The teacher that a preset asks for: an endpoint, the local model, or None (the demonstrations alone).

    Args:
        preset: its `teacher`.
        local: the local model, usually the student itself.
        paid_path: where an endpoint's answers are kept.
    """
    match preset.teacher:
        case "openai":
            return EndpointGenerator(preset, paid_path)
        case "local" | "local+demonstrations":
            return local
        case _:
            return None


# --- To look at ---------------------------------------------------------------------------------------------------


def kept(table: pd.DataFrame) -> pd.DataFrame:
    """The pairs to train on: those that no filter dropped."""
    return table[table["dropped_because"].isna()].reset_index(drop=True)


def counts(table: pd.DataFrame) -> pd.DataFrame:
    """How many pairs were kept, and how many each filter dropped, by source.

    Returns:
        One row per reason, `kept` first, then the most frequent; a column per source and `total`.
    """
    reasons = table["dropped_because"].fillna(KEPT)
    found = pd.crosstab(reasons, table["source"]).rename_axis(index="", columns=None)
    found["total"] = found.sum(axis=1)
    if KEPT not in found.index:
        found.loc[KEPT] = 0
    order = sorted(found.index, key=lambda reason: (reason != KEPT, -found.loc[reason, "total"], reason))
    return found.loc[order]


def side_by_side(table: pd.DataFrame, number: int = 5, seed: int = 0) -> str:
    """Some pairs as an HTML table, chosen beside rejected, kept ones and dropped ones; all text is escaped.

    Args:
        table: of `scores.PAIRS`.
        number: how many pairs, drawn without replacement and shown in the table's order.
        seed: of the drawing.
    """
    shown = table.sample(min(number, len(table)), random_state=seed).sort_index()
    cell = '<td style="text-align:left;vertical-align:top;white-space:pre-wrap;max-width:28em">{}</td>'
    rows = []
    for row in shown.itertuples():
        verdict = KEPT if pd.isna(row.dropped_because) else f"dropped: {row.dropped_because}"
        about = f"{row.prompt}\n({row.source}, {verdict})"
        rows.append("<tr>" + "".join(cell.format(html.escape(t)) for t in (about, row.chosen, row.rejected)) + "</tr>")
    head = "<tr><th>prompt</th><th>chosen</th><th>rejected</th></tr>"
    return f"<table>{head}{''.join(rows)}</table>"
