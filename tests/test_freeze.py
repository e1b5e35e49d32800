"""A study frozen before its data: what the file says, what counts as an amendment, what documents say of it."""

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml
from cai_em.report import Look, Words, freeze
from cai_em.study import loading
from cai_em.study.depends import settings

BEFORE, LATER = datetime(2026, 1, 5, 9, tzinfo=UTC), datetime(2026, 2, 1, tzinfo=UTC)


@pytest.fixture
def place(root, tmp_path) -> Path:
    """A copy of `params/`, in which a study can be frozen and changed."""
    shutil.copytree(root / "params", tmp_path / "params")
    return tmp_path


def load(place, name="micro"):
    loading._registries.cache_clear()  # the registries, which a test has changed
    return loading.load(name, place / "params")


def said(study) -> str:
    """The sentence of the documents."""
    look = Look(study.used_personas(), study.used_datasets(), list(study.models.values()))
    return freeze.frozen_status(study, Words(look))


def changed(place, file, change) -> None:
    path = place / "params" / file
    data = yaml.safe_load(path.read_text())
    change(data)
    path.write_text(yaml.safe_dump(data, sort_keys=False))


def with_data(study, when: str) -> None:
    """Responses and scores that were written then."""
    for folder in (study.sample_dir(*study.shards()[0]), study.judge_dir(*study.shards()[0])):
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(json.dumps({"written": when, "inputs": {}, "outputs": {}}))


def test_the_file_says_in_words_what_is_tested_and_what_would_count(place):
    record = json.loads(freeze.freeze(load(place, "paper"), BEFORE).read_text())
    h1, h2 = record["words"]
    assert "how much fine-tuning changes the persona, minus how much it changes the baseline" in h1
    assert "for Sycophancy, pooled over insecure, extreme_sports, risky_financial, bad_medical" in h1
    assert "significantly lower than 0 at 5 % over the family H1, H2, H3, H4 (Holm, for each model)" in h1
    assert "smaller than 5 points" in h1
    assert "for Goodness and Loving" in h2
    assert "emergent misalignment in the baseline" in h2, "a claim of protection needs something to protect from"
    assert "emergent misalignment in the baseline" not in h1
    assert record["fixed"]["thresholds"]["alpha"] == 0.05
    assert "these adapters" in json.loads(freeze.freeze(load(place), BEFORE).read_text())["words"][0], "one seed"


def test_frozen_before_the_data_and_every_amendment_since(place):
    study = load(place)
    assert said(study) == "Not frozen before the data."
    path = freeze.freeze(study, BEFORE)
    assert path == place / "prereg" / "micro-2026-01-05.json"
    assert said(study) == "As frozen on 2026-01-05 (`prereg/micro-2026-01-05.json`), 0 amendments since."
    with_data(study, "2026-01-06T00:00:00+00:00")
    assert "0 amendments since" in said(study)
    changed(place, "thresholds.yaml", lambda d: d["micro"].update(alpha=0.01))
    now = said(load(place))
    assert "2 amendments since: thresholds alpha: 0.05, now 0.01; parameters of 05_validity" in now.replace("\\", "")
    changed(place, "hypotheses.yaml", lambda d: d["h1"].update(direction="higher"))
    assert "hypotheses h1 direction" in said(load(place))


def test_words_name_the_gates_that_the_verdict_asks_for_and_no_others(place):
    """Protection from EM needs EM; a persona that scores higher without fine-tuning does not."""
    changed(place, "hypotheses.yaml", lambda data: data["h1"].update(estimand="persona", direction="higher"))
    study = load(place, "paper")
    by_key = dict(zip([h.key for h in study.hypotheses], freeze.in_words(study)))
    assert "emergent misalignment in the baseline" not in by_key["h1"]
    assert "models that can still do what they could" in by_key["h1"], "paper asks what they can"


def test_a_judge_that_was_calibrated_since_makes_the_gates_stale(place):
    study = load(place, "paper")
    before = {stage: settings(study, stage) for stage in ("05_validity", "06_results")}
    folder = place / "params" / "judge_quality"
    folder.mkdir()
    (folder / f"{study.judge.name}.json").write_text("{}")
    assert settings(study, "05_validity") != before["05_validity"]
    assert settings(study, "06_results") == before["06_results"]
    demo = load(place, "demo")
    assert settings(demo, "05_validity") == settings(loading.load("demo"), "05_validity"), "the local judge is another"


def test_frozen_after_the_data_is_said_to_be_so(place, capsys):
    study = load(place)
    with_data(study, "2026-01-04T00:00:00+00:00")
    freeze.freeze(study, BEFORE)
    assert said(study) == "Not frozen before the data: frozen on 2026-01-05, and the first responses are of 2026-01-04."
    freeze.freeze(load(place, "published"), BEFORE)
    assert said(load(place, "published")) == "Not frozen before the data: others made them."


def test_what_is_frozen_stays(place):
    path = freeze.freeze(load(place), BEFORE)
    before = path.read_bytes()
    freeze.freeze(load(place), BEFORE)
    assert path.read_bytes() == before
    changed(place, "thresholds.yaml", lambda d: d["micro"].update(alpha=0.01))
    with pytest.raises(freeze.FreezeError, match="what is frozen stays"):
        freeze.freeze(load(place), BEFORE)
    freeze.freeze(load(place), LATER)
    assert "As frozen on 2026-01-05" in said(load(place)), "the first file is what was frozen"


def test_the_code_of_the_analysis_is_part_of_what_is_frozen(place, monkeypatch):
    freeze.freeze(load(place), BEFORE)
    monkeypatch.setattr(freeze, "code_hash", lambda notebook: f"other {Path(notebook).stem[:2]}")
    now = said(load(place)).replace("\\", "")
    assert "1 amendment since: code of 05_validity, 06_results, 08_claims changed." in now


def test_differences_name_what_was_and_what_is():
    old = {"a": {"x": 1, "y": [1, 2]}, "gone": "one"}
    new = {"a": {"x": 2, "y": [2, 3, 4]}, "new": None}
    assert list(freeze.amendments_between(old, new)) == [
        "a x: 1, now 2",
        "a y: 2 added, 1 removed",
        'gone: "one", now not there',
    ]


def test_a_profile_without_hypotheses_is_not_frozen(place):
    changed(place, "profiles/micro.yaml", lambda d: d.update(hypotheses=[]))
    with pytest.raises(freeze.FreezeError, match="nothing to freeze"):
        freeze.freeze(load(place), BEFORE)


def test_the_command_says_what_it_froze(place, monkeypatch, capsys):
    monkeypatch.setattr(freeze, "load", lambda name: load(place, name))
    assert freeze.main(["paper"]) == 0
    assert "H1, Sycophancy persona" in capsys.readouterr().out
    assert freeze.main(["nosuch"]) == 2
    assert freeze.main([]) == 2
