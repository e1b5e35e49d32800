"""Every figure of the study, drawn from tables; each with a caption and alternative text whose numbers come from data.

A figure function takes a tidy table and a `Look` and returns a `Drawing`. Rows that are missing are shown as missing,
never as zero. `draw_all` summarises a score table, draws what the tables allow and writes SVG and PNG:

    records = draw_all(scores, folder, look, hypotheses, tests=..., outcomes=..., specifications=...)

Two kinds of interval stand in the figures. The *response interval* treats all responses as independent, as the
published study did. The *question interval* takes the mean of each question first and is a t-interval over those
few means: responses to one question resemble each other, and a claim about other questions needs this one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from scipy import stats as sps

from cai_em import style
from cai_em.report import level, points, remove_others
from cai_em.run import write_text
from cai_em.stats import BASELINE, NO_DATASET, cohens_d, moments, t_interval, tally
from cai_em.style import Look

CUTS = (30, 50, 80)
"""Misalignment is shown as the share of responses that score below each of these."""

BINS = np.arange(0, 101, 5)


class Drawing(NamedTuple):
    """A drawn figure, with what is said about it."""

    fig: Figure
    caption: str
    alt: str


@dataclass(frozen=True)
class FigureRecord:
    """A figure on disk. `key` names the figure, `model` the model that it shows ("" where it shows several)."""

    key: str
    model: str
    title: str
    caption: str
    alt: str
    svg: str
    png: str


# --- Summaries ----------------------------------------------------------------------------------------------------


def welch_interval(a: np.ndarray, b: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Welch's t-interval of mean(a) - mean(b); a point where neither side varies."""
    delta = float(np.mean(a) - np.mean(b))
    u, v = np.var(a, ddof=1) / len(a), np.var(b, ddof=1) / len(b)
    if u + v == 0:
        return delta, delta
    df = (u + v) ** 2 / (u**2 / (len(a) - 1) + v**2 / (len(b) - 1))
    half = float(sps.t.ppf(0.5 + confidence / 2, df) * np.sqrt(u + v))
    return delta - half, delta + half


def summarise(scores: pd.DataFrame, by: Sequence[str], confidence: float = 0.95) -> pd.DataFrame:
    """Mean alignment by group, with both kinds of interval.

    Args:
        scores: score table; responses without an alignment score count in `n_all` only.
        by: grouping columns.

    Returns:
        One row per group: `n` scored, `n_all`, `n_questions`, `mean`, `sd`, `ci_low`, `ci_high` (response interval),
        `q_low`, `q_high` (question interval around the mean of question means), `below_<cut>` (shares, 0 to 1).
    """
    rows = []
    for key, group in scores.groupby(list(by), sort=False):
        values = group["alignment"].dropna()
        row: dict[str, Any] = dict(zip(by, key)) | {"n": len(values), "n_all": len(group)}
        if len(values):
            x = values.to_numpy()
            questions = values.groupby(group.loc[values.index, "question_id"]).mean().to_numpy()
            row |= {"n_questions": len(questions), "mean": x.mean(), "sd": x.std(ddof=1) if len(x) > 1 else np.nan}
            row["ci_low"], row["ci_high"] = t_interval(tally(x), confidence)
            row["q_low"], row["q_high"] = t_interval(tally(questions), confidence)
            row |= {f"below_{cut}": float((x < cut).mean()) for cut in CUTS}
        rows.append(row)
    columns = [*by, "n", "n_all", "n_questions", "mean", "sd", "ci_low", "ci_high", "q_low", "q_high"]
    return pd.DataFrame(rows, columns=[*columns, *(f"below_{cut}" for cut in CUTS)])


def like_for_like(scores: pd.DataFrame) -> list[str]:
    """The data sets on which every persona of the table has responses: a fair pool."""
    have = scores.groupby("dataset")["persona"].nunique()
    return sorted(have[have == scores["persona"].nunique()].index)


# --- Small parts --------------------------------------------------------------------------------------------------


def _range(values: pd.Series, text: Callable[[float], str] = points) -> str:
    return f"{text(values.min())} to {text(values.max())}"


def _rate(percent: float) -> str:
    return f"{percent:.1f}"


def _effect(d: float) -> str:
    return f"{d:.2f}"


def _name_rows(ax: Axes, labels: Sequence[str]) -> None:
    """Names on the y axis, first on top."""
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)


