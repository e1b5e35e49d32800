"""LoRA adapters: stacked for training, composed for sampling, and proved to be what they are taken for.

The published study trained its fine-tuning adapters with the persona switched off (`set_adapter("em")` activates that
adapter alone) and sampled most conditions without it; nothing noticed. So here nothing is believed because it was asked
for. `assert_state` measures, on the model itself, which adapters its output depends on and which would be trained;
`probe` compares the logits of what is about to be sampled with those of all adapters active, and of every part of them.

    model = stack(model, "personas/poeticism/adapter", preset.lora)          # persona active and frozen, em trainable
    assert_state(model, active=["persona", "em"], trainable=["em"], where="before the first step")

    with composed(model, [("persona", persona_dir), ("em", em_dir)]) as ready:  # one exact LoRA of both
        report = probe(ready, tokenizer, [("persona", persona_dir), ("em", em_dir)], prompts)

For many conditions of one model, `Slots` does the same with LoRA layers that are put into it once.

A LoRA adds `scale * B @ A` to a weight, with `scale = alpha / r`, or `alpha / sqrt(r)` if rank-stabilised (rsLoRA,
arXiv 2312.03732). The sum of two LoRAs is exactly one LoRA whose A and B are those of both, one beside the other, with
the scales folded into B. (peft's own `cat` keeps rsLoRA's scale for the sum, and so is wrong for it.)
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cai_em import run
from cai_em.params import LoraPreset, file_hash

PERSONA, EM, COMPOSED = "persona", "em", "composed"
"""Names of the adapters in a model."""

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

RELATIVE_TOLERANCE = 1e-4
"""How far two logits may lie apart in float32, as a share of the largest: rounding gives about a thirtieth of it."""

KEPT_LOGITS = 4
"""How many adapters' logits are kept from one probe to the next (of a 7B model, some 70 MB each)."""

Adapters = Sequence[tuple[str, str | Path]]
"""(name, folder) of adapters, persona first."""


class AdapterError(RuntimeError):
    """An adapter's files are not what they should be. The message names file, expected and found."""


class AdapterStateError(AdapterError):
    """The adapters of a model are not in the state that is required. The message says what was expected and found."""


class ProbeError(AdapterError):
    """A composed model does not compute what its adapters together compute, or an adapter makes no difference."""


# --- Files ---------------------------------------------------------------------------------------------------------


@dataclass
class AdapterFiles:
    """An adapter as read from its folder.

    Attributes:
        config: its configuration.
        modules: module name in the base model -> (A of shape (r, in), B of shape (out, r)), float32.
        scale: what `B @ A` is multiplied with.
        path: where it was read.
    """

    config: LoraConfig
    modules: dict[str, tuple[Tensor, Tensor]]
    scale: float
    path: Path


def scaling(config: LoraConfig) -> float:
    """What a LoRA's `B @ A` is multiplied with: alpha / r, or alpha / sqrt(r) if rank-stabilised."""
    return config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)


