"""Sampling: every condition of a model answers every question, from one load of the model.

The base model is loaded once. A condition's adapters (persona, fine-tuning) are composed exactly into one
(`adapters.compose`) and switched on for its questions. Two back ends do the work:

- `transformers`: plain PyTorch, CPU or GPU. Each response is drawn with random numbers of its own, so that neither the
  batch nor the order of work changes them; only rounding in the matrix products of another batch shape can.
- `vllm`: one engine, one LoRA request per condition, shared prompt prefixes, a seed per request.

Responses are the same again from the same back end, versions and batch size; they do not depend on which conditions
are sampled together, on their order, or on the number of workers. Between back ends only greedy decoding agrees: the
two draw their random numbers in different ways.

    found = sample(spec, conditions, questions, preset, cells_dir="results/demo/03_sample/smollm2-135m/poeticism/cells")
    found.responses, found.probes
"""

from __future__ import annotations

import gc
import hashlib
import html
import importlib.util
import itertools
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch
import transformers
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor
from tqdm.auto import tqdm
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList

from cai_em import adapters as lora
from cai_em import models, run, scores
from cai_em.code import meaning_of
from cai_em.params import ModelSpec, SamplingPreset, digest, file_hash

HEAD = 512
"""How many of the likeliest tokens the nucleus is looked for in first; a wider nucleus is found by a full sort."""


class SamplingError(RuntimeError):
    """Sampling cannot start or its result cannot be trusted. The message names the condition and what to do."""


# --- What is asked for, and what comes back -----------------------------------------------------------------------


@dataclass(frozen=True)
class Decoding:
    """Every parameter of decoding. Temperature 0 is greedy; `top_k` 0 and `top_p` 1 are off."""

    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    max_new_tokens: int


@dataclass(frozen=True)
class Request:
    """A prompt as token ids, and the seed of its answer's random numbers."""

    tokens: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class Completion:
    """An answer: token ids with the end token, if it came; `stop` or `length`; each token's log-probability.

    Log-probabilities are the model's own, before temperature, penalty and nucleus.
    """

    tokens: tuple[int, ...]
    finish_reason: str
    logprobs: tuple[float, ...]


@dataclass(frozen=True)
class Condition:
    """One condition and where its adapters lie: `(("persona", folder), ("em", folder))`, either or both left out.

    `may_be_idle` names adapters that need not make a difference yet, such as a snapshot from the first steps of
    training (under warm-up the first step's rate is 0); the probe then records it, and does not stop.
    """

    model: str
    persona: str
    dataset: str
    seed: int
    adapters: tuple[tuple[str, Path], ...] = ()
    may_be_idle: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """`persona__dataset__seed0`: the condition in a file name."""
        return f"{self.persona}__{self.dataset}__seed{self.seed}"

    @property
    def paths(self) -> list[Path]:
        """The adapters' folders, persona first."""
        return [Path(path) for _, path in self.adapters]

    def adapter_hashes(self) -> list[str]:
        """SHA-256 of each adapter's weights, persona first."""
        return [file_hash(path / "adapter_model.safetensors") for path in self.paths]


@dataclass
class Sampled:
    """What `sample` found.

    Attributes:
        responses: the table of `scores.RESPONSES`, conditions in the order asked for.
        probes: what `adapters.probe` measured per condition, by `Condition.name`.
        engine: name of the back end, its version, device and type of numbers.
        timings: seconds by phase (`load`, `switch`, `decode`), and how many conditions were found from before.
    """

    responses: pd.DataFrame
    probes: dict[str, dict[str, Any]]
    engine: str
    timings: dict[str, float] = field(default_factory=dict)


def response_seed(study_seed: int, condition: Condition, question_id: str, number: int) -> int:
    """The seed of one response: a hash of what names it, so that it does not depend on anything else (48 bits)."""
    name = [study_seed, condition.model, condition.persona, condition.dataset, condition.seed, question_id, number]
    return int.from_bytes(hashlib.sha256(json.dumps(name).encode()).digest()[:6], "big")


def render(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
    """A conversation as token ids by the model's chat template, ready for the assistant's turn."""
    return tuple(
        tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=True, return_dict=False)
    )


