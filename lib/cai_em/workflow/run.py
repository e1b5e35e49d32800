"""Running notebooks: papermill under a lock, what failed, and the command line of manifests.

python -m cai_em.workflow.run execute notebooks/04_judge.ipynb OUT.ipynb '{"profile": "demo"}'
python -m cai_em.workflow.run verify demo
python -m cai_em.workflow.run seal demo
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cai_em.records.files import MissingFile, free_space, name_of, root
from cai_em.records.manifest import MANIFEST, VerificationError, seal, verify
from cai_em.study.entries import ParamsError
from cai_em.study.loading import load
from cai_em.study.study import Study
from cai_em.workflow.gpu import check_usable, one_gpu


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
        gpu.NoGpu: the job was given a GPU that PyTorch cannot use.
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
        on_gpu = int(os.environ.get("CAI_EM_JOB_GPUS", "0")) > 0
        held.enter_context(one_gpu(wanted=on_gpu))
        if on_gpu:
            check_usable()
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
            print(f"FAILED: {notebook}; the notebook with its error: {name_of(failed)}", file=sys.stderr)
            if isinstance(error, OSError):
                print(f"{type(error).__name__}: {error}; {free_space(failed)}", file=sys.stderr)
            raise
        os.replace(running, executed)
    return executed


def failures(results: str | Path) -> dict[Path, str]:
    """What failed in a run: the notebook as it stopped (or the paper's log) -> the last line of its log, the error.

    A notebook that was killed, or could not be written to its end, is still called `<name>.running.ipynb`.

    Args:
        results: `results/<profile>`.
    """
    results = Path(results)
    kinds = ("*.failed.ipynb", "*.running.ipynb")
    stopped = {path: _log_of(path, results) for path in sorted(p for kind in kinds for p in results.rglob(kind))}
    for log in sorted((results / "logs" / "01_teacher").glob("*.log")):
        if not (results / "01_personas" / "teacher" / f"{log.stem}.json").is_file():
            stopped[log] = log
    paper = results / "logs" / "paper.log"
    if paper.is_file() and not (results / "paper" / "index.html").is_file():
        stopped[paper] = paper
    return {path: _last_line(log) for path, log in stopped.items()}


def _log_of(notebook: Path, results: Path) -> Path:
    place = notebook.relative_to(results / "notebooks")
    return results / "logs" / place.with_name(place.name.rsplit(".", 2)[0] + ".log")


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.is_file() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), f"nothing in {name_of(log)}")


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
            except (ParamsError, MissingFile) as error:
                print(f"the parameters are not valid:\n{error}", file=sys.stderr)
                return 2
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
