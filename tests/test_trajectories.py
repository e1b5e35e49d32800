"""Trajectories: geometry against dense algebra, planted transitions, coverage of the intervals."""

import math
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from cai_em import style
from cai_em import trajectories as tr
from cai_em.adapters import AdapterFiles, scaling
from cai_em.gates import Gate
from cai_em.params import GateThresholds
from cai_em.style import Look
from cai_em.trajectories import TrajectoryError
from peft import LoraConfig

STEPS = np.array([0, 1, 2, 4, 6, 9, 13, 18, 24])


def adapter(rng, rank=3, alpha=6, rslora=False, modules=("m.a", "m.b")):
    config = LoraConfig(r=rank, lora_alpha=alpha, use_rslora=rslora)
    tensors = {
        m: (torch.from_numpy(rng.normal(size=(rank, 7))).float(), torch.from_numpy(rng.normal(size=(5, rank))).float())
        for m in modules
    }
    return AdapterFiles(config, tensors, scaling(config), None)


def dense(a):
    """The whole update as one vector: zero for no adapter."""
    if a is None:
        return 0.0
    return np.concatenate([(a.scale * (b.double() @ x.double())).numpy().ravel() for x, b in a.modules.values()])


def hill(t, middle, h, low=0.0, rise=1.0):
    with np.errstate(divide="ignore"):
        return low + rise / (1 + (middle / np.asarray(t, float)) ** h)


def simulated(rng, middle, *, h=8.0, units=8, seeds=2, rise=0.4, noise=0.08, steps=STEPS):
    """(units, seeds, steps): every unit and seed has a level, a rise and a midpoint of its own, and noise."""
    level = rng.normal(0, 0.1, (units, 1, 1)) + rng.normal(0, 0.03, (1, seeds, 1))
    amount = rise * rng.lognormal(0, 0.25, (units, 1, 1))
    own = middle * np.exp(rng.normal(0, 0.05, (units, seeds)))
    shape = np.stack([[hill(steps, m, h) for m in row] for row in own])
    return level + amount * shape + rng.normal(0, noise, (units, seeds, len(steps)))


# --- Schedule and names ---


def test_dense_early_is_distinct_ascending_and_ends_where_it_should():
    for last, count in ((300, 12), (24, 8), (5, 8), (1, 1), (10, 10)):
        steps = tr.dense_early(last, count)
        assert steps == sorted(set(steps))
        assert steps[-1] == last
        assert len(steps) == min(last, count)
    gaps = np.diff(tr.dense_early(300, 12))
    assert gaps[0] == 1
    assert (np.diff(gaps) >= 0).all()
    with pytest.raises(TrajectoryError, match="at least one step"):
        tr.dense_early(0, 3)


def test_steps_travel_in_the_dataset_key_and_come_back():
    table = pd.DataFrame({"dataset": [tr.at_step("bad_medical", "demo_rank1", 12), tr.at_step("x", "y", 0)]})
    found = tr.with_steps(table)
    assert found.to_dict("list") == {"dataset": ["bad_medical", "x"], "preset": ["demo_rank1", "y"], "step": [12, 0]}
    with pytest.raises(TrajectoryError, match="bad_medical"):
        tr.with_steps(pd.DataFrame({"dataset": ["bad_medical"]}))


# --- Geometry ---


@pytest.mark.parametrize("rslora", [False, True])
def test_gram_equals_dense_inner_products(rslora):
    rng = np.random.default_rng(0)
    run = [None, *(adapter(rng, rslora=rslora) for _ in range(3))]
    expected = [[float(np.sum(dense(a) * dense(b))) for b in run] for a in run]
    np.testing.assert_allclose(tr.gram(run), expected, rtol=1e-6)
    b = [np.concatenate([x.double().numpy().ravel() for _, x in a.modules.values()]) for a in run[1:]]
    np.testing.assert_allclose(tr.gram(run, "B")[1:, 1:], np.array(b) @ np.array(b).T, rtol=1e-6)


