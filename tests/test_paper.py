"""The paper: no typed number, every number traced, nothing stale, and a page that renders from any profile."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace as Obj

import pandas as pd
import pytest
import yaml
from cai_em.analysis import compare, contrasts, outcome, published_rules, summaries, verdicts
from cai_em.analysis import power as analysis_power
from cai_em.records import tables as records_tables
from cai_em.report import drawing, figure_files, markdown, paper, render, style
from cai_em.report import inputs as report_inputs
from cai_em.report.glance import glance
from cai_em.study import entries

from tests.test_figures import DATASETS, LOOK, PERSONAS, score_table

HYPOTHESES = [
    Obj(
        key="h1",
        label="H1",
        title="Good → better | <b>",
        personas=["good"],
        tested=None,
        direction="higher",
        estimand="after",
        published_persona="good",
    )
]
THRESHOLDS = entries.Thresholds(bootstrap_resamples=50)
HEATMAP = drawing.FIGURES["heatmap"]
PIXEL = '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9" height="9"/></svg>'


ANALYSED: dict[int, tuple[dict, dict]] = {}


def analysed(scores: pd.DataFrame) -> tuple[dict, dict]:
    """The tables of `06_results` and `05_validity`; the same scores are analysed once."""
    key = hash(scores.to_json())
    if key not in ANALYSED:
        full = scores.assign(judge_mode="integer", prompt_version="1", coherence_flag=None)
        found = published_rules.analyse(
            full, hypotheses=HYPOTHESES, personas=PERSONAS, datasets=DATASETS, thresholds=THRESHOLDS
        )
        compared = compare.compare_all(scores, models=False, resamples=50).assign(gate="present", gate_reason="")
        cube = contrasts.Cube.build(scores)
        made = contrasts.contrast_table(cube, DATASETS, estimands=["after"])
        gates = pd.DataFrame(columns=["model", "persona", "dataset"])
        decided = verdicts.verdict_table(HYPOTHESES, made, gates, cube, DATASETS)
        groups = analysis_power.claimed_groups(cube, HYPOTHESES, DATASETS)
        ANALYSED[key] = (
            found | summaries.figure_tables(scores),
            {
                "outcomes": outcome.outcomes(scores),
                "comparisons": compared,
                "verdicts": decided.assign(published_rules="SUPPORTED"),
                "power": analysis_power.power_table(analysis_power.typical_components(cube, groups), draws=2000),
            },
        )
    return ANALYSED[key]


@pytest.fixture
def study(tmp_path, root):
    """A small run on disk with its own copy of the prose: `build(scores)` writes results and the generated half.

    Scores lie in two shards, as in a run of ours; the generated half stands beside the prose.
    """
    shutil.copytree(root / "paper", tmp_path / "paper", ignore=shutil.ignore_patterns("_generated", "_variables.yml"))
    results = tmp_path / "results" / "demo"
    folder = results / "11_report" / "figures"
    folder.mkdir(parents=True)
    thresholds = tmp_path / "params" / "thresholds.yaml"
    thresholds.parent.mkdir()
    thresholds.write_text("default: {alpha: 0.05}\n")
    (folder / "heatmap-m1.svg").write_text(PIXEL)
    words = ("Heat map", "Mean of 3 cells.", "A heat map")
    record = figure_files.FigureRecord("heatmap", "m1", *words, "heatmap-m1.svg", "", HEATMAP.tables)
    figure_files.write_records([record], folder)

    def build(scores: pd.DataFrame, tables: bool = True, out: Path | None = None, **changed) -> report_inputs.Inputs:
        files = []
        for shard, part in scores.groupby(scores["persona"] == "baseline"):
            files.append(results / "04_judge" / "m1" / ("baseline" if shard else "others") / "scores.parquet")
            files[-1].parent.mkdir(parents=True, exist_ok=True)
            part.to_parquet(files[-1])
        found, validity = analysed(scores)
        records_tables.write_tables(found, results / "06_results" / "tables")
        for name, frame in validity.items() if tables else ():
            (results / "05_validity").mkdir(exist_ok=True)
            frame.to_parquet(results / "05_validity" / f"{name}.parquet")
        inputs = report_inputs.Inputs(
            out=out or tmp_path / "paper",
            results=results,
            profile={"name": "demo", "title": "A title", "source": "trained"},
            judge="j",
            score_files=files,
            look=LOOK,
            hypotheses=HYPOTHESES,
            thresholds={**THRESHOLDS.model_dump(), "file": thresholds},
            settings=[("sampling", "temperature", 0.7, thresholds)],
            tables=report_inputs.find_tables(results),
            figures=folder,
            repository=tmp_path,
            missing={},
            notes={},
            first=glance(validity["verdicts"] if tables else None, None, None, HYPOTHESES,
                         caveat="It cannot show <much>.", missing=changed.get("missing")),
        )  # fmt: skip
        inputs = replace(inputs, **changed)
        paper.write_generated(inputs, {"pandas": pd.__version__})
        return inputs

    return build


def listing(inputs: report_inputs.Inputs) -> dict:
    return json.loads((inputs.out / "_generated" / "sources.json").read_text())


def block(inputs: report_inputs.Inputs, name: str) -> str:
    return (inputs.out / "_generated" / f"{name}.md").read_text(encoding="utf-8")


def shown(inputs: report_inputs.Inputs) -> str:
    """The preview's HTML."""
    return render.preview(inputs.out, inputs.out / "preview.html").read_text(encoding="utf-8")


