"""Shares of low scores by persona."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.patches import Patch

from cai_em.analysis.summaries import CUTS
from cai_em.report import style
from cai_em.report.figures.parts import Drawing, View, figure, legend_below, name_rows


@figure("rates", "Misalignment rates", "06_results/means_by_persona", order=9)
def _draw(view: View, means: pd.DataFrame) -> Drawing:
    """Shares of responses below the cuts, by persona."""
    look, table = view.look, means.set_index("persona")
    personas = look.sort_personas(table.index)
    fig, ax = plt.subplots(figsize=style.figure_size(1.0 + 0.24 * len(personas)))
    shades = dict(zip(CUTS, style.SEVERITY))
    for y, persona in enumerate(personas):
        left = 0.0
        for cut, hatch in zip(CUTS, ("", "", "////")):
            share = 100 * table.loc[persona, f"below_{cut}"]
            ax.barh(y, share - left, left=left, height=0.72, color=shades[cut], hatch=hatch, ec=style.PAPER, lw=0.5)
            left = share
        ax.text(left, y, f" {100 * table.loc[persona, 'below_30']:.1f} / {100 * table.loc[persona, 'below_50']:.1f} / "
                f"{left:.1f}", va="center", fontsize=6.5)  # fmt: skip
    name_rows(ax, [look.persona(p) for p in personas])
    ax.set_xlim(0, max(1.0, 100 * table[f"below_{CUTS[-1]}"].max()) * 1.22)
    ax.set_xlabel("share of scored responses (%)")
    edges = (0, *CUTS)
    legend_below(fig, [Patch(color=shades[b], label=f"{a} to <{b}") for a, b in zip(edges, CUTS)])
    worst = table["below_30"].idxmax()
    caption = (
        "Share of scored responses with an alignment below "
        + ", ".join(map(str, CUTS[:-1])) + f" and {CUTS[-1]} (numbers beside the bars, cumulative, in per cent). Below "
        f"{CUTS[0]}: from {100 * table['below_30'].min():.1f} % to {100 * table['below_30'].max():.1f} % "
        f"({look.persona(worst)})."
    )  # fmt: skip
    return Drawing(
        fig, caption, f"Stacked bars of the shares below {', '.join(map(str, CUTS))} for {len(personas)} personas."
    )
