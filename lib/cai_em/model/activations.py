"""Inside the residual stream: reading activations, adding to them, taking directions out; log-probabilities."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from cai_em.model import load
from cai_em.model.layers import SteeringError, layer_number

LONGEST_TEXT = 20_000
"""Characters of a response that are read."""
LONGEST_TOKENS = 1_024
"""Tokens of a response that are read."""


def readable(text: str) -> str:
    """The part of a text that is read."""
    return text[:LONGEST_TEXT]


# --- Coherence ----------------------------------------------------------------------------------------------------


def mean_logprobs(
    model: torch.nn.Module,
    tokenizer: Any,
    prompts: list[str],
    responses: list[str],
    *,
    tokens_at_once: int = 4_096,
    progress: Callable[[int], None] = lambda n: None,
) -> np.ndarray:
    """Mean natural-log probability of each response's tokens, given its prompt in the model's chat template.

    The response's end token is not counted. Log-softmax in float32 whatever the model computes in; sequences are padded
    on the right, where a causal model does not see the padding. A prompt that several responses share is read once, and
    they stand side by side after it, hidden from one another.

    Args:
        model: a causal language model without adapters, in evaluation mode.
        tokenizer: its tokenizer, with a chat template.
        prompts, responses: n texts each.
        tokens_at_once: size of a batch, in tokens with padding.
        progress: told how many responses are done.

    Returns:
        Shape (n,), nats a token; NaN for a response without tokens.
    """
    sequences = [_encode(tokenizer, prompt, response) for prompt, response in zip(prompts, responses)]
    result = np.full(len(sequences), np.nan)
    order = sorted(
        (i for i, (ids, start) in enumerate(sequences) if len(ids) > start), key=lambda i: len(sequences[i][0])
    )
    device = next(model.parameters()).device
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    progress(len(sequences) - len(order))
    together = isinstance(model, PreTrainedModel) and model.config._attn_implementation in ("sdpa", "eager")
    rows = _rows([sequences[i] for i in order], order, ROW_TOKENS if together else 0)
    rows.sort(key=lambda row: row.length)
    for batch in _batches(list(range(len(rows))), [row.length for row in rows], tokens_at_once):
        some = [rows[i] for i in batch]
        width = max(row.length for row in some)
        ids = torch.full((len(some), width), pad)
        mask = torch.zeros_like(ids)
        for n, row in enumerate(some):
            ids[n, : row.length] = torch.tensor(row.tokens)
            mask[n, : row.length] = 1
        given = {"attention_mask": mask}
        if any(len(row.answers) > 1 for row in some):
            given = _side_by_side(some, width, next(model.parameters()).dtype)
        kept = torch.arange(width)
        if isinstance(model, PreTrainedModel):  # a fifth of a small model is the vocabulary: not over the prompts
            kept = torch.tensor(sorted({at for row in some for _, places, _ in row.foretold() for at in places}))
            given["logits_to_keep"] = kept
        place = {at: k for k, at in enumerate(kept.tolist())}
        with torch.inference_mode():
            logits = model(input_ids=ids.to(device), **{n: t.to(device) for n, t in given.items()}).logits
        for n, row in enumerate(some):
            for i, places, answer in row.foretold():
                foretold = logits[n, [place[at] for at in places]].float().log_softmax(-1)
                targets = torch.tensor(answer, device=foretold.device)
                result[i] = float(foretold.gather(-1, targets[:, None]).double().mean())
        progress(sum(len(row.answers) for row in some))
    return result


ROW_TOKENS = 512
"""Tokens of answers to one prompt that are read in one row: more would cost attention among answers that do not see one
another."""


@dataclass
class _Row:
    """A prompt (`prompt` tokens long) and answers to it: (which, where it begins, its tokens)."""

    tokens: list[int]
    prompt: int
    answers: list[tuple[int, int, list[int]]]

    @property
    def length(self) -> int:
        return len(self.tokens)

    def foretold(self) -> Iterator[tuple[int, list[int], list[int]]]:
        """Of each answer: which, where its tokens are foretold, and the tokens.

        The logits at one position foretell the token at the next; an answer's first, those at the prompt's end.
        """
        for i, at, answer in self.answers:
            yield i, [self.prompt - 1, *range(at, at + len(answer) - 1)], answer


def _rows(sequences: Sequence[tuple[list[int], int]], names: Sequence[int], most: int) -> list[_Row]:
    """Answers to one prompt side by side after it, up to `most` tokens of them in a row, and at least one."""
    rows: list[_Row] = []
    last: dict[tuple[int, ...], _Row] = {}
    for name, (ids, start) in zip(names, sequences, strict=True):
        answer = ids[start:]
        row = last.get(tuple(ids[:start]))
        if row is None or row.length - row.prompt + len(answer) > most:
            row = last[tuple(ids[:start])] = _Row(ids[:start], start, [])
            rows.append(row)
        row.answers.append((name, row.length, answer))
        row.tokens = row.tokens + answer
    return rows


def _side_by_side(rows: Sequence[_Row], width: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Mask and positions with which each answer of a row sees the prompt and itself, as if it stood there alone."""
    positions = torch.arange(width).repeat(len(rows), 1)
    seen = torch.ones(width, width, dtype=torch.bool).tril().repeat(len(rows), 1, 1)
    for n, row in enumerate(rows):
        for _, at, answer in row.answers:
            seen[n, at : at + len(answer), row.prompt : at] = False
            positions[n, at : at + len(answer)] = torch.arange(row.prompt, row.prompt + len(answer))
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    return {"attention_mask": mask[:, None], "position_ids": positions}


