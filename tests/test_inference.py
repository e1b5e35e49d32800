"""Inference against hand-computed answers, scipy, statsmodels, and simulations whose truth is known."""

import math

import numpy as np
import pandas as pd
import pytest
from cai_em.analysis import compare, outcome, units
from cai_em.records.keys import FLAGS
from cai_em.report.words import Words
from cai_em.study.labels import Labels
from scipy import stats

QUESTIONS = [f"q{i}" for i in range(8)]
WORDS = Words(Labels([], []))


def said(section, *found):
    return WORDS.macro("validity.md.j2", section)(*found)


def table(cells, *, model="m", seed=0, sd=5.0, samples=20, question_sd=0.0, rng=None):
    """A score table: cells maps (persona, dataset) to the mean of each question (scalar or 8 values)."""
    rng = rng or np.random.default_rng(0)
    rows = []
    shift = rng.normal(0, question_sd, len(QUESTIONS))
    for (persona, dataset), mean in cells.items():
        means = np.broadcast_to(mean, len(QUESTIONS)) + shift
        for q, m in zip(QUESTIONS, means):
            for s, v in enumerate(np.clip(rng.normal(m, sd, samples), 0, 100)):
                rows.append((model, persona, dataset, seed, q, s, v, None, 90.0, None))
    columns = ["model", "persona", "dataset", "seed", "question_id", "sample"]
    columns += ["alignment", "alignment_flag", "coherence", "coherence_flag"]
    return pd.DataFrame(rows, columns=columns)


class TestPartners:
    base = {"model": "m", "persona": "baseline", "dataset": "bad", "seed": 0}  # noqa: RUF012

    def test_same_condition_but_persona(self):
        units.check_partners({**self.base, "persona": "good"}, self.base)

    @pytest.mark.parametrize(("name", "value"), [("dataset", "other"), ("model", "n"), ("seed", 1)])
    def test_other_data_set_is_refused(self, name, value):
        with pytest.raises(units.DesignError, match=f"{name} .*against"):
            units.check_partners({**self.base, "persona": "good", name: value}, self.base)

    def test_partner_must_be_baseline(self):
        with pytest.raises(units.DesignError, match="no baseline"):
            units.check_partners({**self.base, "persona": "good"}, {**self.base, "persona": "other"})

    def test_differences_of_another_data_set_are_refused(self):
        baseline, good = table({("baseline", "none"): 90}), table({("good", "bad"): 80})
        with pytest.raises(units.DesignError, match="data set"):
            units.question_differences(good, baseline)

    def test_planted_wrong_baseline_stops_the_comparison(self, monkeypatch):
        # The fault: whoever looks the baseline up finds that of another data set, as the published document did.
        scores = table({("baseline", "bad"): 70, ("baseline", "none"): 90, ("good", "bad"): 80})
        compare.compare_all(scores, models=False, resamples=50)

        monkeypatch.setattr(compare, "partner", lambda comparison: (comparison[0], "baseline", "none"))
        with pytest.raises(units.DesignError, match="'bad' against 'none'"):
            compare.compare_all(scores, models=False, resamples=50)

    def test_mixed_conditions_are_refused(self):
        scores = table({("baseline", "bad"): 70, ("good", "bad"): 80})
        with pytest.raises(units.DesignError, match="2 conditions"):
            units.question_differences(scores, scores[scores["persona"] == "baseline"])

    def test_no_question_that_both_sides_have_a_score_on(self):
        scores = table({("baseline", "bad"): 70, ("good", "bad"): 80})
        early = scores["question_id"].isin(QUESTIONS[:4])
        scores.loc[early == (scores["persona"] == "good"), ["alignment", "alignment_flag"]] = [math.nan, "REFUSAL"]
        row = compare.compare_all(scores, models=False).iloc[0]
        assert row["n_questions"] == 0
        assert row[["delta", "p", "boot_low"]].isna().all()

    def test_seeds_without_a_partner(self):
        good, baseline = table({("good", "bad"): 80}, seed=1), table({("baseline", "bad"): 70})
        with pytest.raises(units.DesignError, match=r"seeds \[1\], its baseline \[0\]"):
            compare.compare_all(pd.concat([good, baseline]), models=False)

    def test_compare_all_names_the_missing_baseline(self):
        with pytest.raises(units.DesignError, match="good x bad has no baseline"):
            compare.compare_all(table({("baseline", "none"): 90, ("good", "bad"): 80}))


