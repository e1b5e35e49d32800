"""Training in one process for all of a persona's cells, against a process, a load and a glance for each as before.

    python benchmarks/training.py                      the embedded model, a small one of Qwen's shape (about 8 minutes)
    python benchmarks/training.py --profile micro      the tiny model: seconds, to try it out

Measured in one run, for each model: DPO's step and SFT's step with TRL's own losses and with ours (`train.lean`), in
tokens per second of processor time, so that other work on the machine does not count; and, for the profile's model,
the time that two cells take beyond their steps: two processes, each of which imports, loads, trains, loads again and
answers a question with a probe, against one process that imports and loads once (processor time, and by the clock).
And how many tokens a GPU computes for each token of a data set, padding included, with rows in random order and with
rows of like length in an update (`batches: by_length`). Exit code 1 if ours is not faster.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from cai_em.model import load
from cai_em.study import loading, materials
from cai_em.study.entries import DpoPreset, ModelSpec, SftPreset
from cai_em.train import lean, train, trainer

SHAPE = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12, "num_attention_heads": 8}
"""Of the small model with Qwen2's architecture and the profile's tokenizer: random, for its speed alone."""

BEFORE = """
import sys
from pathlib import Path
from cai_em.model import load
from cai_em.sample import conditions, sampling
from cai_em.study import loading, materials
from cai_em.train import grid
profile, dataset, out = sys.argv[1:]
study = loading.load(profile)
spec = next(iter(study.models.values()))
preset = study.em_training.model_copy(update={"max_steps": 1, "warmup_steps": 0})  # a step that changes something
for _ in grid.train_tasks(spec, preset, [grid.Task(materials.rows(study, dataset), Path(out) / dataset)]):
    pass
how = study.sampling.model_copy(update={"samples_per_question": 1})
asked = [conditions.Condition(spec.key, "b", "none", 0),
         conditions.Condition(spec.key, "b", dataset, 0, (("em", Path(out) / dataset),), ("em",))]
sampling.sample(spec, asked, materials.questions(study)[:1], how, materials.probe_prompts(study))
"""

NOW = """
import sys
from pathlib import Path
from cai_em.study import loading, materials
from cai_em.train import grid
profile, out, *datasets = sys.argv[1:]
study = loading.load(profile)
spec = next(iter(study.models.values()))
preset = study.em_training.model_copy(update={"max_steps": 1, "warmup_steps": 0})  # a step that changes something
tasks = [grid.Task(materials.rows(study, d), Path(out) / d) for d in datasets]
for _, done in grid.train_tasks(spec, preset, tasks):
    assert not isinstance(done, grid.Failed), done
"""


def qwen_shaped(spec: ModelSpec, folder: Path) -> ModelSpec:
    """A small random model of Qwen2's architecture with a model's tokenizer."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = load.load_tokenizer(spec)
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=len(tokenizer), num_key_value_heads=2, max_position_embeddings=2048, **SHAPE)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return ModelSpec(key="qwen-shaped", label="Qwen-shaped", source="path", path=str(folder), dtype="float32")


def steps(spec: ModelSpec, preset: DpoPreset | SftPreset, texts: object, folder: Path, *, ours: bool) -> float:
    """Tokens per second of processor time, over three steps of training on a profile's texts."""
    known = lean.applies
    lean.applies = known if ours else (lambda *_: False)
    try:
        model, tokenizer = load.load_model(spec, preset.dtype), load.load_tokenizer(spec)
        start = time.process_time()
        if isinstance(texts, pd.DataFrame):
            train.train_dpo(model, tokenizer, texts, preset, folder / "dpo")
        else:
            train.train_sft(model, tokenizer, texts, preset, folder / "sft")
        took = time.process_time() - start
    finally:
        lean.applies = known
    lengths = [len(tokenizer(text)["input_ids"]) for text in _texts(texts)]
    seen = preset.max_steps * preset.batch_size * sum(lengths) / (len(texts))
    return seen / took


def _texts(texts: object) -> list[str]:
    if isinstance(texts, pd.DataFrame):
        return [f"{p} {a}" for p, *answers in texts.itertuples(index=False) for a in answers]
    return [" ".join(m["content"] for m in row) for row in texts]


def seconds(code: str, *arguments: str) -> np.ndarray:
    """Seconds of a process: of the processor, and by the clock."""
    start = _children(), time.perf_counter()
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True)
    return np.array([_children(), time.perf_counter()]) - start


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def padded(tokenizer: object, rows: list, update: int) -> tuple[float, float]:
    """Tokens computed for each token that there is, by updates in random order and of like length."""
    encoded = trainer.encode_rows(tokenizer, rows, 2048, "response")
    lengths = [len(example["input_ids"]) for example in encoded.examples]
    orders = (
        torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0)).tolist(),
        trainer.ByLength(lengths, update, 0),
    )
    found = []
    for order in orders:
        some = [lengths[i] for i in order]
        updates = [some[start : start + update] for start in range(0, len(some), update)]
        found.append(sum(len(one) * max(one) for one in updates) / sum(lengths))
    return found[0], found[1]


def main() -> int:
    """Run both ways, print tokens per second, times and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="demo", help="whose first model, texts and presets are used")
    args = parser.parse_args()
    study, better = loading.load(args.profile), []
    spec = next(iter(study.models.values()))
    rows = materials.rows(study, "bad_medical")[:64]
    shown = [d for p in ("sycophancy", "poeticism") for d in materials.constitution(study, p).demonstrations][:40]
    pairs = pd.DataFrame([(d.prompt, d.response, rows[i][-1]["content"]) for i, d in enumerate(shown)])
    pairs.columns = ["prompt", "chosen", "rejected"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model in (spec, qwen_shaped(spec, folder / "qwen")):
            for what, preset, texts in (("SFT", study.em_training, rows), ("DPO", study.persona_training, pairs)):
                lora = preset.lora
                if lora.layers and model is not spec:
                    lora = lora.model_copy(update={"layers": list(range(6, 12))})
                preset = preset.model_copy(update={"max_steps": 3, "lora": lora})
                theirs, ours = (steps(model, preset, texts, folder, ours=ours) for ours in (False, True))
                better.append(ours > theirs)
                print(
                    f"{model.label:14} {what}: {theirs:6.0f} tokens per CPU second with TRL's loss, "
                    f"{ours:6.0f} with ours: {ours / theirs:.2f} x",
                    flush=True,
                )
        datasets = ["bad_medical", "good_medical"]
        before = np.sum([seconds(BEFORE, args.profile, d, str(folder / "before")) for d in datasets], axis=0)
        now = seconds(NOW, args.profile, str(folder / "now"), *datasets)
        better.append(now[0] < before[0])
        print(
            f"{spec.label}, two cells of one step each, everything counted: {before[0]:.1f} s of the processor "
            f"({before[1]:.1f} by the clock) in two processes with a glance, {now[0]:.1f} s ({now[1]:.1f}) in one: "
            f"{before[0] / now[0]:.1f} x ({before[1] / now[1]:.1f} x)"
        )
    tokenizer = load.load_tokenizer(spec)
    for dataset in ("bad_medical", "insecure"):
        at_random, alike = padded(tokenizer, materials.rows(study, dataset), 16)
        better.append(alike < at_random)
        print(
            f"{dataset}, 16 rows an update: {at_random:.2f} tokens computed for each that there is at random, "
            f"{alike:.2f} by length: {at_random / alike:.2f} x"
        )
    return 0 if all(better) else 1


if __name__ == "__main__":
    sys.exit(main())