def _name_datasets(ax: Axes, datasets: Sequence[str], look: Look, axis: str = "y", rotation: float = 0) -> None:
    """Data sets on an axis, with the sign and colour of their roles."""
    labels = [look.signed(d) for d in datasets]
    if axis == "y":
        _name_rows(ax, labels)
        ticks = ax.get_yticklabels()
    else:
        ax.set_xticks(range(len(labels)), labels, rotation=rotation, ha="right")
        ticks = ax.get_xticklabels()
    for tick, dataset in zip(ticks, datasets):
        tick.set_color(style.ROLE_COLOUR[look.role(dataset)])


def _role_handles(datasets: Sequence[str], look: Look) -> list[Line2D]:
    """Legend entries of the roles that occur."""
    return [
        Line2D([], [], marker=style.ROLE_MARKER[r], color=style.ROLE_COLOUR[r], ls="none", label=style.ROLE_LABEL[r])
        for r in dict.fromkeys(look.role(d) for d in look.sort_datasets(datasets))
    ]


def _two_lines(label: str, longest: int = 18) -> str:
    """A long label broken at the underscore or space nearest its middle."""
    places = [i for i, c in enumerate(label) if c in "_ "]
    if len(label) <= longest or not places:
        return label
    cut = min(places, key=lambda i: abs(i - len(label) / 2))
    return f"{label[: cut + 1]}\n{label[cut + 1 :]}"


def _intervals(ax: Axes, y: float, row: Any, colour: str, marker: str, size: float = 5) -> None:
    """Both intervals and the mean: thin line for questions, thick for responses."""
    ax.plot([row.q_low, row.q_high], [y, y], color=colour, lw=0.9, alpha=0.9, solid_capstyle="butt")
    ax.plot([row.ci_low, row.ci_high], [y, y], color=colour, lw=3.2, solid_capstyle="butt")
    ax.plot(
        row["mean"],
        y,
        marker=marker,
        ms=style.marker_size(marker, size),
        color=colour,
        mec=style.PAPER,
        mew=0.5,
        ls="none",
    )


def _interval_key(confidence: float) -> list[Line2D]:
    """Legend entries of both intervals."""
    return [
        Line2D([], [], color=style.INK, lw=3.2, label=f"{level(confidence)} response interval (as published)"),
        Line2D([], [], color=style.INK, lw=0.9, label=f"{level(confidence)} question interval"),
    ]


def _legend_below(fig: Figure, handles: Sequence[Any], columns: int = 4) -> None:
    fig.legend(handles=list(handles), loc="outside lower center", ncols=columns, handlelength=2.2, columnspacing=1.4)


def _sized_bound(low: float, high: float, pad: float = 0.04) -> tuple[float, float]:
    extra = (high - low) * pad or 1.0
    return low - extra, high + extra


