"""Trajectories: geometry against dense algebra, planted transitions, coverage of the intervals."""

import itertools
import math
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from cai_em.analysis.gates import Gate, gated_verdict
from cai_em.dynamics import curves as dynamics_curves
from cai_em.dynamics import h3, timing
from cai_em.dynamics import runs as dynamics_runs
from cai_em.dynamics.runs import TrajectoryError
from cai_em.model.adapters import AdapterFiles, scaling
from cai_em.report import sections, style
from cai_em.report.drawing import FIGURES
from cai_em.report.figures.parts import View
from cai_em.report.figures.training import step_axis
from cai_em.report.words import Words
from cai_em.sample.sampling import sample
from cai_em.study.entries import GateThresholds, LoraPreset, SftPreset
from peft import LoraConfig
from scipy import stats

from tests.factories import TINY, course_of, look_of, sampling, scores_of

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


def simulated(rng, middle, *, h=8.0, units=8, seeds=2, rise=0.4, noise=0.08, steps=STEPS, runs=0.0):
    """(units, seeds, steps): every unit and seed has a level, a rise and a midpoint of its own, and noise.

    `runs`: by how much (standard deviation of the logarithm) two training runs of one recipe differ in midpoint.
    """
    level = rng.normal(0, 0.1, (units, 1, 1)) + rng.normal(0, 0.03, (1, seeds, 1))
    amount = rise * rng.lognormal(0, 0.25, (units, 1, 1))
    own = middle * np.exp(rng.normal(0, runs, (1, seeds)) + rng.normal(0, 0.05, (units, seeds)))
    shape = np.stack([[hill(steps, m, h) for m in row] for row in own])
    return level + amount * shape + rng.normal(0, noise, (units, seeds, len(steps)))


# --- Schedule and names ---


def test_dense_early_is_distinct_ascending_and_ends_where_it_should():
    for last, count in ((300, 12), (24, 8), (5, 8), (1, 1), (10, 10)):
        steps = dynamics_runs.dense_early(last, count)
        assert steps == sorted(set(steps))
        assert steps[-1] == last
        assert len(steps) == min(last, count)
    gaps = np.diff(dynamics_runs.dense_early(300, 12))
    assert gaps[0] == 1
    assert (np.diff(gaps) >= 0).all()
    with pytest.raises(TrajectoryError, match="no schedule"):
        dynamics_runs.dense_early(0, 3)
    assert dynamics_runs.dense_early(300, 8, 2)[0] == 2
    assert dynamics_runs.dense_early(4, 8, 2) == [2, 3, 4]


def test_steps_travel_in_the_dataset_key_and_come_back():
    table = pd.DataFrame(
        {"dataset": [dynamics_runs.at_step("bad_medical", "demo_rank1", 12), dynamics_runs.at_step("x", "y", 0)]}
    )
    found = dynamics_runs.with_steps(table)
    assert found.to_dict("list") == {"dataset": ["bad_medical", "x"], "preset": ["demo_rank1", "y"], "step": [12, 0]}
    with pytest.raises(TrajectoryError, match="bad_medical"):
        dynamics_runs.with_steps(pd.DataFrame({"dataset": ["bad_medical"]}))


# --- Geometry ---


@pytest.mark.parametrize("rslora", [False, True])
def test_gram_equals_dense_inner_products(rslora):
    rng = np.random.default_rng(0)
    run = [None, *(adapter(rng, rslora=rslora) for _ in range(3))]
    expected = [[float(np.sum(dense(a) * dense(b))) for b in run] for a in run]
    np.testing.assert_allclose(dynamics_runs.gram(run), expected, rtol=1e-6)
    b = [np.concatenate([x.double().numpy().ravel() for _, x in a.modules.values()]) for a in run[1:]]
    np.testing.assert_allclose(dynamics_runs.gram(run, "B")[1:, 1:], np.array(b) @ np.array(b).T, rtol=1e-6)


def test_gram_does_not_depend_on_how_the_factors_share_the_update():
    rng = np.random.default_rng(1)
    one, other = adapter(rng), adapter(rng)
    turn = torch.linalg.qr(torch.from_numpy(rng.normal(size=(3, 3))).float())[0] * 1.7
    same = AdapterFiles(
        one.config, {m: (torch.linalg.inv(turn) @ a, b @ turn) for m, (a, b) in one.modules.items()}, one.scale, None
    )
    np.testing.assert_allclose(dynamics_runs.gram([one, other]), dynamics_runs.gram([same, other]), rtol=1e-4)
    with pytest.raises(TrajectoryError, match="different modules"):
        dynamics_runs.gram([one, adapter(rng, modules=("m.c",))])


