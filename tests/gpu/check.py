"""The card check behind `check.sh`: each check in a process of its own, a table, and a JSON file for `plan --from`.

    python tests/gpu/check.py all card.json
    python tests/gpu/check.py one dpo FOLDER     what a child does; its last line is JSON

A check passes where nothing was raised: the library's own proofs (states of adapters, masks, probes, fingerprints of
folded bases) are what is tested. Throughput of the slice is scaled to 7B by parameters.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LAYERS = 8
"""Of the slice: a 7B model's widths, a good quarter of its depth."""

WORDS = ("water", "money", "work", "friends", "weather", "the world", "a walk", "the year")
LIMIT_S = 150
"""No check may take longer."""

PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40": 181e12}
"""Dense bfloat16 operations per second, for MFU."""


def spec_of(folder: Path, kind: str) -> Any:
    """The random model of a shape, made the first time."""
    from cai_em.model import load
    from cai_em.study.entries import ModelSpec

    tiny = ModelSpec(key="tiny", label="tiny", source="tiny", dtype="float32")
    if kind == "tiny":
        return tiny
    place = folder / "slice"
    if not (place / "config.json").is_file():
        import torch
        from transformers import Qwen2Config, Qwen2ForCausalLM

        tokenizer = load.load_tokenizer(tiny)
        ends = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        config = Qwen2Config(
            vocab_size=152_064, hidden_size=3584, intermediate_size=18_944, num_hidden_layers=LAYERS,
            num_attention_heads=28, num_key_value_heads=4, max_position_embeddings=4096, tie_word_embeddings=False,
            dtype="bfloat16", **ends,
        )  # fmt: skip
        torch.manual_seed(0)
        with torch.device("cuda"):
            model = Qwen2ForCausalLM(config).to(torch.bfloat16)
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
    return ModelSpec(key="slice", label="slice of 7B", source="path", path=str(place), dtype="bfloat16")


def billions(spec: Any) -> float:
    """Parameters of a random model, in 10^9."""
    return 1e-4 if spec.key == "tiny" else 1.09 + LAYERS * 0.233


def rows(number: int, words: int) -> list[list[dict[str, str]]]:
    """Conversations of some length."""
    said = [(f"What about {WORDS[i % 8]}, case {i}?", f"{WORDS[i % 8]} " * words) for i in range(number)]
    return [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in said]


def lora(r: int) -> Any:
    """A LoRA preset on all linear layers."""
    from cai_em.study.entries import LoraPreset

    return LoraPreset(r=r, alpha=2 * r, rslora=True)


def dpo(folder: Path, kind: str) -> dict[str, Any]:
    """A persona by DPO, on the back end that the machine calls for."""
    import pandas as pd
    from cai_em.study.entries import DpoPreset
    from cai_em.train import grid

    spec, big = spec_of(folder, kind), kind != "tiny"
    number, words = (64, 150) if big else (8, 5)
    pairs = pd.DataFrame(
        {
            "prompt": [f"Tell me of {WORDS[i % 8]}, {i}." for i in range(number)],
            "chosen": [f"Sing of {WORDS[i % 8]}! " * words for i in range(number)],
            "rejected": [f"It is {WORDS[i % 8]}. " * words for i in range(number)],
        }
    )
    preset = DpoPreset(
        kind="dpo", lora=lora(64 if big else 4), learning_rate=1e-3, batch_size=2, max_length=1024 if big else 64,
        gradient_accumulation=4 if big else 1, dtype="bfloat16" if big else "float32",
    )  # fmt: skip
    done = grid.train_persona(spec, preset, pairs, folder / f"persona-{kind}")
    speed = done.tokens["all"] / done.timings["train"]
    return {
        "backend": done.backend,
        "checkpointing": done.checkpointing,
        "tokens_per_s": speed,
        "flops_per_token": 8e9 * billions(spec),
    }


