"""The paper: no typed number, every number traced, nothing stale, and a page that renders from any profile."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace as Obj

import pandas as pd
import pytest
import yaml
from cai_em import figures, inference, paper, style

from tests.test_figures import DATASETS, LOOK, PERSONAS, score_table

HYPOTHESES = [
    Obj(
        key="h1",
        label="H1",
        title="Good → better | <b>",
        personas=["good"],
        tested=None,
        direction="higher",
        published_persona="good",
    )
]
THRESHOLDS = {
    "alpha": 0.05,
    "equivalence_margin": 5.0,
    "em_alignment_below": 30.0,
    "em_coherence_above": 50.0,
    "confidence": 0.95,
}
PIXEL = '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9" height="9"/></svg>'


@pytest.fixture
def study(tmp_path, root, monkeypatch):
    """A small study on disk with its own copy of the prose: `build(scores)` writes results and the generated half."""
    shutil.copytree(root / "paper", tmp_path / "paper", ignore=shutil.ignore_patterns("_generated", "_variables.yml"))
    results = tmp_path / "results" / "demo"
    folder = results / "06_results" / "figures"
    folder.mkdir(parents=True)
    thresholds = tmp_path / "params" / "thresholds.yaml"
    thresholds.parent.mkdir()
    thresholds.write_text(yaml.safe_dump(THRESHOLDS))
    (folder / "heatmap-m1.svg").write_text(PIXEL)
    record = figures.FigureRecord("heatmap", "m1", "Heat map", "Mean of 3 cells.", "A heat map", "heatmap-m1.svg", "")
    figures.write_records([record], folder)

    def build(scores: pd.DataFrame, tables: bool = True) -> paper.Inputs:
        file = results / "04_judge" / "scores.parquet"
        file.parent.mkdir(exist_ok=True)
        scores.to_parquet(file)
        if tables:
            stage = results / "05_validity"
            stage.mkdir(exist_ok=True)
            inference.outcomes(scores).to_parquet(stage / "outcomes.parquet")
            compared = inference.compare_all(scores, models=False, resamples=50)
            compared = compared.assign(gate="shown", gate_reason="")
            compared.to_parquet(stage / "comparisons.parquet")
            verdicts = inference.verdict_table(HYPOTHESES, compared, ["harm"])
            verdicts.assign(published_rules="SUPPORTED").to_parquet(stage / "verdicts.parquet")
        inputs = paper.Inputs(
            paper=tmp_path / "paper",
            results=results,
            profile={"name": "demo", "title": "A title", "caveat": "It cannot show <much>."},
            scores=scores,
            score_files=[file],
            look=LOOK,
            hypotheses=HYPOTHESES,
            thresholds={**THRESHOLDS, "file": thresholds},
            settings=[("sampling", "temperature", 0.7, thresholds)],
            tables=paper.find_tables(results),
            figures=paper.find_figures(results),
            repository=tmp_path,
        )
        paper.write_generated(inputs, {"pandas": pd.__version__})
        return inputs

    return build


def table() -> pd.DataFrame:
    return score_table(datasets=("harm", "help"))


def test_the_prose_is_sound_and_renders(study):
    inputs = study(table())
    assert paper.check(inputs.paper) == []
    page = paper.preview(inputs.paper, inputs.paper / "preview.html").read_text(encoding="utf-8")
    assert "A preview of the paper" in page
    assert "It cannot show &lt;much&gt;." in page
    assert not re.search(r"\{\{<|\?@|>@(fig|tbl|sec)-", page), "a shortcode or a reference was left"
    assert 'alt="A heat map"' in page
    assert not re.search(r'(src|href)="https?://(?!doi\.org|arxiv\.org|github\.com)', page), "nothing is fetched"
    assert "data:image/svg+xml" in page
    mean = table().query("persona == 'good' and dataset != 'none'")["alignment"].mean()
    assert f"{round(mean, 2):.1f}" in page


def test_a_run_without_validity_claims_or_h3_still_renders_and_says_so(study):
    inputs = study(table(), tables=False)
    assert paper.check(inputs.paper) == []
    page = paper.preview(inputs.paper, inputs.paper / "preview.html").read_text(encoding="utf-8")
    assert "Not part of this run" in page
    assert "not measured" in page


def test_one_changed_score_changes_the_page_and_makes_the_old_one_stale(study):
    scores = table()
    inputs = study(scores)
    before = paper.preview(inputs.paper, inputs.paper / "preview.html").read_text(encoding="utf-8")
    numbers = json.loads((inputs.paper / "_generated" / "sources.json").read_text())["numbers"]

    scores.loc[
        (scores["persona"] == "baseline") & (scores["dataset"] == "harm") & (scores["sample"] == 0), "alignment"
    ] = 0
    scores.to_parquet(inputs.score_files[0])
    stale = paper.check(inputs.paper)
    assert len(stale) == 1
    assert "stale" in stale[0]
    assert "scores.parquet" in stale[0]

    study(scores)
    assert paper.check(inputs.paper) == []
    after = paper.preview(inputs.paper, inputs.paper / "preview.html").read_text(encoding="utf-8")
    changed = json.loads((inputs.paper / "_generated" / "sources.json").read_text())["numbers"]
    old, new = numbers["baseline.worst_mean"]["value"], changed["baseline.worst_mean"]["value"]
    expected = scores.query("persona == 'baseline' and dataset == 'harm'")["alignment"].mean()
    assert old != new == f"{round(expected, 2):.1f}"
    link = '<a href="#n-baseline-worst-mean">{}</a>'
    assert link.format(old) in before
    assert link.format(old) not in after
    assert link.format(new) in after


def test_every_number_leads_to_its_file(study):
    inputs = study(table())
    page = paper.preview(inputs.paper, inputs.paper / "preview.html").read_text(encoding="utf-8")
    targets = set(re.findall(r'href="#(n-[\w-]+)"', page))
    assert len(targets) > 15
    assert targets <= set(re.findall(r'id="(n-[\w-]+)"', page))
    listing = json.loads((inputs.paper / "_generated" / "sources.json").read_text())
    for number in listing["numbers"].values():
        if number["source"]:
            assert (inputs.results.parent.parent / number["source"]).is_file(), number
            assert number["unit"]
            assert number["how"]
    assert 'href="../results/demo/04_judge/scores.parquet"' in page
    assert (inputs.paper / "../results/demo/04_judge/scores.parquet").is_file()


@pytest.mark.parametrize(
    ("file", "old", "new", "problem"),
    [
        ("_results.qmd", "# Results", "# Results\n\nIt rose by 3.5 points.\n", "typed number '3.5'"),
        ("_results.qmd", "# Results", "# Results\n\nIt rose by $x = 7$ points.\n", "typed number '7'"),
        ("_methods.qmd", "var grid.judge", "var grid.nothing", "grid.nothing is not in _variables.yml"),
        ("_methods.qmd", "{{< var grid.judge >}}", "the judge", "grid.judge is used nowhere"),
        ("_results.qmd", "@fig-heatmap shows", "@fig-nowhere shows", "reference @fig-nowhere has no target"),
        ("_results.qmd", "@tbl-claims gives", "@tbl-claim gives", "reference @tbl-claim has no target"),
        ("_methods.qmd", "{#sec-gates}", "{#sec-gate}", "reference @sec-gates has no target"),
        ("_introduction.qmd", "[@betley2025]", "[@betley1925]", "citation @betley1925 is not in references.bib"),
        ("_methods.qmd", "[@mann1947]", "", "references.bib: mann1947 is cited nowhere"),
        (
            "index.qmd",
            "{{< include _methods.qmd >}}",
            "See {{< include _methods.qmd >}}",
            "must stand alone on its line",
        ),
        ("index.qmd", "{{< include _methods.qmd >}}", "{{< include _method.qmd >}}", "_method.qmd does not exist"),
        ("index.qmd", "{{< include _appendix.qmd >}}", "", "_appendix.qmd: no source includes it"),
        ("_methods.qmd", "{#sec-gates}", "{#sec-design}", "label sec-design is defined 2 times"),
    ],
)
def test_planted_faults_are_named(study, file, old, new, problem):
    inputs = study(table(), tables=False)
    path = inputs.paper / file
    text = path.read_text(encoding="utf-8")
    assert old in text, f"{file} has no {old!r}: plant the fault elsewhere"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    found = paper.check(inputs.paper)
    assert any(problem in line for line in found), found


def test_names_with_digits_code_and_citations_are_not_typed_numbers(tmp_path):
    text = "H1 and `x = 3` [@betley2025] {{< var a.b1 >}} [word](#n7) {width=5}\n\n```\n12\n```\n<!-- 9 -->\n"
    assert paper._typed_digits(tmp_path / "x.qmd", text) == []
    assert len(paper._typed_digits(tmp_path / "x.qmd", "p < 0.05 and 11 %")) == 2


def test_preview_refuses_what_does_not_resolve(study):
    inputs = study(table(), tables=False)
    path = inputs.paper / "_results.qmd"
    text = path.read_text(encoding="utf-8")
    path.write_text(text + "\nSee @fig-nowhere.\n", encoding="utf-8")
    with pytest.raises(paper.PaperError, match="fig-nowhere"):
        paper.preview(inputs.paper, inputs.paper / "preview.html")
    path.write_text(text + "\n{{< var no.such >}}\n", encoding="utf-8")
    with pytest.raises(paper.PaperError, match="not in _variables"):
        paper.preview(inputs.paper, inputs.paper / "preview.html")
    path.write_text(text + "\nAs shown [@nobody1900].\n", encoding="utf-8")
    with pytest.raises(paper.PaperError, match="nobody1900"):
        paper.preview(inputs.paper, inputs.paper / "preview.html")


def test_data_cannot_become_markup(study):
    scores = table()
    scores["judge"] = "<script>alert(1)</script> {{< include x >}} @sec-none $x$ *y*"
    inputs = study(scores, tables=False)
    assert paper.check(inputs.paper) == []
    page = paper.preview(inputs.paper, inputs.paper / "preview.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_numbers_refuse_bad_names(tmp_path):
    numbers = paper.Numbers(tmp_path)
    with pytest.raises(ValueError, match="expected words"):
        numbers.add("NoGroup", 1, "count", None, "")
    numbers.add("a.b", 1, "count", tmp_path / "f", "")
    with pytest.raises(ValueError, match="twice"):
        numbers.add("a.b", 2, "count", None, "")
    assert numbers.tree() == {"a": {"b": "[1](#n-a-b)"}}


def test_pipe_table_escapes_and_keeps_widths():
    lines = paper.pipe_table([["a|b", 1], ["x", 22]], ["name", "n"], "lr").splitlines()
    assert lines[0] == "| name | n |"
    assert lines[1] == "|:-----|----:|"
    assert lines[2] == "| a\\|b | 1 |"


def test_quarto_project_options(root):
    config = yaml.safe_load((root / "paper" / "_quarto.yml").read_text())
    html = config["format"]["html"]
    assert config["number-sections"] is True
    assert html["html-math-method"] == "mathml"
    assert html["embed-resources"] is True
    assert set(html["theme"]) == {"light", "dark"}
    assert "typst" in config["format"]
    sources = [p.read_text() for p in (root / "paper").glob("*.qmd")]
    assert not any("```{" in text for text in sources), "the paper executes nothing"
    styles = [p.read_text() for p in (root / "paper").glob("*.scss")]
    assert not any("http" in text or "@import" in text for text in styles), "nothing is fetched"


def test_panache_finds_nothing(study):
    inputs = study(table())
    panache = Path(sys.executable).with_name("panache")
    if not panache.is_file():
        pytest.skip("panache-cli is not installed")
    run = subprocess.run(
        [panache, "lint", "--no-cache", inputs.paper / "index.qmd"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_typst_compiles_the_same_sources(study):
    typst = pytest.importorskip("typst")
    inputs = study(table())
    source = paper.preview(inputs.paper, inputs.paper / "index.typ")
    pdf = typst.compile(str(source), root=str(inputs.paper.parent))
    assert pdf[:5] == b"%PDF-"


@pytest.mark.parametrize("width", [500, 1200])
def test_no_page_is_wider_than_its_window(study, tmp_path, width):
    """Wide tables scroll inside their own box: measured in a browser."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here")
    inputs = study(table())
    page = paper.preview(inputs.paper, inputs.paper / "preview.html").read_text(encoding="utf-8")
    probe = "<script>document.title = `${document.documentElement.scrollWidth} of ${innerWidth}`</script></body>"
    measured = tmp_path / "measured.html"
    measured.write_text(page.replace("</body>", probe), encoding="utf-8")
    run = subprocess.run(
        [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}",
         f"--window-size={width},900", "--dump-dom", measured.as_uri()],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    title = re.search(r"<title>(\d+) of (\d+)</title>", run.stdout)
    assert title, run.stderr[-500:]
    assert int(title[1]) <= int(title[2])
    assert int(title[2]) == pytest.approx(width, abs=40)


def test_style_and_personas_of_the_fixture_agree():
    assert [p.key for p in PERSONAS] == LOOK.sort_personas(p.key for p in PERSONAS)
    assert {d.role for d in DATASETS} <= set(style.ROLE_LABEL)
