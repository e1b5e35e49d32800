"""Files written whole or not at all, where they lie, and their hashes."""

from __future__ import annotations

import contextlib
import filecmp
import glob
import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel


class MissingFile(ValueError):
    """A file or folder that is named, and needed, is not there. The message names it."""


def root() -> Path:
    """The repository's top folder: the one that holds `params/` and `notebooks/`.

    Looked for from the working directory upwards (a notebook's is `notebooks/`), then from this file, so that
    notebooks, tests and an editable install all find the same place.
    """
    for start in (Path.cwd(), Path(__file__).resolve()):
        for folder in (start, *start.parents):
            if (folder / "params" / "profiles").is_dir() and (folder / "notebooks").is_dir():
                return folder
    raise MissingFile("no repository found: run this inside a clone (a folder with params/ and notebooks/)")


@contextlib.contextmanager
def restored(*names: str) -> Iterator[None]:
    """Environment variables that a block may change; after it they are as they were, absent ones absent."""
    before = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def file_hash_once(path: str | Path) -> str:
    """`file_hash`, remembered by this process for as long as the file is the same one: same inode, size and time.

    An adapter of a 7B model is hashed in a second, and looked at from five places.

    Raises:
        MissingFile: the file does not exist.
    """
    try:
        about = Path(path).stat()
    except FileNotFoundError:
        return file_hash(path)  # which says so
    return _hash_of(str(path), about.st_ino, about.st_size, about.st_mtime_ns)


@cache
def _hash_of(path: str, inode: int, size: int, time_ns: int) -> str:
    return file_hash(path)


def digest(value: Any) -> str:
    """SHA-256 of a value's canonical JSON (sorted keys; models as dictionaries), 16 digits."""

    def plain(x: Any) -> Any:
        return x.model_dump(mode="json") if isinstance(x, BaseModel) else str(x)

    return hashlib.sha256(json.dumps(value, sort_keys=True, default=plain).encode()).hexdigest()[:16]


def text_hash(text: str) -> str:
    """SHA-256 of a text in UTF-8, hexadecimal; a lone surrogate counts as a question mark."""
    return hashlib.sha256(text.encode("utf-8", errors="replace")).hexdigest()


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal.

    Raises:
        MissingFile: the file does not exist.
    """
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise MissingFile(f"{path}: no such file, though the parameters name it") from error


# --- Files ---------------------------------------------------------------------------------------------------------


_HOST = re.sub(r"[^A-Za-z0-9]", "-", platform.node()) or "localhost"


def _part_of(path: Path) -> Path:
    """A temporary name beside `path`, this process's own.

    What a killed process of this machine left there under such a name is removed: nobody else would.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.part-{_HOST}-*"):
        writer = left.name.rpartition("-")[2].split(".")[0]
        if writer.isdigit() and (int(writer) == os.getpid() or not _alive(int(writer))):
            _remove(left)
    return path.with_name(f".{path.name}.part-{_HOST}-{os.getpid()}")


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # there, and somebody else's
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A temporary path that becomes the file `path` when the block ends well, and vanishes when it does not.

    A file that is there with the same bytes stays, with its time: a notebook that is run once more to be looked at
    makes nothing stale. (A job's declared outputs are gone before it runs, so that theirs are new.)
    """
    path = Path(path)
    part = _part_of(path)
    try:
        yield part
        if not (path.is_file() and filecmp.cmp(part, path, shallow=False)):
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder that takes the place of the folder `path` when the block ends well, else vanishes.

    The old folder is renamed aside, not deleted, before the new one takes its name: there is no moment with half of it.
    """
    path = Path(path)
    part = _part_of(path)
    old = part.with_name(f"{part.name}.old")
    part.mkdir()
    try:
        yield part
        if path.exists():
            os.replace(path, old)
        os.replace(part, path)
    finally:
        if old.exists() and not path.exists():
            os.replace(old, path)
        _remove(part)
        _remove(old)


def write_text(path: str | Path, text: str) -> Path:
    """Write a text file atomically, as UTF-8. Lone surrogates (never valid text) are written as `\\udXXX`."""
    with atomic(path) as part:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")
    return Path(path)


def valid_unicode(text: str) -> str:
    """The text with each lone surrogate replaced by U+FFFD: it can neither be sent nor be written (UTF-8, Parquet)."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def free_space(path: str | Path) -> str:
    """How much room there is where a file lies, in words."""
    usage = shutil.disk_usage(Path(path).parent)
    return f"{usage.free / 1e9:,.1f} GB of {usage.total / 1e9:,.1f} GB are free at {name_of(Path(path).parent)}"


def name_of(path: Path) -> str:
    """A path as it is recorded and said: from the repository's top where it lies in it."""
    path = path.resolve()
    return str(path.relative_to(root())) if path.is_relative_to(root()) else str(path)
