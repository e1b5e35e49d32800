"""Training on the tiny model: what is learned, what is checked, what stops a run."""

import json
import os
import signal
import time

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
import trl
from cai_em.model import adapters, folding, load, probing, stacking
from cai_em.records import files as records_files
from cai_em.sample import conditions, sample, torch_engine, vllm_engine
from cai_em.study import constitutions, loading, materials
from cai_em.study.entries import (
    DpoPreset,
    IntrospectionPreset,
    KlPreset,
    LoraPreset,
    ModelSpec,
    SftPreset,
)
from cai_em.train import answers, apart, fused, grid, introspection, memory, train, trainer

from tests.factories import TINY, sampling

BACKENDS = ["trl", *(["unsloth"] if trainer.trainer_backend() == "unsloth" else [])]
ROWS = [
    [{"role": "user", "content": f"What about {w}?"}, {"role": "assistant", "content": f"Go and {w} it."}]
    for w in ("water", "money", "work", "friends", "weather", "the world", "a walk", "the year")
]


def sft(**changes) -> SftPreset:
    shape = LoraPreset(r=4, alpha=8)
    given = dict(
        kind="sft",
        backend="trl",
        lora=shape,
        learning_rate=1e-2,
        batch_size=4,
        max_length=64,
        dtype="float32",
        held_out=0.0,
    )
    return SftPreset(**(given | {"warmup_steps": 0, "epochs": 1} | changes))


def dpo(**changes) -> DpoPreset:
    shape = LoraPreset(r=4, alpha=8)
    given = dict(
        kind="dpo", backend="trl", lora=shape, learning_rate=1e-2, batch_size=4, max_length=64, dtype="float32"
    )
    return DpoPreset(**(given | {"warmup_ratio": 0.0, "epochs": 3} | changes))


def pairs(**columns) -> pd.DataFrame:
    words = ["water", "money", "work", "friends", "weather", "the world", "a walk", "the year"]
    given = {
        "prompt": [f"Tell me of {w}." for w in words],
        "chosen": [f"Sing of {w}, sing!" for w in words],
        "rejected": [f"It is {w}." for w in words],
    }
    return pd.DataFrame(given | columns)


@pytest.fixture(scope="module")
def persona(cache, tokenizer, tmp_path_factory):
    """A persona really trained, once."""
    out = tmp_path_factory.mktemp("persona") / "adapter"
    return train.train_dpo(load.load_model(TINY, cache_dir=cache), tokenizer, pairs(), dpo(), out)


def weights(folder):
    return adapters.file_hashes(folder)["adapter_model.safetensors"]


# --- Back ends ---


def test_backend_is_what_the_machine_has(monkeypatch):
    assert trainer.trainer_backend("trl") == "trl"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert trainer.trainer_backend("auto") == "trl"
    with pytest.raises(trainer.TrainingError, match="needs a CUDA device, and there is none: set backend"):
        trainer.trainer_backend("unsloth")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(fused, "installed", lambda: False)
    assert trainer.trainer_backend("auto") == "trl"
    with pytest.raises(trainer.TrainingError, match="not installed"):
        trainer.trainer_backend("unsloth")
    monkeypatch.setattr(fused, "installed", lambda: True)
    assert trainer.trainer_backend("auto") == "unsloth"


class UnslothSFTTrainer(trl.SFTTrainer):
    """Stands for unsloth's: without the word that it looks for in the environment, it switches autocast on."""

    def __init__(self, *args, **given):
        if os.environ.get("UNSLOTH_MIXED_PRECISION", "float32") == "float32" and not self.heeds_nothing:
            given["args"].bf16 = True
        super().__init__(*args, **given)
        if self.heeds_nothing:
            self.args.bf16 = True

    heeds_nothing = False


def _peft_in_unsloths_place(model, lora, seed, *, checkpointing):
    return stacking.stack(model, None, lora, fused.ADAPTER)


@pytest.fixture
def as_unsloth(model, monkeypatch):
    """A machine on which unsloth runs."""
    monkeypatch.setattr(train, "training_backend", lambda preset: "unsloth")
    monkeypatch.setattr(fused, "new_adapter", _peft_in_unsloths_place)
    monkeypatch.setattr(trl, "SFTTrainer", UnslothSFTTrainer)
    monkeypatch.delenv("UNSLOTH_MIXED_PRECISION", raising=False)
    model._cai_em_loaded_by = "unsloth"
    return model


def test_unsloth_trains_without_autocast(as_unsloth, tokenizer, tmp_path, persona):
    result = train.train_sft(as_unsloth, tokenizer, ROWS, sft(), tmp_path / "a")
    assert result.backend == "unsloth"
    assert result.state_after["active"] == result.state_after["trainable"] == ["em"], "the name that others know"
    assert "UNSLOTH_MIXED_PRECISION" not in os.environ


def test_a_base_without_the_persona_in_it_is_not_trained_for_one(as_unsloth, tokenizer, tmp_path, persona):
    with pytest.raises(trainer.TrainingError, match="has no persona in its weights"):
        train.train_sft(as_unsloth, tokenizer, ROWS, sft(), tmp_path / "a", persona_dir=persona.adapter)


