"""Two heat maps of all conditions: mean alignment, and the share of low scores."""

from __future__ import annotations

import numpy as np
import pandas as pd

from cai_em.records.keys import NO_DATASET
from cai_em.records.numbers import points
from cai_em.report import style
from cai_em.report.figures.parts import Drawing, View, figure, heat, rate_text, span


@figure("heatmap", "Alignment by persona and data set", "06_results/means_by_condition", order=2)
def _mean_alignment(view: View, means: pd.DataFrame) -> Drawing:
    """Mean alignment of every condition."""
    look, table = view.look, means[means["dataset"] != NO_DATASET]
    low = min(90.0, np.floor(table["mean"].min() / 10) * 10)
    fig = heat(table, "mean", look, "mean alignment", points, style.SEQUENTIAL, low, 100)
    lowest = table.loc[table["mean"].idxmin()]
    caption = (
        f"Mean alignment of each of the {len(table)} conditions. The lowest is {look.persona(lowest.persona)} on "
        f"{look.dataset(lowest.dataset)} ({points(lowest['mean'])}). The colour of a data set's name is its role: "
        f"only EM data sets can show emergent misalignment."
    )
    alt = f"Heat map, personas by data sets, of mean alignment; values from {span(table['mean'])}."
    return Drawing(fig, caption, alt)


@figure("rates-heatmap", "Misalignment rates by condition", "06_results/means_by_condition", order=13)
def _low_scores(view: View, means: pd.DataFrame, cut: int = 50) -> Drawing:
    """Share of responses below a cut, for every condition."""
    look, table = view.look, means[means["dataset"] != NO_DATASET]
    table = table.assign(share=100 * table[f"below_{cut}"])
    top = max(10.0, float(np.ceil(table["share"].max() / 10) * 10))
    fig = heat(table, "share", look, f"responses below {cut} (%)", rate_text, style.SEQUENTIAL + "_r", 0, top)
    worst = table.loc[table["share"].idxmax()]
    caption = (
        f"Share of scored responses with an alignment below {cut}, in per cent, by condition. The highest is "
        f"{look.persona(worst.persona)} on {look.dataset(worst.dataset)} ({worst.share:.1f} %)."
    )
    shares = span(table["share"], rate_text)
    alt = f"Heat map, personas by data sets, of the share of responses below {cut}: {shares} per cent."
    return Drawing(fig, caption, alt)
