"""H3: what training gains in its domain against what it changes outside."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd

from cai_em.dynamics.curves import OUTCOMES
from cai_em.records.numbers import plain_number
from cai_em.report import style
from cai_em.report.figures.parts import Drawing, View, figure
from cai_em.report.style import line_look


@figure("trajectories-generality", "Narrow or general", "09_trajectories/generality", order=35, section="trajectories")
def _draw(view: View, table: pd.DataFrame) -> Drawing:
    """In-domain uptake against outcomes outside the domain, along training, a path per preset."""
    tables = dict(tuple(table.groupby("measure", sort=False)))
    fig, axes = plt.subplots(1, len(tables), figsize=style.figure_size(3.0), squeeze=False)
    for ax, (outcome, part) in zip(axes[0], tables.items()):
        for i, (preset, path) in enumerate(part.groupby("preset", sort=False)):
            look, end = line_look(i), path.iloc[-1]
            ax.plot(path["uptake"], path["outcome"], label=preset, **look)
            ax.errorbar(
                end["uptake"],
                end["outcome"],
                xerr=[[end["uptake"] - end["uptake_low"]], [end["uptake_high"] - end["uptake"]]],
                yerr=[[end["outcome"] - end["outcome_low"]], [end["outcome_high"] - end["outcome"]]],
                color=look["color"],
                lw=0.9,
            )
        ax.set_xlabel("in-domain uptake (nats a token)")
        ax.set_title(f"{OUTCOMES[outcome]}, other questions")
    fig.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    last = table.groupby(["measure", "preset"], sort=False).last()
    presets = list(dict.fromkeys(table["preset"]))
    ends = "; ".join(
        f"{p}: uptake {last['uptake'][next(iter(tables)), p]:.2f}, "
        + ", ".join(f"{OUTCOMES[o]} {plain_number(last['outcome'][o, p])}" for o in tables)
        for p in presets
    )
    caption = "What training gains in its domain (fall of the loss on held-out rows) and what it changes outside it, "
    caption += f"checkpoint by checkpoint; intervals at the last one. At the end: {ends}."
    return Drawing(fig, caption, f"Paths of {len(presets)} training presets in {len(tables)} panels. {ends}.")