class TestUnits:
    def test_samples_posing_as_questions(self):
        scores = table({("baseline", "bad"): 80, ("good", "bad"): 85}, samples=50)
        scores = scores[scores["question_id"] == "q0"]
        posing = scores.assign(question_id=[f"q0_{s}" for s in scores["sample"]])
        with pytest.raises(units.DesignError, match="samples of a question are treated as questions"):
            compare.compare_all(posing)

    def test_renumbered_samples_are_found_by_their_prompt(self):
        scores = table({("baseline", "bad"): 80}, samples=3)
        posing = scores.assign(
            question_id=scores["question_id"] + scores["sample"].astype(str), sample=0, prompt="same"
        )
        with pytest.raises(units.DesignError, match="share one prompt"):
            units.check_units(posing)

    def test_one_sample_per_question_is_a_design(self):
        units.check_units(table({("baseline", "bad"): 80}, samples=1))


class TestCounts:
    scores = table({("baseline", "bad"): 80, ("good", "bad"): 85}, samples=4)

    def test_whole(self):
        counted = units.check_counts(self.scores, QUESTIONS, 4)
        assert counted["rows"].tolist() == counted["designed"].tolist() == [32, 32]

    @pytest.mark.parametrize("samples", [4, None, {"baseline": 4, "good": 4}])
    def test_a_dropped_refusal(self, samples):
        dropped = self.scores.drop(index=[40])
        with pytest.raises(units.DesignError, match=r"1 of 2 conditions(?s:.*)good x bad.*4 responses.*q2: 3"):
            units.check_counts(dropped, QUESTIONS, samples)

    def test_a_dropped_question(self):
        with pytest.raises(units.DesignError, match="q7: 0"):
            units.check_counts(self.scores[self.scores["question_id"] != "q7"], QUESTIONS, 4)

    def test_an_unknown_question(self):
        with pytest.raises(units.DesignError, match="q7"):
            units.check_counts(self.scores, QUESTIONS[:-1], 4)