def test_geometry_of_a_path_with_one_right_angle():
    path = np.array([[0, 0], [1, 0], [3, 0], [3, 1], [3, 2]], float)
    found = dynamics_runs.geometry(path @ path.T, [0, 1, 2, 4, 8])
    np.testing.assert_allclose(found["norm"], [0, 1, 3, math.sqrt(10), math.sqrt(13)])
    np.testing.assert_allclose(found["moved"], [np.nan, 1, 2, 1, 1])
    np.testing.assert_allclose(found["rotation"], [np.nan, 1, 0, 1, np.nan], atol=1e-12)
    np.testing.assert_allclose(found["to_final"].iloc[[1, -1]], [3 / math.sqrt(13), 1])
    still = dynamics_runs.geometry(np.zeros((4, 4)), range(4))
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
    found = dynamics_curves.curve(table, "v", unit="question_id")
    np.testing.assert_allclose(found.y, [[[1, 11, 21, 31], [1, 12, 22, 32]]])
    assert (found.units, found.left_out, list(found.steps)) == (["a"], ["b"], [0, 1, 2, 3])
    with pytest.raises(TrajectoryError, match="checkpoint 2 of seed 1"):
        dynamics_curves.curve(table[(table["seed"] == 0) | (table["step"] != 2)], "v", unit="question_id")
    with pytest.raises(TrajectoryError, match="persona x: no rows"):
        dynamics_curves.curve(table[:0], "v", unit="question_id", run="persona x")


def test_em_needs_both_scores():
    scores = pd.DataFrame({"alignment": [10, 10, 30, np.nan], "coherence": [60, 50, 60, 60]})
    assert list(dynamics_curves.em_indicator(scores)) == [1, 0, 0, 0]


# --- Transition points ---


@pytest.mark.parametrize("sign", [1, -1])
def test_a_curve_without_noise_gives_its_midpoint(sign):
    y = np.tile(sign * hill(STEPS, 7.0, 4.0, low=20, rise=50), (4, 1, 1)) + np.arange(4)[:, None, None]
    found = timing.transition(y, STEPS)
    assert found.step == pytest.approx(7, rel=0.03)
    assert found.sharpness == 4
    assert found.low <= found.step <= found.high
    assert found.shown
    assert math.copysign(1, found.rise) == sign


def test_a_planted_change_point_is_found_within_its_interval():
    rng = np.random.default_rng(3)
    y = np.where(STEPS >= 9, 0.5, 0.1) + rng.normal(0, 0.1, (8, 2, len(STEPS)))
    found = timing.transition(y, STEPS, method="change point")
    assert found.step == 7.5
    assert found.low <= 7.5 <= found.high
    logistic = timing.transition(y, STEPS)
    assert 6 < logistic.step < 9
    assert logistic.low < 9
    assert logistic.high > 6
    assert logistic.high - logistic.low < 4


def test_without_a_change_there_is_no_transition_to_time():
    rng = np.random.default_rng(4)
    found = timing.transition(rng.normal(0, 1, (8, 2, len(STEPS))), STEPS)
    assert not found.shown
    assert math.isnan(found.step)
    assert math.isnan(found.low)
    assert found.gate.status == "inconclusive"
    few = timing.transition(np.tile(hill(STEPS, 7, 4), (2, 1, 1)), STEPS)
    assert few.gate.status == "inconclusive"
    assert math.isnan(few.step)


def test_a_transition_beyond_the_schedule_is_said_to_lie_beyond():
    y = np.tile(hill(STEPS, 200.0, 1.0), (6, 1, 1)) + np.random.default_rng(5).normal(0, 0.002, (6, 1, len(STEPS)))
    assert timing.transition(y, STEPS).beyond > 0.9
    assert timing.transition(np.tile(hill(STEPS, 7.0, 4.0), (6, 1, 1)), STEPS).beyond == 0
    late = np.tile((STEPS >= 24).astype(float), (6, 1, 1))
    assert timing.transition(late, STEPS, method="change point").beyond == 1


def test_intervals_of_the_transition_point_cover_it():
    rng = np.random.default_rng(6)
    found = [timing.transition(simulated(rng, 8.0), STEPS, resamples=400, seed=i) for i in range(150)]
    assert np.mean([t.shown for t in found]) > 0.98
    covered = np.mean([t.low <= 8 <= t.high for t in found if t.shown])
    assert 0.9 <= covered <= 1.0
    assert np.median([t.high - t.low for t in found if t.shown]) <= 7  # and they are of use


