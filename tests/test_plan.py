"""The plan counts what the grid says, and names what it assumes."""

import re
import shutil

import pandas as pd
import pytest
import yaml
from cai_em.analysis.power import Components, power
from cai_em.records.manifest import write_manifest
from cai_em.sample import vllm_engine
from cai_em.study import constitutions, entries, loading, materials
from cai_em.study import study as study_study
from cai_em.workflow import design, plan


@pytest.fixture(scope="module")
def paper():
    study = loading.load("paper")
    return study, plan.plan(study, plan.assumptions(study.folder))


def test_paper_counts_follow_from_the_grid(paper):
    study, table = paper
    cells = study.cells()
    assert table.loc["01_personas", "jobs"] == 2 * 17
    assert table.loc["02_finetune", "jobs"] == 2 * 18
    # 8 questions x 50 samples, judged twice (alignment and coherence), and the manipulation checks
    assert table.loc["04_judge", "judge_calls"] == 2 * 8 * 50 * len(cells) + plan._checks(study)
    assert table.loc["total", "judge_calls"] == table["judge_calls"].iloc[:-1].sum()


def test_dollars_by_hand(paper):
    study, table = paper
    assumed = plan.assumptions(study.folder)
    calls = table.loc["04_judge", "judge_calls"]
    tokens_in = calls * (assumed.judge_prompt_tokens + assumed.response_tokens)
    expected = (tokens_in * 0.4 + calls * assumed.judge_answer_tokens * 1.6) / 1e6
    assert table.loc["04_judge", "usd"] == pytest.approx(expected)


def test_disk_by_hand(paper):
    """An adapter of rank r on all linear layers of Qwen 2.5 7B has 28 x (2x7168 + 2x4096 + 3x22528) x r parameters."""
    study, _ = paper
    assert study.models["qwen2.5-7b"].lora_parameters_per_rank == 28 * (2 * 7168 + 2 * 4096 + 3 * 22528)
    assert study.models["llama3.1-8b"].lora_parameters_per_rank == 32 * (2 * 8192 + 2 * 5120 + 3 * 18432)


def test_the_second_stage_of_personas_by_hand(paper):
    """10 x 1000 reflections and 2 x 1000 dialogues of 10 turns, 180 tokens each, at 6000 tokens/s both ways."""
    study, _ = paper
    second, assumed = study.introspection, plan.assumptions(study.folder)
    said, learned = (10_000 + 20_000) * 180, (10_000 * 180 + 2_000 * 1800) * 0.9
    assert plan._introspection_seconds(second, assumed) == pytest.approx(180 + said / 6000 + learned / 6000)
    assert plan._introspection_seconds(None, assumed) == 0


def test_a_personas_cost_by_hand(paper):
    """16 personas are taught: 10 traits x 50 prompts x 5 samples, once for both models; each model trains on them.

    Seconds of one persona: an engine for the student; on a model of 7B, 3 loads (DPO, folding, second stage), 2,500
    plain answers of 180 tokens at 6,000 tokens/s, 2,500 pairs of 900 tokens at a third of 6,000, and the second stage.
    The teacher's 2,500 answers are waited for by jobs without a GPU.
    """
    study, table = paper
    second = plan._introspection_seconds(study.introspection, plan.assumptions(study.folder))
    one = 3 * 40 + 2500 * 180 / 6000 + 2500 * 900 * 3 / 6000 + second
    size, waiting = (7.6 + 8.0) / 7, 16 * 2500 * 20 / 32
    expected = 34 * 20 + 32 * 180 + size * 16 * one
    assert table.loc["01_personas", "gpu_hours"] == pytest.approx(expected / 3600)
    assert table.loc["01_personas", "teacher_calls"] == 16 * 2500
    assert table.loc["01_personas", "api_hours"] == pytest.approx(waiting / 3600)
    assert table.loc["01_personas", "usd"] == pytest.approx(40_000 * (700 * 0.2 + 450 * 1.1) / 1e6)


def test_fine_tunings_cost_by_hand(paper):
    """306 cells a model in 18 jobs: 90 % of 6,000 rows of 300 tokens at 6,000 tokens/s; a load, two with a persona."""
    _, table = paper
    expected = 36 * 20 + (7.6 + 8.0) / 7 * (306 * 5400 * 300 / 6000 + (17 * 2 + 1) * 40)
    assert table.loc["02_finetune", "jobs"] == 36
    assert table.loc["02_finetune", "gpu_hours"] == pytest.approx(expected / 3600)