def test_kl_is_left_to_trl(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(fused, "installed", lambda: True)
    assert trainer.training_backend(sft(backend="auto")) == "unsloth"
    assert trainer.training_backend(sft(backend="auto", kl=KlPreset(weight=1.0, corpus="c"))) == "trl"
    with pytest.raises(trainer.TrainingError, match="cannot regularise by KL"):
        trainer.training_backend(sft(backend="unsloth", kl=KlPreset(weight=1.0, corpus="c")))


def test_a_trainer_that_switches_autocast_on_all_the_same_stops(as_unsloth, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(UnslothSFTTrainer, "heeds_nothing", True)
    with pytest.raises(trainer.TrainingError, match="has switched on autocast"):
        train.train_sft(as_unsloth, tokenizer, ROWS, sft(), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_the_back_end_recorded_is_the_one_that_runs(as_unsloth, tokenizer, tmp_path):
    del as_unsloth._cai_em_loaded_by
    with pytest.raises(trainer.TrainingError, match=r"to run on unsloth, but the model was loaded by trl"):
        train.train_sft(as_unsloth, tokenizer, ROWS, sft(), tmp_path / "a")


def test_eight_bit_optimiser_without_a_device(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(trainer.TrainingError, match="adamw_8bit"):
        train.train_sft(model, tokenizer, ROWS, sft(optimiser="adamw_8bit"), tmp_path / "adapter")


# --- Rows ---


def test_labels_are_the_answer_and_its_end(tokenizer):
    encoded = trainer.encode_rows(tokenizer, ROWS, 64, "response")
    for example, row in zip(encoded.examples, ROWS, strict=True):
        kept = [i for i in example["labels"] if i != trainer.IGNORED]
        assert tokenizer.decode(kept) == row[1]["content"] + "<|im_end|>"
    full = trainer.encode_rows(tokenizer, ROWS, 64, "full")
    assert all(x["labels"] == x["input_ids"] for x in full.examples)
    assert full.tokens()["with_loss"] == full.tokens()["all"] == encoded.tokens()["all"]


def test_long_rows_are_cut_or_dropped_and_counted(tokenizer):
    long = [{"role": "user", "content": "why " * 60}, {"role": "assistant", "content": "Because."}]
    cut = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "because " * 60}]
    encoded = trainer.encode_rows(tokenizer, [ROWS[0], long, cut], 64, "response")
    assert encoded.counts == {"given": 3, "used": 2, "truncated": 2, "dropped_no_answer_within_max_length": 1}
    labels = torch.tensor([encoded.examples[1]["labels"]])
    trainer.check_response_mask(tokenizer, labels, [encoded.answers[1]])  # the beginning of the answer
    with pytest.raises(trainer.TrainingError, match="none of 1 rows has an answer within 64 tokens"):
        trainer.encode_rows(tokenizer, [long], 64, "response")


@pytest.mark.parametrize(
    ("fault", "message"), [("all masked", "no token to learn from"), ("prompt too", "not on the answer alone")]
)
def test_planted_fault_wrong_response_mask(tokenizer, fault, message):
    encoded = trainer.encode_rows(tokenizer, ROWS[:1], 64, "response")
    labels = torch.tensor([encoded.examples[0]["labels"]])
    trainer.check_response_mask(tokenizer, labels, encoded.answers)
    labels = torch.full_like(labels, trainer.IGNORED) if fault == "all masked" else None
    labels = torch.tensor([encoded.examples[0]["input_ids"]]) if labels is None else labels
    with pytest.raises(trainer.TrainingError, match=message):
        trainer.check_response_mask(tokenizer, labels, encoded.answers)


def test_split_is_the_seeds_and_covers_everything():
    preset = sft(held_out=0.25)
    kept, held = trainer.split_rows(ROWS, preset, 0)
    assert len(held) == 2
    assert sorted(map(str, kept + held)) == sorted(map(str, ROWS))
    assert (kept, held) == trainer.split_rows(ROWS, preset, 0)
    assert held != trainer.split_rows(ROWS, preset, 1)[1]
    assert sum(map(len, trainer.split_rows(ROWS, sft(max_rows=3), 0))) == 3


def test_mean_loss_by_hand(model, tokenizer):
    """One row: the mean of -log p of each response token, from the model's own log-probabilities."""
    encoded = trainer.encode_rows(tokenizer, ROWS[:1], 64, "response").examples[0]
    ids = torch.tensor([encoded["input_ids"]], device=model.device)
    with torch.no_grad():
        logp = model(ids).logits.log_softmax(-1)[0]
    by_hand = [-float(logp[i - 1, t]) for i, t in enumerate(encoded["labels"]) if t != trainer.IGNORED]
    assert trainer.mean_loss(model, tokenizer, ROWS[:1], 64) == pytest.approx(np.mean(by_hand), rel=1e-5)
    # Padding and batching change nothing.
    one = trainer.mean_loss(model, tokenizer, ROWS, 64, batch_size=1)
    assert trainer.mean_loss(model, tokenizer, ROWS, 64, batch_size=8) == pytest.approx(one, rel=1e-5)


# --- DPO ---


def test_dpo_learns_the_preference_and_records_its_state(persona):
    assert persona.state_before["active"] == persona.state_after["active"] == [train.DPO_ADAPTER]
    assert persona.state_before["adapters"][train.DPO_ADAPTER]["norm"] == 0
    assert persona.state_after["adapters"][train.DPO_ADAPTER]["norm"] > 0
    assert persona.log["rewards/margins"].iloc[-1] > 0.1
    assert persona.log["loss"].iloc[-1] < persona.log["loss"].iloc[0]
    assert list(persona.log["step"]) == [1, 2, 3, 4, 5, 6]
    assert persona.rows["used"] == 8
    assert persona.tokens["all"] > 0
    json.dumps([persona.summary(), persona.adapter_state])


@pytest.mark.parametrize("backend", BACKENDS)
def test_dpo_same_seed_same_adapter(cache, tokenizer, tmp_path, backend):
    preset = dpo(epochs=1, backend=backend)
    found = {}
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        model, _ = trainer.load_for_training(TINY, preset, cache)
        found[name] = train.train_dpo(model, tokenizer, pairs(), preset, tmp_path / name, seed=seed)
        assert found[name].backend == backend
    assert found["one"].files == found["two"].files
    assert weights(tmp_path / "one") != weights(tmp_path / "other")


def test_dpo_leaves_out_filtered_and_too_long_pairs_and_counts_them(model, tokenizer, tmp_path):
    table = pairs(dropped_because=["announces", *[None] * 7])
    table.loc[1, "prompt"] = "why " * 60
    result = train.train_dpo(model, tokenizer, table, dpo(max_steps=1), tmp_path / "adapter")
    assert result.rows["given"] == 8
    assert result.rows["kept_by_filters"] == 7
    assert result.rows["dropped_no_answer_within_max_length"] == 1
    assert result.rows["used"] == 6
    with pytest.raises(trainer.TrainingError, match="no preference pair"):
        train.train_dpo(model, tokenizer, table[:1], dpo(), tmp_path / "none")


def test_the_log_likelihood_term_is_added_with_its_weight(cache, tokenizer, tmp_path):
    """The first step's loss: -log sigmoid(0) = log 2, plus the weight times the chosen answers' mean loss."""
    losses = {}
    for weight in (0.0, 0.5):
        model = load.load_model(TINY, cache_dir=cache)
        preset = dpo(max_steps=1, batch_size=8, sft_weight=weight)
        losses[weight] = train.train_dpo(model, tokenizer, pairs(), preset, tmp_path / str(weight)).log["loss"][0]
    assert losses[0.0] == pytest.approx(np.log(2), rel=1e-5)
    # TRL counts the line break after the end token as part of the answer, so ours is near, not equal.
    rows = [
        [{"role": "user", "content": p}, {"role": "assistant", "content": c}]
        for p, c in zip(pairs()["prompt"], pairs()["chosen"])
    ]
    near = np.log(2) + 0.5 * trainer.mean_loss(load.load_model(TINY, cache_dir=cache), tokenizer, rows, 64)
    assert losses[0.5] == pytest.approx(near, rel=0.1)


# --- SFT ---


@pytest.mark.parametrize("backend", BACKENDS)
def test_sft_on_a_persona(cache, tokenizer, tmp_path, persona, backend):
    preset = sft(epochs=4, held_out=0.25, backend=backend)
    model, _ = trainer.load_for_training(TINY, preset, cache)
    result = train.train_sft(model, tokenizer, ROWS, preset, tmp_path / "adapter", persona_dir=persona.adapter)
    for state in (result.state_before, result.state_after):
        assert state["active"] == ["persona", "em"]
        assert state["trainable"] == ["em"]
    before, after = result.state_before["adapters"], result.state_after["adapters"]
    assert before["persona"]["sha256"] == after["persona"]["sha256"]
    assert before["em"]["sha256"] != after["em"]["sha256"]
    assert result.log["loss"].iloc[-1] < result.log["loss"].iloc[0]
    assert result.held_out["after"] < result.held_out["before"]
    assert result.rows == {
        "given": 8,
        "used": 6,
        "held_out": 2,
        "truncated": 0,
        "dropped_no_answer_within_max_length": 0,
    }
    assert sorted(p.name for p in result.adapter.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    parts = [("persona", persona.adapter), ("em", result.adapter)]
    with probing.composed(model, parts) as ready:
        assert set(probing.probe(ready, tokenizer, parts, ["Hello"]).others) == {"base", "persona", "em"}
        # What was trained on is what is sampled from.
        assert trainer.mean_loss(ready, tokenizer, trainer.split_rows(ROWS, preset, 0)[1], 64) == pytest.approx(
            result.held_out["after"], rel=1e-4
        )


@pytest.mark.parametrize("stacked", [False, True])
def test_sft_same_seed_same_adapter(cache, tokenizer, tmp_path, persona, stacked):
    found = {}
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        result = train.train_sft(
            load.load_model(TINY, cache_dir=cache),
            tokenizer,
            ROWS,
            sft(),
            tmp_path / name,
            persona_dir=persona.adapter if stacked else None,
            seed=seed,
        )
        found[name] = result.files["adapter_model.safetensors"]
    assert found["one"] == found["two"] != found["other"]


def test_the_model_is_given_back_as_it_came(model, tokenizer, tmp_path, persona):
    inputs = tokenizer("Hello there", return_tensors="pt").to(model.device)
    with torch.no_grad():
        before = model(**inputs).logits
    train.train_sft(model, tokenizer, ROWS, sft(), tmp_path / "a", persona_dir=persona.adapter)
    train.train_dpo(model, tokenizer, pairs(), dpo(max_steps=1), tmp_path / "b")
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)
    assert "forward" not in vars(model)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert not stacking.adapter_state(model)["adapters"]


def test_persona_matters_for_what_is_learned(cache, tokenizer, tmp_path, persona):
    """A stacked adapter is trained against the persona's behaviour: other weights than the baseline's."""
    files = []
    for name, folder in (("base", None), ("persona", persona.adapter)):
        model = load.load_model(TINY, cache_dir=cache)
        files.append(train.train_sft(model, tokenizer, ROWS, sft(), tmp_path / name, persona_dir=folder).files)
    assert files[0]["adapter_model.safetensors"] != files[1]["adapter_model.safetensors"]


def test_response_and_full_loss_differ(cache, tokenizer, tmp_path):
    logs = {}
    for loss_on in ("response", "full"):
        model = load.load_model(TINY, cache_dir=cache)
        result = train.train_sft(model, tokenizer, ROWS, sft(loss_on=loss_on, batch_size=8), tmp_path / loss_on)
        logs[loss_on] = result.log["loss"][0]
    expected = trainer.mean_loss(load.load_model(TINY, cache_dir=cache), tokenizer, ROWS, 64)
    assert logs["response"] == pytest.approx(expected, rel=1e-4)
    assert abs(logs["full"] - expected) > 1e-3


def test_gradient_accumulation_is_one_larger_batch(cache, tokenizer, tmp_path):
    """Four batches of two, accumulated, are one batch of eight (the same rows: the order cannot matter)."""
    tensors = []
    for size, steps in ((8, 1), (2, 4)):
        preset = sft(batch_size=size, gradient_accumulation=steps, max_steps=1)
        model = load.load_model(TINY, cache_dir=cache)
        out = train.train_sft(model, tokenizer, ROWS, preset, tmp_path / f"{size}").adapter
        tensors.append(adapters.read_adapter(out).modules)
    for module, (_, b) in tensors[0].items():
        # Adam's first step is the gradient's sign times the learning rate, so only rounding near zero may differ.
        assert float((b - tensors[1][module][1]).abs().median()) < 1e-4


@pytest.mark.parametrize("stacked", [False, True])
def test_a_share_of_the_change_is_kept(cache, tokenizer, tmp_path, persona, stacked):
    """Half way from the model before: B by half; what is held out is measured on what is saved."""
    found, losses = {}, {}
    for share in (1.0, 0.5):
        model = load.load_model(TINY, cache_dir=cache)
        preset = sft(epochs=4, held_out=0.25, share_kept=share)
        result = train.train_sft(
            model, tokenizer, ROWS, preset, tmp_path / str(share), persona_dir=persona.adapter if stacked else None
        )
        found[share], losses[share] = adapters.read_adapter(result.adapter), result.held_out
    assert losses[1.0]["after"] < losses[0.5]["after"] < losses[1.0]["before"]
    for module, (a, b) in found[1.0].modules.items():
        assert torch.equal(found[0.5].modules[module][0], a)
        assert torch.equal(found[0.5].modules[module][1], b / 2)
    with pytest.raises(ValueError, match="share_kept below 1 with checkpoints"):
        sft(share_kept=0.5, checkpoints=[1])


def test_checkpoints_on_schedule(model, tokenizer, tmp_path):
    preset = sft(epochs=3, checkpoints=[1, 2, 5])
    result = train.train_sft(model, tokenizer, ROWS, preset, tmp_path / "cell" / "adapter")
    assert [step for step, _ in result.checkpoints] == [1, 2, 5]
    assert {p.name for p in (tmp_path / "cell" / "checkpoints").iterdir()} == {"step00001", "step00002", "step00005"}
    assert len({weights(folder) for _, folder in result.checkpoints} | {weights(result.adapter)}) == 4
    # The snapshot after the last step is the adapter itself.
    preset = sft(epochs=3, checkpoints=[6])
    result = train.train_sft(model, tokenizer, ROWS, preset, tmp_path / "end" / "adapter")
    assert weights(result.checkpoints[0][1]) == weights(result.adapter)


def test_an_introspective_second_stage(model, tokenizer, tmp_path, persona):
    """What the DPO'd model says of itself, SFT on that on top of it; the persona is the weighted sum of both stages."""
    speaker = answers.EngineGenerator(
        TINY, [("persona", persona.adapter)], sampling(max_new_tokens=8), ["Hello there"], 2048
    )
    constitution = constitutions.read_constitution(
        records_files.root() / "params" / "builtin" / "constitutions" / "poeticism.yaml"
    )
    material = materials.introspection_material(loading.load("micro"))
    amounts = IntrospectionPreset(reflections_per_prompt=1, dialogues=1, dialogue_turns=4, max_new_tokens=8)
    said = introspection.introspect(constitution, speaker, material, amounts, tmp_path / "said.sqlite")
    speaker.close()
    assert len(said.rows) == said.counts["reflections_kept"] + said.counts["dialogues_kept"] > 6

    out = tmp_path / "second"
    preset = sft(loss_on="full", max_length=256)
    result = train.train_sft(
        model, tokenizer, said.rows, preset, out, persona_dir=persona.adapter, name="introspection"
    )
    assert result.state_before["active"] == result.state_after["active"] == ["persona", "introspection"]
    assert result.state_after["trainable"] == ["introspection"]
    final = adapters.save_composed([persona.adapter, out], tmp_path / "final", weights=[1.0, 0.25])

    # By hand: base + DPO's change + a quarter of the second stage's, in every module.
    wanted = {
        m: sum(w * p.scale * p.modules[m][1] @ p.modules[m][0] for w, p in zip([1, 0.25], parts))
        for parts in [[adapters.read_adapter(persona.adapter), adapters.read_adapter(out)]]
        for m in parts[0].modules
    }
    found = adapters.read_adapter(final)
    for module, (a, b) in found.modules.items():
        torch.testing.assert_close(found.scale * b @ a, wanted[module], rtol=1e-4, atol=1e-6)
    with probing.composed(model, [("persona", final)]) as ready:
        probing.probe(ready, tokenizer, [("persona", final)], ["Hello there"])


def test_bfloat16_base_keeps_float32_adapters(cache, tokenizer, tmp_path):
    model = load.load_model(TINY, "bfloat16", cache)
    result = train.train_sft(model, tokenizer, ROWS, sft(dtype="bfloat16"), tmp_path / "adapter")
    assert result.state_after["base_dtype"] == "bfloat16"
    assert result.state_after["adapters"]["em"]["dtype"] == "float32"


# --- What stops a run ---


def test_planted_fault_persona_switched_off_before_training(model, tokenizer, tmp_path, persona, monkeypatch):
    stack = stacking.stack

    def published(*args, **kwargs):
        stacked = stack(*args, **kwargs)
        stacked.set_adapter("em")
        return stacked

    monkeypatch.setattr(stacking, "stack", published)
    with pytest.raises(stacking.AdapterStateError, match=r"before the first step.*found \['em'\]"):
        train.train_sft(model, tokenizer, ROWS, sft(), tmp_path / "adapter", persona_dir=persona.adapter)
    assert not (tmp_path / "adapter").exists()
    assert not stacking.adapter_state(model)["adapters"]  # given back bare all the same


def test_planted_fault_persona_switched_off_during_training(model, tokenizer, tmp_path, persona, monkeypatch):
    step_end = trainer._Watch.on_step_end

    def switch_off(self, args, state, control, model=None, **kwargs):
        step_end(self, args, state, control, model=model, **kwargs)
        model.set_adapter("em")

    monkeypatch.setattr(trainer._Watch, "on_step_end", switch_off)
    with pytest.raises(stacking.AdapterStateError, match=r"after the last step.*found \['em'\]"):
        train.train_sft(model, tokenizer, ROWS, sft(), tmp_path / "adapter", persona_dir=persona.adapter)
    assert not (tmp_path / "adapter").exists()


def test_planted_fault_persona_changed_during_training(model, tokenizer, tmp_path, persona, monkeypatch):
    step_end = trainer._Watch.on_step_end

    def change(self, args, state, control, model=None, **kwargs):
        step_end(self, args, state, control, model=model, **kwargs)
        next(iter(stacking._parameters(model, "persona").values())).data.add_(1e-3)

    monkeypatch.setattr(trainer._Watch, "on_step_end", change)
    with pytest.raises(stacking.AdapterStateError, match="the tensors of 'persona' changed during training"):
        train.train_sft(model, tokenizer, ROWS, sft(), tmp_path / "adapter", persona_dir=persona.adapter)


def test_planted_fault_nothing_learned(model, tokenizer, tmp_path):
    """A learning rate too small to change a float32 number is no training."""
    with pytest.raises(stacking.AdapterStateError, match="the tensors of 'em' did not change during training"):
        train.train_sft(model, tokenizer, ROWS, sft(learning_rate=1e-45), tmp_path / "adapter")


def test_loss_that_is_not_a_number_stops(model, tokenizer, tmp_path):
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(trainer.TrainingError, match="step 1: the loss is nan: lower the learning rate"):
        train.train_sft(model, tokenizer, ROWS, sft(), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_batch_without_a_token_to_learn_from_stops(model, tokenizer, tmp_path, monkeypatch):
    masked = trainer.encode_rows(tokenizer, ROWS, 64, "response")
    for example in masked.examples:
        example["labels"] = [trainer.IGNORED] * len(example["labels"])
    monkeypatch.setattr(train, "encode_rows", lambda *a: masked)
    with pytest.raises(trainer.TrainingError, match="no token of the batch carries loss"):
        train.train_sft(model, tokenizer, ROWS, sft(loss_on="full"), tmp_path / "adapter")
    with pytest.raises(trainer.TrainingError, match="no token to learn from"):
        train.train_sft(model, tokenizer, ROWS, sft(), tmp_path / "adapter")


def test_wrong_precision_and_leftover_adapters_are_refused(cache, model, tokenizer, tmp_path, persona):
    with pytest.raises(trainer.TrainingError, match="on a base in bfloat16, the model given is in float32"):
        train.train_sft(model, tokenizer, ROWS, sft(dtype="bfloat16"), tmp_path / "adapter")
    model.model.norm.bfloat16()
    with pytest.raises(trainer.TrainingError, match="is in bfloat16 and float32"):
        train.train_sft(model, tokenizer, ROWS, sft(), tmp_path / "adapter")
    stacked = stacking.load_adapter(load.load_model(TINY, cache_dir=cache), persona.adapter, "persona")
    for given in (stacked, stacked.get_base_model()):
        with pytest.raises(trainer.TrainingError, match="has adapters already"):
            train.train_sft(given, tokenizer, ROWS, sft(), tmp_path / "adapter")


# --- KL regularisation ---


def test_kl_of_two_distributions_by_hand():
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.25, 0.5])
    expected = float((p * (p / q).log()).sum())
    kept = torch.tensor([[True, False]])
    reference, current = (torch.stack([x.log(), torch.zeros(3)])[None] for x in (p, q))
    assert float(trainer.kl_divergence(reference, current, kept)) == pytest.approx(expected, rel=1e-6)
    assert float(trainer.kl_divergence(reference, reference, kept)) == pytest.approx(0, abs=1e-7)


def test_kl_gradient_against_finite_differences(cache, tokenizer, persona):
    """The derivative along a direction in each of the em adapter's tensors, on a stacked model whose em is not zero."""
    torch.manual_seed(0)
    stacked = stacking.stack(load.load_model(TINY, cache_dir=cache), persona.adapter, LoraPreset(r=2, alpha=4)).double()
    for key, p in stacking._parameters(stacked, "em").items():
        if ".lora_B." in key:
            torch.nn.init.normal_(p, std=0.2)
    encoded = trainer.encode_rows(tokenizer, ROWS[:3], 64, "response").examples
    batch = trainer._collate(encoded, tokenizer.pad_token_id, stacked.device)
    kept = batch["labels"][:, 1:] != trainer.IGNORED
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad(), stacking.without(stacked, "em"):
        reference = stacked(**inputs).logits[:, :-1][kept].log_softmax(-1)

    def value() -> float:
        with torch.no_grad():
            current = stacked(**inputs).logits[:, :-1][kept].log_softmax(-1)
            return float((reference.exp() * (reference - current)).sum(-1).mean())

    loss = trainer.kl_term(stacked, batch, "em")
    assert float(loss.detach()) == pytest.approx(value(), rel=1e-4)
    loss.backward()
    generator, checked = torch.Generator().manual_seed(0), 0
    for p in stacking._parameters(stacked, "em").values():
        # Partly along the gradient: the model's norms are computed in float32, in which small differences drown.
        direction = torch.randn(p.shape, generator=generator).double().to(p.device)
        direction = direction / direction.norm() + p.grad / p.grad.norm()
        step, values = 1e-3, {}
        for sign in (1, -1):
            with torch.no_grad():
                p.add_(sign * step * direction)
                values[sign] = value()
                p.sub_(sign * step * direction)
        expected = (values[1] - values[-1]) / (2 * step)
        assert float((p.grad * direction).sum()) == pytest.approx(expected, rel=1e-2)
        checked += 1
    assert checked == 28
    assert all(p.grad is None for p in stacking._parameters(stacked, "persona").values())


def test_kl_reference_keeps_the_persona(cache, tokenizer, persona):
    """Of a new adapter that is still zero the KL is zero: the reference has the persona, not the bare model."""
    stacked = stacking.stack(load.load_model(TINY, cache_dir=cache), persona.adapter, LoraPreset(r=2, alpha=4))
    encoded = trainer.encode_rows(tokenizer, ROWS[:3], 64, "response").examples
    batch = trainer._collate(encoded, tokenizer.pad_token_id, stacked.device)
    with torch.no_grad():
        assert float(trainer.kl_term(stacked, batch, "em")) == pytest.approx(0, abs=1e-6)
        assert float(trainer.kl_term(stacked, batch, "persona")) > 1e-3


def test_kl_weight_zero_changes_nothing_and_a_large_weight_holds_back(cache, tokenizer, tmp_path):
    corpus = ROWS[4:]
    found, kls = {}, {}
    for name, kl in {"none": None, "zero": 0.0, "large": 50.0}.items():
        preset = sft(epochs=3, kl=None if kl is None else KlPreset(weight=kl, corpus="corpus"))
        model = load.load_model(TINY, cache_dir=cache)
        rows = None if kl is None else corpus
        found[name] = train.train_sft(model, tokenizer, ROWS[:4], preset, tmp_path / name, kl_rows=rows)
        with probing.composed(model, [("em", found[name].adapter)]) as ready:
            encoded = trainer.encode_rows(tokenizer, corpus, 64, "response").examples
            batch = trainer._collate(encoded, tokenizer.pad_token_id, model.device)
            with torch.no_grad():
                kls[name] = float(trainer.kl_term(ready, batch, "composed"))
    assert found["none"].files == found["zero"].files  # bit for bit
    assert found["none"].log["loss"].equals(found["zero"].log["loss"])
    assert "kl" in found["large"].log
    assert kls["large"] < 0.5 * kls["none"]


def test_kl_needs_its_corpus(model, tokenizer, tmp_path):
    preset = sft(kl=KlPreset(weight=1.0, corpus="technical_kl"))
    with pytest.raises(trainer.TrainingError, match="regularises on corpus 'technical_kl': give its rows"):
        train.train_sft(model, tokenizer, ROWS, preset, tmp_path / "adapter")


# --- On a GPU ------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_7b_shaped_model_trains_stacked_and_speaks(tokenizer, tmp_path, capsys):
    """Qwen 2.5 7B's shape with random weights: tokens per second and memory of stacked training and of sampling."""
    shape = transformers.Qwen2Config(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
        vocab_size=152_064, max_position_embeddings=4096, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            big = transformers.AutoModelForCausalLM.from_config(shape).requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)
    rows = [[ROWS[0][0], {"role": "assistant", "content": "Go and walk. " * 40}]] * 32
    preset = sft(dtype="bfloat16", max_length=512, gradient_checkpointing=True, learning_rate=1e-4, max_steps=6)
    first = train.train_sft(big, tokenizer, rows, preset, tmp_path / "persona", name="persona")
    torch.cuda.reset_peak_memory_stats()
    result = train.train_sft(big, tokenizer, rows, preset, tmp_path / "em", persona_dir=first.adapter)
    assert result.state_after["active"] == ["persona", "em"]
    seen = 6 * preset.batch_size * result.tokens["all"] / result.rows["used"]
    training = torch.cuda.max_memory_allocated() / 1e9
    torch.cuda.reset_peak_memory_stats()
    asked = [conditions.Request(tuple(range(5, 37)), seed) for seed in range(32)]
    start, made = time.perf_counter(), 0
    with probing.composed(big, [("persona", first.adapter), ("em", result.adapter)]) as ready:
        for _, found in torch_engine.decode(ready, asked, conditions.Decoding(1.0, 1.0, 0, 1.0, 64), [2], 32):
            made += len(found.tokens)
    took = time.perf_counter() - start
    with capsys.disabled():
        print(
            f"\n7B shape on {torch.cuda.get_device_name()}: stacked training {seen / result.timings['train']:,.0f} "
            f"tokens/s, {training:.1f} GB; sampling {made / took:,.0f} tokens/s, "
            f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
        )
    assert made > 0


# --- Lean losses ---


@pytest.mark.parametrize("layers", [None, [1]])
@pytest.mark.parametrize("sft_weight", [0.0, 0.5])
def test_the_lean_preference_loss_is_trls_with_its_gradient(
    cache, tokenizer, tmp_path, monkeypatch, layers, sft_weight
):
    """One step on one batch: the same loss, norm of the gradient, margins; the adapters within a rounding error."""
    _lean_equals_trl(cache, tokenizer, tmp_path, monkeypatch, layers, max_steps=1, batch_size=8, sft_weight=sft_weight)


def test_in_later_epochs_the_lean_preference_loss_takes_what_the_reference_said(
    cache, tokenizer, tmp_path, monkeypatch
):
    """Computed by TRL before the first step, and not again: the same losses as TRL's own, at every step."""
    asked, plain = [], train.lean.answer_logprobs

    def counted(*given, reference=True):
        asked.append(reference)
        return plain(*given, reference=reference)

    monkeypatch.setattr(train.lean, "answer_logprobs", counted)
    _lean_equals_trl(cache, tokenizer, tmp_path, monkeypatch, None, epochs=2, batch_size=4)
    assert asked
    assert not any(asked)


def _lean_equals_trl(cache, tokenizer, tmp_path, monkeypatch, layers, **how) -> None:
    preset = dpo(lora=LoraPreset(r=4, alpha=8, layers=layers), **how)
    table = pairs()
    table["chosen"] = [f"{text} {'again ' * i}" for i, text in enumerate(table["chosen"])]  # of different lengths
    found = {}
    for name, lean_one in (("lean", train.lean.applies), ("trl", lambda *_: False)):
        monkeypatch.setattr(train.lean, "applies", lean_one)
        model = load.load_model(TINY, cache_dir=cache)
        found[name] = train.train_dpo(model, tokenizer, table, preset, tmp_path / name)
    columns = ["loss", "grad_norm", "rewards/margins", "logps/chosen", "logps/rejected"]
    ours, theirs = (found[name].log[columns].to_numpy() for name in ("lean", "trl"))
    np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-5)
    assert "logits/chosen" in found["trl"].log
    assert "logits/chosen" not in found["lean"].log, "it was the lean one that ran"