def read_adapter(folder: str | Path) -> AdapterFiles:
    """Read an adapter's folder.

    Raises:
        AdapterError: a file is missing, the adapter is not a plain LoRA, or its tensors do not fit its configuration.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise AdapterError(f"{folder / name} does not exist: the adapter was not trained, or not to its end")
    config = LoraConfig.from_pretrained(folder)
    special = {
        "use_dora": config.use_dora,
        "bias": config.bias != "none",
        "modules_to_save": config.modules_to_save,
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
        "fan_in_fan_out": config.fan_in_fan_out,
    }
    if any(special.values()):
        found = ", ".join(key for key, value in special.items() if value)
        raise AdapterError(f"{folder / CONFIG}: only plain LoRA adapters can be composed exactly; this one has {found}")
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(folder / WEIGHTS).items():
        module, _, half = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".lora_")
        if half not in ("A", "B"):
            raise AdapterError(f"{folder / WEIGHTS}: tensor {key} does not belong to a plain LoRA")
        halves.setdefault(module, {})[half] = tensor.float()
    for module, half in halves.items():
        shapes = {k: tuple(v.shape) for k, v in half.items()}
        if set(half) != {"A", "B"} or half["A"].shape[0] != config.r or half["B"].shape[1] != config.r:
            raise AdapterError(f"{folder / WEIGHTS}: {module} has {shapes}, expected A and B of rank {config.r}")
    if not halves:
        raise AdapterError(f"{folder / WEIGHTS}: holds no tensor")
    modules = {name: (half["A"], half["B"]) for name, half in sorted(halves.items())}
    return AdapterFiles(config, modules, scaling(config), folder)


def check_fits(adapter: AdapterFiles, model: nn.Module) -> None:
    """Whether an adapter was made for a model.

    Raises:
        AdapterError: it records another base model, or its tensors have no place in this one.
    """
    base = _plain(model)
    recorded, name = adapter.config.base_model_name_or_path, base.config._name_or_path
    if recorded and name and recorded != name:
        raise AdapterError(f"{adapter.path}: this adapter was made for {recorded!r}, not for {name!r}")
    weights = {_clean(key): value for key, value in base.named_parameters() if key.endswith(".weight")}
    for module, (a, b) in adapter.modules.items():
        weight = weights.get(f"{module}.weight")
        expected = (b.shape[0], a.shape[1])
        if weight is None or tuple(weight.shape) != expected:
            found = "no such module" if weight is None else f"a weight of shape {tuple(weight.shape)}"
            raise AdapterError(f"{adapter.path}: {module} needs a weight of shape {expected}; the model has {found}")


def _clean(name: str) -> str:
    """A module's name without what peft adds to it."""
    return name.replace(".base_layer", "")


