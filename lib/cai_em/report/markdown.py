"""Markdown: escaping, tables, floats, and numbers with their provenance."""

from __future__ import annotations

import html
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from cai_em.records import files
from cai_em.report.figure_files import slug
from cai_em.study.labels import Labels


def markdown_table(rows: Iterable[Sequence[str]], header: Sequence[str], align: str, *, wide: bool = False) -> str:
    """A pipe table: the one place that writes them. Cells are Markdown (`cell`, `escape`).

    Args:
        align: one of `l`, `r`, `c`, `n` (none said) per column; or, as published, the delimiter cells between pipes.
        wide: make the dashes as wide as the columns: pandoc takes relative widths of wide tables from them.
    """
    lines = [[str(c).replace("\n", " ") for c in row] for row in [header, *rows]]
    if "-" in align:
        marks = align.split("|")
    elif wide:
        shown = [[re.sub(r"\]\([^)]*\)|\{#[^}]*\}|[\[`\\*]", "", c) for c in row] for row in lines]
        widths = [min(max(3, *(len(row[i]) for row in shown)), 44) + 2 for i in range(len(header))]
        marks = [_mark(a, w) for a, w in zip(align, widths, strict=True)]
    else:
        marks = [_mark(a, 3) for a in align]
    text = ["| " + " | ".join(row) + " |" for row in lines]
    return "\n".join([text[0], "|" + "|".join(marks) + "|", *text[1:]])


def _mark(align: str, width: int) -> str:
    left, right = align in "lc", align in "rc"
    return ":" * left + "-" * (width - left - right) + ":" * right


def cell(value: Any) -> str:
    """A label, a reason, a number of our own in a table: only what would break the table, or open a tag, is escaped."""
    return html.escape(str(value), quote=False).replace("|", "\\|").replace("\n", " ")


GENERATED = "_generated"
TABLES_FOLDER = f"{GENERATED}/tables"
MARKUP = "markup"
"""The unit of what the prose takes as it is: references to figures."""


# --- Numbers that know where they come from -----------------------------------------------------------------------


@dataclass(frozen=True)
class Number:
    """A value of the prose: formatted, with unit, the table beside the page that holds it, and how it follows."""

    name: str
    value: str
    unit: str
    table: str
    how: str


class Numbers:
    """The values that the paper may use, and the tables that they come from.

    Args:
        repository: files are named relative to it.
        results: `results/<profile>`.
    """

    def __init__(self, repository: Path, results: Path) -> None:
        self.repository, self.results = repository.resolve(), Path(results).resolve()
        self.all: dict[str, Number] = {}
        self.used: set[str] = set()
        self.files: set[Path] = set()
        self.tables: dict[str, tuple[Path, pd.DataFrame | None, int]] = {}

    def add(self, name: str, value: object, unit: str, source: Path | str, how: str) -> str:
        """Record a value; returns it as a link to its line in the appendix.

        Args:
            name: `group.name`.
            value: formatted.
            unit: of the value; `text` for mere names, which are not traced.
            source: the result table that holds it, or the name that `csv` gave to one.
            how: how it follows from the table.

        Raises:
            ValueError: the name is not `group.name` in lower case, or is taken.
        """
        if not re.fullmatch(r"[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)+", name):
            raise ValueError(f"variable name {name!r}: expected words in lower case joined by dots")
        if name in self.all:
            raise ValueError(f"variable {name!r} is given twice")
        self.all[name] = Number(name, str(value), unit, self.csv(source) if isinstance(source, Path) else source, how)
        return self.markdown(name)

    def cite(self, name: str, value: object, unit: str, source: Path | str, how: str) -> str:
        """Record a value that generated text uses; returns it as a link."""
        self.add(name, value, unit, source, how)
        return self.link(name)

    def relative(self, source: Path) -> str:
        """A file relative to the repository, noted as read."""
        self.files.add(Path(source).resolve())
        return os.path.relpath(Path(source).resolve(), self.repository)

    def csv(self, source: Path, frame: pd.DataFrame | None = None, stem: str = "", more: int = 0) -> str:
        """The name of the table beside the page that holds a result table; it is written with the other tables.

        Args:
            source: a Parquet or CSV file; or any file, with `frame` as what to show of it.
            frame: what to write in place of the whole file.
            stem: what to call it; the file's own stem by default.
            more: how many further files `frame` was gathered from.

        Raises:
            ValueError: two files would get the same name.
        """
        source = Path(source).resolve()
        self.relative(source)
        inside = source.is_relative_to(self.results)
        place = source.relative_to(self.results).parts[0] if inside else source.parent.name
        name = f"{place}_{stem or source.stem}.csv"
        if self.tables.get(name, (source,))[0] != source:
            raise ValueError(f"{name}: both {self.tables[name][0]} and {source} would be written under this name")
        if frame is not None or name not in self.tables:
            self.tables[name] = (source, frame, more)
        return name

    def trace(self, *sources: Path) -> str:
        """The end of a caption: links to the tables that the float was made from."""
        names = [self.csv(source) for source in sources]
        return " Table: " + ", ".join(f"[`{n}`]({TABLES_FOLDER}/{n})" for n in names) + "." if names else ""

    def traced(self, name: str) -> bool:
        """Whether a value has a line in the appendix: measurements and verdicts have, mere names have not."""
        number = self.all[name]
        return bool(number.table) and number.unit not in ("text", MARKUP)

    def markdown(self, name: str) -> str:
        """A value as it stands in the text: a link to where it comes from."""
        value = self.all[name].value
        if self.all[name].unit == MARKUP:
            return value
        return f"[{value}](#n-{slug(name)})" if self.traced(name) else plain(value)

    def link(self, name: str) -> str:
        """The same, noted as used by generated text."""
        self.used.add(name)
        return self.markdown(name)

    def tree(self) -> dict[str, Any]:
        """Nested mapping for `_variables.yml`."""
        tree: dict[str, Any] = {}
        for name in self.all:
            *groups, last = name.split(".")
            node = tree
            for group in groups:
                node = node.setdefault(group, {})
            node[last] = self.markdown(name)
        return tree

    def write_tables(self, folder: Path) -> None:
        """The tables beside the page, as CSV; floats with ten digits."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, (source, frame, _) in self.tables.items():
            frame = read_result_table(source) if frame is None else frame
            frame.to_csv(folder / name, index=False, float_format="%.10g")


# --- Markdown -----------------------------------------------------------------------------------------------------


def heading_id(title: str) -> str:
    """Where a link to a heading leads on GitHub: lower case, hyphens for spaces, other punctuation gone."""
    return re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")


def contents(text: str) -> str:
    """Links to a document's chapters, in one paragraph: the headings of the second level, which must differ."""
    titles = re.findall(r"^## (.+)$", text, flags=re.M)
    return " · ".join(f"[{title}](#{heading_id(title)})" for title in titles)


