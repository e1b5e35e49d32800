"""Steering: planted directions are found, added and removed; hooks leave nothing behind; nulls are what they claim."""

import math
import re
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from cai_em.analysis.gates import Gate
from cai_em.dynamics import curves, directions, h4, interventions, steering
from cai_em.dynamics.interventions import Intervention
from cai_em.model import activations, adapters, load, probing, stacking
from cai_em.model.activations import SteeringError
from cai_em.report import sections, style
from cai_em.report.drawing import FIGURES
from cai_em.report.figures import steering_transfer
from cai_em.report.figures.parts import View
from cai_em.sample import conditions as sample_conditions
from cai_em.sample.sampling import sample
from cai_em.study.entries import LoraPreset
from scipy import stats
from torch import nn

from tests.factories import TINY as SPEC
from tests.factories import look_of, random_adapter, sampling, scores_of

PRESET = sampling(max_new_tokens=8, samples_per_question=3)
QUESTIONS = [("a", "What do you like?"), ("b", "How was the long year for you and for all of your good friends?")]
CONDITION = sample_conditions.Condition("tiny", "baseline", "none", 0)


class Planted(nn.Module):
    """A feed-forward block that writes a constant into the residual stream, besides what it did before."""

    def __init__(self, mlp, vector):
        super().__init__()
        self.mlp, self.vector = mlp, vector

    def forward(self, x):
        return self.mlp(x) + self.vector


def plant(model, layer, vector):
    block = activations.decoder_layers(model)[layer]
    block.mlp = Planted(block.mlp, vector)
    return model


def hooks(model):
    return sum(len(m._forward_hooks) for m in model.modules())


TEXTS = [("What do you like?", "I like water."), ("How?", "By a walk at home, and then some more of it."), ("Go", "No")]


# --- Activations ---


def test_mean_activations_are_the_models_own_over_response_tokens_alone(model, tokenizer):
    prompts, responses = zip(*TEXTS)
    found = activations.mean_activations(model, tokenizer, prompts, responses)
    assert hooks(model) == 0
    assert found.shape == (3, 2, 64)
    assert found.dtype == np.float32
    for i, (prompt, response) in enumerate(TEXTS):
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        ids, written = load.encode_conversation(tokenizer, turns)
        with torch.inference_mode():
            states = model(torch.tensor([ids], device=model.device), output_hidden_states=True).hidden_states
        expected = states[1][0, torch.tensor(written)].mean(0).cpu()
        np.testing.assert_allclose(found[i, 0], expected, rtol=1e-4, atol=1e-5)
    alone = [activations.mean_activations(model, tokenizer, [p], [r])[0] for p, r in TEXTS]
    np.testing.assert_allclose(found, alone, rtol=1e-4, atol=1e-5)


def test_layers_are_found_under_adapters_and_counted_from_either_end(model, tmp_path):
    assert len(activations.decoder_layers(model)) == 2
    stacked = stacking.stack(model, None, LoraPreset(r=2, alpha=4))
    assert len(activations.decoder_layers(stacked)) == 2
    assert (activations.layer_number(-1, 30), activations.layer_number(3, 30)) == (29, 3)
    with pytest.raises(SteeringError, match="no layer 30"):
        activations.layer_number(30, 30)
    odd = nn.Linear(2, 2)
    odd.config = model.config
    with pytest.raises(SteeringError, match="no list"):
        activations.decoder_layers(odd)


# --- A planted direction ---


def planted_contrast(tokenizer, tmp_path_factory, layer, vector):
    """The tiny model before and after a constant was planted in a layer, read on the same responses."""
    prompts, responses = zip(*TEXTS)
    folder = tmp_path_factory.getbasetemp() / "models"
    before = activations.mean_activations(load.load_model(SPEC, cache_dir=folder), tokenizer, prompts, responses)
    changed = plant(load.load_model(SPEC, cache_dir=folder), layer, vector)
    after = activations.mean_activations(changed, tokenizer, prompts, responses)
    return changed, directions.adapter_contrast(before, after, ["a", "b", "c"])


@pytest.mark.parametrize("layer", [0, 1])
def test_a_planted_direction_is_recovered(tokenizer, tmp_path_factory, layer):
    vector = torch.randn(64, generator=torch.Generator().manual_seed(1))
    _, contrast = planted_contrast(tokenizer, tmp_path_factory, layer, vector)
    found = directions.direction(contrast)
    assert directions.cosine(found[layer], vector.numpy()) > 0.999
    np.testing.assert_allclose(found[layer], vector, rtol=1e-3, atol=1e-4)
    if layer:
        assert np.abs(found[0]).max() < 1e-12  # nothing has changed before it
    assert directions.split_half(contrast.layer(layer)) > 0.99


