"""Parts that figures share: a drawing with its words, axes of data sets, intervals, keys; figure records on disk."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
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

from cai_em.records.files import write_text
from cai_em.records.numbers import level, points
from cai_em.records.tables import remove_others
from cai_em.report import style
from cai_em.report.style import Look


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
    fig, axes = plt.subplots(rows, columns, figsize=style.figure_size(height * rows + 0.5), squeeze=False, **kwargs)
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


# --- All of them --------------------------------------------------------------------------------------------------


def slug(text: str) -> str:
    """A text as a label: lower case, digits and hyphens (underscores and dots trouble Quarto's cross-references)."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def record_figure(
    drawing: Drawing, out_dir: Path, look: Look, key: str, title: str, model: str = "", name: str = ""
) -> FigureRecord:
    """Save a drawing as `<key>[-<name>][-<model>].svg|png` and describe it."""
    stem = "-".join(filter(None, [key, slug(name), slug(model)]))
    named, alt = f"{title}: {look.model(model)}" if model else title, _minus(drawing.alt)
    svg, png = style.save_figure(drawing.fig, Path(out_dir) / stem, named, alt)
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


def read_records(folder: Path) -> list[FigureRecord]:
    """The records that `draw_all` left in a folder."""
    return [FigureRecord(**r) for r in json.loads((Path(folder) / "figures.json").read_text(encoding="utf-8"))]
