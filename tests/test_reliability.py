"""Judge reliability against hand-computed and simulated answers, and on the published repeats."""

import krippendorff
import numpy as np
import pandas as pd
import pytest
from cai_em.analysis import reliability
from cai_em.records import files as records_files
from cai_em.report.words import Words
from cai_em.study.labels import Labels

WORDS = Words(Labels([], []))
said = WORDS.macro("validity.md.j2", "reliability")


def judged(files, *, persona="baseline", dataset="bad", question="q0", texts=None):
    """Judgings: files maps file name to (judge, selected, scores of texts 0, 1, ...; None for a missing score)."""
    rows = []
    for file, (judge, selected, scores) in files.items():
        for i, score in enumerate(scores):
            text = texts[i] if texts else f"text{i}"
            value = np.nan if score is None else float(score)
            rows.append(("m", persona, dataset, question, i, judge, file, selected, value, f"{persona}{dataset}{text}"))
    columns = ["model", "persona", "dataset", "question_id", "sample", "judge", "file", "selected", "alignment"]
    return pd.DataFrame(rows, columns=[*columns, "response_sha256"])


class TestUnits:
    def test_once_judged_is_left_out(self):
        table = reliability.judged_units(judged({"a": ("j", True, [1, 2, 3]), "b": ("j", False, [1, 2])}))
        assert len(table) == 4
        assert table["unit"].nunique() == 2

    def test_same_text_twice_in_one_file_is_two_units(self):
        files = {"a": ("j", True, [10, 20]), "b": ("j", False, [10, 20])}
        table = reliability.judged_units(judged(files, texts=["same", "same"]))
        assert table.groupby("unit")["alignment"].nunique().tolist() == [1, 1]

    def test_same_text_elsewhere_is_another_unit(self):
        both = [
            judged({"a": ("j", True, [1])}, texts=["x"]),
            judged({"b": ("j", True, [1])}, dataset="d2", texts=["x"]),
        ]
        both[1]["response_sha256"] = both[0]["response_sha256"]
        assert reliability.judged_units(pd.concat(both)).empty

    def test_missing_column(self):
        with pytest.raises(ValueError, match="response_sha256"):
            reliability.judged_units(judged({"a": ("j", True, [1])}).drop(columns="response_sha256"))


