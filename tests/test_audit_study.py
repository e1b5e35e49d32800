"""An audit as a study: its `audit.yaml`, its registries, what it finds in planted studies, and the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from cai_em import audit, report
from cai_em import study as studies
from cai_em.analysis.gates import faults_of
from cai_em.audit.__main__ import OPEN, main
from cai_em.records.files import root
from cai_em.report import Look
from cai_em.study.audited import COLOURS
from cai_em.study.entries import ParamsError

from tests import audit_files as made


def bad_study(folder: Path) -> Path:
    """Personas that are not active, seeds that are copies, a filtered file, no untuned arm."""
    return made.example("bad", folder)


def sound_study(folder: Path) -> Path:
    """Personas whose words stand in their answers, three trainings each, an untuned arm, whole files."""
    return made.example("runs", folder)


def found_in(folder: Path) -> pd.DataFrame:
    """The findings of a drafted study, as 07_audit makes them."""
    found = audit.draft([folder])
    read = found.assemble()
    copies = audit.copied(read.responses)
    kept = audit.independent(read, copies)
    return audit.findings(
        spec=found.spec,
        scores=kept.scores,
        responses=kept.responses,
        account=kept.account,
        copies=copies,
        within=audit.repeated_within(kept.responses),
        filtered=audit.filtered(kept.scores),
        domain=audit.in_domain(kept.responses, {}),
        order=audit.order(audit.rates_by_rule(kept.scores)),
    )


def drafted(folder: Path, **settle: object) -> Path:
    """A drafted `audit.yaml`, settled."""
    found = audit.draft([folder])
    content = {**yaml.safe_load(found.text), "unknown": [], **settle}
    path = folder / "audit.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


# --- Planted studies --------------------------------------------------------------------------------------------------


def test_a_bad_study_is_found_out(tmp_path: Path) -> None:
    table = found_in(bad_study(tmp_path)).set_index("finding")
    assert table.loc["copied seeds", ["level", "count", "of"]].tolist() == ["fault", 6, 6]
    assert table.loc["filtered", ["level", "count", "where"]].tolist() == ["fault", 1, "flatterer × insecure"]
    assert table.loc["few seeds", "detail"] == "1 at most"  # the copies are no seeds
    assert "no untuned arm" in table.index


def test_a_sound_study_has_no_fault(tmp_path: Path) -> None:
    table = found_in(sound_study(tmp_path))
    assert set(table["level"]) <= {"limit", "note"} or set(table.loc[table["level"] == "warning", "finding"]) == {
        "order depends on the rule"
    }
    assert not {"few seeds", "no untuned arm"} & set(table["finding"])


def test_copies_between_conditions_are_a_fault_and_stay(tmp_path: Path) -> None:
    table = made.world(("baseline", "poet"), ("bad_medical",), samples=10)
    first = table[table["persona"] == "baseline"]
    made.write_mo(pd.concat([first, first.assign(persona="poet")]), tmp_path)
    findings = found_in(tmp_path).set_index("finding")
    assert findings.loc["copied conditions", "level"] == "fault"
    assert "baseline × bad_medical; poet × bad_medical" in findings.loc["copied conditions", "where"]


def test_findings_are_words_that_no_name_can_break(tmp_path: Path) -> None:
    findings = found_in(bad_study(tmp_path))
    findings.loc[0, "where"] = "<script>alert(1)</script> | `x` {{ y }} [a](b)\n# z {count}"
    gates = pd.DataFrame({"persona": ["poet"], "dataset": ["insecure"], "persona_gate": ["absent"], "gate": ["absent"]})
    gates = gates.assign(auc_baseline=0.5, auc_others=0.5)
    text = report.audit_findings(findings, gates, Look([], [], []))
    assert text.startswith("## What this audit found in the files\n\n3 faults")
    assert "<script>" not in text
    assert "0 of 1 comparisons" in text
    assert "[a](b)" not in text


# --- As a study -------------------------------------------------------------------------------------------------------


def test_an_audit_loads_as_a_study(tmp_path: Path) -> None:
    study = studies.load(drafted(sound_study(tmp_path / "their study")))
    assert study.name == "audit-their-study"
    assert study.profile.source == "audit"
    assert [p.key for p in study.used_personas()] == ["baseline", "flatterer", "poet", "stern"]
    assert [d.key for d in study.used_datasets()] == ["bad_medical", "secure", "none"]
    assert study.datasets["bad_medical"].role == "em"
    assert study.score_files() == [study.dir / "07_audit" / "scores.parquet"]
    assert study.artefact_dirs()[0] == study.dir / "07_audit"
    before = studies.settings(study, "07_audit")
    again = studies.load(drafted(tmp_path / "their study", judge="another judge"))
    assert studies.settings(again, "07_audit") != before


def test_known_faults_of_an_audit_close_its_conditions_alone(tmp_path: Path) -> None:
    fault = {"what": "never trained", "source": "their log", "cells": [{"personas": ["poet"], "datasets": ["!none"]}]}
    study = studies.load(drafted(sound_study(tmp_path / "own"), known_faults={"broken": fault}))
    conditions = [("m", "poet", "bad_medical"), ("m", "stern", "bad_medical"), ("m", "poet", "none")]
    assert faults_of(conditions, study.known_faults) == {conditions[0]: "never trained"}
    study = studies.load(drafted(sound_study(tmp_path / "listed"), known_faults=["llama_trained_without_persona"]))
    assert list(study.known_faults) == ["llama_trained_without_persona"]
    assert not studies.load(drafted(sound_study(tmp_path / "none"))).known_faults


def test_an_open_question_keeps_it_from_running(tmp_path: Path) -> None:
    made.write_plain(made.world(("poet", "stern"), samples=2), tmp_path / "a.csv")
    found = audit.draft([tmp_path])
    (tmp_path / "audit.yaml").write_text(found.text, encoding="utf-8")
    with pytest.raises(ParamsError, match=r"not settled yet \(1\)(.|\n)*which persona is the baseline"):
        studies.load(tmp_path / "audit.yaml")
    content = yaml.safe_load(found.text) | {"unknown": []}
    (tmp_path / "audit.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(ParamsError, match="without_baseline"):
        studies.load(tmp_path / "audit.yaml")


def test_registry_keys_bring_their_looks_and_hypotheses_can_be_ones_own(tmp_path: Path) -> None:
    made.write_plain(made.world(("baseline", "sycophancy", "poet"), ("bad_medical",), samples=2), tmp_path / "a.csv")
    known = studies.load("published")
    found = audit.draft([tmp_path], personas=known.personas, datasets=known.datasets)
    own = {"p1": {"title": "Poets are worse", "personas": ["poet"], "direction": "lower"}}
    content = yaml.safe_load(found.text) | {"hypotheses": own}
    path = tmp_path / "audit.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    study = studies.load(path)
    assert study.personas["sycophancy"].colour == known.personas["sycophancy"].colour
    assert study.personas["poet"].colour in COLOURS
    assert [h.label for h in study.hypotheses] == ["P1"]
    path.write_text(yaml.safe_dump(content | {"hypotheses": ["h1"]}), encoding="utf-8")
    assert [h.key for h in studies.load(path).hypotheses] == ["h1"]
    path.write_text(yaml.safe_dump(content | {"hypotheses": ["h2"]}), encoding="utf-8")
    with pytest.raises(ParamsError, match="h2 is about 'goodness'"):
        studies.load(path)


def test_forty_personas_have_forty_colours(tmp_path: Path) -> None:
    names = [f"p{i}" for i in range(40)]
    made.write_plain(made.world(["baseline", *names], ("bad_medical",), samples=1), tmp_path / "a.csv")
    study = studies.load(drafted(tmp_path))
    assert len({p.colour for p in study.used_personas()}) == 41


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"files": []}, "files"),
        ({"nonsense": 1}, "nonsense"),
        ({"name": "../up"}, "name"),
        ({"known_faults": ["no_such"]}, "audit.yaml: known_faults: 'no_such' is not in params/known_faults.yaml"),
        ({"datasets": {"none": {"role": "em"}}}, "role none belongs"),
        ({"personas": {"baseline": {"found_as": ["x"]}, "poet": {"found_as": ["x"]}}}, "found_as of both"),
    ],
)
def test_mistakes_in_it_are_named(change: dict, said: str, tmp_path: Path) -> None:
    made.write_plain(made.world(samples=1), tmp_path / "a.csv")
    with pytest.raises(ParamsError, match=said):
        studies.load(drafted(tmp_path, **change))


# --- The command line -------------------------------------------------------------------------------------------------


def test_plan_drafts_shows_and_stops_or_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    sound_study(tmp_path / "sound")
    assert main(["plan", str(tmp_path), "sound"]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines() == ["audit-sound", str(tmp_path / "sound" / "audit.yaml")]
    assert "asked:" in said.err
    # Unchanged, the same command goes on; corrected by a person, it is not overwritten.
    assert main(["plan", str(tmp_path), "sound"]) == 0
    (tmp_path / "sound" / "audit.yaml").write_text("# mine\n")
    assert main(["plan", str(tmp_path), "sound/*.csv"]) == 2
    assert "is there already" in capsys.readouterr().err
    made.write_plain(made.world(("poet", "stern"), samples=1), tmp_path / "open.csv")
    assert main(["plan", str(tmp_path), "open.csv"]) == OPEN
    assert "NOT KNOWN" in capsys.readouterr().err
    assert main(["plan", str(tmp_path), "nothing.csv"]) == 2
    assert main(["plan", str(tmp_path), "no*.csv"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_reading_the_door_imports_no_heavy_library() -> None:
    heavy = "[m for m in ('torch', 'inspect_ai') if m in sys.modules]"
    code = f"import sys, cai_em.audit; cai_em.audit.AuditError; print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root(), check=True)
    assert done.stdout.strip() == "[]"
