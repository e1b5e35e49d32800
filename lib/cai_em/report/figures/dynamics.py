"""Figures of H3 and H4."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from cai_em.dynamics.curves import OUTCOMES, Curve
from cai_em.dynamics.directions import RANDOM, direction_label, persona_of
from cai_em.records.numbers import plain_number
from cai_em.report import style
from cai_em.report.figures.parts import Drawing
from cai_em.report.style import Look, line_look

# --- Figures -------------------------------------------------------------------------------------------------------


def _diverging(data: np.ndarray) -> float:
    """The limit of a scale around 0, in points: 1 at the least, or what is next to nothing would look like much."""
    return float(np.nanmax(np.abs(np.append(data, 1.0))))


def _matrix(
    ax: Axes, data: np.ndarray, rows: Sequence[str], columns: Sequence[str], text: Callable[[float], str]
) -> None:
    """A small matrix around 0, each cell with its number; a missing cell says so."""
    limit = _diverging(data)
    image = ax.imshow(np.ma.masked_invalid(data), cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
    for (i, j), v in np.ndenumerate(data):
        shade = style.lab(style.linear_rgb(image.cmap(image.norm(v))[:3]))[0] if np.isfinite(v) else 100
        ax.text(j, i, text(v) if np.isfinite(v) else "none", ha="center", va="center", fontsize=7,
                color="white" if shade < 55 else "black")  # fmt: skip
    ax.set_yticks(range(len(rows)), rows)
    ax.set_xticks(range(len(columns)), columns)
    ax.grid(visible=False)


def draw_transfer(found: pd.DataFrame, look: Look) -> Drawing:
    """Transfer matrices: whose direction (rows) does what to whom (columns), in alignment and in coherence.

    Args:
        found: `effects` of one layer and strength: kinds `add` and `ablate`.
        look: labels.
    """
    kinds = [k for k in ("add", "ablate") if (found["kind"] == k).any()]
    outcomes = ("alignment", "coherence")
    targets = look.sort_personas(found["target"])
    order = {p: i for i, p in enumerate(look.sort_personas(persona_of(s) for s in found["source"]))}
    sources = sorted(set(found["source"]), key=lambda s: (s == RANDOM, order[persona_of(s)], s))
    height = 0.9 + len(kinds) * (0.5 + 0.28 * len(sources))
    fig, axes = plt.subplots(len(kinds), len(outcomes), figsize=style.figure_size(height), squeeze=False)
    for row, kind in zip(axes, kinds):
        for ax, outcome in zip(row, outcomes):
            here = found[(found["kind"] == kind) & (found["outcome"] == outcome)]
            data = here.pivot_table(index="source", columns="target", values="delta").reindex(sources, columns=targets)
            names = [direction_label(s, look) for s in sources], [look.persona(t) for t in targets]
            _matrix(ax, data.to_numpy(), *names, lambda v: f"{round(v, 1) + 0.0:+.1f}")
            done = "added to untuned" if kind == "add" else "ablated from tuned"
            ax.set_title(f"{outcome}, {done}")
    main = found[found["outcome"] == "alignment"]
    own, whose = main["source"] == main["target"], main["source"].map(persona_of)
    parts = {
        "own": main[own],
        "own of another run": main[~own & (whose == main["target"])],
        "another's": main[(whose != main["target"]) & (main["source"] != RANDOM)],
    }
    said = ", ".join(f"{what} {part['delta'].mean():+.1f}" for what, part in parts.items() if len(part))
    caption = (
        "What a persona's direction (rows) changes in another persona (columns), in points against the same model "
        f"without intervention, all directions of one length; paired by {int(found['n_questions'].max())} questions. "
        f"Mean change of alignment: {said}."
    )
    return Drawing(
        fig, caption, f"Matrices of {len(sources)} directions by {len(targets)} personas. Alignment: {said}."
    )


def draw_sweep(found: pd.DataFrame, layers: int) -> Drawing:
    """Outcomes by strength, a line per layer; coherence beside them is what steering costs.

    Args:
        found: `effects` of one target's own direction added at several layers and strengths.
        layers: how many layers the model has.
    """
    fig, axes = plt.subplots(1, len(OUTCOMES), figsize=style.figure_size(2.6), squeeze=False)
    shown = sorted(found["layer"].unique())
    for ax, outcome in zip(axes[0], OUTCOMES):
        here = found[found["outcome"] == outcome]
        for i, layer in enumerate(shown):
            part = here[here["layer"] == layer].sort_values("strength")
            error = np.abs(np.stack([part["delta"] - part["low"], part["high"] - part["delta"]]))
            name = f"layer {layer} of {layers}"
            ax.errorbar(part["strength"], part["delta"], yerr=error, lw=1.2, elinewidth=0.8, label=name, **line_look(i))
        ax.axhline(0, color=style.MUTED, lw=0.7)
        ax.set_title(OUTCOMES[outcome])
        ax.set_xlabel("strength")
    axes[0][0].set_ylabel("change")
    fig.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    main = found[found["outcome"] == "alignment"]
    strongest = main.loc[main["delta"].abs().idxmax()]
    cost = found[(found["outcome"] == "coherence") & (found["dataset"] == strongest["dataset"])]["delta"].iloc[0]
    said = (
        f"the largest change of alignment, {strongest['delta']:+.1f}, is at layer {strongest['layer']}, strength "
        f"{strongest['strength']:+g}, where coherence changes by {cost:+.1f}"
    )
    caption = (
        "The direction of the model itself, at several layers and strengths: above 0 added to the untuned model, below "
        f"0 subtracted from the tuned one. Intervals over questions. {said[0].upper()}{said[1:]}."
    )
    return Drawing(fig, caption, f"Line plots of three outcomes against strength for {len(shown)} layers; {said}.")


def draw_cosines(found: pd.DataFrame, look: Look) -> Drawing:
    """Cosines between sources' directions by layer, with both nulls: `cosine_table` of many layers, concatenated."""
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