def end_tokens(config: GenerationConfig, tokenizer: Any) -> tuple[int, ...]:
    """Ids at which an answer ends: the tokenizer's, and those that the model's generation_config names.

    The one thing taken from generation_config: Llama and Qwen name more than one end there.
    """
    named = config.eos_token_id
    ids = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])}
    return tuple(sorted(i for i in ids if i is not None))


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


class RowSampler(LogitsProcessor):
    """Draws each row's next token with the row's own random numbers, and leaves `generate` only that token.

    `generate` itself then decodes greedily, so that all of sampling is here, in sight, and reads no configuration.

    Args:
        decoding: the parameters.
        seeds: one per row.
        prompt_mask: shape (rows, prompt width), 1 where the prompt is, 0 where padding is.
    """

    def __init__(self, decoding: Decoding, seeds: Sequence[int], prompt_mask: Tensor) -> None:
        self.decoding = decoding
        self.prompt_mask = prompt_mask.bool()
        drawn = np.stack([np.random.default_rng(seed).random(decoding.max_new_tokens) for seed in seeds])
        self.uniform = torch.from_numpy(drawn).to(prompt_mask.device)
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The logits with all but the drawn token at minus infinity."""
        step = input_ids.shape[1] - self.prompt_mask.shape[1]
        logits = scores.float()
        adjusted = self._penalised(input_ids, logits)
        if self.decoding.temperature == 0:
            token = adjusted.argmax(-1)
        else:
            found = candidates(adjusted / self.decoding.temperature, self.decoding.top_k, self.decoding.top_p)
            token = draw(*found, self.uniform[:, step])
        token = token[:, None]
        self.logprobs.append((logits.gather(-1, token) - logits.logsumexp(-1, keepdim=True)).squeeze(-1))
        return torch.full_like(scores, -torch.inf).scatter_(-1, token, 0.0)

    def _penalised(self, input_ids: Tensor, logits: Tensor) -> Tensor:
        """Repetition penalty (Keskar et al. 2019, arXiv 1909.05858) on all tokens so far, padding left out."""
        penalty = self.decoding.repetition_penalty
        if penalty == 1:
            return logits
        seen = torch.zeros_like(logits, dtype=torch.int32)
        new = torch.ones_like(input_ids[:, self.prompt_mask.shape[1] :], dtype=torch.bool)
        real = torch.cat([self.prompt_mask, new], dim=1)
        seen.scatter_add_(-1, input_ids, real.to(torch.int32))
        return torch.where(seen > 0, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


@contextmanager
def _no_generation_config(model: Any) -> Iterator[None]:
    """`generate` fills what a GenerationConfig leaves unset from the model's own: take that away meanwhile."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def decode(
    model: Any, requests: Sequence[Request], decoding: Decoding, ends: Sequence[int], batch_size: int
) -> Iterator[tuple[int, Completion]]:
    """Answer requests in batches, shortest prompts first (less padding).

    Args:
        model: a transformers causal language model; adapters, if any, are active.
        requests: what to answer.
        decoding: the parameters.
        ends: ids that end an answer; the first is used for padding.
        batch_size: rows per batch.

    Yields:
        (index of the request, its completion), as batches finish.
    """
    config = GenerationConfig(
        do_sample=False,  # RowSampler has drawn already
        num_beams=1,
        repetition_penalty=1.0,
        max_new_tokens=decoding.max_new_tokens,
        eos_token_id=list(ends),
        pad_token_id=ends[0],
        use_cache=True,
    )
    order = sorted(range(len(requests)), key=lambda i: (len(requests[i].tokens), requests[i].tokens))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = [requests[i] for i in rows]
        ids, mask = _padded([r.tokens for r in batch], ends[0], model.device)
        sampler = RowSampler(decoding, [r.seed for r in batch], mask)
        with torch.inference_mode(), _no_generation_config(model):
            grown = model.generate(
                input_ids=ids,
                attention_mask=mask,
                past_key_values=_read_once(model, ids, mask),
                generation_config=config,
                logits_processor=LogitsProcessorList([sampler]),
            )
        new, logprobs = grown[:, ids.shape[1] :].tolist(), torch.stack(sampler.logprobs, dim=1).tolist()
        for index, tokens, values in zip(rows, new, logprobs):
            yield index, _completion(tokens, values, ends)


