"""SLURM: its settings are read, and the same grid through a real one of one node gives equal tables."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from tests.test_workflow import clone, run_all

here_runs_slurm = pytest.mark.skipif(
    os.geteuid() != 0 or not all(map(shutil.which, ("slurmctld", "slurmd", "munged"))),
    reason="needs root and Debian's slurm-wlm and munge",
)

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


@pytest.mark.parametrize("extra", [[], ONE_SMALL_NODE], ids=["as shipped", "one small node"])
def test_the_full_study_plans_with_the_slurm_settings(extra, root):
    """Needs no SLURM: a setting that Snakemake cannot read would stop a cluster run before its first job."""
    done = run_all(root, "paper", "--profile", "slurm", "--dry-run", "--quiet", "all", *extra)
    assert "judge calls" in done.stdout, "the plan is printed after the jobs"


@pytest.mark.slow
@here_runs_slurm
def test_micro_through_slurm_equals_micro_here(slurm, tmp_path_factory):
    root = Path(__file__).parents[1]
    here, there = (clone(root, tmp_path_factory.mktemp(name)) for name in ("local", "slurm"))
    run_all(here, "micro")
    done = run_all(there, "micro", "--profile", "slurm", "--jobs", "8", *ONE_SMALL_NODE)
    (log,) = (there / ".snakemake" / "log").glob("*.log")
    assert "SLURM" in log.read_text()
    assert "sample tiny: " in done.stderr
    tables = [
        p.relative_to(here) for p in sorted((here / "results/micro").rglob("*.parquet")) if "cells" not in p.parts
    ]
    assert len(tables) > 10
    for table in tables:
        if table.name == "log.parquet":
            continue
        mine, theirs = pd.read_parquet(here / table), pd.read_parquet(there / table)
        pd.testing.assert_frame_equal(mine, theirs, obj=str(table))


RULES = """
import sys
from pathlib import Path
from snakemake.api import SnakemakeApi
from snakemake.settings import types as s

with SnakemakeApi(s.OutputSettings(quiet={s.Quietness.ALL})) as api:
    workflow = api.workflow(
        resource_settings=s.ResourceSettings(cores=1), config_settings=s.ConfigSettings(config={"profile": "paper"}),
        storage_settings=s.StorageSettings(), workflow_settings=s.WorkflowSettings(),
        deployment_settings=s.DeploymentSettings(), snakefile=Path("Snakefile"),
    )._workflow
    for rule in workflow.rules:
        used = rule.resources.get("api")
        print(rule.name, rule.name in workflow._localrules, used.value if used.value else 0)
"""


@pytest.mark.parametrize("here", [True, False])
def test_what_judges_shares_the_limit_and_judging_can_stay_on_the_login_node(root, here):
    """Trajectories and steering judge too, and need a GPU; of the rest `judge` and `teach` talk to an API."""
    done = subprocess.run(
        [sys.executable, "-c", RULES], cwd=root, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(root / "lib"), "CAI_EM_LOCAL_RULES": "judge" if here else ""},
    )  # fmt: skip
    rules = {name: (local, int(api)) for name, local, api in map(str.split, done.stdout.splitlines())}
    assert {name for name, (_, api) in rules.items() if api} == {"judge", "teach", "trajectories", "steering"}
    assert {name for name, (local, _) in rules.items() if local == "True"} == ({"judge"} if here else set())
