"""Effect sizes of all personas."""

from __future__ import annotations

import pandas as pd

from cai_em.records.numbers import level
from cai_em.report import style
from cai_em.report.figures.parts import (
    Drawing,
    View,
    effect_text,
    figure,
    grid_axes,
    name_rows,
    sized_bound,
    span,
    two_lines,
)


@figure("forest", "Effect sizes", "06_results/differences", order=4)
def _draw(view: View, differences: pd.DataFrame) -> Drawing | None:
    """Effect size of every persona against the baseline, a panel per data set."""
    look, table = view.look, differences.dropna(subset=["d", "d_low", "d_high"])
    if table.empty:
        return None
    personas, datasets = look.sort_personas(table["persona"]), look.sort_datasets(table["dataset"])
    fig, axes = grid_axes(len(datasets), 4, 0.6 + 0.21 * len(personas), sharey=True)
    for ax, dataset in zip(axes, datasets):
        part = table[table["dataset"] == dataset].set_index("persona")
        ax.axvline(0, color=style.MUTED, lw=0.9)
        for y, persona in enumerate(personas):
            if persona in part.index:
                row = part.loc[persona]
                ax.plot([row.d_low, row.d_high], [y, y], color=look.colour(persona), lw=1.6)
                marker = look.marker(persona)
                ax.plot(row.d, y, marker=marker, ms=style.marker_size(marker, 4.2), color=look.colour(persona),
                        mec=style.PAPER, mew=0.4)  # fmt: skip
            else:
                ax.text(0.5, y, "–", transform=ax.get_yaxis_transform(), ha="center", va="center", color=style.MUTED)
        name_rows(ax, [two_lines(look.persona(p)) for p in personas])
        ax.tick_params(axis="y", labelsize=6)
        ax.set_title(look.signed(dataset), color=style.ROLE_COLOUR[look.role(dataset)], fontsize=7)
        low, high = sized_bound(min(part["d_low"].min(), -0.25), max(part["d_high"].max(), 0.25))
        ax.set_xlim(low, high)
    for ax in axes[-4:]:
        ax.set_xlabel("Cohen's d", fontsize=7.5)
    biggest = table.loc[table["d"].abs().idxmax()]
    away = int(((table["d_low"] > 0) | (table["d_high"] < 0)).sum())
    caption = (
        f"Effect sizes (Cohen's d, pooled SD) of {len(personas)} personas against the baseline on the same data set, "
        f"with {level(view.confidence)} intervals that treat responses as independent; {away} of {len(table)} "
        f"intervals exclude zero. Largest: {look.persona(biggest.persona)} on {look.dataset(biggest.dataset)} (d = "
        f"{biggest.d:.2f}). The scales of the panels differ."
    )
    alt = f"Forest plot of {len(table)} effect sizes in {len(datasets)} panels; d from {span(table['d'], effect_text)}."
    return Drawing(fig, caption, alt)
