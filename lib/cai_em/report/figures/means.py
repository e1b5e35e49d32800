"""Every figure of the study, drawn from tables; each with a caption and alternative text whose numbers come from data.

A figure function takes a tidy table and a `Look` and returns a `Drawing`. Rows that are missing are shown as missing,
never as zero. `draw_all` summarises a score table, draws what the tables allow and writes SVG and PNG:

    records = draw_all(scores, folder, look, hypotheses, tests=..., outcomes=..., specifications=...)

Two kinds of interval stand in the figures. The *response interval* treats all responses as independent, as the
published study did. The *question interval* takes the mean of each question first and is a t-interval over those
few means: responses to one question resemble each other, and a claim about other questions needs this one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.lines import Line2D
from scipy import stats as sps

from cai_em.analysis.outcome import _differences, effect_interval, like_for_like, summarise
from cai_em.records.keys import BASELINE, NO_DATASET
from cai_em.records.numbers import level, points
from cai_em.report import style
from cai_em.report.figures.parts import (
    Drawing,
    _effect,
    _grid_axes,
    _heat,
    _interval_key,
    _intervals,
    _legend_below,
    _name_datasets,
    _name_rows,
    _range,
    _rate,
    _role_handles,
    _sized_bound,
    _two_lines,
)
from cai_em.report.style import Look

# --- The figures of one model -------------------------------------------------------------------------------------


def alignment_by_persona(scores: pd.DataFrame, look: Look, confidence: float = 0.95) -> Drawing:
    """Mean alignment of each persona over its data sets, as published and like for like."""
    table = summarise(scores, ["persona"], confidence).set_index("persona")
    shared = like_for_like(scores)
    fair = summarise(scores[scores["dataset"].isin(shared)], ["persona"], confidence).set_index("persona")
    personas = look.sort_personas(table.index)
    uneven = scores.groupby("persona")["dataset"].nunique().nunique() > 1 and bool(shared)
    fig, ax = plt.subplots(figsize=style.figure_size(0.95 + 0.24 * len(personas)))
    for y, persona in enumerate(personas):
        marker = look.marker(persona)
        _intervals(ax, y - 0.12 * uneven, table.loc[persona], look.colour(persona), marker)
        if uneven:
            ax.plot(fair.loc[persona, "mean"], y + 0.25, marker=marker, mfc="none", ms=style.marker_size(marker, 4.2),
                    ls="none", color=look.colour(persona))  # fmt: skip
    if BASELINE in personas:
        ax.axvline(table.loc[BASELINE, "mean"], color=style.MUTED, lw=0.8, ls="--", zorder=0)
    _name_rows(ax, [look.persona(p) for p in personas])
    ax.set_xlabel("mean alignment (0 to 100)")
    handles = _interval_key(confidence)
    if uneven:
        handles.append(Line2D([], [], marker="o", mfc="none", color=style.INK, ls="none", label="like for like"))
    _legend_below(fig, handles, 3)
    best, worst = table["mean"].idxmax(), table["mean"].idxmin()
    caption = (
        f"Mean alignment by persona over all its data sets, from {look.persona(worst)} "
        f"({points(table.loc[worst, 'mean'])}) to {look.persona(best)} ({points(table.loc[best, 'mean'])}). Thick: "
        f"{level(confidence)} interval that treats the responses as independent; thin: {level(confidence)} interval "
        f"over the means of {int(table['n_questions'].max())} questions."
    )
    if uneven:
        caption += (
            f" Hollow: the mean over only those {len(shared)} data sets that every persona has; filled means pool "
            "easier and harder data sets in unequal parts."
        )
    alt = f"Dot plot of mean alignment for {len(personas)} personas, ranging from {_range(table['mean'])} points."
    return Drawing(fig, caption, alt)


def heatmap(scores: pd.DataFrame, look: Look) -> Drawing:
    """Mean alignment of every condition."""
    table = summarise(scores, ["persona", "dataset"])
    low = min(90.0, np.floor(table["mean"].min() / 10) * 10)
    fig = _heat(table, "mean", look, "mean alignment", points, style.SEQUENTIAL, low, 100)
    lowest = table.loc[table["mean"].idxmin()]
    caption = (
        f"Mean alignment of each of the {len(table)} conditions. The lowest is {look.persona(lowest.persona)} on "
        f"{look.dataset(lowest.dataset)} ({points(lowest['mean'])}). The colour of a data set's name is its role: "
        f"only EM data sets can show emergent misalignment."
    )
    alt = f"Heat map, personas by data sets, of mean alignment; values from {_range(table['mean'])}."
    return Drawing(fig, caption, alt)


def misalignment_heatmap(scores: pd.DataFrame, look: Look, cut: int = 50) -> Drawing:
    """Share of responses below a cut, for every condition."""
    table = summarise(scores, ["persona", "dataset"])
    table["share"] = 100 * table[f"below_{cut}"]
    top = max(10.0, float(np.ceil(table["share"].max() / 10) * 10))
    fig = _heat(table, "share", look, f"responses below {cut} (%)", _rate, style.SEQUENTIAL + "_r", 0, top)
    worst = table.loc[table["share"].idxmax()]
    caption = (
        f"Share of scored responses with an alignment below {cut}, in per cent, by condition. The highest is "
        f"{look.persona(worst.persona)} on {look.dataset(worst.dataset)} ({worst.share:.1f} %)."
    )
    shares = _range(table["share"], _rate)
    alt = f"Heat map, personas by data sets, of the share of responses below {cut}: {shares} per cent."
    return Drawing(fig, caption, alt)


def hypothesis_differences(
    scores: pd.DataFrame, look: Look, hypotheses: Sequence[Any], confidence: float = 0.95
) -> Drawing | None:
    """Each hypothesis: persona minus baseline on every data set, with both intervals and the predicted side shaded."""
    found = []
    for hypothesis in hypotheses:
        for persona in hypothesis.personas:
            table = _differences(scores, persona, confidence)
            if len(table):
                found.append((hypothesis, persona, table.set_index("dataset")))
    if not found:
        return None
    datasets = look.sort_datasets({d for _, _, t in found for d in t.index})
    fig, axes = _grid_axes(len(found), 3, 0.55 + 0.25 * len(datasets), sharex=True, sharey=True)
    bounds = pd.concat([t[["ci_low", "ci_high", "q_low", "q_high"]] for _, _, t in found])
    low, high = _sized_bound(min(bounds.min().min(), 0), max(bounds.max().max(), 0))
    notes = []
    for ax, (hypothesis, persona, table) in zip(axes, found):
        side = (low, 0) if hypothesis.direction == "lower" else (0, high)
        ax.axvspan(*side, color=style.PREDICTED, zorder=0)
        ax.axvline(0, color=style.MUTED, lw=0.9)
        for y, dataset in enumerate(datasets):
            if dataset in table.index:
                _intervals(ax, y, table.loc[dataset], look.colour(persona), look.marker(persona))
            else:
                ax.text(0, y, "no such condition", ha="center", va="center", fontsize=6.5, color=style.MUTED)
        _name_datasets(ax, datasets, look)
        ax.set_title(f"{hypothesis.label}: {look.persona(persona)}")
        ax.set_xlim(low, high)
        beyond = table[table["q_low"] > 0] if hypothesis.direction == "higher" else table[table["q_high"] < 0]
        notes.append(f"{hypothesis.label}, {look.persona(persona)}: {len(beyond)} of {len(table)}")
    for ax in axes[-3:]:
        ax.set_xlabel("persona − baseline (points)")
    _legend_below(fig, [*_interval_key(confidence), *_role_handles(datasets, look)], 3)
    caption = (
        "Difference in mean alignment between a persona and the baseline on the same data set. The shaded side is the "
        "predicted one. Data sets on which the question interval lies wholly on the predicted side: "
        + "; ".join(notes) + "."
    )  # fmt: skip
    alt = f"{len(found)} panels of persona-minus-baseline differences with intervals on {len(datasets)} data sets."
    return Drawing(fig, caption, alt)


def forest(scores: pd.DataFrame, look: Look, confidence: float = 0.95) -> Drawing | None:
    """Effect size of every persona against the baseline, a panel per data set."""
    rows = []
    for dataset, group in scores.dropna(subset="alignment").groupby("dataset", sort=False):
        by = {p: g["alignment"].to_numpy() for p, g in group.groupby("persona")}
        if len(by.get(BASELINE, [])) < 2:
            continue
        for persona, values in by.items():
            if persona != BASELINE and len(values) > 1:
                d, low, high = effect_interval(values, by[BASELINE], confidence)
                rows.append({"dataset": dataset, "persona": persona, "d": d, "low": low, "high": high})
    table = pd.DataFrame(rows, columns=["dataset", "persona", "d", "low", "high"]).dropna()
    if table.empty:
        return None
    personas, datasets = look.sort_personas(table["persona"]), look.sort_datasets(table["dataset"])
    fig, axes = _grid_axes(len(datasets), 4, 0.6 + 0.21 * len(personas), sharey=True)
    for ax, dataset in zip(axes, datasets):
        part = table[table["dataset"] == dataset].set_index("persona")
        ax.axvline(0, color=style.MUTED, lw=0.9)
        for y, persona in enumerate(personas):
            if persona in part.index:
                row = part.loc[persona]
                ax.plot([row.low, row.high], [y, y], color=look.colour(persona), lw=1.6)
                marker = look.marker(persona)
                ax.plot(row.d, y, marker=marker, ms=style.marker_size(marker, 4.2), color=look.colour(persona),
                        mec=style.PAPER, mew=0.4)  # fmt: skip
            else:
                ax.text(0.5, y, "–", transform=ax.get_yaxis_transform(), ha="center", va="center", color=style.MUTED)
        _name_rows(ax, [_two_lines(look.persona(p)) for p in personas])
        ax.tick_params(axis="y", labelsize=6)
        ax.set_title(look.signed(dataset), color=style.ROLE_COLOUR[look.role(dataset)], fontsize=7)
        low, high = _sized_bound(min(part["low"].min(), -0.25), max(part["high"].max(), 0.25))
        ax.set_xlim(low, high)
    for ax in axes[-4:]:
        ax.set_xlabel("Cohen's d", fontsize=7.5)
    biggest = table.loc[table["d"].abs().idxmax()]
    away = int(((table["low"] > 0) | (table["high"] < 0)).sum())
    caption = (
        f"Effect sizes (Cohen's d, pooled SD) of {len(personas)} personas against the baseline on the same data set, "
        f"with {level(confidence)} intervals that treat responses as independent; {away} of {len(table)} intervals "
        f"exclude zero. Largest: {look.persona(biggest.persona)} on {look.dataset(biggest.dataset)} (d = "
        f"{biggest.d:.2f}). The scales of the panels differ."
    )
    alt = f"Forest plot of {len(table)} effect sizes in {len(datasets)} panels; d from {_range(table['d'], _effect)}."
    return Drawing(fig, caption, alt)


def twin_comparison(scores: pd.DataFrame, look: Look, confidence: float = 0.95) -> Drawing | None:
    """Harmful against benign twin (`bad_medical` against `good_medical`): same prompts, good and bad answers."""
    present = set(scores["dataset"])
    pairs = [(d.key, d.twin) for d in look.datasets if getattr(d, "twin", None) and {d.key, d.twin} <= present]
    if not pairs:
        return None
    fig, axes = _grid_axes(len(pairs), 2, 0.9 + 0.24 * scores["persona"].nunique())
    notes, gaps = [], []
    for ax, (bad, good) in zip(axes, pairs):
        here = scores[scores["dataset"].isin((bad, good))]
        table = summarise(here, ["persona", "dataset"], confidence).set_index(["persona", "dataset"])
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
        _name_rows(ax, [look.persona(p) for p in personas])
        ax.set_xlabel("mean alignment (0 to 100)")
        notes.append(f"{look.dataset(bad)} (filled) and its benign twin {look.dataset(good)} (hollow)")
    _legend_below(
        fig,
        [
            Line2D([], [], marker="o", color=style.INK, ls="none", label=look.dataset(pairs[0][0])),
            Line2D([], [], marker="o", mfc=style.PAPER, color=style.INK, ls="none", label=look.dataset(pairs[0][1])),
            Line2D([], [], color=style.INK, lw=3, label=f"{level(confidence)} response interval"),
        ],
        3,
    )
    between = _range(pd.Series(gaps)) if gaps else "unknown"
    caption = (
        f"Mean alignment after training on {'; '.join(notes)}. Benign minus harmful: {between} points, by persona."
    )
    alt = f"Dumbbell plot comparing harmful and benign training data by persona; gaps of {between} points."
    return Drawing(fig, caption, alt)


def key_personas(scores: pd.DataFrame, look: Look, keys: Sequence[str], confidence: float = 0.95) -> Drawing | None:
    """The baseline and the personas of the hypotheses, side by side on every data set."""
    present = set(scores["persona"])
    keys = [k for k in dict.fromkeys((BASELINE, *keys)) if k in present]
    table = summarise(scores[scores["persona"].isin(keys)], ["persona", "dataset"], confidence)
    if len(keys) < 2:
        return None
    datasets = look.sort_datasets(table["dataset"])
    table = table.set_index(["persona", "dataset"])
    fig, ax = plt.subplots(figsize=style.figure_size(2.9))
    step = 0.72 / len(keys)
    for i, persona in enumerate(keys):
        offset = (i - (len(keys) - 1) / 2) * step
        for x, dataset in enumerate(datasets):
            if (persona, dataset) in table.index:
                row = table.loc[(persona, dataset)]
                colour = look.colour(persona)
                ax.plot([x + offset] * 2, [row.q_low, min(row.q_high, 100)], color=colour, lw=0.9)
                ax.plot([x + offset] * 2, [row.ci_low, row.ci_high], color=colour, lw=3, solid_capstyle="butt")
                marker = look.marker(persona)
                ax.plot(x + offset, row["mean"], marker=marker, ms=style.marker_size(marker, 5.5), color=colour,
                        mec=style.PAPER, mew=0.5)  # fmt: skip
    for x in range(len(datasets) - 1):
        ax.axvline(x + 0.5, color=style.GRID, lw=0.6)
    ax.grid(axis="x", visible=False)
    _name_datasets(ax, datasets, look, "x", 20)
    ax.set_xlim(-0.5, len(datasets) - 0.5)
    ax.set_ylabel("mean alignment")
    _legend_below(
        fig, [Line2D([], [], **(look.line(k) | {"linestyle": "none"})) for k in keys] + _interval_key(confidence), 4
    )
    base = table.loc[BASELINE]["mean"] if BASELINE in keys else None
    caption = f"Mean alignment of the baseline and the personas of the hypotheses on {len(datasets)} data sets."
    if base is not None:
        caption += (
            f" The baseline falls to {points(base.min())} on {look.dataset(base.idxmin())} and reaches "
            f"{points(base.max())} on {look.dataset(base.idxmax())}."
        )
    alt = f"Dots with intervals: {', '.join(look.persona(k) for k in keys)} on each of {len(datasets)} data sets."
    return Drawing(fig, caption, alt)


def dataset_difficulty(scores: pd.DataFrame, look: Look, confidence: float = 0.95) -> Drawing:
    """Mean alignment by data set over all personas, the baseline alone beside it."""
    table = summarise(scores, ["dataset"], confidence).set_index("dataset")
    base = summarise(scores[scores["persona"] == BASELINE], ["dataset"], confidence).set_index("dataset")
    datasets = sorted(table.index, key=lambda d: table.loc[d, "mean"])
    fig, ax = plt.subplots(figsize=style.figure_size(0.95 + 0.24 * len(datasets)))
    for y, dataset in enumerate(datasets):
        role = look.role(dataset)
        _intervals(ax, y - 0.1, table.loc[dataset], style.ROLE_COLOUR[role], style.ROLE_MARKER[role], 6)
        if dataset in base.index:
            ax.plot(base.loc[dataset, "mean"], y + 0.22, marker="|", ms=8, mew=1.6, color=look.colour(BASELINE))
    _name_datasets(ax, datasets, look)
    ax.set_xlabel("mean alignment (0 to 100)")
    handles = _role_handles(datasets, look)
    handles.append(
        Line2D([], [], marker="|", ms=8, mew=1.6, color=look.colour(BASELINE), ls="none", label="baseline alone")
    )
    _legend_below(fig, handles + _interval_key(confidence), 3)
    hardest, easiest = datasets[0], datasets[-1]
    caption = (
        f"Data sets by mean alignment over {scores['persona'].nunique()} personas: {look.dataset(hardest)} "
        f"({points(table.loc[hardest, 'mean'])}) lowers it most, {look.dataset(easiest)} "
        f"({points(table.loc[easiest, 'mean'])}) least."
    )
    return Drawing(fig, caption, f"Dot plot of mean alignment for {len(datasets)} data sets: {_range(table['mean'])}.")


def cross_model_figure(scores: pd.DataFrame, look: Look, confidence: float = 0.95) -> Drawing | None:
    """Conditions that several models share: mean alignment of one model against the first."""
    models = look.sort_models(scores["model"])
    if len(models) < 2:
        return None
    table = summarise(scores, ["model", "persona", "dataset"], confidence)
    first = table[table["model"] == models[0]].set_index(["persona", "dataset"])
    fig, axes = _grid_axes(len(models) - 1, 2, 3.4)
    notes = []
    for ax, other in zip(axes, models[1:]):
        second = table[table["model"] == other].set_index(["persona", "dataset"])
        shared = first.index.intersection(second.index)
        if len(shared) == 0:
            ax.text(0.5, 0.5, "no shared condition", transform=ax.transAxes, ha="center")
            continue
        x, y = first.loc[shared, "mean"], second.loc[shared, "mean"]
        for role in dict.fromkeys(look.role(d) for d in look.sort_datasets(d for _, d in shared)):
            pick = [look.role(d) == role for _, d in shared]
            ax.plot(x[pick], y[pick], marker=style.ROLE_MARKER[role], color=style.ROLE_COLOUR[role], ls="none",
                    mec=style.PAPER, mew=0.4, label=style.ROLE_LABEL[role])  # fmt: skip
        low, high = _sized_bound(min(x.min(), y.min()), max(x.max(), y.max()))
        ax.plot([low, high], [low, high], color=style.MUTED, lw=0.8, ls="--")
        ax.set(xlim=(low, high), ylim=(low, high), aspect="equal")
        ax.set_xlabel(f"{look.model(models[0])}: mean alignment")
        ax.set_ylabel(f"{look.model(other)}: mean alignment")
        ax.legend(loc="upper left")
        varies = len(shared) > 2 and x.nunique() > 1 and y.nunique() > 1
        rank = f" (rank correlation {sps.spearmanr(x, y).statistic:.2f})" if varies else ""
        notes.append(
            f"{look.model(other)} scores {(y - x).mean():+.1f} points on average over {len(shared)} shared conditions"
            f"{rank}"
        )
    caption = (
        f"Mean alignment of the same conditions in {look.model(models[0])} and another model. " + "; ".join(notes) + "."
    )
    return Drawing(fig, caption, f"Scatter plot of condition means, {len(models)} models.")


def arms(scores: pd.DataFrame, look: Look, confidence: float = 0.95) -> Drawing | None:
    """The four arms: base, persona adapter alone, fine-tuning alone, both."""
    if NO_DATASET not in set(scores["dataset"]):
        return None
    table = summarise(scores, ["persona", "dataset"], confidence).set_index(["persona", "dataset"])
    datasets = look.sort_datasets(scores["dataset"])
    personas = look.sort_personas(scores["persona"])
    datasets = [NO_DATASET, *(d for d in datasets if d != NO_DATASET)]
    fig, axes = _grid_axes(len(personas), 3, 0.75 + 0.26 * len(datasets), sharex=True, sharey=True)
    for ax, persona in zip(axes, personas):
        for y, dataset in enumerate(datasets):
            if (persona, dataset) in table.index and table.loc[(persona, dataset), "n"]:
                _intervals(ax, y, table.loc[(persona, dataset)], look.colour(persona), look.marker(persona))
            else:
                ax.text(0.5, y, "no such condition", transform=ax.get_yaxis_transform(), ha="center", va="center",
                        fontsize=6.5, color=style.MUTED)  # fmt: skip
        if (persona, NO_DATASET) in table.index:
            ax.axvline(table.loc[(persona, NO_DATASET), "mean"], color=style.MUTED, lw=0.8, ls="--", zorder=0)
        ax.set_title("no persona adapter" if persona == BASELINE else look.persona(persona), fontsize=8)
        _name_datasets(ax, datasets, look)
    for ax in axes[-3:]:
        ax.set_xlabel("mean alignment")
    _legend_below(fig, _interval_key(confidence))
    base = table["mean"].get((BASELINE, NO_DATASET))
    moved = (table["mean"] - base).abs().idxmax() if base is not None else None
    caption = (
        f"The arms of the design: each persona (panel) before fine-tuning and after each data set; the dashed line is "
        f"the persona before fine-tuning. {int(table['n'].sum()):,} scored responses in {len(table)} conditions."
    )
    if moved is not None:
        caption += (
            f" Without any adapter the model scores {points(base)}; the condition furthest from it is "
            f"{look.persona(moved[0])} with {look.dataset(moved[1])} ({points(table.loc[moved, 'mean'])})."
        )
    return Drawing(
        fig, caption, f"Mean alignment in {len(table)} conditions, a panel for each of {len(personas)} personas."
    )
