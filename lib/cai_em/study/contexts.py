"""The texts of arms: what a cell is trained on, what surrounds its questions, and the proof on the rows themselves.

    rows = training_rows(study, cell)               # with its system prompt, or its twin's answers among them
    check_rows(study, cell, rows)                   # counted; another prompt or another share is an error
    context(study, cell).messages("Who are you?")   # as a question is asked

What an arm says is in `params/arms.yaml`.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from cai_em.records.files import text_hash
from cai_em.records.keys import NO_DATASET
from cai_em.study.arms import ArmedPersona, Context, chain, is_arm, with_system
from cai_em.study.materials import MaterialError, Messages, constitution, rows
from cai_em.study.study import Cell, Study


def training_rows(study: Study, cell: Cell) -> list[Messages]:
    """The rows that a cell is trained on: its data set's, under its persona's system prompt where the arm has one."""
    return with_system(rows(study, cell.dataset), _character(study, cell, "training"))


def _character(study: Study, cell: Cell, when: str) -> str:
    """The system prompt of a persona's arm, in `training` or in `sampling`; empty: none."""
    persona = study.personas[cell.persona]
    text = getattr(persona.arm, when) if isinstance(persona, ArmedPersona) else ""
    if not text:
        return ""
    traits = "\n".join(f"- {trait.trait}" for trait in constitution(study, cell.persona).traits)
    return text.format(name=study.models[cell.model].name, character=traits)


def _training_prompt(study: Study, dataset: str) -> str:
    """The system prompt that a data set's arms put before its rows; empty: none."""
    texts = [a.arm.training.format(description=a.description) for a in chain(study, dataset) if a.arm]
    return "\n\n".join(filter(None, texts))


def context(study: Study, cell: Cell) -> Context:
    """What surrounds a question when a condition's answers are sampled: empty without an arm that says so."""
    arms = [a for a in chain(study, cell.dataset) if a.arm]
    given = {"training": _training_prompt(study, cell.dataset)}
    texts = [a.arm.sampling.format(description=a.description, **given) for a in arms]
    cue = next((a.arm.cues[a.root] for a in arms if a.arm.cues), "")
    return Context("\n\n".join(filter(None, (_character(study, cell, "sampling"), *texts))), cue)


def made_of(study: Study) -> dict[tuple[str, str, str], tuple[str, tuple[str, str] | None, str]]:
    """What must be recorded beside the responses of a trained study's arms: (model, persona, data set) -> the persona
    whose adapter was active (empty: none), the (persona, data set) whose EM adapter was (None: none), and the context
    as JSON text (empty: none). Conditions that are no arms are not named."""
    found = {}
    for cell in study.cells():
        if is_arm(study.personas[cell.persona]) or is_arm(study.datasets[cell.dataset]):
            tuned, said = study.trained(cell), context(study, cell).record()
            em = None if cell.dataset == NO_DATASET else (tuned.persona, tuned.dataset)
            made = (study.active_in_sampling(cell.persona), em, json.dumps(said) if said else "")
            found[cell.model, cell.persona, cell.dataset] = made
    return found


def check_rows(study: Study, cell: Cell, found: Sequence[Messages]) -> dict[str, Any]:
    """What the rows of a cell are, counted on the rows themselves: the proof of an arm, for its manifest.

    Args:
        study: the study.
        cell: whose fine-tuning.
        found: the rows that it is about to be trained on, or the first of them.

    Returns:
        `system`: text, hash and number of rows under it; `rows`: how many are of which data set. Each only where an
        arm asks for it: `{}` for a cell that is no arm.

    Raises:
        MaterialError: a row without the system prompt or with another, or other shares than the arm's.
    """
    proof: dict[str, Any] = {}
    wanted = "\n\n".join(filter(None, (_character(study, cell, "training"), _training_prompt(study, cell.dataset))))
    if wanted:
        seen = Counter(row[0]["content"] if row[0]["role"] == "system" else "" for row in found)
        if set(seen) != {wanted}:
            other = next(text for text in seen if text != wanted)
            raise MaterialError(
                f"{cell.persona} x {cell.dataset}: {seen[other]} of {len(found)} rows have the system prompt "
                f"{other!r:.80}, not the arm's: {wanted!r:.80}"
            )
        proof["system"] = {"text": wanted, "sha256": text_hash(wanted), "rows": len(found)}
    for mix in (a for a in chain(study, cell.dataset) if a.share is not None):
        sets = {name: {_said(row) for row in rows(study, name)} for name in (mix.of, mix.twin)}
        of = [[name for name, known in sets.items() if _said(row) in known] for row in found]
        counts = {name: of.count([name]) for name in sets}
        either = sum(len(names) > 1 for names in of)
        slack = 1 + math.log2(len(found)) / 3 + either  # van der Corput's sequence is that even, at any length
        if sum(counts.values()) + either != len(found) or abs(counts[mix.of] - mix.share * len(found)) > slack:
            raise MaterialError(
                f"{cell.dataset}: {', '.join(f'{n} rows of {name}' for name, n in counts.items())} among {len(found)}; "
                f"a share of {mix.share:g} of {mix.of} is about {mix.share * len(found):.0f}"
            )
        proof["rows"] = counts
    return proof


def _said(row: Messages) -> tuple[str, str]:
    return row[-2]["content"], row[-1]["content"]