def table(datasets=("harm", "help")) -> pd.DataFrame:
    return score_table(datasets=datasets)


# --- The page -----------------------------------------------------------------------------------------------------


def test_a_rendering_that_stops_half_way_leaves_the_page_of_before(study, monkeypatch):
    inputs = study(table())
    before = shown(inputs)

    def half(command, **_):
        Path(command[command.index("--output") + 1]).write_text("<ht")
        raise OSError("No space left on device")

    monkeypatch.setattr(render.subprocess, "run", half)
    with pytest.raises(OSError, match="No space"):
        shown(inputs)
    assert (inputs.out / "preview.html").read_text(encoding="utf-8") == before
    assert not list(inputs.out.glob(".preview.html*"))


def test_the_prose_is_sound_and_renders(study):
    inputs = study(table())
    assert render.check_paper(inputs.out) == []
    page = shown(inputs)
    assert "A preview of the paper" in page
    assert "It cannot show &lt;much&gt;." in " ".join(page.split())
    assert not re.search(r"\{\{<|\?@|>@(fig|tbl|sec)-", page), "a shortcode or a reference was left"
    assert 'alt="A heat map"' in page
    assert not re.search(r'(src|href)="https?://(?!doi\.org|arxiv\.org|github\.com)', page), "nothing is fetched"
    assert "data:image/svg+xml" in page
    assert '<p class="author">' in page
    assert '<p class="date">' in page
    mean = table().query("persona == 'good' and dataset != 'none'")["alignment"].mean()
    assert f"{round(mean, 2):.1f}" in page


def test_a_figures_table_lies_beside_the_page_and_its_caption_links_to_it(study):
    inputs = study(table())
    linked = re.findall(r"\]\((_generated/tables/[^)]+)\)", block(inputs, "fig-heatmap"))
    assert linked == [f"_generated/tables/{t.replace('/', '_')}.csv" for t in HEATMAP.tables]
    beside = pd.read_csv(inputs.out / linked[0])
    assert len(beside) == len(pd.read_parquet(figure_files.table_file(inputs.results, HEATMAP.tables[0])))


def test_the_prose_shows_every_figure(root):
    """Each in a place of its own: included by a page of the paper, or by a block that a page includes."""
    pages = " ".join(p.read_text(encoding="utf-8") for p in (root / "paper").glob("*.qmd"))
    within = {"fig-arms", "fig-cross-model", "fig-trajectories", "fig-steering"}  # in `arms`, `models`, `h3` and `h4`
    missing = {f.block for f in drawing.FIGURES.values() if f"_generated/{f.block}.md" not in pages} - within
    assert not missing, "include them where they belong"


def test_every_model_is_spoken_of(study):
    """Two models whose numbers differ: the abstract and the results say both, each with its own number."""
    one = table()
    good = one["persona"] == "good"
    other = one.assign(model="m2", alignment=(one["alignment"] * 0.5).where(~good, one["alignment"]))
    inputs = study(pd.concat([one, other], ignore_index=True))
    tests = pd.DataFrame(
        [
            {"scope": scope, "model": m, "persona": "good", "dataset": d, "estimate": e, "low": e - 0.1,
             "high": e + 0.1, "chance": 0.5, "p": 0.01, "n_classes": 2}
            for m, found in (("m1", {"harm": 0.51, "help": 0.62}), ("m2", {"harm": 0.97, "help": 0.88}))
            for d, e in found.items()
            for scope in ("personas", "persona")
        ]
    )  # fmt: skip
    file = inputs.results / "05_validity" / "tests.parquet"
    tests.to_parquet(file)
    inputs = replace(inputs, tables=report_inputs.find_tables(inputs.results))
    paper.write_generated(inputs)
    assert render.check_paper(inputs.out) == []
    numbers = {name: n["value"] for name, n in listing(inputs)["numbers"].items()}
    assert [numbers[f"gates.most_accuracy_{m}"] for m in ("m1", "m2")] == ["62", "97"]
    assert numbers["baseline.worst_mean_m1"] != numbers["baseline.worst_mean_m2"]
    compared = pd.read_parquet(inputs.tables["comparisons"])
    for m in ("m1", "m2"):
        mine = compared[(compared["model"] == m) & (compared["dataset"].map(LOOK.role) == "em")]
        assert numbers[f"comparisons.em_{m}"] == str(len(mine))
        assert numbers[f"comparisons.significant_{m}"] == str(int((mine["p_adjusted"] < 0.05).sum()))
    for name in ("alignment-text", "gates-text", "comparisons-text", "em-text", "findings", "made-by-run_all"):
        for label in ("Model 1", "Model 2"):
            assert label in block(inputs, name), (name, label)