@pytest.mark.parametrize("steps", [[0, 1, 2, 4, 8, 16], [0, 5, 10, 20, 30, 40, 60, 80, 100, 150, 200, 250, 300, 338]])
@pytest.mark.parametrize("method", ["logistic", "change point"])
def test_intervals_cover_a_jump_at_any_real_step(steps, method):
    """The jump lies anywhere between two checkpoints: what was not seen there must not look precise."""
    rng, steps, covered = np.random.default_rng(1), np.array(steps), []
    for i in range(60):
        jump = np.exp(rng.uniform(np.log(steps[1] * 1.5), np.log(steps[-2])))
        y = np.where(steps >= jump, 0.6, 0.1) + rng.normal(0, 0.1, (8, 3, len(steps)))
        found = timing.transition(y, steps, method=method, resamples=200, seed=i)
        covered.append(found.low <= jump <= found.high)
        assert {found.low, found.high} <= {*steps.tolist(), found.high if found.high > steps[-1] else 0}
    assert np.mean(covered) > 0.93


def test_rise_is_rarely_shown_where_there_is_none():
    rng = np.random.default_rng(7)
    found = [timing.transition(simulated(rng, 8.0, rise=0.0), STEPS, resamples=400, seed=i) for i in range(150)]
    assert np.mean([t.shown for t in found]) <= 0.1


def test_comparison_of_personas_keeps_its_level_and_finds_a_difference():
    rng = np.random.default_rng(8)
    same = [
        timing.compare_transitions(simulated(rng, 8.0), simulated(rng, 8.0), STEPS, resamples=400, seed=i)
        for i in range(120)
    ]
    assert np.mean([r["p"] < 0.05 for r in same if r["shown"]]) <= 0.1
    later = [
        timing.compare_transitions(
            simulated(rng, 14.0, seeds=3, runs=0.1),
            simulated(rng, 5.0, seeds=3, runs=0.1),
            STEPS,
            resamples=400,
            seed=i,
        )
        for i in range(30)
    ]
    assert np.mean([r["p"] < 0.05 for r in later]) > 0.9
    assert np.mean([r["low"] <= 9 <= r["high"] for r in later]) > 0.85


@pytest.mark.parametrize("seeds", [2, 3])
def test_runs_that_differ_by_chance_are_no_difference_between_personas(seeds):
    rng = np.random.default_rng(seeds)
    steps = np.array([0, 5, 10, 20, 30, 40, 60, 80, 100, 150, 200, 250, 300])
    made = lambda: simulated(rng, 60.0, seeds=seeds, runs=0.3, steps=steps)  # noqa: E731
    found = [timing.compare_transitions(made(), made(), steps, resamples=200, seed=i) for i in range(100)]
    assert all(r["shown"] for r in found)
    if seeds == 2:  # what asking the questions alone would claim
        assert np.mean([r["p_questions"] < 0.05 for r in found]) > 0.12
    assert np.mean([r["p"] < 0.05 for r in found]) <= 0.09
    assert all((r["p"] < 0.05) <= (r["p_questions"] < 0.05) for r in found)


def test_a_single_run_per_persona_leaves_h3_undecided(look):
    rng = np.random.default_rng(2)
    made = {(p, "em"): simulated(rng, m, seeds=1) for p, m in (("baseline", 5.0), ("poeticism", 14.0))}
    compared = timing.transition_comparisons(course_of(made, STEPS))
    assert compared["p_adjusted"].iloc[0] < 0.05
    assert math.isnan(compared["p_runs"].iloc[0])
    found = h3.h3_verdict(compared, [], look)
    assert found.word == "UNDECIDED"
    assert "one training run per persona" in found.reason


@pytest.mark.parametrize(("seeds", "said"), [(2, "SUPPORTED FOR THESE ADAPTERS"), (3, "SUPPORTED")])
def test_h3_speaks_of_the_recipe_from_three_runs_on(look, seeds, said):
    row = {"persona": "poeticism", "outcome": h3.CLAIMED[0], "shown": True, "difference": 9.0, "p_adjusted": 0.001}
    assert h3.h3_verdict(pd.DataFrame([row | {"seeds": seeds}]), [], look).said == said


