"""`./run_all.sh audit`: from files to an `audit.yaml`, to what can be run.

    python -m cai_em.audit plan FOLDER PATH...                  # drafts, and prints what it understood; the last line
                                                                # of stdout is the file to run
    python -m cai_em.audit export AUDIT.yaml FOLDER [eval|json] # responses and scores of a run as Inspect logs
    python -m cai_em.audit needs-inspect PATH...                # exit status 0: an Inspect log is among them, and its
                                                                # library is not here

Exit status of `plan`: 0, everything is known (or an `audit.yaml` was given that is settled): it can run; 3, drafted,
and a person must say what the files do not; 2, nothing that can be audited.
"""

from __future__ import annotations

import glob
import json
import sys
from pathlib import Path

from cai_em.audit import inspect_logs
from cai_em.audit.draft import FILE, draft, understood
from cai_em.audit.formats import find_files, recognise
from cai_em.audit.opening import AuditError, kind
from cai_em.records.files import root, write_text
from cai_em.study.entries import ParamsError
from cai_em.study.loading import load

OPEN = 3


def _paths(where: Path, given: list[str]) -> list[Path]:
    """Paths and globs, relative to where the command was typed.

    Raises:
        AuditError: a glob that finds nothing.
    """
    found: list[Path] = []
    for name in given:
        path = where / name
        if not path.exists() and any(c in name for c in "*?["):
            hits = sorted(glob.glob(str(path), recursive=True))
            if not hits:
                raise AuditError(f"{path}: nothing fits this pattern")
            found += map(Path, hits)
        else:
            found.append(path)
    return found


def _plan(where: Path, given: list[str]) -> int:
    """Draft and say what was understood; see the module."""
    paths = _paths(where, given)
    if len(paths) == 1 and paths[0].suffix in (".yaml", ".yml"):
        study = load(paths[0])
        if study.profile.source != "audit":
            raise AuditError(f"{paths[0]}: a profile, not an audit.yaml: ./run_all.sh {paths[0]} runs it")
        _another(study.dir, paths[0])
        print(study.name)
        print(paths[0].resolve())
        return 0
    known = load("published")
    found = draft(paths, personas=known.personas, datasets=known.datasets)
    file = _place(found.folder, where)
    if file.parent != found.folder:
        found = draft(paths, folder=file.parent, personas=known.personas, datasets=known.datasets)
    if file.exists() and file.read_text(encoding="utf-8") != found.text:
        raise AuditError(
            f"{file} is there already, and differs from what would be drafted now: ./run_all.sh audit {file} runs "
            f"it as it is; "
            "remove it for a new draft"
        )
    print(understood(found, found.assemble()), file=sys.stderr)
    write_text(file, found.text)
    print(f"\ndrafted: {file}", file=sys.stderr)
    if found.spec.unknown:
        print(f"Settle what is not known (in {file}, `unknown`), then: ./run_all.sh audit {file}", file=sys.stderr)
        return OPEN
    _another(load(file).dir, file)
    print(found.spec.name)
    print(file)
    return 0


def _another(results: Path, file: Path) -> None:
    """Refuse to write over the results of another study that has the same name.

    Raises:
        AuditError: they were made by another `audit.yaml`.
    """
    manifest = results / "07_audit" / "manifest.json"
    if not manifest.is_file():
        return
    inputs = json.loads(manifest.read_text(encoding="utf-8"))["inputs"]
    made_by = next((root() / name for name in inputs if Path(name).suffix in (".yaml", ".yml")), None)
    if made_by is not None and made_by.resolve() != file.resolve():
        raise AuditError(
            f"{results} holds the audit of {made_by}: give this one another `name` in {file}, or remove that run "
            f"(./run_all.sh clean {results.name})"
        )


def _place(folder: Path, where: Path) -> Path:
    """`audit.yaml` beside the files; where nothing can be written there, where the command was typed."""
    try:
        (folder / f".{FILE}.try").touch()
        (folder / f".{FILE}.try").unlink()
        return folder / FILE
    except OSError:
        return where / FILE


def needs_inspect(where: Path, given: list[str]) -> bool:
    """Whether an Inspect log is among some files while its library is not installed."""
    if inspect_logs.inspect_installed():
        return False
    paths = _paths(where, given)
    if len(paths) == 1 and paths[0].suffix in (".yaml", ".yml"):
        return "format: inspect" in paths[0].read_text(encoding="utf-8", errors="replace")
    for path in find_files(paths):
        if kind(path) == ".eval":
            return True
        if kind(path) == ".json":
            try:
                if recognise(path) == "inspect":
                    return True
            except AuditError:
                continue
    return False


def _export(name: str, folder: str, form: str = "eval") -> int:
    """Responses and scores of a run as Inspect logs."""
    from cai_em.records import tables

    study = load(name)
    responses = tables.read_all(study.response_files(), tables.RESPONSES)
    scores = tables.read_all(study.score_files(), tables.SCORES)
    written = inspect_logs.export(responses, scores, folder, form=form)
    print(f"{len(written)} logs in {folder}: inspect view --log-dir {folder}")
    return 0


def main(arguments: list[str]) -> int:
    """Command line; see the module."""
    try:
        match arguments:
            case ["plan", where, *given] if given:
                return _plan(Path(where), given)
            case ["needs-inspect", where, *given]:
                return 0 if needs_inspect(Path(where), given) else 1
            case ["export", name, folder, *form] if len(form) < 2:
                return _export(name, folder, *form)
    except (AuditError, ParamsError, FileNotFoundError) as error:
        print(f"audit: {error}", file=sys.stderr)
        return 2
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