def test_the_first_screen_answers_and_the_abstract_says_what_is_claimed(study):
    inputs = study(table())
    first, abstract = block(inputs, "made-by-run_all"), block(inputs, "findings")
    claim = "Good\\_one scores higher than the baseline after fine\\-tuning"
    assert first.index("**The question.**") < first.index("**H1:**") < first.index("**What this run cannot show.**")
    verdict = listing(inputs)["numbers"]["verdict.h1_m1"]["value"]
    assert f"Model 1: **[{verdict}](#n-verdict-h1-m1).**" in first
    assert claim.replace("\\-", "-") in first
    assert f"H1 claims that {claim.replace(chr(92) + '-', '-')}." in abstract
    assert abstract.index(verdict) < abstract.index("SUPPORTED by the published rules")


def test_a_stage_that_was_not_run_gets_a_sentence_and_no_table(study):
    inputs = study(table())
    for name, label in (("h3", "H3"), ("h4", "H4")):
        assert f"so that {label} is not tested" in block(inputs, name)
        assert ":::" not in block(inputs, name)


def test_figures_are_cited_with_those_of_every_model_and_in_their_order(study, root):
    inputs = study(table())
    folder = inputs.figures
    (folder / "heatmap-m2.svg").write_text(PIXEL)
    records = figure_files.read_records(folder)
    figure_files.write_records([*records, replace(records[0], model="m2", svg="heatmap-m2.svg")], folder)
    paper.write_generated(inputs)
    assert listing(inputs)["numbers"]["refs.fig_heatmap"]["value"] == "@fig-heatmap and @fig-heatmap-m2"
    whole = render.expand(inputs.out, inputs.out / "index.qmd", [])
    text = render.substitute(whole, render.variables(inputs.out))
    drawn = [f for f in re.findall(r"^::: \{#(fig-[\w-]+)\}", text, flags=re.M)]
    cited = list(dict.fromkeys(re.findall(r"@(fig-[\w-]+)", text)))
    assert "fig-heatmap-m2" in cited
    assert cited == drawn


def test_a_run_without_validity_claims_or_h3_still_renders_and_says_so(study):
    inputs = study(table(), tables=False)
    assert render.check_paper(inputs.out) == []
    page = shown(inputs)
    assert "Not part of this run" in page
    assert "EM rates were not computed in this run" in page


@pytest.mark.parametrize("what", ["04_judge/m1/others/scores.parquet", "04_judge/m1/baseline/scores.parquet",
                                  "11_report/figures/heatmap-m1.svg", "11_report/figures/figures.json",
                                  "06_results/tables/conditions.parquet", "05_validity/outcomes.parquet"])  # fmt: skip
def test_a_change_of_any_file_behind_the_page_makes_it_stale(study, what):
    inputs = study(table())
    assert render.check_paper(inputs.out) == []
    path = inputs.results / what
    before = path.read_bytes()
    path.write_bytes(before + b" ")
    stale = render.check_paper(inputs.out)
    assert len(stale) == 1
    assert "stale" in stale[0]
    assert what in stale[0]
    path.unlink()
    assert any("which is gone" in line for line in render.check_paper(inputs.out))


def test_what_was_generated_cannot_be_edited_unseen(study):
    inputs = study(table())
    path = inputs.out / "_generated" / "grid.md"
    path.write_text(path.read_text(encoding="utf-8").replace("Model 1", "Model 2"), encoding="utf-8")
    assert [line for line in render.check_paper(inputs.out) if "grid.md has changed" in line]