def test_what_a_run_measured_takes_the_place_of_what_is_assumed(tmp_path, capsys):
    """Two cells, 4,000 tokens in 40 s on a model of 3.5B: 50 tokens/s on one of 7B; the rest stays assumed."""
    stage = tmp_path / "results" / "02_finetune" / "m" / "baseline"
    for name, seconds in (("a", 10), ("b", 30)):
        write_manifest(
            stage / name,
            stage="02_finetune",
            inputs=[],
            outputs=[],
            params={"model": {"parameters_b": 3.5}, "training": {"epochs": 2}},
            timings={"train": seconds, "prepare": 1},
            summary={"tokens": {"all": 1000}},
        )
    assert plan.measured(tmp_path / "results") == {"training_tokens_per_s": pytest.approx(50)}
    (tmp_path / "card.json").write_text('{"assumptions": {"sampling_tokens_per_s": 9000, "other": 1}}')
    assert plan.measured(tmp_path / "card.json") == {"sampling_tokens_per_s": 9000}
    assert plan.main(["paper", "--from", str(tmp_path / "results")]) == 0
    said = capsys.readouterr().out
    assert re.search(r"Measured .*results\), scaled to 7B: training tokens per s 50\n", said)
    assert "Assumed, not measured (params/plan.yaml): dpo slowdown 3, sampling tokens per s 6000" in said
    assert plan.main(["paper", "--from", str(tmp_path / "nothing")]) == 2
    assert "nothing was measured there" in capsys.readouterr().err


def test_disk_holds_weights_and_what_sampling_composes(paper):
    """bfloat16 weights of both models; two groups of eight sums of rank 128 + 32, in bfloat16."""
    _, table = paper
    assert table.loc["the models' own files", "disk_gb"] == pytest.approx((7.6 + 8.0) * 2)
    composed = 2 * 8 * (64 + 64 + 32) * 2_621_440 * 2 / 1e9
    assert table.loc["03_sample", "disk_gb"] > composed
    assert table.loc["03_sample", "disk_gb"] == pytest.approx(composed, rel=0.1)


def test_ready_made_personas_cost_neither_teacher_nor_training(root, tmp_path):
    """The five custom ones are on no hub, Llama's misalignment neither: they are trained."""
    shutil.copytree(root / "params", tmp_path / "params")
    registry = yaml.safe_load((tmp_path / "params/models.yaml").read_text())
    for hub in registry["qwen2.5-7b"]["persona_adapters"] + registry["llama3.1-8b"]["persona_adapters"]:
        hub["revision"] = "0" * 40
    (tmp_path / "params/models.yaml").write_text(yaml.safe_dump(registry, sort_keys=False))
    profile = yaml.safe_load((tmp_path / "params/profiles/paper.yaml").read_text()) | {"personas_from": "hub"}
    (tmp_path / "params/profiles/paper.yaml").write_text(yaml.safe_dump(profile))
    study = loading.load("paper", tmp_path / "params")
    table = plan.plan(study, plan.assumptions(study.folder))
    assert table.loc["01_personas", "teacher_calls"] == 6 * 2500
    second = plan._introspection_seconds(study.introspection, plan.assumptions(study.folder))
    one = 3 * 40 + 2500 * 180 / 6000 + 2500 * 900 * 3 / 6000 + second
    sizes = {"qwen": 7.6 / 7, "llama": 8.0 / 7}
    expected = 34 * 20 + 11 * 180 + (5 * sizes["qwen"] + 6 * sizes["llama"]) * one
    assert table.loc["01_personas", "gpu_hours"] == pytest.approx(expected / 3600)


def test_pairs_are_counted_in_built_in_constitutions():
    """The demo's teacher is the student itself: one prompt of each trait, one sample; and the first demonstrations."""
    study = loading.load("demo")
    constitution = constitutions.read_constitution(study.constitution_file("sycophancy"))
    most = study.generator.max_demonstrations
    assert 0 < most < len(constitution.demonstrations)
    pairs = plan.planned_pairs(study, "sycophancy", plan.assumptions(study.folder))
    assert pairs == plan.Pairs(len(constitution.traits), most, 0)


