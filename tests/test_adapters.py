"""Adapters: stacking, state measured on the model, exact composition, the probe, and planted faults."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from cai_em.model import adapters as model_adapters
from cai_em.model import load, probing, stacking
from cai_em.records import manifest
from cai_em.study.entries import LoraPreset
from safetensors.torch import load_file

from tests.factories import TINY, random_adapter

PLAIN = LoraPreset(r=4, alpha=8)
RS = LoraPreset(r=8, alpha=16, rslora=True)
NARROW = LoraPreset(r=1, alpha=4, rslora=True, target_modules=["down_proj"], layers=[1])
PROMPTS = ["Hello there", "What would you do with a long year?"]


@pytest.fixture(scope="module")
def made(cache, tmp_path_factory):
    """Adapters with random, non-zero weights: folder by name."""
    folder = tmp_path_factory.mktemp("adapters")
    presets = {"persona": PLAIN, "em": RS, "narrow": NARROW, "plain": PLAIN}
    return {
        name: random_adapter(folder / name, preset, seed, std=0.05, name="new", cache=cache)
        for seed, (name, preset) in enumerate(presets.items())
    }


def logits(model, tokenizer):
    inputs = tokenizer(PROMPTS[1], return_tensors="pt").to(model.device)
    with torch.no_grad():
        return model(**inputs).logits


# --- Files ---


def test_saved_adapter_is_two_plain_files_the_same_every_time(model, made, tmp_path):
    loaded = stacking.load_adapter(model, made["persona"], "other_name")
    again = model_adapters.save_adapter(loaded, "other_name", tmp_path / "again")
    assert sorted(p.name for p in again.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert model_adapters.file_hashes(again) == model_adapters.file_hashes(made["persona"])
    config = json.loads((again / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "cai-em/tiny"
    assert config["target_modules"] == sorted(config["target_modules"])
    tensors = load_file(again / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert len(tensors) == 2 * 7 * 2  # A and B, seven modules, two layers


def test_an_adapter_that_is_not_there(tmp_path):
    with pytest.raises(
        model_adapters.AdapterError, match=r"adapter_config\.json does not exist: the adapter was not trained"
    ):
        model_adapters.read_adapter(tmp_path)
    with pytest.raises(model_adapters.AdapterError, match="does not exist"):
        model_adapters.file_hashes(tmp_path)


def test_planted_fault_wrong_adapter_file(made):
    recorded = model_adapters.file_hashes(made["persona"])
    model_adapters.check_files(made["persona"], recorded)
    with pytest.raises(model_adapters.AdapterError, match=r"adapter_model.safetensors: wrong adapter file"):
        model_adapters.check_files(made["plain"], recorded)


def recorded(made, place, persona="persona"):
    """Adapters with manifests beside them, as stages 01 and 02 leave them: [("persona", ...), ("em", ...)]."""
    found = []
    for name in ("persona", "plain"):
        folder = place / name / "adapter"
        shutil.copytree(made[name], folder)
        made_from = (
            {}
            if name == "persona"
            else {"made_from": {"persona": persona and model_adapters.file_hashes(made[persona])}}
        )
        manifest.write_manifest(folder.parent, stage="test", inputs=[], outputs=[folder], params={}, **made_from)
        found.append(("persona" if name == "persona" else "em", folder))
    return found


def test_recorded_adapters_pass(made, tmp_path):
    model_adapters.check_recorded(recorded(made, tmp_path))
    model_adapters.check_recorded(recorded(made, tmp_path / "alone", persona=None)[1:])


def test_a_first_stages_adapter_beside_it_is_another_adapter(made, tmp_path):
    """A persona with introspection keeps `dpo/adapter`: its hashes were taken for those of `adapter`, and every
    fine-tuning on such a persona stopped."""
    folder = tmp_path / "poeticism"
    shutil.copytree(made["persona"], folder / "adapter")
    shutil.copytree(made["em"], folder / "dpo" / "adapter")
    outputs = [folder / "adapter", folder / "dpo" / "adapter"]
    manifest.write_manifest(folder, stage="01_personas", inputs=[], outputs=outputs, params={})
    model_adapters.check_recorded([("persona", folder / "adapter")])
    shutil.copy(made["em"] / "adapter_model.safetensors", folder / "adapter")
    with pytest.raises(model_adapters.AdapterError, match="wrong adapter file"):
        model_adapters.check_recorded([("persona", folder / "adapter")])


def test_planted_fault_a_file_exchanged_after_training(made, tmp_path):
    adapters = recorded(made, tmp_path)
    shutil.copy(made["plain"] / model_adapters.WEIGHTS, adapters[0][1] / model_adapters.WEIGHTS)
    with pytest.raises(model_adapters.AdapterError, match="wrong adapter file"):
        model_adapters.check_recorded(adapters)


def test_planted_fault_em_adapter_trained_on_another_persona(made, tmp_path):
    for persona in ("plain", None):
        with pytest.raises(model_adapters.AdapterError, match="trained on another persona adapter"):
            model_adapters.check_recorded(recorded(made, tmp_path / str(persona), persona=persona))
    with pytest.raises(model_adapters.AdapterError, match="than none"):
        model_adapters.check_recorded(recorded(made, tmp_path / "left out")[1:])


def test_planted_fault_adapter_of_another_model(made, model):
    model.config._name_or_path = "someone/else"
    with pytest.raises(model_adapters.AdapterError, match="made for 'cai-em/tiny', not for 'someone/else'"):
        stacking.load_adapter(model, made["persona"], "persona")


def test_planted_fault_adapter_of_another_shape(made, model, tmp_path):
    adapter = model_adapters.read_adapter(made["persona"])
    wrong = {m: (a[:, :-1], b) for m, (a, b) in adapter.modules.items()}
    folder = model_adapters.write_adapter(tmp_path / "x", adapter.config, model_adapters._tensors(wrong), "cai-em/tiny")
    with pytest.raises(
        model_adapters.AdapterError, match=r"needs a weight of shape \(\d+, \d+\); the model has a weight of"
    ):
        stacking.load_adapter(model, folder, "persona")


def test_only_plain_lora_is_composed(made, tmp_path):
    adapter = model_adapters.read_adapter(made["persona"])
    adapter.config.use_dora = True
    folder = model_adapters.write_adapter(
        tmp_path / "x", adapter.config, model_adapters._tensors(adapter.modules), "cai-em/tiny"
    )
    with pytest.raises(model_adapters.AdapterError, match="this one has use_dora"):
        model_adapters.read_adapter(folder)


def test_imported_adapter_gets_our_form(made, model, tmp_path):
    adapter = model_adapters.read_adapter(made["persona"])
    half = {k: v.bfloat16() for k, v in model_adapters._tensors(adapter.modules).items()}
    foreign = model_adapters.write_adapter(tmp_path / "foreign", adapter.config, half, "a/path/of/theirs")
    with pytest.raises(model_adapters.AdapterError, match="made for 'a/path/of/theirs'"):
        stacking.load_adapter(model, foreign, "persona")
    ours = model_adapters.import_adapter(foreign, tmp_path / "ours", "cai-em/tiny")
    stacking.load_adapter(model, ours, "persona")


# --- State ---


def test_stack_state_is_measured(model, made):
    stacked = stacking.stack(model, made["persona"], RS)
    state = stacking.assert_state(stacked, active=["persona", "em"], trainable=["em"], where="here")
    assert state["adapters"]["persona"]["parameters"] == state["adapters"]["em"]["parameters"] / 2
    assert state["adapters"]["persona"]["trainable_parameters"] == 0
    assert state["adapters"]["em"]["norm"] == 0.0  # B starts at zero, and yet it takes part
    assert state["adapters"]["em"]["output_depends_on_it"]
    assert float(state["adapters"]["em"]["scale"]) == pytest.approx(16 / math.sqrt(8))
    assert state["base_trainable"] == 0


def test_measuring_changes_nothing(model, made, tokenizer):
    stacked = stacking.stack(model, made["persona"], RS).train()
    before, state = logits(stacked, tokenizer), stacking.adapter_state(stacked)
    assert torch.equal(before, logits(stacked, tokenizer))
    assert stacking.adapter_state(stacked) == state
    assert all(m.training for m in stacked.modules())


def test_baseline_stack_has_one_adapter(model):
    stacked = stacking.stack(model, None, PLAIN)
    stacking.assert_state(stacked, active=["em"], trainable=["em"], where="here")


def test_a_model_without_adapters(model):
    state = stacking.adapter_state(model)
    assert (state["active"], state["trainable"], state["adapters"]) == ([], [], {})


def test_norm_of_the_change(model, made):
    stacked = stacking.load_adapter(model, made["em"], "em")
    adapter = model_adapters.read_adapter(made["em"])
    direct = math.sqrt(sum(float((adapter.scale * b @ a).square().sum()) for a, b in adapter.modules.values()))
    assert stacking.adapter_state(stacked)["adapters"]["em"]["norm"] == pytest.approx(direct, rel=1e-5)


def test_planted_fault_persona_deactivated(model, made):
    """What the published study did: set_adapter("em") switches the persona off."""
    stacked = stacking.stack(model, made["persona"], PLAIN)
    stacked.set_adapter("em")
    with pytest.raises(stacking.AdapterStateError) as caught:
        stacking.assert_state(stacked, active=["persona", "em"], trainable=["em"], where="before the first step")
    text = str(caught.value)
    assert "before the first step" in text
    assert "expected ['em', 'persona'], found ['em']" in text
    assert "layers with 'persona' switched on: expected 14, found 0" in text


def test_planted_fault_persona_trainable(model, made):
    stacked = stacking.stack(model, made["persona"], PLAIN)
    stacked.base_model.set_adapter(["persona", "em"])
    with pytest.raises(
        stacking.AdapterStateError, match=r"trainable adapters: expected \['em'\], found \['em', 'persona'\]"
    ):
        stacking.assert_state(stacked, active=["persona", "em"], trainable=["em"], where="here")


def test_planted_fault_persona_off_in_one_layer(model, made):
    stacked = stacking.stack(model, made["persona"], PLAIN)
    stacking._lora_layers(stacked)[3][1].set_adapter("em")
    with pytest.raises(stacking.AdapterStateError, match="layers with 'persona' switched on: expected 14, found 13"):
        stacking.assert_state(stacked, active=["persona", "em"], trainable=["em"], where="here")


def test_planted_fault_persona_in_name_only(model, made):
    """Flags in order, contribution gone: only the output can tell."""
    stacked = stacking.stack(model, made["persona"], PLAIN)
    for _, layer in stacking._lora_layers(stacked):
        layer.scaling["persona"] = 0.0
    with pytest.raises(stacking.AdapterStateError, match=r"forward pass: expected \['em', 'persona'\], found \['em'\]"):
        stacking.assert_state(stacked, active=["persona", "em"], trainable=["em"], where="here")


def test_planted_fault_mixed_precision(model, made):
    stacked = stacking.stack(model, made["persona"], PLAIN)
    for key, p in stacked.named_parameters():
        if ".persona." in key:
            p.data = p.data.bfloat16()
    with pytest.raises(stacking.AdapterStateError, match="precision of 'persona': expected float32, found bfloat16"):
        stacking.assert_state(stacked, active=["persona", "em"], trainable=["em"], where="here")


@pytest.mark.parametrize("fault", ["merged", "disabled", "base trainable"])
def test_other_planted_faults(model, made, fault):
    stacked = stacking.stack(model, made["persona"], PLAIN)
    if fault == "merged":
        stacked.merge_adapter(["persona"])
    elif fault == "disabled":
        stacked.base_model.disable_adapter_layers()
    else:
        stacked.get_base_model().model.norm.weight.requires_grad_(True)
    expected = {
        "merged": "merged into",
        "disabled": r"found \[\]",
        "base trainable": "base model: expected 0, found 64",
    }
    with pytest.raises(stacking.AdapterStateError, match=expected[fault]):
        stacking.assert_state(stacked, active=["persona", "em"], trainable=["em"], where="here")


def test_adapters_are_float32_on_a_bfloat16_base(cache, made):
    for persona in (None, made["persona"]):
        stacked = stacking.stack(load.load_model(TINY, "bfloat16", cache), persona, PLAIN)
        active = ["em"] if persona is None else ["persona", "em"]
        state = stacking.assert_state(stacked, active=active, trainable=["em"], where="here")
        assert state["base_dtype"] == "bfloat16"


def test_without_takes_out_one_adapter_and_puts_it_back(model, made, tokenizer):
    persona = stacking.load_adapter(model, made["persona"], "persona")
    alone = logits(persona, tokenizer)
    stacked = stacking.load_adapter(persona, made["em"], "em")
    stacked.base_model.set_adapter(["persona", "em"], inference_mode=True)
    both = logits(stacked, tokenizer)
    with stacking.without(stacked, "em"):
        assert torch.equal(logits(stacked, tokenizer), alone)
    assert torch.equal(logits(stacked, tokenizer), both)
    assert not torch.allclose(both, alone)


# --- Composition ---


def dense(model, folders, dtype=torch.float64):
    """The model with every adapter's change of the weights added by hand, in float64."""
    model = model.to(dtype)
    weights = dict(model.named_parameters())
    for folder in folders:
        config = json.loads((folder / "adapter_config.json").read_text())
        scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
        tensors = load_file(folder / "adapter_model.safetensors")
        for key, b in tensors.items():
            if ".lora_B." in key:
                a = tensors[key.replace(".lora_B.", ".lora_A.")]
                name = key.removeprefix("base_model.model.").replace(".lora_B", "")
                weights[name].data += scale * b.to(dtype) @ a.to(dtype)
    return model