def test_gram_does_not_depend_on_how_the_factors_share_the_update():
    rng = np.random.default_rng(1)
    one, other = adapter(rng), adapter(rng)
    turn = torch.linalg.qr(torch.from_numpy(rng.normal(size=(3, 3))).float())[0] * 1.7
    same = AdapterFiles(
        one.config, {m: (torch.linalg.inv(turn) @ a, b @ turn) for m, (a, b) in one.modules.items()}, one.scale, None
    )
    np.testing.assert_allclose(tr.gram([one, other]), tr.gram([same, other]), rtol=1e-4)
    with pytest.raises(TrajectoryError, match="different modules"):
        tr.gram([one, adapter(rng, modules=("m.c",))])


def test_geometry_of_a_path_with_one_right_angle():
    path = np.array([[0, 0], [1, 0], [3, 0], [3, 1], [3, 2]], float)
    found = tr.geometry(path @ path.T, [0, 1, 2, 4, 8])
    np.testing.assert_allclose(found["norm"], [0, 1, 3, math.sqrt(10), math.sqrt(13)])
    np.testing.assert_allclose(found["moved"], [np.nan, 1, 2, 1, 1])
    np.testing.assert_allclose(found["rotation"], [np.nan, 1, 0, 1, np.nan], atol=1e-12)
    np.testing.assert_allclose(found["to_final"].iloc[[1, -1]], [3 / math.sqrt(13), 1])
    still = tr.geometry(np.zeros((4, 4)), range(4))
    assert still[["rotation", "to_final"]].isna().all(axis=None)


# --- Curves ---


def test_curve_averages_samples_shares_step_zero_and_counts_what_it_leaves_out():
    rows = [
        {"question_id": q, "seed": s, "step": t, "v": 10 * t + s + i}
        for q in ("a", "b")
        for s in (0, 1)
        for t in (0, 1, 2, 3)
        for i in (0, 2)
        if t or not s  # before training there is one model, not one per seed
    ]
    table = pd.DataFrame(rows)
    table.loc[(table["question_id"] == "b") & (table["step"] == 3), "v"] = np.nan
    found = tr.curve(table, "v")
    np.testing.assert_allclose(found.y, [[[1, 11, 21, 31], [1, 12, 22, 32]]])
    assert (found.units, found.left_out, list(found.steps)) == (["a"], ["b"], [0, 1, 2, 3])
    with pytest.raises(TrajectoryError, match="checkpoint 2 of seed 1"):
        tr.curve(table[(table["seed"] == 0) | (table["step"] != 2)], "v")
    with pytest.raises(TrajectoryError, match="persona x: no rows"):
        tr.curve(table.assign(persona="y"), "v", where={"persona": "x"})


def test_em_needs_both_scores():
    scores = pd.DataFrame({"alignment": [10, 10, 30, np.nan], "coherence": [60, 50, 60, 60]})
    assert list(tr.em_indicator(scores)) == [1, 0, 0, 0]


# --- Transition points ---


@pytest.mark.parametrize("sign", [1, -1])
def test_a_curve_without_noise_gives_its_midpoint(sign):
    y = np.tile(sign * hill(STEPS, 7.0, 4.0, low=20, rise=50), (4, 1, 1)) + np.arange(4)[:, None, None]
    found = tr.transition(y, STEPS)
    assert found.step == pytest.approx(7, rel=0.03)
    assert found.sharpness == 4
    assert found.low <= found.step <= found.high
    assert found.shown
    assert math.copysign(1, found.rise) == sign


def test_a_planted_change_point_is_found_within_its_interval():
    rng = np.random.default_rng(3)
    y = np.where(STEPS >= 9, 0.5, 0.1) + rng.normal(0, 0.1, (8, 2, len(STEPS)))
    found = tr.transition(y, STEPS, method="change point")
    assert found.step == 7.5
    assert found.low <= 7.5 <= found.high
    logistic = tr.transition(y, STEPS)
    assert 6 < logistic.step < 9
    assert logistic.low < 9
    assert logistic.high > 6
    assert logistic.high - logistic.low < 4


