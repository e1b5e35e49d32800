"""Histograms of scores, a panel for each persona."""

from __future__ import annotations

import pandas as pd

from cai_em.analysis.summaries import BINS, SHARES
from cai_em.records.keys import BASELINE
from cai_em.records.numbers import points
from cai_em.report import style
from cai_em.report.figures.parts import Drawing, View, figure, grid_axes


@figure("histograms", "Histograms", "06_results/shapes", order=12)
def _draw(view: View, shapes: pd.DataFrame) -> Drawing:
    """A histogram per persona, the baseline's outline behind each."""
    look, table = view.look, shapes[shapes["persona"].notna() & shapes["dataset"].isna()].set_index("persona")
    personas = look.sort_personas(table.index)
    fig, axes = grid_axes(len(personas), 4, 1.15, sharex=True, sharey=True)
    shares = 100 * table[SHARES].astype(float)
    for ax, persona in zip(axes, personas):
        row = table.loc[persona]
        ax.stairs(shares.loc[persona], BINS, fill=True, color=look.colour(persona), alpha=0.8)
        if BASELINE in shares.index:
            ax.stairs(shares.loc[BASELINE], BINS, color=style.INK, lw=0.8)
        ax.set_title(look.persona(persona), fontsize=7.5)
        said = f"n = {row['n']:,}\nmean {points(row['mean'])}"
        ax.text(0.04, 0.92, said, transform=ax.transAxes, va="top", fontsize=6.5)
        ax.set_xlim(0, 100)
    fig.supxlabel("alignment", fontsize=8)
    fig.supylabel("share (%)", fontsize=8)
    caption = (
        f"Histograms of alignment by persona (bins of five points); the line is the baseline's. Between "
        f"{table['n'].min():,} and {table['n'].max():,} scored responses each."
    )
    return Drawing(fig, caption, f"Grid of {len(personas)} histograms of alignment scores.")