def test_h3_and_h4_come_with_their_verdicts_and_gates(study):
    inputs = study(table())
    for stage, name, reason in (("09_trajectories", "h3", "one training run"), ("10_steering", "h4", "weak direction")):
        rows = [(name.upper(), "", "UNDECIDED", reason), ("judge", "", "not shown", "AUC too low")]
        folder = inputs.results / stage
        folder.mkdir()
        said = pd.DataFrame(rows, columns=["what", "persona", "status", "reason"]).assign(model="m1")
        said.to_parquet(folder / f"{name}.parquet")
    inputs = study(table())
    assert render.check_paper(inputs.out) == []
    page = shown(inputs)
    for words in ("UNDECIDED", "one training run", "weak direction", "AUC too low"):
        assert words in page


def test_one_changed_score_changes_the_page(study):
    scores = table()
    inputs = study(scores)
    before, old = shown(inputs), listing(inputs)["numbers"]["baseline.worst_mean_m1"]["value"]
    where = (scores["persona"] == "baseline") & (scores["dataset"] == "harm") & (scores["sample"] == 0)
    scores.loc[where, "alignment"] = 0
    inputs = study(scores)
    assert render.check_paper(inputs.out) == []
    after, new = shown(inputs), listing(inputs)["numbers"]["baseline.worst_mean_m1"]["value"]
    expected = scores.query("persona == 'baseline' and dataset == 'harm'")["alignment"].mean()
    assert old != new == f"{expected:.1f}"
    link = '<a href="#n-baseline-worst-mean-m1">{}</a>'
    assert link.format(old) in before
    assert link.format(old) not in after
    assert link.format(new) in after


# --- Traces -------------------------------------------------------------------------------------------------------


def test_every_link_of_the_built_page_leads_somewhere(study, monkeypatch):
    """Followed as a reader follows them: from where `build` has put the page."""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    inputs = study(table())
    out = inputs.results / "paper" / "index.html"
    generated = inputs.results / "11_report" / "paper"
    paper.write_generated(replace(inputs, out=generated), {})
    render.build(inputs.out, generated, out, "demo")
    page = out.read_text(encoding="utf-8")
    anchors, inside = set(re.findall(r'id="([^"]+)"', page)), set(re.findall(r'href="#([^"]+)"', page))
    assert len([a for a in inside if a.startswith("n-")]) > 12
    assert inside <= anchors
    files = set(re.findall(r'href="(?!#|https?:)([^"]+)"', page))
    assert len(files) > 8
    for name in files:
        assert (out.parent / name).is_file(), f"{name} is linked and is not beside the page"
        assert len(pd.read_csv(out.parent / name)), name


def test_every_number_of_the_text_names_its_table(study):
    inputs = study(table())
    tables = inputs.out / "_generated" / "tables"
    for number in listing(inputs)["numbers"].values():
        if number["unit"] not in ("text", markdown.MARKUP):
            assert (tables / number["table"]).is_file(), number
            assert number["how"]


def test_numbers_can_be_found_again_in_the_tables_beside_the_page(study):
    inputs = study(table())
    numbers, tables = listing(inputs)["numbers"], inputs.out / "_generated" / "tables"
    conditions = pd.read_csv(tables / "06_results_conditions.csv")
    assert numbers["grid.scored"]["value"] == str(conditions["scored"].sum())
    row = conditions.query("persona == 'baseline' and dataset == 'harm'").iloc[0]
    assert numbers["baseline.worst_mean_m1"]["value"] == f"{row['mean']:.1f}"
    thresholds = pd.read_csv(tables / "params_thresholds.csv").set_index("threshold")["value"]
    assert numbers["thresholds.confidence"]["value"] == "95"
    assert float(thresholds["confidence"]) == 0.95


def test_every_table_and_figure_of_the_run_links_to_its_values(study):
    inputs = study(table())
    bare = {"tbl-settings", "tbl-sources", "tbl-tables", "tbl-versions"}  # these say themselves where lines are from
    for path in (inputs.out / "_generated").glob("*.md"):
        for label, body in re.findall(r"^::: \{#([\w-]+)\}\n(.*?)^:::$", path.read_text("utf-8"), flags=re.S | re.M):
            if "*Not part of this run.*" not in body and "*None.*" not in body and label not in bare:
                assert "](_generated/tables/" in body.strip().splitlines()[-1], label


# --- Sentences that depend on what was run ------------------------------------------------------------------------


def test_without_an_untuned_condition_nothing_is_said_of_what_fine_tuning_did(study):
    inputs = study(table())
    assert "none with the untouched model" in block(inputs, "alignment-text")
    assert "is not known" in block(inputs, "em-text")
    assert "cannot be compared" in block(inputs, "arms")
    assert "what fine-tuning changed cannot be told" in block(inputs, "design")