# --- Figures -------------------------------------------------------------------------------------------------------


def _band(ax: Axes, table: pd.DataFrame, look: dict[str, Any]) -> None:
    """A curve with its interval."""
    ax.plot(table["step"], table["mean"], **look)
    ax.fill_between(table["step"], table["low"], table["high"], color=look["color"], alpha=0.15, lw=0)


def _step_axis(ax: Axes, steps: Sequence[int], apart: float = 0.13) -> None:
    """Steps on a scale that is linear up to the first checkpoint and logarithmic from there: dense early.

    Every checkpoint has a tick; from the last on, those are named that lie `apart` (share of the axis) from the next.
    """
    ax.set_xscale("symlog", linthresh=max(1, min(s for s in steps if s > 0)))
    places = ax.xaxis.get_transform().transform(np.asarray(steps, float))
    places, named = places / places.max(), []
    for place, step in sorted(zip(places, steps), reverse=True):
        if not named or named[-1][0] - place >= apart:
            named.append((place, step))
    ax.set_xticks(list(steps), [str(s) if (p, s) in named else "" for p, s in zip(places, steps)])
    ax.minorticks_off()
    ax.set_xlabel("training step")


def _names(titles: Mapping[str, str]) -> dict[str, str]:
    """What outcomes and losses are called."""
    return OUTCOMES | {key: f"loss, {title}" for key, title in titles.items()}


def _of(found: pd.DataFrame, persona: str, outcome: str, method: str) -> pd.DataFrame:
    return found[(found["persona"] == persona) & (found["outcome"] == outcome) & (found["method"] == method)]


