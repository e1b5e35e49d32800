"""The same grid through a real SLURM of one node: equal tables. Skipped where SLURM's daemons or root are absent."""

import os
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from tests.test_workflow import clone, run_all

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.geteuid() != 0 or not all(map(shutil.which, ("slurmctld", "slurmd", "munged"))),
        reason="needs root and Debian's slurm-wlm and munge",
    ),
]

ONE_SMALL_NODE = [
    "--slurm-status-command=squeue",
    "--slurm-no-account",
    "--slurm-init-seconds-before-status-checks=2",
    "--seconds-between-status-checks=3",
    "--default-resources=mem_mb=1800",
    "--default-resources=runtime=20",
    "--default-resources=slurm_partition=test",
    "--set-resources=persona:mem_mb=1800",
    "--set-resources=finetune:mem_mb=1800",
    "--set-resources=sample:mem_mb=1800",
    "--set-resources=judge:mem_mb=1800",
    "--latency-wait=20",
]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    script = str(Path(__file__).with_name("slurm_up.sh"))
    subprocess.run([script, "up", str(folder)], check=True)
    yield
    subprocess.run([script, "down", str(folder)], check=True)


def test_micro_through_slurm_equals_micro_here(slurm, tmp_path_factory):
    root = Path(__file__).parents[1]
    here, there = (clone(root, tmp_path_factory.mktemp(name)) for name in ("local", "slurm"))
    run_all(here, "micro")
    done = run_all(there, "micro", "--profile", "slurm", "--jobs", "8", *ONE_SMALL_NODE)
    assert "SLURM" in done.stderr
    tables = [
        p.relative_to(here) for p in sorted((here / "results/micro").rglob("*.parquet")) if "cells" not in p.parts
    ]
    assert len(tables) > 10
    for table in tables:
        if table.name == "log.parquet":
            continue
        mine, theirs = pd.read_parquet(here / table), pd.read_parquet(there / table)
        pd.testing.assert_frame_equal(mine, theirs, obj=str(table))