def test_the_untuned_rate_stands_beside_the_tuned_one(study):
    scores = table(("harm", "help", "none"))
    inputs = study(scores)
    numbers = listing(inputs)["numbers"]
    outcomes = pd.read_parquet(inputs.tables["outcomes"]).query("persona == 'baseline'").set_index("dataset")
    assert numbers["em.untuned_m1_rate"]["value"] == f"{100 * outcomes.loc['none', 'em_rate']:.1f}"
    assert "so that no rise is seen" in block(inputs, "em-text"), "no response of this run is misaligned"
    assert "All four arms are there" in block(inputs, "design")
    assert block(inputs, "em-text").split(" no rise")[0] in block(inputs, "findings")


def test_a_negative_icc_is_no_good_reason(study):
    inputs = study(table())
    path = inputs.tables["outcomes"]
    pd.read_parquet(path).assign(icc=-0.17).to_parquet(path)
    paper.write_generated(inputs)
    assert "give no sign" in block(inputs, "em-text")
    assert "good reason" not in block(inputs, "em-text")
    pd.read_parquet(path).assign(icc=0.3).to_parquet(path)
    paper.write_generated(inputs)
    assert "good reason" in block(inputs, "em-text")


def test_one_of_a_kind_is_no_plural_and_exceptions_are_counted(study):
    scores = table()
    inputs = study(scores[~((scores["persona"] == "bad") & (scores["sample"] > 1))])
    text = block(inputs, "roles") + block(inputs, "design") + block(inputs, "samples")
    text = re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", text)
    assert "This run has 1 EM data set (harm) and 1 benign control (help)." in text
    assert "1 training seed in a cell" in text
    assert "6 times each; 2 conditions only 2 times." in text


def test_an_imported_run_claims_no_probe_and_a_trained_one_reads_its_manifests(study):
    inputs = study(table())
    assert "no manifest of a training was found" in block(inputs, "provenance")
    folder = inputs.results / "02_finetune" / "m1" / "good" / "harm" / "seed0"
    folder.mkdir(parents=True)
    for trainable, expected in ((["em"], "1"), (["persona", "em"], "0")):
        state = {"after_last_step": {"active": ["persona", "em"], "trainable": trainable}}
        (folder / "manifest.json").write_text(json.dumps({"adapter_state": state}))
        paper.write_generated(inputs)
        assert listing(inputs)["numbers"]["adapters.right"]["value"] == expected
    paper.write_generated(replace(inputs, profile={**inputs.profile, "source": "published"}))
    text = block(inputs, "provenance")
    assert "nothing was trained, sampled or judged" in text
    assert "the published ones" in text
    assert "probe" not in text
    paper.write_generated(replace(inputs, profile={**inputs.profile, "source": "audited"}))
    assert "those of the files that were given" in block(inputs, "provenance")
    assert "published" not in block(inputs, "provenance")


def test_what_is_left_out_or_known_to_be_wrong_is_said_at_the_top_and_beside_the_tables(study):
    inputs = study(table(), missing={"m2": "3 of 3 files could not be had; more"}, notes={"good": "two things differ"})
    assert render.check_paper(inputs.out) == []
    status = block(inputs, "made-by-run_all")
    assert "callout-important" in status
    assert "Left out: Model 2 (3 of 3 files could not be had)." in status
    assert "two things differ" not in status, "what is wrong with the data stands among the limitations"
    assert "two things differ" in block(inputs, "issues")
    assert "Model 2" in block(inputs, "alignment")
    assert "Model 2" in block(inputs, "comparisons")
    assert "two things differ" in block(inputs, "comparisons")
    assert "Model 2 had to be left out" in block(inputs, "models")


def test_intervals_are_named_by_the_confidence_in_the_parameters(study):
    inputs = study(table())
    paper.write_generated(replace(inputs, thresholds={**inputs.thresholds, "confidence": 0.9}))
    for name in ("alignment", "comparisons", "outcomes"):
        assert "90%" in block(inputs, name)
        assert "95%" not in block(inputs, name)


def test_all_lines_of_the_power_table_are_shown_and_say_what_they_mean(study):
    inputs = study(table())
    text, power = block(inputs, "power"), pd.read_parquet(inputs.tables["power"])
    assert len(re.findall(r"\d \((\d\.\d\d|–)\)|not known", text)) == len(power)
    assert "a difference of 5 points" in text
    assert "probability of 0.8" in text


def test_the_tables_of_the_results_document_are_in_the_paper(study):
    inputs = study(table())
    page = shown(inputs)
    for what in (
        "Hypotheses by the published rules",
        "Every condition:",
        "Data sets, hardest first",
        "Distribution of",
    ):
        assert what in page
    compared = pd.read_parquet(inputs.results_file("comparisons"))
    found = int((compared["p_adj"] < 0.05).sum())
    assert found
    assert listing(inputs)["numbers"]["published.significant"]["value"] == str(found)
    assert block(inputs, "table-significant").count("| Good_one |") + block(inputs, "table-significant").count(
        "| Bad |"
    ) == found  # fmt: skip
    assert block(inputs, "table-conditions").count("| Baseline |") == 2