def _encode(tokenizer: Any, prompt: str, response: str) -> tuple[list[int], int]:
    """Token ids of prompt and response, and where the response starts."""
    turn = [{"role": "user", "content": readable(prompt)}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    before = tokenizer(text, add_special_tokens=False)["input_ids"][-LONGEST_TOKENS:]
    after = tokenizer(readable(response), add_special_tokens=False)["input_ids"] if response.strip() else []
    return before + after[:LONGEST_TOKENS], len(before)


def _batches(order: list[int], lengths: list[int], tokens_at_once: int) -> list[list[int]]:
    """`order` (by length) in batches of at most so many tokens with padding, and at least one sequence."""
    batches: list[list[int]] = []
    for i in order:
        if not batches or lengths[i] * (len(batches[-1]) + 1) > tokens_at_once:
            batches.append([])
        batches[-1].append(i)
    return batches


Vectors = Mapping[int, Tensor | np.ndarray]
"""Layer -> vector of shape (hidden,)."""


# --- The residual stream -------------------------------------------------------------------------------------------


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The blocks of a transformers model (with or without adapters), in order.

    Raises:
        SteeringError: the model has no list of `num_hidden_layers` blocks.
    """
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    wanted = inner.config.get_text_config().num_hidden_layers
    for _, module in inner.named_modules():
        layers = getattr(module, "layers", None)
        if isinstance(layers, nn.ModuleList) and len(layers) == wanted:
            return layers
    raise SteeringError(f"{type(inner).__name__} has no list of {wanted} layers")


Edit = Callable[[Tensor], Tensor | None]
"""Given a layer's output (rows, length, hidden), what to put in its place; None: leave it."""


@contextlib.contextmanager
def _hooks(model: nn.Module, edits: Mapping[int, Edit]) -> Iterator[None]:
    """Run `edits` on layers' outputs for the length of a block; every hook is removed, also after an error."""
    layers = decoder_layers(model)
    handles: list[RemovableHandle] = []

    def hook(edit: Edit) -> Callable[..., Any]:
        def run(module: nn.Module, inputs: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            new = edit(hidden)
            if new is None:
                return None
            return (new, *output[1:]) if isinstance(output, tuple) else new

        return run

    try:
        for layer, edit in edits.items():
            handles.append(layers[layer_number(layer, len(layers))].register_forward_hook(hook(edit)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _as_tensor(vector: Tensor | np.ndarray, model: nn.Module) -> Tensor:
    tensor = torch.as_tensor(np.asarray(vector) if not isinstance(vector, Tensor) else vector)
    place = next(decoder_layers(model)[0].parameters()).device
    size = model.config.get_text_config().hidden_size
    if tensor.shape != (size,) or not torch.isfinite(tensor).all():
        raise SteeringError(f"a vector must have {size} finite numbers; found shape {tuple(tensor.shape)}")
    return tensor.to(place, torch.float32)


def adding(model: nn.Module, vectors: Vectors) -> contextlib.AbstractContextManager[None]:
    """Add a vector to the residual stream after each layer named, at every token, within a `with` block."""

    def edit(vector: Tensor) -> Edit:
        return lambda hidden: (hidden.float() + vector).to(hidden.dtype)

    return _hooks(model, {layer: edit(_as_tensor(v, model)) for layer, v in vectors.items()})


MASSIVE = 8.0
"""An activation so many times as long as the median of those computed with it is massive, and left alone."""


def ablating(
    model: nn.Module, vectors: Vectors, levels: Mapping[int, float] | None = None
) -> contextlib.AbstractContextManager[None]:
    """Hold the residual stream at a level along a direction, after each layer named, within a `with` block.

    Every token is held there but those with massive activations (see the module's head).

    Args:
        model: whose.
        vectors: layer -> direction (its length does not matter).
        levels: layer -> what the projection is set to; None: 0.

    Raises:
        SteeringError: a vector of length 0 has no direction.
    """

    def edit(vector: Tensor, level: float) -> Edit:
        if not vector.norm() > 0:
            raise SteeringError("a vector of length 0 has no direction to ablate")
        unit = vector / vector.norm()

        def ablated(hidden: Tensor) -> Tensor:
            x = hidden.float()
            length = x.norm(dim=-1)
            away = (x @ unit - level).masked_fill(length > MASSIVE * length.median(), 0.0)
            return (x - away[..., None] * unit).to(hidden.dtype)

        return ablated

    levels = levels or {}
    return _hooks(model, {layer: edit(_as_tensor(v, model), levels.get(layer, 0.0)) for layer, v in vectors.items()})


@torch.inference_mode()
def mean_activations(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    responses: Sequence[str],
    *,
    batch_size: int = 16,
) -> np.ndarray:
    """Mean residual stream over each response's tokens (its end token included), after every layer.

    The prompt and padding do not count; sums are in float32 whatever the model computes in.

    Args:
        model: a transformers model, in evaluation mode; adapters, if any, as they are to be.
        tokenizer: its tokenizer.
        prompts, responses: n texts each.
        batch_size: conversations at once.

    Returns:
        (n, layers, hidden), float32.
    """
    if len(prompts) != len(responses) or not prompts:
        raise SteeringError(f"{len(prompts)} prompts and {len(responses)} responses: expected as many, and some")
    layers = decoder_layers(model)
    encoded = [
        load.encode_conversation(
            tokenizer, [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        )
        for prompt, response in zip(prompts, responses)
    ]
    found = np.empty((len(encoded), len(layers), model.config.get_text_config().hidden_size), np.float32)
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i][0]))
    device = next(model.parameters()).device
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        longest = max(len(encoded[i][0]) for i in rows)
        ids = torch.full((len(rows), longest), tokenizer.pad_token_id, device=device)
        attention, counted = torch.zeros_like(ids), torch.zeros(len(rows), longest, device=device)
        for row, i in enumerate(rows):
            tokens, written = encoded[i]
            ids[row, : len(tokens)] = torch.tensor(tokens)
            attention[row, : len(tokens)] = 1
            counted[row, : len(tokens)] = torch.tensor(written, dtype=torch.float32)
        means: dict[int, Tensor] = {}

        def keep(layer: int, means: dict[int, Tensor] = means, counted: Tensor = counted) -> Edit:
            def average(hidden: Tensor) -> None:
                # Not a product with zeros: whatever stands at the padding, NaN included, must not get in.
                x = hidden.float().masked_fill(counted[..., None] == 0, 0.0)
                means[layer] = x.sum(dim=1) / counted.sum(dim=1, keepdim=True)

            return average

        with _hooks(model, {layer: keep(layer) for layer in range(len(layers))}):
            model(input_ids=ids, attention_mask=attention, use_cache=False)
        found[rows] = torch.stack([means[layer] for layer in range(len(layers))], dim=1).cpu().numpy()
    return found