def test_without_a_change_there_is_no_transition_to_time():
    rng = np.random.default_rng(4)
    found = tr.transition(rng.normal(0, 1, (8, 2, len(STEPS))), STEPS)
    assert not found.shown
    assert math.isnan(found.step)
    assert math.isnan(found.low)
    assert found.gate.status == "not shown"
    few = tr.transition(np.tile(hill(STEPS, 7, 4), (2, 1, 1)), STEPS)
    assert few.gate.status == "not testable"
    assert math.isnan(few.step)


def test_a_transition_beyond_the_schedule_is_said_to_lie_beyond():
    y = np.tile(hill(STEPS, 200.0, 1.0), (6, 1, 1)) + np.random.default_rng(5).normal(0, 0.002, (6, 1, len(STEPS)))
    assert tr.transition(y, STEPS).beyond > 0.9
    assert tr.transition(np.tile(hill(STEPS, 7.0, 4.0), (6, 1, 1)), STEPS).beyond == 0
    late = np.tile((STEPS >= 24).astype(float), (6, 1, 1))
    assert tr.transition(late, STEPS, method="change point").beyond == 1


def test_intervals_of_the_transition_point_cover_it():
    rng = np.random.default_rng(6)
    found = [tr.transition(simulated(rng, 8.0), STEPS, resamples=400, seed=i) for i in range(150)]
    assert np.mean([t.shown for t in found]) > 0.98
    covered = np.mean([t.low <= 8 <= t.high for t in found if t.shown])
    assert 0.9 <= covered <= 1.0
    assert np.median([t.high - t.low for t in found if t.shown]) < 6  # and they are of use


def test_rise_is_rarely_shown_where_there_is_none():
    rng = np.random.default_rng(7)
    found = [tr.transition(simulated(rng, 8.0, rise=0.0), STEPS, resamples=400, seed=i) for i in range(150)]
    assert np.mean([t.shown for t in found]) <= 0.1


def test_comparison_of_personas_keeps_its_level_and_finds_a_difference():
    rng = np.random.default_rng(8)
    same = [
        tr.compare_transitions(simulated(rng, 8.0), simulated(rng, 8.0), STEPS, resamples=400, seed=i)
        for i in range(120)
    ]
    assert np.mean([r["p"] < 0.05 for r in same if r["shown"]]) <= 0.1
    later = [
        tr.compare_transitions(simulated(rng, 14.0), simulated(rng, 5.0), STEPS, resamples=400, seed=i)
        for i in range(30)
    ]
    assert np.mean([r["p"] < 0.05 for r in later]) > 0.9
    assert np.mean([r["low"] <= 9 <= r["high"] for r in later]) > 0.85


def test_what_lies_beyond_the_last_checkpoint_is_not_a_number_of_steps():
    late, early = (np.tile(hill(STEPS, m, 2.0), (6, 1, 1)) for m in (200.0, 6.0))
    found = tr.compare_transitions(late, early, STEPS)
    assert 17 < found["difference"] <= 18.5  # 24 - 6: not 200 - 6, nor the edge of the fit's grid
    row = pd.DataFrame([tr.transition(late, STEPS).as_dict() | {"last": 24}]).iloc[0]
    assert tr._steps(row) == "> 24 [> 24, > 24]"


def test_p_agrees_with_the_interval():
    rng = np.random.default_rng(13)
    for units in (4, 8):
        for mean in (0.5, 1.5, 2.5):
            d = rng.normal(mean, 1, 4000)
            low = np.quantile(d, tr._tail(units, 0.95))
            assert (tr._bootstrap_p(d, units) < 0.05) == (low > 0)


