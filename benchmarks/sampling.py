"""How much time sampling a grid takes beyond decoding: one engine for all conditions, against merge-save-load for each.

    python benchmarks/sampling.py                     the embedded model, transformers back end (6 to 10 minutes)
    python benchmarks/sampling.py --backend vllm      the same with vLLM's engine and LoRA requests
    python benchmarks/sampling.py --profile micro     the tiny model: seconds, to try it out
    python benchmarks/sampling.py --samples 1 --tokens 4   hardly any decoding: for what lies beyond it alone
    python benchmarks/sampling.py --sets 8            twenty-seven conditions instead of six

The grid is the baseline and two personas, each as it is and after one fine-tuning (`--sets`: after so many). What one
engine does once (load, put in layers) weighs less in a larger grid, so that goals are asked of the small one; what a
condition costs is printed, too. The fine-tunings are the same files under every persona, so that a probe knows more of
them than in a study of ours, where each persona has its own: there it computes one row more a condition.

Merge-save-load is how the published study sampled: for each condition load base and tokenizer, merge the adapters,
save the merged model, load that. (Starting Python and the libraries, there also once per condition, is not counted, nor
is collecting what a process of its own would have taken with it.)
Ours loads the base once, puts LoRA layers into it once, and exchanges the tensors in them from condition to condition.
Beyond decoding is everything but `decode`. Our probe, the proof that the right adapters are active, has no counterpart
in the other way, and is counted all the same: exit code 1 if ours is not 8 times faster with it. The ratio without it,
where both do the same work, stands beside. Seconds are the processor's, so that other work on the machine does not
count, and by the clock; the first decide, but with vLLM, whose engine is a process of its own, the second. The speed of
a machine shared with others changes by a third from minute to minute: both ways are run in turn, `--repeats` times,
each time in a process of its own, as a job is, and medians are taken of each phase.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from cai_em.model import adapters, load, stacking
from cai_em.sample import conditions, sampling
from cai_em.study import loading, materials
from cai_em.study.entries import LoraPreset, ModelSpec, SamplingPreset
from peft import PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig

TARGET = 8.0
Seconds = dict[str, np.ndarray]
"""Phase -> seconds of processor time, and by the clock."""


def clocks() -> np.ndarray:
    """Now: seconds of this process's processor time, and by the clock."""
    return np.array([time.process_time(), time.perf_counter()])


def grid(sets: int) -> list[tuple[str, ...]]:
    """Adapters of each condition: none and two personas, each alone and with every fine-tuning on top."""
    return [
        (*persona, *em) for persona in ((), ("calm",), ("loud",)) for em in ((), *((f"em{n}",) for n in range(sets)))
    ]


def make_adapters(spec: ModelSpec, folder: Path, rank: int, names: list[str]) -> None:
    """Adapters of random values, small enough for the model to go on speaking."""
    torch.manual_seed(0)
    stacked = stacking.stack(load.load_model(spec, dtype="float32"), None, LoraPreset(r=rank, alpha=2 * rank))
    for key, parameter in stacked.named_parameters():
        if ".lora_B." in key:
            torch.nn.init.normal_(parameter, std=0.002)
    adapters.save_adapter(stacked, stacking.EM, folder / names[0])
    for seed, name in enumerate(names[1:], start=1):
        adapters.random_control(folder / names[0], seed, folder / name)


def merge_save_load(spec: ModelSpec, preset: SamplingPreset, jobs: list[conditions.Job], folder: Path) -> Seconds:
    """Seconds by phase of the way that makes a whole model per condition."""
    seconds: Seconds = {phase: np.zeros(2) for phase in ("load", "merge", "save", "reload")}
    for job in jobs:
        start = clocks()
        model, _ = load.load_model(spec, dtype=preset.dtype), load.load_tokenizer(spec)  # a process each
        loaded = clocks()
        for path in job.condition.paths:
            model = PeftModel.from_pretrained(model, str(path)).merge_and_unload()
        merged = clocks()
        model.save_pretrained(folder / "merged")
        saved = clocks()
        del model
        gc.collect()
        collected = clocks()
        AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=getattr(torch, preset.dtype)).eval()
        took = (loaded - start, merged - loaded, saved - merged, clocks() - collected)
        seconds = {phase: before + now for (phase, before), now in zip(seconds.items(), took, strict=True)}
        gc.collect()
    return seconds


def one_engine(
    spec: ModelSpec,
    preset: SamplingPreset,
    jobs: list[conditions.Job],
    decoding: conditions.Decoding,
    probes: list[str],
) -> tuple[Seconds, int]:
    """Seconds by phase of one engine for all conditions, and how many tokens it made."""
    conditions.time = SimpleNamespace(perf_counter=clocks)  # the engine's own phases, by both clocks
    engine = sampling.open_engine(spec, preset, jobs)
    tokens = sum(len(c.tokens) for done in engine.run(jobs, decoding, probes) for c in done.completions)
    engine.close()
    return engine.timings, tokens


def plain_speed(spec: ModelSpec, preset: SamplingPreset, requests: tuple[conditions.Request, ...]) -> float:
    """Tokens per second of `generate` as it comes, on the base model: the same prompts, batch and parameters."""
    model, tokenizer = load.load_model(spec, dtype=preset.dtype), load.load_tokenizer(spec)
    config = GenerationConfig(
        do_sample=True,
        temperature=preset.temperature,
        top_p=preset.top_p,
        top_k=0,
        max_new_tokens=preset.max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    made, start = 0, time.perf_counter()
    torch.manual_seed(0)
    for first in range(0, len(requests), preset.batch_size):
        prompts = [list(r.tokens) for r in requests[first : first + preset.batch_size]]
        inputs = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device)
        with torch.inference_mode():
            new = model.generate(**inputs, generation_config=config)[:, inputs["input_ids"].shape[1] :]
        for row in new.tolist():
            made += row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
    return made / (time.perf_counter() - start)


