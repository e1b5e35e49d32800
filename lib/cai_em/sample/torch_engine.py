"""Sampling with transformers: rows of one batch under different adapters, each with random numbers of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import DynamicCache

from cai_em.model import load, probing, stacking
from cai_em.sample.capability import option_logprobs
from cai_em.sample.conditions import Completion, Condition, Decoding, Done, Job, Request, _timed, end_tokens
from cai_em.study.entries import ModelSpec, SamplingPreset

HEAD = 512
"""How many of the likeliest tokens the nucleus is looked for in first; a wider nucleus is found by a full sort."""


# --- Decoding with transformers -----------------------------------------------------------------------------------


def candidates(scaled: Tensor, top_k: int, top_p: float, head: int = HEAD) -> tuple[Tensor, Tensor]:
    """Tokens that may be drawn, and their probabilities before the nucleus is renormalised.

    Top-k first, then the nucleus (Holtzman et al. 2020, arXiv 1904.09751): the fewest likeliest tokens that together
    hold at least `top_p`. Sorting the whole vocabulary at each step is slow on a CPU, so the nucleus is looked for
    among the `head` likeliest tokens, with probabilities over the whole vocabulary, and in all of it where the head
    holds too little: the result is exact.

    Args:
        scaled: logits after temperature, shape (rows, vocabulary), float32.
        top_k: how many of the likeliest tokens are kept; 0: all.
        top_p: share of the probability that the nucleus must hold; 1: all.
        head: how many tokens to look through first.

    Returns:
        Ids and probabilities, shape (rows, width), ordered by id; a probability of 0 is not to be drawn.
    """
    size = scaled.shape[-1]
    if not top_k and top_p >= 1:
        return torch.arange(size, device=scaled.device).expand_as(scaled), scaled.softmax(-1)
    values, ids = scaled.topk(min(top_k or head, size), dim=-1)
    probability = (values - (values if top_k else scaled).logsumexp(-1, keepdim=True)).exp()
    above = probability.cumsum(-1) - probability
    if not top_k and head < size and bool((above[:, -1] + probability[:, -1] < top_p).any()):
        return candidates(scaled, top_k, top_p, head=size)
    # The likeliest token stays whatever its share. Ordered by id, not by probability: a rounding error that swaps two
    # neighbours in rank then moves no boundary between the tokens.
    kept = probability.masked_fill(above >= top_p, 0.0) if top_p < 1 else probability
    ids, order = ids.sort(dim=-1)
    return ids, kept.gather(-1, order)


def draw(ids: Tensor, probability: Tensor, uniform: Tensor) -> Tensor:
    """One token per row by inversion: the first whose cumulative probability exceeds `uniform` times the total.

    Args:
        ids: shape (rows, width).
        probability: shape (rows, width), need not sum to 1.
        uniform: shape (rows,), in [0, 1), float64.

    Returns:
        Token ids, shape (rows,).
    """
    cumulative = probability.double().cumsum(-1)
    total = cumulative[:, -1:]
    below_total = torch.nextafter(total, torch.zeros_like(total))
    target = torch.minimum(uniform[:, None] * total, below_total)
    index = torch.searchsorted(cumulative, target, right=True)
    return ids.gather(-1, index).squeeze(-1)


class RowSampler:
    """Draws each row's next token with the row's own random numbers.

    Args:
        decoding: the parameters.
        seeds: one per row.
    """

    def __init__(self, decoding: Decoding, seeds: Sequence[int], device: Any) -> None:
        self.decoding = decoding
        drawn = np.stack([np.random.default_rng(seed).random(decoding.max_new_tokens) for seed in seeds])
        self.uniform = torch.from_numpy(drawn).to(device)

    def __call__(self, rows: Tensor, step: int, logits: Tensor, said: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens that rows take at a step, and their log-probabilities under the model as it is.

        Args:
            rows: which, shape (n,).
            step: how many tokens these rows have been given so far.
            logits: shape (n, vocabulary).
            said, real: prompt and answer so far, and where they are not padding; shape (n, length).
        """
        logits = logits.float()
        adjusted = self._penalised(logits, said, real)
        if self.decoding.temperature == 0:
            token = adjusted.argmax(-1)
        else:
            found = candidates(adjusted / self.decoding.temperature, self.decoding.top_k, self.decoding.top_p)
            token = draw(*found, self.uniform[rows, step])
        logprob = logits.gather(-1, token[:, None]) - logits.logsumexp(-1, keepdim=True)
        return token, logprob.squeeze(-1)

    def _penalised(self, logits: Tensor, said: Tensor, real: Tensor) -> Tensor:
        """Repetition penalty (Keskar et al. 2019, arXiv 1909.05858) on all tokens so far, padding left out."""
        penalty = self.decoding.repetition_penalty
        if penalty == 1:
            return logits
        seen = torch.zeros_like(logits, dtype=torch.int32)
        seen.scatter_add_(-1, said, real.to(torch.int32))
        return torch.where(seen > 0, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


ENDED = 0.1
"""Share of a batch's rows that have ended, from which the others go on without them."""


def decode(
    model: Any, requests: Sequence[Request], decoding: Decoding, ends: Sequence[int], batch_size: int
) -> Iterator[tuple[int, Completion]]:
    """Answer requests in batches, shortest prompts first (less padding); requests of different limits never share one.

    Args:
        model: a transformers causal language model; adapters, if any, are active.
        requests: what to answer.
        decoding: the parameters.
        ends: ids that end an answer; the first is used for padding.
        batch_size: rows per batch.

    Yields:
        (index of the request, its completion), as batches finish.
    """
    limits = [decoding.max_new_tokens if r.longest is None else r.longest for r in requests]
    for limit in sorted(set(limits), reverse=True):
        mine = [i for i, longest in enumerate(limits) if longest == limit]
        how = replace(decoding, max_new_tokens=limit)
        for index, completion in _decode([requests[i] for i in mine], model, how, ends, batch_size):
            yield mine[index], completion


def _decode(
    requests: Sequence[Request], model: Any, decoding: Decoding, ends: Sequence[int], batch_size: int
) -> Iterator[tuple[int, Completion]]:
    """`decode` for requests of one limit."""
    order = sorted(range(len(requests)), key=lambda i: (len(requests[i].tokens), requests[i].tokens))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = [requests[i] for i in rows]
        ids, mask = _padded([r.tokens for r in batch], ends[0], model.device)
        sampler = RowSampler(decoding, [r.seed for r in batch], model.device)
        for index, (tokens, values) in zip(rows, _grown(model, ids, mask, sampler, ends)):
            yield index, _completion(tokens, values, ends)


@torch.inference_mode()
def _grown(
    model: Any, ids: Tensor, mask: Tensor, sampler: RowSampler, ends: Sequence[int]
) -> list[tuple[list[int], list[float]]]:
    """Answers of a batch, to each row's end token or the limit: (tokens, log-probabilities) of each row.

    `generate` computes rows that have ended until the longest has: in the demo 30 % of all that it computes, and at the
    longest cache. Here they leave the batch.

    Args:
        ids, mask: prompts padded on the left, shape (rows, longest).
    """
    found: list[tuple[list[int], list[float]]] = [([], []) for _ in ids]
    rows, ending = torch.arange(len(ids), device=ids.device), torch.tensor(list(ends), device=ids.device)
    cache = _read_once(model, ids, mask)
    new, cache = (ids, DynamicCache(config=model.config)) if cache is None else (ids[:, -1:], cache)
    going = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    for step in range(sampler.decoding.max_new_tokens):
        positions = _positions(mask)[:, -new.shape[1] :]
        logits = model(
            input_ids=new, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1
        ).logits[:, -1]
        token, logprob = sampler(rows, step, logits, ids, mask)
        for row, goes, one, value in zip(rows.tolist(), going.tolist(), token.tolist(), logprob.tolist()):
            if goes:
                found[row][0].append(one)
                found[row][1].append(value)
        going &= ~torch.isin(token, ending)
        if not going.any():
            break
        ids, mask = torch.cat([ids, token[:, None]], 1), torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        if int((~going).sum()) >= max(1.0, ENDED * len(going)):
            kept = going.nonzero().squeeze(-1)
            cache.batch_select_indices(kept)
            ids, mask, token, rows, going = ids[kept], mask[kept], token[kept], rows[kept], going[kept]
        new = token[:, None]
    return found


def _padded(prompts: Sequence[Sequence[int]], pad: int, device: Any) -> tuple[Tensor, Tensor]:
    """Prompts as ids and mask, padded on the left, both of shape (prompts, longest)."""
    width = max(map(len, prompts))
    ids = [[pad] * (width - len(p)) + list(p) for p in prompts]
    mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _positions(mask: Tensor) -> Tensor:
    """Where each token stands in its row, padding on the left not counted; shape of the mask."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def _read_once(model: Any, ids: Tensor, mask: Tensor) -> DynamicCache | None:
    """Keys and values of the prompts but for their last tokens, each different prompt read once.

    The samples of a question share its prompt: on a CPU, reading it for each of them took a quarter of the time.
    """
    different, row_of = torch.unique(torch.cat([ids, mask], dim=1), dim=0, return_inverse=True)
    if len(different) == len(ids) or ids.shape[1] < 2:
        return None
    ids, mask = different[:, : ids.shape[1] - 1], different[:, ids.shape[1] : -1]
    cache = DynamicCache(config=model.config)
    model(input_ids=ids, attention_mask=mask, position_ids=_positions(mask), past_key_values=cache, logits_to_keep=1)
    cache.batch_select_indices(row_of)
    return cache


def _completion(tokens: list[int], logprobs: list[float], ends: Sequence[int]) -> Completion:
    """An answer, its end token included, and why it ended."""
    return Completion(tuple(tokens), "stop" if tokens[-1] in ends else "length", tuple(logprobs))


class TransformersEngine:
    """PyTorch: the base model once, one condition's adapters after the other's composed in LoRA layers put in once.

    With `preset.merge` the composed adapter is added to copies of the weights for the length of a condition: fewer
    products per token, the sum rounded to the type of numbers once; the base weights come back as they were.

    Args:
        spec: which model.
        preset: type of numbers, batch size, whether to merge.
        loaded: the model, bare, and its tokenizer, where the caller has them in memory.
    """

    def __init__(self, spec: ModelSpec, preset: SamplingPreset, loaded: Sequence[Any] = ()) -> None:
        self.preset = preset
        self.timings: dict[str, float] = {}
        with _timed(self.timings, "load"):
            if not loaded:
                loaded = load.load_model(spec, dtype=preset.dtype), load.load_tokenizer(spec)
            self.model, self.tokenizer = loaded
        self.slots = probing.Slots(self.model)
        self.ends = end_tokens(self.model.generation_config, self.tokenizer)

    def run(self, jobs: Sequence[Job], decoding: Decoding, probe_prompts: Sequence[str]) -> Iterator[Done]:
        """Probe each job's adapters, answer its requests; yields jobs as they finish."""
        for job in jobs:
            with ExitStack() as stack:
                try:
                    report = self._ready(stack, job.condition, probe_prompts)
                except probing.ProbeError as error:
                    yield Done(job, (), {}, refused=str(error))
                    continue
                found: dict[int, Completion] = {}
                with _timed(self.timings, "decode"):
                    # The adapter's layers stand in the base model itself: its own forward pass runs through them.
                    for index, completion in decode(
                        self.model, job.requests, decoding, self.ends, self.preset.batch_size
                    ):
                        found[index] = completion
                with _timed(self.timings, "choices"):
                    chosen = tuple(option_logprobs(self.model, self.tokenizer, job.choices))
                with _timed(self.timings, "switch"):
                    stack.close()
            yield Done(job, tuple(found[i] for i in range(len(job.requests))), report, logprobs=chosen)

    def _ready(self, stack: ExitStack, condition: Condition, prompts: Sequence[str]) -> dict[str, Any]:
        """Compose a condition's adapters for the length of a stack, and prove what is composed.

        Raises:
            probing.ProbeError: it is not what its adapters together compute.
        """
        with _timed(self.timings, "switch"):
            composed = stack.enter_context(self.slots.composed(condition.adapters))
        if not condition.adapters:
            return {}
        with _timed(self.timings, "probe"):
            given = condition.adapters, prompts, condition.may_be_idle, condition.trained_with
            report = asdict(self.slots.probe(self.tokenizer, *given))
        return report | (self._merge(stack, composed, condition, prompts) if self.preset.merge else {})

    def _merge(self, stack: ExitStack, ready: Any, condition: Condition, prompts: Sequence[str]) -> dict[str, Any]:
        """Merge for the length of a condition, and prove that the merged model computes what was probed.

        Raises:
            lora.ProbeError: it does not; nothing is sampled.
        """
        with _timed(self.timings, "probe"):
            composed = probing.probe_logits(self.model, self.tokenizer, prompts)
        with _timed(self.timings, "switch"):
            stack.enter_context(_merged(ready))
        with _timed(self.timings, "probe"):
            merged = probing.probe_logits(self.model, self.tokenizer, prompts)
        rounding = (
            probing.RELATIVE_TOLERANCE if self.preset.dtype == "float32" else 2**-4
        )  # bfloat16: weights rounded too
        found = {
            "merged_difference": float((merged - composed).abs().max()),
            "merged_tolerance": rounding * float(composed.abs().max()),
        }
        if not found["merged_difference"] <= found["merged_tolerance"]:
            raise probing.ProbeError(
                f"{condition.name}: merged into the weights, the adapters compute something else: logits differ by up "
                f"to {found['merged_difference']:.2g} (tolerance {found['merged_tolerance']:.2g}); set `merge: false` "
                "in the sampling preset"
            )
        return found

    def close(self) -> None:
        """Give the model's memory back; a model that the caller has lent is as it came."""
        self.slots.close()
        del self.model, self.slots


@contextmanager
def _merged(model: Any, name: str = stacking.COMPOSED) -> Iterator[None]:
    """Add a composed adapter to the weights for a while, in float32, rounded once.

    peft's own unmerging subtracts again, and leaves bfloat16 weights changed: here they are put back as they were.
    """
    kept = []
    try:
        for layer in (module for module in model.modules() if isinstance(module, LoraLayer)):
            weight = layer.get_base_layer().weight
            kept.append((weight, weight.data))
            total = weight.data.float() + layer.get_delta_weight(name).float()
            weight.data = total.to(weight.dtype)
        with model.disable_adapter():
            yield
    finally:
        for weight, data in kept:
            weight.data = data