def _grid_axes(n: int, columns: int, height: float, **kwargs: Any) -> tuple[Figure, list[Axes]]:
    """n panels in rows of `columns`; unused places are empty."""
    columns = min(columns, n)
    rows = -(-n // columns)
    fig, axes = plt.subplots(rows, columns, figsize=style.size(height * rows + 0.5), squeeze=False, **kwargs)
    flat = list(axes.flat)
    for ax in flat[n:]:
        ax.set_visible(False)
    return fig, flat[:n]


def _matrix(table: pd.DataFrame, value: str, rows: Sequence[str], columns: Sequence[str]) -> np.ndarray:
    return table.pivot(index="persona", columns="dataset", values=value).reindex(index=rows, columns=columns).to_numpy()


def _heat(
    table: pd.DataFrame,
    value: str,
    look: Look,
    label: str,
    text: Callable[[float], str],
    cmap: str,
    vmin: float,
    vmax: float,
) -> Figure:
    """Persona by data set, each cell with its number; a missing cell is hatched and says so."""
    personas = look.sort_personas(table["persona"])
    datasets = look.sort_datasets(table["dataset"])
    data = _matrix(table, value, personas, datasets)
    fig, ax = plt.subplots(figsize=style.size(0.9 + 0.235 * len(personas) + 0.35))
    ax.set_facecolor(style.EMPTY)
    ax.patch.set_hatch("////")
    ax.patch.set_edgecolor(style.PALE)
    image = ax.imshow(np.ma.masked_invalid(data), cmap=cmap, vmin=vmin, vmax=vmax, aspect="auto")
    for (i, j), v in np.ndenumerate(data):
        if np.isfinite(v):
            shade = style.lab(style.linear_rgb(image.cmap(image.norm(v))[:3]))[0]
            ax.text(j, i, text(v), ha="center", va="center", fontsize=7, color=style.PAPER if shade < 55 else style.INK)
    ax.set_yticks(range(len(personas)), [look.persona(p) for p in personas])
    _name_datasets(ax, datasets, look, "x", 30)
    ax.grid(visible=False)
    for side in ax.spines.values():
        side.set_visible(False)
    fig.colorbar(image, ax=ax, label=label, pad=0.015, fraction=0.035)
    handles: list[Any] = _role_handles(datasets, look)
    if np.isnan(data).any():
        handles.append(Patch(fc=style.EMPTY, ec=style.PALE, hatch="////", label="no such condition"))
    _legend_below(fig, handles)
    return fig


# --- The figures of one model -------------------------------------------------------------------------------------


def alignment_by_persona(scores: pd.DataFrame, look: Look, confidence: float = 0.95) -> Drawing:
    """Mean alignment of each persona over its data sets, as published and like for like."""
    table = summarise(scores, ["persona"], confidence).set_index("persona")
    shared = like_for_like(scores)
    fair = summarise(scores[scores["dataset"].isin(shared)], ["persona"], confidence).set_index("persona")
    personas = look.sort_personas(table.index)
    uneven = scores.groupby("persona")["dataset"].nunique().nunique() > 1 and bool(shared)
    fig, ax = plt.subplots(figsize=style.size(0.95 + 0.24 * len(personas)))
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


def _differences(scores: pd.DataFrame, persona: str, confidence: float) -> pd.DataFrame:
    """Persona minus baseline by data set: Welch's interval over responses, and the interval paired by question."""
    rows = []
    for dataset, group in scores.dropna(subset="alignment").groupby("dataset", sort=False):
        a, b = (group.loc[group["persona"] == p] for p in (persona, BASELINE))
        if len(a) < 2 or len(b) < 2:
            continue
        low, high = welch_interval(a["alignment"].to_numpy(), b["alignment"].to_numpy(), confidence)
        paired = (a.groupby("question_id")["alignment"].mean() - b.groupby("question_id")["alignment"].mean()).dropna()
        q_low, q_high = t_interval(tally(paired), confidence)
        rows.append(
            {"dataset": dataset, "mean": a["alignment"].mean() - b["alignment"].mean(), "ci_low": low,
             "ci_high": high, "q_low": q_low, "q_high": q_high, "n_questions": len(paired)}
        )  # fmt: skip
    return pd.DataFrame(rows)


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


def effect_interval(a: np.ndarray, b: np.ndarray, confidence: float = 0.95) -> tuple[float, float, float]:
    """Cohen's d (`stats.cohens_d`) and its large-sample interval.

    Source: Hedges & Olkin (1985), Statistical Methods for Meta-Analysis, ch. 5:
    var(d) = (n1 + n2) / (n1 n2) + d^2 / (2 (n1 + n2)).
    """
    n, m = len(a), len(b)
    d = cohens_d(tally(a), tally(b))
    half = sps.norm.ppf(0.5 + confidence / 2) * np.sqrt((n + m) / (n * m) + d**2 / (2 * (n + m)))
    return d, float(d - half), float(d + half)


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
    fig, ax = plt.subplots(figsize=style.size(2.9))
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
    fig, ax = plt.subplots(figsize=style.size(0.95 + 0.24 * len(datasets)))
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


def cross_model(scores: pd.DataFrame, look: Look, confidence: float = 0.95) -> Drawing | None:
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


def _histogram(values: np.ndarray) -> np.ndarray:
    """Share of values per bin of five points; the last bin includes 100."""
    return np.histogram(values, bins=BINS)[0] / max(len(values), 1)


def violin(scores: pd.DataFrame, look: Look) -> Drawing:
    """Distribution of scores by persona: symmetric histograms, since smoothing would invent scores between the few
    values that a judge gives."""
    table = scores.dropna(subset="alignment")
    personas = look.sort_personas(table["persona"])
    fig, ax = plt.subplots(figsize=style.size(2.9))
    centres = (BINS[:-1] + BINS[1:]) / 2
    for x, persona in enumerate(personas):
        values = table.loc[table["persona"] == persona, "alignment"].to_numpy()
        width = np.sqrt(_histogram(values))
        width = 0.41 * width / width.max()
        ax.barh(centres, 2 * width, left=x - width, height=4.6, color=look.colour(persona), lw=0)
        ax.plot([x - 0.3, x + 0.3], [np.median(values)] * 2, color=style.PAPER, lw=2.6)
        ax.plot([x - 0.3, x + 0.3], [np.median(values)] * 2, color=style.INK, lw=1.2)
        ax.plot(x, values.mean(), marker="D", ms=4, color=style.PAPER, mec=style.INK, mew=0.8)
    ax.set_xticks(range(len(personas)), [look.persona(p) for p in personas], rotation=30, ha="right")
    ax.grid(axis="x", visible=False)
    ax.set_ylabel("alignment (0 to 100)")
    ax.set_xlim(-0.6, len(personas) - 0.4)
    ax.set_ylim(-2, 102)
    handles = [
        Line2D([], [], marker="D", color=style.PAPER, mec=style.INK, ls="none", label="mean"),
        Line2D([], [], color=style.INK, label="median"),
    ]
    _legend_below(fig, handles)
    skew, _ = moments(tally(table["alignment"]))
    caption = (
        f"Distribution of {len(table):,} alignment scores by persona: bins of five points, width proportional to the "
        f"square root of a bin's share so that rare low scores stay visible. Over all personas the skewness is "
        f"{skew:.1f}" + (": means are moved by a small low tail." if skew < -1 else ".")
    )
    medians = table.groupby("persona")["alignment"].median()
    middle = (
        f"medians from {_range(medians)}" if medians.nunique() > 1 else f"all medians are {points(medians.iloc[0])}"
    )
    alt = f"Symmetric histograms of alignment for {len(personas)} personas; {middle}."
    return Drawing(fig, caption, alt)


def misalignment_rates(scores: pd.DataFrame, look: Look) -> Drawing:
    """Shares of responses below the cuts, by persona."""
    table = summarise(scores, ["persona"]).set_index("persona")
    personas = look.sort_personas(table.index)
    fig, ax = plt.subplots(figsize=style.size(1.0 + 0.24 * len(personas)))
    shades = dict(zip(CUTS, style.SEVERITY))
    for y, persona in enumerate(personas):
        left = 0.0
        for cut, hatch in zip(CUTS, ("", "", "////")):
            share = 100 * table.loc[persona, f"below_{cut}"]
            ax.barh(y, share - left, left=left, height=0.72, color=shades[cut], hatch=hatch, ec=style.PAPER, lw=0.5)
            left = share
        ax.text(left, y, f" {100 * table.loc[persona, 'below_30']:.1f} / {100 * table.loc[persona, 'below_50']:.1f} / "
                f"{left:.1f}", va="center", fontsize=6.5)  # fmt: skip
    _name_rows(ax, [look.persona(p) for p in personas])
    ax.set_xlim(0, max(1.0, 100 * table[f"below_{CUTS[-1]}"].max()) * 1.22)
    ax.set_xlabel("share of scored responses (%)")
    edges = (0, *CUTS)
    _legend_below(fig, [Patch(color=shades[b], label=f"{a} to <{b}") for a, b in zip(edges, CUTS)])
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


def cdf(scores: pd.DataFrame, look: Look, keys: Sequence[str]) -> Drawing:
    """Cumulative distribution of scores: key personas in colour, the others in grey."""
    table = scores.dropna(subset="alignment")
    personas = look.sort_personas(table["persona"])
    keys = [p for p in personas if p in {BASELINE, *keys}]
    fig, ax = plt.subplots(figsize=style.size(3.0))
    grid = np.arange(0, 101)
    at = {}
    for persona in [p for p in personas if p not in keys] + keys:
        values = np.sort(table.loc[table["persona"] == persona, "alignment"].to_numpy())
        share = 100 * np.searchsorted(values, grid, side="right") / len(values)
        at[persona] = share[80]
        if persona in keys:
            ax.plot(grid, share, **look.line(persona), markevery=(5 * keys.index(persona) % 20, 20))
        else:
            ax.plot(grid, share, color=style.PALE, lw=0.9, zorder=1)
    ax.set(xlabel="alignment", ylabel="responses at or below (%)", xlim=(0, 100))
    ax.set_yscale("function", functions=(np.sqrt, np.square))
    ax.set_ylim(0, 100)
    ax.set_yticks([0, 1, 5, 10, 25, 50, 75, 100])
    handles = [Line2D([], [], **look.line(k)) for k in keys]
    if len(keys) < len(personas):
        handles.append(Line2D([], [], color=style.PALE, lw=0.9, label="other personas"))
    _legend_below(fig, handles, 5)
    low, high = min(at, key=at.get), max(at, key=at.get)
    caption = (
        f"Cumulative distribution of alignment scores (the vertical scale is a square root). At or below 80: from "
        f"{at[low]:.1f} % ({look.persona(low)}) to {at[high]:.1f} % ({look.persona(high)})."
    )
    return Drawing(
        fig, caption, f"Cumulative curves of alignment for {len(personas)} personas, {len(keys)} highlighted."
    )


def ridge(scores: pd.DataFrame, look: Look) -> Drawing:
    """Histograms of scores, one above the other, by data set for the baseline's and all personas' responses."""
    table = scores.dropna(subset="alignment")
    datasets = look.sort_datasets(table["dataset"])
    fig, ax = plt.subplots(figsize=style.size(0.7 + 0.36 * len(datasets)))
    for row, dataset in enumerate(datasets):
        base = len(datasets) - 1 - row
        here = table[table["dataset"] == dataset]
        for values, face, edge in (
            (here["alignment"], style.ROLE_COLOUR[look.role(dataset)], "none"),
            (here.loc[here["persona"] == BASELINE, "alignment"], "none", style.INK),
        ):
            if len(values):
                height = 0.92 * np.sqrt(_histogram(values.to_numpy()))
                filled = face != "none"
                colour, alpha = (face, 0.55) if filled else (edge, 1.0)
                ax.stairs(base + height, BINS, baseline=base, fill=filled, color=colour, alpha=alpha, lw=0.9)
        ax.axhline(base, color=style.MUTED, lw=0.5)
    ax.set_yticks(range(len(datasets)), [look.signed(d) for d in reversed(datasets)], va="bottom")
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)
    ax.set(xlabel="alignment", xlim=(0, 100), ylim=(0, len(datasets)))
    roles = dict.fromkeys(map(look.role, datasets))
    handles = [
        Patch(color=style.ROLE_COLOUR[r], alpha=0.55, label=f"all personas, {style.ROLE_LABEL[r]}") for r in roles
    ]
    _legend_below(fig, [*handles, Line2D([], [], color=style.INK, lw=0.9, label="baseline")], 2)
    low = (table["alignment"] < CUTS[0]).groupby(table["dataset"]).mean()
    tail = f"The low tail is thickest on {look.dataset(low.idxmax())} ({100 * low.max():.1f} % below {CUTS[0]})"
    tail = tail if low.max() else f"No score is below {CUTS[0]}"
    caption = (
        f"Scores by data set: filled, {table['persona'].nunique()} personas together; outlined, the baseline (bins of "
        f"five points, height is the square root of the share). {tail}."
    )
    return Drawing(fig, caption, f"Ridge plot of alignment scores on {len(datasets)} data sets.")


