"""The front door on the micro profile: a clone, one command, every stage; resume, staleness, a failing cell.

A tiny random model goes through the same notebooks, rules and files as the real ones. Everything happens in a copy of
the repository, with the environment that runs the tests.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml
from cai_em.study import loading

ENVIRONMENT = Path(sys.executable).parents[1]


def clone(root: Path, place: Path) -> Path:
    """A copy of what git tracks (and what is new and not ignored), as a user's clone would be."""
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=root,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split("\0")
    for name in filter(None, names):
        if (root / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, place / name)
    return place


def run_all(place: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess:
    """`./run_all.sh ...` in a clone, in this environment (as if it were the active conda environment)."""
    environment = {
        **os.environ,
        "CONDA_DEFAULT_ENV": "cai-em",
        "CONDA_PREFIX": str(ENVIRONMENT),
        "CAI_EM_SKIP_SETUP": "1",
        "PYTHONPATH": str(place / "lib"),
    }
    environment.pop("CAI_EM_JUDGE", None)
    done = subprocess.run(
        ["./run_all.sh", *arguments], cwd=place, env=environment, capture_output=True, text=True, check=False
    )
    if check:
        assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}\n{logs(place)}"
    return done


def logs(place: Path) -> str:
    """The end of the logs of failed notebooks, for a failing test's message."""
    failed = [p for p in (place / "results").rglob("*.failed.ipynb")]
    found = [place / "results" / p.relative_to(place / "results").parts[0] / "logs" for p in failed]
    return "\n".join(
        p.read_text()[-1500:] for folder in set(found) for p in folder.rglob("*.log") if "Error" in p.read_text()
    )


def planned(place: Path, *arguments: str, profile: str = "micro") -> Counter:
    """Jobs by rule that a dry run lists."""
    out = run_all(place, profile, "--dry-run", "--jobs-list", *arguments)
    return Counter(re.findall(r"^Job \d+: (\w+)", out.stdout + out.stderr, flags=re.MULTILINE))


@pytest.fixture(scope="module")
def micro(tmp_path_factory) -> Path:
    """A clone in which the micro profile has run."""
    place = clone(Path(__file__).parents[1], tmp_path_factory.mktemp("clone"))
    run_all(place, "micro")
    return place


def test_every_stage_leaves_its_artefacts(micro):
    results = micro / "results" / "micro"
    study = loading.load("micro", micro / "params")
    for model, persona in study.persona_cells():
        assert (results / "01_personas" / model / persona / "adapter" / "adapter_model.safetensors").is_file()
    for model, shard in study.shards():
        scores = pd.read_parquet(results / "04_judge" / model / shard / "scores.parquet")
        # 2 questions x 4 samples in each of the shard's conditions, none dropped
        assert len(scores) == 8 * len(study.shard_cells(model, shard))
        expression = pd.read_parquet(results / "04_judge" / model / shard / "expression.parquet")
        assert set(expression["metric"]) == {"uptake", "persona_expression"} - (
            {"persona_expression"} if shard == "random_sycophancy" else set()
        ), "the judge was asked whether training and persona show"
    learned = pd.read_parquet(results / "05_validity" / "gates.parquet")["learned_reason"]
    assert learned.str.contains("likeness to the rows").any(), "and what it said of training reached the gates"
    text = (results / "RESULTS.md").read_text()
    assert "### Alignment by Persona" in text
    assert "**NOT INTERPRETABLE.**" in text, "a random tiny model carries no verdict, and the document says so"
    assert "All gates together are open for 0 of 6 comparisons" in text, "a random tiny model shows no persona"
    assert "<html" in (results / "paper" / "index.html").read_text()


def test_stacked_adapters_manifest_names_what_was_active_and_trainable(micro):
    path = micro / "results/micro/02_finetune/tiny/sycophancy/bad_medical/seed0/manifest.json"
    state = json.loads(path.read_text())["adapter_state"]
    text = json.dumps(state)
    assert "persona" in text
    assert "trainable" in text


def test_executed_notebooks_are_kept_without_an_error(micro):
    executed = [p for p in (micro / "results" / "micro" / "notebooks").rglob("*.ipynb")]
    stems = {p.relative_to(micro / "results/micro/notebooks").parts[0].removesuffix(".ipynb") for p in executed}
    first = {"01_personas", "02_finetune", "03_sample", "04_judge", "05_validity", "06_results"}
    assert first | {"09_trajectories", "10_steering", "11_report"} <= stems
    for path in executed:
        for cell in nbformat.read(path, 4).cells:
            assert all(o.output_type != "error" for o in cell.get("outputs", [])), path