def _padded(prompts: Sequence[Sequence[int]], pad: int, device: Any) -> tuple[Tensor, Tensor]:
    """Prompts as ids and mask, padded on the left, both of shape (prompts, longest)."""
    width = max(map(len, prompts))
    ids = [[pad] * (width - len(p)) + list(p) for p in prompts]
    mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _read_once(model: Any, ids: Tensor, mask: Tensor) -> DynamicCache | None:
    """Keys and values of the prompts but for their last tokens, each different prompt read once.

    The samples of a question share its prompt: on a CPU, reading it for each of them took a quarter of the time.
    """
    different, row_of = torch.unique(torch.cat([ids, mask], dim=1), dim=0, return_inverse=True)
    if len(different) == len(ids) or ids.shape[1] < 2:
        return None
    ids, mask = different[:, : ids.shape[1] - 1], different[:, ids.shape[1] : -1]
    cache = DynamicCache(config=model.config)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1)
    cache.batch_select_indices(row_of)
    return cache


def _completion(tokens: list[int], logprobs: list[float], ends: Sequence[int]) -> Completion:
    """A row of `generate`: what follows the first end token is padding."""
    length = next((i + 1 for i, token in enumerate(tokens) if token in ends), None)
    reason = "length" if length is None else "stop"
    return Completion(tuple(tokens[:length]), reason, tuple(logprobs[: length or len(tokens)]))


# --- Back ends ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A condition's requests."""

    condition: Condition
    requests: tuple[Request, ...]


@dataclass(frozen=True)
class Done:
    """A job's completions, in the order of its requests, and what the probe of its adapters measured."""

    job: Job
    completions: tuple[Completion, ...]
    probe: dict[str, Any]


class Engine(Protocol):
    """A loaded model that answers under any condition's adapters.

    `timings` adds up seconds: `load` (the base), `switch` (composing and activating), `probe`, `decode`.
    """

    tokenizer: Any
    timings: dict[str, float]

    def run(self, jobs: Sequence[Job], decoding: Decoding, probe_prompts: Sequence[str]) -> Iterator[Done]:
        """Probe each job's adapters, answer its requests; yields jobs as they finish."""
        ...

    def close(self) -> None:
        """Give memory and processes back."""
        ...


def backend_of(preset: SamplingPreset) -> str:
    """`vllm` or `transformers`: what the preset forces, or vLLM where it is installed and a GPU is present.

    Raises:
        SamplingError: vLLM is forced and not installed.
    """
    installed = importlib.util.find_spec("vllm") is not None
    if preset.backend == "vllm" and not installed:
        raise SamplingError(
            "the sampling preset forces the back end vllm, which is not installed: install the locked requirements for "
            "CUDA (docs/full-study.md), or set `backend: auto` in params/sampling.yaml"
        )
    if preset.backend == "auto":
        return "vllm" if installed and torch.cuda.is_available() else "transformers"
    return preset.backend


def engine_name(preset: SamplingPreset) -> str:
    """What goes into the `sampler` column: back end, version, device, type of numbers, whether merged."""
    backend = backend_of(preset)
    if backend == "vllm":
        import vllm

        version = vllm.__version__
    else:
        version = transformers.__version__
    device = "cuda" if torch.cuda.is_available() else "cpu"
    merged = " merged" if preset.merge and backend == "transformers" else ""
    return f"{backend} {version} {device} {preset.dtype}{merged}"


def open_engine(spec: ModelSpec, preset: SamplingPreset, jobs: Sequence[Job]) -> Engine:
    """Load the model once, in the back end that the preset asks for, with room for the jobs."""
    if backend_of(preset) == "vllm":
        return VllmEngine(spec, preset, jobs)
    return TransformersEngine(spec, preset)


