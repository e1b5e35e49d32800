"""Every figure of a run, drawn from its stored tables: the one register, and the one place that writes figure files.

A figure is a file in `figures/`: its key, title, caption, alternative text, and the names of the tables that it draws.
Whatever stands there is registered. A figure that a run's tables do not allow (one model only, no twin) is absent.

    records = draw_all(study.dir, folder, View(look, study.hypotheses))
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import pandas as pd

from cai_em.report import figures, style
from cai_em.report.figure_files import FigureRecord, slug, table_file, write_records
from cai_em.report.figures.parts import Drawing, Figure, View
from cai_em.report.style import Look


def _found(package: ModuleType) -> Iterator[Figure]:
    for name in sorted(module.name for module in pkgutil.iter_modules(package.__path__)):
        room = importlib.import_module(f"{package.__name__}.{name}")
        yield from (thing for thing in vars(room).values() if isinstance(thing, Figure))


FIGURES = {figure.key: figure for figure in sorted(_found(figures), key=lambda f: (f.order, f.key))}
"""Key -> figure, in the order in which documents list them."""


def draw_all(results: Path, out_dir: Path, view: View) -> list[FigureRecord]:
    """Draw every figure that a run's tables allow, as SVG and PNG, and list them in `out_dir/figures.json`.

    Args:
        results: `results/<profile>`.
        out_dir: where `<key>[-<name>][-<model>].svg|png` go.
        view: labels, order, colours, and what else is known about the study.

    Returns:
        A record per figure that was drawn: model by model, those of several models last.
    """
    models = list(view.look.sort_models(m.key for m in view.look.models))
    records = [
        record_figure(drawing, out_dir, view.look, figure, model, *names)
        for figure, (model, *names), drawing in drawings(results, view)
    ]
    records.sort(key=lambda r: models.index(r.model) if r.model in models else len(models) + (not r.model))
    write_records(records, out_dir)
    return records


def drawings(results: Path, view: View, stage: str = "") -> Iterator[tuple[Figure, tuple[str, ...], Drawing]]:
    """Every figure that a run's tables (or those of one stage) allow, with its model and what else it is drawn per."""
    with style.style_context():
        for figure in FIGURES.values():
            files = [table_file(results, name) for name in figure.tables]
            if figure.stage.startswith(stage) and all(file.is_file() for file in files):
                for group, tables in _groups(figure, list(map(pd.read_parquet, files)), view.look):
                    drawing = figure.draw(view, *tables)
                    if drawing is not None:
                        yield figure, group, drawing


def _groups(
    figure: Figure, tables: Sequence[pd.DataFrame], look: Look
) -> Iterator[tuple[tuple[str, ...], Sequence[pd.DataFrame]]]:
    """The parts of the tables that are drawn together, with their names, the model's first ("": all models)."""
    by = list(figure.per)
    if not by:
        yield ("",), tables
        return
    for model in look.sort_models(tables[0]["model"]):
        names = tables[0].loc[tables[0]["model"] == model, by].drop_duplicates()
        for group in names.itertuples(index=False, name=None):
            parts = tables
            for column, value in zip(by, group):
                parts = [t[t[column] == value] if column in t else t for t in parts]
            yield group, parts


def record_figure(
    drawing: Drawing, out_dir: Path, look: Look, figure: Figure, model: str = "", name: str = ""
) -> FigureRecord:
    """Save a drawing as `<key>[-<name>][-<model>].svg|png` and describe it."""
    stem = "-".join(filter(None, [figure.key, slug(name), slug(model)]))
    named, alt = f"{figure.title}: {look.model(model)}" if model else figure.title, _minus(drawing.alt)
    svg, png = style.save_figure(drawing.fig, Path(out_dir) / stem, named, alt)
    caption = _minus(f"{look.model(model)}. {drawing.caption}" if model else drawing.caption)
    return FigureRecord(figure.key, model, figure.title, caption, alt, svg.name, png.name, figure.tables)


def _minus(text: str) -> str:
    """Hyphens before numbers as minus signs."""
    return re.sub(r"(?<=[\s(=])-(?=\d)", "−", text)
