"""Running notebooks and vouching for what they wrote: papermill, manifests, staleness, verification.

- `execute` runs one notebook for one cell of the grid, under a lock, into an executed copy beside the results.
- `write_manifest` / `verify` record, and later check, the SHA-256 of everything that a stage read and wrote.
- `code_hash` tells whether a notebook's code, or a library module that it imports, has changed in meaning.

    python -m cai_em.run execute notebooks/04_judge.ipynb results/demo/notebooks/04_judge.ipynb '{"profile": "demo"}'
    python -m cai_em.run verify results/demo
"""

from __future__ import annotations

import ast
import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from cai_em.gpu import one_gpu
from cai_em.params import ParamsError, Study, file_hash, load, root

MANIFEST = "manifest.json"

NOT_HASHED = {"params", "run"}
"""Library modules that `code_hash` leaves out: what a stage takes from them is in its settings (`Study.settings`)."""

RECORDED_PACKAGES = [
    "torch",
    "transformers",
    "trl",
    "peft",
    "datasets",
    "accelerate",
    "unsloth",
    "vllm",
    "openai",
    "numpy",
    "pandas",
    "scipy",
    "statsmodels",
    "scikit-learn",
    "pyarrow",
    "matplotlib",
    "seaborn",
    "papermill",
    "snakemake",
]


class VerificationError(RuntimeError):
    """Artefacts do not match their manifests. The message names each."""


# --- Files ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A temporary path that becomes `path` when the block ends well, and vanishes when it does not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part{os.getpid()}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> Path:
    """Write a text file atomically, as UTF-8. Lone surrogates (never valid text) are written as `\\udXXX`."""
    with atomic(path) as part:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")
    return Path(path)


def tree(paths: Iterable[str | Path]) -> dict[str, str]:
    """SHA-256 of each file; of a folder, of each file in it. Names are relative to the repository where possible."""
    found: dict[str, str] = {}
    for path in map(Path, paths):
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        for file in files:
            found[_name(file)] = file_hash(file)
    return found


def _name(path: Path) -> str:
    path = path.resolve()
    return str(path.relative_to(root())) if path.is_relative_to(root()) else str(path)