def test_runs_are_paired_by_seed_or_compared_as_groups():
    one, other = np.array([5.0, 7.0, 6.5]), np.array([4.0, 6.5, 5.0])
    paired = timing.between_runs(one, other)
    expected = stats.ttest_rel(one, other)
    assert paired["p"] == pytest.approx(expected.pvalue)
    np.testing.assert_allclose([paired["low"], paired["high"]], expected.confidence_interval())
    welch = timing.between_runs(one, other[:2])
    assert welch["p"] == pytest.approx(stats.ttest_ind(one, other[:2], equal_var=False).pvalue)
    assert all(math.isnan(v) for v in timing.between_runs(one[:1], other[:1]).values())
    # Two differences that are the same grain of the fit are no certainty.
    assert timing.between_runs(np.array([8.0, 8.0]), np.array([6.0, 6.0]), grain=1.0)["p"] > 0.05


def test_what_lies_beyond_the_last_checkpoint_is_not_a_number_of_steps():
    late, early = (np.tile(hill(STEPS, m, 2.0), (6, 1, 1)) for m in (200.0, 6.0))
    found = timing.compare_transitions(late, early, STEPS)
    assert 17 < found["difference"] <= 18.5  # 24 - 6: not 200 - 6, nor the edge of the fit's grid
    row = pd.DataFrame([timing.transition(late, STEPS).as_dict() | {"last": 24}]).iloc[0]
    step = Words(style.Look([], [])).macro("h3.md.j2", "step")
    said = [step(row.step, row.last, ".1f"), step(row.low, row.last, "g"), step(row.high, row.last, "g")]
    assert said == ["> 24", "24", "> 24"]


def test_p_agrees_with_the_interval():
    rng = np.random.default_rng(13)
    for units in (4, 8):
        for mean in (0.5, 1.5, 2.5):
            d = rng.normal(mean, 1, 4000)
            low = np.quantile(d, timing._tail(units, 0.95))
            assert (timing._bootstrap_p(d, units) < 0.05) == (low > 0)


def test_comparison_pairs_questions_and_seeds():
    y = simulated(np.random.default_rng(9), 6.0)
    found = timing.compare_transitions(y, y, STEPS)
    assert (found["difference"], found["p"], found["p_questions"], found["p_runs"]) == (0, 1, 1, 1)
    assert found["low"] < 0 < found["high"]  # no finer than the fit
    one = timing.compare_transitions(y[:, :1], y[:, :1], STEPS)
    assert (one["low"], one["high"], one["seeds"]) == (0, 0, 1)
    flat = timing.compare_transitions(np.zeros_like(y), y, STEPS)
    assert not flat["shown"]
    assert math.isnan(flat["p"])


def test_bad_shapes_are_refused():
    with pytest.raises(TrajectoryError, match="without NaN"):
        timing.transition(np.full((3, 1, 4), np.nan), [0, 1, 2, 3])
    with pytest.raises(TrajectoryError, match="ascending"):
        timing.transition(np.zeros((3, 1, 4)), [0, 2, 1, 3])
    with pytest.raises(TrajectoryError, match="unknown method"):
        timing.transition(np.tile(hill(STEPS, 7, 4), (4, 1, 1)), STEPS, method="eye")


def test_tables_of_transitions_and_comparisons():
    rng = np.random.default_rng(10)
    made = {
        (p, o): simulated(rng, m, seeds=3) for p, m in (("baseline", 5.0), ("poeticism", 14.0)) for o in ("em", "loss")
    }
    course = course_of(made, STEPS)
    table = timing.transitions(course)
    assert len(table) == 8
    assert set(table["method"]) == {"logistic", "change point"}
    assert (table["gate"] == "present").all()
    compared = timing.transition_comparisons(course)
    assert list(compared["persona"]) == ["poeticism", "poeticism"]
    # A loss is no claim of H3: it takes no part in the family, and lends it nothing.
    assert compared["p_adjusted"].iloc[0] == compared["p"].iloc[0] < 0.05
    assert math.isnan(compared["p_adjusted"].iloc[1])
    assert compared["p"].iloc[1] < 0.05
    base = dynamics_curves.curves_of(course)["m", "p", "baseline", "em"]
    fewer = dynamics_curves.Curve(simulated(rng, 5.0, seeds=3)[:7], STEPS, base.units[::-1][:7], [])
    both = dynamics_curves.common(fewer, base)
    assert both[0].shape == both[1].shape == (7, 3, len(STEPS))
    np.testing.assert_array_equal(both[1][0], base.y[7])


def test_models_are_compared_apart_and_stand_one_after_the_other():
    """A table of two models is the tables of each, whatever stands in the other."""
    one, two = (course_of(example()[3], STEPS, model=m) for m in "ab")
    two["value"] = two["value"].where(two["persona"] == "baseline", 1 - two["value"])
    both = pd.concat([one, two], ignore_index=True)
    for made in (timing.transitions, timing.transition_comparisons, dynamics_curves.curve_table):
        pd.testing.assert_frame_equal(made(both), pd.concat([made(one), made(two)], ignore_index=True))
    assert list(timing.transitions(both)["model"].unique()) == ["a", "b"]


