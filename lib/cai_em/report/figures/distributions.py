"""Figures of distributions, gates, EM rates and specifications."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from cai_em.analysis.counts import moments, tally
from cai_em.analysis.outcome import CUTS, summarise
from cai_em.records.keys import BASELINE, NO_DATASET
from cai_em.records.numbers import points
from cai_em.report import style
from cai_em.report.figures.parts import (
    Drawing,
    _grid_axes,
    _legend_below,
    _name_datasets,
    _name_rows,
    _range,
    _rate,
    _two_lines,
)
from cai_em.report.style import Look

BINS = np.arange(0, 101, 5)


def _histogram(values: np.ndarray) -> np.ndarray:
    """Share of values per bin of five points; the last bin includes 100."""
    return np.histogram(values, bins=BINS)[0] / max(len(values), 1)


def violin(scores: pd.DataFrame, look: Look) -> Drawing:
    """Distribution of scores by persona: symmetric histograms, since smoothing would invent scores between the few
    values that a judge gives."""
    table = scores.dropna(subset="alignment")
    personas = look.sort_personas(table["persona"])
    fig, ax = plt.subplots(figsize=style.figure_size(2.9))
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
    fig, ax = plt.subplots(figsize=style.figure_size(3.0))
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
    fig, ax = plt.subplots(figsize=style.figure_size(0.7 + 0.36 * len(datasets)))
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


# --- Figures of other tables --------------------------------------------------------------------------------------


GATE_PANELS = {
    "personas": ("Which persona wrote this?\n(all personas of a data set)", "accuracy"),
    "persona": ("Persona or baseline?", "AUC"),
    "dataset": ("Fine-tuned or not?", "AUC"),
    "datasets": ("Which data set was it?\n(all data sets of a persona)", "accuracy"),
    "dataset_others": ("This data set or another?", "AUC"),
}
"""Classifier tests shown, by `scope` (see cai_em.analysis.classifiers.SCOPES): title and what is measured."""


def gates(tests: pd.DataFrame, look: Look, p_max: float = 0.05) -> Drawing | None:
    """Classifier two-sample tests, one panel per question asked, against chance.

    Args:
        tests: from `analysis.classify`: `scope, persona, dataset, estimate, low, high, chance, p`, and
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
        outcomes: from `analysis.outcomes`: `persona, dataset, seed, em_rate, em_low, em_high` (shares, 0 to 1).
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
        figsize=style.figure_size(1.7 + 0.135 * lines + 0.1 * len(choices)),
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