class TestAgreement:
    def test_by_hand(self):
        files = {"a": ("j", True, [90, 80, 70, None]), "b": ("j", False, [90, 84, 60, 50])}
        row = reliability.agreement_of_judgings(reliability.judged_units(judged(files)), least=1).iloc[0]
        assert (row["units"], row["pairs"], row["one_missing"]) == (4, 3, 1)
        assert row["exact"] == pytest.approx(1 / 3)
        assert row["within_5"] == pytest.approx(2 / 3)
        assert row["mean_abs_difference"] == pytest.approx(14 / 3)
        assert row["mean_difference"] == pytest.approx(-2)
        assert row["noise_sd"] == pytest.approx(np.sqrt((0 + 16 + 100) / 3 / 2))

    def test_alpha_of_krippendorffs_example(self):
        # Krippendorff 2011, Computing Krippendorff's alpha-reliability, section C: interval alpha = .849.
        data = [
            [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
            [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
            [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
            [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
        ]
        files = {str(i): ("j", i == 0, row) for i, row in enumerate(data)}
        found = reliability.alpha(reliability.judged_units(judged(files)))
        assert found == pytest.approx(0.849, abs=0.001)
        data = np.array(data, float)
        assert found == pytest.approx(krippendorff.alpha(reliability_data=data, level_of_measurement="interval"))

    def test_all_alike_is_undefined(self):
        files = {"a": ("j", True, [90] * 5), "b": ("j", False, [90] * 5)}
        row = reliability.agreement_of_judgings(reliability.judged_units(judged(files)), least=1).iloc[0]
        assert row["exact"] == 1
        assert np.isnan(row["alpha"])

    def test_within_and_between(self):
        files = {"a": ("j", True, [90, 50, 10]), "b": ("j", False, [90, 50, 10]), "c": ("k", False, [60, 20, 0])}
        found = reliability.agreement_of_judgings(reliability.judged_units(judged(files)), least=1).set_index(
            ["judge_a", "judge_b"]
        )
        assert found.loc[("j", "j"), "kind"] == "within"
        assert found.loc[("j", "j"), ["pairs", "exact"]].tolist() == [3, 1]
        assert found.loc[("j", "k"), ["pairs", "mean_difference"]].tolist() == [3, pytest.approx(-70 / 3)]
        assert found.loc[("j", "j"), "alpha"] == 1
        assert found.loc[("j", "k"), "alpha"] < 1

    def test_noise_is_recovered(self):
        rng = np.random.default_rng(0)
        truth = rng.normal(60, 10, 4000)
        files = {f: ("j", f == "a", np.clip(truth + rng.normal(0, 3, 4000), 0, 100)) for f in "abc"}
        row = reliability.agreement_of_judgings(reliability.judged_units(judged(files))).iloc[0]
        assert row["noise_sd"] == pytest.approx(3, rel=0.03)
        assert row["icc"] == pytest.approx(100 / 109, abs=0.01)
        assert row["alpha"] == pytest.approx(row["icc"], abs=0.002)


class TestMovement:
    def test_by_hand(self):
        files = {"a": ("j", True, [90, 70]), "b": ("j", False, [94, 76]), "c": ("j", False, [92, 72])}
        row = reliability.movement(reliability.judged_units(judged(files)), least=1).iloc[0]
        assert (row["lowest"], row["highest"], row["spread"]) == (80, 85, 5)
        assert (row["selected"], row["selected_rank"], row["judgings"]) == (80, 1, 3)
        assert row["means"] == "80.00, 82.00, 85.00"

    def test_number_or_flag_is_the_judges_noise_too(self):
        # Fault 7 of the published study hides where only responses are compared that all judgings gave a number.
        files = {"a": ("j", True, [90, 70, None]), "b": ("j", False, [90, 70, 10])}
        row = reliability.movement(reliability.judged_units(judged(files)), least=1).iloc[0]
        assert (row["units"], row["common_units"]) == (3, 2)
        assert row["spread"] == pytest.approx(80 - 170 / 3)
        assert row["common_spread"] == 0
        assert (row["selected"], row["selected_rank"], row["common_selected"]) == (80, 2, 80)
        assert (row["means"], row["scored"]) == ("56.67, 80.00", "3, 2")
        assert reliability.smallest_effect(reliability.judged_units(judged(files)), least=1)["tau"].iloc[0] > 10

    def test_a_response_that_one_judging_never_saw_is_not_its_noise(self):
        files = {"a": ("j", True, [90, 70]), "b": ("j", False, [90, 70, 10]), "c": ("j", False, [90, 70, 10])}
        row = reliability.movement(reliability.judged_units(judged(files)), least=1).iloc[0]
        assert (row["units"], row["spread"]) == (2, 0)

    def test_constant_scores_show_no_noise_and_no_lack_of_it(self):
        files = {f: ("j", f == "a", [100] * 30) for f in "abc"}
        other = judged({"d": ("j", True, [10, 90]), "e": ("k", False, [20, 80])}, dataset="other")  # once by this judge
        table = reliability.judged_units(pd.concat([judged(files), other]))
        assert np.isnan(reliability.movement(table)["spread"].iloc[0])
        row = reliability.smallest_effect(table).iloc[0]
        assert row[["sigma", "tau", "smallest"]].isna().all()
        found = [
            reliability.agreement_of_judgings(table),
            reliability.movement(table),
            reliability.smallest_effect(table),
        ]
        text = said(*found).split("## The smallest effect that the judge's noise allows")[1]
        assert "| j | – | – | – | 0 |" in text

    def test_sentence(self):
        low = judged({"a": ("j", True, [80, 70]), "b": ("j", False, [94, 76])})
        high = judged({"c": ("j", True, [95, 90]), "d": ("j", False, [80, 70])}, persona="good")
        moved = reliability.movement(reliability.judged_units(pd.concat([low, high])), least=1)
        text = WORDS.macro("sentences.md.j2", "selection")(moved[moved["selected_rank"].notna()])
        assert "the lowest in 1 and the highest in 0 of 1 baseline" in text
        assert "the lowest in 0 and the highest in 1 of 1 persona" in text


class TestSmallestEffect:
    def test_without_drift_it_is_the_noise_of_the_scores(self):
        rng = np.random.default_rng(0)
        truth = rng.normal(60, 10, 4000)
        files = {f: ("j", f == "a", truth + rng.normal(0, 3, 4000)) for f in "abc"}
        row = reliability.smallest_effect(reliability.judged_units(judged(files)), n=400).iloc[0]
        assert row["smallest"] == pytest.approx(1.96 * np.sqrt(2 * 9 / 400), rel=0.25)

    def test_drift_does_not_average_out(self):
        rng = np.random.default_rng(0)
        drift = rng.normal(0, 1, (30, 4))
        parts = []
        for c in range(30):
            truth = rng.normal(60, 10, 200)
            files = {f"{c}{f}": ("j", not f, truth + drift[c, f] + rng.normal(0, 2, 200)) for f in range(4)}
            parts.append(judged(files, dataset=f"d{c}"))
        table = reliability.judged_units(pd.concat(parts))
        row = reliability.smallest_effect(table, n=400).iloc[0]
        assert row["tau"] == pytest.approx(np.sqrt(drift.var(axis=1, ddof=1).mean()), abs=0.05)
        assert reliability.smallest_effect(table, n=10**9).iloc[0]["smallest"] > 1.96 * np.sqrt(2) * 0.8


def test_markdown():
    nothing = pd.DataFrame()
    assert "cannot be measured" in said(nothing, nothing, nothing)
    files = {"a": ("j", True, [90, 80, 70]), "b": ("j", False, [90, 84, 60])}
    table = reliability.judged_units(judged(files))
    found = [
        reliability.agreement_of_judgings(table, 1),
        reliability.movement(table, 1),
        reliability.smallest_effect(table, least=1),
    ]
    text = said(*found)
    assert text.count("\n## ") + 1 == 3
    assert "33.3 %" in text.split("\n## ")[0]


@pytest.mark.fetched
def test_published_baseline_was_judged_four_times(fetched_cache):
    """FACTS, fault 7: the four judgings of baseline/insecure have means from 94.4 to 95.7, and the lowest was used."""
    from cai_em.study.published import import_study, read_file_list, read_selection

    folder = records_files.root() / "params"
    selection = read_selection(folder / "published_selection.csv")
    mine = (selection["persona"] == "baseline") & (selection["dataset"] == "insecure")
    others = read_file_list(folder / "published_repeated.csv")
    others = others[others["path"].str.contains("/eval_baseline_gpt41mini")]
    got = import_study(selection[mine], others, models=["qwen2.5-7b"], cache=fetched_cache)
    moved = reliability.movement(reliability.judged_units(got.repeated))
    row = moved[(moved["persona"] == "baseline") & (moved["dataset"] == "insecure")].iloc[0]
    assert (row["units"], row["judgings"], row["selected_rank"]) == (400, 4, 1)
    assert row["means"] == "94.40, 94.80, 94.88, 95.65"
    assert row["spread"] == pytest.approx(1.255, abs=0.001)
    assert row["common_spread"] == pytest.approx(0.42, abs=0.005)
