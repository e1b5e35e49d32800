"""Running notebooks and vouching for what they wrote: papermill, manifests, verification.

- `execute` runs one notebook for one cell of the grid, under a lock, into an executed copy beside the results.
- `write_manifest` / `verify` record, and later check, the SHA-256 of everything that a stage read and wrote; `seal`
  does so for a whole run: its document, paper and executed notebooks, and all the stages' manifests.

    python -m cai_em.run execute notebooks/04_judge.ipynb results/demo/notebooks/04_judge.ipynb '{"profile": "demo"}'
    python -m cai_em.run verify demo
    python -m cai_em.run seal demo
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from cai_em.gpu import one_gpu
from cai_em.params import ParamsError, Study, file_hash, load, root

MANIFEST = "manifest.json"

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


class ManifestError(ValueError):
    """A manifest is not whole. The message names it."""


class VerificationError(RuntimeError):
    """Artefacts do not match their manifests. The message names each."""


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
    """A temporary path that becomes the file `path` when the block ends well, and vanishes when it does not."""
    path = Path(path)
    part = _part_of(path)
    try:
        yield part
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
    timings: dict[str, Any] | None = None,
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
        timings: seconds by phase (of a whole run: by stage and phase).
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
        ManifestError: the file is not a whole manifest.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: the stage has not run to its end; run ./run_all.sh")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if all(isinstance(record[kind], dict) for kind in ("inputs", "outputs")):
            return record
        why = "inputs and outputs must be mappings"
    except (ValueError, KeyError, TypeError) as error:
        why = str(error)
    raise ManifestError(f"{_name(path)} is not a whole manifest ({why}): delete it, and its stage runs again")


def seal(results: str | Path, **about: Any) -> Path:
    """Write a whole run's manifest, its last file: it vouches for what no stage does, and for the stages' manifests.

    Args:
        results: `results/<profile>`, finished.
        **about: `params`, and what else goes into it (see `write_manifest`).

    Returns:
        The manifest's path.
    """
    results = Path(results)
    stages = [path for path in sorted(results.rglob(MANIFEST)) if path.parent != results]
    notebooks = [
        path
        for path in sorted((results / "notebooks").rglob("*.ipynb"))
        if not path.stem.endswith((".running", ".failed")) and ".ipynb_checkpoints" not in path.parts
    ]
    timings = {_name(path.parent): read_manifest(path.parent)["timings"] for path in stages}
    made = [results / "RESULTS.md", results / "paper", *notebooks]
    return write_manifest(results, stage="run", inputs=stages, outputs=made, timings=timings, **about)


def verify(results: str | Path, expected: Iterable[str | Path] = ()) -> dict[str, int]:
    """Re-hash every artefact that a manifest below `results` names, and compare.

    Inputs are compared too: an input that has changed since means that the outputs are stale.

    Args:
        results: `results/<profile>`.
        expected: folders that must have a manifest (`Study.artefact_dirs`): a removed one would vouch for nothing.

    Returns:
        Counts: manifests; files compared; and inputs from elsewhere (a model's weights, say) that are no longer there,
        so that they cannot be compared.

    Raises:
        VerificationError: a file is missing or does not match, a manifest is missing or not whole; all are named, each
            once.
    """
    results = Path(results).resolve()
    counts = {"manifests": 0, "files": 0, "elsewhere": 0}
    wrong = [
        f"{_name(Path(folder) / MANIFEST)} is missing: the stage has not run to its end, or its manifest was removed"
        for folder in expected
        if not (Path(folder) / MANIFEST).is_file()
    ]
    said: dict[str, list[tuple[str, str]]] = {}
    for path in sorted(results.rglob(MANIFEST)):
        counts["manifests"] += 1
        try:
            record = read_manifest(path.parent)
        except ManifestError as error:
            wrong.append(str(error))
            continue
        for kind in ("inputs", "outputs"):
            for name, digest in record[kind].items():
                said.setdefault(name, []).append((digest, f"{kind[:-1]} of {_name(path.parent)}"))
    if not counts["manifests"]:
        raise VerificationError(f"{results}: no manifest found: nothing has run there")
    for name, claims in said.items():
        file = root() / name
        found = file_hash(file) if file.is_file() else None
        by_others = Path(name).is_absolute() and not file.resolve().is_relative_to(results)
        if found is None and by_others and all(who.startswith("input") for _, who in claims):
            counts["elsewhere"] += 1
            continue
        counts["files"] += 1
        by = [who for digest, who in claims if digest != found]
        if by:
            wrong.append(f"{name} {'is missing' if found is None else 'does not match'} ({', '.join(by)})")
    if wrong:
        raise VerificationError(
            f"{results.name}: {len(wrong)} of {counts['files']} files and {counts['manifests']} manifests are not as "
            "they were recorded:\n" + "\n".join(wrong)
        )
    return counts


def verify_profiles(names: Iterable[str]) -> bool:
    """`verify` for runs by name (all that have left a folder, if none is named), said on the screen.

    Args:
        names: profiles, or paths of profile files or of `results/<profile>`.

    Returns:
        Whether all is as recorded.
    """
    base = Path(os.environ.get("CAI_EM_RESULTS") or root() / "results")
    names = list(names) or sorted(p.name for p in base.glob("*") if p.is_dir() and any(p.rglob(MANIFEST)))
    if not names:
        print(f"{base}: no manifest found: nothing has run there", file=sys.stderr)
    sound = bool(names)
    for name in names:
        study = _study(name)
        folder = study.dir if study else base / Path(name).name
        try:
            counts = verify(folder, study.artefact_dirs() if study else ())
        except VerificationError as error:
            print(error, file=sys.stderr)
            sound = False
            continue
        print(f"{folder.name}: {counts['manifests']} manifests, {counts['files']} files: all match")
        if counts["elsewhere"]:
            print(f"  not compared: {counts['elsewhere']} inputs outside this folder that are no longer there")
        if study is None:
            print("  no profile of that name is left: whether a stage is missing is not known")
    return sound


def _study(name: str) -> Study | None:
    """The study of a profile, or of the profile whose results lie in a folder; None where there is no such profile."""
    profile = name if Path(name).suffix == ".yaml" else Path(name).name
    known = Path(profile) if profile.endswith(".yaml") else root() / "params" / "profiles" / f"{profile}.yaml"
    return load(profile) if known.is_file() else None


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
        OSError: the copy could not be written, on a full disk for example; what there is of it is kept too.
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
        except (papermill.PapermillExecutionError, OSError) as error:
            if running.is_file():  # a full disk leaves no room for the copy, or for half of it
                os.replace(running, failed)
            print(f"FAILED: {notebook}; the notebook with its error: {_name(failed)}", file=sys.stderr)
            if isinstance(error, OSError):
                print(f"{type(error).__name__}: {error}; {free_space(failed)}", file=sys.stderr)
            raise
        os.replace(running, executed)
    return executed


def free_space(path: str | Path) -> str:
    """How much room there is where a file lies, in words."""
    usage = shutil.disk_usage(Path(path).parent)
    return f"{usage.free / 1e9:,.1f} GB of {usage.total / 1e9:,.1f} GB are free at {_name(Path(path).parent)}"


def failures(results: str | Path) -> dict[Path, str]:
    """What failed in a run: the notebook as it stopped (or the paper's log) -> the last line of its log, the error.

    A notebook that was killed, or could not be written to its end, is still called `<name>.running.ipynb`.

    Args:
        results: `results/<profile>`.
    """
    results = Path(results)
    kinds = ("*.failed.ipynb", "*.running.ipynb")
    stopped = {path: _log_of(path, results) for path in sorted(p for kind in kinds for p in results.rglob(kind))}
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
    """Command line: `execute NOTEBOOK EXECUTED JSON`, `seal PROFILE` or `verify [PROFILE ...]`."""
    match arguments:
        case ["execute", notebook, executed, parameters]:
            execute(notebook, executed, json.loads(parameters))
        case ["seal", profile]:
            study = load(profile)
            print(seal(study.dir, params={"profile": study.profile}, seeds={"training": study.profile.seeds}))
        case ["verify", *names]:
            try:
                return 0 if verify_profiles(names) else 1
            except ParamsError as error:
                print(f"the parameters are not valid:\n{error}", file=sys.stderr)
                return 2
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
