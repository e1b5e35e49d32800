"""Sampling with vLLM: one engine, an adapter for each request."""

from __future__ import annotations

import gc
import itertools
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from transformers import GenerationConfig

from cai_em.model import adapters as model_adapters
from cai_em.model import load, probing
from cai_em.sample.conditions import (
    Completion,
    Condition,
    Decoding,
    Done,
    Job,
    SamplingError,
    _timed,
    end_tokens,
    render,
)
from cai_em.study.entries import ModelSpec, SamplingPreset

KEPT_ADAPTERS = 4
"""Adapters whose tensors stay in memory: a persona and the ones of the next sums (of a 7B model up to 1.3 GB each)."""


class VllmEngine:
    """vLLM: one engine, a LoRA request per condition, prompts' common prefixes computed once, a seed per request.

    Every parameter is given; the model's generation_config is not read. Conditions go to the engine in groups of as
    many as it holds adapters at a time, so that they share its batches; the base model's are a group of their own. An
    adapter alone is served from its own folder. Sums are written, and checked, by a thread, a group ahead of the one
    that is being decoded, in the engine's type of numbers, to which it would round them anyway; a persona's tensors are
    read once. What the base and single adapters answer to the probe is asked once.

    The same seed gives the same text from the same engine on a CPU. On a GPU the sums of a batch depend on what else is
    in it, unless `VLLM_BATCH_INVARIANT=1` is set, which costs speed and which vLLM has for some GPUs only.

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
        self._read = lru_cache(maxsize=KEPT_ADAPTERS)(model_adapters.read_adapter)
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="compose")
        self._sums: dict[tuple[str, ...], Future[float]] = {}
        self._answered: dict[tuple[tuple[str, ...], tuple[str, ...]], np.ndarray] = {}
        self._proved: dict[tuple[Condition, tuple[str, ...]], dict[str, Any]] = {}
        self._dtype = getattr(torch, preset.dtype)
        self.rounding = probing.RELATIVE_TOLERANCE if preset.dtype == "float32" else 2**-7  # bfloat16 has 8 bits
        sets = [parts for job in jobs for parts in (job.condition.adapters, job.condition.trained_with)]
        ranks = [sum(LoraConfig.from_pretrained(path).r for _, path in parts) for parts in sets]
        different = len({job.condition.adapters for job in jobs if job.condition.adapters})
        with _timed(self.timings, "load"):
            # By default vLLM forks unless something has initialised CUDA before, and a forked CUDA context is dead.
            os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
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
            folder = str(load.model_folder(spec))
            self.tokenizer = load.load_tokenizer(spec)
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
                max_model_len=self._longest(jobs, preset),
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
        if len(key) > 1:
            self._compose(key).result()
        place = self._place(key) if len(key) > 1 else Path(key[0])
        return LoRARequest(f"{'+'.join(name for name, _ in adapters)}-{number}", number, str(place))

    def _place(self, key: tuple[str, ...]) -> Path:
        return Path(self._folder.name) / str(self._ids.setdefault(key, len(self._ids) + 1))

    def _compose(self, key: tuple[str, ...]) -> Future[float]:
        """The sum of several adapters as a file, in the making or made; it gives `_sum_error`."""
        if key not in self._sums:
            self._sums[key] = self._ahead.submit(self._composed, key, self._place(key))
        return self._sums[key]

    def _composed(self, key: tuple[str, ...], out: Path) -> float:
        parts = [self._read(path) for path in key]
        model_adapters.save_composed(parts, out, dtype=self._dtype)
        return _sum_error(out, parts)

    @staticmethod
    def _longest(jobs: Sequence[Job], preset: SamplingPreset) -> int:
        longest = max((len(r.tokens) for job in jobs for r in job.requests), default=0)
        # A token is a byte at least, and the template is short: room for every multiple-choice question.
        asked = max((len(c.prompt.encode()) + 256 for job in jobs for c in job.choices), default=0)
        return max(longest, asked) + preset.max_new_tokens

    def run(self, jobs: Sequence[Job], decoding: Decoding, probe_prompts: Sequence[str]) -> Iterator[Done]:
        """Probe each job's adapters, answer its requests; yields jobs group by group, those of the base model first."""
        from vllm import SamplingParams

        # Never base and adapters in one batch: vLLM's CPU build (0.32) takes "no adapter" for an index, -1, and so
        # answers base requests with the adapter in its last slot.
        bare, adapted = ([j for j in jobs if bool(j.condition.adapters) == has] for has in (False, True))
        groups = [bare, *(adapted[i : i + self.group] for i in range(0, len(adapted), self.group))]
        groups = [group for group in groups if group]
        for number, group in enumerate(groups):
            proved: list[tuple[Job, dict[str, Any]]] = []
            for job in group:
                with _timed(self.timings, "switch"):
                    self._request(job.condition.adapters)
                try:
                    with _timed(self.timings, "probe"):
                        proved.append(
                            (job, self._probe(job.condition, probe_prompts) if job.condition.adapters else {})
                        )
                except probing.ProbeError as error:
                    yield Done(job, (), {}, refused=str(error))
            for job in groups[number + 1] if number + 1 < len(groups) else ():
                if len(job.condition.paths) > 1:
                    self._compose(tuple(map(str, job.condition.paths)))
            group = [job for job, _ in proved]
            if not group:
                continue
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
                            max_tokens=decoding.max_new_tokens if asked.longest is None else asked.longest,
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
            with _timed(self.timings, "choices"):
                chosen = {job.condition: self._chosen(job) for job in group}
            self._forget(group)
            for job, report in proved:
                completions = tuple(_from_vllm(next(found).outputs[0]) for _ in job.requests)
                yield Done(job, completions, report, logprobs=chosen[job.condition])

    def _chosen(self, job: Job) -> tuple[tuple[float, ...], ...]:
        """Log-probabilities of each choice's options as an answer's first token; minus infinity below the 20 likeliest.

        Raises:
            SamplingError: an option is longer than a token: under an adapter vLLM says nothing of a prompt's tokens.
        """
        from vllm import SamplingParams

        if not job.choices:
            return ()
        ids = [[self.tokenizer.encode(o, add_special_tokens=False) for o in c.options] for c in job.choices]
        if any(len(option) != 1 for options in ids for option in options):
            raise SamplingError(
                "with vLLM, multiple-choice questions are answered by letter: set `capability: letter` in the profile"
            )
        asked = [
            {"prompt_token_ids": list(render(self.tokenizer, [{"role": "user", "content": c.prompt}]))}
            for c in job.choices
        ]
        parameters = SamplingParams(temperature=0.0, max_tokens=1, logprobs=20, detokenize=False)
        request = self._request(job.condition.adapters)
        found = self.llm.generate(asked, parameters, lora_request=request, use_tqdm=False)
        first = [o.outputs[0].logprobs[0] for o in found]
        return tuple(
            tuple(at[option[0]].logprob if option[0] in at else -math.inf for option in options)
            for at, options in zip(first, ids)
        )

    def _forget(self, group: Sequence[Job]) -> None:
        """Remove the composed files of a finished group: hundreds of snapshots would fill the disk (`_request` makes
        one again, under its own number, where it is needed)."""
        for job in group:
            if self._sums.pop(key := tuple(map(str, job.condition.paths)), None):
                shutil.rmtree(self._place(key))

    def _probe(self, condition: Condition, prompts: Sequence[str]) -> dict[str, Any]:
        """Prove that vLLM serves a condition's adapters: the composed file is their sum, and each makes a difference.

        vLLM keeps one LoRA per request, so "both active" cannot be measured in it. That the composed file is the sum
        is checked on its tensors in float64; that it is served, on the log-probabilities of the answers' first tokens
        under it, under each part and under the base model.

        Raises:
            lora.ProbeError: the file is not the sum, or a part of the adapters gives the same log-probabilities.
        """
        adapters, asked = condition.adapters, tuple(prompts)
        if (condition, asked) in self._proved:
            return self._proved[condition, asked]
        error = self._compose(tuple(map(str, condition.paths))).result() if len(adapters) > 1 else 0.0
        if error > (probing.RELATIVE_TOLERANCE if self._dtype == torch.float32 else 2**-7):
            raise probing.ProbeError(
                f"{condition.name}: the composed adapter differs from the sum of its parts by {error:.2g}"
            )
        parts = [some for n in range(1, len(adapters)) for some in itertools.combinations(adapters, n)]
        trained, key = condition.trained_with, tuple(str(path) for _, path in condition.trained_with)
        parts += [trained] if trained else []
        ours = bool(trained) and key not in self._sums
        found = self._first_logprobs(adapters, prompts)
        others = {
            "+".join(name for name, _ in part) or "base": float(
                np.abs(found - self._first_logprobs(part, prompts)).max()
            )
            for part in [(), *parts]
        }
        if ours:  # made for this comparison alone: another condition that is made of them makes them again
            self._sums.pop(key, None)
            shutil.rmtree(self._place(key), ignore_errors=True)
        largest = float(np.abs(found).max())
        tolerance = self.rounding * largest
        idle, part = probing.idle_adapters(others, tolerance, [name for name, _ in adapters], condition.may_be_idle)
        if part:
            raise probing.ProbeError(
                f"{condition.name}: vLLM computes the same with all adapters as with {part!r}: an adapter is not "
                "served, or was not trained"
            )
        self._proved[condition, asked] = report = {
            "adapters": dict(zip((name for name, _ in adapters), condition.adapter_hashes())),
            "prompts": len(prompts),
            "measured": "log-probabilities of first tokens; composition on the tensors",
            "largest_logprob": largest,
            "tolerance": tolerance,
            "difference": error,
            "others": others,
            "idle": idle,
        }
        return report

    def _first_logprobs(self, adapters: Sequence[tuple[str, Path]], prompts: Sequence[str]) -> np.ndarray:
        """The largest log-probabilities of an answer's first token, in order, shape (prompts, 20)."""
        known = tuple(str(path) for _, path in adapters), tuple(prompts)
        if known in self._answered:
            return self._answered[known]
        from vllm import SamplingParams

        # Not the prompts' own tokens: with LoRA, vLLM 0.32 cannot give their log-probabilities on a CPU.
        asked = [
            {"prompt_token_ids": list(render(self.tokenizer, [{"role": "user", "content": prompt}]))}
            for prompt in prompts
        ]
        parameters = SamplingParams(temperature=0.0, max_tokens=1, logprobs=20, detokenize=False)
        found = self.llm.generate(asked, parameters, lora_request=self._request(adapters), use_tqdm=False)
        self._answered[known] = np.array(
            [sorted((at.logprob for at in o.outputs[0].logprobs[0].values()), reverse=True)[:20] for o in found]
        )
        return self._answered[known]

    def close(self) -> None:
        """End the engine's processes and remove the composed adapters."""
        self.llm.llm_engine.engine_core.shutdown()
        self._ahead.shutdown(cancel_futures=True)
        self._folder.cleanup()


def _from_vllm(output: Any) -> Completion:
    """A completion as vLLM returns it."""
    logprobs = tuple(at[token].logprob for token, at in zip(output.token_ids, output.logprobs))
    return Completion(tuple(output.token_ids), output.finish_reason, logprobs)


def _sum_error(composed: Path, read: Sequence[model_adapters.AdapterFiles]) -> float:
    """Largest relative difference between a composed adapter's change of the weights and the sum of its parts'.

    Each module's change is applied to random vectors (Freivalds' check), in float64.
    """
    generator = torch.Generator().manual_seed(0)
    whole = model_adapters.read_adapter(composed)
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
