"""Figures on disk: a record of each beside its files, where the documents find caption, alternative text and tables."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cai_em.records.files import write_text
from cai_em.records.tables import remove_others

FIGURE_LIST = "figures.json"


@dataclass(frozen=True)
class FigureRecord:
    """A figure on disk.

    Attributes:
        key: names the figure (`cai_em.report.drawing.FIGURES`).
        model: the model that it shows, "" where it shows several.
        title, caption, alt: what is said about it.
        svg, png: file names.
        tables: the stored tables that it draws, as `stage/name`.
    """

    key: str
    model: str
    title: str
    caption: str
    alt: str
    svg: str
    png: str
    tables: tuple[str, ...] = ()

    @property
    def stage(self) -> str:
        """The stage whose table it draws first."""
        return self.tables[0].split("/")[0]


def slug(text: str) -> str:
    """A text as a label: lower case, digits and hyphens (underscores and dots trouble Quarto's cross-references)."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def table_file(results: Path, table: str) -> Path:
    """Where a run keeps a table `stage/name`: in its stage's folder, or in `tables/` there."""
    stage, name = table.split("/")
    inside = Path(results) / stage / "tables" / f"{name}.parquet"
    return inside if inside.is_file() else Path(results) / stage / f"{name}.parquet"


def write_records(records: Sequence[FigureRecord], folder: Path) -> Path:
    """List figures in `figures.json` beside them, where the results document and the paper find them.

    Other SVG and PNG files in the folder are of an earlier run, and are removed.
    """
    text = json.dumps([asdict(r) for r in records], indent=1, ensure_ascii=False) + "\n"
    path = write_text(Path(folder) / FIGURE_LIST, text)
    remove_others(folder, [name for r in records for name in (r.svg, r.png)], (".svg", ".png"))
    return path


def read_records(folder: Path) -> list[FigureRecord]:
    """The records that `write_records` left in a folder."""
    found = json.loads((Path(folder) / FIGURE_LIST).read_text(encoding="utf-8"))
    return [FigureRecord(**r | {"tables": tuple(r["tables"])}) for r in found]
