"""The arms of the design, where a run has the untuned one."""

from __future__ import annotations

import pandas as pd

from cai_em.records.keys import BASELINE, NO_DATASET
from cai_em.records.numbers import points
from cai_em.report import style
from cai_em.report.figures.parts import (
    Drawing,
    View,
    figure,
    grid_axes,
    interval_key,
    intervals,
    legend_below,
    name_datasets,
)


@figure("arms", "The four arms", "06_results/means_by_condition", order=14)
def _draw(view: View, means: pd.DataFrame) -> Drawing | None:
    """The four arms: base, persona adapter alone, fine-tuning alone, both."""
    look = view.look
    if NO_DATASET not in set(means["dataset"]):
        return None
    table = means.set_index(["persona", "dataset"])
    datasets = look.sort_datasets(means["dataset"])
    personas = look.sort_personas(means["persona"])
    datasets = [NO_DATASET, *(d for d in datasets if d != NO_DATASET)]
    fig, axes = grid_axes(len(personas), 3, 0.75 + 0.26 * len(datasets), sharex=True, sharey=True)
    for ax, persona in zip(axes, personas):
        for y, dataset in enumerate(datasets):
            if (persona, dataset) in table.index and table.loc[(persona, dataset), "n"]:
                intervals(ax, y, table.loc[(persona, dataset)], look.colour(persona), look.marker(persona))
            else:
                ax.text(0.5, y, "no such condition", transform=ax.get_yaxis_transform(), ha="center", va="center",
                        fontsize=6.5, color=style.MUTED)  # fmt: skip
        if (persona, NO_DATASET) in table.index:
            ax.axvline(table.loc[(persona, NO_DATASET), "mean"], color=style.MUTED, lw=0.8, ls="--", zorder=0)
        title = "no persona adapter" if persona == BASELINE else look.persona(persona)
        ax.set_title(title.replace(", ", ",\n"), fontsize=8)  # arms with a context have two parts
        name_datasets(ax, datasets, look)
    for ax in axes[-3:]:
        ax.set_xlabel("mean alignment")
    legend_below(fig, interval_key(view.confidence))
    base = table["mean"].get((BASELINE, NO_DATASET))
    moved = (table["mean"] - base).abs().idxmax() if base is not None else None
    caption = (
        f"The arms of the design: each persona (panel) before fine-tuning and after each data set; the dashed line is "
        f"the persona before fine-tuning. {int(table['n'].sum()):,} scored responses in {len(table)} conditions."
    )
    if moved is not None:
        caption += (
            f" Without any adapter the model scores {points(base)}; the condition furthest from it is "
            f"{look.persona(moved[0])} with {look.dataset(moved[1])} ({points(table.loc[moved, 'mean'])})."
        )
    return Drawing(
        fig, caption, f"Mean alignment in {len(table)} conditions, a panel for each of {len(personas)} personas."
    )
