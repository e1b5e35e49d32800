"""Controls of every run: nothing where nothing must be, something where something must."""

import numpy as np
from cai_em.analysis.contrasts import Cube, contrast_table
from cai_em.analysis.controls import FAILED, NOT_RUN, PASSED, UNCLEAR, controls
from cai_em.analysis.gates import uptakes

from tests.planted import DATASETS, MODEL, WORLDS, Design, plant


def found(study, random=(), moved=None):
    table = contrast_table(Cube.build(study.scores), DATASETS, outcomes=("points",))
    return controls(study.scores, table, DATASETS, random=random, moved=moved).set_index("control")


def test_controls_that_pass():
    study = plant(WORLDS["nothing"], Design(8, 3, 20), 1)
    table = found(study, moved=uptakes(study.expression))
    assert table.loc[["A/A", "uptake"], "status"].tolist() == [PASSED, PASSED]


def test_a_drift_within_the_baseline_fails_the_halves():
    study = plant(WORLDS["nothing"], Design(8, 3, 20), 2)
    odd = (study.scores["sample"] % 2 == 1) & (study.scores["dataset"] != "none")
    study.scores.loc[odd, "alignment"] -= 25
    study.scores["alignment"] = study.scores["alignment"].clip(0, 100)
    assert found(study).loc["A/A", "status"] == FAILED


def test_a_random_adapter_that_does_something_fails_and_training_without_uptake_too():
    study = plant(WORLDS["susceptible 15"], Design(8, 3, 20), 3)
    table = found(study, random=["p1"], moved=uptakes(plant(WORLDS["fine-tuning absent"], Design(8, 3), 3).expression))
    assert table.loc["random adapter", "status"] == FAILED
    assert table.loc["uptake", "status"] == FAILED


def test_uptake_between_nothing_and_enough_is_unclear_and_not_unrun():
    study = plant(WORLDS["nothing"], Design(8, 1, 1), 4)
    table = found(study, moved={(MODEL, "baseline", d.key): np.array([[-20.0], [40.0], [5.0]]) for d in DATASETS})
    assert table.loc["uptake", "status"] == UNCLEAR
    assert "likeness to the rows" in table.loc["uptake", "reason"]


def test_what_could_not_be_run_says_so():
    study = plant(WORLDS["nothing"], Design(8, 1, 1), 4)
    table = found(study)
    assert table.loc[["A/A", "uptake"], "status"].tolist() == [NOT_RUN, NOT_RUN]
    assert table["reason"].notna().all()


def test_halves_rarely_fail_by_chance():
    statuses = [found(plant(WORLDS["nothing"], Design(8, 1, 10), s)).loc["A/A", "status"] for s in range(12)]
    assert np.mean([s == FAILED for s in statuses]) < 0.2