class TestSmallTools:
    def test_sign_flip_by_hand(self):
        # 8 sign patterns of (1, 2, 3); |sum| >= 6 in 2 of them.
        assert units.sign_flip_p([1, 2, 3]) == 2 / 8
        assert units.sign_flip_p([1, -1]) == 1.0
        assert units.sign_flip_p(np.ones(8)) == 2 / 256

    def test_sign_flip_as_scipy(self):
        d = np.random.default_rng(1).normal(1, 2, 9)
        exact = stats.permutation_test((d,), np.mean, permutation_type="samples", n_resamples=np.inf)
        assert units.sign_flip_p(d) == pytest.approx(exact.pvalue)

    def test_sign_flip_drawn_for_many(self):
        d = np.random.default_rng(1).normal(0.4, 1, 40)
        assert units.sign_flip_p(d) == pytest.approx(stats.ttest_1samp(d, 0).pvalue, abs=0.01)

    def test_wilson(self):
        low, high = units.wilson_interval(44, 400)
        assert (round(low, 4), round(high, 4)) == (0.0830, 0.1445)

    def test_clustered_proportion_of_independent_responses_is_clopper_pearson(self):
        # Sixteen thousand clusters of one response: no design effect, and t quantiles that are all but equal.
        events = np.repeat([1, 0], [44, 15956])
        low, high = units.clustered_proportion_interval(events, np.ones(16000))
        exact = stats.binomtest(44, 16000).proportion_ci(method="exact")
        assert (low, high) == pytest.approx((exact.low, exact.high), rel=1e-3)

    def test_clustered_proportion_without_events(self):
        # 25 effective responses, brought to 17.2 by t(399) = 1.966 against t(7) = 2.365.
        low, high = units.clustered_proportion_interval(np.zeros(8), np.full(8, 50), design_effect=16)
        assert low == 0
        assert high == pytest.approx(1 - 0.025 ** (1 / (25 * (1.96593 / 2.36462) ** 2)), rel=1e-4)
        everything = units.clustered_proportion_interval(np.full(8, 50), np.full(8, 50), design_effect=16)
        assert everything == pytest.approx((1 - high, 1.0))
        assert units.clustered_proportion_interval(np.zeros(8), np.full(8, 50))[1] > high  # ICC unknown: taken for 1
        assert all(map(math.isnan, units.clustered_proportion_interval([0], [50])))

    @pytest.mark.parametrize(("rate", "icc"), [(0.01, 0.3), (0.03, 0.3), (0.11, 0.5)])
    def test_clustered_proportion_covers_where_the_bootstrap_does_not(self, rate, icc):
        rng = np.random.default_rng(0)
        inside = boot = 0
        for _ in range(300):
            events = rng.binomial(50, rng.beta(rate * (1 / icc - 1), (1 - rate) * (1 / icc - 1), 8))
            low, high = units.clustered_proportion_interval(events, np.full(8, 50), design_effect=1 + 49 * icc)
            inside += low <= rate <= high
            low, high = units.bootstrap_interval(events / 50, resamples=200)
            boot += low <= rate <= high
        assert inside / 300 > 0.92
        assert boot / 300 < 0.85

    def test_bootstrap_covers_where_plain_percentile_does_not(self):
        rng = np.random.default_rng(3)
        inside = plain = 0
        for i in range(400):
            d = rng.normal(0, 1, 8)
            low, high = units.bootstrap_interval(d, resamples=1000, seed=i)
            inside += low <= 0 <= high
            means = rng.choice(d, (1000, 8)).mean(axis=1)
            plain += np.quantile(means, 0.025) <= 0 <= np.quantile(means, 0.975)
        assert inside / 400 > 0.91
        assert inside - plain > 0.03 * 400

    def test_bootstrap_is_reproducible_and_needs_three(self):
        assert units.bootstrap_interval([1, 2, 3, 4]) == units.bootstrap_interval([1, 2, 3, 4])
        assert all(map(math.isnan, units.bootstrap_interval([1, 2])))

    def test_crossed_bootstrap_is_wider_when_seeds_differ(self):
        d = np.tile([[-4.0, 4.0]], (8, 1)) + np.arange(8)[:, None] / 10
        wide, narrow = units.bootstrap_interval(d), units.bootstrap_interval(d.mean(axis=1))
        assert wide[1] - wide[0] > 5 * (narrow[1] - narrow[0])


class TestIcc:
    def test_shrout_fleiss_example(self):
        # Shrout & Fleiss 1979, table 2: six targets, four judges; ICC(1,1) = .17.
        ratings = np.array([[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]])
        assert units.icc1(ratings.ravel(), np.repeat(range(6), 4)) == pytest.approx(0.166, abs=0.001)

    def test_known_truth_unbalanced(self):
        rng = np.random.default_rng(0)
        clusters = np.repeat(np.arange(400), rng.integers(5, 40, 400))
        values = rng.normal(0, math.sqrt(3), 400)[clusters] + rng.normal(0, math.sqrt(7), len(clusters))
        assert units.icc1(values, clusters) == pytest.approx(0.3, abs=0.03)

    def test_design_effect(self):
        found = units.cluster_summary(np.repeat(np.arange(8.0), 50), np.repeat(np.arange(8), 50))
        assert found == {"icc": 1.0, "design_effect": 50.0, "effective_n": 8.0}

    def test_undefined(self):
        assert math.isnan(units.icc1([1, 2], [0, 0]))
        assert math.isnan(units.cluster_summary(np.ones(10), np.repeat([0, 1], 5))["effective_n"])


