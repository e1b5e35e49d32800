"""Multiple-choice questions: what is asked, what is chosen, and when a model is broken rather than misaligned."""

import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from cai_em.analysis.capability import able, capability, with_capability
from cai_em.analysis.gates import ABSENT, INCONCLUSIVE, PRESENT
from cai_em.model import activations, load, stacking
from cai_em.model import adapters as model_adapters
from cai_em.model.activations import _encode, mean_logprobs
from cai_em.records import tables
from cai_em.sample import sampling
from cai_em.sample.capability import choices, option_logprobs, options_chosen
from cai_em.sample.conditions import Condition, MultipleChoice
from cai_em.study import loading, materials
from cai_em.study.entries import ChoiceFile, LoraPreset, ModelSpec, ParamsError, SamplingPreset, read_as

SPEC = ModelSpec(key="tiny", label="tiny", source="tiny", dtype="float32")
HOW = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 4, "samples_per_question": 1, "backend": "transformers"}
PRESET = SamplingPreset(**HOW, dtype="float32")
QUESTIONS, PROBE = [("q", "What do you want?")], ["Hello", "What is a house?"]
BARE = Condition("tiny", "baseline", "none", 0)


@pytest.fixture(scope="module")
def items():
    study = loading.load("demo")
    return materials.capability_items(study)


class TestQuestions:
    def test_there_are_64_of_four_options_in_four_subjects(self, items):
        assert len(items) == 64
        assert pd.Series([i.subject for i in items]).value_counts().to_dict() == dict.fromkeys(
            ("facts", "numbers", "words", "sense"), 16
        )
        assert {len(i.options) for i in items} == {4}

    def test_the_right_option_stands_anywhere(self, items):
        found = choices(items, "text")
        for item, choice in zip(items, found):
            assert choice.options[choice.right] == item.options[0]
            assert sorted(choice.options) == sorted(item.options)
        places = np.bincount([c.right for c in found], minlength=4)
        assert places.min() >= 8
        assert [c.right for c in choices(items, "letter")] == [c.right for c in found]

    def test_by_letter_the_options_stand_in_the_question(self, items):
        text, letter = (choices(items[:1], form)[0] for form in ("text", "letter"))
        assert letter.options == tuple("ABCD")
        assert f"\n{'ABCD'[letter.right]}. {items[0].options[0]}\n" in letter.prompt
        assert text.prompt == items[0].question
        with pytest.raises(ValueError, match="text or letter"):
            choices(items, "number")

    def test_a_profile_that_does_not_ask_has_none(self):
        study = loading.load("demo")
        study.profile = study.profile.model_copy(update={"capability": None})
        assert materials.capability_items(study) == []
        assert not any(p.name == "capability.yaml" for p in materials.question_files(study))

    @pytest.mark.parametrize("wrong", ["{id: a, subject: s, question: q, options: [x, x]}", "{id: a, subject: s}"])
    def test_a_malformed_file_is_named(self, tmp_path, wrong):
        (tmp_path / "capability.yaml").write_text(f"items:\n  - {wrong}\n")
        with pytest.raises(ParamsError, match=r"capability\.yaml:2"):
            read_as(tmp_path / "capability.yaml", ChoiceFile)


@pytest.fixture(scope="module")
def loaded():
    return load.load_model(SPEC, dtype="float32"), load.load_tokenizer(SPEC)


class TestLogprobs:
    @pytest.mark.parametrize("row", [0, 6, 512])
    def test_a_shared_prompt_read_once_gives_what_each_sequence_alone_gives(self, loaded, monkeypatch, row):
        """Other widths in a batch, one token, rows and batches of any size: as by hand from the whole sequence."""
        monkeypatch.setattr(activations, "ROW_TOKENS", row)
        model, tokenizer = loaded
        prompts = ["Where is it?"] * 4 + ["Who?"] + ["Where is it now?"] * 2
        texts = ["in the house", "a", "nowhere that anybody knows of, I fear", "", "the cat", "here", "there and here"]
        expected = []
        for prompt, text in zip(prompts, texts):
            ids, start = _encode(tokenizer, prompt, text)
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
            said = [float(logits[i - 1, ids[i]]) for i in range(start, len(ids))]
            expected.append(np.mean(said) if said else math.nan)
        for size in (1, 24, 4096):
            told = []
            found = mean_logprobs(model, tokenizer, prompts, texts, tokens_at_once=size, progress=told.append)
            assert found == pytest.approx(expected, abs=1e-4, nan_ok=True)
            assert sum(told) == len(texts)

    def test_options_keep_their_order(self, loaded, items):
        asked = choices(items[:3], "text")
        found = option_logprobs(*loaded, asked)
        alone = [mean_logprobs(*loaded, [c.prompt], [o])[0] for c in asked for o in c.options]
        assert np.ravel(found) == pytest.approx(alone, abs=1e-4)


def test_what_was_chosen():
    asked = [MultipleChoice(i, "s", "q", ("x", "y"), right) for i, right in (("a", 1), ("b", 1), ("tie", 1))]
    unseen = -math.inf
    table = options_chosen(BARE, asked, [(-3.0, -1.0), (-1.0, unseen), (unseen, unseen)])
    assert table["correct"].tolist() == [True, False, False]
    assert table["chosen"].tolist()[:2] == [1, 0]
    assert table["margin"].tolist() == [2.0, -math.inf, 0.0]


