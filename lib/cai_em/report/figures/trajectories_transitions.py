"""H3: transition points."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.lines import Line2D

from cai_em.report import style
from cai_em.report.figures.parts import Drawing, View, figure
from cai_em.report.figures.training import outcome_name


@figure(
    "trajectories-transitions", "Transition points", "09_trajectories/transitions", order=34, section="trajectories"
)
def _draw(view: View, found: pd.DataFrame) -> Drawing:
    """Transition points of every persona and outcome, by both methods; those not shown are named and left empty."""
    look = view.look
    rows = found[["persona", "outcome"]].drop_duplicates().to_records(index=False)
    fig, ax = plt.subplots(figsize=style.figure_size(0.9 + 0.27 * len(rows)))
    last = int(found["last"].max())
    for y, (persona, outcome) in enumerate(rows):
        here = found[(found["persona"] == persona) & (found["outcome"] == outcome)].set_index("method")
        for shift, method in ((-0.13, "logistic"), (0.13, "change point")):
            row = here.loc[method]
            if not row["shown"]:
                if method == "logistic":
                    ax.text(last, y, "no change shown", ha="right", va="center", color=style.MUTED, fontsize=7)
                continue
            face = look.colour(persona) if method == "logistic" else style.PAPER
            ax.plot([row["low"], min(row["high"], last)], [y + shift] * 2, color=look.colour(persona), lw=1.2)
            at = min(row["step"], last), y + shift
            ax.plot(*at, marker=look.marker(persona), color=look.colour(persona), mfc=face)
    ax.set_yticks(range(len(rows)), [f"{look.persona(p)}: {outcome_name(view, o)}" for p, o in rows])
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xlim(0, last * 1.03)
    ax.set_xlabel("training step")
    handles = [
        Line2D([], [], marker="o", color=style.INK, label="midpoint of a logistic"),
        Line2D([], [], marker="o", color=style.INK, mfc=style.PAPER, label="change point"),
    ]
    fig.legend(handles=handles, loc="outside lower center", ncols=2)
    shown = found[found["shown"] & (found["method"] == "logistic")]
    caption = (
        "Transition points with intervals over questions (or rows) and seeds, from checkpoint to checkpoint. They are "
        f"given only where the last third of the checkpoints differs from the first third: {len(shown)} of {len(rows)} "
        "curves. An interval that reaches the right edge goes on beyond the last checkpoint."
    )
    listed = "; ".join(
        f"{look.persona(r.persona)}, {outcome_name(view, r.outcome)}: step {r.step:.1f}" for r in shown.itertuples()
    )
    return Drawing(fig, caption, f"Dot plot of transition points. {listed or 'None is shown'}.")
