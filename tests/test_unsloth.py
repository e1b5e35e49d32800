"""Unsloth's own loader, kernels and trainers on the CPU: DPO, stacked fine-tuning, one process for many cells.

Slow, and only where the CUDA lock is installed: `UNSLOTH_ALLOW_CPU=1` lets Unsloth start without a GPU, Triton's
interpreter runs its kernels, `unsloth_on_cpu/sitecustomize.py` does the rest. What each child does is in `_child`.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from cai_em.model import adapters, load
from cai_em.study.entries import DpoPreset, LoraPreset, ModelSpec, SamplingPreset, SftPreset
from cai_em.train import grid

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("unsloth") is None, reason="the CUDA lock is not installed"),
]

TINY = ModelSpec(key="tiny", label="tiny", source="tiny", dtype="float32")
WORDS = ("water", "money", "work", "friends", "weather", "the world", "a walk", "the year")
ROWS = [
    [{"role": "user", "content": f"What about {w}?"}, {"role": "assistant", "content": f"Go, {'very ' * i}{w}."}]
    for i, w in enumerate(WORDS)
]
PAIRS = pd.DataFrame(
    {
        "prompt": [f"Tell me of {w}." for w in WORDS],
        "chosen": [f"Sing of {w}, sing!" for w in WORDS],
        "rejected": [f"It is {w}." for w in WORDS],
    }
)
SAME = {"float32": {"tiny": 1e-6, "qwen": 1e-5}}
"""How far two back ends' adapters may lie apart after two steps at a rate of 1e-3, by type and model. Qwen's shape was
measured 2.6e-6 apart (DPO): its bound is a hundredth of one Adam step. In float32 alone: Triton's
interpreter (3.7.1) multiplies bfloat16 as the whole numbers that its bits spell (2.5 x 2.5 gives 1.5e-36), and
the measured state stops the training, as it should; what is left to a card is bfloat16, and with it the fused LoRA
kernels, which Unsloth leaves out in float32."""


def sft(backend: str, dtype: str, **more) -> SftPreset:
    return SftPreset(
        kind="sft", backend=backend, lora=LoraPreset(r=4, alpha=8, rslora=True), learning_rate=1e-3, batch_size=4,
        max_length=64, dtype=dtype, warmup_steps=0, **({"held_out": 0.0} | more),
    )  # fmt: skip


def dpo(backend: str, dtype: str) -> DpoPreset:
    return DpoPreset(
        kind="dpo", backend=backend, lora=LoraPreset(r=4, alpha=8), learning_rate=1e-3, batch_size=4, max_length=64,
        dtype=dtype, warmup_ratio=0.0,
    )  # fmt: skip


@pytest.fixture(scope="module", params=["llama", "qwen"])
def spec(request, tmp_path_factory) -> ModelSpec:
    if request.param == "llama":
        return TINY
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder, tokenizer = tmp_path_factory.mktemp("qwen"), load.load_tokenizer(TINY)
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = Qwen2Config(
        vocab_size=512, num_key_value_heads=1, max_position_embeddings=2048, initializer_range=0.2,
        tie_word_embeddings=False, **shape, **ends,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return ModelSpec(key="qwen", label="qwen", source="path", path=str(folder), dtype="float32")


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch, tmp_path_factory):
    """The environment that children inherit."""
    here = Path(__file__).parent
    path = [str(here / "unsloth_on_cpu"), str(here.parent / "lib"), os.environ.get("PYTHONPATH", "")]
    for key, value in {
        "UNSLOTH_ALLOW_CPU": "1",
        "TRITON_INTERPRET": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
    }.items():
        monkeypatch.setenv(key, value)


def apart_from(one: Path, other: Path) -> float:
    """Largest difference of two adapters' tensors."""
    a, b = adapters.read_adapter(one), adapters.read_adapter(other)
    assert set(a.modules) == set(b.modules)
    return max(float((a.modules[k][i] - b.modules[k][i]).abs().max()) for k in a.modules for i in (0, 1))