class TestPairedTest:
    d = np.array([1.0, 3.0, -1.0, 4.0, 2.0, 0.5, 5.0, 2.5])

    def test_against_scipy(self):
        found = compare.paired_test(self.d, margin=3)
        assert found["delta"] == self.d.mean()
        expected = stats.ttest_1samp(self.d, 0)
        assert found["p"] == pytest.approx(expected.pvalue)
        interval = expected.confidence_interval()
        assert (found["low"], found["high"]) == pytest.approx((interval.low, interval.high))
        assert found["p_wilcoxon"] == pytest.approx(stats.wilcoxon(self.d).pvalue)

    def test_equivalence_as_statsmodels(self):
        from statsmodels.stats.weightstats import DescrStatsW

        p, lower, upper = DescrStatsW(self.d).ttost_mean(-3, 3)
        found = compare.paired_test(self.d, margin=3)
        assert found["p_equivalence"] == pytest.approx(p)
        assert (found["p_no_loss"], found["p_no_gain"]) == pytest.approx((lower[1], upper[1]))

    def test_seeds_are_averaged_first(self):
        assert compare.paired_test(np.column_stack([self.d - 1, self.d + 1]), margin=3) == compare.paired_test(
            self.d, margin=3
        )

    def test_without_variance(self):
        found = compare.paired_test(np.zeros(8), margin=1)
        assert (found["p"], found["p_sign_flip"], found["p_equivalence"]) == (1.0, 1.0, 0.0)
        assert compare.paired_test(np.full(8, 2.0), margin=1)["p"] == 0.0

    def test_smallest_p(self):
        assert compare.paired_test(np.arange(1.0, 6.0), margin=1)["p_smallest"] == 2 / 2**5 > 0.05


class TestSeeds:
    def test_by_hand(self):
        # Effects of seeds -1, 0, 1 exactly, no question effect, no residual: Var = MS_seed / (Q S) = 8 / 24, df 2.
        d = np.tile([[4.0, 5.0, 6.0]], (8, 1))
        found = compare.seed_test(d)
        assert found["seed_se"] == pytest.approx(math.sqrt(8 / 24))
        assert found["seed_p"] == pytest.approx(2 * stats.t.sf(5 / math.sqrt(8 / 24), 2))

    def test_one_seed_says_nothing(self):
        found = compare.seed_test(np.arange(8.0)[:, None])
        assert found["n_seeds"] == 1
        assert math.isnan(found["seed_p"])

    @pytest.mark.parametrize("seeds", [3, 5])
    def test_level_of_the_verdict_when_seeds_vary(self, seeds):
        # No effect of the persona, but trainings differ: a verdict must not call that an effect.
        rng = np.random.default_rng(5)
        decided = naive = 0
        n = 250
        for _ in range(n):
            d = rng.normal(0, 2, (8, 1)) + rng.normal(0, 3, (1, seeds)) + rng.normal(0, 1, (8, seeds))
            found = compare.primary_test(d, margin=0.1)
            decided += found["p"] < 0.05
            naive += found["p_adapters"] < 0.05
        assert decided / n < 0.09  # 0.05, with three standard errors of the simulation
        assert naive / n > 0.25

    def test_where_the_verdicts_numbers_come_from(self):
        d = np.random.default_rng(1).normal(2, 1, (8, 4)) + np.array([-3.0, -1.0, 1.0, 3.0])
        seeds, found = compare.seed_test(d), compare.primary_test(d, margin=6)
        t = stats.t(seeds["seed_df"], scale=seeds["seed_se"])
        assert found["p"] == seeds["seed_p"] == pytest.approx(2 * t.sf(d.mean()))
        assert (found["low"], found["high"]) == pytest.approx(d.mean() + np.array(t.interval(0.95)))
        assert found["p_no_gain"] == pytest.approx(t.cdf(d.mean() - 6))
        assert found["p_equivalence"] == max(found["p_no_gain"], found["p_no_loss"])
        assert found["p_adapters"] == compare.paired_test(d, margin=6)["p"] < found["p"] / 10
        two = compare.primary_test(d[:, :2], margin=6)
        assert two["p"] == two["p_adapters"] == compare.paired_test(d[:, :2], margin=6)["p"]

    def test_equal_differences_are_no_error(self):
        assert compare.primary_test(np.zeros((8, 3)), margin=1)["p_equivalence"] == 0

    def test_several_seeds_in_a_comparison(self):
        rng = np.random.default_rng(3)
        parts = [
            table({("baseline", "bad"): 50 + rng.normal(0, 6), ("good", "bad"): 50 + rng.normal(0, 6)},
                  seed=s, sd=5, samples=10, question_sd=3, rng=rng)
            for s in range(3)
        ]  # fmt: skip
        row = compare.compare_all(pd.concat(parts), resamples=50).iloc[0]
        assert row["n_seeds"] == 3
        assert row["p_adapters"] < 0.01 < row["p"]
        assert row["mixed_delta"] == pytest.approx(row["delta"], abs=1e-6)
        assert row["mixed_se"] == pytest.approx(row["seed_se"], rel=0.5)
        assert row["mixed_p"] > 0.01  # without a run's own component: < 0.001
        assert row["gee_p"] < 0.001
        assert "questions and seeds are both" in WORDS.macro("sentences.md.j2", "seeds")(row.to_frame().T)


