"""Estimands: what is subtracted from what, one estimate over data sets, bounds of what is missing; the published
twin."""

import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from cai_em.analysis import contrasts
from cai_em.analysis.contrasts import POOLED, ArmContrast, Cube, contrast_table, estimate_mean, find, identification
from cai_em.study import loading, published
from scipy import stats

EM = SimpleNamespace(key="em1", role="em", twin="good1")
DATASETS = [EM, SimpleNamespace(key="good1", role="benign_control"), SimpleNamespace(key="none", role="none")]


def rows(cells, samples=2, questions=8, sd=0.0, seed=0):
    """A score table from {(persona, data set, seed): mean or (questions,) means}; None as a mean: no score."""
    rng = np.random.default_rng(seed)
    made = []
    for (persona, dataset, number), mean in cells.items():
        means = np.broadcast_to(np.nan if mean is None else mean, questions)
        for q, m in enumerate(means):
            for k in range(samples):
                x = m + sd * rng.standard_normal()
                made.append(("m", persona, dataset, number, f"q{q}", k, x, "API" if np.isnan(x) else None))
    columns = ["model", "persona", "dataset", "seed", "question_id", "sample", "alignment", "alignment_flag"]
    table = pd.DataFrame(made, columns=columns)
    return table.assign(
        coherence=90.0, coherence_flag=None, judge="j", judge_mode="integer", prompt_version="1", raw=""
    )


FOUR = {("p", "em1", 0): 40, ("p", "none", 0): 70, ("baseline", "em1", 0): 50, ("baseline", "none", 0): 90}


@pytest.mark.parametrize(
    ("estimand", "expected"), [("susceptibility", 10), ("after", -10), ("persona", -20), ("uptake", -30)]
)
def test_each_estimand_subtracts_what_it_says(estimand, expected):
    cube = Cube.build(rows(FOUR))
    found = find(cube, estimand, "m", "p", "em1")
    assert isinstance(found, ArmContrast)
    assert np.allclose(found.values(cube), expected)


def test_a_persona_that_costs_points_by_its_style_alone_is_not_susceptible():
    cube = Cube.build(rows({**FOUR, ("p", "em1", 0): 30}))  # 20 below the baseline before, and after
    assert np.allclose(find(cube, "susceptibility", "m", "p", "em1").values(cube), 0)
    assert np.allclose(find(cube, "after", "m", "p", "em1").values(cube), -20)


def test_without_a_reference_susceptibility_is_not_identified_and_says_why():
    cube = Cube.build(rows({k: v for k, v in FOUR.items() if k != ("p", "none", 0)}))
    found = identification(cube, "susceptibility", "m", "p", DATASETS)
    assert found[0] is None
    assert "p has no untuned arm" in found[1]
    assert "no EM data set with a benign twin that p was fine-tuned on" in found[1]
    table = contrast_table(cube, DATASETS)
    assert set(table["estimand"]) == {"after"}
    assert identification(cube, "after", "m", "p", DATASETS) == ("", "")


def test_the_untuned_arm_decides_and_the_twin_stands_beside():
    twin = {("p", "good1", 0): 66, ("baseline", "good1", 0): 88}
    cube = Cube.build(rows(FOUR | twin))
    assert identification(cube, "susceptibility", "m", "p", DATASETS) == ("none", "")
    table = contrast_table(cube, DATASETS).query("estimand == 'susceptibility' and outcome == 'points'")
    found = table[table["dataset"] == POOLED].set_index("reference")["estimate"]
    assert found.to_dict() == {"none": 10, "twin": (40 - 66) - (50 - 88)}


def test_em_rate_is_a_risk_difference_in_per_cent_and_ranks_keep_the_sign():
    cube = Cube.build(rows({**FOUR, ("p", "em1", 0): 20}))
    found = find(cube, "susceptibility", "m", "p", "em1")
    assert np.allclose(found.values(cube, "em_rate"), 100)  # alignment below 30 in the persona's fine-tuned arm only
    # Ranks of 20, 70, 50, 90 within a question: 12.5, 62.5, 37.5, 87.5
    assert np.allclose(found.values(cube, "ranks"), (12.5 - 62.5) - (37.5 - 87.5))