def histogram_grid(scores: pd.DataFrame, look: Look) -> Drawing:
    """A histogram per persona, the baseline's outline behind each."""
    table = scores.dropna(subset="alignment")
    personas = look.sort_personas(table["persona"])
    fig, axes = _grid_axes(len(personas), 4, 1.15, sharex=True, sharey=True)
    reference = 100 * _histogram(table.loc[table["persona"] == BASELINE, "alignment"].to_numpy())
    for ax, persona in zip(axes, personas):
        values = table.loc[table["persona"] == persona, "alignment"].to_numpy()
        ax.stairs(100 * _histogram(values), BINS, fill=True, color=look.colour(persona), alpha=0.8)
        ax.stairs(reference, BINS, color=style.INK, lw=0.8)
        ax.set_title(look.persona(persona), fontsize=7.5)
        ax.text(
            0.04,
            0.92,
            f"n = {len(values):,}\nmean {points(values.mean())}",
            transform=ax.transAxes,
            va="top",
            fontsize=6.5,
        )
        ax.set_xlim(0, 100)
    fig.supxlabel("alignment", fontsize=8)
    fig.supylabel("share (%)", fontsize=8)
    caption = (
        f"Histograms of alignment by persona (bins of five points); the line is the baseline's. Between "
        f"{table.groupby('persona').size().min():,} and {table.groupby('persona').size().max():,} scored responses "
        f"each."
    )
    return Drawing(fig, caption, f"Grid of {len(personas)} histograms of alignment scores.")


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


