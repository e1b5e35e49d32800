"""Whatever a study wrote, as one flat table of texts and numbers with its line numbers: what every reader returns.

A reader interprets nothing. It brings a file into rows and columns; which column means what is `audit.yaml`'s to say.
What could not be a row (a header line again, a broken line, an empty one) is refused with its reason, and counted.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from cai_em.audit.opening import (
    MAX_COLUMNS,
    MAX_FILE_BYTES,
    MAX_ROWS,
    MAX_TEXT,
    AuditError,
    decoded,
    from_json,
    kind,
    read_bytes,
)

LINE = "_line"
"""Column of the place in the file: a line's number in text files, a record's from 1 in others."""

BATCH_ROWS = 512


@dataclass
class Flat:
    """A file as a table.

    `rows`: its columns as they are named there, and `LINE`. `refused`: reason -> count of what is not in it.
    `notes`: what the reader had to do (repair an encoding, say), in a few words each.
    """

    rows: pd.DataFrame
    refused: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)


def as_text(value: Any) -> str | None:
    """A value as text, None where it is null or NaN; lists and mappings as JSON."""
    if value is None or (isinstance(value, float) and value != value):
        return None
    if isinstance(value, str):
        return value
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False, default=str)
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return str(value)


def flat(records: Iterable[dict[str, Any]], where: str) -> pd.DataFrame:
    """Records (with `LINE`) as a table whose columns are all those that any of them has.

    Raises:
        AuditError: more rows or columns than the limits allow, or a text longer than one may be.
    """
    names: dict[str, None] = {}
    kept = []
    for record in records:
        kept.append(record)
        names.update(dict.fromkeys(record))
        if len(names) > MAX_COLUMNS + 1:
            raise AuditError(
                f"{where}: more than {MAX_COLUMNS:,} columns: keep those with texts, conditions and scores"
            )
        if len(kept) > MAX_ROWS:
            raise AuditError(f"{where}: more than {MAX_ROWS:,} rows: audit it in parts")
        for name, value in record.items():
            if isinstance(value, str) and len(value) > MAX_TEXT:
                raise AuditError(
                    f"{where}: record {record[LINE]}: {name!r} has {len(value):,} characters (limit {MAX_TEXT:,})"
                )
    columns = {name: pd.Series([record.get(name) for record in kept], dtype=object) for name in names}
    return pd.DataFrame(columns or {LINE: pd.Series([], dtype=object)})


# --- CSV ----------------------------------------------------------------------------------------------------------


def read_csv(path: Path) -> Flat:
    """A CSV or TSV file: values as texts, an empty field as null; header lines that come again are refused.

    Raises:
        AuditError: too large, too many columns, no header, or no row that fits it.
    """
    text, repaired = decoded(read_bytes(path))
    text = text.replace("\x00", "\N{REPLACEMENT CHARACTER}")
    first = text[: text.find("\n")] if "\n" in text else text
    delimiter = max(("\t", ",", ";"), key=lambda d: first.count(d))
    if first.count(delimiter) >= MAX_COLUMNS:
        raise AuditError(
            f"{path}: {first.count(delimiter) + 1:,} columns, more than {MAX_COLUMNS:,}: keep those with texts, "
            "conditions and scores"
        )
    before = csv.field_size_limit(MAX_TEXT)
    result = Flat(pd.DataFrame())
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        header = next(reader, None)
        if not header or not any(name.strip() for name in header):
            raise AuditError(f"{path}: no header line: a first line with the columns' names is needed")
        result.rows = flat(_csv_records([name.strip() for name in header], reader, result.refused), str(path))
    except csv.Error as error:
        raise AuditError(f"{path}:{reader.line_num}: not CSV: {error}") from error
    finally:
        csv.field_size_limit(before)
    if repaired:
        result.notes.append("some bytes were no UTF-8: read as Windows-1252")
    return result


def _csv_records(header: list[str], reader: Any, refused: Counter[str]) -> Iterator[dict[str, Any]]:
    names = [name or f"column_{i + 1}" for i, name in enumerate(header)]
    for i, name in enumerate(names):
        if name in names[:i]:
            names[i] = f"{name}_{i + 1}"
    for fields in reader:
        if not any(value.strip() for value in fields):
            refused["empty line"] += 1
        elif [value.strip() for value in fields] == header:
            refused["header line repeated"] += 1
        elif len(fields) != len(header):
            refused[f"broken line ({'more' if len(fields) > len(header) else 'fewer'} fields than the header)"] += 1
        else:
            yield {
                LINE: reader.line_num,
                **{name: value if value.strip() else None for name, value in zip(names, fields)},
            }


# --- JSON lines, JSON, Parquet --------------------------------------------------------------------------------------


def lines(path: Path) -> Iterator[tuple[int, Any, str | None]]:
    """The objects of a JSONL file: (line number, object, None), or (line number, None, why it was refused).

    Read line by line, so that a large file needs no more memory than its rows.

    Raises:
        AuditError: too large, or a line longer than a file may be.
    """
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    read = 0
    try:
        with opener(path, "rb") as file:
            for number, line in enumerate(file, 1):
                read += len(line)
                if read > MAX_FILE_BYTES:
                    raise AuditError(f"{path}: more than {MAX_FILE_BYTES >> 20} MiB: split it by condition")
                text = decoded(line)[0].strip()
                if not text:
                    yield number, None, "empty line"
                    continue
                try:
                    value = from_json(text, f"{path}:{number}")
                except AuditError:
                    yield number, None, "broken line (not JSON)"
                    continue
                yield (
                    (number, value, None) if isinstance(value, dict) else (number, None, "broken line (no JSON object)")
                )
    except (OSError, EOFError) as error:
        raise AuditError(f"{path}: cannot be read: {error}") from error


def read_jsonl(path: Path) -> Flat:
    """A JSONL file of flat objects, one a response."""
    result = Flat(pd.DataFrame())

    def records() -> Iterator[dict[str, Any]]:
        for number, value, why in lines(path):
            if why:
                result.refused[why] += 1
            else:
                yield {LINE: number, **value}

    result.rows = flat(records(), str(path))
    return result


def load_json(path: Path) -> Any:
    """A JSON file as Python data."""
    return from_json(decoded(read_bytes(path))[0], str(path))


def read_json_list(path: Path) -> Flat:
    """A JSON file that is a list of flat objects."""
    content = load_json(path)
    if isinstance(content, dict):  # {"results": [...]}: one list of objects inside an object
        content = next((v for v in content.values() if isinstance(v, list) and v and isinstance(v[0], dict)), None)
    if not isinstance(content, list):
        raise AuditError(f"{path}: neither a list of records nor an object that holds one")
    result = Flat(pd.DataFrame())
    records = [{LINE: i, **item} for i, item in enumerate(content, 1) if isinstance(item, dict)]
    if len(records) < len(content):
        result.refused["no JSON object"] += len(content) - len(records)
    result.rows = flat(records, str(path))
    return result


def read_parquet(path: Path) -> Flat:
    """A Parquet table, batch by batch: what it holds unpacked is counted on the way.

    Raises:
        AuditError: not Parquet, or more rows, columns or bytes than the limits allow.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from cai_em.audit.opening import check_size

    check_size(path)
    try:
        with pq.ParquetFile(path) as file:
            width, height = file.metadata.num_columns, file.metadata.num_rows
            if width > MAX_COLUMNS or height > MAX_ROWS:
                raise AuditError(
                    f"{path}: {height:,} rows of {width:,} columns (limits {MAX_ROWS:,} and {MAX_COLUMNS:,}): "
                    f"audit it in "
                    "parts, with the columns that are needed"
                )
            records, size = [], 0
            for batch in file.iter_batches(batch_size=BATCH_ROWS):
                size += batch.nbytes
                if size > MAX_FILE_BYTES:
                    raise AuditError(f"{path}: unpacks to more than {MAX_FILE_BYTES >> 20} MiB: split it by condition")
                records += batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise AuditError(f"{path}: not a Parquet table: {error}") from error
    return Flat(flat(({LINE: i, **record} for i, record in enumerate(records, 1)), str(path)))


def read_flat_table(path: Path) -> Flat:
    """A flat table in whatever kind of file: CSV, TSV, JSONL, a JSON list, Parquet."""
    how = {".csv": read_csv, ".tsv": read_csv, ".jsonl": read_jsonl, ".ndjson": read_jsonl, ".json": read_json_list}
    return {**how, ".parquet": read_parquet}[kind(path)](path)
