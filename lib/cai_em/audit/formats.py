"""Which format a file has, by what is in it: its suffix says how to open it, its keys say who wrote it.

found = recognise(path)          # Found(format="inoculation", ...)
table = read(path, found.format)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from cai_em.audit.flat import Flat, lines, load_json, read_flat_table
from cai_em.audit.inspect_logs import read_inspect
from cai_em.audit.nested import read_harness, read_inoculation, read_space, read_study_file
from cai_em.audit.opening import MAX_FILES, SUFFIXES, AuditError, kind

READERS: dict[str, Callable[[Path], Flat]] = {
    "table": read_flat_table,
    "evaluation": read_study_file,
    "inoculation": read_inoculation,
    "scores_by_question": read_space,
    "inspect": read_inspect,
    "harness": read_harness,
}
"""Format -> its reader. `table`: a row a response, whoever wrote it (plain, EM, model organisms, llmcomp, persona
vectors, persona hierarchy)."""

FIRST_LINES = 5


def recognise(path: Path) -> str:
    """A file's format: a key of `READERS`.

    Raises:
        AuditError: a kind of file that is none of ours, or one in which nothing like responses is found.
    """
    suffix = kind(path)
    if suffix in (".csv", ".tsv", ".parquet"):
        return "table"
    if suffix == ".eval":
        return "inspect"
    if suffix in (".jsonl", ".ndjson"):
        return _of_line(_first_object(path))
    if suffix == ".json":
        return _of_json(path)
    known = ", ".join(SUFFIXES)
    hint = ": unpack it first" if path.suffix.lower() in (".zip", ".tar", ".tgz", ".7z", ".zst", ".bz2", ".xz") else ""
    if path.suffix.lower() in (".pkl", ".pickle", ".pt", ".pth", ".joblib", ".npy", ".h5"):
        hint = ": such a file can run code when it is opened, so it is not; write the table as CSV or Parquet"
    raise AuditError(f"{path}: none of the kinds that are read ({known}, and each with .gz){hint}")


def _first_object(path: Path) -> dict[str, Any]:
    for tried, (_, value, why) in enumerate(lines(path)):
        if not why:
            return value
        if tried >= FIRST_LINES:
            break
    raise AuditError(f"{path}: no JSON object in its first lines: is it JSON lines?")


def _of_line(first: dict[str, Any]) -> str:
    if "resps" in first:
        return "harness"
    if isinstance(first.get("responses"), list):
        return "inoculation"
    return "table"


def _of_json(path: Path) -> str:
    content = load_json(path)
    if isinstance(content, dict):
        if isinstance(content.get("questions"), list):
            return "evaluation"
        if isinstance(content.get("scores"), dict) and all(isinstance(v, list) for v in content["scores"].values()):
            return "scores_by_question"
        if isinstance(content.get("eval"), dict) and "status" in content:
            return "inspect"
        if any(isinstance(v, list) and v and isinstance(v[0], dict) for v in content.values()):
            return "table"
    elif isinstance(content, list) and content and isinstance(content[0], dict):
        return "table"
    about = ", ".join(list(map(str, content))[:8]) if isinstance(content, dict) else type(content).__name__
    raise AuditError(f"{path}: JSON in which no responses or scores are found (it has: {about[:200]})")


def read(path: Path, form: str) -> Flat:
    """A file of a known format as a flat table.

    Raises:
        AuditError: whatever is wrong with it, named.
    """
    return READERS[form](path)


def find_files(paths: Iterable[Path], skip: Iterable[Path] = ()) -> list[Path]:
    """Files below paths: themselves, and what of the known kinds lies in folders; sorted, each once.

    Our own files beside them (`audit.yaml`'s results), hidden folders and links that lead out of a folder are not
    followed.

    Raises:
        AuditError: a path that does not exist, no file at all, or more of them than the limit.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.exists():
            raise AuditError(f"{path}: no such file or folder")
        inside = [path] if path.is_file() else sorted(_inside(path))
        if not inside:
            raise AuditError(f"{path}: no file in it that could hold responses ({', '.join(SUFFIXES)})")
        for file in inside:
            found.setdefault(file.resolve(), file)
            if len(found) > MAX_FILES:
                raise AuditError(f"more than {MAX_FILES:,} files: audit the study in parts")
    left_out = {path.resolve() for path in skip}
    return [file for real, file in found.items() if real not in left_out]


def _inside(folder: Path) -> Iterable[Path]:
    for path in folder.rglob("*"):
        if any(part.startswith(".") for part in path.relative_to(folder).parts) or path.is_symlink():
            continue
        if path.is_file() and kind(path):
            yield path