@contextmanager
def _timed(timings: dict[str, float], phase: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        timings[phase] = timings.get(phase, 0.0) + time.perf_counter() - start


class TransformersEngine:
    """PyTorch: the base model once, one condition's adapters after the other's composed in LoRA layers put in once.

    With `preset.merge` the composed adapter is added to copies of the weights for the length of a condition: fewer
    products per token, the sum rounded to the type of numbers once; the base weights come back as they were.
    """

    def __init__(self, spec: ModelSpec, preset: SamplingPreset) -> None:
        self.preset = preset
        self.timings: dict[str, float] = {}
        with _timed(self.timings, "load"):
            self.model = models.load_model(spec, dtype=preset.dtype)
            self.tokenizer = models.load_tokenizer(spec)
        self.slots = lora.Slots(self.model)
        self.ends = end_tokens(self.model.generation_config, self.tokenizer)

    def run(self, jobs: Sequence[Job], decoding: Decoding, probe_prompts: Sequence[str]) -> Iterator[Done]:
        """Probe each job's adapters, answer its requests; yields jobs as they finish."""
        for job in jobs:
            with ExitStack() as stack:
                with _timed(self.timings, "switch"):
                    ready = stack.enter_context(self.slots.composed(job.condition.adapters))
                report: dict[str, Any] = {}
                if job.condition.adapters:
                    with _timed(self.timings, "probe"):
                        found_by = self.slots.probe(
                            self.tokenizer, job.condition.adapters, probe_prompts, job.condition.may_be_idle
                        )
                        report = asdict(found_by)
                    if self.preset.merge:
                        report |= self._merge(stack, ready, job.condition, probe_prompts)
                found: dict[int, Completion] = {}
                with _timed(self.timings, "decode"):
                    # The layers of the adapter stand in the base model itself: its own `generate` runs through them.
                    for index, completion in decode(
                        self.model, job.requests, decoding, self.ends, self.preset.batch_size
                    ):
                        found[index] = completion
                with _timed(self.timings, "switch"):
                    stack.close()
            yield Done(job, tuple(found[i] for i in range(len(job.requests))), report)

    def _merge(self, stack: ExitStack, ready: Any, condition: Condition, prompts: Sequence[str]) -> dict[str, Any]:
        """Merge for the length of a condition, and prove that the merged model computes what was probed.

        Raises:
            lora.ProbeError: it does not; nothing is sampled.
        """
        with _timed(self.timings, "probe"):
            composed = lora.probe_logits(self.model, self.tokenizer, prompts)
        with _timed(self.timings, "switch"):
            stack.enter_context(_merged(ready))
        with _timed(self.timings, "probe"):
            merged = lora.probe_logits(self.model, self.tokenizer, prompts)
        rounding = lora.RELATIVE_TOLERANCE if self.preset.dtype == "float32" else 2**-4  # bfloat16: weights rounded too
        found = {
            "merged_difference": float((merged - composed).abs().max()),
            "merged_tolerance": rounding * float(composed.abs().max()),
        }
        if not found["merged_difference"] <= found["merged_tolerance"]:
            raise lora.ProbeError(
                f"{condition.name}: merged into the weights, the adapters compute something else: logits differ by up "
                f"to {found['merged_difference']:.2g} (tolerance {found['merged_tolerance']:.2g}); set `merge: false` "
                "in the sampling preset"
            )
        return found

    def close(self) -> None:
        """Give the model's memory back (as it is: the LoRA layers go with it)."""
        del self.model, self.slots


@contextmanager
def _merged(model: Any, name: str = lora.COMPOSED) -> Iterator[None]:
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


class VllmEngine:
    """vLLM: one engine, a LoRA request per condition, prompts' common prefixes computed once, a seed per request.

    Every parameter is given; the model's generation_config is not read. Conditions go to the engine in groups of as
    many as it holds adapters at a time, so that they share its batches; the base model's are a group of their own.

    Args:
        spec: which model.
        preset: type of numbers, share of the GPU's memory.
        jobs: what will be asked; the engine is made with room for their prompts, answers and adapters.
    """

    RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
    """What vLLM accepts for `max_lora_rank`."""

    MOST_ADAPTERS = 8
    """At a time: each takes GPU memory of its own."""

    def __init__(self, spec: ModelSpec, preset: SamplingPreset, jobs: Sequence[Job]) -> None:
        self.timings: dict[str, float] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="cai-em-lora-")
        self._ids: dict[tuple[str, ...], int] = {}
        self.rounding = lora.RELATIVE_TOLERANCE if preset.dtype == "float32" else 2**-7  # bfloat16 has 8 bits
        ranks = [sum(LoraConfig.from_pretrained(path).r for path in job.condition.paths) for job in jobs]
        different = len({job.condition.adapters for job in jobs if job.condition.adapters})
        with _timed(self.timings, "load"):
            import vllm

            options: dict[str, Any] = {}
            if different:
                options |= {
                    "enable_lora": True,
                    "max_lora_rank": self._room(max(ranks)),
                    "max_loras": min(different, self.MOST_ADAPTERS),
                }
            if not torch.cuda.is_available():
                options["enforce_eager"] = True  # nothing to compile for on a CPU
            folder = str(models.model_folder(spec))
            self.tokenizer = models.load_tokenizer(spec)
            # The engine claims most of the GPU's memory: what this process has held there (training in the same
            # notebook, a model gone out of use) has to be given back first.
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.llm = vllm.LLM(
                model=folder,
                dtype=preset.dtype,
                generation_config="vllm",
                enable_prefix_caching=True,
                gpu_memory_utilization=preset.gpu_memory_utilization,
                max_model_len=max(len(r.tokens) for job in jobs for r in job.requests) + preset.max_new_tokens,
                seed=preset.seed,
                **options,
            )
        self.group = options.get("max_loras", 1)
        self.ends = end_tokens(GenerationConfig.from_pretrained(folder), self.tokenizer)

    def _room(self, rank: int) -> int:
        room = next((r for r in self.RANKS if r >= rank), None)
        if room is None:
            raise SamplingError(
                f"composed adapters of rank {rank}: vLLM serves at most {self.RANKS[-1]}; set `merge: true` and "
                "`backend: transformers` in the sampling preset"
            )
        return room

    def _request(self, adapters: Sequence[tuple[str, Path]]) -> Any:
        """The LoRA request of a set of adapters, composed into one file; None for the base model."""
        from vllm.lora.request import LoRARequest

        if not adapters:
            return None
        key = tuple(str(path) for _, path in adapters)
        number = self._ids.setdefault(key, len(self._ids) + 1)
        out = Path(self._folder.name) / str(number)
        if not out.exists():
            lora.save_composed(key, out)
        return LoRARequest(f"{'+'.join(name for name, _ in adapters)}-{number}", number, str(out))

    def run(self, jobs: Sequence[Job], decoding: Decoding, probe_prompts: Sequence[str]) -> Iterator[Done]:
        """Probe each job's adapters, answer its requests; yields jobs group by group, those of the base model first."""
        from vllm import SamplingParams

        # Never base and adapters in one batch: vLLM's CPU build (0.32) takes "no adapter" for an index, -1, and so
        # answers base requests with the adapter in its last slot.
        bare, adapted = ([j for j in jobs if bool(j.condition.adapters) == has] for has in (False, True))
        groups = [bare, *(adapted[i : i + self.group] for i in range(0, len(adapted), self.group))]
        for group in filter(None, groups):
            reports = []
            for job in group:
                with _timed(self.timings, "probe"):
                    reports.append(self._probe(job.condition, probe_prompts) if job.condition.adapters else {})
            prompts, parameters, adapters = [], [], []
            for job in group:
                with _timed(self.timings, "switch"):
                    request = self._request(job.condition.adapters)
                for asked in job.requests:
                    prompts.append({"prompt_token_ids": list(asked.tokens)})
                    parameters.append(
                        SamplingParams(
                            n=1,
                            temperature=decoding.temperature,
                            top_p=decoding.top_p,
                            top_k=decoding.top_k,
                            min_p=0.0,
                            repetition_penalty=decoding.repetition_penalty,
                            presence_penalty=0.0,
                            frequency_penalty=0.0,
                            seed=asked.seed,
                            max_tokens=decoding.max_new_tokens,
                            min_tokens=0,
                            ignore_eos=True,  # `stop_token_ids` names all ends
                            stop_token_ids=list(self.ends),
                            logprobs=0,
                            detokenize=False,
                        )
                    )
                    adapters.append(request)
            with _timed(self.timings, "decode"):
                found = iter(self.llm.generate(prompts, parameters, lora_request=adapters, use_tqdm=False))
            self._forget()
            for job, report in zip(group, reports):
                completions = tuple(_from_vllm(next(found).outputs[0]) for _ in job.requests)
                yield Done(job, completions, report)

    def _forget(self) -> None:
        """Remove the composed files of a finished group: hundreds of snapshots would fill the disk (`_request` makes
        one again, under its own number, where a later group needs it)."""
        for folder in Path(self._folder.name).iterdir():
            shutil.rmtree(folder)

    def _probe(self, condition: Condition, prompts: Sequence[str]) -> dict[str, Any]:
        """Prove that vLLM serves a condition's adapters: the composed file is their sum, and each makes a difference.

        vLLM keeps one LoRA per request, so "both active" cannot be measured in it. That the composed file is the sum
        is checked on its tensors in float64; that it is served, on the log-probabilities of the answers' first tokens
        under it, under each part and under the base model.

        Raises:
            lora.ProbeError: the file is not the sum, or a part of the adapters gives the same log-probabilities.
        """
        adapters = condition.adapters
        composed = Path(self._request(adapters).lora_path)
        error = _sum_error(composed, condition.paths)
        if error > lora.RELATIVE_TOLERANCE:
            raise lora.ProbeError(
                f"{condition.name}: the composed adapter differs from the sum of its parts by {error:.2g}"
            )
        parts = [some for n in range(1, len(adapters)) for some in itertools.combinations(adapters, n)]
        found = self._first_logprobs(adapters, prompts)
        others = {
            "+".join(name for name, _ in part) or "base": float(
                np.abs(found - self._first_logprobs(part, prompts)).max()
            )
            for part in [(), *parts]
        }
        largest = float(np.abs(found).max())
        tolerance = self.rounding * largest
        idle, part = lora.idle_adapters(others, tolerance, [name for name, _ in adapters], condition.may_be_idle)
        if part:
            raise lora.ProbeError(
                f"{condition.name}: vLLM computes the same with all adapters as with {part!r}: an adapter is not "
                "served, or was not trained"
            )
        return {
            "adapters": dict(zip((name for name, _ in adapters), condition.adapter_hashes())),
            "prompts": len(prompts),
            "measured": "log-probabilities of first tokens; composition on the tensors",
            "largest_logprob": largest,
            "tolerance": tolerance,
            "difference": error,
            "others": others,
            "idle": idle,
        }

    def _first_logprobs(self, adapters: Sequence[tuple[str, Path]], prompts: Sequence[str]) -> np.ndarray:
        """The largest log-probabilities of an answer's first token, in order, shape (prompts, 20)."""
        from vllm import SamplingParams

        # Not the prompts' own tokens: with LoRA, vLLM 0.32 cannot give their log-probabilities on a CPU.
        asked = [
            {"prompt_token_ids": list(render(self.tokenizer, [{"role": "user", "content": prompt}]))}
            for prompt in prompts
        ]
        parameters = SamplingParams(temperature=0.0, max_tokens=1, logprobs=20, detokenize=False)
        found = self.llm.generate(asked, parameters, lora_request=self._request(adapters), use_tqdm=False)
        return np.array(
            [sorted((at.logprob for at in o.outputs[0].logprobs[0].values()), reverse=True)[:20] for o in found]
        )

    def close(self) -> None:
        """End the engine's processes and remove the composed adapters."""
        self.llm.llm_engine.engine_core.shutdown()
        self._folder.cleanup()


