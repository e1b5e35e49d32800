"""The section on H4 of the results document."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from cai_em.dynamics.directions import direction_label
from cai_em.dynamics.h4 import CONTRASTS, _how
from cai_em.records.numbers import p_value, points
from cai_em.report.markdown import markdown_table
from cai_em.report.sections import text_by_model, verdict_lines
from cai_em.study.labels import Labels


def _effect_interval(row: Any, form: Callable[[float], str]) -> str:
    return f"{form(row.delta)} [{form(row.low)}, {form(row.high)}]"


def h4_section(
    found: pd.DataFrame,
    cosines: pd.DataFrame,
    tests: pd.DataFrame,
    verdicts: pd.DataFrame,
    look: Labels,
    *,
    contrast: str = "adapter",
    caveat: str = "",
) -> str:
    """H4's part of the results document, Markdown without a heading.

    Args:
        found: `effects` of the transfer matrix.
        cosines: `cosine_table` at the transfer layer.
        tests: `transfer_tests`.
        verdicts: H4's verdict and its gates, of one model (`h4_verdicts`).
        look: labels.
        contrast: which of `CONTRASTS` gave the directions.
        caveat: what this run cannot show.
    """
    signed = lambda x: points(x, True)  # noqa: E731
    share = lambda x: "–" if math.isnan(x) else f"{100 * x:+.1f} %"  # noqa: E731
    forms = {"alignment": signed, "em": share, "coherence": signed}
    per_norm = {"alignment": "{:+.2f}".format, "em": lambda x: f"{100 * x:+.2f} %", "coherence": "{:+.2f}".format}
    by_outcome = {(r.target, r.dataset, r.outcome): r for r in found.itertuples()}
    rows = []
    for r in found[found["outcome"] == "alignment"].itertuples():
        of = {o: by_outcome[r.target, r.dataset, o] for o in forms}
        each = [
            _effect_interval(of[o], forms[o])
            + ("" if math.isnan(of[o].per_norm) else f" ({per_norm[o](of[o].per_norm)})")
            for o in forms
        ]
        rows.append(
            [look.persona(r.target), direction_label(r.source, look), _how(r), *each, f"{r.n_questions} ({r.missing})"]
        )
    header = ["target", "direction of", "how", *(f"{o} [95 %]" for o in OUTCOMES_SHOWN)]
    parts = [
        "Does the direction of emergent misalignment that is found under one persona do the same under another? A "
        f"direction is a mean difference of residual-stream activations ({CONTRASTS[contrast]}), found on other "
        "questions than those it is tried on. All are given the length of the target's own. Each is added to the "
        "untuned model, or ablated from the tuned one; changes are against the same model without intervention, paired "
        "by question, and in brackets per unit of length added. *Questions*: those with alignment on both sides; in "
        "brackets, responses without a score.",
        markdown_table(rows, [*header, "questions (no score)"], "lllrrrr"),
        *verdict_lines(verdicts),
    ]
    if len(tests):
        rows = [
            [
                look.persona(r.target),
                direction_label(r.source, look),
                _how(r),
                " and ".join(direction_label(s, look) for s in r.reference.split(", ")),
                _effect_interval(r, signed),
                p_value(r.p_questions),
                p_value(r.p_runs),
                p_value(r.p_adjusted),
                p_value(r.p_equivalence),
            ]
            for r in tests.itertuples()
        ]
        header = ["target", "direction of", "how", "against", "difference [95 %]", "p, questions", "p, runs"]
        parts.append(markdown_table(rows, [*header, "p adjusted", "p equivalence"], "llllrrrrr"))
    if len(cosines):
        rows = [
            [
                f"{direction_label(r.one, look)} and {direction_label(r.other, look)}",
                r.layer,
                f"{r.cosine:.2f}",
                f"{r.random_bound:.2f}",
                f"{r.shuffled_bound:.2f} ({p_value(r.p_shuffled)})",
                f"{r.within_one:.2f}, {r.within_other:.2f}",
            ]
            for r in cosines.itertuples()
        ]
        header = [
            "directions of",
            "layer",
            "cosine",
            "random, 95 %",
            "shuffled labels, 95 % (p)",
            "with itself, halves",
        ]
        parts.append(markdown_table(rows, header, "lrrrrr"))
    return "\n\n".join([*parts, *([caveat] if caveat else [])]) + "\n"


OUTCOMES_SHOWN = ("alignment", "EM rate", "coherence")
"""Headings of the transfer's outcomes, in the order of the table."""


def h4_document(stage: Path, look: Labels, *, caveat: str = "") -> str:
    """`h4_section` of every model, from the tables that `10_steering` left in its folder."""
    found, cosines, tests, verdicts = (
        pd.read_parquet(stage / f"{t}.parquet") for t in ("transfer", "cosines", "tests", "h4")
    )

    def text(model: str) -> str:
        mine, near, tried, said = (t[t["model"] == model] if len(t) else t for t in (found, cosines, tests, verdicts))
        at = mine.loc[mine["kind"] == "add", "layer"].iloc[0]
        contrast = said.loc[said["what"] == "contrast", "status"].iloc[0]
        return h4_section(mine, near[near["layer"] == at], tried, said, look, contrast=contrast, caveat=caveat)

    return text_by_model(verdicts, look, text)