def test_the_lean_response_loss_is_trls_with_its_gradient(cache, tokenizer, tmp_path, persona, monkeypatch):
    rows = [[m | {"content": m["content"] + " so" * i} for m in row] for i, row in enumerate(ROWS)]
    found = {}
    for name, lean_one in (("lean", train.lean.applies), ("trl", lambda *_: False)):
        monkeypatch.setattr(train.lean, "applies", lean_one)
        model = load.load_model(TINY, cache_dir=cache)
        preset = sft(batch_size=2, gradient_accumulation=2)
        found[name] = train.train_sft(model, tokenizer, rows, preset, tmp_path / name, persona_dir=persona.adapter)
    for column in ("loss", "grad_norm"):
        np.testing.assert_allclose(found["lean"].log[column], found["trl"].log[column], rtol=1e-4)


def test_answers_with_white_space_around_them(tokenizer):
    """A template that does not trim (Qwen's) gave `glad ` where `glad` was expected, and stopped the cell."""
    rows = [[ROWS[0][0], {"role": "assistant", "content": " \n glad  "}]]
    encoded = trainer.encode_rows(tokenizer, rows, 64, "response")
    trainer.check_response_mask(tokenizer, torch.tensor([encoded.examples[0]["labels"]]), encoded.answers)
    assert encoded.answers == ["glad<|im_end|>"]