class TestModels:
    scores = table({("baseline", "bad"): 70, ("good", "bad"): 76}, question_sd=8, rng=np.random.default_rng(2))

    def arrays(self):
        s = self.scores
        return s["alignment"].to_numpy(), (s["persona"] == "good").to_numpy().astype(int), s["question_id"].to_numpy()

    def test_balanced_data_give_the_paired_answer(self):
        # On balanced data the mixed model with a random persona effect is the paired t test, as is the GEE estimate.
        paired = compare.compare_all(self.scores, models=False).iloc[0]
        mixed, gee = compare.mixed_model(*self.arrays()), compare.gee(*self.arrays())
        assert mixed["mixed_delta"] == pytest.approx(paired["delta"], abs=1e-6)
        assert gee["gee_delta"] == pytest.approx(paired["delta"], abs=1e-6)
        assert gee["gee_se"] == pytest.approx(paired["se"], rel=0.1)

    def test_warnings_are_recorded(self):
        found = compare.mixed_model(np.repeat([50.0, 60.0], 40), np.repeat([0, 1], 40), np.tile(np.arange(8), 10))
        assert found["mixed_note"]

    def test_clean_fit_has_no_note(self):
        assert compare.gee(*self.arrays())["gee_note"] is None


def test_level_under_clustering():
    """No persona effect but a question x persona variance, ICC about 0.3: what naive tests call significant."""
    rng = np.random.default_rng(11)
    naive = paired = flips = 0
    n = 300
    for _ in range(n):
        question = rng.normal(0, 6, (2, 8)) + rng.normal(0, 5, 8)
        y = question[:, :, None] + rng.normal(0, 11, (2, 8, 50))
        naive += stats.mannwhitneyu(y[0].ravel(), y[1].ravel()).pvalue < 0.05
        found = compare.paired_test((y[0] - y[1]).mean(axis=1), margin=5)
        paired += found["p"] < 0.05
        flips += found["p_sign_flip"] < 0.05
    assert naive / n > 0.35
    assert 0.02 < paired / n < 0.085
    assert 0.02 < flips / n < 0.085