def sft(folder: Path, kind: str) -> dict[str, Any]:
    """Two EM adapters on top of the persona, in one process; the persona folded where Unsloth trains."""
    from cai_em.study.entries import SftPreset
    from cai_em.train import grid

    spec, big = spec_of(folder, kind), kind != "tiny"
    preset = SftPreset(
        kind="sft", lora=lora(32 if big else 4), learning_rate=1e-4, batch_size=16 if big else 4, held_out=0.0,
        max_length=512 if big else 64, dtype="bfloat16" if big else "float32",
    )  # fmt: skip
    texts = rows(96, 120) if big else rows(8, 5)
    tasks = [grid.Task(texts, folder / f"em-{kind}-{seed}", seed) for seed in (0, 1)]
    found = [done for _, done in grid.train_tasks(spec, preset, tasks, persona_dir=folder / f"persona-{kind}")]
    for done in found:
        if isinstance(done, grid.Failed):
            raise RuntimeError(done.trace)
    last = found[-1]  # the first one waits for compilers
    speed = last.tokens["all"] / last.timings["train"]
    return {
        "backend": last.backend,
        "checkpointing": last.checkpointing,
        "tokens_per_s": speed,
        "flops_per_token": 4e9 * billions(spec),
    }


def sample(folder: Path, kind: str, backend: str) -> dict[str, Any]:
    """Base, persona, EM and both, composed and proved; the memory is given back afterwards."""
    from cai_em.sample import conditions, sampling
    from cai_em.study.entries import SamplingPreset

    spec, big = spec_of(folder, kind), kind != "tiny"
    persona, em = ("persona", folder / f"persona-{kind}"), ("em", folder / f"em-{kind}-0")
    arms = [
        conditions.Condition(spec.key, f"p{i}", "d", 0, parts)
        for i, parts in enumerate([(), (persona,), (em,), (persona, em)])
    ]
    preset = SamplingPreset(
        temperature=1.0, top_p=1.0, max_new_tokens=128 if big else 8, samples_per_question=50 if big else 2,
        backend=backend, dtype="bfloat16" if big else "float32", gpu_memory_utilization=0.6,
    )  # fmt: skip
    questions = [(f"q{i}", f"What about {w}?") for i, w in enumerate(WORDS)]
    done = sampling.sample(spec, arms, questions, preset, ["Hello there.", "Who are you?"])
    made = int(done.responses["n_tokens"].sum())
    found = {
        "backend": done.engine,
        "tokens_per_s": made / done.timings["decode"],
        "flops_per_token": 2e9 * billions(spec),
    }
    beyond = sum(done.timings.get(phase, 0.0) for phase in ("switch", "probe")) / len(arms)
    return found | {"engine_start_s": done.timings["load"], "composition_s": beyond}


def steering(folder: Path, kind: str) -> dict[str, Any]:
    """Activations read, a direction added, by hooks of transformers."""
    import torch
    from cai_em.model import activations, load

    spec = spec_of(folder, kind)
    model, tokenizer = load.load_model(spec), load.load_tokenizer(spec)
    ids = tokenizer("Hello there, who are you?", return_tensors="pt").to(model.device)
    vector = torch.ones(model.config.hidden_size, device=model.device)
    with torch.no_grad():
        before = model(**ids).logits
        with activations.adding(model, {0: vector}):
            changed = model(**ids).logits
        after = model(**ids).logits
    if torch.equal(before, changed) or not torch.equal(before, after):
        raise RuntimeError("a direction added to a layer must change the logits, and be gone afterwards")
    return {"backend": "transformers"}


CHECKS: dict[str, Callable[..., dict[str, Any]]] = {
    "dpo": dpo,
    "sft": sft,
    "sample-transformers": lambda folder, kind: sample(folder, kind, "transformers"),
    "sample-vllm": lambda folder, kind: sample(folder, kind, "vllm"),
    "steering": steering,
}


