"""Gates: present, absent, inconclusive; nothing conditions on the outcome; known faults and copies close the design."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from cai_em.analysis.contrasts import POOLED, Cube
from cai_em.analysis.gates import (
    ABSENT,
    INCONCLUSIVE,
    PRESENT,
    Gate,
    classify,
    copied_seeds,
    em_gate,
    expressed_gate,
    faults_of,
    gate_table,
    kept_status,
    learned_gate,
    uptakes,
    voice,
    worst,
)
from cai_em.analysis.voices import NOT_TOLD, Told

from tests.planted import BASE, DATASETS, MODEL, WORLDS, Design, plant, without

JUDGE = {MODEL: {"p1": Gate(PRESENT), "p2": Gate(PRESENT)}}
PROVED = {(MODEL, p, "none") for p in (BASE, "p1", "p2")}


def area(auc, half, n=400):
    p = 0.001 if auc - half > 0.5 else 0.3
    return Told(auc, half / 1.9, 7.0, auc - half, auc + half, p, n, 8, 1)


def gates_of(study, *, proved=PROVED, judge=JUDGE, responses=None, design=None):
    found = classify(study.responses if responses is None else responses)[1]
    moved = uptakes(study.expression) if len(study.expression) else {}
    table = gate_table(
        Cube.build(study.scores), found, DATASETS, judge=judge, proved=proved, moved=moved, design=design
    )
    return table.set_index(["persona", "dataset"])


@pytest.mark.parametrize(
    ("found", "status"),
    [
        (area(0.7, 0.1), PRESENT),
        (area(0.53, 0.04), INCONCLUSIVE),
        (area(0.52, 0.01), ABSENT),  # significant, and certainly smaller than what matters
        (area(0.5, 0.04), ABSENT),
        (area(0.55, 0.2), INCONCLUSIVE),
        (NOT_TOLD, INCONCLUSIVE),
    ],
)
def test_absent_needs_evidence_too(found, status):
    assert voice(found, "persona").status == status


def test_a_single_persona_without_proof_or_control_is_inconclusive():
    strong = area(0.9, 0.05)
    assert expressed_gate(strong, None, persona="p", proved=True).status == PRESENT
    assert expressed_gate(strong, None, persona="p", proved=False).status == INCONCLUSIVE
    assert expressed_gate(strong, area(0.9, 0.05), persona="p", proved=False).status == PRESENT
    assert expressed_gate(strong, area(0.5, 0.03), persona="p", proved=False).status == ABSENT


def test_what_fine_tuning_did_to_a_voice_is_an_outcome():
    assert [kept_status(t) for t in (area(0.8, 0.1), area(0.5, 0.03), area(0.53, 0.1), NOT_TOLD)] == [
        "kept",
        "lost",
        "unclear",
        "",
    ]


def test_complete_protection_and_an_overwritten_persona_keep_their_gates():
    for name, kept in (("complete protection", "kept"), ("persona overwritten", "lost")):
        row = gates_of(plant(WORLDS[name], Design(8, 3, 25), 1)).loc[("p1", POOLED)]
        assert row["gate"] == PRESENT, (name, row["gate_reason"])
        assert row["em_gate"] == PRESENT
        assert row["persona_kept"] == kept


def test_two_look_alike_personas_open():
    table = gates_of(plant(WORLDS["look-alike personas"], Design(8, 3, 25), 2))
    assert table.loc[[("p1", POOLED), ("p2", POOLED)], "gate"].tolist() == [PRESENT, PRESENT]


def test_a_persona_that_is_not_there_and_training_that_took_no_hold():
    table = gates_of(plant(WORLDS["persona absent"], Design(8, 3, 25), 3))
    assert table.loc[("p1", POOLED), "persona_gate"] != PRESENT
    table = gates_of(plant(WORLDS["fine-tuning absent"], Design(8, 3, 25), 3))
    assert table.loc[("p1", POOLED), "learned_gate"] == ABSENT
    assert table.loc[("p1", POOLED), "em_gate"] != PRESENT


def test_a_subtle_persona_opens_in_four_of_five_studies_with_and_without_proof():
    design, worlds = Design(8, 5, 10), without(WORLDS["subtle persona"])
    for proved in (PROVED, ()):
        opened = [
            gates_of(plant(worlds, design, seed), proved=proved).loc[("p1", POOLED), "persona_gate"] == PRESENT
            for seed in range(5)
        ]
        assert np.mean(opened) >= 0.8


def test_without_answers_in_the_domain_a_training_that_does_not_show_elsewhere_is_inconclusive():
    study = plant(WORLDS["complete protection"], Design(8, 3, 25), 4)
    study.expression = study.expression.head(0)
    table = gates_of(study)
    assert table.loc[("p1", POOLED), "learned_gate"] in (PRESENT, INCONCLUSIVE)  # shows outside, or nothing can be said


@pytest.mark.parametrize(("moved", "status"), [(30.0, PRESENT), (0.0, ABSENT)])
def test_learned_in_its_domain_by_one_test_over_data_sets_and_seeds(moved, status):
    rng = np.random.default_rng(0)
    parts = [moved + rng.normal(0, 3, (6, 3)) for _ in range(2)]
    assert learned_gate(parts, "p").status == status
    assert learned_gate([], "p").status == INCONCLUSIVE


def test_is_there_misalignment_to_protect_from():
    for name, status in (("nothing", PRESENT), ("EM absent", ABSENT)):
        study = plant(WORLDS[name], Design(8, 3, 30), 5)
        assert em_gate(Cube.build(study.scores), MODEL, DATASETS[:2])[0].status == status
    alone = study.scores[study.scores["dataset"] != "none"]
    assert em_gate(Cube.build(alone), MODEL, DATASETS[:2])[0].status == INCONCLUSIVE


def test_known_faults_close_cells_whatever_their_responses_look_like():
    cells = SimpleNamespace(models=["m"], personas=["!baseline"], datasets=["em1"])
    faults = {"f": SimpleNamespace(cells=[cells], what="sampled without its adapter", source="s")}
    keys = [("m", "p1", "em1"), ("m", "baseline", "em1"), ("n", "p1", "em1"), ("m", "p1", "none")]
    assert faults_of(keys, faults) == {("m", "p1", "em1"): "sampled without its adapter"}
    study = plant(WORLDS["nothing"], Design(8, 3, 25), 6)
    shut = {(MODEL, "p1", d): Gate(ABSENT, "a known fault") for d in ("em1", "em2")}
    assert gates_of(study, design=shut).loc[("p1", POOLED), "design_gate"] == ABSENT
    one = {k: g for k, g in shut.items() if k[2] == "em1"}
    row = gates_of(study, design=one).loc[("p1", POOLED)]
    assert row["design_gate"] == ABSENT, "one of two is not more than half"


def test_copied_seeds_are_no_trainings():
    study = plant(WORLDS["copied seeds"], Design(8, 3, 10), 7)
    found = copied_seeds(study.responses)
    assert found[MODEL, "p1", "em1"] == "training seeds 0 and 1 of p1 x em1 hold the same responses"
    assert copied_seeds(plant(WORLDS["nothing"], Design(8, 3, 10), 7).responses) == {}


def test_the_worst_of_gates_with_its_reasons():
    assert worst([]) == Gate(PRESENT)
    assert worst([Gate(PRESENT, "a"), Gate(INCONCLUSIVE, "b"), Gate(INCONCLUSIVE, "c")]) == Gate(INCONCLUSIVE, "b; c")
    assert worst([Gate(INCONCLUSIVE, "b"), Gate(ABSENT, "d")]) == Gate(ABSENT, "d")


def test_a_control_adapter_is_no_persona_that_must_be_expressed():
    study = plant(WORLDS["nothing"], Design(8, 1, 25), 8)
    cube, found = Cube.build(study.scores), classify(study.responses, controls=["p2"])[1]
    table = gate_table(cube, found, DATASETS, judge=JUDGE, proved=PROVED, controls=["p2"]).set_index(
        ["persona", "dataset"]
    )
    assert table.loc[("p2", POOLED), "persona_gate"] == PRESENT
    assert "a control adapter" in table.loc[("p1", POOLED), "persona_reason"]
    assert pd.notna(table.loc[("p1", POOLED), "auc_others"])