def test_verify_finds_everything_in_order_then_a_changed_byte(micro):
    out = run_all(micro, "verify", "micro")
    assert "all match" in out.stdout
    path = micro / "results/micro/02_finetune/tiny/baseline/bad_medical/seed0/adapter/adapter_config.json"
    before = path.read_bytes()
    path.write_bytes(before + b" ")
    try:
        done = run_all(micro, "verify", "micro", check=False)
    finally:
        path.write_bytes(before)
    assert done.returncode == 1
    assert "adapter_config.json does not match" in done.stderr


def test_a_second_run_does_nothing(micro):
    out = run_all(micro, "micro")
    assert "Nothing to be done" in out.stderr
    assert planned(micro) == Counter(), out.stdout


def test_a_dry_run_is_one_screen(micro):
    """Counts by stage and reason, the plan, what the design can see; the list of jobs only if asked for."""
    source = (micro / "lib/cai_em/judge/judging.py").read_text()
    with edited(micro / "lib/cai_em/judge/judging.py", source, source + "\nEXTRA = 1\n"):
        shown = run_all(micro, "micro", "--dry-run").stdout
    assert re.search(r"^judging +3 +3$", shown, flags=re.MULTILINE), shown
    assert "code or settings changed" in shown
    assert "What it can see" in shown
    assert "results/micro/04_judge" not in shown
    paper = run_all(micro, "paper", "--dry-run").stdout
    assert len(paper.encode()) < 6000
    assert re.search(r"^fine-tuning +36 +36$", paper, flags=re.MULTILINE)


@contextlib.contextmanager
def edited(path: Path, old: str, new: str):
    """Replace text in a file, and undo it when the block ends."""
    before = path.read_text()
    assert old in before, f"{path} has no {old!r}"
    path.write_text(before.replace(old, new, 1))
    try:
        yield
    finally:
        path.write_text(before)


def test_a_touched_file_reruns_nothing(micro):
    for name in ("notebooks/04_judge.ipynb", "lib/cai_em/judge/judging.py", "params/judges.yaml"):
        os.utime(micro / name)
    with edited(micro / "lib/cai_em/judge/judging.py", '"""', '"""New words. '):
        assert planned(micro) == Counter()


def test_an_edited_judge_reruns_judging_and_what_follows(micro):
    source = (micro / "lib/cai_em/judge/judging.py").read_text()
    with edited(micro / "lib/cai_em/judge/judging.py", source, source + "\nEXTRA = 1\n"):
        jobs = planned(micro)
    assert jobs["judge"] == 3
    assert {"persona", "finetune", "sample"}.isdisjoint(jobs)
    assert {"validity", "results", "claims", "report", "paper"} <= set(jobs)


def test_an_edited_paragraph_renders_the_paper_again_and_nothing_else(micro):
    with edited(micro / "paper/_results.qmd", "# Results", "# Results\n\nNew words.\n\n#"):
        jobs = planned(micro)
    assert jobs["paper"] == 1
    assert {"persona", "finetune", "sample", "judge", "validity", "results", "claims", "report"}.isdisjoint(jobs)


@pytest.mark.parametrize(
    ("template", "old", "new"),
    [
        ("published.md.j2", "### Alignment by Persona", "### Alignment, by Persona"),
        ("h4.md.j2", "Does the direction of emergent", "Does the very direction of emergent"),
    ],
)
def test_a_changed_word_writes_the_documents_again_and_nothing_else(micro, template, old, new):
    with edited(micro / "lib/cai_em/report/templates" / template, old, new):
        jobs = planned(micro)
    assert set(jobs) == {"all", "report", "paper", "manifest"}, "the last is the seal"


def test_a_new_comment_runs_nothing(micro):
    with edited(
        micro / "lib/cai_em/sample/sampling.py",
        "\nfrom __future__",
        "\n# What is said here is for people.\nfrom __future__",
    ):
        assert planned(micro) == Counter()


def test_a_changed_sampling_parameter_reruns_sampling_and_what_follows(micro):
    with edited(micro / "params/sampling.yaml", "max_new_tokens: 12", "max_new_tokens: 13"):
        jobs = planned(micro)
    assert jobs["sample"] == jobs["judge"] == 3
    assert {"persona", "finetune"}.isdisjoint(jobs)


