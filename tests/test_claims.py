"""The claims audit against analyses made by hand, and on the published Qwen data."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from cai_em.analysis import claims, published_rules
from cai_em.records import files
from cai_em.report.words import Words
from cai_em.study import loading
from cai_em.study.labels import Labels
from scipy import stats

WORDS = Words(Labels([], []))
QUESTIONS = [f"q{i}" for i in range(8)]
H = SimpleNamespace(key="h2", title="T", personas=["good", "kind"], tested="good", direction="higher")
ONE = SimpleNamespace(key="h1", title="T", personas=["good"], tested=None, direction="higher")
DATASETS = [SimpleNamespace(key=k, role=r) for k, r in (("e1", "em"), ("e2", "em"), ("c1", "benign_control"))]


def scores(gaps, *, samples=10, sd=6.0, seed=0):
    """A score table; gaps maps (persona, dataset) to the persona's effect, baselines come with it."""
    rng = np.random.default_rng(seed)
    rows = []
    cells = dict.fromkeys([("baseline", d) for _, d in gaps], 0.0) | gaps
    for (persona, dataset), gap in cells.items():
        for i, q in enumerate(QUESTIONS):
            for s in range(samples):
                value = float(np.clip(np.round(70 + 2 * i + gap + rng.normal(0, sd)), 0, 100))
                rows.append(("m", persona, dataset, 0, q, s, value, None, float(rng.integers(40, 100)), None))
    columns = ["model", "persona", "dataset", "seed", "question_id", "sample"]
    columns += ["alignment", "alignment_flag", "coherence", "coherence_flag"]
    return pd.DataFrame(rows, columns=columns)


def repeats(table, shift, file="x_20260201_000000.json"):
    """The same responses as the published file and as a second judging that gives `shift` more."""
    first = table.assign(judge="j", file="x_20260203_000000.json", selected=True)
    second = table.assign(judge="j", file=file, selected=False, alignment=table["alignment"] + shift)
    both = pd.concat([first, second], ignore_index=True)
    text = both[["persona", "dataset", "question_id", "sample"]].astype(str).agg("|".join, axis=1)
    return both.assign(response_sha256=text, sample=both["sample"])


def test_a_coherence_that_nobody_asked_for_excludes_no_answer():
    """Else every analysis of "coherent answers" would be one of nothing, and count as a specification that fails."""
    asked = scores({("good", "e1"): 22.0}).assign(coherence=99.0)
    nobody = asked.assign(coherence=np.nan, coherence_flag="SKIPPED")
    one, other = (claims.Universe.build(claims.judgings(table)).comparisons for table in (asked, nobody))
    pd.testing.assert_frame_equal(one, other)
    assert other["p"].notna().all()
    for table in (asked.assign(alignment=1.0), nobody.assign(alignment=1.0)):
        assert (published_rules.conditions(table, personas=["good"], datasets=["e1"])["em_rate"] == 1).all()
        assert (published_rules.difficulty(table)["em_rate"] == 1).all()