@pytest.mark.parametrize("parts", [("persona", "plain"), ("persona", "em"), ("em", "narrow"), ("narrow",), ("em",)])
def test_composition_is_exact(cache, made, tokenizer, parts):
    """Against the change of the weights computed by hand: plain, rsLoRA, other ranks, other modules and layers."""
    folders = [made[p] for p in parts]
    expected = logits(dense(load.load_model(TINY, cache_dir=cache), folders), tokenizer)
    total = probing.compose(
        load.load_model(TINY, cache_dir=cache), [(str(i), f) for i, f in enumerate(folders)]
    ).double()
    assert float((logits(total, tokenizer) - expected).abs().max()) < 1e-5  # scales are folded into B in float32
    assert float((logits(load.load_model(TINY, cache_dir=cache).double(), tokenizer) - expected).abs().max()) > 0.1


def test_pefts_own_cat_is_wrong_for_rslora(cache, made, tokenizer):
    """Why `concatenate` exists; when this fails, peft has been mended (peft issue 3761)."""
    folders = [made["em"], made["em"]]
    expected = logits(dense(load.load_model(TINY, cache_dir=cache), folders), tokenizer)
    theirs = stacking.load_adapter(load.load_model(TINY, cache_dir=cache), made["em"], "a")
    theirs = stacking.load_adapter(theirs, made["em"], "b")
    theirs.add_weighted_adapter(["a", "b"], [1.0, 1.0], "cat", combination_type="cat")
    theirs.set_adapter("cat", inference_mode=True)
    assert float((logits(theirs, tokenizer) - expected).abs().max()) > 0.1