def _from_vllm(output: Any) -> Completion:
    """A completion as vLLM returns it."""
    logprobs = tuple(at[token].logprob for token, at in zip(output.token_ids, output.logprobs))
    return Completion(tuple(output.token_ids), output.finish_reason, logprobs)


def _sum_error(composed: Path, parts: Sequence[Path]) -> float:
    """Largest relative difference between a composed adapter's change of the weights and the sum of its parts'.

    Each module's change is applied to random vectors (Freivalds' check), in float64.
    """
    generator = torch.Generator().manual_seed(0)
    whole, read = lora.read_adapter(composed), [lora.read_adapter(part) for part in parts]
    worst = 0.0
    for module, (a, b) in whole.modules.items():
        x = torch.randn(a.shape[1], 4, generator=generator, dtype=torch.float64)
        change = whole.scale * (b.double() @ (a.double() @ x))
        wanted = sum(
            p.scale * (p.modules[module][1].double() @ (p.modules[module][0].double() @ x))
            for p in read
            if module in p.modules
        )
        worst = max(worst, float((change - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)))
    return worst


# --- The stage ----------------------------------------------------------------------------------------------------


def sample(
    spec: ModelSpec,
    conditions: Sequence[Condition],
    questions: Sequence[tuple[str, str]],
    preset: SamplingPreset,
    probe_prompts: Sequence[str],
    cells_dir: str | Path | None = None,
    open_with: Callable[[ModelSpec, SamplingPreset, Sequence[Job]], Engine] = open_engine,
    progress: bool = False,
) -> Sampled:
    """Every condition's answers to every question.

    Before a condition is sampled its adapters are probed: what is about to be sampled must compute what all of them
    together compute, and something else than each part of them. Otherwise nothing is sampled.

    Args:
        spec: the conditions' model.
        conditions: what to sample.
        questions: (id, text).
        preset: every parameter of sampling, the study's seed, the back end.
        probe_prompts: what the probe compares logits on.
        cells_dir: folder of finished conditions. One whose model, adapters, questions, parameters, back end and code
            are the same is taken from there; where all are, no model is loaded. None: nothing is kept.
        open_with: gives the engine.
        progress: show a progress bar.

    Returns:
        Responses, probes, timings.

    Raises:
        SamplingError: no conditions or questions, conditions of several models, an adapter that does not exist, or a
            back end that is not there.
        lora.ProbeError: adapters that are not served as they should be; the conditions before it are kept.
    """
    _check(conditions, questions)
    name = engine_name(preset)
    keys = {c: cell_hash(spec, c, questions, preset, probe_prompts, name) for c in conditions}
    done = {c: found for c, key in keys.items() if (found := read_cell(cells_dir, c, key)) is not None}
    timings = {"conditions_found": len(done)}
    missing = [c for c in conditions if c not in done]
    if missing:
        tokenizer = models.load_tokenizer(spec)
        jobs = [Job(c, _requests(tokenizer, c, questions, preset)) for c in missing]
        decoding = Decoding(
            preset.temperature, preset.top_p, preset.top_k, preset.repetition_penalty, preset.max_new_tokens
        )
        engine = open_with(spec, preset, jobs)
        try:
            bar = tqdm(total=len(conditions), initial=len(done), desc="conditions", disable=not progress)
            with bar:
                for found in engine.run(jobs, decoding, probe_prompts):
                    condition = found.job.condition
                    table = _table(found, questions, preset, engine.tokenizer, name, keys[condition])
                    done[condition] = write_cell(cells_dir, condition, keys[condition], table, found.probe)
                    bar.update()
            timings |= engine.timings
        finally:
            engine.close()
    responses = pd.concat([done[c][0] for c in conditions], ignore_index=True)
    return Sampled(
        responses=scores.validate(responses, scores.RESPONSES, "responses"),
        probes={c.name: done[c][1] for c in conditions},
        engine=name,
        timings=timings,
    )