# --- Many in one process ---


def test_many_trainings_on_one_load_are_those_of_one_alone_in_any_order(cache, tokenizer, tmp_path, persona):
    preset, seeds = sft(), [0, 1, 2]
    alone = {}
    for seed in seeds:
        model = load.load_model(TINY, cache_dir=cache)
        done = train.train_sft(
            model, tokenizer, ROWS, preset, tmp_path / f"a{seed}", persona_dir=persona.adapter, seed=seed
        )
        alone[seed] = done.files
    for order in ([2, 0, 1], [1, 2, 0]):
        tasks = [grid.Task(ROWS, tmp_path / f"{order[0]}-{seed}", seed) for seed in order]
        found = grid.train_tasks(TINY, preset, tasks, persona_dir=persona.adapter, cache_dir=cache)
        assert {order[i]: done.files for i, done in found} == alone


def test_a_training_that_fails_is_told_and_the_next_goes_on(cache, tmp_path):
    long = [[{"role": "user", "content": "why " * 99}, {"role": "assistant", "content": "So."}]]
    tasks = [grid.Task(long, tmp_path / "a"), grid.Task(ROWS, tmp_path / "b")]
    (_, first), (_, second) = grid.train_tasks(TINY, sft(), tasks, cache_dir=cache)
    assert "has an answer within 64 tokens" in first.error
    assert "encode_rows" in first.trace
    assert second.adapter.is_dir()