def test_calls_of_the_manipulation_checks_are_those_that_the_judge_gets():
    """By the tables that 04_judge merges, here with every row written out."""
    study = loading.load("micro")
    study.profile = study.profile.model_copy(update={"manipulation": study_study.Manipulation(samples=2, rated=3)})
    expected = 0
    for cell in study.cells():
        mine = study.personas[cell.persona].constitution is not None
        same = {
            c.persona for c in study.cells() if c.dataset == cell.dataset and study.personas[c.persona].constitution
        }
        raters = len(same) if cell.persona == "baseline" else int(mine)
        expected += raters * len(study.questions()) * 3
        tuned = {c.dataset for c in study.cells()} - {"none"}
        of = tuned if cell.dataset == "none" else {cell.dataset}
        expected += 2 * sum(len(materials.in_domain_questions(study, d)) for d in of)
    assert plan._checks(study) == expected


def test_a_waiting_time_follows_concurrency_and_limit():
    preset = entries.JudgePreset(kind="openai", name="j", model="m", concurrency=10, requests_per_minute=60)
    assert plan._wait(100, 5.0, preset) == 100
    assert plan._wait(100, 50.0, preset) == 500


def test_a_local_judge_costs_nothing_and_a_cpu_has_no_gpu_hours():
    study = loading.load("demo")
    table = plan.plan(study, plan.assumptions(study.folder))
    assert table.loc["total", "usd"] == 0
    assert table.loc["total", "judge_calls"] == 0
    assert pd.isna(table.loc["total", "gpu_hours"])


def test_a_judge_that_was_never_measured_is_named_before_it_is_paid(paper, root, tmp_path):
    said = "./run_all.sh calibrate-judge gpt-4.1-mini"
    assert said in plan.text(paper[0])
    assert "calibrate-judge" not in plan.text(loading.load("demo")), "the local judge is measured in its run"
    shutil.copytree(root / "params", tmp_path / "params")
    (tmp_path / "params" / "judge_quality").mkdir()
    (tmp_path / "params" / "judge_quality" / "gpt-4.1-mini.json").write_text("{}")
    assert said not in plan.text(loading.load("paper", tmp_path / "params"))


def test_text_names_the_assumptions(capsys):
    assert plan.main(["paper"]) == 0
    out = capsys.readouterr().out
    assert "648 conditions" in out
    assert "141 of 141 published conditions are among them." in out
    assert "sampling tokens per s 6000" in out
    assert plan.main(["demo"]) == 0
    assert "published conditions" not in capsys.readouterr().out
    assert plan.main(["nosuch"]) == 2


def test_h3_and_h4_by_hand(paper):
    """8 questions x 10 samples, two judgements each, two models.

    H3: rank1 has 12 checkpoints and its last step, for 4 personas x 3 seeds; two presets beside it have 8 each; step 0
    once per persona and preset. H4: 2 x 4 untouched, 5 layers x 4 strengths, 4 targets x 2 x (4 personas x 3 seeds +
    1 random); layer 16 at strength 1 is in both.
    """
    _, table = paper
    assert table.loc["09_trajectories", "judge_calls"] == 2 * 2 * 8 * 10 * (13 * 12 + 2 * 8 + 4 + 2)
    assert table.loc["10_steering", "judge_calls"] == 2 * 2 * 8 * 10 * (8 + 20 + 4 * 2 * 13 - 1)
    # One adapter of rank 32 on all linear layers, 8 snapshots, in float32, is most of what H3 keeps.
    assert table.loc["09_trajectories", "disk_gb"] > 2 * 2 * 8 * 32 * 2.5e6 * 4e-9


def test_the_plan_knows_how_many_adapters_an_engine_holds():
    assert plan.MOST_ADAPTERS == vllm_engine.VllmEngine.MOST_ADAPTERS


def test_the_documented_downloads_are_the_models_of_the_study(root):
    text = (root / "docs" / "full-study.md").read_text()
    for spec in loading.load("paper").models.values():
        assert f"hf download {spec.hub_id} --revision {spec.revision}" in text