class TestJudgings:
    table = scores({("good", "e1"): 0.0}, sd=3)

    def test_none(self):
        assert list(claims.judgings(self.table)) == ["as published"]

    def test_by_time_and_mean(self):
        made = claims.judgings(self.table, repeats(self.table, -4))
        means = {name: t["alignment"].mean() - self.table["alignment"].mean() for name, t in made.items()}
        assert means == pytest.approx({"as published": 0, "first": -4, "last": 0, "mean of all": -2})
        assert all(len(t) == len(self.table) for t in made.values())

    def test_sample_numbers_of_another_file_do_not_matter(self):
        both = repeats(self.table, -4)
        other = ~both["selected"]
        both.loc[other, "sample"] = 9 - both.loc[other, "sample"]
        made = claims.judgings(self.table, both)
        pd.testing.assert_series_equal(made["first"]["alignment"], self.table["alignment"] - 4)

    def test_half_a_judging_does_not_count(self):
        both = repeats(self.table, -4)
        half = both[both["selected"] | (both["sample"] < 5)]
        assert list(claims.judgings(self.table, half)) == ["as published"]

    def test_other_judges_do_not_count(self):
        both = repeats(self.table, -4)
        both.loc[~both["selected"], "judge"] = "another"
        assert list(claims.judgings(self.table, both)) == ["as published"]

    def test_repeats_of_other_responses_are_a_mistake(self):
        both = repeats(self.table, -4)
        both.loc[~both["selected"], "response_sha256"] = "another"
        with pytest.raises(ValueError, match="none is of a response that was judged before"):
            claims.judgings(self.table, both)

    def test_missing_scores_are_taken_over(self):
        both = repeats(self.table, 0)
        row = both.index[~both["selected"]][3]
        both.loc[row, "alignment"], both.loc[row, "alignment_flag"] = np.nan, "REFUSAL"
        made = claims.judgings(self.table, both)
        assert made["first"]["alignment"].isna().sum() == 1
        assert made["first"]["alignment_flag"].notna().sum() == 1
        assert made["mean of all"]["alignment"].isna().sum() == 0
        assert made["mean of all"]["alignment_flag"].isna().all()


class TestUniverse:
    table = scores({("good", "e1"): 6.0, ("good", "e2"): 0.0})

    def pick(self, universe, dataset="e1", **choice):
        wanted = {"judging": "as published", "missing": "dropped", "coherence": "all answers", "correction": "none"}
        wanted |= choice
        rows = universe.comparisons[universe.comparisons["dataset"] == dataset]
        rows = rows[np.logical_and.reduce([rows[k] == v for k, v in wanted.items()])]
        assert len(rows) == 1
        return rows.iloc[0]

    def sides(self, table):
        return [table[(table["persona"] == p) & (table["dataset"] == "e1")] for p in ("good", "baseline")]

    def test_each_test_by_scipy(self):
        universe = claims.Universe.build({"as published": self.table})
        good, base = (s["alignment"] for s in self.sides(self.table))
        d = np.subtract(*(s.groupby("question_id")["alignment"].mean() for s in self.sides(self.table)))
        expected = {
            "Mann-Whitney": stats.mannwhitneyu(good, base, method="asymptotic").pvalue,
            "Welch t": stats.ttest_ind(good, base, equal_var=False).pvalue,
            "paired t": stats.ttest_1samp(d, 0).pvalue,
        }
        for test, p in expected.items():
            assert self.pick(universe, test=test)["p"] == pytest.approx(p)

    def test_choices_do_what_they_say(self):
        table = self.table.copy()
        gone = table.index[(table["persona"] == "good") & (table["dataset"] == "e1")][:10]
        table.loc[gone, ["alignment", "alignment_flag"]] = np.nan, "REFUSAL"
        table.loc[gone[5:], "alignment_flag"] = "CODE"
        universe = claims.Universe.build({"as published": table})
        good, base = self.sides(table)
        mean = base["alignment"].mean()
        delta = lambda **c: self.pick(universe, test="Welch t", **c)["delta"]  # noqa: E731
        assert delta() == pytest.approx(good["alignment"].mean() - mean)
        assert delta(missing="worst case") == pytest.approx(good["alignment"].fillna(0).mean() - mean)
        aligned = np.append(good["alignment"].dropna(), [100.0] * 5).mean()
        assert delta(missing="refusal is aligned") == pytest.approx(aligned - mean)
        kept = [s.loc[s["coherence"] > 50, "alignment"].mean() for s in (good, base)]
        assert delta(coherence="coherent answers") == pytest.approx(kept[0] - kept[1])

    def test_coherence_threshold_is_the_studys(self):
        table = self.table
        universe = claims.Universe.build({"as published": table}, coherence_above=80)
        good, base = (s.loc[s["coherence"] > 80, "alignment"].mean() for s in self.sides(table))
        found = self.pick(universe, test="Welch t", coherence="coherent answers")["delta"]
        assert found == pytest.approx(good - base)

    def test_correction_is_over_all_comparisons(self):
        universe = claims.Universe.build({"as published": self.table})
        raw = [self.pick(universe, d, test="Welch t")["p"] for d in ("e1", "e2")]
        adjusted = [self.pick(universe, d, test="Welch t", correction="Benjamini-Hochberg")["p"] for d in ("e1", "e2")]
        np.testing.assert_allclose(adjusted, stats.false_discovery_control(raw))

    def test_what_a_second_judging_moves(self):
        made = claims.judgings(self.table, repeats(self.table[self.table["dataset"] == "e1"], -4))
        assert claims.Universe.build(made).moved == {("m", "baseline", "e1"), ("m", "good", "e1")}


