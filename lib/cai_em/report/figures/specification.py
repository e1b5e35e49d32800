"""Specification curves of the hypotheses."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from cai_em.analysis.claims import VERDICT_CHOICES
from cai_em.report import style
from cai_em.report.figures.parts import Drawing, View, figure


@figure("specification", "Specification curve", "08_claims/specifications", order=17, per=("model", "hypothesis"))
def _draw(view: View, specifications: pd.DataFrame) -> Drawing:
    """Specification curve: the estimate of every defensible analysis, sorted, with the choices that made it.

    Source: Simonsohn, Simmons & Nelson (2020), Specification curve analysis, Nature Human Behaviour 4.
    """
    asked = next(h for h in view.hypotheses if h.key == specifications["hypothesis"].iloc[0])
    title = f"{asked.label}, {view.look.model(specifications['model'].iloc[0])}"
    table = specifications.sort_values("estimate", kind="stable").reset_index(drop=True)
    choices = {c: list(dict.fromkeys(table[c].astype(str))) for c in VERDICT_CHOICES if c in table}
    choices = {c: options for c, options in choices.items() if len(options) > 1}
    lines = sum(map(len, choices.values()))
    fig, (top, below) = plt.subplots(
        2,
        1,
        figsize=style.figure_size(1.7 + 0.135 * lines + 0.1 * len(choices)),
        sharex=True,
        height_ratios=[1.5, 0.13 * lines + 0.2],
    )
    x = np.arange(len(table))
    supports = table["supports"].astype(bool).to_numpy()
    top.vlines(x, table["low"], table["high"], color=style.PALE, lw=min(1.2, 250 / max(len(table), 1)), rasterized=True)
    for mask, colour, marker, label in (
        (~supports, style.MUTED, "o", "does not support"),
        (supports, style.SUPPORTS, "^", "supports"),
    ):
        top.plot(
            x[mask],
            table["estimate"][mask],
            marker=marker,
            ms=2.6,
            color=colour,
            ls="none",
            label=label,
            rasterized=True,
        )
    top.axhline(0, color=style.INK, lw=0.8)
    top.set_ylabel("persona − baseline\n(points)")
    top.set_title(title)
    top.legend(loc="upper left", ncols=2)
    y, ticks = 0.0, []
    for choice, options in choices.items():
        for option in options:
            used = (table[choice].astype(str) == option).to_numpy()
            for mask, colour in ((used & ~supports, style.MUTED), (used & supports, style.SUPPORTS)):
                below.plot(
                    x[mask],
                    np.full(mask.sum(), y),
                    marker="|",
                    ms=4.5,
                    mew=0.7,
                    color=colour,
                    ls="none",
                    rasterized=True,
                )
            ticks.append((y, f"{choice}: {option}"))
            y += 1
        y += 0.6
    below.set_yticks([t for t, _ in ticks], [t for _, t in ticks], fontsize=6)
    below.set_ylim(y - 0.4, -0.8)
    below.grid(visible=False)
    below.set_xlabel(f"{len(table):,} analyses, sorted by estimate")
    share = 100 * supports.mean()
    against = table["estimate"] > 0 if asked.direction == "lower" else table["estimate"] < 0
    caption = (
        f"{asked.label}: {len(table):,} defensible analyses, sorted by estimate; {share:.0f} % support the hypothesis, "
        f"and in {100 * against.mean():.0f} % the estimate has the opposite sign (median "
        f"{table['estimate'].median():+.1f} points)."
    )
    return Drawing(
        fig, caption, f"Specification curve of {len(table)} analyses; {share:.0f} per cent support the hypothesis."
    )
