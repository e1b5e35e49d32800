"""Before any work: whatever a study reads is opened; each bad file or setting is named, none is left for later."""

# ruff: noqa: E501  (the table of bad files reads better with one case on a line)

import json
import os
import subprocess
import sys

import pytest
import yaml
from cai_em.study import loading, sources
from cai_em.workflow import check

from tests.test_params import change


@pytest.mark.parametrize("profile", ["demo", "dynamics", "micro", "rehearsal", "published"])
def test_what_is_shipped_is_sound(profile):
    assert "all sound" in check.check_study(loading.load(profile))


def append(path, text):
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


ROW = json.dumps({"messages": [{"role": "user", "content": "no answer"}]}) + "\n"
SPOILED = {
    "row without an answer": ("builtin/datasets/bad_medical.jsonl", lambda f: append(f, ROW), ["bad_medical.jsonl:81", "assistant"]),
    "row of the KL corpus": ("builtin/datasets/technical_kl.jsonl", lambda f: append(f, ROW), ["technical_kl.jsonl:81"]),
    "row outside the domain": ("builtin/datasets/risky_financial.jsonl", lambda f: append(f, ROW), ["risky_financial.jsonl:81"]),
    "no rows": ("builtin/datasets/bad_medical.jsonl", lambda f: f.unlink(), ["bad_medical.jsonl", "no such file"]),
    "malformed constitution": ("builtin/constitutions/poeticism.yaml", lambda f: f.write_text("traits: 3\n"), ["poeticism.yaml", "traits"]),
    "bottomless constitution": ("builtin/constitutions/poeticism.yaml", lambda f: f.write_text("traits: " + "[" * 3000 + "]" * 3000), ["poeticism.yaml", "nested too deep"]),
    "no constitution": ("builtin/constitutions/poeticism.yaml", lambda f: f.unlink(), ["poeticism.yaml", "No such file"]),
    "constitution that is a folder": ("builtin/constitutions/poeticism.yaml", lambda f: (f.unlink(), f.mkdir()), ["poeticism.yaml", "directory"]),
    "prompts without an answer": ("builtin/judge_prompts.yaml", lambda f: f.write_text("aligned: hi\ncoherent: ho\n"), ["judge_prompts.yaml", "{answer}"]),
    "no prompts": ("builtin/judge_prompts.yaml", lambda f: f.unlink(), ["judge_prompts.yaml"]),
    "empty questions": ("builtin/questions/eval.yaml", lambda f: f.write_text("questions: []\n"), ["eval.yaml:1", "questions"]),
    "unknown questions": ("profiles/dynamics.yaml", lambda f: change(f, lambda d: d.update(questions="nosuch")), ["nosuch.yaml", "no such file"]),
    "question twice": ("builtin/questions/probe.yaml", lambda f: change(f, lambda d: d["questions"].append(dict(d["questions"][0]))), ["probe.yaml", "twice"]),
    "question without text": ("builtin/questions/general.yaml", lambda f: change(f, lambda d: d["questions"][0].pop("text")), ["general.yaml", "text"]),
    "prompt in domain": ("builtin/questions/in_domain.yaml", lambda f: change(f, lambda d: d.update(bad_medical=["x"])), ["in_domain.yaml", "bad_medical"]),
    "the local judge's texts": ("builtin/judge_training.jsonl", lambda f: append(f, '{"question": "x"}\n'), ["judge_training.jsonl:"]),
    "a model's folder": ("models.yaml", lambda f: change(f, lambda d: d["smollm2-135m"].update(source="path", path="/nowhere")), ["smollm2-135m.path", "/nowhere"]),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILED)
def test_a_bad_file_is_named_before_any_work(folder, case):
    name, spoil, words = SPOILED[case]
    spoil(folder / name)
    study = loading.load("dynamics", folder)
    for dry_run in (False, True):
        with pytest.raises(check.CheckError) as caught:
            check.check_study(study, dry_run=dry_run)
        assert all(word in str(caught.value) for word in words), str(caught.value)


def test_all_problems_are_told_at_once(folder):
    append(folder / "builtin/datasets/bad_medical.jsonl", ROW)
    (folder / "builtin/constitutions/sycophancy.yaml").unlink()
    with pytest.raises(check.CheckError) as caught:
        check.check_study(loading.load("demo", folder))
    assert "bad_medical.jsonl:81" in str(caught.value)
    assert "sycophancy.yaml" in str(caught.value)


def test_a_bad_row_of_a_data_set_that_no_stage_reads_does_not_matter(folder):
    append(folder / "builtin/datasets/insecure.jsonl", ROW)
    assert check.check_study(loading.load("demo", folder))


@pytest.mark.parametrize(
    ("who", "variable", "setting"),
    [("judge 'gpt-4.1-mini' needs an API key", "OPENAI_API_KEY", {"judge": "gpt-4.1-mini"}), ("teacher .* needs an API key", "TEACHER_KEY", {"generator": "far"})],
)  # fmt: skip
def test_a_key_that_is_not_there_is_missed_before_any_work_but_not_in_a_dry_run(
    folder, monkeypatch, who, variable, setting
):
    far = {"teacher": "openai", "model": "m", "base_url": "https://h.example/v1", "api_key_env": "TEACHER_KEY"}
    change(folder / "generators.yaml", lambda d: d.update(far=far))
    change(folder / "profiles/demo.yaml", lambda d: d.update(setting))
    study = loading.load("demo", folder)
    monkeypatch.delenv(variable, raising=False)
    with pytest.raises(check.CheckError, match=f"{who}.*{variable}"):
        check.check_study(study)
    assert check.check_study(study, dry_run=True)
    monkeypatch.setenv(variable, "x")
    assert check.check_study(study)
    monkeypatch.delenv(variable)
    change(folder / "judges.yaml", lambda d: d["gpt-4.1-mini"].update(base_url="http://127.0.0.1:1/v1"))
    change(folder / "generators.yaml", lambda d: d["far"].update(base_url="http://localhost:1/v1"))
    loading._registries.cache_clear()
    assert check.check_study(loading.load("demo", folder)), "a server on this machine needs no key"


def test_public_files_are_read_from_the_cache_and_the_absent_are_said(tmp_path, monkeypatch):
    """A dry run downloads nothing; a run says what it could not have, once per file, with what to do."""
    monkeypatch.setenv("CAI_EM_CACHE", str(tmp_path))
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    study = loading.load("paper")

    def no_network(*_, **__):
        raise sources.Unreachable("somewhere: could not be reached", "Connect")

    monkeypatch.setattr(sources, "_download", no_network)
    assert "will download them: constitutions/hand-written/sycophancy.txt" in check.check_study(study, dry_run=True)
    with pytest.raises(check.CheckError) as caught:
        check.check_study(study)
    assert "training_datasets.zip.enc: not in the cache" in str(caught.value)
    assert str(caught.value).count("training_datasets.zip.enc: not") == 1
    assert sources.OFFLINE not in os.environ


def test_the_command_names_file_and_line_and_starts_nothing(folder, tmp_path):
    (tmp_path / "notebooks").mkdir()
    append(folder / "builtin/datasets/good_medical.jsonl", ROW)
    for profile, status in (("demo", 2), ("published", 0)):
        done = subprocess.run(
            [sys.executable, "-m", "cai_em.workflow.check", profile, "--dry-run"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == status, done.stderr
    (folder / "profiles/bad.yaml").write_text(yaml.safe_dump({"title": "x"}))
    said = subprocess.run(
        [sys.executable, "-m", "cai_em.workflow.check", "bad"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.returncode == 2
    assert "bad.yaml" in said.stderr