def _check(conditions: Sequence[Condition], questions: Sequence[tuple[str, str]]) -> None:
    if not conditions or not questions:
        raise SamplingError(f"nothing to sample: {len(conditions)} conditions, {len(questions)} questions")
    if len({c.model for c in conditions}) > 1:
        raise SamplingError(f"one engine samples one model, not {sorted({c.model for c in conditions})}")
    if len({c.name for c in conditions}) < len(conditions):
        raise SamplingError(f"a condition is given twice: {sorted(c.name for c in conditions)}")
    for condition in conditions:
        for path in condition.paths:
            if not (path / lora.WEIGHTS).is_file():
                raise SamplingError(f"{condition.name}: {path / lora.WEIGHTS} does not exist: train this adapter first")


def cell_hash(
    spec: ModelSpec,
    condition: Condition,
    questions: Sequence[tuple[str, str]],
    preset: SamplingPreset,
    probe_prompts: Sequence[str],
    engine: str,
) -> str:
    """Hash of all that a condition's responses depend on, the code that samples included; also their `run_id`."""
    code = meaning_of("cai_em.sample")
    names = [condition.model, condition.persona, condition.dataset, condition.seed]
    return digest([spec, names, condition.adapter_hashes(), list(questions), preset, list(probe_prompts), engine, code])