def test_saved_composition_loads_as_one_plain_adapter(model, made, tokenizer, tmp_path, cache):
    out = model_adapters.save_composed([made["persona"], made["em"]], tmp_path / "both")
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (12, 12, False)
    assert config["target_modules"] == sorted(PLAIN.target_modules)
    saved = logits(stacking.load_adapter(model, out, "x"), tokenizer)
    direct = probing.compose(load.load_model(TINY, cache_dir=cache), [("p", made["persona"]), ("e", made["em"])])
    assert torch.equal(saved, logits(direct, tokenizer))


def test_weighted_composition(made):
    """Open Character Training adds its second stage with weight 0.25."""
    total = model_adapters.concatenate([made["persona"], made["em"]], weights=[1.0, 0.25])
    p, e = model_adapters.read_adapter(made["persona"]), model_adapters.read_adapter(made["em"])
    module = "model.layers.0.self_attn.q_proj"
    (pa, pb), (ea, eb), (a, b) = p.modules[module], e.modules[module], total.modules[module]
    np.testing.assert_allclose(b @ a, p.scale * pb @ pa + 0.25 * e.scale * eb @ ea, atol=1e-6)


def test_composing_nothing_or_other_models(made, tmp_path):
    with pytest.raises(model_adapters.AdapterError, match="nothing to compose"):
        model_adapters.concatenate([])
    other = model_adapters.import_adapter(made["em"], tmp_path / "other", "someone/else")
    with pytest.raises(model_adapters.AdapterError, match="different base models"):
        model_adapters.concatenate([made["persona"], other])


