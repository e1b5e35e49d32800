"""The page of a run for visitors: `docs/results.md` is what the published run writes."""

import json
import os
import re
import subprocess
import sys

import pytest
from cai_em.report import page
from cai_em.report.style import Look
from cai_em.study import loading


@pytest.fixture
def facts(root):
    return json.loads((root / "docs" / page.FACTS).read_text(encoding="utf-8"))


@pytest.fixture
def look():
    study = loading.load("published")
    return Look(study.used_personas(), study.used_datasets(), list(study.models.values()))


def test_the_committed_page_is_what_its_facts_give(root, facts, look):
    assert page.page(facts, look) == (root / "docs" / page.PAGE).read_text(encoding="utf-8")
    for figure in facts["figures"]:
        assert (root / "docs" / "figures" / figure["svg"]).is_file()


def test_a_page_is_written_with_its_figures_and_put_where_visitors_look(root, facts, look, tmp_path):
    written = page.write_page(tmp_path / "page", facts, look, root / "docs" / "figures")
    assert written.read_text(encoding="utf-8") == (root / "docs" / page.PAGE).read_text(encoding="utf-8")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "other.md").write_text("stays")
    assert page.main([str(tmp_path / "page"), str(tmp_path / "docs")]) == 0
    assert (tmp_path / "docs" / page.PAGE).read_bytes() == written.read_bytes()
    assert (tmp_path / "docs" / "other.md").is_file()
    assert page.main([str(tmp_path), str(tmp_path / "docs")]) == 2


def test_the_readme_says_what_the_run_found(root, facts):
    """Its sentence on the Qwen data, and the picture beside it."""
    text = (root / "README.md").read_text(encoding="utf-8")
    told = [r for r in facts["told"] if r["model"] == "qwen2.5-7b"]
    words = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")
    chance = sum(r["p"] >= 0.05 for r in told)
    assert f"at chance in {words[chance]} of {words[len(told)]} data sets" in text
    assert "](docs/results.md)" in text[:2500], "on the first screen"
    shown = re.search(r"\]\(docs/figures/([\w.-]+)\)", text)
    assert shown
    assert shown[1] in {f["svg"] for f in facts["figures"]}
    verdicts = {v["verdict"] for v in facts["first"]["verdicts"] if v["model"] == "qwen2.5-7b"}
    assert verdicts == {"NOT INTERPRETABLE"}, "what the README says of such verdicts"
    assert all(not r["off"] for r in facts["replicated"]), "to the printed digit"


@pytest.mark.slow
@pytest.mark.fetched
def test_the_published_run_writes_the_committed_page(root, fetched_cache, tmp_path):
    """The whole profile, some minutes: its page is the committed one, figures too."""
    environment = {
        **os.environ, "CAI_EM_CACHE": str(fetched_cache), "CAI_EM_RESULTS": str(tmp_path), "CAI_EM_SKIP_SETUP": "1",
        "PATH": f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    command = ["./run_all.sh", "published"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    made = tmp_path / "published" / "11_report" / "page"
    for file in (page.PAGE, page.FACTS, *(f"figures/{p.name}" for p in (made / "figures").iterdir())):
        assert (made / file).read_bytes() == (root / "docs" / file).read_bytes(), file
