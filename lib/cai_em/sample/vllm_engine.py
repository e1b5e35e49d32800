"""Sampling with vLLM: one engine, an adapter for each request."""

from __future__ import annotations

import gc
import itertools
import shutil
import tempfile
from collections.abc import Iterator, Sequence
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
        self.rounding = probing.RELATIVE_TOLERANCE if preset.dtype == "float32" else 2**-7  # bfloat16 has 8 bits
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
            model_adapters.save_composed(key, out)
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
        if error > probing.RELATIVE_TOLERANCE:
            raise probing.ProbeError(
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
        idle, part = probing.idle_adapters(others, tolerance, [name for name, _ in adapters], condition.may_be_idle)
        if part:
            raise probing.ProbeError(
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
    whole, read = model_adapters.read_adapter(composed), [model_adapters.read_adapter(part) for part in parts]
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