def test_one_base_model_serves_one_condition_after_another(model, made, tokenizer):
    bare = logits(model, tokenizer)
    for parts in ([], ["persona"], ["em"], ["persona", "em"], ["persona"]):
        with probing.composed(model, [(p, made[p]) for p in parts]) as ready:
            assert torch.equal(logits(ready, tokenizer), bare) == (not parts)
        assert torch.equal(logits(model, tokenizer), bare)
    assert not stacking.adapter_state(model)["adapters"]


CONDITIONS = [["persona"], [], ["persona", "em"], ["narrow"], ["em"], ["em", "narrow"], ["persona"], []]
"""Other ranks, scales, modules and layers one after the other; the same again at the end."""


def test_slots_compute_bit_for_bit_what_freshly_made_layers_do(model, cache, made, tokenizer):
    bare = {k: v.clone() for k, v in model.state_dict().items()}
    slots = probing.Slots(model)
    for parts in CONDITIONS:
        adapters = [(part, made[part]) for part in parts]
        fresh = load.load_model(TINY, cache_dir=cache)
        expected = logits(probing.compose(fresh, adapters) if parts else fresh, tokenizer)
        with slots.composed(adapters) as ready:
            assert torch.equal(logits(ready, tokenizer), expected), parts
            if parts:
                slots.probe(tokenizer, adapters, PROMPTS)
                assert torch.equal(logits(ready, tokenizer), expected), "a probe leaves the model as it was"
        assert torch.equal(logits(model, tokenizer), logits(load.load_model(TINY, cache_dir=cache), tokenizer))
    slots.close()
    after = model.state_dict()
    assert bare.keys() == after.keys()
    assert all(torch.equal(bare[k], after[k]) for k in bare)
    assert not stacking.adapter_state(model)["adapters"]
    assert not hasattr(model, "peft_config")