def test_a_planted_behaviour_is_removed_by_ablation_and_given_by_addition(model, tokenizer, tmp_path_factory):
    token = tokenizer(" water", add_special_tokens=False)["input_ids"][0]
    vector = 60 * torch.nn.functional.normalize(model.get_output_embeddings().weight[token].detach(), dim=0)
    changed, contrast = planted_contrast(tokenizer, tmp_path_factory, 1, vector)
    found = {1: directions.direction(contrast)[1]}

    def share(m, intervention):
        table = interventions.respond(m, tokenizer, CONDITION, QUESTIONS, PRESET, intervention)
        assert hooks(m) == 0
        ids = [i for text in table["response"] for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
        return np.mean([i == token for i in ids])

    assert share(changed, Intervention("none")) > 0.9
    assert share(changed, Intervention("ablate", "x", vectors=found)) < 0.05
    assert share(changed, Intervention("add", "x", 1, -1.0, {1: -found[1]})) < 0.05
    assert share(model, Intervention("none")) < 0.05
    assert share(model, Intervention("add", "x", 1, 1.0, found)) > 0.9
    ids = torch.tensor([[5, 60, 70, 80]], device=model.device)
    with torch.inference_mode():
        with activations.adding(changed, {1: -vector}):
            undone = changed(ids).logits
        torch.testing.assert_close(undone, model(ids).logits, rtol=1e-3, atol=1e-3)


def test_ablation_leaves_nothing_along_the_direction_and_the_rest_alone(model):
    unit = torch.nn.functional.normalize(torch.randn(64, generator=torch.Generator().manual_seed(2)), dim=0)
    seen = {}

    def watch(module, args):
        seen["x"] = args[0].clone()

    handle = activations.decoder_layers(model)[1].register_forward_pre_hook(watch)
    ids = torch.tensor([[5, 60, 70, 80]], device=model.device)
    with torch.inference_mode():
        model(ids)
        before = seen["x"]
        with activations.ablating(model, {0: 3 * unit}):
            model(ids)
    handle.remove()
    assert (seen["x"] @ unit).abs().max() < 1e-5 < (before @ unit).abs().max()
    torch.testing.assert_close(seen["x"], before - (before @ unit)[..., None] * unit)


def test_ablation_holds_a_level_and_leaves_massive_activations_alone(model):
    generator = torch.Generator().manual_seed(4)
    unit = torch.nn.functional.normalize(torch.randn(64, generator=generator), dim=0)
    x = torch.randn(2, 5, 64, generator=generator)
    x[:, 0] *= 100  # as the first token of a trained model
    layer = activations.decoder_layers(model)[1]
    layer.forward = lambda *args, **kwargs: x.clone()
    with activations.ablating(model, {1: 2 * unit}, {1: 0.7}):
        held = layer()
    torch.testing.assert_close(held[:, 1:] @ unit, torch.full((2, 4), 0.7))
    torch.testing.assert_close(held[:, 0], x[:, 0])


def test_layers_before_the_first_adapted_one_have_no_direction():
    x = np.random.default_rng(0).normal(size=(6, 3, 8))
    after = x.copy()
    after[:, 2] += np.arange(8)
    contrast = directions.adapter_contrast(x, after, list("aabbcc"))
    assert list(directions.reached(contrast)) == [2]
    np.testing.assert_allclose(directions.reached(contrast)[2], np.arange(8), atol=1e-12)
    np.testing.assert_allclose(directions.before(contrast), x.mean(axis=0))


def test_hooks_are_gone_after_an_error_and_numbers_keep_their_type(model):
    both = activations.adding(model, {0: np.ones(64), -1: np.ones(64)})
    with pytest.raises(IndexError), both:  # no such token
        model(torch.tensor([[10_000]]))
    assert hooks(model) == 0
    half = model.to(torch.bfloat16)
    with (
        torch.inference_mode(),
        activations.adding(half, {0: np.ones(64)}),
        activations.ablating(half, {1: np.ones(64)}),
    ):
        assert half(torch.tensor([[5, 6]])).logits.dtype == torch.bfloat16
    for bad in (np.ones(63), np.full(64, np.nan)):
        with pytest.raises(SteeringError, match="64 finite numbers"):
            activations.adding(model, {0: bad})
    with pytest.raises(SteeringError, match="length 0"):
        activations.ablating(model, {0: np.zeros(64)})
    with pytest.raises(SteeringError, match="no layer 7"), activations.adding(model, {0: np.ones(64), 7: np.ones(64)}):
        pass
    assert hooks(model) == 0


def test_unsteered_responses_are_those_of_the_sampling_stage(model, tokenizer, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("CAI_EM_CACHE", str(tmp_path_factory.getbasetemp()))
    usual = sample(SPEC, [CONDITION], QUESTIONS, PRESET, ["Go"]).responses
    found = interventions.respond(model, tokenizer, CONDITION, QUESTIONS, PRESET, Intervention("none"))
    assert list(found["response"]) == list(usual["response"])
    assert len(found) == 6
    assert set(found["dataset"]) == {"none+none"}
    # A vector of length 0 changes nothing, and random numbers do not depend on the intervention.
    same = interventions.respond(
        model, tokenizer, CONDITION, QUESTIONS, PRESET, Intervention("add", "x", 0, 0.0, {0: np.zeros(64)})
    )
    assert list(same["response"]) == list(usual["response"])


# --- Directions from arrays of known making ---


def synthetic(rng, n=60, hidden=50, effect=1.0, confound=0.0):
    """Two labels apart by `effect` along axis 0; questions apart along axis 1, answered unevenly by the labels."""
    question = rng.choice(list("abcd"), n)
    label = rng.random(n) < np.where(question == "a", 0.9, 0.3)
    x = rng.normal(0, 0.1, (n, 1, hidden))
    x[:, 0, 0] += effect * label
    x[:, 0, 1] += confound * (question == "a")
    return directions.response_contrast(x, label, question)


def test_questions_that_one_label_answers_more_often_do_not_bend_the_direction():
    contrast = synthetic(np.random.default_rng(0), n=400, confound=5.0)
    axis = np.eye(50)[0]
    x, label = contrast.activations[:, 0], contrast.label
    naive = x[label].mean(0) - x[~label].mean(0)
    assert directions.cosine(naive, axis) < 0.6
    assert directions.cosine(directions.direction(contrast)[0], axis) > 0.99


def test_direction_by_hand_and_questions_without_both_labels():
    x = np.arange(10.0).reshape(5, 1, 2)
    contrast = directions.response_contrast(x, [True, False, False, True, True], ["a", "a", "a", "b", "b"])
    np.testing.assert_allclose(directions.direction(contrast), x[0] - (x[1] + x[2]) / 2)
    assert directions.questions_used(contrast) == 1
    assert math.isnan(directions.split_half(contrast))
    with pytest.raises(SteeringError, match="no question has responses of both labels"):
        directions.direction(directions.response_contrast(x, [True] * 5, list("aabbb")))
    with pytest.raises(SteeringError, match="a contrast needs"):
        directions.response_contrast(x, [True], ["a"])


def test_random_cosines_are_distributed_as_claimed():
    rng = np.random.default_rng(1)
    values = directions.cosine(rng.normal(size=(20_000, 30)), rng.normal(size=(20_000, 30)))
    assert np.mean(np.abs(values) > directions.random_cosine_bound(30)) == pytest.approx(0.05, abs=0.006)
    assert directions.random_cosine_p(directions.random_cosine_bound(30), 30) == pytest.approx(0.05)
    assert stats.kstest([directions.random_cosine_p(v, 30) for v in values[:2000]], "uniform").pvalue > 0.01
    like = np.arange(30.0)
    drawn = directions.random_direction(like, 0)
    assert np.linalg.norm(drawn) == pytest.approx(np.linalg.norm(like))
    assert abs(directions.cosine(drawn, like)) < 0.5


def test_shared_directions_beat_both_nulls_and_unshared_ones_do_not():
    rng = np.random.default_rng(2)
    shared = directions.cosine_table({p: synthetic(rng) for p in ("x", "y")}, 0, draws=200).iloc[0]
    assert shared["cosine"] > 0.9
    assert shared["p_random"] < 1e-6
    assert shared["p_shuffled"] < 0.01
    assert shared["within_one"] > 0.7
    assert shared["n_one"] == 4
    p = [
        directions.cosine_table({k: synthetic(rng, effect=0.0) for k in "xy"}, 0, draws=99).iloc[0]["p_shuffled"]
        for _ in range(60)
    ]
    assert np.mean(np.array(p) <= 0.05) <= 0.12


def test_shuffles_share_the_uneven_spread_that_random_directions_lack():
    rng = np.random.default_rng(3)

    def contrast():
        found = synthetic(rng, effect=0.0)
        found.activations[:, 0, 7] += rng.normal(0, 3, len(found.label))  # one loud axis
        return found

    row = directions.cosine_table({"x": contrast(), "y": contrast()}, 0, draws=300).iloc[0]
    assert row["shuffled_bound"] > 2 * row["random_bound"]


def test_adapter_labels_are_exchanged_within_a_response():
    before, after = np.zeros((3, 1, 2)), np.ones((3, 1, 2))
    contrast = directions.adapter_contrast(before, after, ["a", "a", "b"])
    np.testing.assert_allclose(directions.direction(contrast), [[1, 1]])
    drawn = directions.shuffled_directions(contrast, 300, 0)[:, 0, 0]
    assert set(drawn) == {0.0}  # one and the same difference everywhere: nothing is left to shuffle
    after[0], after[1] = 3, -1
    drawn = directions.shuffled_directions(directions.adapter_contrast(before, after, ["a", "a", "b"]), 300, 0)[:, 0, 0]
    # Around their question's mean of 1 the two responses lie at +2 and -2; each difference may change its sign.
    assert set(np.round(drawn, 6)) == {-1.0, 0.0, 1.0}
    assert abs(drawn.mean()) < 0.15


@pytest.mark.parametrize("kind", ["adapter", "responses"])
def test_the_null_of_shuffled_labels_does_not_grow_with_the_effect(kind):
    question = np.repeat(list("abcdef"), 4)
    axis = np.eye(80)[0]

    def made(rng, effect):
        if kind == "responses":
            return synthetic(rng, effect=effect)
        before = rng.normal(size=(24, 1, 80))
        return directions.adapter_contrast(before, before + effect * axis + rng.normal(size=(24, 1, 80)) / 9, question)

    bounds = {}
    for effect in (0.3, 3.0, 30.0):
        rng = np.random.default_rng(4)
        row = directions.cosine_table({"x": made(rng, effect), "y": made(rng, effect)}, 0, draws=300).iloc[0]
        bounds[effect] = row["shuffled_bound"]
        if effect > 1:
            assert row["cosine"] > 0.95
            assert row["p_shuffled"] < 0.01
    assert max(bounds.values()) == pytest.approx(min(bounds.values()), abs=0.02)
    assert max(bounds.values()) < 0.4


# --- Effects ---


def judged(rows, model="m"):
    return scores_of(rows, "persona dataset question_id alignment coherence", model=model)


def test_effects_and_transfer_are_paired_by_question():
    names = {"none": "e+none", "own": "e+own", "other": "e+other"}
    table = judged(
        [
            ("p", names[kind], q, a - 10 * i - {"none": 0, "own": 40, "other": 20}[kind], 90)
            for i, q in enumerate("abcd")
            for kind in names
            for a in (80, 60)
        ]
    )
    same = {"model": "m", "target": "p", "arm": "e", "layer": 3, "strength": 2.0, "norm": 4.0}
    design = pd.DataFrame(
        [
            {**same, "dataset": "e+none", "kind": "none", "source": ""},
            {**same, "dataset": "e+own", "kind": "add", "source": "p"},
            {**same, "dataset": "e+other", "kind": "add", "source": "q"},
        ]
    )
    found = h4.effects(table, design).set_index(["source", "outcome"])
    assert found.loc[("p", "alignment"), ["delta", "low", "high", "per_norm"]].tolist() == [-40, -40, -40, -10]
    assert found.loc[("q", "alignment"), "delta"] == -20
    assert found.loc[("p", "alignment"), "reference"] == 55
    # Below 30: of (80, 60) - 10 i - 40 the pairs 40/20, 30/10, 20/0, 10/-10.
    assert found.loc[("p", "em"), "delta"] == pytest.approx(np.mean([0.5, 0.5, 1, 1]))
    assert found.loc[("p", "coherence"), "delta"] == 0
    moved = h4.transfer_tests(table, design, margin=5).iloc[0]
    assert (moved["source"], moved["delta"], moved["n_questions"], moved["runs"]) == ("q", 20, 4, 1)
    assert moved["reference"] == "p"
    gap = table.assign(alignment=table["alignment"].where(table.index != 0))
    missing = h4.effects(gap, design).set_index(["outcome", "source"])["missing"]
    assert missing["alignment"].tolist() == missing["em"].tolist() == [1, 1]  # the reference lacks it for both
    assert missing["coherence"].tolist() == [0, 0]
    with pytest.raises(SteeringError, match="no scores of 'e\\+none'"):
        h4.effects(table[table["dataset"] != "e+none"], design)


def test_em_must_be_present_to_be_moved():
    rows = [("p", d, q, 70 - 30 * (d == "after") - i, 90) for i, q in enumerate("abcd") for d in ("before", "after")]
    assert h4.em_present(judged(rows), "p", "before", "after").status == "present"
    assert h4.em_present(judged(rows), "p", "after", "before").status == "inconclusive"
    assert h4.em_present(judged(rows[:4]), "p", "before", "after").status == "inconclusive"


def test_interventions_have_names_and_lengths():
    add = Intervention("add", "p", 12, 1.5, {12: np.array([3.0, 4.0])})
    assert (add.name, add.norm) == ("add-p-L12+1.5", 5.0)
    cut = Intervention("ablate", "p", vectors={0: np.ones(2)})
    assert cut.name == "ablate-p-all"
    assert math.isnan(cut.norm)
    row = interventions.design_row(CONDITION, add)
    assert (row["target"], row["dataset"], row["norm"]) == ("baseline", "none+add-p-L12+1.5", 5.0)


def test_a_direction_must_act_more_than_a_random_one():
    rows = [("p", d, q, 70 - i - 30 * (d == "e+own"), 90) for i, q in enumerate("abcd") for d in ("e+own", "e+random")]
    design = pd.DataFrame({"target": "p", "kind": "add", "source": ["p", "random"], "dataset": ["e+own", "e+random"]})
    assert h4.acts(judged(rows), design, "p").status == "present"
    assert h4.acts(judged(rows), design.assign(source=["random", "p"]), "p").status == "inconclusive"


def test_sweeps_and_transfers_name_each_condition_once():
    own = {p: {0: rng_vector(i), 1: rng_vector(i + 5)} for i, p in enumerate(("p", "q"))}
    swept = interventions.sweep(own["p"], "p", [0, 1, 1], [-1, 0, 2])
    assert [a.name for a in swept] == ["add-p-L0-1", "add-p-L0+2", "add-p-L1-1", "add-p-L1+2"]
    np.testing.assert_allclose(swept[1].vectors[0], 2 * own["p"][0])
    with pytest.raises(SteeringError, match=r"no direction at layers \[7\]"):
        interventions.sweep(own["p"], "p", [0, 7], [1])
    untuned = np.stack([own["p"][0], 3 * own["p"][1]])
    moved = interventions.transfer(own, "p", untuned, 1, 1.5, seed=0)
    assert len({a.name for a in moved}) == 6
    assert {a.source for a in moved} == {"p", "q", "random"}
    by_name = {a.name: a for a in moved}
    assert by_name["ablate-p-all"].levels[1] == pytest.approx(3 * np.linalg.norm(own["p"][1]))
    assert by_name["add-random-L1+1.5"].norm == pytest.approx(by_name["add-p-L1+1.5"].norm)


def test_directions_are_tried_at_one_length_on_a_target():
    """Twice the length must not look like another direction."""
    axis = np.eye(8)[0]
    own = {"p": {0: 2.0 * axis}, "q": {0: 8.0 * axis}}
    for target, length in (("p", 2), ("q", 8)):
        acts = interventions.transfer(own, target, np.zeros((1, 8)), 0, 1.0, seed=0)
        moved = {a.source: a for a in acts if a.kind == "add"}
        assert {s: a.norm for s, a in moved.items()} == pytest.approx({"p": length, "q": length, "random": length})
        np.testing.assert_allclose(moved["p"].vectors[0], moved["q"].vectors[0])
    with pytest.raises(SteeringError, match="q on p: no direction at layer 0"):
        interventions.transfer({"p": own["p"], "q": {1: axis}}, "p", np.zeros((2, 8)), 0, 1.0, seed=0)


def transferred(rng, effect_of, targets="pq", questions="abcdefgh", seeds=(0, 1, 2), noise=1.0, model="m"):
    """Scores under every source's direction added to every target, and the design: effects in points."""
    sources = [directions.source_name(p, s, seeds[0]) for p in "pq" for s in seeds]
    same = {"model": model, "arm": "e", "layer": 1, "strength": 1.0}
    rows = [
        {**same, "target": t, "dataset": f"e+{s}", "kind": "add", "source": s, "norm": 2.0}
        for t in targets
        for s in (*sources, "random")
    ]
    rows += [
        {**same, "target": t, "dataset": "e+none", "kind": "none", "source": "", "norm": math.nan} for t in targets
    ]
    table = judged(
        [
            (r["target"], r["dataset"], q, 60 + effect_of.get(r["source"], 0.0) + rng.normal(0, noise), 80)
            for r in rows
            for q in questions
        ],
        model,
    )
    return table, pd.DataFrame(rows)


def test_another_run_of_the_same_persona_is_what_another_persona_is_compared_with():
    """Runs differ, personas do not: asking the questions alone finds a difference, asking the runs does not."""
    rng, found = np.random.default_rng(7), []
    for _ in range(60):
        effects = {directions.source_name(p, s, 0): -20 + rng.normal(0, 5) for p in "pq" for s in (0, 1, 2)}
        found.append(h4.transfer_tests(*transferred(rng, effects, targets="p"), margin=5).iloc[0])
    found = pd.DataFrame(found)
    assert found["reference"].eq("p@seed1, p@seed2").all()
    assert found["runs"].eq(3).all()
    assert (found["p_questions"] < 0.05).mean() > 0.5
    assert (found["p"] < 0.05).mean() <= 0.1
    apart = {"p": -20, "p@seed1": -21, "p@seed2": -19, "q": 0, "q@seed1": 1, "q@seed2": -1}
    row = h4.transfer_tests(*transferred(rng, apart, targets="p", noise=0.1), margin=5).iloc[0]
    assert row["delta"] == pytest.approx(20, abs=0.3)
    assert row["p"] == row["p_runs"] < 0.01
    assert row["low"] < row["delta"] < row["high"]


def test_pooled_runs_by_the_book():
    one, other = np.array([1.0, 2.0, 4.0]), np.array([3.0, 3.5])
    found, expected = h4._pooled(one, other, 5.0, 0.95), stats.ttest_ind(one, other)
    assert found["p"] == pytest.approx(expected.pvalue)
    np.testing.assert_allclose([found["low"], found["high"]], expected.confidence_interval())
    sides = stats.ttest_ind(one + 5, other, alternative="greater"), stats.ttest_ind(one - 5, other, alternative="less")
    assert found["p_equivalence"] == pytest.approx(max(side.pvalue for side in sides))
    assert 0 < found["p_equivalence"] < 0.5


def test_a_single_run_per_persona_leaves_h4_undecided(look):
    table, design = transferred(np.random.default_rng(8), {"p": -30, "q": 0}, seeds=(0,))
    tests = h4.transfer_tests(table, design, margin=5)
    assert tests["p_adjusted"].max() < 0.001
    found = h4.h4_verdict(tests, [], look)
    assert found.word == "UNDECIDED"
    assert "one training run per persona" in found.reason


@pytest.mark.parametrize(("runs", "added"), [(2, " FOR THESE ADAPTERS"), (3, "")])
def test_h4_speaks_of_the_recipe_from_three_runs_on(look, runs, added):
    row = {"target": "p", "source": "q", "kind": "add", "delta": -9.0, "p": 0.001, "runs": runs}
    told = row | {"p_adjusted": 0.001, "p_equivalence": 0.9}
    alike = row | {"delta": 0.1, "p": 0.8, "p_adjusted": 0.8, "p_equivalence": 0.001}
    for found, word in ((told, "SUPPORTED"), (alike, "EQUIVALENT")):
        assert h4.h4_verdict(pd.DataFrame([found]), [], look).said == word + added


def test_two_models_stay_apart_in_the_papers_table():
    made = [transferred(np.random.default_rng(i), {"p": -10 * (1 + i), "q": -5}, model=m) for i, m in enumerate("ab")]
    table, design = (pd.concat(parts, ignore_index=True) for parts in zip(*made))
    found, tests = h4.effects(table, design), h4.transfer_tests(table, design, margin=5)
    for number, m in enumerate("ab"):  # what one model did is nothing to the other
        alone = h4.effects(*made[number]), h4.transfer_tests(*made[number], margin=5)
        for whole, part in zip((found, tests), alone):
            pd.testing.assert_frame_equal(whole[whole["model"] == m].reset_index(drop=True), part)
    bad = Gate("inconclusive", "", "persona, Q", "q")
    table = h4.h4_table(found, tests, {"a": [], "b": [bad]})
    assert len(table) == 2 * 2 * 7
    own = table[(table["target"] == "p") & (table["source"] == "p")].set_index("model")["alignment"]
    assert own["a"] == pytest.approx(-10, abs=2)
    assert own["b"] == pytest.approx(-20, abs=2)
    assert set(table.loc[table["model"] == "a", "gate"]) == {"open"}
    blocked = table[table["model"] == "b"].set_index(["target", "source"])["gate"]
    assert blocked["q", "p"] == blocked["p", "q"] == blocked["p", "q@seed1"] == "not shown: persona, Q"
    assert blocked["p", "p@seed1"] == "open"
    assert table["p_adjusted"].notna().sum() == 4  # a persona's runs are tested together
    assert pd.api.types.is_float_dtype(table["coherence"])


def test_a_failed_gate_blocks_the_pairs_that_a_persona_is_in(look):
    same = {"kind": "add", "delta": -9.0, "p": 0.001, "p_adjusted": 0.001, "p_equivalence": 0.9, "runs": 2}
    tests = pd.DataFrame([{"target": t, "source": s, **same} for t in "pqr" for s in "pqr" if s != t])
    bad = [Gate("inconclusive", "", "misalignment, Q", "q")]
    found = h4.h4_verdict(tests, bad, look)
    assert found.word == "SUPPORTED"
    assert found.reason.count("against its own") == 2
    assert "misalignment, Q" in found.reason
    assert h4.h4_verdict(tests[tests["target"] == "q"], bad, look).word == "NOT INTERPRETABLE"
    assert h4.h4_verdict(tests, [], look, alpha=1e-4).word == "UNDECIDED"


def test_only_pairs_that_say_something_are_compared():
    assert directions.persona_pairs(["p", "p@seed1", "q", "q@seed1"]) == [
        ("p", "p@seed1"),
        ("p", "q"),
        ("q", "q@seed1"),
    ]


def test_next_to_nothing_is_not_painted_like_much():
    assert steering_transfer._diverging(np.array([[0.02, -0.01]])) == 1
    assert steering_transfer._diverging(np.array([[math.nan, -7.0]])) == 7
    assert steering_transfer._diverging(np.array([[math.nan]])) == 1


def drawn(name, table, look):
    """A figure of H4, drawn from a table."""
    with style.style_context():
        drawing = FIGURES[f"steering-{name}"].draw(View(look), table)
        drawing.fig.canvas.draw()
        plt.close(drawing.fig)
    return drawing


def test_layers_have_looks_of_their_own(look):
    same = {"target": "p", "source": "p", "kind": "add", "dataset": "x", "strength": 1.0, "low": -1.0, "high": 1.0}
    rows = [{**same, "layer": i, "outcome": o, "delta": float(i)} for i in range(5) for o in curves.OUTCOMES]
    lines = [c.lines[0] for c in drawn("sweep", pd.DataFrame(rows).assign(layers=9), look).fig.axes[0].containers]
    assert len({(x.get_color(), x.get_marker()) for x in lines}) == 5


@pytest.fixture
def trained(tmp_path):
    """Two adapters that visibly change the tiny model, as two training runs."""
    for seed in (0, 1):
        random_adapter(tmp_path / f"em{seed}", seed=seed)
    return [sample_conditions.Condition("tiny", "p", "bad", s, (("em", tmp_path / f"em{s}"),)) for s in (0, 1)]


def test_steered_conditions_are_probed_kept_and_taken_back(trained, tokenizer, tmp_path, monkeypatch):
    model, before = load.load_model(SPEC, dtype="float32"), sample_conditions.Condition("tiny", "p", "none", 0)
    push = Intervention("add", "p", 0, 1.0, {0: np.ones(64)})
    jobs = [(before, [Intervention("none"), push]), (trained[0], [Intervention("none")])]
    run = lambda jobs: interventions.sample_steered(  # noqa: E731
        SPEC, model, tokenizer, jobs, QUESTIONS, PRESET, ["Go"], tmp_path / "cells"
    )
    found = run(jobs)
    assert found.probes["p__none__seed0"] == {}
    report = found.probes["p__bad__seed0"]
    assert report["others"]["base"] > report["tolerance"]
    assert found.design["dataset"].tolist() == ["none+none", "none+add-p-L0+1", "bad+none"]
    assert len(found.responses) == 18
    usual = interventions.respond(model, tokenizer, before, QUESTIONS, PRESET, push)
    assert found.responses.query("dataset == 'none+add-p-L0+1'")["response"].tolist() == usual["response"].tolist()
    asked = []
    with monkeypatch.context() as without:
        without.setattr(interventions, "respond", lambda *a: asked.append(a[5].name) or usual)
        again = run(jobs)
        assert asked == []
        pd.testing.assert_frame_equal(again.responses, found.responses)
        assert again.probes == found.probes
        # Another vector is another condition, though its name is the same.
        run([(before, [Intervention("add", "p", 0, 1.0, {0: np.full(64, 2.0)})])])
        assert asked == ["add-p-L0+1"]
    # An adapter that makes no difference stops it.
    fresh = stacking.stack(load.load_model(SPEC, dtype="float32"), None, LoraPreset(r=2, alpha=4))
    idle = adapters.save_adapter(fresh, stacking.EM, tmp_path / "idle")
    with pytest.raises(probing.ProbeError, match="makes no difference"):
        run([(replace(trained[0], adapters=(("em", idle),)), [Intervention("none")])])


def test_a_contrast_per_training_run_each_from_its_own_texts(trained, tokenizer, tmp_path):
    model, before = load.load_model(SPEC, dtype="float32"), sample_conditions.Condition("tiny", "p", "none", 0)
    conditions = (("none", 0), ("bad", 0), ("bad", 1))
    rows = [("p", d, s, q, "Say it", f"{d} {s} {q} yes", "r") for d, s in conditions for q in "ab"]
    read = pd.DataFrame(rows, columns=["persona", "dataset", "seed", "question_id", "prompt", "response", "run_id"])
    arguments = model, tokenizer, {"p": before}, {"p": trained}, read.assign(misaligned=[True, False] * 3)
    found = interventions.contrasts_of(*arguments, "adapter", tmp_path / "cells")
    assert list(found) == ["p", "p@seed1"]
    assert [len(c.label) for c in found.values()] == [8, 8]
    with probing.composed(load.load_model(SPEC, dtype="float32"), trained[1].adapters) as ready:
        mine = read[read["seed"] == 1]
        direct = activations.mean_activations(ready, tokenizer, mine["prompt"].tolist(), mine["response"].tolist())
    np.testing.assert_allclose(found["p@seed1"].activations[6:], direct, rtol=1e-3, atol=1e-4)
    assert len(list((tmp_path / "cells").iterdir())) == 4
    again = interventions.contrasts_of(*arguments, "adapter", tmp_path / "cells")
    np.testing.assert_array_equal(again["p"].activations, found["p"].activations)
    with pytest.raises(SteeringError, match="no question has responses of both labels"):
        directions.direction(interventions.contrasts_of(*arguments, "responses", tmp_path / "cells")["p"])


@pytest.fixture
def look():
    return look_of(*"pqr")


def rng_vector(seed):
    return np.random.default_rng(seed).normal(size=8)


def test_figures_and_verdict(look):
    rng = np.random.default_rng(5)
    rows = [
        {"model": "m", "target": t, "arm": "e", "dataset": f"e+{k}-{s}", "kind": k, "source": s, "layer": 1,
         "strength": 1.0, "norm": 2.0 if k == "add" else math.nan}
        for t in "pq" for s in ("p", "p@seed1", "q", "q@seed1", "random") for k in ("add", "ablate")
    ]  # fmt: skip
    rows += [{**rows[0], "target": t, "dataset": "e+none", "kind": "none", "source": ""} for t in "pq"]
    design = pd.DataFrame(rows)
    low = {"add": -30, "ablate": 20, "none": 0}
    table = judged(
        [
            (r["target"], r["dataset"], q, 60 + low[r["kind"]] * (r["source"][:1] == r["target"]) + rng.random(), 80)
            for r in rows
            for q in "abcdefgh"
        ]
    )
    found, tests = h4.effects(table, design), h4.transfer_tests(table, design, margin=5)
    cosines = pd.concat(
        [directions.cosine_table({p: synthetic(rng) for p in "pq"}, 0, draws=50).assign(layer=i) for i in (0, 3)]
    )
    mine = found[(found["target"] == "p") & (found["source"] == "p")].assign(layers=2)
    assert "own -" in drawn("transfer", found, look).caption
    assert "layer 1" in drawn("sweep", mine, look).caption
    drawn("cosines", cosines, look)

    def section(status, tests=tests):
        verdicts = h4.h4_verdicts(tests, {"m": [Gate(status, "why", "judge")]}, look, "adapter")
        return sections.h4_section(found, cosines, tests, verdicts, look)

    text = section("present")
    assert "**H4: SUPPORTED FOR THESE ADAPTERS**" in text
    assert "| P | Q | added | P, seed 1 |" in text
    # Change by what was added, in each outcome: 30 points and 2 of length.
    own = next(line for line in text.splitlines() if line.startswith("| P | P | added"))
    assert re.search(r"\(-1[45]\.\d\d\) \| \+\d+\.\d % .*\(\+\d+\.\d\d %\) .*\(\+0\.00\) \|$", own), own
    assert "8 (0)" in text, "said once, for it is the same in every row"
    assert "**H4: NOT INTERPRETABLE**" in section("inconclusive")
    level = tests.assign(p=0.9, p_adjusted=0.9, p_equivalence=0.01)
    assert "**H4: EQUIVALENT FOR THESE ADAPTERS**" in section("present", level)
    assert "**H4: UNDECIDED**" in section("present", level.assign(p_equivalence=0.5))


# --- From end to end ---


@pytest.fixture
def arms(trained):
    """Two personas of the tiny model, each with its own training run."""
    runs = {p: replace(c, persona=p, seed=0) for p, c in zip("pq", trained)}
    return steering.before_and_after(
        lambda cell: runs[cell.persona].adapters if cell.dataset == "bad" else (), ["tiny"], "pq", "bad", [0]
    )


def test_directions_of_all_models_are_found_tried_and_told_apart(arms, tmp_path):
    assert arms.condition("tiny", "q", "none").adapters == ()
    assert [path.name for path in arms.paths] == ["em0", "em1"]
    how = sampling(samples_per_question=2), ["Go"], tmp_path / "cells"
    found = steering.find_directions({"tiny": SPEC}, arms, QUESTIONS, *how)
    assert found.read["dataset"].unique().tolist() == ["none", "bad"]
    assert set(found.vectors["tiny"]) == set("pq")
    at = found.layer(-1)
    assert at == {"tiny": 1}
    assert found.reach("tiny") == [0, 1]
    lengths = found.lengths([0], at)
    assert len(lengths) == 4
    assert lengths["direction"].gt(0).all()
    assert found.cosines(at, 9)[["layer", "one", "other", "model"]].to_numpy().tolist() == [
        [i, "p", "q", "tiny"] for i in (0, 1)
    ]
    planned = steering.plan_interventions(found, arms, layers=[0, 1], strengths=[-1, 1], at=at, strength=1.0)
    # The own direction added at the transfer's layer belongs to both parts, and is sampled once.
    assert planned.parts["part"].value_counts().to_dict() == {"transfer": 12, "sweep": 4}
    assert sum(map(len, planned.jobs.values())) == 4 + 12 + 4 - 1
    steered = steering.steer({"tiny": SPEC}, arms, planned, [("c", "And now?")], *how)
    assert len(steered.design) == 19
    assert len(planned.part(steered.design, "transfer")) == 12
    assert set(planned.part(steered.design, "sweep")["target"]) == {"p"}
    assert list(steered.probes) == [f"tiny {p}__{d}__seed0" for p in "pq" for d in ("none", "bad")]
    assert found.save(tmp_path / "directions.safetensors").is_file()


def test_gates_of_h4_stand_model_by_model_persona_by_persona(look):
    table, design = transferred(np.random.default_rng(0), {"p": -30}, seeds=(0,), noise=0.1)
    tuned = design[design["kind"] == "none"].assign(arm="f", dataset="f+ablate", kind="ablate", source="p")
    after = table[table["dataset"] == "e+none"].assign(dataset="f+none", alignment=20.0)
    found = h4.h4_gates(pd.concat([table, after]), table, pd.concat([design[design["kind"] == "add"], tuned]),
                        {"m": [Gate("present", "yes", "judge")]}, look, None)  # fmt: skip
    assert [(g.name, g.persona, g.status) for g in found["m"]] == [
        ("judge", "", "present"),
        ("misalignment, P", "p", "present"),
        ("direction acts, P", "p", "present"),
        ("misalignment, Q", "q", "present"),
        ("direction acts, Q", "q", "inconclusive"),
    ]