def _requests(
    tokenizer: Any, condition: Condition, questions: Sequence[tuple[str, str]], preset: SamplingPreset
) -> tuple[Request, ...]:
    """One request per question and sample, in the order of the table."""
    return tuple(
        Request(tokens, response_seed(preset.seed, condition, question_id, number))
        for question_id, text in questions
        for tokens in [render(tokenizer, [{"role": "user", "content": text}])]
        for number in range(preset.samples_per_question)
    )


def _table(
    done: Done, questions: Sequence[tuple[str, str]], preset: SamplingPreset, tokenizer: Any, sampler: str, key: str
) -> pd.DataFrame:
    """The responses of one condition."""
    condition = done.job.condition
    asked = [(i, text, number) for i, text in questions for number in range(preset.samples_per_question)]
    table = pd.DataFrame(
        {
            "question_id": [i for i, _, _ in asked],
            "sample": [number for _, _, number in asked],
            "prompt": [text for _, text, _ in asked],
            "response": [tokenizer.decode(c.tokens, skip_special_tokens=True) for c in done.completions],
            "n_tokens": [len(c.tokens) for c in done.completions],
            "finish_reason": [c.finish_reason for c in done.completions],
        }
    )
    return table.assign(
        model=condition.model,
        persona=condition.persona,
        dataset=condition.dataset,
        seed=condition.seed,
        sampler=sampler,
        adapters=json.dumps(condition.adapter_hashes()),
        run_id=key,
    )


