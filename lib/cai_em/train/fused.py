"""Unsloth as its authors mean it: one adapter, made by Unsloth, on a model that Unsloth has loaded.

Its fused kernels know one adapter. Where a persona lies under the new adapter, it is folded into the base beforehand
(`model.folding`), so that the base's weights, the adapter and its rank are what Unsloth expects. Its trainers take no
`peft_config`: the adapter is put in before (unsloth/models/rl.py turns TRL's `if peft_config is not None` into `if
False`).

Importing Unsloth rewrites classes of transformers and TRL for the whole process: `apart.stream` gives training a
process of its own, and nothing else is done in it.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from cai_em.model import folding, load
from cai_em.study.entries import LoraPreset, ModelSpec, TrainingPreset

ADAPTER = "default"
"""The name that Unsloth gives to its adapter."""

QUIET = {"UNSLOTH_DISABLE_STATISTICS": "1"}
"""Unsloth reports each load to its makers, unless told not to."""

COMPILED = "UNSLOTH_COMPILE_LOCATION"
"""Where Unsloth writes the trainers that it generates: by default the working folder, where jobs would overwrite each
other's."""

ON_CPU = "UNSLOTH_ALLOW_CPU"
"""Unsloth's own switch for machines without a GPU; without it, it refuses to start there."""


def installed() -> bool:
    """Whether Unsloth is there (it is not imported)."""
    return importlib.util.find_spec("unsloth") is not None


def allowed_on_cpu() -> bool:
    """Whether its environment lets it run without a GPU: for tests, which bring the devices' answers themselves."""
    return os.environ.get(ON_CPU) == "1"


def _language_models() -> Any:
    """Unsloth's door, imported with a place of its own for what it generates."""
    os.environ.update(QUIET)
    if COMPILED not in os.environ:
        folder = tempfile.mkdtemp(prefix="cai-em-unsloth-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ[COMPILED] = folder
    from unsloth import FastLanguageModel

    return FastLanguageModel


def load_with_unsloth(
    spec: ModelSpec, preset: TrainingPreset, cache_dir: str | Path | None, persona_dir: str | Path | None
) -> PreTrainedModel:
    """The base, or the base with a persona folded into it, as Unsloth loads it; frozen.

    Raises:
        probing.ProbeError: the folded model does not compute what base and persona do, or another was loaded.
    """
    if persona_dir is None:
        return _from_folder(spec, preset, load.model_folder(spec, cache_dir))
    with tempfile.TemporaryDirectory(prefix="cai-em-folded-") as folder:
        # Before Unsloth is imported: the proof is taken with the classes as transformers has them.
        folded = folding.fold(spec, persona_dir, folder, preset.dtype, cache_dir=cache_dir)
        model = _from_folder(spec, preset, Path(folder))
    model._cai_em_folded = folded
    check_folded(model, "as Unsloth has loaded it")
    return model


def _from_folder(spec: ModelSpec, preset: TrainingPreset, folder: Path) -> PreTrainedModel:
    model, _ = _language_models().from_pretrained(
        model_name=str(folder),
        max_seq_length=preset.max_length,
        dtype=getattr(torch, preset.dtype),
        load_in_4bit=False,
        use_exact_model_name=True,
        use_gradient_checkpointing="unsloth" if preset.gradient_checkpointing else False,
        trust_remote_code=False,
    )
    model.config._name_or_path = load.base_name(spec)
    model._cai_em_loaded_by = "unsloth"
    return model.requires_grad_(False)


def check_folded(model: torch.nn.Module, where: str) -> None:
    """Whether the base under an adapter is still the folded one, bit for bit.

    Raises:
        probing.ProbeError: it is not.
    """
    folded, found = model._cai_em_folded, folding.fingerprint(model)
    if found != folded.weights:
        raise folding.ProbeError(
            f"the base with the persona in it, {where}, is not the one that was proved: expected "
            f"{folded.weights[:12]}, found {found[:12]}"
        )


def new_adapter(model: PreTrainedModel, lora: LoraPreset, seed: int, *, checkpointing: bool) -> PeftModel:
    """Unsloth's one adapter, its first weights drawn as peft draws them from the same seed."""
    return _language_models().get_peft_model(
        model,
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        target_modules=list(lora.target_modules),
        layers_to_transform=lora.layers,
        bias="none",
        use_gradient_checkpointing="unsloth" if checkpointing else False,
        random_state=seed,
    )