# --- Manifests -----------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Versions of Python, of this project, and of the packages that results depend on (absent ones left out)."""
    found = {"python": platform.python_version(), "cai-em": importlib.metadata.version("cai-em")}
    for package in RECORDED_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def run_id(*parts: Any) -> str:
    """A short name of a job, the same whenever its inputs are the same."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=_plain).encode()).hexdigest()[:12]


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        return value.item()
    if hasattr(value, "__dataclass_fields__"):
        return {name: getattr(value, name) for name in value.__dataclass_fields__}
    return str(value)


def write_manifest(
    folder: str | Path,
    *,
    stage: str,
    inputs: Iterable[str | Path],
    outputs: Iterable[str | Path],
    params: Any,
    seeds: Any = None,
    adapter_state: Any = None,
    timings: dict[str, float] | None = None,
    **more: Any,
) -> Path:
    """Write `manifest.json`, the last file of a stage: what went in, what came out, and how.

    Args:
        folder: the stage's folder.
        stage: its name, e.g. `02_finetune`.
        inputs: files or folders read (each is hashed).
        outputs: files or folders written (each is hashed).
        params: what the stage was asked for (preset objects are written out in full).
        seeds: every seed used.
        adapter_state: which adapters were active and trainable, as measured on the parameters.
        timings: seconds by phase.
        **more: anything else worth keeping, under its own key.

    Returns:
        The manifest's path.
    """
    record = {
        "stage": stage,
        "run_id": run_id(stage, params, seeds),
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "inputs": tree(inputs),
        "outputs": tree(outputs),
        "params": params,
        "seeds": seeds,
        "adapter_state": adapter_state,
        "timings": timings or {},
        "versions": versions(),
        "host": {
            "system": platform.system(),
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
            "threads": os.environ.get("OMP_NUM_THREADS"),
        },
        **more,
    }
    return write_text(Path(folder) / MANIFEST, json.dumps(record, indent=1, default=_plain, ensure_ascii=False) + "\n")


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a stage's folder.

    Raises:
        FileNotFoundError: the stage has not run, or not to its end.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: the stage has not run to its end; run ./run_all.sh")
    return json.loads(path.read_text(encoding="utf-8"))


def verify(results: str | Path) -> dict[str, int]:
    """Re-hash every artefact that a manifest below `results` names, and compare.

    Inputs are compared too: an input that has changed since means that the outputs are stale.

    Returns:
        Counts: manifests, files checked.

    Raises:
        VerificationError: a file is missing or does not match; all of them are named.
    """
    counts = {"manifests": 0, "files": 0}
    wrong: list[str] = []
    hashes: dict[str, str | None] = {}
    for path in sorted(Path(results).rglob(MANIFEST)):
        counts["manifests"] += 1
        record = json.loads(path.read_text(encoding="utf-8"))
        for kind in ("inputs", "outputs"):
            for name, expected in record[kind].items():
                if name not in hashes:
                    file = root() / name
                    hashes[name] = file_hash(file) if file.is_file() else None
                    counts["files"] += 1
                if hashes[name] != expected:
                    what = "is missing" if hashes[name] is None else "does not match"
                    wrong.append(f"{_name(path)}: {kind[:-1]} {name} {what}")
    if not counts["manifests"]:
        raise VerificationError(f"{results}: no manifest found: nothing has run there")
    if wrong:
        raise VerificationError(f"{len(wrong)} of {counts['files']} files do not match:\n" + "\n".join(wrong))
    return counts


# --- Staleness -----------------------------------------------------------------------------------------------------


def _imports(source: str) -> Iterator[str]:
    """Names of the `cai_em` modules that a piece of code imports, wherever in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("cai_em."):
                    yield alias.name.split(".")[1]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            if node.module == "cai_em":
                yield from (alias.name for alias in node.names)
            elif node.module.startswith("cai_em."):
                yield node.module.split(".")[1]


def _meaning(source: str) -> str:
    """A module's syntax tree without docstrings: comments, layout and documentation do not change results."""
    parsed = ast.parse(source)
    for node in ast.walk(parsed):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
            and isinstance(body[0].value.value, str)
        ):
            body[0].value.value = ""
    return ast.dump(parsed)


@cache
def _module(path: Path) -> tuple[str, frozenset[str]]:
    source = path.read_text(encoding="utf-8")
    return _meaning(source), frozenset(_imports(source))


def modules_of(source: str, package: Path) -> list[Path]:
    """Files of the library modules that a piece of code imports, transitively; `NOT_HASHED` ones left out."""
    todo, found = set(_imports(source)), set()
    while todo:
        name = todo.pop()
        path = package / f"{name}.py"
        if name in NOT_HASHED or path in found or not path.is_file():
            continue
        found.add(path)
        todo |= _module(path)[1]
    return sorted(found)


def code_cells(notebook: str | Path) -> str:
    """The source of a notebook's code cells, without injected parameters and IPython magics."""
    cells = json.loads(Path(notebook).read_text(encoding="utf-8"))["cells"]
    source = (
        "".join(cell["source"])
        for cell in cells
        if cell["cell_type"] == "code" and "injected-parameters" not in cell.get("metadata", {}).get("tags", [])
    )
    return "\n".join(line for line in "\n".join(source).splitlines() if not line.lstrip().startswith(("%", "!")))


def code_hash(notebook: str | Path) -> str:
    """Hash of what a notebook computes: its code cells and the library modules that it imports, transitively.

    Prose, comments, docstrings and layout do not count; `params` and `run` neither (see `NOT_HASHED`).
    """
    source = code_cells(notebook)
    found = hashlib.sha256(_meaning(source).encode())
    for path in modules_of(source, Path(__file__).parent):
        found.update(path.name.encode() + _module(path)[0].encode())
    return found.hexdigest()[:16]