def draw_outcomes(
    curves: Mapping[tuple[str, str], Curve], found: pd.DataFrame, look: Look, confidence: float = 0.95
) -> Drawing:
    """EM rate, mean alignment and coherence along training, with the transition points that are shown.

    Args:
        curves: (persona, outcome) -> curve.
        found: `transitions` of them.
        look: labels and colours.
        confidence: of the bands.
    """
    outcomes = [o for o in OUTCOMES if any(o == k for _, k in curves)]
    personas = look.sort_personas(p for p, _ in curves)
    fig, axes = plt.subplots(1, len(outcomes), figsize=style.figure_size(2.6), squeeze=False)
    for ax, outcome in zip(axes[0], outcomes):
        for persona in personas:
            c = curves.get((persona, outcome))
            if c is None or c.empty:
                continue
            _band(ax, c.table(confidence), look.line(persona))
            for r in _of(found, persona, outcome, "logistic").query("shown").itertuples():
                ax.axvline(r.step, color=look.colour(persona), ls=look.linestyle(persona), lw=0.9, zorder=0)
                ax.axvspan(r.low, min(r.high, c.steps[-1]), color=look.colour(persona), alpha=0.08, lw=0, zorder=0)
        if not ax.lines:
            ax.text(0.5, 0.5, "no scores throughout", transform=ax.transAxes, ha="center", color=style.MUTED)
        _step_axis(ax, next(iter(curves.values())).steps)
        ax.set_title(OUTCOMES[outcome])
    fig.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    here = found[(found["method"] == "logistic") & found["outcome"].isin(outcomes)]
    some = next(iter(curves.values()))
    caption = (
        f"Outcomes along training, with {confidence:.0%} intervals over {some.y.shape[0]} questions and "
        f"{some.y.shape[1]} training seed(s). Vertical: transition points with their intervals, where a change is "
        f"shown ({int(here['shown'].sum())} of {len(here)})."
    )
    ends = "; ".join(
        f"{look.persona(p)} {OUTCOMES[o]} from {c.y[:, :, 0].mean():.2f} to {c.y[:, :, -1].mean():.2f}"
        for (p, o), c in curves.items()
        if not c.empty
    )
    return Drawing(fig, caption, f"Line plots of {len(outcomes)} outcomes against the training step: {ends}.")


def draw_losses(curves: Mapping[tuple[str, str], Curve], look: Look, titles: Mapping[str, str]) -> Drawing:
    """Held-out losses along training: (persona, set) -> curve."""
    sets = list(dict.fromkeys(s for _, s in curves))
    fig, axes = plt.subplots(1, len(sets), figsize=style.figure_size(2.5), squeeze=False)
    for ax, name in zip(axes[0], sets):
        for persona in look.sort_personas(p for p, s in curves if s == name):
            _band(ax, curves[persona, name].table(), look.line(persona))
        _step_axis(ax, curves[next(k for k in curves if k[1] == name)].steps)
        ax.set_title(titles.get(name, name))
    axes[0][0].set_ylabel("loss (nats a token)")
    fig.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    n = next(iter(curves.values())).y.shape[0]
    falls = "; ".join(
        f"{look.persona(p)}, {titles.get(s, s)}: {c.y[:, :, 0].mean():.2f} to {c.y[:, :, -1].mean():.2f}"
        for (p, s), c in curves.items()
    )
    caption = f"Loss on rows that were not trained on, in the domain and outside it; intervals over {n} rows and seeds."
    return Drawing(fig, caption, f"Line plots of held-out loss against the training step. {falls}.")


def draw_geometry(table: pd.DataFrame, look: Look) -> Drawing:
    """Norm of the update and its rotation, by run: `persona, preset, seed` and the columns of `geometry`."""
    table = table.reset_index(drop=True)
    presets = list(dict.fromkeys(table["preset"]))
    fig, axes = plt.subplots(2, len(presets), figsize=style.figure_size(3.8), squeeze=False, sharex="col", sharey="row")
    for column, preset in enumerate(presets):
        here = table[table["preset"] == preset]
        for (persona, seed), run in here.groupby(["persona", "seed"], sort=False):
            line = look.line(persona) | ({"label": None} if seed != here["seed"].iloc[0] else {})
            axes[0][column].plot(run["step"], run["norm"] / run["norm"].max(), **line)
            axes[1][column].plot(run["step"], run["rotation"], **line)
        axes[0][column].set_title(preset)
        for ax in axes[:, column]:
            _step_axis(ax, sorted(here["step"].unique()))
        axes[1][column].axhline(0, color=style.MUTED, lw=0.7)
        axes[0][column].set_xlabel("")
    axes[0][0].set_ylabel("norm (share of largest)")
    axes[1][0].set_ylabel("cosine of successive\ndifferences")
    fig.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    turn = table.loc[table["rotation"].idxmin()] if table["rotation"].notna().any() else None
    caption = "Size of the adapter's update and its rotation along training (1: straight on), one line per run." + (
        f" The sharpest turn, {turn['rotation']:.2f}, is at step {turn['step']} ({turn['preset']}, "
        f"{look.persona(turn['persona'])})."
        if turn is not None
        else ""
    )
    runs = table.groupby(["preset", "persona", "seed"]).ngroups
    alt = f"Line plots of adapter norm and update rotation for {runs} runs."
    return Drawing(fig, caption, alt)