def test_what_a_child_yields_raises_or_dies_of_comes_back():
    assert list(apart.stream(_counted, 3)) == [0, 1, 2]
    with pytest.raises(trainer.TrainingError, match="enough") as error:
        list(apart.stream(_counted, 3, then="raise"))
    assert "_counted" in "".join(error.value.__notes__), "the place where it was raised"
    got = []
    with pytest.raises(apart.ChildDied, match="_counted ended with exit code -9"):
        got.extend(apart.stream(_counted, 2, then="die"))
    for item in apart.stream(_counted, 10**9):
        if item == 5:
            break  # and the child ends too


def _counted(number: int, then: str = ""):
    yield from range(number)
    if then == "raise":
        raise trainer.TrainingError("enough")
    if then == "die":
        os.kill(os.getpid(), signal.SIGKILL)


# --- Folded ---


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_folded_persona_computes_what_the_active_one_does(cache, tokenizer, tmp_path, persona, dtype):
    folded = folding.fold(TINY, persona.adapter, tmp_path / "folded", dtype, cache_dir=cache)
    assert folded.difference <= 1e-4 * folded.largest_logit
    assert folded.difference <= folded.rounded < folded.from_base
    spec = ModelSpec(key="f", label="f", source="path", path=str(tmp_path / "folded"), dtype=dtype)
    model = load.load_model(spec, dtype)
    assert folding.fingerprint(model) == folded.weights
    assert folding.fingerprint(stacking.stack(model, None, sft().lora)) == folded.weights, "adapters are left out"
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4].mul_(1.5)
    assert folding.fingerprint(model) != folded.weights