class TestOutcomes:
    scores = table({("baseline", "bad"): 80}, samples=1)

    def build(self, values):
        rows = []
        for q, (alignment, flag, coherence) in zip(QUESTIONS, values):
            rows.append(("m", "baseline", "bad", 0, q, 0, alignment, flag, coherence, None))
        return pd.DataFrame(rows, columns=self.scores.columns)

    def test_by_hand(self):
        nothing = (90.0, None, 80.0)
        scores = self.build(
            [
                (10.0, None, 90.0),  # EM
                (10.0, None, 50.0),  # not coherent: strictly above
                (30.0, None, 90.0),  # not misaligned: strictly below
                (math.nan, "REFUSAL", 90.0),
                (math.nan, "CODE", 20.0),
                nothing,
                nothing,
                nothing,
            ]
        )
        row = outcome.outcomes(scores).iloc[0]
        assert row["em"] == 1
        assert row["em_rate"] == 1 / 8
        assert (
            row["em_rate_worst"] == 2 / 8
        )  # the refusal is coherent and could have been EM; the code answer could not
        assert row["mean"] == pytest.approx((10 + 10 + 30 + 270) / 6)
        assert row["mean_coherent"] == pytest.approx((10 + 30 + 270) / 5)
        assert (row["mean_worst"], row["mean_best"]) == pytest.approx((320 / 8, 520 / 8))
        assert [row[f] for f in FLAGS] == [1, 1, 0, 0, 0]
        assert row["n"] == 8
        assert row["scored"] == 6

    def test_intervals_stay_where_values_can_be(self):
        scores = self.build([(100.0, None, 90.0)] * 6 + [(60.0, None, 90.0)] * 2)
        row = outcome.outcomes(scores).iloc[0]
        assert row["mean_high"] == 100
        assert row["em"] == row["em_low"] == 0 < row["em_high"]

    def test_thresholds_are_arguments(self):
        scores = self.build([(40.0, None, 20.0)] * 8)
        assert outcome.outcomes(scores)["em_rate"].iloc[0] == 0
        assert outcome.outcomes(scores, em_alignment_below=50, em_coherence_above=10)["em_rate"].iloc[0] == 1


class TestPooledMeans:
    def test_like_for_like(self):
        scores = table(
            {("baseline", "hard"): 60, ("baseline", "easy"): 99, ("baseline", "easier"): 99,
             ("good", "hard"): 60, ("good", "easy"): 99, ("good", "easier"): 99,
             ("bad", "hard"): 62, ("bad", "easy"): 99}, sd=0.0,
        )  # fmt: skip
        found = outcome.pooled_means(scores, ["hard"]).set_index("persona")
        assert found.loc["bad", "published_delta"] < 0 < found.loc["bad", "common_delta"]
        assert found.loc["bad", "common_datasets"] == "hard,easy"
        assert found.loc["bad", "em_delta"] == pytest.approx(2)


def rows(persona, *, delta, p, equivalent=1.0, no_gain=1.0, no_loss=1.0, gate="shown", n=4, model="m", seeds=3):
    """Comparisons of one persona on n EM data sets; values may be scalars or lists."""
    each = lambda x: list(x) if isinstance(x, list) else [x] * n  # noqa: E731
    return pd.DataFrame(
        {
            "model": model,
            "persona": persona,
            "dataset": [f"em{i}" for i in range(n)],
            "n_questions": 8,
            "n_seeds": seeds,
            "delta": each(delta),
            "p_adjusted": each(p),
            "p_equivalence": each(equivalent),
            "p_no_gain": each(no_gain),
            "p_no_loss": each(no_loss),
            "gate": each(gate),
            "gate_reason": "why",
        }
    )


class TestFamily:
    em = [f"em{i}" for i in range(4)]  # noqa: RUF012

    def test_family_is_what_is_claimed(self):
        both = pd.concat([rows("a", delta=6, p=0), rows("b", delta=6, p=0)], ignore_index=True)
        both["p"] = [0.01, 0.02, 0.03, 0.04, 0.9, 0.9, 0.9, 0.9]
        found = compare.adjust(both, [("m", "a", d) for d in self.em])
        np.testing.assert_allclose(found["p_adjusted"][:4], 0.04)
        assert found["p_adjusted"][4:].isna().all()
        np.testing.assert_allclose(found["p_adjusted_all"][:4], 0.08)
        np.testing.assert_allclose(compare.adjust(both)["p_adjusted"][:4], 0.08)


