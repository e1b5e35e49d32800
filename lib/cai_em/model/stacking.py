"""Adapters stacked in one model: which are active and which are trainable, measured on the parameters."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from cai_em.model.adapters import AdapterError, AdapterFiles, _delta_norm, _modules, _plain, check_fits, read_adapter
from cai_em.study.entries import LoraPreset

PERSONA, EM, COMPOSED = "persona", "em", "composed"
"""Names of the adapters in a model."""


class AdapterStateError(AdapterError):
    """The adapters of a model are not in the state that is required. The message says what was expected and found."""


# --- Stacking, for training ----------------------------------------------------------------------------------------


def lora_config(preset: LoraPreset) -> LoraConfig:
    """peft's configuration for a preset."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=preset.r,
        lora_alpha=preset.alpha,
        lora_dropout=preset.dropout,
        use_rslora=preset.rslora,
        target_modules=list(preset.target_modules),
        layers_to_transform=preset.layers,
        bias="none",
    )


def load_adapter(model: nn.Module, folder: str | Path, name: str) -> PeftModel:
    """Load an adapter under a name: active if it is the model's first, frozen, in float32.

    Raises:
        AdapterError: its files are not whole, or it was made for another model.
    """
    adapter = read_adapter(folder)
    check_fits(adapter, model)
    return _insert(model, name, adapter.config, adapter.modules)


def _insert(model: nn.Module, name: str, config: LoraConfig, modules: Mapping[str, tuple[Tensor, Tensor]]) -> PeftModel:
    """Put an adapter with the given tensors into a model, frozen. Draws no random numbers."""
    base_name = _plain(model).config._name_or_path
    mine = dataclasses.replace(config, inference_mode=True, base_model_name_or_path=base_name, init_lora_weights=False)
    how = {"low_cpu_mem_usage": True, "autocast_adapter_dtype": False}  # what peft makes is replaced: nothing to fill
    with no_init_weights():
        if isinstance(model, PeftModel):
            model.add_adapter(name, mine, **how)
        else:
            model = PeftModel(model, mine, adapter_name=name, **how)
    mine.init_lora_weights = config.init_lora_weights  # as it will be saved
    layers = _places(model, name)
    if set(layers) != set(modules):
        places, tensors = len(set(layers) - set(modules)), len(set(modules) - set(layers))
        raise AdapterError(f"adapter {name!r}: {tensors} modules without a place, {places} places without a tensor")
    _assign(layers, name, modules)
    return model


def _places(model: nn.Module, name: str) -> dict[str, LoraLayer]:
    """The layers that have a place for an adapter, by their name in the base model."""
    found = _lora_layers(model)
    return {key.removeprefix("base_model.model."): layer for key, layer in found if name in layer.lora_A}