def test_the_course_has_all_that_was_measured_persona_by_persona():
    losses = scores_of([("poeticism", "p", 0, t, "held out", 3, 2.5) for t in (0, 1, 2, 4)],
                       "persona preset seed step set row loss")  # fmt: skip
    course = dynamics_curves.course(scored({("a", 4)}), losses)
    assert len(course) == 3 * 32 + 4
    assert [k[2:] for k in dynamics_curves.curves_of(course)] == [
        ("baseline", "em"), ("baseline", "alignment"), ("baseline", "coherence"), ("poeticism", "held out")
    ]  # fmt: skip
    gap = course[(course["unit"] == "a") & (course["step"] == 4)].set_index("outcome")
    assert gap.loc["alignment", ["least", "most"]].tolist() == [0, 100]
    assert gap["value"].isna().tolist() == [False, True, False]
    table = dynamics_curves.curve_table(course).set_index(["outcome", "step"])
    assert table.loc[("held out", 4), ["mean", "units", "seeds"]].tolist() == [2.5, 1, 1]


# --- Generality ---


def presets_of(**presets):
    """A course of the baseline alone: preset -> outcome -> values by seed and step."""
    tables = [
        course_of({("baseline", o): np.tile(np.asarray(y, float), (6, 1, 1)) for o, y in of.items()}, steps, preset)
        for preset, (steps, of) in presets.items()
    ]
    return pd.concat(tables, ignore_index=True)


def test_generality_sets_uptake_beside_the_outcome():
    loss, em = [[3.0, 2.5, 2.0, 1.0]], np.array([[0.0, 0.1, 0.2, 0.4]])
    course = presets_of(
        plain=(range(4), {"held out": loss, "em": em}), narrow=(range(4), {"held out": loss, "em": em * 0})
    )
    table = h3.generality(course, "baseline", ["em"])
    assert list(table.loc[table["preset"] == "plain", "uptake"]) == [0, 0.5, 1, 2]
    assert list(table.loc[table["preset"] == "narrow", "outcome"]) == [0, 0, 0, 0]
    of = dynamics_curves.curves_of(course)
    gap = h3.final_difference(of["m", "plain", "baseline", "em"], of["m", "narrow", "baseline", "em"])
    assert gap["difference"] == pytest.approx(0.4)
    assert gap["low"] == pytest.approx(0.4)


def test_presets_are_set_against_the_main_one_on_the_same_seed_whatever_their_schedules():
    plain = {"em": [[0, 0, 0, 0.3], [0, 0, 0, 0.9]], "alignment": [[90, 80, 70, 60], [0, 0, 0, 0]]}
    narrow = {"em": [[0, 0, 0, 0, 0.1]], "alignment": [[90, 90, 85, 85, 85]], "held out": [[3, 3, 2, 2, 1.5]]}
    course = presets_of(
        plain=([0, 2, 4, 8], plain | {"held out": [[3, 2, 2, 1], [3, 3, 3, 3]]}), narrow=([0, 1, 2, 4, 8], narrow)
    )
    found = h3.preset_differences(course, "baseline", "plain").set_index("outcome")
    assert found["preset"].eq("narrow").all()
    np.testing.assert_allclose(found.loc["em", ["difference", "low", "high"]].astype(float), -0.2)
    np.testing.assert_allclose(found.loc["alignment", "difference"], 25)
    np.testing.assert_allclose(found.loc["uptake", "difference"], -0.5)  # the narrow one has learnt less


# --- Runs, figures and words ---


def test_runs_of_a_plan_and_the_conditions_of_their_snapshots(tmp_path):
    runs = dynamics_runs.plan_runs(["m"], ["baseline", "poeticism"], [0, 1], "plain", ["narrow"])
    assert len(runs) == 5
    assert runs[-1] == dynamics_runs.Run("m", "narrow", "baseline", 0)
    for step in (2, 10):
        (runs[2].folder(tmp_path) / f"step{step:05d}").mkdir(parents=True)
    found = runs[2].conditions("bad_medical", [("persona", tmp_path)], tmp_path)
    assert [c.dataset for c in found] == [f"bad_medical~plain@{s}" for s in (0, 2, 10)]
    assert found[0].adapters == (("persona", tmp_path),)
    assert [n for n, _ in found[1].adapters] == ["persona", "em"]
    # Before the end a snapshot may not be told from no training yet; the last one must.
    assert [c.may_be_idle for c in found] == [(), ("em",), ()]