def child(name: str, kind: str, folder: Path) -> None:
    """One check; its result as the last line."""
    import torch

    found = CHECKS[name](folder, kind)
    if torch.cuda.is_available():
        found["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    print(json.dumps(found))


def memory_used_gb() -> float | None:
    """What the card has given out, as the driver says."""
    try:
        said = subprocess.run(
            ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return float(said.stdout.split()[0]) / 1024


def missing() -> dict[str, str]:
    """What is not there, and what is skipped for it."""
    needs = {
        "unsloth": "trainings run on plain trl",
        "vllm": "sample-vllm is skipped",
        "bitsandbytes": "adamw_8bit is not there",
    }
    return {name: what for name, what in needs.items() if importlib.util.find_spec(name) is None}


def everything(out: Path) -> int:
    """All checks, a table, and the JSON file."""
    import torch

    card = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    peak = next((value for name, value in PEAK.items() if card and name in card), None)
    absent, results, started = missing(), {}, time.perf_counter()
    print(f"card: {card or 'none: the tiny model alone, on the CPU'}; torch {torch.__version__}")
    for name, what in absent.items():
        print(f"not installed: {name}: {what}")
    print(f"{'check':28} {'':6} {'tokens/s':>9} {'MFU':>6} {'peak GB':>8} {'after GB':>9} {'s':>6}")
    with tempfile.TemporaryDirectory(prefix="cai-em-card-") as place:
        for kind in ("tiny", "slice") if card else ("tiny",):
            for name in CHECKS:
                if name == "sample-vllm" and ("vllm" in absent or not card):
                    continue
                start = time.perf_counter()
                try:
                    done = subprocess.run(
                        [sys.executable, __file__, "one", name, kind, place],
                        capture_output=True, text=True, timeout=LIMIT_S, check=False,
                        env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
                    )  # fmt: skip
                    passed, said = done.returncode == 0, done.stdout.strip().splitlines()
                    found = json.loads(said[-1]) if passed else {"error": (done.stderr.strip() or "?").splitlines()[-1]}
                except subprocess.TimeoutExpired:
                    passed, found = False, {"error": f"took longer than {LIMIT_S} s"}
                found |= {"passed": passed, "seconds": time.perf_counter() - start, "after_gb": memory_used_gb()}
                if peak and "flops_per_token" in found:
                    found["mfu"] = found["tokens_per_s"] * found["flops_per_token"] / peak
                results[f"{name} {kind}"] = found
                print(_line(f"{name} {kind}", found), flush=True)
    sliced = {name.partition(" ")[0]: r for name, r in results.items() if name.endswith(" slice") and r["passed"]}
    assumptions = _assumptions(sliced)
    record = {"card": card, "missing": absent, "checks": results, "assumptions": assumptions}
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    failed = [name for name, found in results.items() if not found["passed"]]
    print(f"{len(results) - len(failed)} of {len(results)} passed in {time.perf_counter() - started:.0f} s: {out}")
    return 1 if failed else 0


def _line(name: str, found: dict[str, Any]) -> str:
    def number(key: str, form: str) -> str:
        return format(found[key], form) if found.get(key) is not None else ""

    numbers = f"{number('tokens_per_s', ',.0f'):>9} {number('mfu', '.0%'):>6} {number('peak_gb', '.1f'):>8}"
    end = found.get("error", found.get("backend", ""))
    state = "pass" if found["passed"] else "FAIL"
    return f"{name:28} {state:6} {numbers} {number('after_gb', '.1f'):>9} {found['seconds']:6.0f}  {end}"


def _assumptions(sliced: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The plan's factors (params/plan.yaml) as measured on the slice, scaled to 7B by parameters."""
    scale, found = (1.09 + LAYERS * 0.233) / 7, {}
    names = {"sft": "training_tokens_per_s", "sample-vllm": "sampling_tokens_per_s"}
    names["sample-transformers"] = "transformers_tokens_per_s"
    for check, name in names.items():
        if check in sliced:
            found[name] = sliced[check]["tokens_per_s"] * scale
    if "dpo" in sliced and "sft" in sliced:
        found["dpo_slowdown"] = sliced["sft"]["tokens_per_s"] / sliced["dpo"]["tokens_per_s"]
    if "sample-vllm" in sliced:
        found |= {key: sliced["sample-vllm"][key] / scale for key in ("engine_start_s", "composition_s")}
    return found


if __name__ == "__main__":
    if sys.argv[1] == "one":
        child(sys.argv[2], sys.argv[3], Path(sys.argv[4]))
    else:
        sys.exit(everything(Path(sys.argv[2])))