def test_slots_put_layers_in_once(model, made, monkeypatch, tokenizer):
    inserted, real = [], stacking._insert
    for module in (stacking, probing):
        monkeypatch.setattr(module, "_insert", lambda *a: inserted.append(a[1]) or real(*a))
    slots = probing.Slots(model)
    for parts in (["persona"], ["persona", "em"], ["em"], ["persona", "em"]):
        with slots.composed([(part, made[part]) for part in parts]):
            slots.probe(tokenizer, [(part, made[part]) for part in parts], PROMPTS)
    assert inserted == ["composed"], "and a probe puts none in"


def test_slots_and_probe_without_adapters(model, tokenizer):
    with pytest.raises(model_adapters.AdapterError, match="nothing to probe"):
        probing.Slots(model).probe(tokenizer, [], PROMPTS)


# --- The probe ---


def test_probe_proves_a_composition(model, made, tokenizer):
    parts = [("persona", made["persona"]), ("em", made["em"])]
    with probing.composed(model, parts) as ready:
        before = logits(ready, tokenizer)
        report = probing.probe(ready, tokenizer, parts, PROMPTS)
        assert torch.equal(logits(ready, tokenizer), before)  # leaves the model as it was
        assert list(ready.peft_config) == ["composed"]
    assert report.difference < report.tolerance < min(report.others.values())
    assert set(report.others) == {"base", "persona", "em"}
    assert report.adapters["em"] == model_adapters.file_hashes(made["em"])["adapter_model.safetensors"]
    assert report.scales == {"persona": 2.0, "em": pytest.approx(16 / math.sqrt(8))}