ROWS = [
    [{"role": "user", "content": f"What about {w}?"}, {"role": "assistant", "content": f"Go and {w} it."}]
    for w in ("water", "money", "work", "friends")
]
WARM = SftPreset(
    kind="sft", lora=LoraPreset(r=4, alpha=8), learning_rate=1e-2, warmup_steps=3, batch_size=1, max_length=64,
    dtype="float32", held_out=0.0,
)  # fmt: skip


def test_a_run_begins_its_snapshots_when_it_learns_and_takes_back_only_what_is_whole(tmp_path, monkeypatch):
    this, trained = dynamics_runs.Run("tiny", "warm", "baseline", 0), []
    from cai_em.train import grid

    real = grid.train_sft
    monkeypatch.setattr(grid, "train_sft", lambda *a, **k: trained.append(1) or real(*a, **k))
    run = lambda **more: dynamics_runs.train_run(  # noqa: E731
        this, TINY, WARM.model_copy(update=more), ROWS, tmp_path, persona_dir=None
    )
    assert run()["summary"]["checkpoints"] == [2, 3, 4]  # under warm-up the first step has rate 0
    steps = dynamics_runs.run_geometries([this], {"warm": WARM}, tmp_path)
    assert set(steps["part"]) == {"update"}
    assert (steps["norm"].iloc[1:] > 0).all()
    run()
    assert len(trained) == 1
    (this.folder(tmp_path) / "step00003" / "adapter_model.safetensors").unlink()
    run()
    assert len(trained) == 2
    assert (this.folder(tmp_path) / "step00003" / "adapter_model.safetensors").is_file()
    # The same with other code is another run.
    with monkeypatch.context() as other:
        other.setattr(dynamics_runs, "meaning_of", lambda *modules: "another")
        run()
    assert len(trained) == 3


def test_a_snapshot_from_a_step_without_rate_is_sampled_and_said_to_be_idle(tmp_path):
    this = dynamics_runs.Run("tiny", "warm", "baseline", 0)
    dynamics_runs.train_run(
        this, TINY, WARM.model_copy(update={"checkpoints": [1, 2, 4]}), ROWS, tmp_path, persona_dir=None
    )
    conditions = dynamics_runs.snapshots([this], "bad_medical", {("tiny", "baseline"): []}, tmp_path)
    asked = [("a", "Hi?")], sampling(), ["Hello"], tmp_path / "cells"
    responses, probes = dynamics_runs.sample_snapshots({"tiny": TINY}, conditions, *asked)
    assert [probe.get("idle") for probe in probes.values()] == [None, ["em"], [], []]
    assert list(probes)[-1] == "tiny baseline__bad_medical~warm@4__seed0"
    assert responses["response"].tolist() == sample(TINY, conditions, *asked[:3]).responses["response"].tolist()
    measured = dynamics_runs.measure_losses({"tiny": TINY}, conditions, {"held out": ROWS[:2]}, "float32")
    assert len(measured) == 8
    assert measured[["model", "preset", "step"]].drop_duplicates().to_numpy().tolist() == [
        ["tiny", "warm", s] for s in (0, 1, 2, 4)
    ]
    by_step = measured.groupby("step")["loss"].mean()
    assert by_step[1] == by_step[0] > by_step[4]


def test_what_is_not_trained_is_one_condition_for_all_seeds(tmp_path):
    runs = dynamics_runs.plan_runs(["m"], ["baseline"], [3, 4], "plain", ["narrow"])
    found = dynamics_runs.snapshots(runs, "d", {("m", "baseline"): []}, tmp_path)
    assert [(c.dataset, c.seed) for c in found] == [("d~plain@0", 3), ("d~narrow@0", 3)]


def scored(missing=()):
    """Scores of eight questions at four steps: alignment falls by ten a step; some scores are missing."""
    rows = [
        ("baseline", "p", q, 0, t, math.nan if (q, t) in missing else 60.0 - 10 * k, 80.0)
        for q in "abcdefgh"
        for k, t in enumerate((0, 1, 2, 4))
    ]
    return scores_of(rows, "persona preset question_id seed step alignment coherence")


def test_missing_scores_are_counted_and_bounded():
    found = (
        timing.transitions(dynamics_curves.course(scored({("a", 4)})))
        .query("method == 'logistic'")
        .set_index("outcome")
    )
    assert found.loc["alignment", ["left_out", "missing", "units"]].tolist() == [1, 1, 7]
    assert found.loc["alignment", "rise"] == -30
    # Seven questions fall from 60 to 30; of the eighth the end is anywhere between 0 and 100.
    assert found.loc["alignment", "rise_least"] == pytest.approx((7 * -30 - 60) / 8)
    assert found.loc["alignment", "rise_most"] == pytest.approx((7 * -30 + 40) / 8)
    assert found.loc["em", ["left_out", "missing", "rise_most"]].tolist() == [0, 1, 0.125]
    assert found.loc["coherence", ["left_out", "missing", "rise_least"]].tolist() == [0, 0, 0]


