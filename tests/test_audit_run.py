"""`./run_all.sh audit` from files to document, in a clone: a bad study, a study whose questions stay open, other
designs."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import yaml

from tests import audit_files as made
from tests.test_workflow import clone, run_all

ROOT = Path(__file__).parents[1]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A clone."""
    return clone(ROOT, tmp_path / "clone")


def test_an_open_question_stops_before_anything_runs(place: Path, tmp_path: Path) -> None:
    folder = made.example("records", tmp_path / "records")
    done = run_all(place, "audit", str(folder), check=False)
    assert done.returncode == 3
    assert "what were the models fine-tuned on" in done.stderr
    assert not (place / "results" / "audit-records").exists()
    done = run_all(place, "audit", str(folder / "audit.yaml"), check=False)
    assert done.returncode == 2
    assert "not settled yet" in done.stderr


def test_a_folder_may_have_any_name(place: Path, tmp_path: Path) -> None:
    """Snakemake reads the values of its --config as YAML, in which " #" begins a comment and ": " a mapping."""
    folder = tmp_path / "runs #2, x: y"
    folder.mkdir()
    made.write_plain(made.world(samples=6), folder / "all.csv")
    assert "audit-runs-2-x-y" in run_all(place, "audit", str(folder), "--dry-run").stderr


@pytest.mark.slow
def test_a_bad_study_from_files_to_document(place: Path, tmp_path: Path) -> None:
    folder = made.example("bad", tmp_path / "bad")
    run_all(place, "audit", str(folder))
    results = place / "results" / "audit-bad"
    text = (results / "RESULTS.md").read_text(encoding="utf-8")
    first = text[: text.index("\n---\n")]
    assert first.startswith("# Audit of bad")
    assert "3 faults" in first
    assert "Seeds that are copies: in 6 of 6 conditions" in first
    assert "1 of 6 conditions were filtered" in first
    assert "shows in the responses in 0 of 4 comparisons" in first
    assert "fine-tuned with LoRA" not in text
    assert (results / "paper" / "index.html").is_file()
    # Nothing has changed: nothing runs; and every file is as its manifest says.
    assert "Nothing to be done" in run_all(place, "audit", str(folder)).stderr
    run_all(place, "verify", str(folder / "audit.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "design", ["no personas", "no baseline", "no texts", "one response", "hypothesis", "two judges"]
)
def test_designs_that_are_not_ours(design: str, place: Path, tmp_path: Path) -> None:
    table, settle = made.world(samples=8), {}
    folder = tmp_path / "theirs"
    folder.mkdir()
    if design == "no personas":
        table = made.world(("baseline",), ("insecure", "secure", "none"), samples=8).drop(columns="persona")
    elif design == "no baseline":
        table, settle = table[table["persona"] != "baseline"], {"without_baseline": True}
    elif design == "one response":
        table = made.world(samples=1, questions=50)
    elif design == "hypothesis":
        own = {"title": "Poets are worse", "personas": ["poet"], "direction": "lower"}
        settle = {"hypotheses": {"p1": own}}
    elif design == "two judges":  # the second measures the first; nobody judged anything twice
        table = table.rename(columns={"aligned": "aligned_gpt", "coherent": "coherent_gpt"})
        table["aligned_human"] = pd.to_numeric(table["aligned_gpt"], errors="coerce").sub(3).clip(0)
        settle = {"reference_judge": "human"}
    if design == "no texts":
        made.write_space(table, folder)
    else:
        made.write_plain(table, folder / "all.csv")
    first = run_all(place, "audit", str(folder), "--dry-run", check=False)
    assert first.returncode in (0, 3)
    path = folder / "audit.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "unknown": [], **settle}, sort_keys=False))
    run_all(place, "audit", str(path))
    text = (place / "results" / "audit-theirs" / "RESULTS.md").read_text(encoding="utf-8")
    said = {
        "no personas": "There are no personas in this study",
        "no baseline": "There is no condition without a persona",
        "no texts": "The files hold no response texts",
        "one response": "One response a question (50 questions)",
        "hypothesis": "P1",
        "two judges": "*Agreement*: AUC of telling good from bad answers",
    }
    assert said[design] in text
