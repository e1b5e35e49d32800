"""A judge's agreement, slope and bias; the gate they make; prediction-powered means."""

import numpy as np
import pandas as pd
import pytest
from cai_em.analysis.gates import ABSENT, INCONCLUSIVE, PRESENT, Gate
from cai_em.analysis.judge_quality import assisted, from_repeats, judge_trust, quality, scaled_margin


def pairs(slope=1.0, bias=0.0, noise=3.0, n=1200, seed=0, questions=8):
    rng = np.random.default_rng(seed)
    persona = rng.choice(["baseline", "p"], n)
    reference = np.where(rng.random(n) < 0.2, rng.normal(20, 8, n), rng.normal(88, 4, n)).clip(0, 100)
    score = 80 + slope * (reference - 80) + bias * (persona == "p") + rng.normal(0, noise, n)
    question = rng.choice([f"q{i}" for i in range(questions)], n)
    return pd.DataFrame(
        {"persona": persona, "question_id": question, "reference": reference, "score": score.clip(0, 100)}
    )


def row(table, measure, persona=""):
    return table[(table["measure"] == measure) & (table["persona"] == persona)].iloc[0]


def test_a_good_judge_is_measured_as_one():
    found = quality(pairs())
    assert row(found, "agreement")["estimate"] > 0.99
    assert row(found, "slope")["estimate"] == pytest.approx(1, abs=0.05)
    assert row(found, "bias", "p")["estimate"] == pytest.approx(0, abs=0.5)
    assert {p: g.status for p, g in judge_trust(found, ["p"]).items()} == {"p": PRESENT}


def test_a_compressing_judge_is_caught_though_it_tells_good_from_bad():
    found = quality(pairs(slope=0.15))
    assert row(found, "agreement")["estimate"] > 0.9
    gate = judge_trust(found, ["p"])["p"]
    assert gate.status == ABSENT
    assert "slope" in gate.reason
    assert scaled_margin(5.0, found) == pytest.approx(0.75, abs=0.1)


def test_a_judge_that_dislikes_a_persona_is_caught_for_that_persona():
    found = quality(pairs(bias=-12.0))
    gates = judge_trust(found, ["p", "other"])
    assert gates["p"].status == ABSENT
    assert "bias for p" in gates["p"].reason
    assert gates["other"].status == INCONCLUSIVE
    assert judge_trust(found, ["p"], itself=True)["p"].status == PRESENT


def test_a_judge_that_was_never_measured_is_not_trusted_whatever_it_is_called():
    assert judge_trust(None, ["p"])["p"].status == INCONCLUSIVE
    constant = Gate(ABSENT, "the same score always")
    assert judge_trust(quality(pairs()), ["p"], constant=constant)["p"] == constant


@pytest.mark.parametrize("seed", range(3))
def test_intervals_of_slope_and_bias_hold_the_truth(seed):
    inside = []
    for k in range(40):
        table = quality(pairs(slope=0.8, bias=2.0, n=300, seed=100 * seed + k), resamples=50)
        slope, bias = row(table, "slope"), row(table, "bias", "p")
        inside.append((slope["low"] < 0.8 < slope["high"], bias["low"] < 2.0 < bias["high"]))
    assert (np.mean(inside, axis=0) > 0.72).all()  # nominal 0.9


def test_without_two_kinds_or_scores_nothing_is_known():
    good = pairs()
    good = good[good["reference"] > 80]
    assert np.isnan(row(quality(good), "agreement")["estimate"])
    assert judge_trust(quality(good), ["p"])["p"].status == INCONCLUSIVE
    assert judge_trust(quality(good.head(0)), ["p"])["p"].status == INCONCLUSIVE


def test_a_judges_own_repeats():
    rows = [(u, f, s, "p", "q0", "j") for u, scores in enumerate([(90, 91), (20, 25), (50, None)]) for f, s in
            zip("ab", scores)]  # fmt: skip
    table = pd.DataFrame(rows, columns=["unit", "file", "alignment", "persona", "question_id", "judge"])
    found = from_repeats(table.assign(judge="j"), "j")
    assert found[["reference", "score"]].values.tolist() == [[90, 91], [20, 25]]


def cells(n=40, labelled=0.3, seed=0, questions=6, tilt=-15.0):
    rng = np.random.default_rng(seed)
    rows, reference = [], {}
    for q in range(questions):
        for k in range(n):
            truth = float(rng.choice([88, 20], p=[0.8, 0.2]) + rng.normal(0, 4))
            key = ("m", "p", "em1", 0, f"q{q}", k)
            rows.append((*key, np.clip(truth + tilt + rng.normal(0, 5), 0, 100), None))
            if rng.random() < labelled:
                reference[key] = truth
    columns = ["model", "persona", "dataset", "seed", "question_id", "sample", "alignment", "alignment_flag"]
    return pd.DataFrame(rows, columns=columns), reference


def test_a_reference_for_a_part_takes_the_bias_out_and_the_judge_the_noise():
    plain, powered, alone = [], [], []
    for seed in range(60):
        table, reference = cells(seed=seed)
        found = assisted(table, reference)
        powered.append(found.scores["alignment"].mean())
        plain.append(np.mean(list(reference.values())))
        alone.append(table["alignment"].mean())
    truth = 0.8 * 88 + 0.2 * 20
    assert abs(np.mean(alone) - truth) > 8
    assert abs(np.mean(powered) - truth) < 1
    assert np.std(powered) < np.std(plain)
    assert 0.3 < found.weight <= 1


def test_a_cell_without_a_reference_score_has_no_estimate():
    table, reference = cells(questions=2)
    found = assisted(table, {k: v for k, v in reference.items() if k[4] == "q0"})
    assert found.scores.groupby("question_id")["alignment"].count().to_dict() == {"q0": 40, "q1": 0}
    assert (found.scores["alignment"].isna() == found.scores["alignment_flag"].notna()).all()
