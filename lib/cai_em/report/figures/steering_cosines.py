"""H4: how alike the personas' directions are."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd

from cai_em.dynamics.directions import direction_label, persona_of
from cai_em.report import style
from cai_em.report.figures.parts import Drawing, View, figure
from cai_em.report.style import line_look


@figure("steering-cosines", "Directions compared", "10_steering/cosines", order=43, section="steering")
def _draw(view: View, found: pd.DataFrame) -> Drawing | None:
    """Cosines between sources' directions by layer, with both nulls."""
    look = view.look
    pairs = found[["one", "other"]].drop_duplicates().to_records(index=False)
    fig, ax = plt.subplots(figsize=style.figure_size(2.8))
    for i, (one, other) in enumerate(pairs):
        part = found[(found["one"] == one) & (found["other"] == other)].sort_values("layer")
        ax.plot(
            part["layer"],
            part["cosine"],
            label=f"{direction_label(one, look)} and {direction_label(other, look)}",
            **line_look(i),
        )
        ax.plot(part["layer"], part["shuffled_bound"], color=line_look(i)["color"], ls=":", lw=0.9)
    bound = found["random_bound"].iloc[0]
    ax.axhspan(-bound, bound, color=style.MUTED, alpha=0.25, lw=0)
    ax.plot([], [], color=style.MUTED, ls=":", label="95 % of shuffled labels")
    ax.plot([], [], color=style.MUTED, lw=5, alpha=0.25, label="95 % of random directions")
    ax.set_xticks(sorted(found["layer"].unique()))
    ax.set_xlabel("layer")
    ax.set_ylabel("cosine of directions")
    ax.set_ylim(min(-0.15, found["cosine"].min() - 0.05), 1.02)
    fig.legend(loc="outside lower center", ncols=3)
    said = (
        f"cosines from {found['cosine'].min():.2f} to {found['cosine'].max():.2f}; random directions stay within "
        f"{bound:.2f}, shuffled labels within {found['shuffled_bound'].max():.2f}"
    )
    if found["one"].map(persona_of).eq(found["other"].map(persona_of)).any():
        said += "; one persona's directions from two training runs show how alike two can be expected to be"
    return Drawing(fig, f"Directions compared, layer by layer: {said}.", f"Line plot of {said}.")