def test_mid_ranks_agree_with_scipy_and_count_ties_half():
    rng = np.random.default_rng(0)
    values, groups = rng.integers(5, size=200).astype(float), rng.integers(3, size=200)
    found = contrasts.mid_ranks(values, groups, 3)
    for g in range(3):
        mine = groups == g
        assert np.allclose(found[mine], 100 * (stats.rankdata(values[mine]) - 0.5) / mine.sum())


def test_every_missing_score_is_put_where_it_hurts():
    table = rows(FOUR)
    table.loc[(table["persona"] == "p") & (table["dataset"] == "em1") & (table["sample"] == 0), "alignment"] = np.nan
    cube = Cube.build(table)
    found = find(cube, "susceptibility", "m", "p", "em1")
    assert np.allclose(found.values(cube), 10)
    assert np.allclose(found.values(cube, bound=-1), 10 - 20)  # half of 40 becomes half of 0
    assert np.allclose(found.values(cube, bound=1), 10 + 30)
    row = contrast_table(cube, DATASETS).query("estimand == 'susceptibility' and outcome == 'points'").iloc[0]
    assert (row["lower"], row["upper"]) == (-10, 40)


def test_trainings_are_paired_by_seed_and_the_untuned_arm_is_the_partner_of_all():
    cells = {("p", "em1", s): 40 + s for s in range(3)} | {("baseline", "em1", s): 50 for s in (0, 1, 2, 3)}
    cube = Cube.build(rows(cells | {("p", "none", 0): 70, ("baseline", "none", 0): 90}))
    found = find(cube, "susceptibility", "m", "p", "em1")
    assert found.seeds == (0, 1, 2)
    assert np.allclose(found.values(cube), [[10, 11, 12]] * 8)


def test_one_data_set_and_one_seed_is_the_paired_t_test():
    rng = np.random.default_rng(3)
    d = rng.normal(2, 3, (8, 1))
    found, by_scipy = estimate_mean([d]), stats.ttest_1samp(d[:, 0], 0)
    assert found.p() == pytest.approx(by_scipy.pvalue)
    assert found.interval() == pytest.approx(by_scipy.confidence_interval())
    assert not found.recipe


def test_a_question_without_a_score_in_one_data_set_is_left_out_of_all():
    a, b = np.arange(16.0).reshape(8, 2), np.ones((8, 3))
    a[2, 1] = np.nan
    found = estimate_mean([a, b])
    assert (found.n_questions, found.n_seeds, found.n_datasets) == (7, 2, 2)


@pytest.mark.parametrize(("questions", "seeds", "sets"), [(8, 3, 1), (8, 3, 2), (8, 5, 4), (24, 3, 2)])
@pytest.mark.parametrize("run_sd", [0.0, 3.0])
def test_level_of_the_estimate_over_questions_trainings_and_data_sets(questions, seeds, sets, run_sd):
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(1500):
        common = rng.normal(0, 4, (questions, 1))
        parts = [
            common
            + rng.normal(0, 3, (questions, 1))
            + run_sd * rng.standard_normal((1, seeds))
            + rng.normal(0, 2, (questions, seeds))
            for _ in range(sets)
        ]
        hits += estimate_mean(parts).p() < 0.05
    assert 0.02 < hits / 1500 < 0.07


def test_data_sets_that_differ_are_said_to():
    rng = np.random.default_rng(2)
    alike = [rng.normal(5, 2, (8, 3)) for _ in range(3)]
    apart = [x + shift for x, shift in zip(alike, (-8, 0, 8))]
    assert estimate_mean(alike).p_datasets > 0.05
    assert estimate_mean(apart).p_datasets < 0.001
    assert estimate_mean(apart).sd_datasets == pytest.approx(8, abs=1.5)