def draw_transitions(found: pd.DataFrame, look: Look, titles: Mapping[str, str]) -> Drawing:
    """Transition points of every persona and outcome, by both methods; those not shown are named and left empty.

    Args:
        found: `transitions`.
        look: labels and colours.
        titles: set of rows -> what its loss is called.
    """
    names = _names(titles)
    rows = found[["persona", "outcome"]].drop_duplicates().to_records(index=False)
    fig, ax = plt.subplots(figsize=style.figure_size(0.9 + 0.27 * len(rows)))
    last = int(found["last"].max())
    for y, (persona, outcome) in enumerate(rows):
        for shift, method in ((-0.13, "logistic"), (0.13, "change point")):
            row = _of(found, persona, outcome, method).iloc[0]
            if not row["shown"]:
                if method == "logistic":
                    ax.text(last, y, "no change shown", ha="right", va="center", color=style.MUTED, fontsize=7)
                continue
            face = look.colour(persona) if method == "logistic" else style.PAPER
            ax.plot([row["low"], min(row["high"], last)], [y + shift] * 2, color=look.colour(persona), lw=1.2)
            at = min(row["step"], last), y + shift
            ax.plot(*at, marker=look.marker(persona), color=look.colour(persona), mfc=face)
    ax.set_yticks(range(len(rows)), [f"{look.persona(p)}: {names.get(o, o)}" for p, o in rows])
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xlim(0, last * 1.03)
    ax.set_xlabel("training step")
    handles = [
        Line2D([], [], marker="o", color=style.INK, label="midpoint of a logistic"),
        Line2D([], [], marker="o", color=style.INK, mfc=style.PAPER, label="change point"),
    ]
    fig.legend(handles=handles, loc="outside lower center", ncols=2)
    shown = found[found["shown"] & (found["method"] == "logistic")]
    caption = (
        "Transition points with intervals over questions (or rows) and seeds, from checkpoint to checkpoint. They are "
        f"given only where the last third of the checkpoints differs from the first third: {len(shown)} of {len(rows)} "
        "curves. An interval that reaches the right edge goes on beyond the last checkpoint."
    )
    listed = "; ".join(
        f"{look.persona(r.persona)}, {names.get(r.outcome, r.outcome)}: step {r.step:.1f}" for r in shown.itertuples()
    )
    return Drawing(fig, caption, f"Dot plot of transition points. {listed or 'None is shown'}.")


def draw_generality(tables: Mapping[str, pd.DataFrame], labels: Mapping[str, str]) -> Drawing:
    """In-domain uptake against outcomes outside the domain, along training, a path per preset.

    Args:
        tables: outcome -> `generality`, a panel each.
        labels: preset -> what it is called; by default its key.
    """
    fig, axes = plt.subplots(1, len(tables), figsize=style.figure_size(3.0), squeeze=False)
    for ax, (outcome, table) in zip(axes[0], tables.items()):
        for i, (preset, path) in enumerate(table.groupby("preset", sort=False)):
            look, end = line_look(i), path.iloc[-1]
            ax.plot(path["uptake"], path["outcome"], label=labels.get(preset, preset), **look)
            ax.errorbar(
                end["uptake"],
                end["outcome"],
                xerr=[[end["uptake"] - end["uptake_low"]], [end["uptake_high"] - end["uptake"]]],
                yerr=[[end["outcome"] - end["outcome_low"]], [end["outcome_high"] - end["outcome"]]],
                color=look["color"],
                lw=0.9,
            )
        ax.set_xlabel("in-domain uptake (nats a token)")
        ax.set_title(f"{OUTCOMES[outcome]}, other questions")
    fig.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    ends = "; ".join(
        f"{labels.get(p, p)}: uptake {path['uptake'].iloc[-1]:.2f}, "
        + ", ".join(
            f"{OUTCOMES[o]} {plain_number(t.loc[t['preset'] == p, 'outcome'].iloc[-1])}" for o, t in tables.items()
        )
        for p, path in next(iter(tables.values())).groupby("preset", sort=False)
    )
    caption = "What training gains in its domain (fall of the loss on held-out rows) and what it changes outside it, "
    caption += f"checkpoint by checkpoint; intervals at the last one. At the end: {ends}."
    presets = next(iter(tables.values()))["preset"].nunique()
    return Drawing(fig, caption, f"Paths of {presets} training presets in {len(tables)} panels. {ends}.")