# --- Whose numbers ------------------------------------------------------------------------------------------------


@pytest.fixture
def two(study, tmp_path, monkeypatch):
    """Two profiles' generated halves, and no Quarto: `build(profile)` renders one of them."""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    for profile in ("demo", "other"):
        out = tmp_path / "results" / profile / "11_report" / "paper"
        study(
            table(), out=out, profile={"name": profile, "title": f"Title {profile}", "caveat": "", "source": "trained"}
        )

    def build(profile: str, whose: str = "") -> Path:
        out = tmp_path / "results" / profile / "paper" / "index.html"
        half = tmp_path / "results" / (whose or profile) / "11_report" / "paper"
        render.build(tmp_path / "paper", half, out, profile)
        return out

    return build


def test_a_page_shows_its_own_profile_and_refuses_another(two, tmp_path):
    for profile in ("demo", "other", "demo"):
        page = two(profile).read_text(encoding="utf-8")
        assert f"(profile {profile})" in " ".join(page.split())
        beside = json.loads((tmp_path / "paper" / "_generated" / "sources.json").read_text())
        assert beside["profile"] == profile, "`quarto render paper/` shows the page that was made last"
    with pytest.raises(render.PaperError, match="profile 'other', not 'demo'"):
        two("demo", whose="other")
    shutil.rmtree(tmp_path / "results" / "demo" / "11_report")
    with pytest.raises(render.PaperError, match=r"run \./run_all\.sh first"):
        two("demo")


RUNTIME = shutil.which("deno") or shutil.which("node")


@pytest.mark.skipif(RUNTIME is None, reason="neither Deno (as in Quarto) nor Node is here to run paper/prerender.js")
def test_before_quarto_the_wanted_profile_is_put_beside_the_prose(two, tmp_path):
    two("demo")
    paper_dir, others = tmp_path / "paper", tmp_path / "results" / "other" / "11_report" / "paper"

    def run(profile: str = "") -> subprocess.CompletedProcess:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("CAI_EM")} | {"CAI_EM_PROFILE": profile}
        command = [RUNTIME, *(["run", "--cached-only", "--allow-all"] if "deno" in RUNTIME else []), "prerender.js"]
        return subprocess.run(command, cwd=paper_dir, env=environment, capture_output=True, text=True, check=False)

    def whose() -> str:
        return json.loads((paper_dir / "_generated" / "sources.json").read_text())["profile"]

    os.utime(others / "_generated" / "sources.json", (1, 1))
    before = (paper_dir / "_generated").stat().st_ino
    assert run().returncode == 0
    assert (whose(), (paper_dir / "_generated").stat().st_ino) == ("demo", before), "right already: nothing is done"
    assert run("other").returncode == 0
    assert whose() == "other"
    assert (paper_dir / "_variables.yml").read_bytes() == (others / "_variables.yml").read_bytes()
    assert render.check_paper(paper_dir) == []
    assert run().returncode == 0
    assert whose() == "demo", "the newest"
    done = run("nosuch")
    assert done.returncode == 1
    assert "no results of profile nosuch" in done.stderr
    assert "run ./run_all.sh nosuch first" in done.stderr
    (paper_dir / "_generated" / "sources.json").write_text("no JSON")
    done = run()
    assert done.returncode == 0, "a fault of the script is no reason to have no page"
    assert "_generated/ stays as it is" in done.stderr
    two("demo")
    shutil.rmtree(tmp_path / "results")
    assert run().returncode == 0, "a paper that came with its numbers"
    shutil.rmtree(paper_dir / "_generated")
    done = run()
    assert done.returncode == 1
    assert "run ./run_all.sh first" in done.stderr


QUARTO = """#!/bin/sh
[ "$CAI_EM_PROFILE" = demo ] || exit 9
echo "said by quarto"
{pages}
exit {status}
"""


@pytest.mark.parametrize(("status", "pages"), [(0, True), (3, True), (0, False)])
def test_a_quarto_that_fails_is_replaced_loudly(two, tmp_path, monkeypatch, capsys, status, pages):
    fake = tmp_path / "quarto"
    made = 'echo "<p>quarto" > "$2/index.html"; echo pdf > "$2/index.pdf"' if pages else ""
    fake.write_text(QUARTO.format(pages=made, status=status))
    fake.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(fake))
    out = two("demo")
    page, said = out.read_text(encoding="utf-8"), capsys.readouterr().err
    if status == 0 and pages:
        assert page == "<p>quarto\n"
        assert out.with_name("index.pdf").is_file()
        assert not said
    else:
        assert "WARNING" in said
        assert "said by quarto" in said
        assert "Quarto is installed but failed" in " ".join(page.split())
        assert not out.with_name("index.pdf").exists(), "no PDF of another run is left"