def test_what_the_design_can_see_is_what_the_deciding_test_sees(paper):
    """By `analysis.power` with the arms and data sets of the grid; assumed or measured, and said which."""
    study, _ = paper
    assumed = plan.assumptions(study.folder).deviations
    table = design.seen(study, assumed)
    assert table[["hypothesis", "persona", "datasets"]].to_numpy().tolist() == [
        ["H1", "sycophancy", 4],
        ["H2", "goodness", 4],
        ["H2", "loving", 4],
    ]
    c = Components(30.25, 169, 9, 4, datasets=4, tuned=2, reference=2, untuned=64)
    # Four claims in the family: H1, H2, and what H3 and H4 say.
    how = {"questions": 8, "samples": 50, "seeds": 3, "alpha": 0.05 / 4}
    smallest = table["detectable"].iloc[0]
    assert power(smallest, c, **how) == pytest.approx(0.8, abs=0.01)
    assert power(smallest - 1, c, **how) < 0.78
    quieter = design.seen(study, assumed.model_copy(update={"question": 1.0}))
    assert quieter["detectable"].iloc[0] < smallest / 2


def test_variances_that_a_run_measured_take_the_place_of_assumed_ones(tmp_path, capsys):
    """One seed tells nothing of trainings: that deviation stays assumed, and is named as such."""
    (tmp_path / "05_validity").mkdir()
    found = {"question": 16.0, "response": 100.0, "seed": float("nan"), "question_seed": float("nan")}
    found |= {"datasets": 2, "tuned": 2, "reference": 0, "untuned": 0.0}
    pd.DataFrame([found]).to_parquet(tmp_path / "05_validity" / "components.parquet")
    assert design.measured_deviations(tmp_path) == {"question": 4.0, "response": 10.0}
    assert plan.main(["paper", "--from", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert f"measured ({tmp_path}): question 4, response 10" in said
    assert "Others, assumed (params/plan.yaml): untuned 8, seed 3, question seed 2" in said


def test_with_few_seeds_the_plan_says_of_what_it_speaks(capsys):
    assert plan.main(["demo"]) == 0
    assert "of these adapters, not of the recipe" in capsys.readouterr().out


def test_question_sets_say_what_they_cost_and_detect(paper):
    """8, 24 or 54 questions: answers, calls and dollars in proportion, smaller effects seen."""
    study, table = paper
    found = plan.question_sets(study, plan.assumptions(study.folder))
    assert found["questions"].to_dict() == {"eval": 8, "general": 24, "broad": 54}
    assert (found["responses"] == 50 * len(study.cells()) * found["questions"]).all()
    assert found.loc["eval", "judge_calls"] == table.loc["04_judge", "judge_calls"]
    assert found.loc["eval", "usd"] == pytest.approx(table.loc["04_judge", "usd"])
    more = found["judge_calls"] - found.loc["eval", "judge_calls"]
    # Two calls a response; what is rated of persona expression follows the questions, too.
    assert (more >= 2 * (found["responses"] - found.loc["eval", "responses"])).all()
    assert found["detects"].is_monotonic_decreasing
    assert found.loc["broad", "detects"] < found.loc["eval", "detects"] / 1.5


@pytest.mark.parametrize("name", ["eval", "general", "broad"])
def test_no_built_in_question_comes_near_a_data_sets_domain(name):
    study = loading.load("demo")
    study.profile = study.profile.model_copy(update={"questions": name})
    assert plan.near_a_domain(study).empty
    assert "None of its questions" in plan.text(study)


def test_questions_of_a_data_sets_domain_are_named(root, tmp_path):
    """The data sets' own held-out prompts, as if they were a study's questions: most are found, the domain is right."""
    folder = tmp_path / "params"
    shutil.copytree(root / "params", folder)
    held_out = yaml.safe_load((folder / "builtin/questions/in_domain.yaml").read_text(encoding="utf-8"))
    sets = ("bad_medical", "risky_financial", "insecure", "technical_vehicles")
    domain = {q["id"]: d for d in sets for q in held_out[d]}
    asked = [q for d in sets for q in held_out[d]]
    (folder / "builtin/questions/near.yaml").write_text(yaml.safe_dump({"questions": asked}), encoding="utf-8")
    study = loading.load("demo", folder)
    study.profile = study.profile.model_copy(update={"questions": "near"})
    found = plan.near_a_domain(study)
    assert len(found) >= len(asked) / 3
    assert (found["question_id"].map(domain) == found["dataset"]).mean() > 0.85
    assert "to be read by a person" in plan.text(study)
