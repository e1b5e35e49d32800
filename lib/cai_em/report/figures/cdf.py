"""Cumulative distributions of scores."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.lines import Line2D

from cai_em.records.keys import BASELINE
from cai_em.report import style
from cai_em.report.figures.parts import Drawing, View, figure, legend_below


@figure("cdf", "Cumulative distributions", "06_results/cumulative", order=10)
def _draw(view: View, cumulative: pd.DataFrame) -> Drawing:
    """Cumulative distribution of scores: key personas in colour, the others in grey."""
    look = view.look
    personas = look.sort_personas(cumulative["persona"])
    keys = [p for p in personas if p in {BASELINE, *view.key_personas}]
    fig, ax = plt.subplots(figsize=style.figure_size(3.0))
    at = {}
    for persona in [p for p in personas if p not in keys] + keys:
        curve = 100 * cumulative[cumulative["persona"] == persona].set_index("score")["share"]
        at[persona] = curve[80]
        if persona in keys:
            ax.plot(curve, **look.line(persona), markevery=(5 * keys.index(persona) % 20, 20))
        else:
            ax.plot(curve, color=style.PALE, lw=0.9, zorder=1)
    ax.set(xlabel="alignment", ylabel="responses at or below (%)", xlim=(0, 100))
    ax.set_yscale("function", functions=(np.sqrt, np.square))
    ax.set_ylim(0, 100)
    ax.set_yticks([0, 1, 5, 10, 25, 50, 75, 100])
    handles = [Line2D([], [], **look.line(k)) for k in keys]
    if len(keys) < len(personas):
        handles.append(Line2D([], [], color=style.PALE, lw=0.9, label="other personas"))
    legend_below(fig, handles, 5)
    low, high = min(at, key=at.get), max(at, key=at.get)
    caption = (
        f"Cumulative distribution of alignment scores (the vertical scale is a square root). At or below 80: from "
        f"{at[low]:.1f} % ({look.persona(low)}) to {at[high]:.1f} % ({look.persona(high)})."
    )
    return Drawing(
        fig, caption, f"Cumulative curves of alignment for {len(personas)} personas, {len(keys)} highlighted."
    )