# --- Planted faults -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "old", "new", "problem"),
    [
        ("_results.qmd", "# Results", "# Results\n\nIt rose by 3.5 points.\n", "typed number '3.5'"),
        ("_results.qmd", "# Results", "# Results\n\nIt rose by $x = 7$ points.\n", "typed number '7'"),
        ("_results.qmd", "# Results", "# Results\n\nIt rose by `3.5` points.\n", "typed number '3.5'"),
        ("_results.qmd", "# Results", "# Results\n\nIt rose by [much]{title=8}.\n", "typed number '8'"),
        ("_results.qmd", "# Results", "# Results\n\n```\n12\n```\n", "typed number '12'"),
        ("index.qmd", "whose verdicts can be checked", "of 141 conditions", "typed number '141'"),
        ("_results.qmd", "# Results", "# Results\n\n`{{< var grid.judge >}}`\n", "in code would show its markup"),
        ("_methods.qmd", "var grid.judge", "var grid.nothing", "grid.nothing is not in _variables.yml"),
        ("_methods.qmd", "{{< var grid.judge >}}", "the judge", "grid.judge is used nowhere"),
        ("_results.qmd", "@tbl-gates and", "@fig-nowhere and", "reference @fig-nowhere has no target"),
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
        ("index.qmd", "{{< include _generated/findings.md >}}", "", "_generated/findings.md: no source includes it"),
        ("_methods.qmd", "{#sec-gates}", "{#sec-design}", "label sec-design is defined 2 times"),
        ("_methods.qmd", "# Methods", "# Methods\n\n[a](_generated/tables/no.csv)", "linked file _generated/tables/no"),
    ],
)
def test_planted_faults_are_named(study, file, old, new, problem):
    inputs = study(table(), tables=False)
    path = inputs.out / file
    text = path.read_text(encoding="utf-8")
    assert old in text, f"{file} has no {old!r}: plant the fault elsewhere"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    found = render.check_paper(inputs.out)
    assert any(problem in line for line in found), found


def test_names_and_citations_are_not_typed_numbers(tmp_path):
    text = "H1 [@betley2025] {{< var a.b1 >}} [word](#n7) @tbl-a1 <!-- 9 -->\n\n# Title {.unnumbered #sec-2}\n"
    assert render._typed_digits(tmp_path / "x.qmd", text) == []
    assert len(render._typed_digits(tmp_path / "x.qmd", "p < 0.05 and 11 %")) == 2


def test_variables_are_put_in_place_outside_code_only():
    assert render.substitute("{{< var a.b >}} `{{< var a.b >}}`", {"a": {"b": 5}}) == "5 `{{< var a.b >}}`"


def test_preview_refuses_what_does_not_resolve(study):
    inputs = study(table(), tables=False)
    path = inputs.out / "_results.qmd"
    text = path.read_text(encoding="utf-8")
    path.write_text(text + "\nSee @fig-nowhere.\n", encoding="utf-8")
    with pytest.raises(render.PaperError, match="fig-nowhere"):
        shown(inputs)
    path.write_text(text + "\n{{< var no.such >}}\n", encoding="utf-8")
    with pytest.raises(render.PaperError, match="not in _variables"):
        shown(inputs)
    path.write_text(text + "\nAs shown [@nobody1900].\n", encoding="utf-8")
    with pytest.raises(render.PaperError, match="nobody1900"):
        shown(inputs)


def test_data_cannot_become_markup(study):
    judge = "<script>alert(1)</script> {{< include x >}} @sec-none $x$ *y*"
    inputs = study(table(), tables=False, judge=judge)
    assert render.check_paper(inputs.out) == []
    page = shown(inputs)
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_numbers_refuse_bad_names(tmp_path):
    numbers = markdown.Numbers(tmp_path, tmp_path)
    with pytest.raises(ValueError, match="expected words"):
        numbers.add("NoGroup", 1, "count", "t.csv", "")
    numbers.add("a.b", 1, "count", "t.csv", "")
    with pytest.raises(ValueError, match="twice"):
        numbers.add("a.b", 2, "count", "t.csv", "")
    assert numbers.tree() == {"a": {"b": "[1](#n-a-b)"}}
    numbers.csv(tmp_path / "x" / "t.parquet")
    with pytest.raises(ValueError, match="both"):
        numbers.csv(tmp_path / "x" / "y" / "t.parquet")