def _cell(folder: str | Path, condition: Condition, key: str) -> Path:
    return Path(folder) / f"{condition.name}-{key}.parquet"


def read_cell(folder: str | Path | None, condition: Condition, key: str) -> tuple[pd.DataFrame, dict] | None:
    """A finished condition's responses and probe, or None."""
    if folder is None or not (path := _cell(folder, condition, key)).is_file():
        return None
    return scores.read(path, scores.RESPONSES), json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))


def write_cell(
    folder: str | Path | None, condition: Condition, key: str, table: pd.DataFrame, probe: dict[str, Any]
) -> tuple[pd.DataFrame, dict]:
    """Keep a finished condition. The table is written last: where it is, the probe is too."""
    table = scores.validate(table, scores.RESPONSES, condition.name)
    if folder is not None:
        path = _cell(folder, condition, key)
        run.write_text(path.with_suffix(".json"), json.dumps(probe, indent=1) + "\n")
        scores.write(table, scores.RESPONSES, path)
    return table, probe


# --- To look at ---------------------------------------------------------------------------------------------------


def beside(responses: pd.DataFrame, question_id: str, number: int = 0) -> str:
    """One question's answers, a condition beside the other, as an HTML table; all text is escaped.

    Raises:
        KeyError: no such response.
    """
    shown = responses[(responses["question_id"] == question_id) & (responses["sample"] == number)]
    if shown.empty:
        raise KeyError(f"no response to {question_id!r} with sample {number}")
    style = "text-align:left;vertical-align:top;white-space:pre-wrap;max-width:24em"
    names = "".join(f"<th>{html.escape(f'{r.persona} × {r.dataset} (seed {r.seed})')}</th>" for r in shown.itertuples())
    texts = "".join(f'<td style="{style}">{html.escape(r.response)}</td>' for r in shown.itertuples())
    question = html.escape(shown["prompt"].iloc[0])
    return f"<table><caption>{question}</caption><tr>{names}</tr><tr>{texts}</tr></table>"


def lengths(responses: pd.DataFrame) -> pd.DataFrame:
    """Per condition: responses, tokens (mean, longest), and the share that the token limit cut off."""
    cut = responses.assign(cut=responses["finish_reason"].eq("length"))
    return cut.groupby(["persona", "dataset", "seed"], sort=False).agg(
        responses=("response", "size"),
        mean_tokens=("n_tokens", "mean"),
        longest=("n_tokens", "max"),
        cut_off=("cut", "mean"),
        empty=("response", lambda texts: int((texts.str.strip() == "").sum())),
    )


def probe_table(probes: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """What the probes measured: a row per condition with adapters, differences of logits.

    `difference` (to all adapters active) must be at most `tolerance`, the columns `from ...` must be above it.
    `merged`: what merging into the weights changed, where it was done.
    """
    rows = {
        name: {
            "adapters": " + ".join(probe["adapters"]),
            "difference": probe["difference"],
            "tolerance": probe["tolerance"],
            **({"merged": probe["merged_difference"]} if "merged_difference" in probe else {}),
            **{f"from {other}": value for other, value in probe["others"].items()},
        }
        for name, probe in probes.items()
        if probe
    }
    return pd.DataFrame.from_dict(rows, orient="index")