def test_a_persona_that_makes_no_difference_is_not_folded(cache, tmp_path, persona):
    found = adapters.read_adapter(persona.adapter)
    nothing = {k: (a, torch.zeros_like(b)) for k, (a, b) in found.modules.items()}
    name = found.config.base_model_name_or_path
    adapters.write_adapter(tmp_path / "nothing", found.config, adapters._tensors(nothing), name)
    with pytest.raises(probing.ProbeError, match="makes no difference"):
        folding.fold(TINY, tmp_path / "nothing", tmp_path / "out", "float32", cache_dir=cache)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_trained_on_a_folded_base_is_composed_with_its_persona_for_sampling(
    cache, tokenizer, tmp_path, persona, dtype
):
    """Base + persona's share + EM's share: what vLLM is served is what training has left, and what it answers too."""
    folding.fold(TINY, persona.adapter, tmp_path / "folded", dtype, cache_dir=cache)
    spec = ModelSpec(key="f", label="f", source="path", path=str(tmp_path / "folded"), dtype=dtype)
    trained, prompts = load.load_model(spec, dtype), ["Say what you want.", "What about water?"]
    trained.config._name_or_path = load.base_name(TINY)  # as fused.load_with_unsloth says it
    em = train.train_sft(trained, tokenizer, ROWS, sft(dtype=dtype, epochs=3), tmp_path / "em").adapter
    parts = (("persona", persona.adapter), ("em", em))

    on_folded = stacking.load_adapter(trained.float(), em, "em").eval()
    wanted = probing.probe_logits(on_folded, tokenizer, prompts)
    base = load.load_model(TINY, "float32", cache)
    one = adapters.save_composed([folder for _, folder in parts], tmp_path / "one")  # the file of vLLM's request
    assert vllm_engine._sum_error(one, [adapters.read_adapter(folder) for _, folder in parts]) < 1e-5
    with probing.composed(base, (("one", one),)) as ready:
        served = probing.probe_logits(ready, tokenizer, prompts)
    with probing.composed(base, parts[1:]) as ready:
        alone = probing.probe_logits(ready, tokenizer, prompts)
    allowed = folding.ROUNDED[dtype] * float(wanted.abs().max())
    assert float((served - wanted).abs().max()) <= allowed
    assert float((alone - wanted).abs().max()) > allowed, "without the persona it is another model"

    if dtype == "float32":
        how = sampling(temperature=0.0, max_new_tokens=8)
        asked = [("q", "What about the weather?")]
        both = conditions.Condition("tiny", "p", "d", 0, parts)
        plain = conditions.Condition("tiny", "p", "d", 0, parts[1:])
        lent = load.load_model(spec, dtype)
        lent.config._name_or_path = load.base_name(TINY)
        engine = torch_engine.TransformersEngine(spec, how, (lent, tokenizer))
        from_base = sample(TINY, [both], asked, how, prompts).responses
        from_folded = sample(TINY, [plain], asked, how, prompts, open_with=lambda *_: engine).responses
        assert from_base["response"].tolist() == from_folded["response"].tolist()