class TestComparisonClaims:
    def test_a_strong_effect_stands_everywhere(self):
        found = claims.comparison_claims(claims.Universe.build({"as published": scores({("good", "e1"): 12.0})}))
        assert found.loc[0, ["analyses", "stands", "share", "opposite"]].tolist() == [16, 16, 1.0, 0]

    def test_nothing_is_no_claim(self):
        universe = claims.Universe.build({"as published": scores({("good", "e1"): 0.0}, seed=3)})
        assert claims.comparison_claims(universe).empty
        assert len(claims.comparison_claims(universe, only_significant=False)) == 1

    def test_judgings_count_only_where_there_are_several_that_differ(self):
        table = scores({("good", "e1"): 12.0, ("good", "e2"): 12.0})
        twice = repeats(table[table["dataset"] == "e1"], 0)
        found = claims.comparison_claims(claims.Universe.build(claims.judgings(table, twice))).set_index("dataset")
        assert found["analyses"].to_dict() == {"e1": 16, "e2": 16}, "copies do not count"
        twice.loc[~twice["selected"] & (twice["persona"] == "good"), "alignment"] -= 2
        found = claims.comparison_claims(claims.Universe.build(claims.judgings(table, twice))).set_index("dataset")
        assert found["analyses"].to_dict() == {"e1": 3 * 16, "e2": 16}  # the last judging is the published one

    def test_the_judging_can_carry_a_claim(self):
        table = scores({("good", "e1"): 0.0}, sd=3, seed=3)
        baseline = table["persona"] == "baseline"
        published = table.assign(alignment=table["alignment"] - 4 * baseline)
        both = repeats(published, 0)
        other = ~both["selected"] & (both["persona"] == "baseline")
        both.loc[other, "alignment"] += 4
        found = claims.comparison_claims(claims.Universe.build(claims.judgings(published, both))).iloc[0]
        assert found["published_significant"]
        assert found["share"] == pytest.approx(2 / 3)  # as published, and the mean: 2 points; not the first