# --- Execution -----------------------------------------------------------------------------------------------------


def execute(notebook: str | Path, executed: str | Path, parameters: dict[str, Any]) -> Path:
    """Run a notebook with papermill and keep the executed copy.

    A lock beside the copy makes a second run of the same cell wait: a killed Snakemake may leave one running. The
    copy is written as it goes to `<name>.running.ipynb` (what a failed run leaves to look at is `<name>.failed.ipynb`).
    With `CAI_EM_JOB_GPUS` above 0 in the environment (a rule's `gpu`), the kernel sees one free GPU and no other.

    Args:
        notebook: the source notebook.
        executed: where the executed copy goes.
        parameters: values for its `parameters` cell; each must be one that the cell declares.

    Raises:
        ValueError: a parameter that the notebook does not declare.
        papermill.PapermillExecutionError: a cell raised.
    """
    import papermill
    from traitlets.config import Config

    notebook, executed = Path(notebook), Path(executed)
    declared = papermill.inspect_notebook(str(notebook))
    unknown = sorted(set(parameters) - set(declared))
    if unknown:
        raise ValueError(f"{notebook} declares no parameter {unknown} (its parameters: {sorted(declared)})")
    executed.parent.mkdir(parents=True, exist_ok=True)
    running = executed.with_name(f"{executed.stem}.running.ipynb")
    failed = executed.with_name(f"{executed.stem}.failed.ipynb")
    # Sockets in a folder of this run's own: kernels started in parallel race for TCP ports, and every user of the
    # machine can reach those.
    with (
        executed.with_name(f".{executed.name}.lock").open("w") as lock,
        tempfile.TemporaryDirectory(prefix="cai-em-") as sockets,
        contextlib.ExitStack() as held,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        held.enter_context(one_gpu(wanted=int(os.environ.get("CAI_EM_JOB_GPUS", "0")) > 0))
        failed.unlink(missing_ok=True)
        try:
            papermill.execute_notebook(
                str(notebook),
                str(running),
                parameters,
                kernel_name="cai-em",
                cwd=str(root()),
                progress_bar=False,
                log_output=True,
                stdout_file=sys.stdout,
                stderr_file=sys.stderr,
                request_save_on_cell_execute=True,
                config=Config({"KernelManager": {"transport": "ipc", "ip": f"{sockets}/kernel"}}),
            )
        except papermill.PapermillExecutionError:
            os.replace(running, failed)
            print(f"FAILED: {notebook}; the notebook with its error: {_name(failed)}", file=sys.stderr)
            raise
        os.replace(running, executed)
    return executed


def failures(results: str | Path) -> dict[Path, str]:
    """What failed in a run: the notebook as it stopped (or the paper's log) -> the last line of its log, the error.

    Args:
        results: `results/<profile>`.
    """
    results = Path(results)
    stopped = {path: _log_of(path, results) for path in sorted(results.rglob("*.failed.ipynb"))}
    paper = results / "logs" / "paper.log"
    if paper.is_file() and not (results / "paper" / "index.html").is_file():
        stopped[paper] = paper
    return {path: _last_line(log) for path, log in stopped.items()}


def _log_of(notebook: Path, results: Path) -> Path:
    place = notebook.relative_to(results / "notebooks")
    return results / "logs" / place.with_name(place.name.rsplit(".", 2)[0] + ".log")


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.is_file() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), f"nothing in {_name(log)}")


def main(arguments: list[str]) -> int:
    """Command line: `execute NOTEBOOK EXECUTED JSON` or `verify FOLDER`."""
    match arguments:
        case ["execute", notebook, executed, parameters]:
            execute(notebook, executed, json.loads(parameters))
        case ["verify", folder]:
            try:
                counts = verify(folder)
            except VerificationError as error:
                print(error, file=sys.stderr)
                return 1
            print(f"{counts['manifests']} manifests, {counts['files']} files: all match")
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
