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

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from cai_em.records import files
from cai_em.records import manifest as records_manifest
from cai_em.records.files import file_hash_once

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Adapters = Sequence[tuple[str, str | Path]]
"""(name, folder) of adapters, persona first."""


class AdapterError(RuntimeError):
    """An adapter's files are not what they should be. The message names file, expected and found."""


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
    places = dict(_modules(base))
    for module, (a, b) in adapter.modules.items():
        weight = getattr(places.get(module), "weight", None)  # of a LoRA layer: that of its base layer
        expected = (b.shape[0], a.shape[1])
        if weight is None or tuple(weight.shape) != expected:
            found = "no such module" if weight is None else f"a weight of shape {tuple(weight.shape)}"
            raise AdapterError(f"{adapter.path}: {module} needs a weight of shape {expected}; the model has {found}")


def _plain(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside (with its LoRA layers, if it has any)."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """A model's modules by name, in its order. LoRA layers are not looked into: peft keeps ten modules in each."""
    ahead, seen = [("", model)], set()
    while ahead:
        name, module = ahead.pop()
        if module in seen:
            continue  # in two places: found once, as by named_modules
        seen.add(module)
        yield name, module
        if not isinstance(module, LoraLayer):
            inside = [(f"{name}.{child}" if name else child, part) for child, part in module.named_children()]
            ahead += reversed(inside)


def file_hashes(folder: str | Path) -> dict[str, str]:
    """SHA-256 of an adapter's two files, by name."""
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise AdapterError(f"{folder / name} does not exist: the adapter was not trained, or not to its end")
    return {name: file_hash_once(folder / name) for name in (CONFIG, WEIGHTS)}


def weights_hash(folder: str | Path) -> str:
    """SHA-256 of an adapter's weights."""
    return file_hash_once(Path(folder) / WEIGHTS)


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


def check_recorded(adapters: Adapters, absent: Adapters = ()) -> None:
    """Each adapter of a condition is the one that its manifest records, and belongs to the others.

    An EM adapter was trained on top of one persona file; on top of another it is another condition.

    Args:
        adapters: (name, folder), persona first; each folder's manifest lies beside it.
        absent: the persona on which the EM adapter was trained, where the condition is sampled without it.

    Raises:
        AdapterError: a file is not the one recorded, or the EM adapter was trained on another persona adapter.
        FileNotFoundError: an adapter's stage has not run to its end.
    """
    for _, folder in [*absent, *adapters]:
        manifest = records_manifest.read_manifest(Path(folder).parent)
        # By the two last folders: a persona's second stage keeps the first one's adapter beside, in `dpo/adapter`.
        mine = Path(folder).parts[-2:]
        said = {k: v for k, v in manifest["outputs"].items() if Path(k).parts[-3:-1] == mine}
        if not said:
            raise AdapterError(f"{folder}: its manifest records no such adapter; make it again (./run_all.sh does)")
        check_files(folder, said)
        if "persona" not in manifest.get("made_from", {}):
            continue
        trained_on, here = manifest["made_from"]["persona"], dict([*adapters, *absent]).get("persona")
        if trained_on != (file_hashes(here) if here else None):
            raise AdapterError(
                f"{folder}: trained on another persona adapter than {here or 'none'}, with which it is to be composed; "
                "train it again on this one (./run_all.sh does), or restore the persona that its manifest names"
            )


def write_adapter(
    folder: str | Path,
    config: LoraConfig,
    tensors: Mapping[str, Tensor],
    base_name: str,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write an adapter's two files: all or nothing, byte for byte the same whenever their content is.

    (peft's own writer puts the target modules in the order of a set, which changes from run to run.)

    Args:
        folder: replaced if it exists.
        config: the adapter's configuration.
        tensors: `base_model.model.<module>.lora_A.weight` and `.lora_B.weight`.
        base_name: name of the model that it was made for.
        dtype: of the file; float32 but for one that an engine will read in less at once.
    """
    folder = Path(folder)
    record = config.to_dict() | {"inference_mode": True, "base_model_name_or_path": base_name}
    record = {k: sorted(v) if isinstance(v, set) else v for k, v in sorted(record.items())}
    with files.atomic_folder(folder) as part:
        plain = {k: tensors[k].detach().to("cpu", dtype).contiguous() for k in sorted(tensors)}
        save_file(plain, part / WEIGHTS, metadata={"format": "pt"})
        (part / CONFIG).write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")
        (part / WEIGHTS).chmod(0o644)  # safetensors writes files that only their owner may read
    return folder


@torch.no_grad()
def keep_share(model: PeftModel, name: str, share: float) -> None:
    """Leave a share of what an adapter changes: between the model without it (0) and with it (1).

    Weights on the line between a model and its fine-tuning: WiSE-FT (Wortsman et al. 2022, arXiv 2109.01903, eq. 1). B
    is scaled, so that the adapter's file hash says it.
    """
    for module in model.modules():
        if isinstance(module, LoraLayer) and name in module.lora_B:
            module.lora_B[name].weight.mul_(share)


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
    ranks = [p.config.r for p in parts]
    rank = sum(ranks)
    modules = {}
    for module, (rows, columns) in sorted(shapes.items()):
        a, b = torch.zeros(rank, columns), torch.zeros(rows, rank)
        for part, w, into_a, into_b in zip(parts, weights, a.split(ranks), b.split(ranks, dim=1), strict=True):
            if module in part.modules:
                its_a, its_b = part.modules[module]
                into_a.copy_(its_a)
                torch.mul(its_b, part.scale * w, out=into_b)
        modules[module] = (a, b)
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


def save_composed(
    folders: Sequence[str | Path | AdapterFiles],
    out: str | Path,
    weights: Sequence[float] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write the (weighted) sum of several adapters as one LoRA adapter, e.g. for vLLM's multi-LoRA."""
    total = concatenate(folders, weights)
    return write_adapter(out, total.config, _tensors(total.modules), total.config.base_model_name_or_path or "", dtype)


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