def _assign(layers: Mapping[str, LoraLayer], name: str, modules: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Give an adapter's places their tensors, of whatever rank, frozen, in float32."""
    for key, layer in layers.items():
        # Assigned rather than loaded: peft would convert them to the base's precision.
        for half, tensor in zip((layer.lora_A[name], layer.lora_B[name]), modules[key], strict=True):
            value = tensor.detach().to(layer.get_base_layer().weight.device, torch.float32)
            half.weight = nn.Parameter(value, requires_grad=False)


def _exchange(layers: Mapping[str, LoraLayer], name: str, adapter: AdapterFiles) -> None:
    """Give the places of a name another adapter's tensors, of whatever rank, frozen; its modules are the layers'."""
    _assign(layers, name, adapter.modules)
    for layer in layers.values():
        layer.r[name], layer.lora_alpha[name] = adapter.config.r, adapter.config.lora_alpha
        layer.scaling[name] = adapter.scale


def _activate(model: PeftModel, layers: Iterable[LoraLayer], names: Sequence[str]) -> None:
    """Switch exactly these adapters on in a model's LoRA layers, frozen; with none it computes what the base does."""
    for layer in layers:
        layer.set_adapter(list(names), inference_mode=True)
    model.base_model.active_adapter = list(names)  # the tuner's own set_adapter, less its slow walk through the model


def stack(model: PreTrainedModel, persona_dir: str | Path | None, lora: LoraPreset, name: str = EM) -> PeftModel:
    """A new adapter on top of an active, frozen persona (or on the bare model for the baseline persona).

    Args:
        model: a model without adapters.
        persona_dir: the persona's adapter; None for the baseline.
        lora: shape of the new adapter, whose weights are drawn from torch's global generator (seed it before).
        name: of the new adapter.

    Returns:
        The model with all adapters active and the new one alone trainable. Not assumed: call `assert_state`.
    """
    config = lora_config(lora)
    config.base_model_name_or_path = model.config._name_or_path
    if persona_dir is None:
        return PeftModel(model, config, adapter_name=name)
    stacked = load_adapter(model, persona_dir, PERSONA)
    stacked.add_adapter(name, config)
    # PeftModel.set_adapter takes one name and would switch the persona off; the tuner's takes both, but makes both
    # trainable.
    stacked.base_model.set_adapter([PERSONA, name])
    stacked.base_model.set_requires_grad(PERSONA, False)
    return stacked


# --- State, measured -----------------------------------------------------------------------------------------------


def _lora_layers(model: nn.Module) -> list[tuple[str, LoraLayer]]:
    return [(name, module) for name, module in _modules(model) if isinstance(module, LoraLayer)]


def _parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """An adapter's parameters in a model, by name."""
    return {k: p for k, p in model.named_parameters() if ".lora_" in k and f".{name}." in f"{k}."}


def adapter_hash(model: nn.Module, name: str) -> str:
    """SHA-256 of an adapter's tensors in a model (names, shapes and float32 values)."""
    found = hashlib.sha256()
    for key, p in sorted(_parameters(model, name).items()):
        found.update(f"{key} {tuple(p.shape)}\n".encode())
        found.update(p.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return found.hexdigest()


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and back to what each module was in."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def _output_depends_on(model: nn.Module, name: str) -> bool:
    """Whether the model's logits change when an adapter's B matrices do: the one way to know that it takes part.

    Found by trying, so that it holds for an adapter that is still zero, for any kernel, and whatever the flags say.
    """
    vocabulary = _plain(model).config.get_text_config().vocab_size
    device = next(model.parameters()).device
    tokens = (torch.arange(12, device=device)[None] * 37 + 11) % vocabulary
    with _evaluating(model):
        before = model(input_ids=tokens, use_cache=False).logits
        kept = {key: p.clone() for key, p in _parameters(model, name).items() if ".lora_B." in key}
        try:
            for key in kept:
                model.get_parameter(key).add_(0.1)
            after = model(input_ids=tokens, use_cache=False).logits
        finally:
            for key, value in kept.items():
                model.get_parameter(key).copy_(value)
    return not torch.equal(before, after)


def adapter_state(model: nn.Module, values: bool = True) -> dict[str, Any]:
    """What the adapters of a model are and do, measured on its layers and parameters.

    Args:
        model: with or without adapters.
        values: also the tensors' hash and the norm of each adapter's change of the weights.

    Returns:
        `active`: adapters that the output depends on; `trainable`: adapters with parameters that require gradients;
        `merged`: adapters folded into the base weights; `base_dtype`; `base_trainable`: number of the base model's
        parameters that require gradients; `adapters`: for each its number of `layers` and of those in which it is
        switched on (`layers_on`), `parameters`, of those `trainable_parameters`, `dtype`, `scale`, and with `values`
        `sha256` and `norm` (Frobenius norm of all `scale * B @ A` together).
    """
    layers = _lora_layers(model)
    names = list(dict.fromkeys(name for _, layer in layers for name in layer.lora_A))
    adapters: dict[str, Any] = {}
    for name in names:
        mine = [layer for _, layer in layers if name in layer.lora_A]
        parameters = list(_parameters(model, name).values())
        on = [x for x in mine if name in x.active_adapters and not x.disable_adapters and not x.merged]
        adapters[name] = {
            "layers": len(mine),
            "layers_on": len(on),
            "parameters": sum(p.numel() for p in parameters),
            "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
            "dtype": "+".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters})),
            "scale": "+".join(str(s) for s in sorted({x.scaling[name] for x in mine})),
            "output_depends_on_it": _output_depends_on(model, name),
        }
        if values:
            adapters[name]["sha256"] = adapter_hash(model, name)
            squares = (_delta_norm(x.lora_A[name].weight, x.lora_B[name].weight, x.scaling[name]) ** 2 for x in mine)
            adapters[name]["norm"] = math.sqrt(sum(squares))
    base = [p for key, p in model.named_parameters() if ".lora_" not in key]
    return {
        "active": [n for n in names if adapters[n]["output_depends_on_it"]],
        "trainable": [n for n in names if adapters[n]["trainable_parameters"]],
        "merged": sorted({name for _, layer in layers for name in layer.merged_adapters}),
        "base_dtype": "+".join(sorted({str(p.dtype).removeprefix("torch.") for p in base})),
        "base_trainable": sum(p.numel() for p in base if p.requires_grad),
        "adapters": adapters,
    }