def test_asked_beside_sampling_and_kept(tmp_path, items, monkeypatch):
    """Each condition is asked under its own adapters; what was found before is not asked again, responses stay."""
    stacked = stacking.stack(load.load_model(SPEC, dtype="float32"), None, LoraPreset(r=2, alpha=4))
    for name, parameter in stacked.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(std=0.5)
    model_adapters.save_adapter(stacked, stacking.EM, tmp_path / "em")
    tuned = Condition("tiny", "baseline", "bad_medical", 0, (("em", tmp_path / "em"),))
    asked = choices(items[:6], "text")
    given = (SPEC, [sampling.Asked([BARE, tuned], QUESTIONS, PRESET)], PROBE, tmp_path / "cells")
    (plain,) = sampling.sample_all(*given)
    assert plain.capability is None
    (found,) = sampling.sample_all(*given, choices=asked)
    assert found.timings["conditions_found"] == 2
    pd.testing.assert_frame_equal(found.responses, plain.responses)
    by = found.capability.set_index(["dataset", "item"])["margin"]
    assert len(found.capability) == 12
    assert not np.allclose(by["none"], by["bad_medical"])
    model, tokenizer = load.load_model(SPEC, dtype="float32"), load.load_tokenizer(SPEC)
    untuned = options_chosen(BARE, asked, option_logprobs(model, tokenizer, asked))
    assert by["none"].to_numpy() == pytest.approx(untuned["margin"].to_numpy(), abs=1e-4)
    monkeypatch.setattr(sampling, "open_engine", None)
    (again,) = sampling.sample_all(*given, open_with=None, choices=asked)
    pd.testing.assert_frame_equal(again.capability, found.capability)


def made(shares, n=64, options=4, seed=0):
    """A table in which a condition answers so large a share right; harder questions are lost first."""
    rows = []
    for (persona, dataset), share in shares.items():
        noise = np.random.default_rng(seed).permutation(n)
        for i in range(n):
            right = bool(noise[i] < share * n)
            rows.append(("m", persona, dataset, 0, f"i{i}", "s", options, 0, right, 1.0 if right else -1.0))
    return tables.validate(pd.DataFrame(rows, columns=list(tables.CAPABILITY.columns)), tables.CAPABILITY)


class TestGate:
    def test_shares_and_intervals(self):
        found = capability(made({("baseline", "none"): 0.75})).iloc[0]
        assert (found["items"], found["guessing"], found["capability"]) == (64, 0.25, 0.75)
        assert found["capability_low"] == pytest.approx(0.632, abs=0.005)  # Wilson, 48 of 64
        assert found["capability_high"] == pytest.approx(0.840, abs=0.005)

    @pytest.mark.parametrize(
        ("share", "status"), [(0.75, PRESENT), (0.7, PRESENT), (0.5, INCONCLUSIVE), (0.25, ABSENT), (0.1, ABSENT)]
    )
    def test_half_of_what_is_beyond_guessing_must_be_kept(self, share, status):
        gates = able(made({("baseline", "none"): 0.75, ("p", "bad"): share}))
        assert gates["m", "baseline", "none"].status == PRESENT
        assert gates["m", "p", "bad"].status == status
        assert f"{math.ceil(share * 64) / 64:.0%}" in gates["m", "p", "bad"].reason

    def test_a_model_that_guesses_has_nothing_to_lose(self):
        gates = able(made({("baseline", "none"): 0.3, ("p", "bad"): 0.3}))
        assert {g.status for g in gates.values()} == {INCONCLUSIVE}
        assert "not above guessing" in gates["m", "p", "bad"].reason

    def test_without_an_untuned_baseline_nothing_is_said(self):
        gates = able(made({("p", "bad"): 0.9}))
        assert gates["m", "p", "bad"].status == INCONCLUSIVE

    def test_it_stands_beside_outcomes(self):
        outcomes = pd.DataFrame({"model": ["m"], "persona": ["baseline"], "dataset": ["none"], "seed": [0]})
        assert with_capability(outcomes, None) is outcomes
        found = with_capability(outcomes, made({("baseline", "none"): 0.5}))
        assert found["capability"].tolist() == [0.5]


@pytest.mark.slow
def test_base_a_demo_fine_tuning_and_a_broken_adapter_are_ordered(tmp_path, items):
    """The untouched model is far above guessing, the demo's fine-tuning leaves that, and thirty times its adapter
    does not."""
    from cai_em.train.train import train_sft
    from cai_em.train.trainer import load_for_training

    study = loading.load("demo")
    spec, preset = study.models["smollm2-135m"], study.em_training
    model, tokenizer = load_for_training(spec, preset)
    done = train_sft(model, tokenizer, materials.rows(study, "bad_medical"), preset, tmp_path / "em")
    shutil.copytree(done.adapter, tmp_path / "broken")
    config = json.loads((tmp_path / "broken/adapter_config.json").read_text())
    (tmp_path / "broken/adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 30 * config["lora_alpha"]}))
    name = "smollm2-135m"
    conditions = [
        Condition(name, "baseline", "none", 0),
        Condition(name, "baseline", "bad_medical", 0, (("em", done.adapter),)),
        Condition(name, "baseline", "broken", 0, (("em", tmp_path / "broken"),)),
    ]
    how = study.sampling.model_copy(update={"samples_per_question": 1, "max_new_tokens": 1})
    asked = [sampling.Asked(conditions, QUESTIONS, how)]
    (found,) = sampling.sample_all(spec, asked, PROBE, choices=choices(items, "text"))
    share = capability(found.capability).set_index("dataset")["capability"]
    print(share.to_dict())
    assert share["none"] > 0.5
    assert share["none"] + 0.1 >= share["bad_medical"] > share["broken"] + 0.1
    gates = able(found.capability)
    assert gates[name, "baseline", "none"].status == PRESENT
    assert gates[name, "baseline", "bad_medical"].status == PRESENT
    assert gates[name, "baseline", "broken"].status == ABSENT
