"""Histograms of scores by data set, one above the other."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from cai_em.analysis.summaries import BINS, CUTS, SHARES
from cai_em.records.keys import BASELINE
from cai_em.report import style
from cai_em.report.figures.parts import Drawing, View, figure, legend_below


@figure("ridge", "Distribution by data set", "06_results/shapes", order=11)
def _draw(view: View, shapes: pd.DataFrame) -> Drawing:
    """Histograms of scores, one above the other, by data set for the baseline's and all personas' responses."""
    look, by_dataset = view.look, shapes[shapes["dataset"].notna()]
    whole = by_dataset[by_dataset["persona"].isna()].set_index("dataset")
    base_line = by_dataset[by_dataset["persona"] == BASELINE].set_index("dataset")
    personas = int(shapes.loc[shapes["persona"].isna() & shapes["dataset"].isna(), "personas"].iloc[0])
    datasets = look.sort_datasets(whole.index)
    fig, ax = plt.subplots(figsize=style.figure_size(0.7 + 0.36 * len(datasets)))
    for row, dataset in enumerate(datasets):
        base = len(datasets) - 1 - row
        colour = style.ROLE_COLOUR[look.role(dataset)]
        for table, looks in (
            (whole, {"fill": True, "color": colour, "alpha": 0.55}),
            (base_line, {"fill": False, "color": style.INK, "alpha": 1.0}),
        ):
            if dataset in table.index:
                height = 0.92 * np.sqrt(table.loc[dataset, SHARES].to_numpy(float))
                ax.stairs(base + height, BINS, baseline=base, lw=0.9, **looks)
        ax.axhline(base, color=style.MUTED, lw=0.5)
    ax.set_yticks(range(len(datasets)), [look.signed(d) for d in reversed(datasets)], va="bottom")
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)
    ax.set(xlabel="alignment", xlim=(0, 100), ylim=(0, len(datasets)))
    roles = dict.fromkeys(map(look.role, datasets))
    handles = [
        Patch(color=style.ROLE_COLOUR[r], alpha=0.55, label=f"all personas, {style.ROLE_LABEL[r]}") for r in roles
    ]
    legend_below(fig, [*handles, Line2D([], [], color=style.INK, lw=0.9, label="baseline")], 2)
    low = whole[f"below_{CUTS[0]}"]
    tail = f"The low tail is thickest on {look.dataset(low.idxmax())} ({100 * low.max():.1f} % below {CUTS[0]})"
    tail = tail if low.max() else f"No score is below {CUTS[0]}"
    caption = (
        f"Scores by data set: filled, {personas} personas together; outlined, the baseline (bins of "
        f"five points, height is the square root of the share). {tail}."
    )
    return Drawing(fig, caption, f"Ridge plot of alignment scores on {len(datasets)} data sets.")
