"""Manipulation checks: classifier tests against chance."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.lines import Line2D

from cai_em.report import style
from cai_em.report.figures.parts import Drawing, View, figure, legend_below, name_datasets, name_rows, two_lines

GATE_PANELS = {
    "personas": ("Which persona wrote this?\n(all personas of a data set)", "accuracy"),
    "persona": ("Persona or baseline?", "AUC"),
    "dataset": ("Fine-tuned or not?", "AUC"),
    "datasets": ("Which data set was it?\n(all data sets of a persona)", "accuracy"),
    "dataset_others": ("This data set or another?", "AUC"),
}
"""Classifier tests shown, by `scope` (see cai_em.analysis.classifiers.SCOPES): title and what is measured."""


@figure("gates", "Manipulation checks", "05_validity/tests", order=15)
def _draw(view: View, tests: pd.DataFrame) -> Drawing | None:
    """Classifier two-sample tests, one panel per question asked, against chance.

    A test is filled where its interval lies above chance and its p is below `view.p_max`. What permuted labels gave
    (`chance_low, chance_high`) is drawn as a band where known.
    """
    look, p_max = view.look, view.p_max
    panels = [s for s in GATE_PANELS if (tests["scope"] == s).any()]
    # Without an untuned arm the data sets are told from each other; with one, from no fine-tuning.
    panels = [s for s in panels if s != "dataset_others" or "dataset" not in panels][:4]
    if not panels:
        return None
    rows = -(-len(panels) // 2)
    longest = max(len(look.sort_datasets(tests["dataset"].dropna())), 3)
    fig, axes = plt.subplots(rows, 2, figsize=style.figure_size(rows * (0.9 + 0.26 * longest) + 0.5), squeeze=False)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    notes = []
    for ax, scope in zip(axes.flat, panels):
        part = tests[tests["scope"] == scope].dropna(subset="estimate")
        title, measure = GATE_PANELS[scope]
        by = "persona" if scope == "datasets" else "dataset"
        names = (look.sort_personas if by == "persona" else look.sort_datasets)(part[by])
        seen = (part["low"] > part["chance"]) & (part["p"] < p_max)
        for y, name in enumerate(names):
            here = part[part[by] == name]
            spread = np.linspace(-0.36, 0.36, len(here)) if len(here) > 1 else [0.0]
            ax.plot([here["chance"].mean()] * 2, [y - 0.45, y + 0.45], color=style.INK, lw=1.1, zorder=1)
            if {"chance_low", "chance_high"} <= set(here):
                low, high = here["chance_low"].min(), here["chance_high"].max()
                ax.barh(y, high - low, left=low, height=0.9, color=style.CHANCE, zorder=0)
            for offset, row in zip(spread, here.itertuples()):
                persona = row.persona if isinstance(row.persona, str) else None
                colour = look.colour(persona) if persona else style.INK
                face = colour if seen[row.Index] else style.PAPER
                if len(here) <= 4:
                    ax.plot([row.low, row.high], [y + offset] * 2, color=colour, lw=0.9, alpha=0.8, zorder=2)
                marker = look.marker(persona) if persona else "o"
                ax.plot(row.estimate, y + offset, marker=marker, ms=style.marker_size(marker, 3.2), ls="none",
                        mec=colour, mfc=face, mew=0.7, zorder=3)  # fmt: skip
        if by == "persona":
            name_rows(ax, [two_lines(look.persona(n)) for n in names])
        else:
            name_datasets(ax, names, look)
        ax.tick_params(axis="y", labelsize=6.2)
        ax.set_title(title, fontsize=7)
        ax.set_xlabel(f"{measure} on questions held out", fontsize=7)
        notes.append(f"{title.rstrip('?').split('?')[0].lower()}: above chance in {int(seen.sum())} of {len(part)}")
    personas = look.sort_personas(tests.loc[tests["scope"].isin(("persona", "dataset")), "persona"].dropna())
    handles = [Line2D([], [], **look.line(p) | {"linestyle": "none"}) for p in personas]
    handles += [
        Line2D([], [], color=style.INK, lw=1.1, label="chance (grey: permuted labels)"),
        Line2D([], [], marker="o", mfc=style.PAPER, color=style.INK, ls="none", ms=4, label="hollow: not above chance"),
    ]
    legend_below(fig, handles, 3)
    caption = (
        "Manipulation checks from the responses alone: how well a classifier tells them apart on questions that it "
        "has not seen, with bootstrap intervals over questions where they can be told apart. Filled: interval above "
        f"chance and permutation p below {p_max:g}. " + "; ".join(notes).capitalize() + "."
    )
    return Drawing(fig, caption, f"{len(panels)} panels of classifier scores against chance; {'; '.join(notes)}.")