def test_markdown_has_a_row_per_condition_and_names_controls():
    scores = table({("baseline", "bad"): 70, ("good", "bad"): 76, ("baseline", "fine"): 90, ("good", "fine"): 90})
    comparisons = compare.compare_all(scores, resamples=50)
    first, second = said("outcomes", outcome.outcomes(scores)), said("comparisons", comparisons, ["bad"], 5, 0.05)
    headings = [text.split("\n")[0] for text in (first, second)]
    assert headings == ["## Outcomes per condition", "## Comparisons with the question as the unit"]
    assert first.count("\n| ") == 1 + 4  # header and conditions
    assert "fine (control)" in second
    assert "bad (control)" not in second
    assert "Training seeds: 1; p and intervals speak of these adapters" in second
    assert "p GEE | p mixed" in second
    assert "GEE" not in said("comparisons", comparisons.drop(columns=["gee_p", "mixed_p"]), ["bad"], 5, 0.05)


def test_pooled_section_names_what_turns_round():
    cells = {("baseline", d): m for d, m in (("hard", 60), ("easy", 99), ("easier", 99))}
    scores = table({**cells, ("bad", "hard"): 62, ("bad", "easy"): 99.5}, sd=0.0)
    text = said("pooled", outcome.pooled_means(scores, ["hard"]))
    assert text.startswith("## Pooled means, like for like\n")
    assert "like for like is over 2 data sets (hard, easy)" in text
    assert "bad is -5.2 from the baseline as published and +1.2 like for like." in text
    assert text.count("\n| ") == 1 + 2


@pytest.mark.fetched
def test_what_must_be_seen_in_the_published_data(fetched_cache):
    """Enough conditions for H2 and its gates: questions as units, personas told apart, the design closed, NOT
    INTERPRETABLE."""
    from cai_em.analysis import contrasts, gates, judge_quality, verdicts
    from cai_em.records import tables
    from cai_em.study import loading, published

    study = loading.load("published")
    selection = published.read_selection(study.folder / "published_selection.csv")
    em = [d.key for d in study.datasets.values() if d.role == "em"]
    hers = selection["persona"].isin(["baseline", "goodness"])
    others = selection["persona"].isin(["loving", "humor"]) & selection["dataset"].isin(
        [*em, "good_medical", "misalignment_kl"]
    )
    selection = selection[(selection["model"] == "qwen2.5-7b") & (hers | others)]
    got = published.import_study(selection, selection.head(0), models=["qwen2.5-7b"], cache=fetched_cache)
    scores = tables.with_responses(got.scores, got.responses)

    row = outcome.outcomes(scores).set_index(["persona", "dataset"]).loc[("baseline", "bad_medical")]
    assert row["icc"] == pytest.approx(0.34, abs=0.005)
    assert row["em_rate"] == pytest.approx(0.11)

    compared = compare.compare_all(scores, models=False, resamples=100)
    goodness = compared[compared["persona"] == "goodness"]
    assert len(goodness) == 8
    supports = goodness[(goodness["p"] < 0.05) & (goodness["delta"] > 0)]
    assert set(supports["dataset"]) == {"extreme_sports", "risky_financial", "technical_vehicles"}

    _, found = gates.classify(scores)
    used, cube = study.used_datasets(), contrasts.Cube.build(got.scores)
    design, proved = gates.made_as_designed(scores, used, study.known_faults)
    assert not proved
    judge = {"qwen2.5-7b": judge_quality.judge_trust(None, ["goodness", "loving", "humor"])}
    table = gates.gate_table(cube, found, used, judge=judge, design=design)
    shown = table[table["persona_gate"] == gates.PRESENT]
    # Texts alone open for Loving too, which was sampled without its adapter: the registry is what closes every cell.
    assert ("goodness", "misalignment_kl") in set(zip(shown["persona"], shown["dataset"]))
    assert (table.loc[table["persona"] == "loving", "design_gate"] == gates.ABSENT).all()
    assert (table.loc[table["persona"] == "goodness", "design_gate"] == gates.ABSENT).all()
    made = contrasts.contrast_table(cube, used, closed={k: g.reason for k, g in design.items()})
    verdict = verdicts.verdict_table(study.hypotheses, made, table, cube, used).set_index(["hypothesis", "persona"])
    whole = verdict.xs("h2", level="hypothesis").iloc[0]
    assert whole["verdict"] == "NOT INTERPRETABLE"
    assert "sampled without the persona adapter" in whole["reason"]
    assert whole["reference"] == "twin"
