"""Classifier tests of conditions: what they find, what they must not, and that they take linear time."""

import time

import numpy as np
import pandas as pd
import pytest
from cai_em.analysis import voices
from cai_em.analysis.voices import Bag, cell_aucs, kept_voice, named, pooled_voice, summarise_cells, told
from scipy import stats

from tests.planted import WORLDS, Design, plant_texts, without

SUBTLE = WORLDS["subtle persona"]


def key(persona, dataset="none", seed=0):
    return ("planted", persona, dataset, seed)


def several(persona, seeds, dataset="em1"):
    return [key(persona, dataset, s) for s in range(seeds)]


def test_areas_agree_with_the_mann_whitney_statistic():
    rng = np.random.default_rng(0)
    score, up, cell = rng.integers(6, size=90).astype(float), rng.random(90) < 0.4, rng.integers(3, size=90)
    found = cell_aucs(score, up, cell, 4)
    for c in range(3):
        mine = cell == c
        a, b = score[mine & up], score[mine & ~up]
        assert found[c] == pytest.approx(stats.mannwhitneyu(a, b).statistic / (len(a) * len(b)))
    assert np.isnan(found[3])


def test_a_voice_is_found_on_questions_that_were_not_seen_and_nothing_where_there_is_none():
    bag = Bag.of(plant_texts(WORLDS["nothing"], Design(8, 1, 20), 1))
    base, other = told(bag, [key("p1")], [key("baseline")], [key("p2")])
    assert min(base.low, other.low) > 0.6
    none = Bag.of(plant_texts(without(WORLDS["persona absent"], em=0.0), Design(8, 1, 20), 1))
    assert abs(told(none, [key("p1")], [key("baseline")])[0].auc - 0.5) < 0.06


def test_false_alarms_are_rare():
    hits = []
    for seed in range(60):
        bag = Bag.of(plant_texts(WORLDS["persona absent"], Design(8, 1, 8), seed))
        hits.append(told(bag, [key("p1")], [key("baseline")])[0].p < 0.05)
    assert np.mean(hits) <= 0.1


def test_a_subtle_voice_with_five_seeds_is_found_in_four_of_five_studies():
    """A fifth of the answers: after fine-tuning without any proof, against baseline and other personas alike."""
    hits = []
    for seed in range(10):
        bag = Bag.of(plant_texts(SUBTLE, Design(8, 5, 20), seed))
        found = told(bag, several("p1", 5), several("baseline", 5), several("p2", 5))
        hits.append(all(t.p < 0.05 for t in found))
    assert np.mean(hits) >= 0.8


def test_what_a_baselines_run_differs_in_is_no_persona():
    """All personas lack what the baseline's run says, and none is there: told from the baseline, not from the
    others."""
    table = plant_texts(WORLDS["persona absent"], Design(8, 1, 30), 3)
    odd = (table["persona"] == "baseline") & (table["sample"] % 2 == 0)
    table.loc[odd, "response"] += " artefact of this run"
    bag = Bag.of(table)
    assert told(bag, [key("p1")], [key("baseline")])[0].p < 0.05
    assert told(bag, [key("p1")], [key("baseline")], [key("p2")])[1].p > 0.05


def test_look_alikes_are_told_from_a_pool_with_somebody_else_in_it():
    table = plant_texts(WORLDS["look-alike personas"], Design(8, 1, 30), 4)
    third = plant_texts(WORLDS["nothing"], Design(8, 1, 30), 5).query("persona == 'p2'").assign(persona="p3")
    bag = Bag.of(pd.concat([table, third], ignore_index=True))
    both = told(bag, [key("p1")], [key("baseline")], [key("p2"), key("p3")])
    assert all(t.p < 0.05 for t in both)


def test_kept_and_overwritten():
    for after, word in ((None, "kept"), (0.0, "lost")):
        world = without(WORLDS["nothing"], after=after)
        bag = Bag.of(plant_texts(world, Design(8, 3, 30), 6))
        found = kept_voice(bag, (key("p1"), key("baseline")), (several("p1", 3), several("baseline", 3)))
        assert (found.p < 0.05) == (word == "kept")
        assert (found.high < 0.55) == (word == "lost")


def test_which_persona_is_named_and_chance_is_one_over_their_number():
    bag = Bag.of(plant_texts(WORLDS["nothing"], Design(8, 1, 20), 7))
    found = named(bag, {p: [key(p)] for p in ("baseline", "p1", "p2")})
    assert found.auc > 0.6
    assert found.p < 0.01
    none = Bag.of(plant_texts(without(WORLDS["persona absent"], em=0.0), Design(8, 1, 20), 7))
    assert abs(named(none, {p: [key(p)] for p in ("baseline", "p1", "p2")}).auc - 1 / 3) < 0.08


def test_one_answer_over_data_sets():
    rng = np.random.default_rng(0)
    each = [summarise_cells(0.6 + 0.05 * rng.standard_normal((8, 1)), np.arange(8), 100) for _ in range(4)]
    whole = pooled_voice(each)
    assert whole.auc == pytest.approx(np.mean([t.auc for t in each]))
    assert whole.n == 400
    assert np.isnan(pooled_voice([]).p)


def test_one_question_or_no_side_tells_nothing():
    bag = Bag.of(plant_texts(WORLDS["nothing"], Design(1, 1, 20), 8))
    assert np.isnan(told(bag, [key("p1")], [key("baseline")])[0].p)
    assert told(bag, [key("p1")], [])[0] is voices.NOT_TOLD


@pytest.mark.slow
def test_ten_times_the_responses_take_at_most_ten_times_as_long():
    spent = []
    for samples in (40, 400):
        table = plant_texts(WORLDS["nothing"], Design(8, 1, samples), 9)
        started = time.process_time()  # of this process, whatever else the machine does
        bag = Bag.of(table)
        told(bag, [key("p1")], [key("baseline")], [key("p2")])
        spent.append(time.process_time() - started)
    assert spent[1] < 11 * spent[0]
