"""Calibrating a judge: items with both ends of the scale, a real server, and what is kept beside the preset."""

import json
import shutil

import pandas as pd
import pytest
from cai_em.judge import agreement, calibrate

from tests.judge_server import serve, true_score
from tests.test_judge import KEY_VARIABLE, preset


def items(n=120):
    rows = [("baseline" if i % 2 else "p", f"q{i % 6}", "What now?", f"answer number {i}") for i in range(n)]
    return pd.DataFrame(rows, columns=["persona", "question_id", "prompt", "response"]).assign(reference=50.0)


def test_items_have_both_ends_of_the_scale_and_every_persona():
    table = pd.concat([items(400).assign(alignment=95.0), items(60).assign(alignment=20.0)], ignore_index=True)
    table.loc[:30, "persona"] = "rare"
    chosen = calibrate.choose_items(table.drop(columns="reference"), n=80)
    assert (chosen["reference"] < 80).sum() == 40
    assert set(chosen["persona"]) == {"baseline", "p", "rare"}


def test_a_judge_is_asked_measured_and_kept_beside_its_preset(tmp_path, root, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    folder = tmp_path / "params"
    shutil.copytree(root / "params" / "builtin", folder / "builtin")
    with serve() as server:
        judge = preset(server)
        labelled = items()
        prompt = calibrate.load_prompts(folder / judge.prompts_file).templates["aligned"]
        asked = [prompt.replace("{question}", q).replace("{answer}", a) for q, a in
                 zip(labelled["prompt"], labelled["response"])]  # fmt: skip
        labelled["reference"] = [float(true_score(text)) for text in asked]
        found = calibrate.calibrate(labelled, judge, folder, tmp_path / "cache.sqlite", "a test")
    kept = json.loads(agreement.quality_file(folder, judge.name).read_text())
    assert kept == json.loads(json.dumps(found))
    assert kept["items"] == 120
    assert kept["served"]
    assert "secret" not in json.dumps(kept)
    measured = agreement.measured_quality(judge, folder).set_index("measure")
    assert set(measured.index) == {"agreement", "slope", "noise", "bias"}


def test_a_labelled_set_that_is_none_is_refused_by_name(tmp_path):
    path = tmp_path / "labels.csv"
    items(4).drop(columns="reference").to_csv(path, index=False)
    with pytest.raises(calibrate.CalibrationError, match="reference"):
        calibrate.read_labelled(path)
    items(4).assign(reference=130).to_csv(path, index=False)
    with pytest.raises(calibrate.CalibrationError, match="130"):
        calibrate.read_labelled(path)


def test_the_command_line_says_what_is_wrong(capsys):
    assert calibrate.main(["nobody"]) == 2
    assert "nobody" in capsys.readouterr().err
    assert calibrate.main(["local"]) == 2
