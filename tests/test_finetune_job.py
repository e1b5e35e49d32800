"""A persona's trainings in one job: killed, or stopped by an error, in its third cell, it keeps two and goes on.

The tiny model with four data sets, each trained long enough to be caught at it.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from tests.test_workflow import clone, planned, run_all

DATASETS = ["bad_medical", "good_medical", "insecure", "technical_kl"]
PLACE = "results/jobs/02_finetune/tiny/baseline"


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A clone in which the job has run undisturbed, on profile `jobs`."""
    place = clone(Path(__file__).parents[1], tmp_path_factory.mktemp("clone"))
    micro = yaml.safe_load((place / "params/profiles/micro.yaml").read_text())
    for part in ("trajectory", "steering", "manipulation"):
        del micro[part]
    grid = [{"personas": ["baseline"], "datasets": ["none", *DATASETS]}]
    (place / "params/profiles/jobs.yaml").write_text(yaml.safe_dump(micro | {"grid": grid, "em_training": "long_em"}))
    presets = yaml.safe_load((place / "params/training.yaml").read_text())
    presets["long_em"] = {**presets["micro_em"], "lora": dict(presets["micro_em"]["lora"]), "max_steps": 60}
    (place / "params/training.yaml").write_text(yaml.safe_dump(presets, sort_keys=False))
    only_job(place)
    return place


def only_job(place: Path, check: bool = True) -> subprocess.CompletedProcess:
    """The fine-tuning job alone, with what it needs."""
    return run_all(place, "jobs", "--until", "finetune", check=check)


def adapters(place: Path) -> dict[str, bytes]:
    """Every cell's adapter, by its data set."""
    found = (place / PLACE).glob("*/seed0/adapter/adapter_model.safetensors")
    return {path.relative_to(place / PLACE).parts[0]: path.read_bytes() for path in found}


def manifests(place: Path) -> dict[str, int]:
    """When each finished cell's manifest was written, by its data set."""
    found = (place / PLACE).glob("*/seed0/manifest.json")
    return {path.relative_to(place / PLACE).parts[0]: path.stat().st_mtime_ns for path in found}


@pytest.fixture
def again(plain, tmp_path) -> Path:
    """A copy of the clone without what the job made."""
    place = tmp_path / "copy"
    shutil.copytree(plain, place)
    shutil.rmtree(place / "results/jobs")
    shutil.rmtree(place / ".snakemake")
    return place


def finished_like(place: Path, plain: Path, kept: dict[str, int]) -> None:
    """Started again, the job makes what was missing, and all is as if nothing had happened."""
    only_job(place)
    assert adapters(place) == adapters(plain), "byte for byte those of an undisturbed run"
    after = manifests(place)
    assert len(after) == 4
    assert {name: after[name] for name in kept} == kept, "what was finished was not made again"
    assert sorted(json.loads((place / PLACE / "job1.json").read_text())) == sorted(f"{d}/seed0" for d in DATASETS)


def test_one_job_trains_all_cells_and_is_done(plain):
    assert sorted(adapters(plain)) == sorted(DATASETS)
    assert planned(plain, "--until", "finetune", profile="jobs") == {}


def test_an_error_in_the_third_cell_keeps_two(again, plain):
    """Snakemake removes what a failed job has declared: finished cells are not among it."""
    order = list(json.loads((plain / PLACE / "job1.json").read_text()))
    third = order[2].partition("/")[0]
    in_the_way = again / PLACE / third / "seed0" / "log.parquet"
    in_the_way.mkdir(parents=True)
    done = only_job(again, check=False)
    assert done.returncode != 0
    assert "log.parquet" in done.stdout + done.stderr, "the error is on the terminal"
    kept = manifests(again)
    assert sorted(kept) == sorted(name.partition("/")[0] for name in order[:2])
    in_the_way.rmdir()
    finished_like(again, plain, kept)


def test_a_kill_in_the_third_cell_keeps_two(again, plain):
    """SIGKILL for the whole family: shell, Snakemake, runner and kernel."""
    environment = {
        **os.environ,
        "CONDA_DEFAULT_ENV": "cai-em",
        "CONDA_PREFIX": str(Path(sys.executable).parents[1]),
        "CAI_EM_SKIP_SETUP": "1",
        "PYTHONPATH": str(again / "lib"),
    }
    started = subprocess.Popen(
        ["./run_all.sh", "jobs", "--until", "finetune"], cwd=again, env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        while len(manifests(again)) < 2:
            assert started.poll() is None
            time.sleep(0.01)
    finally:
        family = [psutil.Process(started.pid), *psutil.Process(started.pid).children(recursive=True)]
        for process in family:
            process.send_signal(signal.SIGKILL)
        psutil.wait_procs(family, timeout=120)
        started.wait()
    kept = manifests(again)
    assert 2 <= len(kept) < 4, "killed in the third cell; on a loaded machine perhaps in the fourth"
    finished_like(again, plain, kept)


def test_a_lost_adapter_is_made_again_and_nothing_else(again, plain):
    only_job(again)
    kept = manifests(again)
    lost = again / PLACE / "insecure/seed0/adapter/adapter_model.safetensors"
    lost.unlink()
    del kept["insecure"]
    finished_like(again, plain, kept)


def test_parts_of_a_persona_give_the_same_adapters(again, plain):
    profile = again / "params/profiles/jobs.yaml"
    profile.write_text(profile.read_text() + "cells_per_job: 3\n")
    only_job(again)
    assert adapters(again) == adapters(plain)
    assert sorted(p.name for p in (again / PLACE).glob("job*.json")) == ["job1.json", "job2.json"]


def test_the_notebook_opens_for_a_single_cell(plain, tmp_path):
    """As a reviewer runs it, with its own parameters: finished before, shown."""
    before = manifests(plain)
    given = {"profile": "jobs", "model": "tiny", "persona": "baseline", "dataset": "insecure", "seed": 0}
    code = "import json, sys; from cai_em.workflow.run import execute; execute(*sys.argv[1:3], json.loads(sys.argv[3]))"
    out = tmp_path / "one.ipynb"
    subprocess.run(
        [sys.executable, "-c", code, str(plain / "notebooks/02_finetune.ipynb"), str(out), json.dumps(given)],
        cwd=plain, env={**os.environ, "PYTHONPATH": str(plain / "lib")}, check=True, capture_output=True,
    )  # fmt: skip
    assert "1 cells, 0 of them to be trained" in out.read_text()
    assert manifests(plain) == before