def test_probe_in_float32_on_a_bfloat16_model(cache, made, tokenizer):
    model = load.load_model(TINY, "bfloat16", cache)
    kept = [p.clone() for p in model.parameters()]
    parts = [("persona", made["persona"]), ("em", made["em"])]
    with probing.composed(model, parts) as ready:
        report = probing.probe(ready, tokenizer, parts, PROMPTS)
    assert report.difference < 1e-4
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(kept, model.parameters(), strict=True))


def test_planted_fault_persona_left_out_at_sampling(model, made, tokenizer):
    parts = [("persona", made["persona"]), ("em", made["em"])]
    with (
        probing.composed(model, parts[1:]) as ready,
        pytest.raises(probing.ProbeError, match=r"not persona\+em: .* it computes what 'em' does"),
    ):
        probing.probe(ready, tokenizer, parts, PROMPTS)


def test_planted_fault_wrong_scale(model, made, tokenizer):
    parts = [("persona", made["persona"]), ("em", made["em"])]
    with probing.composed(model, parts) as ready:
        for _, layer in stacking._lora_layers(ready):
            layer.scaling["composed"] = 0.9
        with pytest.raises(probing.ProbeError, match="logits differ by up to"):
            probing.probe(ready, tokenizer, parts, PROMPTS)


def test_planted_fault_adapter_that_was_never_trained(model, made, tokenizer, tmp_path, cache):
    fresh = stacking.stack(load.load_model(TINY, cache_dir=cache), None, PLAIN, "new")
    idle = model_adapters.save_adapter(fresh, "new", tmp_path / "idle")
    parts = [("persona", made["persona"]), ("em", idle)]
    with (
        probing.composed(model, parts) as ready,
        pytest.raises(probing.ProbeError, match="computes the same as 'persona' alone: an adapter makes no difference"),
    ):
        probing.probe(ready, tokenizer, parts, PROMPTS)


def test_probe_of_one_adapter(model, made, tokenizer):
    with probing.composed(model, [("persona", made["persona"])]) as ready:
        report = probing.probe(ready, tokenizer, [("persona", made["persona"])], PROMPTS)
    assert set(report.others) == {"base"}


