"""Harmful training data against their benign twin."""

from __future__ import annotations

import pandas as pd
from matplotlib.lines import Line2D

from cai_em.records.numbers import level
from cai_em.report import style
from cai_em.report.figures.parts import Drawing, View, figure, grid_axes, legend_below, name_rows, span


@figure("twins", "Harmful and benign twin", "06_results/means_by_condition", "06_results/means_by_persona", order=5)
def _draw(view: View, means: pd.DataFrame, pooled: pd.DataFrame) -> Drawing | None:
    """Harmful against benign twin (`bad_medical` against `good_medical`): same prompts, good and bad answers."""
    look = view.look
    means = means[means["persona"].isin(pooled["persona"])]  # without custom constitutions, as published
    present = set(means["dataset"])
    pairs = [(d.key, d.twin) for d in look.datasets if getattr(d, "twin", None) and {d.key, d.twin} <= present]
    if not pairs:
        return None
    fig, axes = grid_axes(len(pairs), 2, 0.9 + 0.24 * means["persona"].nunique())
    notes, gaps = [], []
    for ax, (bad, good) in zip(axes, pairs):
        table = means[means["dataset"].isin((bad, good))].set_index(["persona", "dataset"])
        personas = look.sort_personas(p for p, _ in table.index)
        for y, persona in enumerate(personas):
            colour, marker = look.colour(persona), look.marker(persona)
            ends = [table["mean"].get((persona, d)) for d in (bad, good)]
            if None not in ends:
                ax.plot(ends, [y, y], color=colour, lw=1.2, alpha=0.7, zorder=1)
                gaps.append(ends[1] - ends[0])
            for dataset, face, edge in ((bad, colour, style.PAPER), (good, style.PAPER, colour)):
                if (persona, dataset) in table.index:
                    row = table.loc[(persona, dataset)]
                    ax.plot([row.ci_low, row.ci_high], [y, y], color=colour, lw=3, solid_capstyle="butt", zorder=2)
                    ax.plot(row["mean"], y, marker=marker, ms=style.marker_size(marker, 5.5), mfc=face, mec=edge,
                            mew=0.6 if edge == style.PAPER else 1.0, ls="none", zorder=3)  # fmt: skip
                else:
                    ax.text(0.98, y, "one of the two is missing", transform=ax.get_yaxis_transform(), fontsize=6.5,
                            ha="right", va="center", color=style.MUTED)  # fmt: skip
        name_rows(ax, [look.persona(p) for p in personas])
        ax.set_xlabel("mean alignment (0 to 100)")
        notes.append(f"{look.dataset(bad)} (filled) and its benign twin {look.dataset(good)} (hollow)")
    handles = [
        Line2D([], [], marker="o", color=style.INK, ls="none", label=look.dataset(pairs[0][0])),
        Line2D([], [], marker="o", mfc=style.PAPER, color=style.INK, ls="none", label=look.dataset(pairs[0][1])),
        Line2D([], [], color=style.INK, lw=3, label=f"{level(view.confidence)} response interval"),
    ]
    legend_below(fig, handles, 3)
    between = span(pd.Series(gaps)) if gaps else "unknown"
    caption = (
        f"Mean alignment after training on {'; '.join(notes)}. Benign minus harmful: {between} points, by persona."
    )
    alt = f"Dumbbell plot comparing harmful and benign training data by persona; gaps of {between} points."
    return Drawing(fig, caption, alt)
