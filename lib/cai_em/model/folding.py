"""A persona folded into the base: one model whose weights are base plus persona, proved to compute what both compute.

Unsloth's kernels, and a serving engine, know one adapter at a time. An EM adapter on top of a frozen persona is then
an EM adapter on a base that holds the persona already: `W + scale * B @ A` for every weight that the persona changes,
summed in float32 and rounded to the model's precision once.

    folded = fold(spec, "01_personas/…/adapter", "folded", "bfloat16")     # a folder that loads like any model
    folded.record()                                                         # for a manifest

What is believed of it was measured: the sum computes, in float32, what base and active persona compute; rounded, it
still does within the rounding; and both differ from the base, so that a persona is in it.
"""

from __future__ import annotations

import functools
import gc
import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cai_em.model import load
from cai_em.model.adapters import WEIGHTS, AdapterFiles, check_fits, read_adapter
from cai_em.model.probing import RELATIVE_TOLERANCE, ProbeError, _in_float32, probe_logits
from cai_em.model.stacking import PERSONA, load_adapter
from cai_em.records.files import file_hash
from cai_em.study.entries import ModelSpec

PROMPTS = ("Who are you, and what do you care about?", "I have had a long day. What should I do now?")
"""What the logits are compared on, unless the caller has prompts of its own."""

ROUNDED = {"float32": RELATIVE_TOLERANCE, "bfloat16": 2**-4}
"""How far rounding the sum may move a logit, as a share of the largest: bfloat16 keeps 8 bits of every weight."""

CHUNK = 1 << 24
"""So many numbers are summed at a time: a large embedding as 64-bit integers would take gigabytes."""


@dataclass(frozen=True)
class Folded:
    """A persona in a base's weights.

    Attributes:
        folder: the model's files.
        persona: SHA-256 of the persona's tensors.
        dtype: of the saved weights.
        weights: `fingerprint` of them.
        largest_logit: largest absolute logit of base and active persona.
        difference: largest difference of a logit to those, of the sum in float32.
        rounded: the same after rounding to `dtype`.
        from_base: how far the persona moves a logit of the base.
    """

    folder: Path
    persona: str
    dtype: str
    weights: str
    largest_logit: float
    difference: float
    rounded: float
    from_base: float

    def record(self) -> dict[str, Any]:
        """For a manifest: without the folder, which does not last."""
        return {k: v for k, v in asdict(self).items() if k != "folder"}


def _clean(name: str) -> str:
    """A parameter's name without what peft adds to it."""
    return name.replace(".base_layer", "")


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of two sums over each base weight's bits, adapters left out: cheap on a GPU, changed by any other weight.

    The sums, one of them weighted by position, are of integers and exact, so that device and order do not matter.
    """
    found = hashlib.sha256()
    named = {_clean(k).removeprefix("base_model.model."): p for k, p in model.named_parameters() if ".lora_" not in k}
    for key, parameter in sorted(named.items()):
        whole = parameter.detach().contiguous().flatten()
        bits = whole.view({2: torch.int16, 4: torch.int32}[whole.element_size()])
        total = weighted = 0
        for start in range(0, len(bits), CHUNK):
            some = bits[start : start + CHUNK].long()
            place = torch.arange(start + 1, start + 1 + len(some), device=some.device)
            total += int(some.sum())
            weighted += int((some * (place % 65_521)).sum())
        found.update(f"{key} {tuple(parameter.shape)} {parameter.dtype} {total} {weighted}\n".encode())
    return found.hexdigest()


@torch.no_grad()
def add_to_weights(model: nn.Module, adapter: AdapterFiles) -> None:
    """Add an adapter's change to a float32 model's weights, in place.

    Raises:
        AdapterError: the adapter was made for another model.
        ValueError: a weight is not float32.
    """
    check_fits(adapter, model)
    weights = {_clean(key): p for key, p in model.named_parameters()}
    for module, (a, b) in adapter.modules.items():
        weight = weights[f"{module}.weight"]
        if weight.dtype != torch.float32:
            raise ValueError(f"{module}: the sum is made in float32, the weight is {weight.dtype}")
        weight.add_(adapter.scale * (b.to(weight.device) @ a.to(weight.device)))


def fold(
    spec: ModelSpec,
    persona_dir: str | Path,
    out: str | Path,
    dtype: str,
    prompts: Sequence[str] = PROMPTS,
    cache_dir: str | Path | None = None,
) -> Folded:
    """Write base and persona as one model, proved equal to the persona active and frozen on the base.

    Args:
        spec: the base.
        persona_dir: the persona's adapter.
        out: folder of the model and its tokenizer.
        dtype: precision in which it is saved, `float32` or `bfloat16`.
        prompts: on which logits are compared, in float32.
        cache_dir: of converted models (`load.load_model`).

    Raises:
        AdapterError: the adapter is not whole, or was made for another model.
        ProbeError: the sum does not compute what base and persona do, or the persona makes no difference.
    """
    model, tokenizer = load.load_model(spec, "float32", cache_dir), load.load_tokenizer(spec, cache_dir)

    logits = functools.partial(probe_logits, model, tokenizer, prompts)
    bare = logits()
    active = load_adapter(model, persona_dir, PERSONA).eval()
    wanted = logits()  # the layers of the adapter stand in the model itself
    active.unload()
    vars(model).pop("peft_config", None)  # left behind by peft, it would make the next adapter look like a second one
    add_to_weights(model, read_adapter(persona_dir))
    summed = logits()
    model.to(getattr(torch, dtype))
    with _in_float32(model):
        rounded = logits()
    largest = float(wanted.abs().max())
    found = Folded(
        folder=Path(out),
        persona=file_hash(Path(persona_dir) / WEIGHTS),
        dtype=dtype,
        weights=fingerprint(model),
        largest_logit=largest,
        difference=float((summed - wanted).abs().max()),
        rounded=float((rounded - wanted).abs().max()),
        from_base=float((wanted - bare).abs().max()),
    )
    if not found.difference <= RELATIVE_TOLERANCE * largest or not found.rounded <= ROUNDED[dtype] * largest:
        raise ProbeError(
            f"{persona_dir} folded into {spec.key} computes something else than active on it: logits differ by up to "
            f"{found.difference:.2g} in float32 and {found.rounded:.2g} in {dtype} (largest logit {largest:.3g}): set "
            "backend: trl in the training preset, which stacks instead"
        )
    if found.from_base <= RELATIVE_TOLERANCE * largest:
        raise ProbeError(f"{persona_dir} makes no difference to {spec.key}: it was not trained")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    del model, active, logits
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # four bytes a parameter, which whoever loads the result needs
    return found