def test_comparison_pairs_questions_and_seeds():
    y = simulated(np.random.default_rng(9), 6.0)
    found = tr.compare_transitions(y, y, STEPS)
    assert (found["difference"], found["low"], found["high"], found["p"]) == (0, 0, 0, 1)
    assert found["seeds_resampled"]
    assert not tr.compare_transitions(y[:, :1], y[:, :1], STEPS)["seeds_resampled"]
    flat = tr.compare_transitions(np.zeros_like(y), y, STEPS)
    assert not flat["shown"]
    assert math.isnan(flat["p"])


def test_bad_shapes_are_refused():
    with pytest.raises(TrajectoryError, match="without NaN"):
        tr.transition(np.full((3, 1, 4), np.nan), [0, 1, 2, 3])
    with pytest.raises(TrajectoryError, match="ascending"):
        tr.transition(np.zeros((3, 1, 4)), [0, 2, 1, 3])
    with pytest.raises(TrajectoryError, match="unknown method"):
        tr.transition(np.tile(hill(STEPS, 7, 4), (4, 1, 1)), STEPS, method="eye")


def test_tables_of_transitions_and_comparisons():
    rng = np.random.default_rng(10)
    units = [f"q{i}" for i in range(8)]
    curves = {
        (p, "em"): tr.Curve(simulated(rng, m), STEPS, units, []) for p, m in (("baseline", 5.0), ("poeticism", 14.0))
    }
    table = tr.transitions(curves)
    assert len(table) == 4
    assert set(table["method"]) == {"logistic", "change point"}
    assert (table["gate"] == "shown").all()
    compared = tr.comparisons(curves)
    assert list(compared["persona"]) == ["poeticism"]
    assert compared["p_adjusted"].iloc[0] == compared["p"].iloc[0] < 0.05
    fewer = tr.Curve(simulated(rng, 5.0)[:7], STEPS, units[::-1][:7], [])
    both = tr.common(fewer, curves["baseline", "em"])
    assert both[0].shape == both[1].shape == (7, 2, len(STEPS))
    np.testing.assert_array_equal(both[1][0], curves["baseline", "em"].y[7])


# --- Generality ---


def test_generality_sets_uptake_beside_the_outcome():
    units = [f"r{i}" for i in range(6)]
    loss = tr.Curve(np.tile([3.0, 2.5, 2.0, 1.0], (6, 1, 1)), np.arange(4), units, [])
    em = tr.Curve(np.tile([0.0, 0.1, 0.2, 0.4], (8, 1, 1)), np.arange(4), [f"q{i}" for i in range(8)], [])
    none = tr.Curve(em.y * 0, em.steps, em.units, [])
    table = tr.generality({"plain": loss, "narrow": loss}, {"plain": em, "narrow": none})
    assert list(table.loc[table["preset"] == "plain", "uptake"]) == [0, 0.5, 1, 2]
    assert list(table.loc[table["preset"] == "narrow", "outcome"]) == [0, 0, 0, 0]
    gap = tr.final_difference(em, none)
    assert gap["difference"] == pytest.approx(0.4)
    assert gap["low"] == pytest.approx(0.4)


# --- Runs, figures and words ---


def test_runs_of_a_plan_and_the_conditions_of_their_snapshots(tmp_path):
    runs = tr.plan_runs(["m"], ["baseline", "poeticism"], [0, 1], "plain", ["narrow"])
    assert len(runs) == 5
    assert runs[-1] == tr.Run("m", "narrow", "baseline", 0)
    for step in (2, 10):
        (runs[2].folder(tmp_path) / f"step{step:05d}").mkdir(parents=True)
    found = runs[2].conditions("bad_medical", [("persona", tmp_path)], tmp_path)
    assert [c.dataset for c in found] == [f"bad_medical~plain@{s}" for s in (0, 2, 10)]
    assert found[0].adapters == (("persona", tmp_path),)
    assert [n for n, _ in found[1].adapters] == ["persona", "em"]