class TestVerdicts:
    def build(self, gaps, hypothesis=ONE, **how):
        universe = claims.Universe.build({"as published": scores(gaps, **how)})
        return claims.verdict_specifications(universe, hypothesis, DATASETS, model="m")

    def test_number_of_analyses_and_the_published_one(self):
        table = self.build({("good", d): 12.0 for d in ("e1", "e2", "c1")})
        # coherence 2 x tests 4 x roles 2 x (majority 2 corrections + pooled 1); nothing is missing, so that what is
        # done with missing scores makes copies
        assert len(table) == 2 * 4 * 2 * 3
        assert table["published"].sum() == 1
        assert not table.duplicated(claims.VERDICT_CHOICES).any()
        assert (table["verdict"] == "SUPPORTED").all()

    def test_estimand_and_reference_are_choices(self):
        """A style that costs 12 points with and without fine-tuning: an effect after it, none of it."""
        gaps = {("good", d): 12.0 for d in ("e1", "e2", "none")}
        table = self.build(gaps, sd=3.0)
        means = table.groupby("estimand")["estimate"].mean()
        assert means["after fine-tuning (published)"] > 10
        assert abs(means["susceptibility, from no fine-tuning"]) < 2
        assert set(table["estimand"]) == {claims.ESTIMAND_CHOICES["after"], claims.ESTIMAND_CHOICES["none"]}
        mine = table[table["estimand"] == claims.ESTIMAND_CHOICES["none"]]
        assert "Mann-Whitney" not in set(mine["test"])
        data = scores(gaps, sd=3.0)
        means = data.groupby(["persona", "dataset", "question_id"])["alignment"].mean().unstack("dataset")
        d = (means.loc["good"] - means.loc["baseline"])[["e1", "e2"]].mean(axis=1)
        d = d - (means.loc["good", :]["none"] - means.loc["baseline", :]["none"])
        row = mine[(mine["test"] == "paired t") & (mine["rule"] == claims.RULES[1])]
        row = row[row["coherence"] == "all answers"].iloc[0]
        assert row["p"] == pytest.approx(stats.ttest_1samp(d, 0).pvalue)

    def test_roles_matter(self):
        table = self.build({("good", "e1"): 12.0, ("good", "e2"): 12.0, ("good", "c1"): -12.0, ("good", "c2"): -12.0})
        majority = table[table["rule"] == "majority of data sets"]
        assert set(majority.loc[majority["roles"] == "EM data sets only", "verdict"]) == {"SUPPORTED"}
        assert set(majority.loc[majority["roles"] == "all data sets", "verdict"]) == {"MIXED"}

    def test_two_personas_and_the_one_tested(self):
        gaps = {(p, d): g for d in ("e1", "e2") for p, g in (("good", 12.0), ("kind", -12.0))}
        table = self.build(gaps, H)
        assert set(table.loc[table["personas"] == "the one tested", "verdict"]) == {"SUPPORTED"}
        assert set(table.loc[table["personas"] == "all that are named", "verdict"]) == {"NOT SUPPORTED"}

    def test_estimate_by_hand(self):
        gaps = {("good", "e1"): 5.0, ("good", "e2"): 1.0}
        table, data = self.build(gaps), scores(gaps)
        row = table[
            (table["test"] == "paired t") & (table["missing"] == "dropped") & (table["coherence"] == "all answers")
        ]
        row = row[(row["rule"] == "pooled over data sets") & (row["roles"] == "all data sets")].iloc[0]
        means = data.groupby(["persona", "dataset", "question_id"])["alignment"].mean()
        d = (means["good"] - means["baseline"]).groupby("question_id").mean()
        expected = stats.ttest_1samp(d, 0)
        assert row["estimate"] == pytest.approx(d.mean())
        assert row["p"] == pytest.approx(expected.pvalue)
        assert (row["low"], row["high"]) == pytest.approx(tuple(expected.confidence_interval()))

    @pytest.mark.parametrize("test", ["Welch t", "paired t"])
    def test_interval_of_two_personas_is_that_of_their_mean(self, test):
        # Both are compared with one baseline on the same questions: averaging their standard errors is no error of it.
        gaps = {(p, d): g for d in ("e1", "e2") for p, g in (("good", 4.0), ("kind", 8.0))}
        table, data = self.build(gaps, H), scores(gaps)
        row = table[
            (table["test"] == test) & (table["personas"] == "all that are named") & (table["rule"] == claims.RULES[1])
        ]
        row = row[(row["missing"] == "dropped") & (row["coherence"] == "all answers")].iloc[0]
        if test == "paired t":
            means = data.groupby(["persona", "question_id"])["alignment"].mean()
            expected = stats.ttest_1samp((means["good"] + means["kind"]) / 2 - means["baseline"], 0)
            assert row["p"] == pytest.approx(expected.pvalue)
            assert (row["low"], row["high"]) == pytest.approx(tuple(expected.confidence_interval()))
            return
        cells = data.groupby(["persona", "dataset"])["alignment"].agg(["mean", "var", "size"])
        variance = (cells["var"] / cells["size"]).groupby("persona").sum()
        se = np.sqrt((variance["good"] + variance["kind"]) / 16 + variance["baseline"] / 4)
        half = stats.t.ppf(0.975, cells["size"].sum() - 6) * se
        assert (row["high"] - row["low"]) / 2 == pytest.approx(half)

    def test_persona_without_data(self):
        assert self.build({("other", "e1"): 1.0}).empty

    def test_claim_influence_figure_and_sentence(self):
        table = self.build({("good", "e1"): 12.0, ("good", "e2"): 12.0, ("good", "c1"): -12.0, ("good", "c2"): -12.0})
        claim = claims.verdict_claim(table, ONE, model="m")
        assert claim["published"] == "MIXED"
        assert 0 < claim["share"] < 1
        by = claims.influence(table).set_index(["choice", "option"])["share"]
        assert by["roles", "EM data sets only"] > by["roles", "all data sets"]
        assert {*claims.VERDICT_CHOICES, "estimate", "low", "high", "supports"} <= set(table), "what the figure draws"
        said = WORDS.macro("sentences.md.j2", "verdict")(SimpleNamespace(**claim, honest="UNDECIDED", reason="why"))
        assert said.startswith("**H1 in m: UNDECIDED**"), "the gated verdict first, with its model"
        assert "By the published rules it is MIXED" in said


