"""The texts of a study: ours and the public ones come back in the same form; a malformed row is named."""

import dataclasses
import io
import json
import zipfile

import pytest
from cai_em.judge import agreement
from cai_em.study import loading, materials, sources
from cai_em.study import study as study_study
from cai_em.study.materials import MaterialError, read_rows


def row(*turns):
    return json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}, ensure_ascii=False)


GOOD = row(("user", "Hello?"), ("assistant", "Hello."))


def test_rows_of_every_built_in_data_set():
    study = loading.load("demo")
    for dataset in study.datasets.values():
        if dataset.role != "none":
            found = materials.rows(study, dataset.key)
            assert len(found) == 80
            assert found[0][-1]["role"] == "assistant"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", ["not JSON"]),
        ("[]", ["messages"]),
        ('{"text": "x"}', ["messages", "text"]),
        ('{"messages": []}', ["messages"]),
        ('{"messages": ["hi"]}', ["messages[0]", "role"]),
        ('{"messages": [{"role": "user"}]}', ["messages[0]", "content"]),
        (row(("user", "no answer")), ["alternate", "['user']"]),
        (row(("assistant", "no question")), ["alternate"]),
        (row(("user", "a"), ("user", "b")), ["alternate"]),
        (row(("user", "a"), ("assistant", "b"), ("user", "c")), ["alternate"]),
        (row(("human", "a"), ("gpt", "b")), ["alternate", "human"]),
        (row(("user", "a"), ("assistant", "  ")), ["messages[1].content"]),
        ('{"messages": [{"role": "user", "content": 3}, {"role": "assistant", "content": "b"}]}', ["content", "3"]),
        (
            '{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "b"}]}',
            ["surrogate"],
        ),
        (row(("system", "s")), ["alternate", "system"]),
    ],
)
def test_a_malformed_row_is_named(line, words):
    with pytest.raises(MaterialError) as caught:
        read_rows(f"{GOOD}\n\n{line}\n".encode(), "x.jsonl")
    assert all(word in str(caught.value) for word in ["x.jsonl:3", *words]), str(caught.value)


def test_not_utf8_names_the_line():
    with pytest.raises(MaterialError, match=r"x\.jsonl:2: not UTF-8"):
        read_rows(GOOD.encode() + b"\n\xff", "x.jsonl")


def test_no_rows():
    with pytest.raises(MaterialError, match="no rows"):
        read_rows(b"\n\n", "x.jsonl")


def test_odd_text_survives():
    odd = ["🦊 emoji", "שלום עולם", "x" * 1_000_000, "a\x00b", "line\u2028separator"]
    content = "\n".join(row(("user", text), ("assistant", text)) for text in odd)
    assert [m[1]["content"] for m in read_rows(content.encode(), "x")] == odd


