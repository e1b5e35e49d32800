"""Parts that figures share: what a figure is, axes of data sets, intervals, keys.

Two kinds of interval stand in the figures of scores: the response interval and the question interval
(`cai_em.analysis.summaries`). Rows that are missing are shown as missing, never as zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from cai_em.records.numbers import level, points
from cai_em.report import style
from cai_em.report.style import Look

# --- What a figure is ---------------------------------------------------------------------------------------------


class Drawing(NamedTuple):
    """A drawn figure, with what is said about it."""

    fig: Canvas
    caption: str
    alt: str


@dataclass(frozen=True)
class View:
    """What a figure may know besides the tables that it draws: how things are called and look, and what is asked.

    Attributes:
        look: labels, order, colours.
        hypotheses: entries with `key, label, personas, direction`.
        confidence: of the intervals in the tables.
        p_max: a gate's test counts where its p is below this.
        trained: the data set of H3's runs.
    """

    look: Look
    hypotheses: Sequence[Any] = ()
    confidence: float = 0.95
    p_max: float = 0.05
    trained: str = ""

    @property
    def key_personas(self) -> list[str]:
        """The personas that hypotheses name."""
        return [p for h in self.hypotheses for p in h.personas]


@dataclass(frozen=True)
class Figure:
    """A figure: every mark and interval in it stands in `tables`.

    Attributes:
        key: its name in files and labels.
        title: what it shows, in a few words.
        tables: the stored tables that it draws, as `stage/name`.
        order: its place among the others.
        per: columns of the first table; a figure for each of their values.
        section: where the paper shows it together with others; by itself where this is empty.
        draw: (view, *tables) -> drawing; None where the tables do not allow it.
    """

    key: str
    title: str
    tables: tuple[str, ...]
    order: int
    per: tuple[str, ...]
    section: str
    draw: Callable[..., Drawing | None]

    @property
    def block(self) -> str:
        """The part of the paper that shows it."""
        return f"fig-{self.section or self.key}"

    @property
    def stage(self) -> str:
        """The stage whose table it draws."""
        return self.tables[0].split("/")[0]


def figure(
    key: str, title: str, *tables: str, order: int, per: Sequence[str] = ("model",), section: str = ""
) -> Callable[[Callable[..., Drawing | None]], Figure]:
    """Make a figure of a drawing function (see `Figure`); `cai_em.report.drawing` finds it by its file."""
    return lambda draw: Figure(key, title, tables, order, tuple(per), section, draw)


# --- Small parts --------------------------------------------------------------------------------------------------


def span(values: pd.Series, text: Callable[[float], str] = points) -> str:
    return f"{text(values.min())} to {text(values.max())}"


def rate_text(percent: float) -> str:
    return f"{percent:.1f}"


def effect_text(d: float) -> str:
    return f"{d:.2f}"


def name_rows(ax: Axes, labels: Sequence[str]) -> None:
    """Names on the y axis, first on top."""
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)


def name_datasets(ax: Axes, datasets: Sequence[str], look: Look, axis: str = "y", rotation: float = 0) -> None:
    """Data sets on an axis, with the sign and colour of their roles."""
    labels = [look.signed(d) for d in datasets]
    if axis == "y":
        name_rows(ax, labels)
        ticks = ax.get_yticklabels()
    else:
        ax.set_xticks(range(len(labels)), labels, rotation=rotation, ha="right")
        ticks = ax.get_xticklabels()
    for tick, dataset in zip(ticks, datasets):
        tick.set_color(style.ROLE_COLOUR[look.role(dataset)])


def role_handles(datasets: Sequence[str], look: Look) -> list[Line2D]:
    """Legend entries of the roles that occur."""
    return [
        Line2D([], [], marker=style.ROLE_MARKER[r], color=style.ROLE_COLOUR[r], ls="none", label=style.ROLE_LABEL[r])
        for r in dict.fromkeys(look.role(d) for d in look.sort_datasets(datasets))
    ]


def two_lines(label: str, longest: int = 18) -> str:
    """A long label broken at the underscore or space nearest its middle."""
    places = [i for i, c in enumerate(label) if c in "_ "]
    if len(label) <= longest or not places:
        return label
    cut = min(places, key=lambda i: abs(i - len(label) / 2))
    return f"{label[: cut + 1]}\n{label[cut + 1 :]}"


def intervals(ax: Axes, y: float, row: Any, colour: str, marker: str, size: float = 5) -> None:
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


def interval_key(confidence: float) -> list[Line2D]:
    """Legend entries of both intervals."""
    return [
        Line2D([], [], color=style.INK, lw=3.2, label=f"{level(confidence)} response interval (as published)"),
        Line2D([], [], color=style.INK, lw=0.9, label=f"{level(confidence)} question interval"),
    ]


def legend_below(fig: Canvas, handles: Sequence[Any], columns: int = 4) -> None:
    fig.legend(handles=list(handles), loc="outside lower center", ncols=columns, handlelength=2.2, columnspacing=1.4)


def sized_bound(low: float, high: float, pad: float = 0.04) -> tuple[float, float]:
    extra = (high - low) * pad or 1.0
    return low - extra, high + extra


def grid_axes(n: int, columns: int, height: float, **kwargs: Any) -> tuple[Canvas, list[Axes]]:
    """n panels in rows of `columns`; unused places are empty."""
    columns = min(columns, n)
    rows = -(-n // columns)
    fig, axes = plt.subplots(rows, columns, figsize=style.figure_size(height * rows + 0.5), squeeze=False, **kwargs)
    flat = list(axes.flat)
    for ax in flat[n:]:
        ax.set_visible(False)
    return fig, flat[:n]


def matrix(table: pd.DataFrame, value: str, rows: Sequence[str], columns: Sequence[str]) -> np.ndarray:
    return table.pivot(index="persona", columns="dataset", values=value).reindex(index=rows, columns=columns).to_numpy()


def heat(
    table: pd.DataFrame,
    value: str,
    look: Look,
    label: str,
    text: Callable[[float], str],
    cmap: str,
    vmin: float,
    vmax: float,
) -> Canvas:
    """Persona by data set, each cell with its number; a missing cell is hatched and says so."""
    personas = look.sort_personas(table["persona"])
    datasets = look.sort_datasets(table["dataset"])
    data = matrix(table, value, personas, datasets)
    fig, ax = plt.subplots(figsize=style.figure_size(0.9 + 0.235 * len(personas) + 0.35))
    ax.set_facecolor(style.EMPTY)
    ax.patch.set_hatch("////")
    ax.patch.set_edgecolor(style.PALE)
    image = ax.imshow(np.ma.masked_invalid(data), cmap=cmap, vmin=vmin, vmax=vmax, aspect="auto")
    for (i, j), v in np.ndenumerate(data):
        if np.isfinite(v):
            shade = style.lab(style.linear_rgb(image.cmap(image.norm(v))[:3]))[0]
            ax.text(j, i, text(v), ha="center", va="center", fontsize=7, color=style.PAPER if shade < 55 else style.INK)
    ax.set_yticks(range(len(personas)), [look.persona(p) for p in personas])
    name_datasets(ax, datasets, look, "x", 30)
    ax.grid(visible=False)
    for side in ax.spines.values():
        side.set_visible(False)
    # A bar is as high as the rows are many: beside few of them a long label would be cut off.
    fig.colorbar(image, ax=ax, label=fill(label, max(12, 4 * len(personas))), pad=0.015, fraction=0.035)
    handles: list[Any] = role_handles(datasets, look)
    if np.isnan(data).any():
        handles.append(Patch(fc=style.EMPTY, ec=style.PALE, hatch="////", label="no such condition"))
    legend_below(fig, handles)
    return fig
