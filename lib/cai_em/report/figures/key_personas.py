"""The baseline and the personas of the hypotheses."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.lines import Line2D

from cai_em.records.keys import BASELINE, NO_DATASET
from cai_em.records.numbers import points
from cai_em.report import style
from cai_em.report.figures.parts import Drawing, View, figure, interval_key, legend_below, name_datasets


@figure("key-personas", "Key personas by data set", "06_results/means_by_condition", order=6)
def _draw(view: View, means: pd.DataFrame) -> Drawing | None:
    """The baseline and the personas of the hypotheses, side by side on every data set."""
    look, table = view.look, means[means["dataset"] != NO_DATASET]
    keys = [k for k in dict.fromkeys((BASELINE, *view.key_personas)) if k in set(table["persona"])]
    if len(keys) < 2:
        return None
    table = table[table["persona"].isin(keys)]
    datasets = look.sort_datasets(table["dataset"])
    table = table.set_index(["persona", "dataset"])
    fig, ax = plt.subplots(figsize=style.figure_size(2.9))
    step = 0.72 / len(keys)
    for i, persona in enumerate(keys):
        offset = (i - (len(keys) - 1) / 2) * step
        for x, dataset in enumerate(datasets):
            if (persona, dataset) in table.index:
                row = table.loc[(persona, dataset)]
                colour = look.colour(persona)
                ax.plot([x + offset] * 2, [row.q_low, min(row.q_high, 100)], color=colour, lw=0.9)
                ax.plot([x + offset] * 2, [row.ci_low, row.ci_high], color=colour, lw=3, solid_capstyle="butt")
                marker = look.marker(persona)
                ax.plot(x + offset, row["mean"], marker=marker, ms=style.marker_size(marker, 5.5), color=colour,
                        mec=style.PAPER, mew=0.5)  # fmt: skip
    for x in range(len(datasets) - 1):
        ax.axvline(x + 0.5, color=style.GRID, lw=0.6)
    ax.grid(axis="x", visible=False)
    name_datasets(ax, datasets, look, "x", 20)
    ax.set_xlim(-0.5, len(datasets) - 0.5)
    ax.set_ylabel("mean alignment")
    handles = [Line2D([], [], **(look.line(k) | {"linestyle": "none"})) for k in keys]
    legend_below(fig, handles + interval_key(view.confidence), 4)
    caption = f"Mean alignment of the baseline and the personas of the hypotheses on {len(datasets)} data sets."
    if BASELINE in keys:
        base = table.loc[BASELINE]["mean"]
        caption += (
            f" The baseline falls to {points(base.min())} on {look.dataset(base.idxmin())} and reaches "
            f"{points(base.max())} on {look.dataset(base.idxmax())}."
        )
    alt = f"Dots with intervals: {', '.join(look.persona(k) for k in keys)} on each of {len(datasets)} data sets."
    return Drawing(fig, caption, alt)