def _plain(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside (with its LoRA layers, if it has any)."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def file_hashes(folder: str | Path) -> dict[str, str]:
    """SHA-256 of an adapter's two files, by name."""
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise AdapterError(f"{folder / name} does not exist: the adapter was not trained, or not to its end")
    return {name: file_hash(folder / name) for name in (CONFIG, WEIGHTS)}


def check_files(folder: str | Path, expected: Mapping[str, str]) -> None:
    """Compare an adapter's files with the hashes recorded when it was made (`file_hashes`).

    Raises:
        AdapterError: a file is not the one recorded.
    """
    found = file_hashes(folder)
    for name, digest in expected.items():
        if found.get(Path(name).name) != digest:
            raise AdapterError(
                f"{Path(folder) / Path(name).name}: wrong adapter file: recorded with SHA-256 {digest[:12]}..., found "
                f"{str(found.get(Path(name).name))[:12]}...; retrain it, or restore the recorded file"
            )


def check_recorded(adapters: Adapters) -> None:
    """Each adapter of a condition is the one that its manifest records, and belongs to the others.

    An EM adapter was trained on top of one persona file; on top of another it is another condition.

    Args:
        adapters: (name, folder), persona first; each folder's manifest lies beside it.

    Raises:
        AdapterError: a file is not the one recorded, or the EM adapter was trained on another persona adapter.
        FileNotFoundError: an adapter's stage has not run to its end.
    """
    for _, folder in adapters:
        manifest = run.read_manifest(Path(folder).parent)
        check_files(folder, {k: v for k, v in manifest["outputs"].items() if Path(k).parent.name == Path(folder).name})
        if "persona" not in manifest.get("made_from", {}):
            continue
        trained_on, here = manifest["made_from"]["persona"], dict(adapters).get("persona")
        if trained_on != (file_hashes(here) if here else None):
            raise AdapterError(
                f"{folder}: trained on another persona adapter than {here or 'none'}, with which it is to be composed; "
                "train it again on this one (./run_all.sh does), or restore the persona that its manifest names"
            )


def write_adapter(folder: str | Path, config: LoraConfig, tensors: Mapping[str, Tensor], base_name: str) -> Path:
    """Write an adapter's two files: all or nothing, byte for byte the same whenever their content is.

    (peft's own writer puts the target modules in the order of a set, which changes from run to run.)

    Args:
        folder: replaced if it exists.
        config: the adapter's configuration.
        tensors: `base_model.model.<module>.lora_A.weight` and `.lora_B.weight`.
        base_name: name of the model that it was made for.
    """
    folder = Path(folder)
    record = config.to_dict() | {"inference_mode": True, "base_model_name_or_path": base_name}
    record = {k: sorted(v) if isinstance(v, set) else v for k, v in sorted(record.items())}
    with run.atomic_folder(folder) as part:
        plain = {k: tensors[k].detach().to("cpu", torch.float32).contiguous() for k in sorted(tensors)}
        save_file(plain, part / WEIGHTS, metadata={"format": "pt"})
        (part / CONFIG).write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")
        (part / WEIGHTS).chmod(0o644)  # safetensors writes files that only their owner may read
    return folder


def save_adapter(model: PeftModel, name: str, folder: str | Path) -> Path:
    """Write one adapter of a model, and only that, directly into `folder`."""
    # (Without the embeddings: to decide about those, peft would ask the hub for the base model.)
    tensors = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return write_adapter(folder, model.peft_config[name], tensors, _plain(model).config._name_or_path)


def import_adapter(source: str | Path, folder: str | Path, base_name: str) -> Path:
    """Copy a ready-made adapter (e.g. from the hub) into the form that ours have: float32, base model's name recorded.

    Args:
        source: folder with the adapter's two files.
        folder: where the copy goes.
        base_name: name of the model that it is for (`models.base_name`); `check_fits` compares it on loading.
    """
    adapter = read_adapter(source)
    return write_adapter(folder, adapter.config, _tensors(adapter.modules), base_name)


def _tensors(modules: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Modules' A and B under the names that peft's files use."""
    found = {}
    for module, (a, b) in modules.items():
        found[f"base_model.model.{module}.lora_A.weight"] = a
        found[f"base_model.model.{module}.lora_B.weight"] = b
    return found


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
    config = dataclasses.replace(
        config, inference_mode=True, base_model_name_or_path=_plain(model).config._name_or_path
    )
    if isinstance(model, PeftModel):
        model.add_adapter(name, config, low_cpu_mem_usage=True)
    else:
        model = PeftModel(model, config, adapter_name=name, low_cpu_mem_usage=True)
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


def _put(model: PeftModel, name: str, adapter: AdapterFiles) -> None:
    """An adapter under a name, frozen: where places of that name fit, their tensors are exchanged."""
    layers = _places(model, name)
    if layers and set(layers) == set(adapter.modules):
        _assign(layers, name, adapter.modules)
        for layer in layers.values():
            layer.r[name], layer.lora_alpha[name] = adapter.config.r, adapter.config.lora_alpha
            layer.scaling[name] = adapter.scale
        kept = model.peft_config[name]
        kept.r, kept.lora_alpha, kept.use_rslora = (
            adapter.config.r,
            adapter.config.lora_alpha,
            adapter.config.use_rslora,
        )
        return
    if name in model.peft_config:
        model.delete_adapter(name)
    _insert(model, name, adapter.config, adapter.modules)


def _activate(model: PeftModel, names: Sequence[str]) -> None:
    """Switch exactly these adapters on, frozen; with none the model computes what the base does."""
    for _, layer in _lora_layers(model):
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
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


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
    model.eval()
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


# --- Composition, for sampling -------------------------------------------------------------------------------------


def concatenate(folders: Sequence[str | Path | AdapterFiles], weights: Sequence[float] | None = None) -> AdapterFiles:
    """The sum of several LoRA adapters as one, exactly: ranks add up, scales are folded into B.

    Where an adapter does not touch a module that another does, its share there is zero.

    Args:
        folders: the adapters, persona first; or what was read there.
        weights: what each counts; None: 1 each.

    Raises:
        AdapterError: none given, files not whole, or adapters of different base models.
    """
    parts = [part if isinstance(part, AdapterFiles) else read_adapter(part) for part in folders]
    weights = [1.0] * len(parts) if weights is None else weights
    if not parts:
        raise AdapterError("nothing to compose: no adapter given")
    bases = {p.config.base_model_name_or_path for p in parts}
    if len(bases) > 1:
        made = ", ".join(f"{p.path} for {p.config.base_model_name_or_path!r}" for p in parts)
        raise AdapterError(f"adapters of different base models cannot be composed: {made}")
    shapes = {m: (b.shape[0], a.shape[1]) for p in parts for m, (a, b) in p.modules.items()}
    modules = {}
    for module, (rows, columns) in sorted(shapes.items()):
        zero = [(torch.zeros(p.config.r, columns), torch.zeros(rows, p.config.r)) for p in parts]
        pairs = [p.modules.get(module, z) for p, z in zip(parts, zero)]
        a = torch.cat([a for a, _ in pairs], dim=0)
        b = torch.cat([b * (p.scale * w) for (_, b), p, w in zip(pairs, parts, weights, strict=True)], dim=1)
        modules[module] = (a, b)
    rank = sum(p.config.r for p in parts)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=rank,
        target_modules=_targets(modules),
        bias="none",
        base_model_name_or_path=bases.pop(),
    )
    return AdapterFiles(config, modules, 1.0, Path("+".join(str(p.path) for p in parts)))


def _targets(modules: Iterable[str]) -> list[str]:
    """Target modules that name these and no others: short names where every layer has them, else full names."""
    names = set(modules)
    short = {name.rpartition(".")[2] for name in names}
    layers = {name.partition(".layers.")[2].partition(".")[0] for name in names}
    whole = len(names) == len(short) * len(layers) and layers == {str(i) for i in range(len(layers))}
    return sorted(short if whole else names)


def compose(model: nn.Module, adapters: Adapters, name: str = COMPOSED) -> PeftModel:
    """Load the sum of several adapters into a model as one adapter, active and frozen.

    Args:
        model: the base model, or a `PeftModel` on it.
        adapters: (name, folder), persona first.
        name: of the sum.

    Raises:
        AdapterError: adapters that are not whole or belong to another model.
    """
    total = concatenate([folder for _, folder in adapters])
    check_fits(total, model)
    found = _insert(model, name, total.config, total.modules)
    found.set_adapter(name, inference_mode=True)
    return found.eval()


class Slots:
    """LoRA layers put into a model once, whose tensors are exchanged from one condition to the next.

    peft takes about a second to put its layers into a model of 135M parameters, and again to take them out; to
    exchange their tensors takes some hundredths. Each condition's tensors keep their own rank: nothing is padded, and
    the model computes bit for bit what `compose` would make it compute. Without adapters it computes what the base
    does; after `close` it is the model that it was.

    Args:
        model: the base model; while slots are in it, use it for nothing else.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._peft: PeftModel | None = None
        self._shapes: dict[str, tuple[int, int]] = {}
        self._known: dict[tuple[str, ...], Tensor] = {}
        self._probed: tuple[str, ...] = ()

    @contextlib.contextmanager
    def composed(self, adapters: Adapters) -> Iterator[nn.Module]:
        """The model with the sum of several adapters for the length of a block; as the base if there are none.

        Raises:
            AdapterError: adapters that are not whole or belong to another model.
        """
        if not adapters:
            yield self.model
            return
        total = concatenate([folder for _, folder in adapters])
        check_fits(total, self.model)
        shapes = self._shapes | {m: (b.shape[0], a.shape[1]) for m, (a, b) in total.modules.items()}
        if shapes != self._shapes:
            self.close()  # a module without a place: all are made anew
            self._shapes = shapes
        idle = {m: (torch.zeros(1, c), torch.zeros(r, 1)) for m, (r, c) in shapes.items() if m not in total.modules}
        total.modules = dict(sorted((total.modules | idle).items()))
        total.config.target_modules = set(_targets(total.modules))
        if self._peft is None:
            self._peft = _insert(self.model, COMPOSED, total.config, total.modules).eval()
        else:
            _put(self._peft, COMPOSED, total)
        try:
            _activate(self._peft, [COMPOSED])
            yield self._peft
        finally:
            _activate(self._peft, [])

    def probe(
        self,
        tokenizer: PreTrainedTokenizerBase,
        adapters: Adapters,
        prompts: Sequence[str],
        may_be_idle: Collection[str] = (),
    ) -> ProbeReport:
        """`probe` inside a `composed` block; what the base and single adapters compute is kept for later conditions.

        Raises:
            ProbeError, AdapterError: as `probe`.
        """
        if self._peft is None:
            raise AdapterError("nothing to probe: no adapters are composed")
        if self._probed != tuple(prompts):
            self._probed, self._known = tuple(prompts), {}
        return probe(self._peft, tokenizer, adapters, prompts, known=self._known, may_be_idle=may_be_idle)

    def close(self) -> None:
        """Take the layers out again: the model is the bare one that it was."""
        if self._peft is None:
            return
        self._peft.unload()
        # Left behind by peft, it would make the next adapter look like a second one on top of this.
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config
        self._peft, self._shapes = None, {}


@contextlib.contextmanager
def composed(model: PreTrainedModel, adapters: Adapters) -> Iterator[nn.Module]:
    """A model with the sum of several adapters for the length of a block; the bare model if there are none.

    Only the inserted layers are taken out again, so a base model loaded once serves one condition after another (many
    of them: `Slots` is faster).
    """
    slots = Slots(model)
    try:
        with slots.composed(adapters) as ready:
            yield ready
    finally:
        slots.close()


def save_composed(folders: Sequence[str | Path], out: str | Path, weights: Sequence[float] | None = None) -> Path:
    """Write the (weighted) sum of several adapters as one LoRA adapter, e.g. for vLLM's multi-LoRA."""
    total = concatenate(folders, weights)
    return write_adapter(out, total.config, _tensors(total.modules), total.config.base_model_name_or_path or "")


# --- The probe -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProbeReport:
    """What a probe measured, in float32.

    Attributes:
        adapters: SHA-256 of each adapter's weights, by name.
        scales: what each adapter's `B @ A` is multiplied with.
        prompts: number of prompts.
        largest_logit: largest absolute logit of all adapters active.
        tolerance: largest difference taken for rounding.
        difference: largest absolute difference of a logit, composed model against all adapters active.
        others: the same against the base model and every proper part of the adapters (`base`, `persona`, `em`).
        idle: adapters without which the logits are the same, where the condition allows for it (`may_be_idle`).
    """

    adapters: dict[str, str]
    scales: dict[str, float]
    prompts: int
    largest_logit: float
    tolerance: float
    difference: float
    others: dict[str, float]
    idle: list[str] = dataclasses.field(default_factory=list)


def idle_adapters(
    others: Mapping[str, float], tolerance: float, names: Sequence[str], may_be_idle: Collection[str]
) -> tuple[list[str], str | None]:
    """Which adapters make no difference, and whether that is a fault.

    Args:
        others: difference from each part of the adapters, by its name (`base`, `persona`, `em`, ... as in a report).
        tolerance: largest difference taken for rounding.
        names: the adapters.
        may_be_idle: adapters that are allowed to make no difference.

    Returns:
        Adapters without which the result is the same; and None, or the first part of all adapters that computes what
        all do, where that is not explained by adapters that may be idle.
    """
    same = [part for part, difference in others.items() if difference <= tolerance]
    without = {"+".join(n for n in names if n != name) or "base": name for name in names}
    fault = any(without.get(part) not in may_be_idle for part in same)
    return [without[part] for part in same if part in without], same[0] if fault else None


@contextlib.contextmanager
def _in_float32(model: nn.Module) -> Iterator[None]:
    """A model's weights in float32 for a while, and back in what they were: bfloat16 survives it unchanged."""
    kept = [(p, p.dtype) for p in model.parameters() if p.dtype in (torch.bfloat16, torch.float16)]
    try:
        for p, _ in kept:
            p.data = p.data.float()
        yield
    finally:
        for p, dtype in kept:
            p.data = p.data.to(dtype)


@torch.no_grad()
def probe_logits(model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> Tensor:
    """What a model computes for the probe's prompts as it stands, (1, tokens, vocabulary), float32 on the CPU."""
    # One message of all prompts: the template around them, half of a short prompt's tokens, is read once.
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "\n".join(prompts)}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    ).to(next(model.parameters()).device)
    return model(**inputs, use_cache=False).logits.float().cpu()


@torch.no_grad()
def probe(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    adapters: Adapters,
    prompts: Sequence[str],
    name: str = COMPOSED,
    known: dict[tuple[str, ...], Tensor] | None = None,
    may_be_idle: Collection[str] = (),
) -> ProbeReport:
    """Prove that a composed model computes what its adapters together compute, and that each of them matters.

    Args:
        model: with the composed adapter (`compose`).
        tokenizer: the model's.
        adapters: (name, folder) of the adapters that the condition must have.
        prompts: what a user says, in one message; logits at all of its tokens are compared.
        name: the composed adapter's name.
        known: what the base model and single adapters computed in earlier probes of this model on these prompts, by
            the hashes of their files; filled here. If given, the adapters' places stay in the model for the next probe.
        may_be_idle: adapters that are allowed to make no difference; the report then says so.

    Returns:
        The differences found.

    Raises:
        ProbeError: the composed logits are not those of all adapters active, or those of a part of them are the same.
        AdapterError: an adapter's files are not whole or belong to another model.
    """
    if not adapters or not prompts:
        raise ValueError("a probe needs adapters and prompts")

    def logits(*active: str) -> Tensor:
        _activate(model, active)
        return probe_logits(model, tokenizer, prompts)

    files = {part: read_adapter(folder) for part, folder in adapters}
    hashes = {part: "".join(file_hashes(folder).values()) for part, folder in adapters}
    keep, known = known is not None, {} if known is None else known
    places = [f"probe_{number}" for number in range(len(adapters))]

    def reference(*parts: str) -> Tensor:
        """Logits with these adapters active, each by itself in the model: the composed one takes no part in them."""
        key = tuple(hashes[part] for part in parts)
        if (kept := known.pop(key, None)) is None:
            for place, part in zip(places, parts):
                check_fits(files[part], model)
                _put(model, place, files[part])
            kept = logits(*places[: len(parts)])
        if len(parts) < 2:
            known[key] = kept
            if len(known) > KEPT_LOGITS:
                del known[next(iter(known))]  # the one not used for longest
        return kept

    names = [part for part, _ in adapters]
    with _evaluating(model), _in_float32(model):
        try:
            found = logits(name)
            subsets = [some for size in range(len(names)) for some in itertools.combinations(names, size)]
            others = {"+".join(some) or "base": reference(*some) for some in subsets}
            together = reference(*names)
        finally:
            _activate(model, [name])
            for place in () if keep else places:
                if place in model.peft_config:
                    model.delete_adapter(place)
    largest = float(together.abs().max())
    report = ProbeReport(
        adapters={part: file_hash(Path(folder) / WEIGHTS) for part, folder in adapters},
        scales={part: adapter.scale for part, adapter in files.items()},
        prompts=len(prompts),
        largest_logit=largest,
        tolerance=RELATIVE_TOLERANCE * largest,
        difference=float((found - together).abs().max()),
        others={part: float((found - other).abs().max()) for part, other in others.items()},
    )
    all_names = "+".join(part for part, _ in adapters)
    if not report.difference <= report.tolerance:
        same = [part for part, d in report.others.items() if d <= report.tolerance]
        looks = f"; it computes what {same[0]!r} does" if same else ""
        raise ProbeError(
            f"the composed model is not {all_names}: logits differ by up to {report.difference:.2g} (tolerance "
            f"{report.tolerance:.2g}){looks}; compose the adapters again from their recorded files"
        )
    idle, part = idle_adapters(report.others, report.tolerance, names, may_be_idle)
    if part:
        raise ProbeError(
            f"{all_names} computes the same as {part!r} alone: an adapter makes no difference; it was not trained"
        )
    return dataclasses.replace(report, idle=idle)


# --- The control of random direction -------------------------------------------------------------------------------


def _delta_norm(a: Tensor, b: Tensor, scale: float) -> float:
    """Frobenius norm of `scale * B @ A`, from the two small Gram matrices: tr(B'B AA')."""
    a, b = a.detach().double(), b.detach().double()
    return abs(scale) * math.sqrt(max(float(torch.sum((b.T @ b) * (a @ a.T))), 0.0))


def random_control(reference: str | Path, seed: int, out: str | Path) -> Path:
    """An adapter of random direction that changes each module's weight by as much as a reference does.

    A and B are drawn from normal distributions; B is then scaled so that the Frobenius norm of the module's
    `scale * B @ A` is the reference's. What such an adapter does to responses is what any change of that size does.

    Args:
        reference: the adapter whose norms, rank and modules are taken.
        seed: of the random draw.
        out: folder of the new adapter.
    """
    adapter = read_adapter(reference)
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for module, (a, b) in adapter.modules.items():
        new_a, new_b = torch.randn(a.shape, generator=generator), torch.randn(b.shape, generator=generator)
        wanted = _delta_norm(a, b, adapter.scale)
        modules[module] = (new_a, new_b * (wanted / _delta_norm(new_a, new_b, adapter.scale)))
    return write_adapter(out, adapter.config, _tensors(modules), adapter.config.base_model_name_or_path or "")