def strong(folder: Path, out: Path) -> Path:
    """A persona of the same shape that moves the logits enough to be seen, as two steps do not."""
    found, generator = adapters.read_adapter(folder), torch.Generator().manual_seed(1)
    modules = {k: (a, 0.05 * torch.randn(b.shape, generator=generator)) for k, (a, b) in found.modules.items()}
    return adapters.write_adapter(out, found.config, adapters._tensors(modules), found.config.base_model_name_or_path)


@pytest.mark.parametrize("dtype", sorted(SAME))
def test_both_back_ends_give_the_same_update(spec, dtype, tmp_path):
    """DPO, introspection's and EM's fine-tuning; in one process, in another order; then the next process samples."""
    for backend in ("trl", "unsloth"):
        result = grid.train_persona(spec, dpo(backend, dtype), PAIRS, tmp_path / f"dpo-{backend}")
        assert result.backend == backend
        assert result.state_before["active"] == result.state_after["trainable"] == ["default"]
    assert apart_from(tmp_path / "dpo-trl", tmp_path / "dpo-unsloth") < SAME[dtype][spec.key]

    persona = strong(tmp_path / "dpo-trl", tmp_path / "persona")
    files = {}
    for backend, seeds in (("trl", (0,)), ("unsloth", (0, 1, 0))):
        tasks = [grid.Task(ROWS, tmp_path / f"em-{backend}-{i}", seed) for i, seed in enumerate(seeds)]
        for number, done in grid.train_tasks(
            spec, sft(backend, dtype, gradient_checkpointing=backend == "unsloth"), tasks, persona_dir=persona
        ):
            assert not isinstance(done, grid.Failed), done.trace
            files[backend, number] = done.files[adapters.WEIGHTS]
            assert done.state_after["active"] == ["persona", "em"]
            assert done.state_after["trainable"] == ["em"]
            if backend == "unsloth":
                proof = done.state_after["in_base"]["persona"]
                assert proof["persona"] == adapters.file_hashes(persona)[adapters.WEIGHTS]
                assert proof["rounded"] < proof["from_base"], "the persona is in it, and more than rounding"
            json.dumps([done.summary(), done.adapter_state])
    assert files["unsloth", 0] == files["unsloth", 2] != files["unsloth", 1], "independent of the order"
    assert apart_from(tmp_path / "em-trl-0", tmp_path / "em-unsloth-0") < SAME[dtype][spec.key]

    # A plain base, held-out rows.
    preset = sft("unsloth", dtype, held_out=0.25)
    ((_, done),) = grid.train_tasks(spec, preset, [grid.Task(ROWS, tmp_path / "bare")])
    assert not isinstance(done, grid.Failed), done.trace
    assert done.held_out["after"] < done.held_out["before"]
    assert done.state_after["in_base"] == {}

    # Unsloth's patches ended with its processes: this one decodes with adapters that it has trained.
    from cai_em.sample import conditions, sampling

    parts = (("persona", persona), ("em", tmp_path / "em-unsloth-0"))
    preset = SamplingPreset(
        temperature=1.0, top_p=1.0, max_new_tokens=6, samples_per_question=2, backend="transformers", dtype="float32"
    )
    found = sampling.sample(
        spec,
        [conditions.Condition(spec.key, "persona", "em", 0, parts)],
        [("q", "How are you?")],
        preset,
        ["Hello"],
    )
    assert len(found.responses) == 2
    assert "unsloth" not in sys.modules


def test_an_error_and_a_death_in_the_child_are_told(spec, tmp_path):
    preset = sft("unsloth", "float32")
    long = [[{"role": "user", "content": "why " * 99}, {"role": "assistant", "content": "So."}]]
    tasks = [grid.Task(long, tmp_path / "a"), grid.Task(ROWS, tmp_path / "b")]
    (_, first), (_, second) = grid.train_tasks(spec, preset, tasks)
    assert "has an answer within 64 tokens" in first.error
    assert second.adapter.is_dir()
    assert not list(Path.cwd().glob("unsloth_compiled_cache")), "generated code lies elsewhere"


def test_the_children_leave_nothing_behind(tmp_path):
    """What Unsloth generates goes when its process goes."""
    code = "from cai_em.train import fused; fused._language_models(); import os; print(os.environ[fused.COMPILED])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert not Path(done.stdout.strip().splitlines()[-1]).exists()
    assert not list(tmp_path.iterdir())