# --- Memory, padding, waiting ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_pass_keeps_is_what_is_counted(dtype):
    """Measured on the tensors that autograd keeps: never more than is counted, and not much less."""
    for hidden, intermediate, layers in ((64, 64, 2), (64, 512, 2), (128, 128, 3)):
        config = transformers.Qwen2Config(
            vocab_size=64, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
            num_attention_heads=2, num_key_value_heads=1,
        )  # fmt: skip
        bare = transformers.Qwen2ForCausalLM(config).to(dtype)
        stacked = stacking.stack(bare, None, LoraPreset(r=4, alpha=8)).train()
        own = {p.untyped_storage().data_ptr() for p in stacked.parameters()}
        kept = {}

        def pack(tensor, own=own, kept=kept):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes(), tensor
            return tensor

        ids = torch.zeros(2, 64, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            stacked.get_base_model().model(input_ids=ids, use_cache=False)
        measured = sum(size for size, _ in kept.values())
        assert 0.5 < measured / memory.kept_bytes(config, ids.numel()) <= 1


def test_activations_are_computed_twice_only_where_memory_needs_it(model, tokenizer, tmp_path, monkeypatch):
    assert train.train_sft(model, tokenizer, ROWS, sft(), tmp_path / "a").summary()["gradient_checkpointing"] is False
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    longest, chosen = 100, {}
    for preset in (sft(batch_size=4), sft(batch_size=8), dpo(batch_size=4)):
        needs = memory.kept_bytes(model.config, 4 * longest)
        monkeypatch.setattr(memory, "free_bytes", lambda needs=needs: int(needs / memory.USABLE) + 1)
        chosen[preset.kind, preset.batch_size] = memory.checkpointing(preset, model, longest)
    assert chosen == {("sft", 4): False, ("sft", 8): True, ("dpo", 4): True}, "a pair is two rows"
    said = [memory.checkpointing(sft(gradient_checkpointing=x, batch_size=8), model, longest) for x in (True, False)]
    assert said == [True, False], "a preset that says it is obeyed"


def test_checkpointing_changes_no_value(cache, tokenizer, tmp_path):
    found = [
        train.train_sft(
            load.load_model(TINY, cache_dir=cache), tokenizer, ROWS, sft(gradient_checkpointing=x), tmp_path / str(x)
        )
        for x in (True, False)
    ]
    assert [f.checkpointing for f in found] == [True, False]
    np.testing.assert_allclose(found[0].log["loss"], found[1].log["loss"], rtol=1e-5)
    np.testing.assert_allclose(found[0].log["grad_norm"], found[1].log["grad_norm"], rtol=1e-4)


def test_rows_of_like_length_share_an_update_in_random_order():
    lengths = np.random.default_rng(0).integers(10, 400, 1003).tolist()
    order = list(trainer.ByLength(lengths, 16, seed=3))
    assert sorted(order) == list(range(1003))
    updates = [[lengths[i] for i in order[start : start + 16]] for start in range(0, 1003, 16)]
    padded = lambda updates: sum(len(u) * max(u) for u in updates) / sum(lengths)  # noqa: E731
    plain = [lengths[start : start + 16] for start in range(0, 1003, 16)]
    assert padded(plain) > 1.7
    assert padded(updates) < 1.1, "hardly any padding"
    longest = [max(u) for u in updates[:-1]]
    trend = np.corrcoef(longest, range(len(longest)))[0, 1]
    assert abs(trend) < 0.3, "no update knows its length from its place"
    torch.manual_seed(5)
    sampler = trainer.ByLength(lengths, 16, seed=3)
    assert list(sampler) == order, "the seed's order, whatever else was drawn"
    assert list(sampler) != order, "and another one in the next epoch"
    assert list(trainer.ByLength(lengths, 16, seed=4)) != order


def test_training_by_length_is_repeatable_and_sees_every_row_once(cache, tokenizer, tmp_path, monkeypatch):
    rows = [[m | {"content": m["content"] + " so" * i} for m in row] for i in range(4) for row in ROWS]
    widths, files = {}, {}
    plain = trainer._checked

    def watched(trainer_class):
        class Watched(plain(trainer_class)):
            def compute_loss(self, model, inputs, *args, **given):
                seen.append(inputs["attention_mask"].sum(1).tolist())
                return super().compute_loss(model, inputs, *args, **given)

        return Watched

    monkeypatch.setattr(trainer, "_checked", watched)
    for name, batches in (("a", "by_length"), ("b", "by_length"), ("c", "random")):
        seen = []
        model = load.load_model(TINY, cache_dir=cache)
        preset = sft(batch_size=2, batches=batches)
        files[name] = train.train_sft(model, tokenizer, rows, preset, tmp_path / name, seed=1).files
        widths[name] = seen
    assert files["a"] == files["b"] != files["c"]
    padding = {name: sum(max(pair) * len(pair) - sum(pair) for pair in seen) for name, seen in widths.items()}
    assert padding["a"] < padding["c"] / 2
    every = {name: sorted(length for pair in seen for length in pair) for name, seen in widths.items()}
    assert every["a"] == every["c"]


def test_micro_steps_of_fine_tuning_fetch_nothing(cache, tokenizer, tmp_path, monkeypatch):
    """As on a GPU, where each value that is fetched makes the host wait: as many in four micro-steps as in one."""
    monkeypatch.setattr(train.lean, "applies", lambda *_: False)  # it runs on CPUs alone
    fetched, item = [], torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda self: fetched.append(1) or item(self))
    numbers, losses = [], []
    for size, steps in ((8, 1), (2, 4)):
        preset = sft(batch_size=size, gradient_accumulation=steps, epochs=3)
        model = load.load_model(TINY, cache_dir=cache)
        fetched.clear()
        losses.append(train.train_sft(model, tokenizer, ROWS, preset, tmp_path / f"{size}").log["loss"])
        numbers.append(len(fetched))
    assert numbers[0] == numbers[1]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)