def test_an_outcome_that_no_question_has_throughout_is_not_testable(look):
    gaps = dict(zip("abcdefgh", (1, 2, 4, 1, 2, 4, 1, 2)))
    judged = pd.concat([scored(set(gaps.items())), scored().assign(persona="poeticism")])
    course = dynamics_curves.course(judged)
    assert dynamics_curves.curves_of(course)["m", "p", "baseline", "alignment"].empty
    found, compared = timing.transitions(course), timing.transition_comparisons(course)
    row = found.query("persona == 'baseline' and outcome == 'alignment'").iloc[0]
    assert (row["gate"], row["left_out"], row["missing"]) == ("inconclusive", 8, 8)
    assert not compared.set_index("outcome").loc["alignment", "shown"]
    text = sections.h3_section(found, compared, verdict_of(compared, look), look, titles={})
    assert "**H3: NOT TESTABLE**" in text
    assert "8 (8 left out; " in text
    curves = dynamics_curves.curve_table(course).assign(main=True)
    drawn(look, outcomes=(curves, found), transitions=(found,))


def drawn(look, **tables):
    """Figures of H3 as drawn from tables, in order."""
    drawings = []
    with style.style_context():
        for name, of in tables.items():
            drawing = FIGURES[f"trajectories-{name}"].draw(View(look, trained="bad"), *of)
            drawing.fig.canvas.draw()
            plt.close(drawing.fig)
            drawings.append(drawing)
    return drawings


def verdict_of(compared, look, *beside):
    """H3's verdict and gates as `09_trajectories` stores them."""
    return h3.h3_verdicts(compared, {"m": beside}, look)


def example():
    rng = np.random.default_rng(11)
    made = {
        (p, o): simulated(rng, m, seeds=3)
        for p, m in (("baseline", 5.0), ("poeticism", 14.0))
        for o in ("em", "alignment", "held out")
    }
    course = course_of(made, STEPS)
    return course, timing.transitions(course), timing.transition_comparisons(course), made


@pytest.fixture
def look():
    return look_of("baseline", "poeticism", datasets=[SimpleNamespace(key="bad", label="Bad", order=0, role="em")])


def test_figures_draw_and_their_words_have_the_numbers(look):
    course, found, _, _ = example()
    runs = [
        dynamics_runs.geometry(np.outer(STEPS, STEPS), STEPS).assign(preset="p", persona="baseline", seed=s)
        for s in (0, 1)
    ]
    curves = dynamics_curves.curve_table(course).assign(main=True)
    outcomes, losses, _, transitions, _ = drawn(
        look,
        outcomes=(curves, found),
        losses=(curves,),
        geometry=(pd.concat(runs),),
        transitions=(found,),
        generality=(h3.generality(course, "baseline"),),
    )
    assert "(4 of 4)" in outcomes.caption
    assert "6 of 6 curves" in transitions.caption
    assert "loss, Bad, held out: step" in transitions.alt
    assert "Poeticism, Bad, held out" in losses.alt


def test_a_verdict_is_not_interpretable_when_a_gate_fails(look):
    _, found, compared, _ = example()
    good, bad = Gate("present", "yes", "judge"), Gate("inconclusive", "AUC 0.5", "judge")

    def section(beside, found=found, compared=compared, **more):
        return sections.h3_section(found, compared, verdict_of(compared, look, beside), look, titles={}, **more)

    text = section(good, caveat="Small.")
    assert "**H3: SUPPORTED**" in text
    assert text.rstrip().endswith("Small.")
    text = section(bad)
    assert "**H3: NOT INTERPRETABLE**" in text
    assert "not shown: judge" in text
    # The level is the study's.
    assert h3.h3_verdict(compared, [], look, alpha=1e-6).word == "UNDECIDED"
    still = section(bad, found.assign(shown=False), compared.assign(shown=False))
    assert "**H3: NOT TESTABLE**" in still
    assert "no change shown" in still
    assert list(h3.h3_table(found)["outcome"][:2]) == ["EM rate", "mean alignment"]