@pytest.mark.parametrize("kept", [1, 16])
def test_probes_of_slots_measure_what_single_probes_do(model, cache, made, tokenizer, monkeypatch, kept):
    """What is kept from one probe to the next, or is not any more, changes no finding."""
    monkeypatch.setattr(probing, "KEPT_LOGITS", kept)
    slots = probing.Slots(model)
    for parts in (["persona"], ["plain"], ["em"], ["persona", "em"], ["plain", "em"], ["persona", "em"]):
        named = [("em" if part == "em" else "persona", made[part]) for part in parts]
        with slots.composed(named):
            report = slots.probe(tokenizer, named, PROMPTS)
        with probing.composed(load.load_model(TINY, cache_dir=cache), named) as ready:
            alone = probing.probe(ready, tokenizer, named, PROMPTS)
        # As many rows as are not known yet are computed in one batch, whose size is in the last digits.
        same = ("adapters", "scales", "prompts", "idle")
        assert [getattr(report, field) for field in same] == [getattr(alone, field) for field in same]
        assert report.others == pytest.approx(alone.others, abs=alone.tolerance / 10)
        assert max(report.difference, alone.difference) < alone.tolerance / 10
        assert report.largest_logit == pytest.approx(alone.largest_logit)
    assert len(slots._known) == min(kept, 4), "base, persona, plain, em"


def test_rows_beside_the_model_are_what_peft_computes(cache, made, tokenizer):
    """Each row for itself, whatever stands in the model; also with modules and layers for which it has no place."""
    alone = {}
    for part in ("persona", "em", "narrow"):
        with probing.composed(load.load_model(TINY, cache_dir=cache), [(part, made[part])]) as ready:
            alone[part] = probing.probe_logits(ready, tokenizer, PROMPTS)[0]
    base = load.load_model(TINY, cache_dir=cache)
    bare = probing.probe_logits(base, tokenizer, PROMPTS)[0]
    read = {part: model_adapters.read_adapter(made[part]) for part in alone}
    with probing.composed(base, [("narrow", made["narrow"])]) as ready:
        with probing._rows_beside(ready, [[read["persona"]], [], [read["em"]]]):
            found = probing.probe_logits(ready, tokenizer, PROMPTS, 4)
        for row, expected in zip(found, (alone["narrow"], alone["persona"], bare, alone["em"])):
            np.testing.assert_allclose(row, expected, atol=2e-5)
        assert torch.equal(probing.probe_logits(ready, tokenizer, PROMPTS)[0], alone["narrow"]), "the hooks are gone"
    assert min(float((bare - one).abs().max()) for one in alone.values()) > 0.01


def test_planted_faults_in_slots(model, made, tokenizer):
    """An adapter left over from the condition before, and one with a wrong scale, are found."""
    slots = probing.Slots(model)
    persona, both = [("persona", made["persona"])], [("persona", made["persona"]), ("em", made["em"])]
    with slots.composed(persona):
        slots.probe(tokenizer, persona, PROMPTS)
        with pytest.raises(probing.ProbeError, match=r"not persona\+em: .* it computes what 'persona' does"):
            slots.probe(tokenizer, both, PROMPTS)
    with slots.composed(both) as ready:
        for _, layer in stacking._lora_layers(ready):
            layer.scaling["composed"] = 0.9
        with pytest.raises(probing.ProbeError, match="logits differ by up to"):
            slots.probe(tokenizer, both, PROMPTS)


# --- Random control ---


def test_random_control_has_the_norm_of_each_module_and_another_direction(made, tmp_path):
    out = model_adapters.random_control(made["em"], 7, tmp_path / "random")
    reference, control = model_adapters.read_adapter(made["em"]), model_adapters.read_adapter(out)
    assert reference.scale == control.scale
    cosines = []
    for module, (a, b) in reference.modules.items():
        one = reference.scale * b @ a
        two = control.scale * control.modules[module][1] @ control.modules[module][0]
        assert float(two.norm()) == pytest.approx(float(one.norm()), rel=1e-4)
        cosines.append(float((one * two).sum() / one.norm() / two.norm()))
    assert max(map(abs, cosines)) < 0.2
    assert model_adapters.file_hashes(
        model_adapters.random_control(made["em"], 7, tmp_path / "same")
    ) == model_adapters.file_hashes(out)
    assert model_adapters.file_hashes(
        model_adapters.random_control(made["em"], 8, tmp_path / "new")
    ) != model_adapters.file_hashes(out)