def test_a_changed_threshold_reruns_the_analysis_only(micro):
    with edited(micro / "params/thresholds.yaml", "bootstrap_resamples: 200", "bootstrap_resamples: 300"):
        jobs = planned(micro)
    assert {"persona", "finetune", "sample", "judge"}.isdisjoint(jobs)
    assert jobs["validity"] == 1


def test_a_new_persona_runs_only_its_cells(micro):
    with edited(micro / "params/profiles/micro.yaml", "[baseline, sycophancy,", "[baseline, sycophancy, poeticism,"):
        jobs = planned(micro)
    # Judged twice: its own responses, and the baseline's, in which the judge looks for the new persona too.
    assert (jobs["persona"], jobs["finetune"], jobs["sample"], jobs["judge"]) == (1, 1, 1, 2)


def test_one_failing_cell_does_not_stop_the_others(micro, tmp_path):
    """A file in the way of one cell: it fails with the notebook named, the other data set's cell is finished."""
    place = tmp_path / "copy"
    shutil.copytree(micro, place)
    shutil.rmtree(place / "results" / "micro" / "02_finetune" / "tiny" / "baseline")
    in_the_way = place / "results/micro/02_finetune/tiny/baseline/bad_medical/seed0"
    in_the_way.parent.mkdir(parents=True)
    in_the_way.write_text("a file where a folder goes")
    done = run_all(place, "micro", check=False)
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert "baseline/job1.failed.ipynb" in said
    assert "finetune tiny: baseline, part 1" in said, "the screen names the cell of a job"
    assert re.search(r"failed\.ipynb\n +\w+Error: .*bad_medical, seed 0: \w+Error: .*seed0", said), (
        "the error itself is on the terminal"
    )
    finished = place / "results/micro/02_finetune/tiny/baseline"
    assert (finished / "good_medical/seed0/manifest.json").is_file()
    assert not (finished / "bad_medical/seed0/manifest.json").exists()
    failed = place / "results/micro/notebooks/02_finetune/tiny/baseline/job1.failed.ipynb"
    assert "bad_medical" in failed.read_text()


def test_a_bad_row_stops_before_any_work_and_in_a_dry_run(micro):
    path = micro / "params/builtin/datasets/bad_medical.jsonl"
    before = {p: p.stat().st_mtime_ns for p in (micro / "results").rglob("*")}
    with edited(path, '{"messages"', '{"messages": [{"role": "user", "content": "no answer"}]}\n{"messages"'):
        for arguments in (["micro"], ["micro", "--dry-run"]):
            done = run_all(micro, *arguments, check=False)
            assert done.returncode == 2
            assert re.search(r"bad_medical\.jsonl:\d+: roles must alternate", done.stderr)
    assert {p: p.stat().st_mtime_ns for p in (micro / "results").rglob("*")} == before