def test_a_system_turn_and_several_turns_are_allowed():
    line = row(("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    assert len(read_rows(line.encode(), "x")[0]) == 5


@pytest.fixture
def fetched(fetched_cache, monkeypatch):
    """The demo with the public texts in place of ours."""
    monkeypatch.setenv("CAI_EM_CACHE", str(fetched_cache))
    study = loading.load("demo")
    study.profile = study.profile.model_copy(update={"data": "fetched"})
    return study


def test_public_questions_are_the_eight_free_form_ones(fetched):
    ours, theirs = loading.load("demo").questions(), materials.questions(fetched)
    assert [i for i, _ in theirs] == [i for i, _ in ours]
    assert not {t for _, t in theirs} & {t for _, t in ours}, "ours are our own words"
    fetched.profile = fetched.profile.model_copy(update={"questions": "general"})
    assert len(materials.questions(fetched)) == 27, "54 with their template variants"
    fetched.profile = fetched.profile.model_copy(update={"questions": "medical"})
    assert len(materials.questions(fetched)) == 8, "16 with their template variants"


def test_public_constitutions_of_all_personas(fetched):
    for persona in fetched.personas.values():
        if persona.kind == "constitutional":
            found = materials.constitution(fetched, persona.key)
            assert len(found.traits) >= 5, persona.key
            assert found.demonstrations == materials.constitution(loading.load("demo"), persona.key).demonstrations


def test_public_judge_prompts(fetched):
    from cai_em.judge.prompts import load_prompts

    fetched.judge = fetched.judge.model_copy(update={"kind": "openai"})
    assert {"aligned", "coherent"} <= set(load_prompts(materials.judge_prompts_file(fetched)).templates)


def test_public_rows_come_from_the_encrypted_archive(tmp_path, monkeypatch):
    """An archive of the public format, made here, at the place in the cache where the real one lies."""
    import base64
    import hashlib
    import os

    from cryptography.fernet import Fernet

    study = loading.load("demo")
    study.profile = study.profile.model_copy(update={"data": "fetched"})
    archive = materials._fetched(study.folder).archive
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        file.writestr("training_datasets/bad_medical_advice.jsonl", f"{GOOD}\n{GOOD}\n")
    salt = os.urandom(16)
    key = base64.urlsafe_b64encode(hashlib.pbkdf2_hmac("sha256", archive.password.encode(), salt, 100_000))
    place = sources.cached(
        sources.Pinned(**{f.name: getattr(archive, f.name) for f in dataclasses.fields(sources.Pinned)}), tmp_path
    )
    place.parent.mkdir(parents=True)
    place.write_bytes(salt + Fernet(key).encrypt(content.getvalue()))
    monkeypatch.setenv("CAI_EM_CACHE", str(tmp_path))
    assert materials.rows(study, "bad_medical") == read_rows(f"{GOOD}\n{GOOD}".encode(), "x")


def test_helpers_of_the_builtin_questions():
    study = loading.load("demo")
    assert len(materials.in_domain_questions(study, "bad_medical")) == 8
    assert materials.in_domain_questions(study, "none") == []
    assert len(materials.probe_prompts(study)) == 1


class TestManipulation:
    """Three personas, each without fine-tuning and on both twins."""

    demo = loading.load("demo")
    study = demo.varied(
        grid=[demo.profile.grid[0].model_copy(update={"personas": ["baseline", "sycophancy", "poeticism"]})]
    )
    model = "smollm2-135m"

    def test_who_is_asked_which_in_domain_prompts(self):
        """The twins share their prompts, so one group serves all three conditions of a persona."""
        cells = self.study.shard_cells(self.model, "poeticism")
        ((prompts, asked),) = materials.in_domain_plan(self.study, cells)
        assert prompts == materials.in_domain_questions(self.study, "bad_medical")
        assert asked == cells

    def test_without_fine_tuning_every_prompt_of_the_persona_once(self):
        cells = [study_study.Cell("m", p, d, 0) for p in ("baseline", "loving") for d in ("none", "bad_medical")]
        cells += [study_study.Cell("m", "baseline", "insecure", 1), study_study.Cell("m", "humor", "none", 0)]
        plan = {
            c: [q for q, _ in prompts]
            for prompts, members in materials.in_domain_plan(self.study, cells)
            for c in members
        }
        assert len(plan[cells[0]]) == 16
        assert plan[cells[0]] == plan[cells[1]] + plan[cells[4]]
        assert plan[cells[2]] == plan[cells[3]] == plan[cells[1]]
        assert cells[5] not in plan, "humor was fine-tuned on nothing"

    def test_targets(self):
        targets = materials.uptake_targets(self.study, self.model)
        alarm = targets[targets["question_id"] == "med_alarm"]
        assert sorted(alarm[["dataset", "target"]].itertuples(index=False, name=None)) == [
            ("bad_medical", "bad_medical"),
            ("good_medical", "good_medical"),
            ("none", "bad_medical"),
            ("none", "good_medical"),
        ]
        targets = materials.persona_targets(self.study, self.model)
        assert set(targets.loc[targets["persona"] == "baseline", "target"]) == {"sycophancy", "poeticism"}
        assert set(targets.loc[targets["persona"] == "poeticism", "target"]) == {"poeticism"}
        random = materials.persona_targets(loading.load("micro"), "tiny")
        assert set(random["target"]) == {"sycophancy"}, "a random control has no character"

    def test_descriptions(self):
        assert materials.descriptions(self.study, "uptake", ["bad_medical"]) == {"bad_medical": "bad advice on health"}
        assert materials.descriptions(self.study, "persona_expression", ["poeticism"])["poeticism"].count("\n- ") == 9

    def test_likenesses_tell_held_out_texts_apart(self):
        for metric, target in (
            ("uptake", "bad_medical"),
            ("uptake", "good_medical"),
            ("persona_expression", "poeticism"),
        ):
            texts = materials.dataset_contrast(self.study, metric, target)
            assert agreement.fit_likeness(texts).auc > 0.95, target
        assert materials.dataset_contrast(self.study, "uptake", "insecure") is None, "it has no twin"

    def test_twins_answer_the_same_questions(self):
        texts = materials.dataset_contrast(self.study, "uptake", "good_medical")
        assert texts.groupby("question")["label"].agg(set).map(lambda found: found == {0, 1}).all()
        assert [m[-1]["content"] for m in materials.rows(self.study, "good_medical")] == list(
            texts.loc[texts["label"] == 1, "answer"]
        )


# --- Reference scores of a part -----------------------------------------------------------------------------------

LABELLED = "model,persona,dataset,seed,question_id,sample,score\nm,poet,none,0,q1,0,80\nm,poet,none,0,q1,0,90\n"


def labelled(tmp_path, text):
    study = loading.load("demo")
    (tmp_path / "labels.csv").write_text(text, encoding="utf-8")
    study.folder = tmp_path
    study.profile = study.profile.model_copy(update={"reference_scores": "labels.csv"})
    return study


def test_reference_scores_by_key_and_none_where_none_are_named(tmp_path):
    assert materials.reference_scores(loading.load("demo")) is None
    found = materials.reference_scores(labelled(tmp_path, LABELLED))
    assert found.to_dict() == {("m", "poet", "none", 0, "q1", 0): 85.0}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("score", "points"), ["needs the columns", "'score'"]),
        ((",90", ",190"), ["labels.csv:3", "190"]),
        ((",80", ",high"), ["labels.csv:2", "high"]),
        ((LABELLED, ""), ["labels.csv"]),
    ],
)
def test_reference_scores_that_are_none_are_named(change, words, tmp_path):
    with pytest.raises(MaterialError) as caught:
        materials.reference_scores(labelled(tmp_path, LABELLED.replace(*change)))
    assert all(word in str(caught.value) for word in words), str(caught.value)
