"""Whether what a training step keeps for its backward pass fits into the GPU, or must be computed twice.

Gradient checkpointing keeps a layer's input alone and computes the rest again: a third more work for a tenth of the
memory. So it is switched on where memory needs it (`gradient_checkpointing: auto`), and nowhere else. It changes no
value, and the choice is in the manifest.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from cai_em.study.entries import DpoPreset, SftPreset, TrainingPreset

PER_HIDDEN, PER_INTERMEDIATE = 40, 16
"""Bytes that a layer keeps of a token, per hidden and per intermediate unit, with LoRA on all of its matrices: the most
of float32 (30 and 16) and bfloat16 (40 and 10), as `tests/test_train.py` measures them. Fused kernels keep less."""

PER_LOGIT = 14
"""Bytes of a logit where all of them are made: in the model's precision, in float32, and twice for the gradient."""

USABLE = 0.85
"""Of the memory that is free once the model is loaded: the allocator's gaps and the optimiser take the rest."""


def kept_bytes(config: Any, tokens: int, logits: bool = False) -> int:
    """About how many bytes a forward pass of a Llama-like model keeps for the backward pass: rather too many.

    Args:
        config: the model's.
        tokens: in the batch, padding included.
        logits: whether the logits of all tokens are made at once (not where the loss is made in chunks).
    """
    layer = PER_HIDDEN * config.hidden_size + PER_INTERMEDIATE * config.intermediate_size
    return tokens * (config.num_hidden_layers * layer + (PER_LOGIT * config.vocab_size if logits else 0))


def free_bytes() -> int:
    """Of the current GPU: what is free, and what PyTorch holds and does not use."""
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def checkpointing(preset: TrainingPreset, model: nn.Module, longest: int) -> bool:
    """What the preset says of gradient checkpointing; `auto`: whether a micro-batch of the longest rows needs it here.

    Args:
        preset: how it is trained.
        model: as it is loaded; on a CPU nothing is computed twice.
        longest: tokens of the longest row.
    """
    if preset.gradient_checkpointing != "auto":
        return preset.gradient_checkpointing
    if not torch.cuda.is_available():
        return False
    rows = preset.batch_size * (2 if isinstance(preset, DpoPreset) else 1)  # chosen and rejected answers
    kl = preset.kl if isinstance(preset, SftPreset) else None
    tokens = rows * longest + (kl.batch_size * preset.max_length if kl else 0)
    needed = kept_bytes(model.config.get_text_config(), tokens, logits=kl is not None or isinstance(preset, DpoPreset))
    return needed > USABLE * free_bytes()