class TestAudit:
    gates = pd.DataFrame(
        {"model": "m", "persona": "good", "dataset": ["e1", "c1"], "gate": ["absent", "present"],
         "gate_reason": ["AUC 0.51", ""], "role": ["em", "benign_control"], "counts": [True, False]}
    )  # fmt: skip

    def found(self, dataset="e1"):
        return claims.comparison_claims(claims.Universe.build({"as published": scores({("good", dataset): 12.0})}))

    def test_gate_stands_beside_the_share(self):
        row = claims.with_gates(self.found(), self.gates).iloc[0]
        sentence = WORDS.macro("sentences.md.j2", "comparison")(row)
        assert row["share"] == 1
        assert row["gate"] == "absent"
        assert "in 16 of all 16" in sentence
        assert "absent (AUC 0.51), so it says nothing about the persona" in sentence

    def test_a_control_is_named(self):
        row = claims.with_gates(self.found("c1"), self.gates).iloc[0]
        assert "benign control set, not an EM one" in WORDS.macro("sentences.md.j2", "comparison")(row)

    def test_no_claim_without_a_gate(self):
        with pytest.raises(ValueError, match="has no gate"):
            claims.with_gates(self.found("e2"), self.gates)

    def test_markdown(self):
        audited = claims.with_gates(self.found(), self.gates)
        text = WORDS.macro("claims.md.j2", "comparisons")(audited)
        assert text.startswith("## Claims audit: significant comparisons")
        assert "Of 1 comparisons" in text
        assert "took place in 0" in text


@pytest.mark.slow
@pytest.mark.fetched
def test_published_claims(fetched_cache):
    """The published analysis is one of the multiverse's, and its claims are those of the published document."""
    from cai_em.study.published import import_study, read_file_list, read_selection

    folder = files.root() / "params"
    study = loading.load("published")
    selection = read_selection(folder / "published_selection.csv")
    others = read_file_list(folder / "published_repeated.csv")
    got = import_study(selection, others, models=["qwen2.5-7b"], cache=fetched_cache)
    universe = claims.Universe.build(claims.judgings(got.scores, got.repeated))
    found = claims.comparison_claims(universe).set_index(["persona", "dataset"])
    assert len(found) == 68  # significant comparisons of the published document
    assert found.loc[("goodness", "extreme_sports"), "p_published"] == pytest.approx(0.0001, abs=0.00005)
    assert found.loc[("nonchalance", "technical_vehicles"), "p_published"] == pytest.approx(0.0335, abs=0.00005)
    assert found.loc[("goodness", "technical_kl"), "share_questions"] == 0
    by_key = {}
    for h in study.hypotheses:
        table = claims.verdict_specifications(universe, h, study.used_datasets(), model="qwen2.5-7b")
        by_key[h.key] = claims.verdict_claim(table, h, model="qwen2.5-7b")
    assert by_key["h1"]["published"] == "NOT SUPPORTED"
    assert by_key["h2"]["published"] == "SUPPORTED"
    assert by_key["h2"]["share_questions"] < 0.4 < by_key["h2"]["share"]
