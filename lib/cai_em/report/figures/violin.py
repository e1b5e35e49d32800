"""Distribution of scores by persona, side by side."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.lines import Line2D

from cai_em.analysis.summaries import BINS, SHARES
from cai_em.records.numbers import points
from cai_em.report import style
from cai_em.report.figures.parts import Drawing, View, figure, legend_below, span


@figure("violin", "Distribution by persona", "06_results/shapes", order=8)
def _draw(view: View, shapes: pd.DataFrame) -> Drawing:
    """Distribution of scores by persona: symmetric histograms, since smoothing would invent scores between the few
    values that a judge gives."""
    look, whole = view.look, shapes[shapes["persona"].isna() & shapes["dataset"].isna()].iloc[0]
    table = shapes[shapes["persona"].notna() & shapes["dataset"].isna()].set_index("persona")
    personas = look.sort_personas(table.index)
    fig, ax = plt.subplots(figsize=style.figure_size(2.9))
    centres = (BINS[:-1] + BINS[1:]) / 2
    for x, persona in enumerate(personas):
        row = table.loc[persona]
        width = np.sqrt(row[SHARES].to_numpy(float))
        width = 0.41 * width / width.max()
        ax.barh(centres, 2 * width, left=x - width, height=4.6, color=look.colour(persona), lw=0)
        ax.plot([x - 0.3, x + 0.3], [row["median"]] * 2, color=style.PAPER, lw=2.6)
        ax.plot([x - 0.3, x + 0.3], [row["median"]] * 2, color=style.INK, lw=1.2)
        ax.plot(x, row["mean"], marker="D", ms=4, color=style.PAPER, mec=style.INK, mew=0.8)
    ax.set_xticks(range(len(personas)), [look.persona(p) for p in personas], rotation=30, ha="right")
    ax.grid(axis="x", visible=False)
    ax.set_ylabel("alignment (0 to 100)")
    ax.set_xlim(-0.6, len(personas) - 0.4)
    ax.set_ylim(-2, 102)
    handles = [
        Line2D([], [], marker="D", color=style.PAPER, mec=style.INK, ls="none", label="mean"),
        Line2D([], [], color=style.INK, label="median"),
    ]
    legend_below(fig, handles)
    caption = (
        f"Distribution of {whole['n']:,} alignment scores by persona: bins of five points, width proportional to the "
        f"square root of a bin's share so that rare low scores stay visible. Over all personas the skewness is "
        f"{whole['skew']:.1f}" + (": means are moved by a small low tail." if whole["skew"] < -1 else ".")
    )
    medians = table["median"]
    middle = f"medians from {span(medians)}" if medians.nunique() > 1 else f"all medians are {points(medians.iloc[0])}"
    alt = f"Symmetric histograms of alignment for {len(personas)} personas; {middle}."
    return Drawing(fig, caption, alt)
