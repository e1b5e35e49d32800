"""H3: outcomes along training."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd

from cai_em.dynamics.curves import OUTCOMES
from cai_em.report import style
from cai_em.report.figures.parts import Drawing, View, figure
from cai_em.report.figures.training import band, step_axis


@figure("trajectories-outcomes", "Outcomes along training", "09_trajectories/curves", "09_trajectories/transitions",
        order=31, section="trajectories")  # fmt: skip
def _draw(view: View, curves: pd.DataFrame, transitions: pd.DataFrame) -> Drawing | None:
    """EM rate, mean alignment and coherence along training, with the transition points that are shown."""
    look, curves = view.look, curves[curves["main"] & curves["outcome"].isin(list(OUTCOMES))]
    if curves.empty:
        return None
    shown = [o for o in OUTCOMES if (curves["outcome"] == o).any()]
    points = transitions[(transitions["method"] == "logistic") & transitions["outcome"].isin(shown)]
    last = curves["step"].max()
    fig, axes = plt.subplots(1, len(shown), figsize=style.figure_size(2.6), squeeze=False)
    for ax, outcome in zip(axes[0], shown):
        for persona in look.sort_personas(curves["persona"]):
            curve = curves[(curves["persona"] == persona) & (curves["outcome"] == outcome)]
            if curve["mean"].isna().all():
                continue
            band(ax, curve, look.line(persona))
            here = points[points["shown"] & (points["persona"] == persona) & (points["outcome"] == outcome)]
            for r in here.itertuples():
                ax.axvline(r.step, color=look.colour(persona), ls=look.linestyle(persona), lw=0.9, zorder=0)
                ax.axvspan(r.low, min(r.high, last), color=look.colour(persona), alpha=0.08, lw=0, zorder=0)
        if not ax.lines:
            ax.text(0.5, 0.5, "no scores throughout", transform=ax.transAxes, ha="center", color=style.MUTED)
        step_axis(ax, sorted(curves["step"].unique()))
        ax.set_title(OUTCOMES[outcome])
    fig.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    caption = (
        f"Outcomes along training, with {view.confidence:.0%} intervals over {curves['units'].iloc[0]} questions and "
        f"{curves['seeds'].iloc[0]} training seed(s). Vertical: transition points with their intervals, where a change "
        f"is shown ({int(points['shown'].sum())} of {len(points)})."
    )
    ends = "; ".join(
        f"{look.persona(p)} {OUTCOMES[o]} from {c['mean'].iloc[0]:.2f} to {c['mean'].iloc[-1]:.2f}"
        for (p, o), c in curves.dropna(subset="mean").groupby(["persona", "outcome"], sort=False)
    )
    return Drawing(fig, caption, f"Line plots of {len(shown)} outcomes against the training step: {ends}.")
