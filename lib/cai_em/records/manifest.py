"""What a stage read and wrote, by hash, and whether it still is what it was.

- `write_manifest` / `verify` record, and later check, the SHA-256 of everything that a stage read and wrote; `seal`
  does so for a whole run: its document, paper and executed notebooks, and all the stages' manifests.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from cai_em.records.files import file_hash, name_of, root, write_text

MANIFEST = "manifest.json"
OF_THE_HOUR = ("written", "timings", "host", "usage")
"""What a manifest says of when and where its outputs were made and what that cost, and not of the outputs."""
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


def tree(paths: Iterable[str | Path]) -> dict[str, str]:
    """SHA-256 of each file; of a folder, of each file in it. Names are relative to the repository where possible."""
    found: dict[str, str] = {}
    for path in map(Path, paths):
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        for file in files:
            found[name_of(file)] = file_hash(file)
    return found


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
        The manifest's path. One that is there, and says the same of what went in, what came out and how, is kept as
        it is: when, how long and on which machine are of the run that made the outputs.
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
    text = json.dumps(record, indent=1, default=_plain, ensure_ascii=False) + "\n"
    path, new = Path(folder) / MANIFEST, json.loads(text)
    if path.is_file():
        with contextlib.suppress(ValueError):  # half a manifest is replaced
            old = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(old, dict) and _of_the_result(old) == _of_the_result(new):
                return path
    return write_text(path, text)


def _of_the_result(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in OF_THE_HOUR}


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
    raise ManifestError(f"{name_of(path)} is not a whole manifest ({why}): delete it, and its stage runs again")


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
    timings = {name_of(path.parent): read_manifest(path.parent)["timings"] for path in stages}
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
        f"{name_of(Path(folder) / MANIFEST)} is missing: the stage has not run to its end, or its manifest was removed"
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
                said.setdefault(name, []).append((digest, f"{kind[:-1]} of {name_of(path.parent)}"))
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
