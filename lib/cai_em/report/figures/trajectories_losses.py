"""H3: held-out losses along training."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd

from cai_em.dynamics.curves import OUTCOMES
from cai_em.report import style
from cai_em.report.figures.parts import Drawing, View, figure
from cai_em.report.figures.training import band, loss_name, step_axis


@figure("trajectories-losses", "Losses along training", "09_trajectories/curves", order=32, section="trajectories")
def _draw(view: View, curves: pd.DataFrame) -> Drawing | None:
    """Losses in and out of the domain along training, a panel per set of rows."""
    look, curves = view.look, curves[curves["main"] & ~curves["outcome"].isin(list(OUTCOMES))]
    if curves.empty:
        return None
    sets = list(dict.fromkeys(curves["outcome"]))
    fig, axes = plt.subplots(1, len(sets), figsize=style.figure_size(2.5), squeeze=False)
    for ax, name in zip(axes[0], sets):
        here = curves[curves["outcome"] == name]
        for persona in look.sort_personas(here["persona"]):
            band(ax, here[here["persona"] == persona], look.line(persona))
        step_axis(ax, sorted(here["step"].unique()))
        ax.set_title(loss_name(view, name))
    axes[0][0].set_ylabel("loss (nats a token)")
    fig.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    falls = "; ".join(
        f"{look.persona(p)}, {loss_name(view, s)}: {c['mean'].iloc[0]:.2f} to {c['mean'].iloc[-1]:.2f}"
        for (p, s), c in curves.groupby(["persona", "outcome"], sort=False)
    )
    n = curves["units"].iloc[0]
    caption = f"Loss on rows that were not trained on, in the domain and outside it; intervals over {n} rows and seeds."
    return Drawing(fig, caption, f"Line plots of held-out loss against the training step. {falls}.")
