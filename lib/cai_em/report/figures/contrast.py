"""Susceptibility: what fine-tuning changes in a persona, beside what it changes in the baseline."""

from __future__ import annotations

import pandas as pd

from cai_em.records.keys import BASELINE
from cai_em.records.numbers import level, points
from cai_em.report.figures.parts import Drawing, View, figure, grid_axes, legend_below, two_lines

SHOWN = ["reference", "persona", "dataset"]


@figure("contrast", "What fine-tuning changed", "05_validity/arms", "05_validity/contrasts", order=18)
def _draw(view: View, arms: pd.DataFrame, contrasts: pd.DataFrame) -> Drawing | None:
    """The four arms as an interaction plot: a panel per persona and data set, two lines from reference to data set."""
    look = view.look
    wanted = (contrasts["estimand"] == "susceptibility") & (contrasts["outcome"] == "points")
    wanted &= contrasts["estimate"].notna()  # without scores there is nothing to draw
    found = contrasts[wanted].set_index(SHOWN)
    named = view.key_personas
    groups = {key: part for key, part in arms.groupby(SHOWN, sort=False) if key in found.index}
    # Where hypotheses name personas, these are shown; else all that have a contrast.
    groups = {key: part for key, part in groups.items() if key[1] in named} or groups
    if not groups:
        return None
    fig, axes = grid_axes(len(groups), 4, 1.75, sharey=True)
    for ax, ((reference, persona, dataset), part) in zip(axes, groups.items()):
        ends = part.assign(after=part["arm"].str.endswith(f" {dataset}"), who=part["arm"].str.split(" ").str[0])
        for who in (BASELINE, persona):
            mine = ends[ends["who"] == who].sort_values("after")
            line = look.line(who)
            ax.plot([0, 1], mine["mean"], **line)
            for x, row in enumerate(mine.itertuples()):
                ax.plot([x, x], [row.low, row.high], color=look.colour(who), lw=0.9, alpha=0.8)
        before = ends.loc[~ends["after"], "arm"].iloc[0].split(" ")[1]
        ax.set_xticks([0, 1], [two_lines(look.dataset(d), 12) for d in (before, dataset)])
        ax.tick_params(axis="x", labelsize=6)
        ax.set_xlim(-0.3, 1.3)
        row = found.loc[(reference, persona, dataset)]
        said = f"{points(row.estimate, True)} [{points(row.low, True)}, {points(row.high, True)}]"
        ax.set_title(f"{look.persona(persona)}\n{said}", fontsize=7)
    for ax in axes[::4]:
        ax.set_ylabel("mean alignment")
    lines = {label: x for ax in axes for x in ax.lines if not (label := str(x.get_label())).startswith("_")}
    legend_below(fig, list(lines.values()), 4)
    estimates = found.loc[list(groups), "estimate"]
    largest = estimates.abs().idxmax()
    caption = (
        f"Mean alignment before fine-tuning (or after it on the benign twin) and after it; {level(view.confidence)} "
        "intervals over questions. The number above a panel is the contrast: what fine-tuning changed in the persona "
        "minus what it changed in the baseline; parallel lines are no susceptibility, whatever lies between them. "
        f"Furthest from nothing: {look.persona(largest[1])} on {look.dataset(largest[2])} "
        f"({points(estimates[largest], True)} points)."
    )
    alt = f"Interaction plots of {len(groups)} contrasts, from {points(estimates.min())} to {points(estimates.max())}."
    return Drawing(fig, caption, alt)