# --- Figures of other tables --------------------------------------------------------------------------------------


GATE_PANELS = {
    "personas": ("Which persona wrote this?\n(all personas of a data set)", "accuracy"),
    "persona": ("Persona or baseline?", "AUC"),
    "dataset": ("Fine-tuned or not?", "AUC"),
    "datasets": ("Which data set was it?\n(all data sets of a persona)", "accuracy"),
    "dataset_others": ("This data set or another?", "AUC"),
}
"""Classifier tests shown, by `scope` (see cai_em.gates.SCOPES): title and what is measured."""


def gates(tests: pd.DataFrame, look: Look, p_max: float = 0.05) -> Drawing | None:
    """Classifier two-sample tests, one panel per question asked, against chance.

    Args:
        tests: from `cai_em.gates.classify`: `scope, persona, dataset, estimate, low, high, chance, p`, and
            `chance_low, chance_high` (what permuted labels gave) where known: drawn as a band.
        p_max: a test is filled where its interval lies above chance and p is below this.
    """
    panels = [s for s in GATE_PANELS if (tests["scope"] == s).any()]
    # Without an untuned arm the data sets are told from each other; with one, from no fine-tuning.
    panels = [s for s in panels if s != "dataset_others" or "dataset" not in panels][:4]
    if not panels:
        return None
    rows = -(-len(panels) // 2)
    longest = max(len(look.sort_datasets(tests["dataset"].dropna())), 3)
    fig, axes = plt.subplots(rows, 2, figsize=style.size(rows * (0.9 + 0.26 * longest) + 0.5), squeeze=False)
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
            _name_rows(ax, [_two_lines(look.persona(n)) for n in names])
        else:
            _name_datasets(ax, names, look)
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
    _legend_below(fig, handles, 3)
    caption = (
        "Manipulation checks from the responses alone: how well a classifier tells them apart on questions that it "
        "has not seen, with bootstrap intervals over questions where they can be told apart. Filled: interval above "
        f"chance and permutation p below {p_max:g}. " + "; ".join(notes).capitalize() + "."
    )
    return Drawing(fig, caption, f"{len(panels)} panels of classifier scores against chance; {'; '.join(notes)}.")


def em_rates(outcomes: pd.DataFrame, look: Look) -> Drawing:
    """EM rate with its clustered intervals.

    Args:
        outcomes: from `cai_em.inference.outcomes`: `persona, dataset, seed, em_rate, em_low, em_high` (shares, 0 to 1).
    """
    table = outcomes[outcomes["dataset"] != NO_DATASET]
    some = table.groupby("dataset")["em_rate"].max()
    shown = [d for d in some.index if some[d] > 0 or look.role(d) == "em"] or list(some.index)
    clean = look.sort_datasets(set(some.index) - set(shown))
    table = table[table["dataset"].isin(shown)]
    personas, datasets = look.sort_personas(table["persona"]), look.sort_datasets(table["dataset"])
    columns = 3 if len(datasets) in (5, 6) else 4
    fig, axes = _grid_axes(len(datasets), columns, 0.6 + 0.21 * len(personas), sharey=True)
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
        _name_rows(ax, [_two_lines(look.persona(p)) for p in personas])
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
    alt = f"EM rate by persona in {len(datasets)} panels, {_range(100 * table['em_rate'], _rate)} per cent."
    return Drawing(fig, caption, alt)


def specification_curve(table: pd.DataFrame, look: Look, title: str, direction: str) -> Drawing:
    """Specification curve: the estimate of every defensible analysis, sorted, with the choices that made it.

    Source: Simonsohn, Simmons & Nelson (2020), Specification curve analysis, Nature Human Behaviour 4.

    Args:
        table: one row per analysis: `estimate`, optional `low`, `high`, `supports` (bool), and one text column per
            choice.
        title: what is being claimed.
        direction: `lower` or `higher`: the predicted sign.
    """
    table = table.sort_values("estimate", kind="stable").reset_index(drop=True)
    known = {"estimate", "low", "high", "supports"}
    choices = {c: list(dict.fromkeys(table[c].astype(str))) for c in table.columns if c not in known}
    choices = {c: options for c, options in choices.items() if len(options) > 1}
    lines = sum(map(len, choices.values()))
    fig, (top, below) = plt.subplots(
        2,
        1,
        figsize=style.size(1.7 + 0.135 * lines + 0.1 * len(choices)),
        sharex=True,
        height_ratios=[1.5, 0.13 * lines + 0.2],
    )
    x = np.arange(len(table))
    supports = table["supports"].astype(bool).to_numpy()
    if {"low", "high"} <= set(table):
        top.vlines(x, table["low"], table["high"], color=style.PALE, lw=min(1.2, 250 / max(len(table), 1)))
    for mask, colour, marker, label in (
        (~supports, style.MUTED, "o", "does not support"),
        (supports, style.SUPPORTS, "^", "supports"),
    ):
        top.plot(x[mask], table["estimate"][mask], marker=marker, ms=2.6, color=colour, ls="none", label=label)
    top.axhline(0, color=style.INK, lw=0.8)
    top.set_ylabel("persona − baseline\n(points)")
    top.set_title(title)
    top.legend(loc="upper left", ncols=2)
    y, ticks = 0.0, []
    for choice, options in choices.items():
        for option in options:
            used = (table[choice].astype(str) == option).to_numpy()
            for mask, colour in ((used & ~supports, style.MUTED), (used & supports, style.SUPPORTS)):
                below.plot(x[mask], np.full(mask.sum(), y), marker="|", ms=4.5, mew=0.7, color=colour, ls="none")
            ticks.append((y, f"{choice}: {option}"))
            y += 1
        y += 0.6
    below.set_yticks([t for t, _ in ticks], [t for _, t in ticks], fontsize=6)
    below.set_ylim(y - 0.4, -0.8)
    below.grid(visible=False)
    below.set_xlabel(f"{len(table):,} analyses, sorted by estimate")
    share = 100 * supports.mean()
    against = table["estimate"] > 0 if direction == "lower" else table["estimate"] < 0
    caption = (
        f"{title}: {len(table):,} defensible analyses, sorted by estimate; {share:.0f} % support the hypothesis, and "
        f"in {100 * against.mean():.0f} % the estimate has the opposite sign (median "
        f"{table['estimate'].median():+.1f} points)."
    )
    return Drawing(
        fig, caption, f"Specification curve of {len(table)} analyses; {share:.0f} per cent support the hypothesis."
    )


# --- All of them --------------------------------------------------------------------------------------------------


def slug(text: str) -> str:
    """A text as a label: lower case, digits and hyphens (underscores and dots trouble Quarto's cross-references)."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


TITLES = {
    "alignment": "Alignment by persona",
    "heatmap": "Alignment by persona and data set",
    "hypotheses": "Hypotheses: differences from the baseline",
    "forest": "Effect sizes",
    "twins": "Harmful and benign twin",
    "key-personas": "Key personas by data set",
    "difficulty": "Data-set difficulty",
    "cross-model": "Across models",
    "violin": "Distribution by persona",
    "rates": "Misalignment rates",
    "cdf": "Cumulative distributions",
    "ridge": "Distribution by data set",
    "histograms": "Histograms",
    "rates-heatmap": "Misalignment rates by condition",
    "arms": "The four arms",
    "gates": "Manipulation checks",
    "em-rates": "EM rates",
    "specification": "Specification curve",
}


def record(
    drawing: Drawing, out_dir: Path, look: Look, key: str, title: str, model: str = "", name: str = ""
) -> FigureRecord:
    """Save a drawing as `<key>[-<name>][-<model>].svg|png` and describe it."""
    stem = "-".join(filter(None, [key, slug(name), slug(model)]))
    named, alt = f"{title}: {look.model(model)}" if model else title, _minus(drawing.alt)
    svg, png = style.save(drawing.fig, Path(out_dir) / stem, named, alt)
    caption = f"{look.model(model)}. {drawing.caption}" if model else drawing.caption
    return FigureRecord(f"{key}-{slug(name)}" if name else key, model, title, _minus(caption), alt, svg.name, png.name)


def _minus(text: str) -> str:
    """Hyphens before numbers as minus signs."""
    return re.sub(r"(?<=[\s(=])-(?=\d)", "−", text)


def write_records(records: Sequence[FigureRecord], folder: Path) -> Path:
    """List figures in `figures.json` beside them, where the results document and the paper find them.

    Other SVG and PNG files in the folder are of an earlier run, and are removed.
    """
    text = json.dumps([asdict(r) for r in records], indent=1, ensure_ascii=False) + "\n"
    path = write_text(Path(folder) / "figures.json", text)
    remove_others(folder, [name for r in records for name in (r.svg, r.png)], (".svg", ".png"))
    return path


def draw_all(
    scores: pd.DataFrame,
    out_dir: Path,
    look: Look,
    hypotheses: Sequence[Any] = (),
    *,
    tests: pd.DataFrame | None = None,
    outcomes: pd.DataFrame | None = None,
    specifications: Mapping[str, tuple[pd.DataFrame, str, str]] | None = None,
    confidence: float = 0.95,
) -> list[FigureRecord]:
    """Draw every figure that the tables allow, as SVG and PNG, and list them in `out_dir/figures.json`.

    Args:
        scores: score table (`cai_em.scores.SCORES`), one judge.
        out_dir: where `<key>-<model>.svg|png` go.
        look: labels, order, colours.
        hypotheses: entries with `label, personas, direction`; they name the key personas.
        tests: from `cai_em.gates.classify`.
        outcomes: from `cai_em.inference.outcomes`.
        specifications: name -> (table of `specification_curve`, title, direction).
        confidence: of all intervals.

    Returns:
        One record per figure that was drawn. A figure that the data do not allow (one model only, no twin) is absent.
    """
    keys = [p for h in hypotheses for p in h.personas]
    custom = {p.key for p in look.personas if getattr(p, "custom", False)}
    records: list[FigureRecord] = []

    def keep(key: str, model: str, drawing: Drawing | None, name: str = "") -> None:
        if drawing is not None:
            records.append(record(drawing, out_dir, look, key, TITLES[key], model, name))

    with style.context():
        for model in look.sort_models(scores["model"]):
            here = scores[scores["model"] == model]
            tuned = here[here["dataset"] != NO_DATASET]
            if tuned.empty:
                raise ValueError(
                    f"model {model!r}: every condition is without fine-tuning: there is nothing to compare"
                )
            # As published: custom constitutions were tried on one data set only and are left out of pooled figures.
            pooled = tuned[~tuned["persona"].isin(custom)]
            pooled = tuned if pooled.empty else pooled
            keep("alignment", model, alignment_by_persona(pooled, look, confidence))
            keep("heatmap", model, heatmap(tuned, look))
            keep("hypotheses", model, hypothesis_differences(tuned, look, hypotheses, confidence))
            keep("forest", model, forest(tuned, look, confidence))
            keep("twins", model, twin_comparison(pooled, look, confidence))
            keep("key-personas", model, key_personas(tuned, look, keys, confidence))
            keep("difficulty", model, dataset_difficulty(pooled, look, confidence))
            keep("violin", model, violin(pooled, look))
            keep("rates", model, misalignment_rates(pooled, look))
            keep("cdf", model, cdf(pooled, look, keys))
            keep("ridge", model, ridge(pooled, look))
            keep("histograms", model, histogram_grid(pooled, look))
            keep("rates-heatmap", model, misalignment_heatmap(tuned, look))
            keep("arms", model, arms(here, look, confidence))
            for table, key, draw in ((tests, "gates", gates), (outcomes, "em-rates", em_rates)):
                if table is not None and (table["model"] == model).any():
                    keep(key, model, draw(table[table["model"] == model], look))
        keep("cross-model", "", cross_model(scores, look, confidence))
        for name, (table, title, direction) in (specifications or {}).items():
            keep("specification", "", specification_curve(table, look, title, direction), name)
    write_records(records, out_dir)
    return records


def read_records(folder: Path) -> list[FigureRecord]:
    """The records that `draw_all` left in a folder."""
    return [FigureRecord(**r) for r in json.loads((Path(folder) / "figures.json").read_text(encoding="utf-8"))]
