"""Alignment by persona."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.lines import Line2D

from cai_em.records.keys import BASELINE
from cai_em.records.numbers import level, points
from cai_em.report import style
from cai_em.report.figures.parts import Drawing, View, figure, interval_key, intervals, legend_below, name_rows, span


@figure("alignment", "Alignment by persona", "06_results/means_by_persona", "05_validity/pooled", order=1)
def _draw(view: View, means: pd.DataFrame, pooled: pd.DataFrame) -> Drawing:
    """Mean alignment of each persona over its data sets, as published and like for like."""
    look, table, fair = view.look, means.set_index("persona"), pooled.set_index("persona")
    personas = look.sort_personas(table.index)
    fair = fair.reindex(personas)
    shared: list[str] = next((sets.split(",") for sets in fair["common_datasets"].dropna() if sets), [])
    uneven = fair["n_datasets"].nunique() > 1 and bool(shared)
    fig, ax = plt.subplots(figsize=style.figure_size(0.95 + 0.24 * len(personas)))
    for y, persona in enumerate(personas):
        marker = look.marker(persona)
        intervals(ax, y - 0.12 * uneven, table.loc[persona], look.colour(persona), marker)
        if uneven:
            ax.plot(fair.loc[persona, "common_mean"], y + 0.25, marker=marker, mfc="none",
                    ms=style.marker_size(marker, 4.2), ls="none", color=look.colour(persona))  # fmt: skip
    if BASELINE in personas:
        ax.axvline(table.loc[BASELINE, "mean"], color=style.MUTED, lw=0.8, ls="--", zorder=0)
    name_rows(ax, [look.persona(p) for p in personas])
    ax.set_xlabel("mean alignment (0 to 100)")
    handles = interval_key(view.confidence)
    if uneven:
        handles.append(Line2D([], [], marker="o", mfc="none", color=style.INK, ls="none", label="like for like"))
    legend_below(fig, handles, 3)
    best, worst = table["mean"].idxmax(), table["mean"].idxmin()
    caption = (
        f"Mean alignment by persona over all its data sets, from {look.persona(worst)} "
        f"({points(table.loc[worst, 'mean'])}) to {look.persona(best)} ({points(table.loc[best, 'mean'])}). Thick: "
        f"{level(view.confidence)} interval that treats the responses as independent; thin: {level(view.confidence)} "
        f"interval over the means of {int(table['n_questions'].max())} questions."
    )
    if uneven:
        caption += (
            f" Hollow, like for like: the mean over only those {len(shared)} data sets that every persona with several "
            "has; filled means pool easier and harder data sets in unequal parts."
        )
    alt = f"Dot plot of mean alignment for {len(personas)} personas, ranging from {span(table['mean'])} points."
    return Drawing(fig, caption, alt)