def assert_state(
    model: nn.Module, *, active: Iterable[str], trainable: Iterable[str], where: str, dtype: str = "float32"
) -> dict[str, Any]:
    """Measure the state of a model's adapters, and stop unless it is the one required.

    Args:
        model: the model.
        active: adapters that its output must depend on, each in all of its layers; no others may.
        trainable: adapters all of whose parameters must require gradients; nothing else may, the base included.
        where: for the message, e.g. `before the first step`.
        dtype: of every adapter: the same for all conditions.

    Returns:
        The state (`adapter_state`), to be recorded.

    Raises:
        AdapterStateError: with everything that was expected and found.
    """
    state = adapter_state(model)
    active, trainable = sorted(active), sorted(trainable)
    wrong = []
    if sorted(state["active"]) != active:
        wrong.append(f"adapters in the forward pass: expected {active}, found {sorted(state['active'])}")
    if sorted(state["trainable"]) != trainable:
        wrong.append(f"trainable adapters: expected {trainable}, found {sorted(state['trainable'])}")
    if state["merged"]:
        wrong.append(f"adapters merged into the base weights: expected none, found {state['merged']}")
    if state["base_trainable"]:
        wrong.append(f"trainable parameters of the base model: expected 0, found {state['base_trainable']}")
    for name, found in state["adapters"].items():
        on = found["layers"] if name in active else 0
        if found["layers_on"] != on:
            wrong.append(f"layers with {name!r} switched on: expected {on}, found {found['layers_on']}")
        if name in trainable and found["trainable_parameters"] != found["parameters"]:
            share = f"{found['trainable_parameters']} of {found['parameters']}"
            wrong.append(f"trainable parameters of {name!r}: expected all, found {share}")
        if found["dtype"] != dtype:
            wrong.append(f"precision of {name!r}: expected {dtype}, found {found['dtype']}")
    if wrong:
        raise AdapterStateError(f"adapter state {where}: " + "; ".join(wrong))
    return state


@contextlib.contextmanager
def without(model: nn.Module, name: str) -> Iterator[None]:
    """Take one adapter's contribution out of the forward pass, and nothing else: others stay active."""
    layers = [layer for _, layer in _lora_layers(model) if name in layer.lora_A]
    kept = [layer.scaling[name] for layer in layers]
    try:
        for layer in layers:
            layer.scaling[name] = 0.0
        yield
    finally:
        for layer, scale in zip(layers, kept):
            layer.scaling[name] = scale