def test_two_runs_at_once_are_refused(micro):
    with (micro / ".run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = run_all(micro, "micro", check=False)
    assert done.returncode == 75
    assert "another run is active" in done.stderr


@pytest.fixture
def door(root, tmp_path):
    """A folder with run_all.sh and an environment in which `python` does nothing and `snakemake` runs for an hour."""
    place, bin_ = tmp_path / "clone", tmp_path / "env" / "bin"
    files = ["params/profiles/demo.yaml", "params/snakemake/local/config.yaml", "pyproject.toml"]
    for name in [*files, *(f"requirements/{lock}.lock" for lock in ("cpu", "cuda", "no-deps", "quarto"))]:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text("")
    shutil.copy2(root / "run_all.sh", place)
    bin_.mkdir(parents=True)
    for name, does in (("python", "exit 0"), ("snakemake", "echo $$ >pid; exec sleep 3600")):
        (bin_ / name).write_text(f"#!/bin/sh\n{does}\n")
        (bin_ / name).chmod(0o755)
    active = {"CONDA_DEFAULT_ENV": "cai-em", "CONDA_PREFIX": str(bin_.parent), "CAI_EM_SKIP_SETUP": "1"}

    def start(*arguments: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["./run_all.sh", *arguments], cwd=place, env={**os.environ, **active}, stderr=subprocess.PIPE, text=True
        )

    start.place = place
    return start


def test_the_lock_holds_while_snakemake_lives_though_the_shell_was_killed(door):
    """Else the next run would take a living Snakemake's locks for a dead one's."""
    first = door("demo")
    while not (door.place / "pid").is_file() or not (door.place / "pid").read_text().strip():
        assert first.poll() is None
        time.sleep(0.05)
    snakemake = int((door.place / "pid").read_text())
    first.kill()
    first.wait()
    first.stderr.close()
    try:
        for arguments in (["demo"], ["clean", "demo"]):
            (door.place / "results/demo/logs").mkdir(parents=True, exist_ok=True)
            second = door(*arguments)
            assert "another run is active" in second.communicate(timeout=300)[1]
            assert second.returncode == 75
    finally:
        os.kill(snakemake, signal.SIGKILL)
    while (door.place / "results/demo").exists():  # the kernel takes a moment to close a dead process's files
        assert door("clean", "demo").communicate(timeout=300)
        time.sleep(0.05)


def test_clean_removes_a_run_and_nothing_else(door):
    run, others = door.place / "results/mine/logs", [door.place / "results/teacher", door.place / "victim/logs"]
    for folder in (run, *others):
        folder.mkdir(parents=True)
    for names in ["../victim"], ["nosuch"], [""], [], ["."], [".."], ["mine/"], ["teacher"], ["mine", "mine"], ["-rf"]:
        done = door("clean", *names)
        assert "clean needs the name of one run in results (there are: mine)" in done.communicate(timeout=300)[1], names
        assert done.returncode == 2
    assert all(folder.is_dir() for folder in (run, *others))
    done = door("clean", "mine")
    assert "removed results/mine" in done.communicate(timeout=300)[1]
    assert done.returncode == 0
    assert not run.parent.exists()
    assert all(folder.is_dir() for folder in others)


def test_bad_parameters_stop_before_any_work(micro):
    with edited(micro / "params/profiles/micro.yaml", "seeds: [0]", "sedes: [0]"):
        done = run_all(micro, "micro", check=False)
    assert done.returncode != 0
    assert "micro.yaml:" in done.stderr
    assert "sedes" in done.stderr


def test_the_messages_that_the_guide_quotes_are_those_that_are_printed(root):
    """docs/full-study.md, "When a stage fails": each quotation stands in the code; `…` stands for a value."""
    guide = (root / "docs" / "full-study.md").read_text(encoding="utf-8")
    guide = guide.split("## When a stage fails")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in guide.splitlines() if line.startswith("| ")][1:]
    quoted = [text for row in rows for text in re.findall(r"`([^`]+)`", row)]
    assert len(quoted) >= 7
    sources = [root / "run_all.sh", *(root / "lib" / "cai_em").rglob("*.py")]
    code = "\n".join(path.read_text(encoding="utf-8") for path in sources) + os.strerror(errno.ENOSPC)
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # a message over several lines
    pieces = [piece for text in quoted for piece in text.split("…") if piece.strip()]
    assert [piece for piece in pieces if piece not in code] == []


def test_an_unknown_profile_names_those_that_exist(micro):
    done = run_all(micro, "nosuch", check=False)
    assert done.returncode == 2
    assert "demo" in done.stderr


@pytest.mark.slow
def test_micro_through_vllm_equals_micro_through_transformers(root, tmp_path_factory, monkeypatch):
    """Every stage, either back end (vLLM's CPU build will do), decoded greedily: equal responses, scores, results."""
    pytest.importorskip("vllm")
    for key, value in {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0-1"}.items():
        monkeypatch.setenv(key, value)
    places = {}
    for backend in ("transformers", "vllm"):
        place = places[backend] = clone(root, tmp_path_factory.mktemp(backend))
        sampling = place / "params" / "sampling.yaml"
        presets = yaml.safe_load(sampling.read_text())
        presets["micro"] |= {"temperature": 0.0, "backend": backend, "gpu_memory_utilization": 0.2}
        sampling.write_text(yaml.safe_dump(presets, sort_keys=False))
        profile = place / "params" / "profiles" / "micro.yaml"
        settings = yaml.safe_load(profile.read_text())
        for part in ("trajectory", "steering"):  # their hooks run on transformers alone
            del settings[part]
        profile.write_text(yaml.safe_dump(settings, sort_keys=False))
        run_all(place, "micro")
    here, there = places.values()
    tables = [
        p.relative_to(here) for p in sorted((here / "results/micro").rglob("*.parquet")) if "cells" not in p.parts
    ]
    assert len(tables) > 20
    for table in tables:
        if table.name == "log.parquet" or "glance" in table.parts:
            continue
        mine, theirs = (
            pd.read_parquet(p / table).drop(columns=["sampler", "run_id"], errors="ignore") for p in (here, there)
        )
        pd.testing.assert_frame_equal(mine, theirs, obj=str(table))
    samplers = {pd.read_parquet(p)["sampler"].iloc[0].split()[0] for p in there.rglob("03_sample/**/responses.parquet")}
    assert samplers == {"vllm"}
