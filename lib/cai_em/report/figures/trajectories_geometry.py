"""H3: how the adapter's update grows and turns."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd

from cai_em.report import style
from cai_em.report.figures.parts import Drawing, View, figure
from cai_em.report.figures.training import step_axis


@figure("trajectories-geometry", "Geometry of the update", "09_trajectories/geometry", order=33, section="trajectories")
def _draw(view: View, table: pd.DataFrame) -> Drawing:
    """Norm of the update and its rotation, by run."""
    look, table = view.look, table.reset_index(drop=True)
    presets = list(dict.fromkeys(table["preset"]))
    fig, axes = plt.subplots(2, len(presets), figsize=style.figure_size(3.8), squeeze=False, sharex="col", sharey="row")
    for column, preset in enumerate(presets):
        here = table[table["preset"] == preset]
        for (persona, seed), run in here.groupby(["persona", "seed"], sort=False):
            line = look.line(persona) | ({"label": None} if seed != here["seed"].iloc[0] else {})
            axes[0][column].plot(run["step"], run["norm_share"], **line)
            axes[1][column].plot(run["step"], run["rotation"], **line)
        axes[0][column].set_title(preset)
        for ax in axes[:, column]:
            step_axis(ax, sorted(here["step"].unique()))
        axes[1][column].axhline(0, color=style.MUTED, lw=0.7)
        axes[0][column].set_xlabel("")
    axes[0][0].set_ylabel("norm (share of largest)")
    axes[1][0].set_ylabel("cosine of successive\ndifferences")
    fig.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    turn = table.loc[table["rotation"].idxmin()] if table["rotation"].notna().any() else None
    caption = "Size of the adapter's update and its rotation along training (1: straight on), one line per run." + (
        f" The sharpest turn, {turn['rotation']:.2f}, is at step {turn['step']} ({turn['preset']}, "
        f"{look.persona(turn['persona'])})."
        if turn is not None
        else ""
    )
    runs = table.groupby(["preset", "persona", "seed"]).ngroups
    return Drawing(fig, caption, f"Line plots of adapter norm and update rotation for {runs} runs.")
