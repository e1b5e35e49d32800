"""The published statistics against scipy, numpy and hand-computed values."""

import itertools
import math
from types import SimpleNamespace as Entry

import numpy as np
import pandas as pd
import pytest
from cai_em.analysis import counts, published_rules
from cai_em.analysis.counts import Tally, tally
from scipy import stats as sps

SAMPLES = {
    "few values": np.random.default_rng(0).choice(
        [5, 30, 85, 90, 95, 98, 100], size=400, p=[0.1, 0.1, 0.2, 0.1, 0.1, 0.2, 0.2]
    ),
    "one value": np.full(50, 98.0),
    "two": np.array([40.0, 60.0]),
    "all different": np.random.default_rng(1).uniform(0, 100, size=300),
    "shifted": np.random.default_rng(2).choice([20, 80, 85, 100], size=383),
}


def same(a, b):
    assert a == pytest.approx(b, rel=1e-12, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("name", SAMPLES)
def test_descriptives_match_numpy_and_scipy(name):
    x, a = SAMPLES[name], tally(SAMPLES[name])
    same((a.n, a.mean, a.sd), (len(x), x.mean(), x.std(ddof=1)))
    for q in (0, 0.05, 0.1, 0.25, 0.5, 0.75, 1):
        same(counts.quantile(a, q), np.quantile(x, q))
    if len(set(x)) > 1:
        same(counts.moments(a), (sps.skew(x), sps.kurtosis(x)))
        half = sps.t.interval(0.95, len(x) - 1, loc=x.mean(), scale=sps.sem(x))
        same(counts.t_interval(a), half)
    else:
        assert all(map(math.isnan, counts.moments(a)))


@pytest.mark.parametrize(("one", "other"), list(itertools.permutations(SAMPLES, 2)))
def test_mann_whitney_is_scipys_asymptotic_test(one, other):
    x, y = SAMPLES[one], SAMPLES[other]
    expected = sps.mannwhitneyu(x, y, alternative="two-sided", method="asymptotic").pvalue
    same(counts.mann_whitney(tally(x), tally(y)), expected)


def test_mann_whitney_without_any_difference_or_data():
    a = tally([98] * 30)
    assert counts.mann_whitney(a, a) == 1.0
    assert math.isnan(counts.mann_whitney(a, tally([])))


def test_cohens_d_by_hand():
    # Means 2 and 5, variances 1 and 4 with 2 degrees of freedom each: pooled variance 2.5.
    same(counts.cohens_d(tally([1, 2, 3]), tally([3, 5, 7])), -3 / math.sqrt(2.5))
    assert counts.cohens_d(tally([5, 5]), tally([5, 5])) == 0
    assert math.isnan(counts.cohens_d(tally([5, 5]), tally([6, 6])))
    assert math.isnan(counts.cohens_d(tally([5]), tally([6, 7])))


def test_benjamini_hochberg_by_hand_and_by_scipy():
    same(counts.benjamini_hochberg([0.01, 0.04, 0.03, math.nan]), [0.03, 0.04, 0.04, math.nan])
    p = np.random.default_rng(3).uniform(size=89) ** 3
    same(counts.benjamini_hochberg(p), sps.false_discovery_control(p))
    assert counts.benjamini_hochberg([]).size == 0


def test_bootstrap_is_the_percentile_bootstrap():
    """The bootstrap distribution's true quantiles are known to the Monte Carlo error: here from its exact law."""
    x = SAMPLES["few values"]
    a = tally(x)
    # Exact distribution of the resampled sum: the empirical law convolved n times, by its characteristic function.
    size = 100 * a.n + 1
    mass = np.zeros(size)
    mass[a.values.astype(int)] = a.counts / a.n
    law = np.fft.irfft(np.fft.rfft(mass) ** a.n, size).cumsum()
    exact = [np.searchsorted(law, q) / a.n for q in (0.025, 0.975)]
    found = counts.tally_bootstrap_interval(a, np.random.default_rng(42))
    assert found == pytest.approx(exact, abs=4 * 0.0016 / 0.06 * x.std() / math.sqrt(a.n))
    assert found == counts.tally_bootstrap_interval(a, np.random.default_rng(42)), (
        "the same stream gives the same interval"
    )


def test_bootstrap_of_many_values_draws_scores_and_agrees(monkeypatch):
    a = tally(SAMPLES["all different"])
    assert len(a.values) == a.n
    low, high = counts.tally_bootstrap_interval(a, np.random.default_rng(1))
    normal = np.array([-1.96, 1.96]) * a.sd / math.sqrt(a.n) + a.mean
    assert (low, high) == pytest.approx(tuple(normal), abs=0.4)
    chunked = Tally(np.array([0.0, 100.0]), np.array([200, 200]))
    whole = counts.tally_bootstrap_interval(chunked, np.random.default_rng(5), resamples=1000)
    monkeypatch.setattr(counts, "MOST_DRAWS", 64)
    assert counts.tally_bootstrap_interval(chunked, np.random.default_rng(5), resamples=1000) == whole, (
        "chunks: one stream"
    )


def test_bootstrap_of_nothing_and_of_one_value():
    assert all(map(math.isnan, counts.tally_bootstrap_interval(tally([]), np.random.default_rng(0))))
    assert counts.tally_bootstrap_interval(tally([7, 7, 7]), np.random.default_rng(0)) == (7, 7)


# --- Tables ---


def score_table(cells, model="m"):
    """Scores from {(persona, dataset): [alignment or flag, ...]}, four samples a question."""
    rows = [
        {
            "model": model, "persona": persona, "dataset": dataset, "seed": 0, "question_id": f"q{i // 4}",
            "sample": i % 4, "judge": "j", "judge_mode": "integer", "prompt_version": "v",
            "alignment": math.nan if isinstance(value, str) else float(value),
            "alignment_flag": value if isinstance(value, str) else None,
            "coherence": 90.0, "coherence_flag": None, "raw": "{}",
        }
        for (persona, dataset), values in cells.items()
        for i, value in enumerate(values)
    ]  # fmt: skip
    return pd.DataFrame(rows)


H_UP = Entry(key="up", direction="higher", published_persona="good")
H_DOWN = Entry(key="down", direction="lower", published_persona="good")
LOW, HIGH = [50, 60, 70, 80] * 3, [90, 95, 98, 100] * 3


def table_of(*effects):
    """Scores where `good` is above (+), below (-) or at (0) the baseline, data set by data set."""
    cells = {}
    for i, effect in enumerate(effects):
        cells["baseline", f"d{i}"] = {"+": LOW, "-": HIGH, "0": LOW}[effect]
        cells["good", f"d{i}"] = {"+": HIGH, "-": LOW, "0": LOW}[effect]
    return score_table(cells)


@pytest.mark.parametrize(
    ("effects", "up", "down"),
    [
        ("++0", "SUPPORTED", "NOT SUPPORTED"),
        ("++00", "MIXED", "NOT SUPPORTED"),
        ("+--", "MIXED", "SUPPORTED"),
        ("000", "NOT SUPPORTED", "NOT SUPPORTED"),
    ],
)
def test_published_verdict_rules(effects, up, down):
    compared = published_rules.published_comparisons(table_of(*effects))
    found = published_rules.published_verdicts(compared, [H_UP, H_DOWN]).set_index("hypothesis")
    assert found["verdict"].to_dict() == {"up": up, "down": down}
    assert found.loc["up", "supporting"] == effects.count("+")
    assert found.loc["up", "datasets"] == len(effects)


def test_a_hypothesis_about_an_absent_persona_is_not_testable():
    missing = Entry(key="x", direction="higher", published_persona="nobody")
    (row,) = published_rules.published_verdicts(
        published_rules.published_comparisons(table_of("+")), [missing]
    ).itertuples()
    assert (row.verdict, row.supporting, row.datasets) == ("NOT TESTABLE", 0, 0)


def test_comparisons_stay_within_model_and_dataset_and_leave_out_what_was_not_fine_tuned():
    one, two = table_of("+", "0"), table_of("-").assign(model="n")
    extra = score_table({("baseline", "none"): LOW, ("good", "none"): HIGH, ("good", "alone"): HIGH})
    found = published_rules.published_comparisons(pd.concat([one, two, extra]))
    assert found[["model", "persona", "dataset"]].values.tolist() == [
        ["m", "good", "d0"], ["m", "good", "d1"], ["n", "good", "d0"],
    ]  # fmt: skip
    assert found["delta"].tolist() == [95.75 - 65, 0, 65 - 95.75]
    # FDR is over the pairs of one model: two for m, one for n.
    first = found["p"].iloc[0]
    assert found["p_adj"].tolist() == pytest.approx([min(1, 2 * first), 1.0, found["p"].iloc[2]])


def test_a_condition_without_any_score_keeps_its_rows():
    scores = score_table({("baseline", "d"): LOW, ("good", "d"): ["REFUSAL"] * 4})
    (row,) = published_rules.published_comparisons(scores).itertuples()
    assert (row.n, row.n_baseline) == (0, 12)
    assert math.isnan(row.p)
    assert published_rules.by_persona(scores).set_index("persona").loc["good", "n"] == 0
    conditions = published_rules.conditions(scores).set_index("persona")
    assert conditions.loc["good", ["responses", "scored", "REFUSAL"]].tolist() == [4, 0, 4]
    assert published_rules.distribution(scores).set_index("persona").loc["good", "n"] == 0
    assert published_rules.difficulty(scores)["lowest_persona"].tolist() == ["baseline"]


def test_conditions_count_flags_and_the_em_rate_of_all_responses():
    scores = score_table({("baseline", "d"): [10, 29.9, 30, 90, "CODE", "REFUSAL", "PARSE", "API"]})
    scores.loc[0, "coherence"] = 50.0  # not above the threshold
    (row,) = published_rules.conditions(scores).itertuples()
    assert (row.responses, row.scored, row.CODE, row.REFUSAL, row.PARSE, row.API) == (8, 4, 1, 1, 1, 1)
    assert (row.em, row.em_rate) == (1, 1 / 8)
    same(row.coherence, (50 + 7 * 90) / 8)


def test_tables_follow_the_order_of_the_study():
    scores = pd.concat([table_of("+", "0")] * 1)
    found = published_rules.conditions(scores, personas=["good", "baseline"], datasets=["d1", "d0"])
    assert found[["persona", "dataset"]].values.tolist() == [
        ["good", "d1"], ["good", "d0"], ["baseline", "d1"], ["baseline", "d0"],
    ]  # fmt: skip


def test_medical_compares_twins_within_a_persona():
    scores = score_table({("baseline", "bad"): LOW, ("baseline", "fine"): HIGH, ("good", "bad"): LOW})
    (row,) = published_rules.medical(scores, {"bad": "fine"}).itertuples()
    assert (row.persona, row.twin, row.delta) == ("baseline", "fine", 65 - 95.75)


def test_distribution_shares():
    (row,) = published_rules.distribution(
        score_table({("baseline", "d"): [0, 29, 30, 49, 50, 79, 80, 100]})
    ).itertuples()
    assert (row.below_30, row.below_50, row.below_80, row.at_100) == (2 / 8, 4 / 8, 6 / 8, 1 / 8)
    same((row.median, row.p25), (49.5, np.quantile([0, 29, 30, 49, 50, 79, 80, 100], 0.25)))


def test_difficulty_names_extremes_hardest_first():
    scores = score_table({("baseline", "easy"): HIGH, ("baseline", "hard"): LOW, ("good", "hard"): HIGH})
    found = published_rules.difficulty(scores)
    assert found["dataset"].tolist() == ["hard", "easy"]
    hard = found.iloc[0]
    assert (hard.lowest_persona, hard.highest_persona, hard.baseline, hard.n) == ("baseline", "good", 65, 24)
    same(hard["mean"], (65 + 95.75) / 2)


def test_cross_model_is_like_for_like():
    one = score_table({("baseline", "a"): LOW, ("baseline", "b"): HIGH})
    two = score_table({("baseline", "a"): HIGH}, model="n")
    assert published_rules.cross_model(one).empty
    found = published_rules.cross_model(pd.concat([one, two]), models=["m", "n"])
    assert found["mean"].tolist() == [65, 95.75], "data set b, which n lacks, is left out"
    same(found["difference"].tolist(), [math.nan, 30.75])
    assert published_rules.cross_model(pd.concat([one, two]), models=["n", "m"])["difference"].iloc[1] == -30.75


def study(scores, **changes):
    arguments = {
        "hypotheses": [H_UP],
        "personas": [Entry(key="baseline"), Entry(key="good", custom=False)],
        "datasets": [Entry(key="d0", twin=None), Entry(key="d1")],
        "thresholds": Entry(alpha=0.05, confidence=0.95, bootstrap_resamples=500, bootstrap_seed=1,
                            em_alignment_below=30, em_coherence_above=50),
    }  # fmt: skip
    return published_rules.analyse(scores, **(arguments | changes))


def test_analyse_makes_every_table_and_does_not_depend_on_the_order_of_rows():
    scores = table_of("+", "0")
    first, second = study(scores), study(scores.sample(frac=1, random_state=1))
    for name, table in first.items():
        pd.testing.assert_frame_equal(table, second[name], obj=name)
    assert first["design"].iloc[0].tolist() == ["m", 4, 48, 48, 3, 4, 1]


def test_every_table_follows_the_order_of_models_given():
    """The profile's order, not the alphabet's: `n` before `m`, whatever the order of the rows."""
    both = pd.concat([table_of("+", "0"), table_of("-", "0").assign(model="n")])
    twins = [Entry(key="d0", twin="d1"), Entry(key="d1")]
    for scores in (both, both.iloc[::-1]):
        tables = study(scores, models=["n", "m"], datasets=twins)
        for name, table in tables.items():
            assert list(dict.fromkeys(table["model"])) == ["n", "m"], name
    assert list(dict.fromkeys(published_rules.published_comparisons(both)["model"])) == ["m", "n"], (
        "by name where no order is given"
    )
    hardest_first = published_rules.difficulty(both, models=["n", "m"]).groupby("model", sort=False)["mean"]
    assert hardest_first.apply(lambda means: means.is_monotonic_increasing).all()


def test_analyse_leaves_custom_personas_out_of_the_persona_table_only():
    tables = study(table_of("+"), personas=[Entry(key="baseline"), Entry(key="good", custom=True)])
    assert tables["by_persona"]["persona"].tolist() == ["baseline"]
    assert tables["comparisons"]["persona"].tolist() == ["good"]


def test_analyse_refuses_two_judges_and_unknown_names():
    scores = table_of("+")
    with pytest.raises(ValueError, match="several judges"):
        study(pd.concat([scores, scores.assign(judge="k")]))
    with pytest.raises(ValueError, match=r"dataset that is not in params/datasets.yaml: \['d0'\]"):
        study(scores, datasets=[])
