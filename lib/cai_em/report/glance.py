"""What stands on the first screen of every document, from stored tables.

The question, each verdict with its reason in a sentence, what the run cannot show, what to read next: said by one
template (`glance.md.j2`) in the results document, in the paper, and on the page of `docs/`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from cai_em.analysis.contrasts import POOLED
from cai_em.analysis.gates import PRESENT
from cai_em.analysis.units import MIN_SEEDS
from cai_em.analysis.verdicts import ADAPTERS
from cai_em.records.keys import NO_DATASET


@dataclass(frozen=True)
class Said:
    """A verdict about a hypothesis on a model, as a sentence needs it.

    Attributes:
        model: its key. hypothesis: its key. label: of the hypothesis.
        personas: keys of those that it speaks of.
        verdict: the word as printed. word: without what is said of few seeds.
        cause: what it hangs on (`analysis.verdicts.CAUSES`, or a gate's name); empty where the estimate says it.
        status: of that gate, for the first persona whose gate is shut. detail: the first of its reasons.
        estimand, direction: what is asked, and what is predicted.
        published: the word of the published rules, "" where they have none.
    """

    model: str
    hypothesis: str
    label: str
    personas: tuple[str, ...]
    verdict: str
    word: str
    cause: str = ""
    status: str = ""
    detail: str = ""
    estimand: str = ""
    direction: str = ""
    published: str = ""


def said_of(row: Any, gates: pd.DataFrame | None, h: Any) -> Said:
    """A row of `analysis.verdict_table`, about a hypothesis or one of its personas.

    Args:
        row: a row with the columns as attributes.
        gates: `analysis.gate_table`.
        h: the hypothesis: `key, label, personas`.
    """
    personas = tuple(h.personas) if pd.isna(row.persona) else (row.persona,)
    status = detail = ""
    column = f"{row.cause}_gate"
    if gates is not None and column in gates:
        pooled = POOLED if row.estimand != "persona" else NO_DATASET
        mine = gates[(gates["model"] == row.model) & (gates["dataset"] == pooled) & gates["persona"].isin(personas)]
        for gate in mine[mine[column] != PRESENT].head(1).to_dict("records"):
            status, detail = gate[column], gate[f"{row.cause}_reason"].split("; ")[0]
    rules = getattr(row, "published_rules", "")
    return Said(
        row.model, row.hypothesis, h.label, personas, row.verdict, row.word, row.cause, status, detail,
        row.estimand, row.direction, "" if pd.isna(rules) else rules,
    )  # fmt: skip


def verdicts_said(
    verdicts: pd.DataFrame | None, gates: pd.DataFrame | None, hypotheses: Iterable[Any]
) -> dict[tuple[str, str, str], Said]:
    """(model, hypothesis, persona; "" of the whole hypothesis) -> what can be said, from `analysis.verdict_table`."""
    by_key = {h.key: h for h in hypotheses}
    rows = [] if verdicts is None else list(verdicts.itertuples(index=False))
    return {
        (r.model, r.hypothesis, "" if pd.isna(r.persona) else r.persona): said_of(r, gates, by_key[r.hypothesis])
        for r in rows
    }


def dynamics_said(found: pd.DataFrame | None) -> list[Said]:
    """H3's or H4's verdict on every model, from `analysis.gates.gated_verdict`: the first row of each."""
    said = []
    for model, part in [] if found is None or not len(found) else found.groupby("model", sort=False):
        first, shut = part.iloc[0], part[part["status"].isin(("absent", "inconclusive"))]
        detail = shut["what"].iloc[0] if len(shut) else ""
        name, verdict = first["what"], first["status"]
        word = verdict.removesuffix(ADAPTERS)
        said.append(Said(model, name.lower(), name, (), verdict, word, first["cause"], "", detail, name))
    return said


@dataclass(frozen=True)
class Opened:
    """How many comparisons of a model have all their gates open."""

    model: str
    open: int
    of: int


@dataclass(frozen=True)
class Glance:
    """The first screen.

    Attributes:
        verdicts: of every hypothesis and model, in the study's order.
        opened: a line a model.
        seeds: fewest training seeds of a comparison; 0 where nothing is compared.
        caveat: what the profile says that it cannot show.
        missing: what was left out -> why.
        frozen: a sentence on when the analysis was frozen; none where nothing is known about it.
    """

    verdicts: Sequence[Said] = ()
    opened: Sequence[Opened] = ()
    seeds: int = 0
    caveat: str = ""
    missing: Mapping[str, str] = field(default_factory=dict)
    frozen: str = ""

    @property
    def hypotheses(self) -> list[list[Said]]:
        """The verdicts of each hypothesis, on every model."""
        found: dict[str, list[Said]] = {}
        for v in self.verdicts:
            found.setdefault(v.hypothesis, []).append(v)
        return list(found.values())

    @property
    def few(self) -> bool:
        """Whether what is compared has too few trainings to speak of others."""
        return 0 < self.seeds < MIN_SEEDS


def glance(
    verdicts: pd.DataFrame | None,
    gates: pd.DataFrame | None,
    comparisons: pd.DataFrame | None,
    hypotheses: Iterable[Any],
    *,
    dynamics: Sequence[pd.DataFrame | None] = (),
    models: Collection[str] = (),
    caveat: str = "",
    missing: Mapping[str, str] | None = None,
    frozen: str = "",
) -> Glance:
    """The first screen from a run's tables, those of `05_validity` first.

    Args:
        verdicts, gates, comparisons: `analysis.verdict_table`, `gate_table`, `compare_all` with gates.
        hypotheses: entries with `key, label, personas`.
        dynamics: the verdicts of H3 and H4, where there are any.
        models: order; those of the tables by default.
        caveat, missing, frozen: see `Glance`.
    """
    said = [v for (_, _, persona), v in verdicts_said(verdicts, gates, hypotheses).items() if not persona]
    said += [v for found in dynamics for v in dynamics_said(found)]
    order = list(dict.fromkeys([*models, *(v.model for v in said)]))
    said.sort(key=lambda v: order.index(v.model))
    tuned = gates[~gates["dataset"].isin((POOLED, NO_DATASET))] if gates is not None and len(gates) else None
    by_model = [] if tuned is None else tuned.groupby("model", sort=False)
    opened = [Opened(model, int((part["gate"] == PRESENT).sum()), len(part)) for model, part in by_model]
    seeds = 0
    if comparisons is not None:  # without fine-tuning there is no training seed
        of_trainings = comparisons.loc[comparisons["dataset"] != NO_DATASET, "n_seeds"]
        seeds = int(of_trainings.min()) if len(of_trainings) else 0
    return Glance(said, opened, seeds, " ".join(caveat.split()), missing or {}, frozen)