def pipe_table(rows: Iterable[Sequence[object]], header: Sequence[str], align: str) -> str:
    """A wide table of Markdown cells, in which a pipe is a pipe."""
    safe = ([re.sub(r"(?<!\\)\|", r"\\|", str(c)) for c in row] for row in rows)
    return markdown_table(safe, header, align, wide=True)


def floating(label: str, content: str, caption: str) -> str:
    """A cross-referenceable float (`fig-…` or `tbl-…`): content, then the caption as the last paragraph."""
    return f"::: {{#{label}}}\n\n{content}\n\n{caption}\n\n:::\n"


def cited(floats: str) -> str:
    """References to all the floats in a block: one per model, say."""
    return listed([f"@{label}" for label in re.findall(r"^::: \{#((?:fig|tbl)-[\w-]+)\}", floats, flags=re.M)])


def absent(label: str, what: str, stage: str) -> str:
    """The float that stands where a part has not been run: labels resolve, and the reader is told."""
    return floating(label, "*Not part of this run.*", f"{what} (stage `{stage}`, where the data allow it).")


def plain(text: str) -> str:
    """Text of data as Markdown that shows it as it is: nothing in it can become markup, a shortcode or a citation."""
    return escape(str(text))


def count_of(number: int, noun: str) -> str:
    """`1 data set`, `2 data sets`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def listed(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return ", ".join(words[:-1]) + " and " + words[-1] if len(words) > 1 else "".join(words)


def _signed(look: Labels, dataset: str) -> str:
    """A data set's label and the sign of its role, which never stands on a line of its own."""
    return look.signed(dataset).replace(" ", "\u00a0")


def read_result_table(path: Path) -> pd.DataFrame:
    """A result table, Parquet or CSV."""
    return pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)


# --- Where things come from ---------------------------------------------------------------------------------------


def _sources(numbers: Numbers) -> str:
    """The line of every number, and the file behind every table beside the page."""
    rows = [
        [f"[{n.name}]{{#n-{slug(n.name)}}}", n.value, n.unit, f"[{n.table}]({TABLES_FOLDER}/{n.table})", n.how]
        for n in sorted(numbers.all.values(), key=lambda n: n.name)
        if numbers.traced(n.name)
    ]
    caption = "Where each number of the text comes from: the table beside this page, and how it follows from it."
    first = floating("tbl-sources", pipe_table(rows, ["Name", "Value", "Unit", "Table", "How"], "lrlll"), caption)
    rows = [
        [f"[{name}]({TABLES_FOLDER}/{name})",
         f"`{os.path.relpath(file, numbers.repository)}`" + (f" and {more} more like it" if more else ""),
         f"`{files.file_hash(file)[:8]}`"]
        for name, (file, _, more) in sorted(numbers.tables.items())
    ]  # fmt: skip
    caption = "The tables beside this page, the file that each was written from, and the beginning of its SHA-256."
    second = floating("tbl-tables", pipe_table(rows, ["Table", "Made from", "SHA-256"], "lll"), caption)
    return f"{first}\n{second}"


def _versions(versions: Mapping[str, str]) -> str:
    rows = [[f"`{name}`", plain(version)] for name, version in sorted(versions.items())]
    return floating("tbl-versions", pipe_table(rows, ["Package", "Version"], "ll"), "Versions that made these results.")


# --- Text and numbers ---------------------------------------------------------------------------------------------


def escape(text: str) -> str:
    """Somebody else's text (a response, a judge's answer) as text: neither Markdown nor HTML, on one line.

    Every ASCII punctuation mark gets a backslash (CommonMark 2.4), but for HTML's own, which become entities; control
    characters become U+FFFD. So nothing in it can end a table cell, open a tag, a link, an include or a code block.
    """
    text = re.sub(r"[^\S ]+", " ", text)
    text = re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", text)
    text = re.sub(r"([!#$%()*+,\-./:;=?@\[\\\]^_`{|}~])", r"\\\1", text)
    return html.escape(text, quote=True)


def plainly(text: str) -> str:
    """Names, paths and counts of somebody else's files as text that reads well unrendered: only what means something
    to Markdown or HTML is escaped."""
    text = re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", " ", text)
    text = re.sub(r"([\\`*\[\]|$~^{}<>])|(?<![^\W_])_|_(?![^\W_])", lambda m: "\\" + m[0], text)
    return html.escape(text, quote=False).replace("\\&lt;", "&lt;").replace("\\&gt;", "&gt;")


def judge_label(judge: str) -> str:
    """A judge's name as the published document spells it: GPT-4.1-mini."""
    return re.sub(r"^gpt", "GPT", judge)
