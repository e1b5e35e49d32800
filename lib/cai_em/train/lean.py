"""The losses of DPO and SFT where every token costs: on a CPU, TRL's values and gradients for a good part of the work.

TRL pads a batch to one length, makes logits of every position (DPO), looks at entropies and accuracies that nobody
reads, and for DPO runs the whole model twice, with the adapter and, as reference, without it. Here

- rows of like length run together, so that hardly anything is padding;
- logits are made for the tokens that carry loss alone;
- for DPO, layers below the first one that the adapter touches are the same with and without it, and run once.

`tests/test_train.py` holds them to TRL's losses and gradients on the same batch. With Unsloth, whose kernels and
trainers have ways of their own, on a GPU, where padding is cheap and waiting dear, and for models whose logits are more
than a product, TRL's stand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F

GROUP = 4
"""So many rows of like length run together."""


def applies(model: nn.Module, trainer: Any) -> bool:
    """Whether a trainer's loss is one that is known here, on a model that is built as expected, on a CPU."""
    base, args = model.get_base_model() if isinstance(model, PeftModel) else None, trainer.args
    if base is None or not hasattr(base, "lm_head") or not hasattr(getattr(base, "model", None), "layers"):
        return False
    shaping = ("final_logit_softcapping", "logit_scale", "logits_scaling")
    shaped = any(getattr(base.config, name, None) for name in shaping)
    if torch.cuda.is_available() or args.gradient_checkpointing or shaped:
        return False
    if not hasattr(args, "beta"):
        return args.loss_type in (None, "nll", "chunked_nll")
    plain = args.loss_type in (["sigmoid"], ["sigmoid", "sft"]) and args.ld_alpha is None and not args.use_weighting
    return plain and trainer.ref_model is None


def shared_layers(model: PeftModel) -> int:
    """How many of the lowest layers no adapter touches."""
    layers = model.get_base_model().model.layers
    touched = [any(".lora_" in name for name, _ in layer.named_parameters()) for layer in layers]
    return touched.index(True) if True in touched else len(layers)


def _hidden(decoder: nn.Module, layers: Sequence[nn.Module], norm: nn.Module, **given: Any) -> Tensor:
    """What a stretch of a decoder's layers makes of token ids or of the hidden states before it."""
    kept = decoder.layers, decoder.norm
    decoder.layers, decoder.norm = nn.ModuleList(layers), norm
    try:
        return decoder(use_cache=False, **given).last_hidden_state
    finally:
        decoder.layers, decoder.norm = kept


def answer_logprobs(
    model: PeftModel, ids: Tensor, mask: Tensor, answer: Tensor, *, reference: bool = True
) -> tuple[list[Tensor], list[Tensor]]:
    """Log-probabilities of each row's answer tokens, with the adapter and, if asked for, without it.

    Args:
        model: with one adapter, active.
        ids: shape (rows, length), padded on the right.
        mask: 1 where a token is, shape (rows, length).
        answer: 1 where the token belongs to the answer, shape (rows, length).
        reference: without it, the second list has empty tensors.

    Returns:
        For each row a tensor of as many values as its answer has tokens: with gradients, and the reference's without.
    """
    base = model.get_base_model()
    decoder, head, same = base.model, base.lm_head, shared_layers(model)
    lengths, found = mask.sum(1), [[torch.empty(0)] * len(ids) for _ in range(2)]
    for rows in lengths.argsort(stable=True).split(GROUP):
        width = int(lengths[rows].max())
        some, seen, said = ids[rows, :width], mask[rows, :width], answer[rows, 1:width].bool()
        given: dict[str, Any] = {"input_ids": some}
        if same:
            with torch.no_grad():
                below = _hidden(decoder, decoder.layers[:same], nn.Identity(), input_ids=some, attention_mask=seen)
            given = {"inputs_embeds": below}

        def logprobs(given: dict = given, seen: Tensor = seen, said: Tensor = said, some: Tensor = some) -> Tensor:
            states = _hidden(decoder, decoder.layers[same:], decoder.norm, attention_mask=seen, **given)
            return -F.cross_entropy(head(states[:, :-1][said]).float(), some[:, 1:][said], reduction="none")

        both = [logprobs()]
        if reference:
            with torch.no_grad(), model.disable_adapter():
                both.append(logprobs())
        sizes = said.sum(1).tolist()
        for place, values in zip(found, both):
            for row, value in zip(rows.tolist(), values.split(sizes)):
                place[row] = value
    return found[0], found[1]


def preference_loss(model: PeftModel, trainer: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """DPO's loss of a batch of TRL's (chosen answers first, then the rejected ones), and what TRL logs beside it.

    Args:
        model: with the adapter that is trained.
        trainer: whose `args` say beta and the weight of the log-likelihood term.
        inputs: `input_ids`, `attention_mask`, `completion_mask`, each of shape (2 x pairs, length); and, where TRL has
            asked the reference beforehand (`precompute_ref_log_probs`), `ref_chosen_logps` and `ref_rejected_logps`.
    """
    args = trainer.args
    known = "ref_chosen_logps" in inputs
    rows = inputs["input_ids"], inputs["attention_mask"], inputs["completion_mask"]
    now, before = answer_logprobs(model, *rows, reference=not known)
    if known:
        reference = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
    else:
        reference = torch.stack([b.sum() for b in before])
    gained = torch.stack([n.sum() for n in now]) - reference
    chosen, rejected = (args.beta * gained).chunk(2)
    weights = args.loss_weights or [1.0] * len(args.loss_type)
    total = -weights[0] * F.logsigmoid(chosen - rejected).mean()
    if "sft" in args.loss_type:
        total = total - weights[1] * torch.cat(now[: len(now) // 2]).mean()
    logged = {
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
        "rewards/accuracies": (chosen > rejected).float().mean(),
        "rewards/margins": (chosen - rejected).mean(),
        "logps/chosen": torch.stack([v.sum() for v in now[: len(now) // 2]]).mean(),
        "logps/rejected": torch.stack([v.sum() for v in now[len(now) // 2 :]]).mean(),
    }
    return total, {key: value.detach() for key, value in logged.items()}


def response_loss(model: PeftModel, inputs: dict[str, Tensor], tokens: Tensor | int | None) -> Tensor:
    """SFT's loss of a batch: negative log-likelihood of the tokens that carry loss, over their number.

    Args:
        model: with all adapters active.
        inputs: `input_ids`, `attention_mask`, `labels` (-100: no loss), each of shape (rows, length), padded on the
            right.
        tokens: how many carry loss in all batches of a step; None: in this one.
    """
    base = model.get_base_model()
    ids, mask, labels = inputs["input_ids"], inputs["attention_mask"], inputs["labels"]
    lengths, total, count = mask.sum(1), 0.0, 0
    for rows in lengths.argsort(stable=True).split(GROUP):
        width = int(lengths[rows].max())
        wanted = labels[rows, 1:width]
        said = wanted != -100
        states = base.model(input_ids=ids[rows, :width], attention_mask=mask[rows, :width], use_cache=False)
        logits = base.lm_head(states.last_hidden_state[:, :-1][said]).float()
        total = total + F.cross_entropy(logits, wanted[said], reduction="sum")
        count += int(said.sum())
    return total / (count if tokens is None else tokens)
