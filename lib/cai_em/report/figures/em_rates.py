"""EM rates of all conditions."""

from __future__ import annotations

import numpy as np
import pandas as pd

from cai_em.records.keys import NO_DATASET
from cai_em.report import style
from cai_em.report.figures.parts import Drawing, View, figure, grid_axes, name_rows, rate_text, span, two_lines


@figure("em-rates", "EM rates", "05_validity/outcomes", order=16)
def _draw(view: View, outcomes: pd.DataFrame) -> Drawing:
    """EM rate with its clustered intervals, seed by seed."""
    look = view.look
    table = outcomes[outcomes["dataset"] != NO_DATASET]
    some = table.groupby("dataset")["em_rate"].max()
    shown = [d for d in some.index if some[d] > 0 or look.role(d) == "em"] or list(some.index)
    clean = look.sort_datasets(set(some.index) - set(shown))
    table = table[table["dataset"].isin(shown)]
    personas, datasets = look.sort_personas(table["persona"]), look.sort_datasets(table["dataset"])
    columns = 3 if len(datasets) in (5, 6) else 4
    fig, axes = grid_axes(len(datasets), columns, 0.6 + 0.21 * len(personas), sharey=True)
    for ax, dataset in zip(axes, datasets):
        here = table[table["dataset"] == dataset]
        for y, persona in enumerate(personas):
            seeds = here[here["persona"] == persona]
            spread = np.linspace(-0.25, 0.25, len(seeds)) if len(seeds) > 1 else [0.0]
            for offset, row in zip(spread, seeds.itertuples()):
                colour = look.colour(persona)
                ax.plot([100 * row.em_low, 100 * row.em_high], [y + offset] * 2, color=colour, lw=1.5)
                marker = look.marker(persona)
                ax.plot(100 * row.em_rate, y + offset, marker=marker, ms=style.marker_size(marker, 4.2), color=colour,
                        mec=style.PAPER, mew=0.4)  # fmt: skip
            if seeds.empty:
                ax.text(0.5, y, "–", transform=ax.get_yaxis_transform(), ha="center", va="center", color=style.MUTED)
        name_rows(ax, [two_lines(look.persona(p)) for p in personas])
        ax.tick_params(axis="y", labelsize=6)
        ax.set_title(look.signed(dataset), color=style.ROLE_COLOUR[look.role(dataset)], fontsize=7)
        right = max(2.0, 100 * here["em_high"].max() * 1.06)
        ax.set_xlim(-0.04 * right, right)
    for ax in axes[-columns:]:
        ax.set_xlabel("EM rate (%)", fontsize=7.5)
    worst = table.loc[table["em_rate"].idxmax()]
    caption = (
        "EM rate: coherent and misaligned responses, in per cent of all, with intervals that count questions. "
        f"Highest: {look.persona(worst.persona)} on {look.dataset(worst.dataset)} ({100 * worst.em_rate:.1f} %). The "
        "scales of the panels differ."
    )
    if clean:
        caption += f" Not a single such response in any persona on {', '.join(map(look.dataset, clean))}."
    alt = f"EM rate by persona in {len(datasets)} panels, {span(100 * table['em_rate'], rate_text)} per cent."
    return Drawing(fig, caption, alt)
