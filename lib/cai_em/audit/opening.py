"""Files from strangers, opened with limits: size, rows, columns, length of a text, depth; plain data, never code.

    data = read_bytes(path)                      # plain or gzip, unpacked within the limit
    text, repaired = decoded(data)                # UTF-8, UTF-16 by its mark; single bytes that are neither as
    Windows-1252

What is beyond a limit is refused by `AuditError` with the file, the limit, and what to do; nothing is cut silently.
"""

from __future__ import annotations

import codecs
import gzip
import json
import zipfile
from pathlib import Path
from typing import Any

MAX_FILES = 20_000
MAX_FILE_BYTES = 512 << 20
"""Bytes of one file, unpacked. A file of responses has a kilobyte a response: half a million fit."""

MAX_TOTAL_BYTES = 2 << 30
MAX_ROWS = 1_000_000
"""Responses in one audit."""

MAX_COLUMNS = 1_000
MAX_TEXT = 1_000_000
"""Characters of one field."""

MAX_MEMBERS = 200_000
"""Files in one Inspect log: one a sample."""

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", ".eval")
PACKED = ".gz"
_CP1252 = "audit-cp1252"


class AuditError(ValueError):
    """Files cannot be audited as they are. The message names the file, what is wrong with it, and what to do."""


def kind(path: Path) -> str:
    """A file's suffix that counts: `.csv` of `a.csv.gz`; empty where it is none of `SUFFIXES`."""
    name = path.name.lower().removesuffix(PACKED)
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")


def check_size(path: Path) -> int:
    """Bytes of a file on disk.

    Raises:
        AuditError: it is no plain file, or larger than `MAX_FILE_BYTES`.
    """
    if not path.is_file():
        raise AuditError(f"{path}: no such file")
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise AuditError(
            f"{path}: {size / 2**20:,.0f} MiB, more than the {MAX_FILE_BYTES >> 20} MiB that one file may have: "
            f"split it "
            "by condition, or leave out columns that are not needed (log-probabilities, say)"
        )
    return size


def read_bytes(path: Path) -> bytes:
    """A file's bytes, unpacked where its name ends in `.gz`.

    Raises:
        AuditError: too large, packed or unpacked, or not what its name says.
    """
    check_size(path)
    try:
        if not path.name.lower().endswith(PACKED):
            return path.read_bytes()
        with gzip.open(path) as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except (OSError, EOFError) as error:
        raise AuditError(f"{path}: cannot be read: {error}") from error
    if len(data) > MAX_FILE_BYTES:
        raise AuditError(
            f"{path}: unpacks to more than {MAX_FILE_BYTES >> 20} MiB: not opened (a gzip bomb looks like this)"
        )
    return data


def _repair(error: UnicodeError) -> tuple[str, int]:
    """The one byte that is no UTF-8, as Windows-1252 has it: files that were pasted together hold both."""
    assert isinstance(error, UnicodeDecodeError)
    byte = error.object[error.start : error.start + 1]
    try:
        return byte.decode("cp1252"), error.start + 1
    except UnicodeDecodeError:
        return "\N{REPLACEMENT CHARACTER}", error.start + 1


codecs.register_error(_CP1252, _repair)


def decoded(data: bytes) -> tuple[str, bool]:
    """Bytes as text, and whether some of them were no UTF-8 and were taken for Windows-1252."""
    for mark, encoding in (
        (codecs.BOM_UTF8, "utf-8-sig"),
        (codecs.BOM_UTF16_LE, "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16"),
    ):
        if data.startswith(mark):
            return data.decode(encoding, errors="replace"), False
    try:
        return data.decode("utf-8"), False
    except UnicodeDecodeError:
        return data.decode("utf-8", errors=_CP1252), True


def from_json(text: str, where: str) -> Any:
    """JSON as Python data.

    Raises:
        AuditError: not JSON, or nested so deeply that nothing written in earnest is.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise AuditError(f"{where}: JSON nested too deeply") from error
    except ValueError as error:
        raise AuditError(f"{where}: not JSON: {error}") from error


def check_zip(path: Path) -> None:
    """Refuse a zip archive that would unpack to more than the limit, by its directory, before anything is unpacked.

    Python reads no more of a member than the directory promises, so a directory that lies gains nothing.

    Raises:
        AuditError: no zip, too many members, or too much in them.
    """
    check_size(path)
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError) as error:
        raise AuditError(f"{path}: not a zip archive, which an Inspect log (.eval) is: {error}") from error
    if len(members) > MAX_MEMBERS:
        raise AuditError(f"{path}: {len(members):,} members, more than {MAX_MEMBERS:,}: not opened")
    unpacked = sum(member.file_size for member in members)
    if unpacked > MAX_FILE_BYTES:
        raise AuditError(
            f"{path}: unpacks to {unpacked / 2**20:,.0f} MiB, more than {MAX_FILE_BYTES >> 20}: not opened (a zip bomb "
            "looks like this)"
        )
