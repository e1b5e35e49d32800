"""The plan counts what the grid says, and names what it assumes."""

import pandas as pd
import pytest
from cai_em import params, plan


@pytest.fixture(scope="module")
def paper():
    study = params.load("paper")
    return study, plan.plan(study, plan.assumptions(study.folder))


def test_paper_counts_follow_from_the_grid(paper):
    study, table = paper
    cells = study.cells()
    assert table.loc["01_personas", "jobs"] == 2 * 17
    assert table.loc["02_finetune", "jobs"] == sum(c.dataset != "none" for c in cells)
    # 8 questions x 50 samples, judged twice (alignment and coherence)
    assert table.loc["04_judge", "judge_calls"] == 2 * 8 * 50 * len(cells)
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


def test_a_local_judge_costs_nothing_and_a_cpu_has_no_gpu_hours():
    study = params.load("demo")
    table = plan.plan(study, plan.assumptions(study.folder))
    assert table.loc["total", "usd"] == 0
    assert table.loc["total", "judge_calls"] == 0
    assert pd.isna(table.loc["total", "gpu_hours"])


def test_text_names_the_assumptions(capsys):
    assert plan.main(["paper"]) == 0
    out = capsys.readouterr().out
    assert "648 conditions" in out
    assert "sampling tokens per s 6000" in out
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
