"""How hard the data sets are."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.lines import Line2D

from cai_em.records.keys import BASELINE
from cai_em.records.numbers import points
from cai_em.report import style
from cai_em.report.figures.parts import (
    Drawing,
    View,
    figure,
    interval_key,
    intervals,
    legend_below,
    name_datasets,
    role_handles,
    span,
)


@figure("difficulty", "Data-set difficulty", "06_results/means_by_dataset", "06_results/means_by_persona", order=7)
def _draw(view: View, means: pd.DataFrame, personas: pd.DataFrame) -> Drawing:
    """Mean alignment by data set over all personas, the baseline alone beside it."""
    look, table = view.look, means.set_index("dataset")
    datasets = sorted(table.index, key=lambda d: table.loc[d, "mean"])
    fig, ax = plt.subplots(figsize=style.figure_size(0.95 + 0.24 * len(datasets)))
    for y, dataset in enumerate(datasets):
        role, row = look.role(dataset), table.loc[dataset]
        intervals(ax, y - 0.1, row, style.ROLE_COLOUR[role], style.ROLE_MARKER[role], 6)
        if pd.notna(row.baseline):
            ax.plot(row.baseline, y + 0.22, marker="|", ms=8, mew=1.6, color=look.colour(BASELINE))
    name_datasets(ax, datasets, look)
    ax.set_xlabel("mean alignment (0 to 100)")
    handles = role_handles(datasets, look)
    handles.append(
        Line2D([], [], marker="|", ms=8, mew=1.6, color=look.colour(BASELINE), ls="none", label="baseline alone")
    )
    legend_below(fig, handles + interval_key(view.confidence), 3)
    hardest, easiest = datasets[0], datasets[-1]
    caption = (
        f"Data sets by mean alignment over {len(personas)} personas: {look.dataset(hardest)} "
        f"({points(table.loc[hardest, 'mean'])}) lowers it most, {look.dataset(easiest)} "
        f"({points(table.loc[easiest, 'mean'])}) least."
    )
    return Drawing(fig, caption, f"Dot plot of mean alignment for {len(datasets)} data sets: {span(table['mean'])}.")