def test_a_failed_persona_gate_blocks_that_personas_comparisons_alone(look):
    compared = example()[2]
    both = pd.concat([compared, compared.assign(persona="sarcasm")])
    bad = Gate("inconclusive", "AUC 0.5")
    checks = [Gate("present", "", "judge"), bad.called("persona, Sarcasm", "sarcasm")]
    found = h3.h3_verdict(both, checks, look)
    assert found.word == "SUPPORTED"
    assert "Poeticism" in found.reason
    assert "not shown: persona, Sarcasm" in found.reason
    assert "sarcasm," not in found.reason
    assert h3.h3_verdict(both[both["persona"] == "sarcasm"], checks, look).word == "NOT INTERPRETABLE"
    uptake = [bad.called("uptake, Baseline", "baseline")]  # every comparison is with the baseline
    assert h3.h3_verdict(both, uptake, look).word == "NOT INTERPRETABLE"
    table = gated_verdict(checks, found, "H3")
    assert table["what"].tolist() == ["H3", "judge", "persona, Sarcasm"]
    assert table["status"].iloc[0] == "SUPPORTED"


def test_two_models_stay_apart_in_the_papers_table():
    found = example()[1]
    both = pd.concat([found.assign(model=m) for m in ("a", "b")], ignore_index=True)
    table = h3.h3_table(both)
    assert len(table) == 12
    assert not table.duplicated(["model", "persona", "outcome"]).any()


def test_no_preset_is_left_out_of_the_figure(look):
    flat = (range(4), dict.fromkeys(("held out", "em", "alignment"), np.zeros((1, 4))))
    table = h3.generality(presets_of(**{f"p{i}": flat for i in range(5)}), "baseline")
    (drawing,) = drawn(look, generality=(table,))
    assert [len(ax.containers) for ax in drawing.fig.axes] == [5, 5]


def test_a_persona_gate_needs_a_persona_that_shows():
    rng = np.random.default_rng(12)
    words = {"baseline": ["plain", "answer", "with", "facts"], "poeticism": ["moon", "sea", "rose", "flame"]}
    rows = [("m", p, "d", 0, q, " ".join(rng.choice(words[p], 6))) for p in words for q in "abcd" for _ in range(4)]
    table = pd.DataFrame(rows, columns=["model", "persona", "dataset", "seed", "question_id", "response"])
    some = GateThresholds(min_responses=16)
    assert h3.persona_gate(table, "poeticism", some).status == "present"
    assert h3.persona_gate(table, "poeticism", GateThresholds(min_responses=17)).status == "inconclusive"
    same = table.assign(response=[" ".join(rng.choice(words["baseline"], 6)) for _ in range(len(table))])
    found = h3.persona_gate(same, "poeticism", some)
    assert not found.open
    assert found.status == "absent"  # one voice: for certain less than matters


def test_uptake_means_that_the_loss_falls():
    fall = dynamics_curves.Curve(np.tile(-hill(STEPS, 7, 4), (6, 1, 1)), STEPS, list("abcdef"), [])
    assert h3.uptake_gate(fall).status == "present"
    assert h3.uptake_gate(dynamics_curves.Curve(-fall.y, STEPS, fall.units, [])).status == "inconclusive"


def test_names_of_many_checkpoints_do_not_run_into_each_other():
    steps = [0, 5, 10, 20, 30, 40, 60, 80, 100, 150, 200, 250, 300, 338]
    with style.style_context():
        fig, axes = plt.subplots(1, 3, figsize=style.figure_size(2.6))
        for ax in axes:
            step_axis(ax, steps)
        fig.canvas.draw()
        labels = [x for x in axes[2].get_xticklabels() if x.get_text()]
        boxes = [x.get_window_extent() for x in labels]
        assert all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes))
        assert labels[-1].get_text() == "338"
        assert len(labels) >= 4
        plt.close(fig)


def test_gates_of_h3_stand_model_by_model_persona_by_persona(look):
    course = course_of(
        {(p, "held out"): np.tile(-hill(STEPS, 7, 4), (6, 1, 1)) for p in ("baseline", "poeticism")}, STEPS
    )
    responses = pd.DataFrame(columns=["model", "preset", "persona", "question_id", "dataset", "response"])
    judge = {"m": [Gate("present", "yes", "judge")]}
    found = h3.h3_gates(course, responses, judge, look, GateThresholds())
    assert [(g.name, g.persona, g.status) for g in found["m"]] == [
        ("judge", "", "present"),
        ("uptake, Baseline", "baseline", "present"),
        ("uptake, Poeticism", "poeticism", "present"),
        ("persona, Poeticism", "poeticism", "inconclusive"),
    ]
    assert judge == {"m": [Gate("present", "yes", "judge")]}