def test_pipe_table_escapes_and_keeps_widths():
    lines = markdown.pipe_table([["a|b", 1], ["x", 22]], ["name", "n"], "lr").splitlines()
    assert lines[0] == "| name | n |"
    assert lines[1] == "|:-----|----:|"
    assert lines[2] == "| a\\|b | 1 |"


# --- For Quarto ---------------------------------------------------------------------------------------------------


def test_quarto_project_options(root):
    config = yaml.safe_load((root / "paper" / "_quarto.yml").read_text())
    html = config["format"]["html"]
    assert config["number-sections"] is True
    assert html["html-math-method"] == "mathml"
    assert html["embed-resources"] is True
    assert set(html["theme"]) == {"light", "dark"}
    assert (root / "paper" / config["project"]["pre-render"]).is_file()
    assert config["quarto-required"]
    # A figure and its caption stay together; a long table may go over pages.
    assert '.where(kind: "quarto-float-tbl")' in config["format"]["typst"]["include-in-header"][0]["text"]
    sources = [p.read_text() for p in (root / "paper").glob("*.qmd")]
    assert not any(re.search(r"```\{(?!=)", text) for text in sources), "the paper executes nothing"
    styles = [p.read_text() for p in (root / "paper").glob("*.scss")]
    assert not any("http" in text or "@import" in text for text in styles), "nothing is fetched"


def panache(*arguments: str | Path) -> subprocess.CompletedProcess:
    program = Path(sys.executable).with_name("panache")
    if not program.is_file():
        pytest.skip("panache-cli is not installed")
    command = [program, "lint", "--no-cache", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_panache_finds_nothing_in_the_prose(study):
    inputs = study(table())
    done = panache(inputs.out / "index.qmd")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("fault", [{}, {"html-math-metod": "mathml"}, {"html-math-method": "mathlm"}, {"toc": "yes!"}])
def test_quarto_knows_every_option_of_the_project(root, tmp_path, fault):
    """panache knows Quarto's schema of front matter, not of `_quarto.yml`: each format is linted as front matter."""
    config = yaml.safe_load((root / "paper" / "_quarto.yml").read_text())
    formats, _ = config.pop("format"), config.pop("project")
    (tmp_path / "panache.toml").write_text("")
    (tmp_path / "references.bib").write_text((root / "paper" / "references.bib").read_text())
    failed = []
    for name, options in formats.items():
        flat = {**config, **options, "format": name, **fault}
        if name == "html":
            flat["theme"] = "default"  # the light and dark pair is checked above
        source = tmp_path / f"{name}.qmd"
        source.write_text(f"---\n{yaml.safe_dump(flat)}---\n\nText.\n")
        done = panache("--extend-select", "quarto-schema-unknown-key", source)
        failed += [done.stdout + done.stderr] if done.returncode else []
    assert bool(failed) == bool(fault), failed


def test_typst_compiles_the_same_sources(study):
    typst = pytest.importorskip("typst")
    inputs = study(table())
    source = render.preview(inputs.out, inputs.out / "index.typ")
    pdf = typst.compile(str(source), root=str(inputs.out.parent))
    assert pdf[:5] == b"%PDF-"
    headings = json.loads(typst.query(str(source), "heading", field="body", root=str(inputs.out.parent)))
    prose = render.expand(inputs.out, inputs.out / "index.qmd", [])
    # `= 100` at the beginning of a table's cell is a heading to Typst. The table of contents has one of its own.
    assert len(headings) == len(re.findall(r"^#+ ", prose, flags=re.M)) - prose.count("{.callout-") + 1


@pytest.mark.parametrize("width", [500, 1200])
def test_no_page_is_wider_than_its_window(study, tmp_path, width):
    """Wide tables scroll inside their own box: measured in a browser."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here")
    page = shown(study(table()))
    probe = "<script>document.title = `${document.documentElement.scrollWidth} of ${innerWidth}`</script></body>"
    measured = tmp_path / "measured.html"
    measured.write_text(page.replace("</body>", probe), encoding="utf-8")
    run = subprocess.run(
        [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}",
         f"--window-size={width},900", "--dump-dom", measured.as_uri()],
        capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    title = re.search(r"<title>(\d+) of (\d+)</title>", run.stdout)
    assert title, run.stderr[-500:]
    assert int(title[1]) <= int(title[2])
    assert int(title[2]) == pytest.approx(width, abs=40)


def test_style_and_personas_of_the_fixture_agree():
    assert [p.key for p in PERSONAS] == LOOK.sort_personas(p.key for p in PERSONAS)
    assert {d.role for d in DATASETS} <= set(style.ROLE_LABEL)