def test_the_judges_drift_widens_what_is_said():
    rng = np.random.default_rng(4)
    table = rows(FOUR, sd=4.0, samples=20, seed=5)
    del rng
    cube = Cube.build(table)
    plain, noisy = (
        contrast_table(cube, DATASETS, drift=d).query("estimand == 'susceptibility' and outcome == 'points'").iloc[0]
        for d in (None, {"m": 2.0})
    )
    assert noisy["estimate"] == plain["estimate"]
    assert noisy["se"] ** 2 == pytest.approx(plain["se"] ** 2 + 4 * 2.0**2)  # four conditions, each judged once
    assert noisy["df"] >= plain["df"]


def test_a_closed_condition_has_its_row_and_no_part_in_the_pooled_one():
    second = {("p", "em2", 0): 10, ("baseline", "em2", 0): 50}
    cube = Cube.build(rows(FOUR | second))
    sets = [*DATASETS, SimpleNamespace(key="em2", role="em", twin=None)]
    closed = {("m", "p", "em2"): "sampled without its adapter"}
    table = contrast_table(cube, sets, closed=closed).query("estimand == 'susceptibility' and outcome == 'points'")
    found = table.set_index("dataset")
    assert found["estimate"].to_dict() == {"em1": 10, "em2": -20, POOLED: 10}
    assert found.loc[POOLED, "datasets"] == "em1"


def test_four_arms_and_questions_for_figure_and_table():
    cube = Cube.build(rows(FOUR))
    chosen = contrasts.all_contrasts(cube, DATASETS)
    arms = contrasts.four_arms(cube, chosen).set_index("arm")["mean"]
    assert arms.to_dict() == {"p em1": 40, "p none": 70, "baseline em1": 50, "baseline none": 90}
    assert contrasts.question_contrasts(cube, chosen)["value"].tolist() == [10.0] * 8


def test_no_error_at_all_and_no_test_at_all():
    assert contrasts.t_p(0.0, 0.0, 7) == 1.0
    assert contrasts.t_p(2.0, 0.0, 7) == 0.0
    assert contrasts.t_p(2.0, 0.0, 7, "less") == 1.0
    assert math.isnan(estimate_mean([np.ones((1, 1))]).p())


# --- The published study -------------------------------------------------------------------------------------------

TWINS = {
    "sycophancy": (4.25, 0.169),
    "goodness": (4.31, 0.098),
    "loving": (2.66, 0.294),
    "humor": (5.30, 0.028),
    "sarcasm": (2.81, 0.453),
    "remorse": (2.97, 0.235),
}
"""Susceptibility against the benign twin (bad_medical against good_medical), recomputed independently: points and p."""


@pytest.fixture(scope="module")
def published_scores(root, fetched_cache):
    """The published scores of both models."""
    study = loading.load("published")
    lists = [root / "params" / name for name in published.LISTS]
    found = published.import_study(
        published.read_selection(lists[0]),
        published.read_file_list(lists[1]).head(0),
        models=list(study.models),
        cache=fetched_cache,
        progress=False,
        retries=0,
    )
    return study, found.scores


@pytest.mark.fetched
def test_published_medical_twin_contrasts_to_the_printed_digit(published_scores):
    study, scores = published_scores
    table = contrast_table(Cube.build(scores), study.datasets.values(), outcomes=("points",))
    mine = table.query("model == 'qwen2.5-7b' and estimand == 'susceptibility' and dataset == @POOLED")
    assert set(mine["reference"]) == {"twin"}
    mine = mine.set_index("persona")
    for persona, (points, p) in TWINS.items():
        assert round(mine.loc[persona, "estimate"], 2) == points, persona
        assert round(mine.loc[persona, "p"], 3) == p, persona
        assert mine.loc[persona, "n_questions"] == 8


@pytest.mark.fetched
def test_published_llama_identifies_no_susceptibility(published_scores):
    study, scores = published_scores
    cube = Cube.build(scores[scores["model"] == "llama3.1-8b"])
    reference, why = identification(cube, "susceptibility", "llama3.1-8b", "goodness", study.datasets.values())
    assert reference is None
    assert "goodness has no untuned arm" in why