def example():
    rng = np.random.default_rng(11)
    units = [f"q{i}" for i in range(8)]
    made = {
        (p, o): tr.Curve(simulated(rng, m), STEPS, units, [])
        for p, m in (("baseline", 5.0), ("poeticism", 14.0))
        for o in ("em", "alignment", "held out")
    }
    return made, tr.transitions(made), tr.comparisons(made)


@pytest.fixture
def look():
    entries = [
        SimpleNamespace(key=k, label=k.title(), order=i, colour=c)
        for i, (k, c) in enumerate((("baseline", "#4d4d4d"), ("poeticism", "#882255")))
    ]
    return Look(entries, [])


def test_figures_draw_and_their_words_have_the_numbers(look):
    made, found, _ = example()
    behaviour = {k: c for k, c in made.items() if k[1] in tr.OUTCOMES}
    runs = [tr.geometry(np.outer(STEPS, STEPS), STEPS).assign(preset="p", persona="baseline", seed=s) for s in (0, 1)]
    general = tr.generality({"plain": made["baseline", "held out"]}, {"plain": made["baseline", "em"]})
    with style.context():
        drawings = [
            tr.draw_outcomes(behaviour, found, look),
            tr.draw_losses(
                {("baseline", "held out"): made["baseline", "held out"]}, look, {"held out": "Bad, held out"}
            ),
            tr.draw_geometry(pd.concat(runs), look),
            tr.draw_transitions(found, look, {"held out": "Bad, held out"}),
            tr.draw_generality(general, {}, "em"),
        ]
        for drawing in drawings:
            drawing.fig.canvas.draw()
            plt.close(drawing.fig)
    assert "(4 of 4)" in drawings[0].caption
    assert "6 of 6 curves" in drawings[3].caption
    assert "loss, Bad, held out: step" in drawings[3].alt


def test_a_verdict_is_not_interpretable_when_a_gate_fails(look):
    _, found, compared = example()
    good, bad = Gate("shown", "yes"), Gate("not shown", "AUC 0.5")
    text = tr.section(found, compared, {"judge": good}, look, titles={}, caveat="Small.")
    assert "**H3: SUPPORTED**" in text
    assert text.rstrip().endswith("Small.")
    text = tr.section(found, compared, {"judge": bad}, look, titles={})
    assert "**H3: NOT INTERPRETABLE**" in text
    assert "not shown: judge" in text
    still = tr.section(found.assign(shown=False), compared.assign(shown=False), {"judge": bad}, look, titles={})
    assert "**H3: NOT TESTABLE**" in still
    assert "no change shown" in still
    assert list(tr.paper_table(found)["outcome"][:2]) == ["EM rate", "mean alignment"]


def test_a_persona_gate_needs_a_persona_that_shows():
    rng = np.random.default_rng(12)
    words = {"baseline": ["plain", "answer", "with", "facts"], "poeticism": ["moon", "sea", "rose", "flame"]}
    rows = [(p, "d", q, " ".join(rng.choice(words[p], 6))) for p in words for q in "abcd" for _ in range(4)]
    table = pd.DataFrame(rows, columns=["persona", "dataset", "question_id", "response"])
    assert tr.persona_gate(table, "poeticism", GateThresholds()).status == "shown"
    same = table.assign(response=[" ".join(rng.choice(words["baseline"], 6)) for _ in range(len(table))])
    assert tr.persona_gate(same, "poeticism", GateThresholds()).status == "not shown"


def test_uptake_means_that_the_loss_falls():
    fall = tr.Curve(np.tile(-hill(STEPS, 7, 4), (6, 1, 1)), STEPS, list("abcdef"), [])
    assert tr.uptake_gate(fall).status == "shown"
    assert tr.uptake_gate(tr.Curve(-fall.y, STEPS, fall.units, [])).status == "not shown"