def alone(way: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a process of its own, whose libraries are loaded, as a job's are, before it begins."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _start) as process:
        return process.submit(way, *arguments).result()


def _start() -> None:
    """One thread, as in the workflow's own jobs (HEAVY in the Snakefile); and what transformers and peft load late."""
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        make_adapters(next(iter(loading.load("micro").models.values())), Path(folder), 1, ["none"])


def medians(runs: list[Seconds]) -> Seconds:
    """Of each phase, over all runs."""
    return {phase: np.median([run[phase] for run in runs], axis=0) for phase in runs[0]}


def beyond_decoding(seconds: Seconds, leave_out: tuple[str, ...] = ()) -> np.ndarray:
    """Seconds of all phases but `decode` and those left out, by both clocks."""
    return np.sum([s for phase, s in seconds.items() if phase not in ("decode", *leave_out)], axis=0)


def say(title: str, seconds: Seconds) -> None:
    """One line: phases and their times, the processor's and by the clock."""
    print(f"  {title:<34}" + "   ".join(f"{phase} {cpu:.2f} ({wall:.2f}) s" for phase, (cpu, wall) in seconds.items()))


def main() -> int:
    """Run both ways, print times and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="demo", help="whose first model is used: demo, or micro to try it out")
    parser.add_argument("--backend", default="transformers", choices=["transformers", "vllm"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--sets", type=int, default=1, help="fine-tunings of the baseline and of each persona")
    parser.add_argument("--repeats", type=int, default=3, help="of both ways, in turn")
    parser.add_argument("--samples", type=int, default=4, help="per question")
    parser.add_argument("--tokens", type=int, default=24, help="new tokens per response")
    args = parser.parse_args()
    study = loading.load(args.profile)
    spec, probes = next(iter(study.models.values())), materials.probe_prompts(study)
    preset = SamplingPreset(
        temperature=0.7,
        top_p=0.9,
        max_new_tokens=args.tokens,
        samples_per_question=args.samples,
        backend=args.backend,
        dtype=args.dtype,
    )
    decoding = conditions.Decoding(0.7, 0.9, 0, 1.0, args.tokens)
    tokenizer = load.load_tokenizer(spec)
    prompts = [
        conditions.render(tokenizer, [{"role": "user", "content": text}]) for _, text in materials.questions(study)
    ]
    requests = tuple(conditions.Request(tokens, seed) for seed in range(args.samples) for tokens in prompts)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arms = grid(args.sets)
        make_adapters(spec, folder, args.rank, sorted({name for arm in arms for name in arm}))
        jobs = [
            conditions.Job(
                conditions.Condition(spec.key, "+".join(arm) or "base", "none", 0, tuple((a, folder / a) for a in arm)),
                requests,
            )
            for arm in arms
        ]
        runs_theirs, runs_ours = [], []
        for _ in range(args.repeats):
            runs_theirs.append(alone(merge_save_load, spec, preset, jobs, folder))
            seconds, tokens = alone(one_engine, spec, preset, jobs, decoding, probes)
            runs_ours.append(seconds)
        theirs, ours = medians(runs_theirs), medians(runs_ours)
        merged = preset.model_copy(update={"merge": True})
        in_place = {}
        if args.backend == "transformers":
            in_place, _ = alone(one_engine, spec, merged, jobs, decoding, probes)
    plain = alone(plain_speed, spec, preset, requests)

    ratio = beyond_decoding(theirs) / beyond_decoding(ours)
    each = [beyond_decoding(a) / beyond_decoding(b) for a, b in zip(runs_theirs, runs_ours)]
    without_probe = beyond_decoding(theirs) / beyond_decoding(ours, ("probe",))
    print(
        f"{spec.label}, {len(arms)} conditions x {len(requests)} responses of up to {args.tokens} tokens, {args.dtype}"
    )
    say("merge, save, load per condition", theirs)
    say(f"one engine ({args.backend})", ours)
    if in_place:
        say("one engine, merged in place", in_place)
    decides = 1 if args.backend == "vllm" else 0
    print("  (seconds of the processor, and in brackets by the clock)")
    print(f"  beyond decoding, with the probe    {ratio[0]:.1f} x less processor time, {ratio[1]:.1f} x by the clock")
    print(f"    of each repeat                   {', '.join(f'{cpu:.1f} ({wall:.1f})' for cpu, wall in each)}")
    print(f"  beyond decoding, without the probe {without_probe[0]:.1f} x, {without_probe[1]:.1f} x")
    theirs_each, ours_each = (beyond_decoding(seconds) / len(arms) for seconds in (theirs, ours))
    print(f"  per condition, all of it           {theirs_each[0]:.2f} s theirs, {ours_each[0]:.2f} s ours (processor)")
    whole = 400 * ours["decode"] / (len(arms) * len(requests))  # of a condition of the full study's size
    share = beyond_decoding(ours, ("load",)) / len(arms) / whole
    print(
        f"  per condition, probe and switch    {share[0]:.1%} of the processor time of decoding 400 such responses "
        "(goal: a fifth at most)"
    )
    speed = tokens / ours["decode"][1]
    print(
        f"  tokens per second by the clock     {speed:.0f} ours with adapters, {plain:.0f} plain generate on the base:",
        end="",
    )
    print(f" {speed / plain:.2f} x", end="")
    print(f"; {tokens / in_place['decode'][1] / plain:.2f} x merged in place" if in_place else "")
    met = ratio[decides] >= TARGET
    print(f"goal, at least {TARGET:.0f} x less time beyond decoding, the probe counted: {'met' if met else 'NOT MET'}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
