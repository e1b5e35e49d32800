"""Power: what it promises comes, at one and at several seeds; what is not known is not said."""

import math
from dataclasses import replace

import numpy as np
import pytest
from cai_em.analysis.contrasts import Cube, estimate_mean, find
from cai_em.analysis.power import Components, components, detectable, power, power_table

from tests.planted import MODEL, WORLDS, Design, plant

TYPICAL = Components(
    question=16.0, response=400.0, seed=9.0, question_seed=4.0, datasets=1, tuned=2, reference=2, untuned=400.0
)


def simulated(c, effect, questions, samples, seeds, adapters=False, n=3000):
    """Share of significant estimates of studies that are drawn arm by arm."""
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(n):
        common = effect + rng.normal(0, math.sqrt(c.question), (questions, 1))
        common = common + math.sqrt(c.reference * c.untuned / samples) * rng.standard_normal((questions, 1))
        parts = []
        for _ in range(c.datasets):
            run = 0 if adapters else rng.normal(0, math.sqrt(c.seed), (1, seeds))
            cell = rng.normal(0, math.sqrt(c.question_seed + c.tuned * c.response / samples), (questions, seeds))
            parts.append(common + run + cell)
        hits += estimate_mean(parts).p() < 0.05
    return hits / n


@pytest.mark.parametrize(
    ("questions", "samples", "seeds", "datasets", "effect"),
    [(8, 50, 1, 1, 6.0), (8, 50, 3, 1, 8.0), (8, 20, 3, 3, 5.0), (24, 10, 5, 2, 4.0)],
)
def test_power_is_what_comes(questions, samples, seeds, datasets, effect):
    c = replace(TYPICAL, datasets=datasets)
    said = power(effect, c, questions=questions, samples=samples, seeds=seeds)
    assert said == pytest.approx(simulated(c, effect, questions, samples, seeds), abs=0.035)


def test_at_one_seed_the_effect_of_these_adapters_is_another_question():
    how = {"questions": 8, "samples": 50, "seeds": 1}
    these, recipe = (power(8.0, TYPICAL, **how, adapters=a) for a in (True, False))
    assert these == pytest.approx(simulated(TYPICAL, 8.0, 8, 50, 1, adapters=True), abs=0.035)
    assert these != pytest.approx(recipe, abs=0.01)


def test_what_is_not_known_is_not_said():
    one_seed = replace(TYPICAL, seed=math.nan, question_seed=math.nan)
    assert math.isnan(power(8.0, one_seed, questions=8, samples=50, seeds=3))
    assert math.isnan(power(8.0, one_seed, questions=8, samples=50, seeds=1))
    assert power(8.0, one_seed, questions=8, samples=50, seeds=1, adapters=True) > 0.3
    assert math.isnan(detectable(replace(TYPICAL, question=math.nan), questions=8, samples=50, seeds=3))
    assert math.isnan(power(8.0, TYPICAL, questions=1, samples=50, seeds=3))
    table = power_table(one_seed, questions=[8], samples=[50], seeds=[1, 3], draws=2000)
    assert table["power"].isna().all()
    assert table["power_adapters"].notna().tolist() == [True, False]


def test_detectable_effects_have_the_power_they_are_asked_for():
    how = {"questions": 16, "samples": 20, "seeds": 3}
    smallest = detectable(TYPICAL, **how)
    assert power(smallest, TYPICAL, **how) == pytest.approx(0.8, abs=0.01)
    assert detectable(TYPICAL, **how | {"seeds": 5}) < smallest


def test_components_of_a_planted_study_are_those_that_were_planted():
    found = []
    for seed in range(4):
        cube = Cube.build(plant(WORLDS["runs that differ"], Design(24, 5, 10), seed).scores)
        found.append(components(cube, [find(cube, "susceptibility", MODEL, "p1", d) for d in ("em1", "em2")]))
    assert np.mean([c.seed for c in found]) == pytest.approx(2 * 9, rel=0.5)  # two trainings, SD 3
    assert np.mean([c.question for c in found]) == pytest.approx(16, rel=0.6)
    one = Cube.build(plant(WORLDS["runs that differ"], Design(24, 1, 10), 0).scores)
    known = components(one, [find(one, "susceptibility", MODEL, "p1", "em1")])
    assert math.isnan(known.seed)
    assert math.isnan(known.question_seed)
