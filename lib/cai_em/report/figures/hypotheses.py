"""The hypotheses: a persona's differences from the baseline, data set by data set."""

from __future__ import annotations

import pandas as pd

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
    role_handles,
    sized_bound,
)


@figure("hypotheses", "Hypotheses: differences from the baseline", "06_results/differences", order=3)
def _draw(view: View, differences: pd.DataFrame) -> Drawing | None:
    """Each hypothesis: persona minus baseline on every data set, with both intervals and the predicted side shaded."""
    look = view.look
    by = {persona: table.set_index("dataset") for persona, table in differences.groupby("persona")}
    found = [(h, persona, by[persona]) for h in view.hypotheses for persona in h.personas if persona in by]
    if not found:
        return None
    datasets = look.sort_datasets({d for _, _, t in found for d in t.index})
    fig, axes = grid_axes(len(found), 3, 0.55 + 0.25 * len(datasets), sharex=True, sharey=True)
    bounds = pd.concat([t[["ci_low", "ci_high", "q_low", "q_high"]] for _, _, t in found])
    low, high = sized_bound(min(bounds.min().min(), 0), max(bounds.max().max(), 0))
    notes = []
    for ax, (hypothesis, persona, table) in zip(axes, found):
        side = (low, 0) if hypothesis.direction == "lower" else (0, high)
        ax.axvspan(*side, color=style.PREDICTED, zorder=0)
        ax.axvline(0, color=style.MUTED, lw=0.9)
        for y, dataset in enumerate(datasets):
            if dataset in table.index:
                intervals(ax, y, table.loc[dataset], look.colour(persona), look.marker(persona))
            else:
                ax.text(0, y, "no such condition", ha="center", va="center", fontsize=6.5, color=style.MUTED)
        name_datasets(ax, datasets, look)
        ax.set_title(f"{hypothesis.label}: {look.persona(persona)}")
        ax.set_xlim(low, high)
        beyond = table[table["q_low"] > 0] if hypothesis.direction == "higher" else table[table["q_high"] < 0]
        notes.append(f"{hypothesis.label}, {look.persona(persona)}: {len(beyond)} of {len(table)}")
    for ax in axes[-3:]:
        ax.set_xlabel("persona − baseline (points)")
    legend_below(fig, [*interval_key(view.confidence), *role_handles(datasets, look)], 3)
    caption = (
        "Difference in mean alignment between a persona and the baseline on the same data set. The shaded side is the "
        "predicted one. Data sets on which the question interval lies wholly on the predicted side: "
        + "; ".join(notes) + "."
    )  # fmt: skip
    alt = f"{len(found)} panels of persona-minus-baseline differences with intervals on {len(datasets)} data sets."
    return Drawing(fig, caption, alt)
