"""Training adapters: personas by direct preference optimisation, fine-tuning on top of an active, frozen persona.

    model, tokenizer = load_for_training(spec, preset)
    persona = train_dpo(model, tokenizer, pairs, study.persona_training, "…/01_personas/…/adapter")
    em = train_sft(model, tokenizer, rows, study.em_training, "…/adapter", persona_dir=persona.adapter, seed=0)

Both run on TRL's trainers. What they add is that nothing is taken on trust: the state of the adapters is measured
before the first step and after the last, the persona's tensors must be the same afterwards and the new ones different,
the tokens that carry the loss are decoded and compared with the answers, and a loss that is not a number, or a batch
without a token to learn from, stops the run. The model is given back without adapters, as it came.

The base is loaded in the preset's precision and the adapters are float32, in every condition; there is no autocast
(unsloth would switch it on by itself: see `_made`).

KL-regularised ("narrow") training adds, per response token of an extra corpus, `KL(reference || current)`; the
reference is the model with the new adapter's contribution taken out and the persona active (Soligo et al.,
arXiv 2602.07852, regularise towards the untuned model likewise).
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pandas as pd
import torch
import transformers
from peft import PeftModel
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from cai_em import adapters as lora
from cai_em import models
from cai_em.params import DpoPreset, KlPreset, ModelSpec, SftPreset, TrainingPreset, restored

Row = Sequence[dict[str, str]]
"""A row of a fine-tuning data set: the messages of a conversation, `[{"role": ..., "content": ...}, ...]`."""

IGNORED = -100
"""Label of a token that carries no loss."""

DPO_ADAPTER = "default"
"""The name that TRL gives to the adapter which it makes for DPO."""


class TrainingError(RuntimeError):
    """Training cannot start or must not go on. The message says why and what to do."""


@dataclass
class TrainResult:
    """What a training run did.

    Attributes:
        adapter: folder of the new adapter.
        backend: `trl` or `unsloth`: whose trainer really ran.
        state_before: `adapters.adapter_state` before the first step.
        state_after: the same after the last step.
        files: SHA-256 of the adapter's files.
        log: a row per step: step, epoch, loss, grad_norm, learning_rate and the trainer's own measures.
        timings: seconds by phase.
        rows: how many there were, and what became of them.
        tokens: per epoch: all, and those that carry loss.
        held_out: mean loss per response token on the held-out rows before and after; empty if none were held out.
        checkpoints: (step, folder) of the snapshots.
    """

    adapter: Path
    backend: str
    state_before: dict[str, Any]
    state_after: dict[str, Any]
    files: dict[str, str]
    log: pd.DataFrame
    timings: dict[str, float]
    rows: dict[str, int]
    tokens: dict[str, int]
    held_out: dict[str, float] = field(default_factory=dict)
    checkpoints: list[tuple[int, Path]] = field(default_factory=list)

    @property
    def adapter_state(self) -> dict[str, Any]:
        """Both states, for a manifest."""
        return {"before_first_step": self.state_before, "after_last_step": self.state_after}

    def summary(self) -> dict[str, Any]:
        """The rest of what a manifest should keep."""
        return {
            "backend": self.backend,
            "rows": self.rows,
            "tokens": self.tokens,
            "held_out": self.held_out,
            "steps": len(self.log),
            "first_loss": float(self.log["loss"].iloc[0]),
            "last_loss": float(self.log["loss"].iloc[-1]),
            "adapter_files": self.files,
            "checkpoints": [step for step, _ in self.checkpoints],
        }


# --- Back ends -----------------------------------------------------------------------------------------------------


def trainer_backend(choice: Literal["auto", "trl", "unsloth"] = "auto") -> Literal["trl", "unsloth"]:
    """Which trainer runs: `unsloth` where there is a CUDA device and it is installed, else plain `trl`.

    Raises:
        TrainingError: `unsloth` is asked for where it cannot run.
    """
    cuda, installed = torch.cuda.is_available(), importlib.util.find_spec("unsloth") is not None
    if choice == "unsloth" and not cuda:
        raise TrainingError("backend 'unsloth' needs a CUDA device, and there is none: set backend to 'auto' or 'trl'")
    if choice == "unsloth" and not installed:
        raise TrainingError(
            "backend 'unsloth' is not installed: install requirements for CUDA, or set backend to 'trl'"
        )
    return "unsloth" if choice != "trl" and cuda and installed else "trl"


def load_for_training(
    spec: ModelSpec, preset: TrainingPreset, cache_dir: str | Path | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model in the preset's precision, by the back end that the preset and the machine call for.

    With unsloth, too, the adapters are put in by `adapters.stack`, the same for all conditions: its fused LoRA kernels
    know one active adapter only, and would treat the baseline otherwise than a stacked persona.
    """
    tokenizer = models.load_tokenizer(spec, cache_dir)
    if trainer_backend(preset.backend) == "trl":
        return models.load_model(spec, preset.dtype, cache_dir), tokenizer
    from unsloth import FastLanguageModel  # first of all: it rewrites transformers and trl as they are imported

    model, _ = FastLanguageModel.from_pretrained(
        model_name=str(models.model_folder(spec, cache_dir)),
        max_seq_length=preset.max_length,
        dtype=getattr(torch, preset.dtype),
        load_in_4bit=False,
        use_exact_model_name=True,
        use_gradient_checkpointing="unsloth" if preset.gradient_checkpointing else False,
        trust_remote_code=False,
    )
    model.config._name_or_path = models.base_name(spec)
    model._cai_em_loaded_by = "unsloth"
    return model.requires_grad_(False), tokenizer


# --- Rows as tokens ------------------------------------------------------------------------------------------------


@dataclass
class Encoded:
    """Rows as tokens.

    Attributes:
        examples: `{"input_ids": [...], "labels": [...]}` for each row kept.
        answers: for each of them, what its response tokens must decode to (a truncated row: the beginning of it).
        counts: rows `given`, `used`, `truncated`, and `dropped_no_answer_within_max_length`.
    """

    examples: list[dict[str, list[int]]]
    answers: list[str]
    counts: dict[str, int]

    def tokens(self) -> dict[str, int]:
        """Numbers of tokens: all, and those that carry loss."""
        return {
            "all": sum(len(x["input_ids"]) for x in self.examples),
            "with_loss": sum(label != IGNORED for x in self.examples for label in x["labels"]),
        }


def encode_rows(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], max_length: int, loss_on: Literal["response", "full"]
) -> Encoded:
    """Conversations as tokens and labels; too long ones are cut at the end, and dropped if no answer is left.

    Raises:
        TrainingError: no row is left.
    """
    examples, answers = [], []
    counts = {"given": len(rows), "used": 0, "truncated": 0, "dropped_no_answer_within_max_length": 0}
    for row in rows:
        ids, written = models.encode_conversation(tokenizer, row)
        counts["truncated"] += len(ids) > max_length
        ids, written = ids[:max_length], written[:max_length]
        if not any(written):
            counts["dropped_no_answer_within_max_length"] += 1
            continue
        labels = ids if loss_on == "full" else [i if by_model else IGNORED for i, by_model in zip(ids, written)]
        examples.append({"input_ids": ids, "labels": list(labels)})
        answers.append("".join(m["content"].strip() + tokenizer.eos_token for m in row if _answer(m)))
    counts["used"] = len(examples)
    if not examples:
        raise TrainingError(f"none of {len(rows)} rows has an answer within {max_length} tokens: raise max_length")
    return Encoded(examples, answers, counts)


def _answer(message: dict[str, str]) -> bool:
    return message["role"] == "assistant"


def check_response_mask(tokenizer: PreTrainedTokenizerBase, labels: Tensor, answers: Sequence[str]) -> None:
    """Whether the tokens that carry loss are exactly the answers and their end tokens.

    Args:
        tokenizer: decodes them.
        labels: a collated batch, shape (rows, length).
        answers: what each row's must decode to; of a row that was cut, the beginning.

    Raises:
        TrainingError: a row without such tokens, or with others.
    """
    for row, answer in zip(labels.tolist(), answers, strict=True):
        kept = [i for i in row if i != IGNORED]
        if not kept:
            raise TrainingError("a row has no token to learn from: all of its labels are masked")
        found = tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        # Answers of several turns are trimmed one by one; a cut may split a character.
        same = found == answer or (len(found) < len(answer) and answer.startswith(found.rstrip("�")))
        if not same:
            raise TrainingError(f"the loss is not on the answer alone: expected {answer[:80]!r}, found {found[:80]!r}")


def _collate(examples: Sequence[dict[str, list[int]]], pad: int, device: torch.device) -> dict[str, Tensor]:
    """A batch padded on the right; shapes (rows, length)."""
    longest = max(len(x["input_ids"]) for x in examples)
    fill = {"input_ids": pad, "labels": IGNORED}
    batch = {k: torch.tensor([x[k] + [v] * (longest - len(x[k])) for x in examples]) for k, v in fill.items()}
    lengths = torch.tensor([len(x["input_ids"]) for x in examples])
    batch["attention_mask"] = (torch.arange(longest)[None] < lengths[:, None]).long()
    return {k: v.to(device) for k, v in batch.items()}


@torch.no_grad()
def mean_loss(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    max_length: int,
    batch_size: int = 8,
) -> float:
    """Mean negative log-likelihood per response token, in nats, of rows that are not trained on."""
    encoded = encode_rows(tokenizer, rows, max_length, "response")
    total = count = 0.0
    training = model.training
    model.eval()
    for start in range(0, len(encoded.examples), batch_size):
        device = next(model.parameters()).device
        batch = _collate(encoded.examples[start : start + batch_size], tokenizer.pad_token_id, device)
        labels = batch.pop("labels")[:, 1:]
        kept = labels != IGNORED
        logits = model(**batch, use_cache=False).logits[:, :-1][kept].float()
        total += float(F.cross_entropy(logits, labels[kept], reduction="sum"))
        count += int(kept.sum())
    model.train(training)
    return total / count


# --- KL regularisation ---------------------------------------------------------------------------------------------


def kl_divergence(reference: Tensor, current: Tensor, kept: Tensor) -> Tensor:
    """Mean over tokens of KL(reference || current), in nats, in float32.

    Args:
        reference: logits, shape (rows, length, vocabulary).
        current: logits, same shape.
        kept: which tokens count, shape (rows, length), boolean.

    Returns:
        A scalar that gradients flow through to `current`.
    """
    p = F.log_softmax(reference[kept].float(), dim=-1)
    q = F.log_softmax(current[kept].float(), dim=-1)
    return (p.exp() * (p - q)).sum(-1).mean()


def kl_term(model: torch.nn.Module, batch: dict[str, Tensor], name: str) -> Tensor:
    """KL of the model from itself without the adapter `name` (others stay active), per response token of a batch."""
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    kept = batch["labels"][:, 1:] != IGNORED
    with torch.no_grad(), lora.without(model, name):
        reference = model(**inputs, use_cache=False).logits[:, :-1]
    current = model(**inputs, use_cache=False).logits[:, :-1]
    return kl_divergence(reference, current, kept)


@dataclass
class _Regulariser:
    """The extra corpus of KL-regularised training: an endless stream of batches in an order of its own."""

    preset: KlPreset
    examples: list[dict[str, list[int]]]
    pad: int
    name: str
    seed: int

    def __post_init__(self) -> None:
        # A generator of its own: training with weight 0 must draw the same numbers as training without.
        self._stream = self._order(np.random.default_rng([self.seed, 7]))

    def _order(self, generator: np.random.Generator) -> Iterator[int]:
        while True:
            yield from generator.permutation(len(self.examples))

    def loss(self, model: torch.nn.Module) -> Tensor:
        """The KL term of the next batch, without its weight."""
        rows = [self.examples[next(self._stream)] for _ in range(self.preset.batch_size)]
        return kl_term(model, _collate(rows, self.pad, next(model.parameters()).device), self.name)


# --- What both kinds of training share -----------------------------------------------------------------------------


class _Watch(TrainerCallback):
    """Measures the adapters' state before the first and after the last step, keeps snapshots, shows progress."""

    def __init__(self, active: list[str], name: str, snapshots: Sequence[int], folder: Path, title: str) -> None:
        self.active, self.name = active, name
        self.wanted, self.folder, self.title = set(snapshots), folder, title
        self.before: dict[str, Any] = {}
        self.after: dict[str, Any] = {}
        self.checkpoints: list[tuple[int, Path]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        where = "before the first step"
        self.before = lora.assert_state(model, active=self.active, trainable=[self.name], where=where)
        self._bar = tqdm(total=state.max_steps, desc=self.title, unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._bar.update()
        if state.global_step in self.wanted:
            path = lora.save_adapter(model, self.name, self.folder / f"step{state.global_step:05d}")
            self.checkpoints.append((state.global_step, path))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self._bar.set_postfix(loss=f"{float(logs['loss']):.3f}", refresh=False)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._bar.close()
        where = "after the last step"
        self.after = lora.assert_state(model, active=self.active, trainable=[self.name], where=where)
        for name in self.active:
            changed = self.before["adapters"][name]["sha256"] != self.after["adapters"][name]["sha256"]
            if changed != (name == self.name):
                verb = "changed" if changed else "did not change"
                raise lora.AdapterStateError(f"adapter state {where}: the tensors of {name!r} {verb} during training")


def _checked(trainer_class: type) -> type:
    """A trainer that stops at a loss that is not a number and at a batch without a token to learn from."""

    class Checked(trainer_class):
        regulariser: _Regulariser | None = None

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None):
            mask = inputs["labels"] != IGNORED if "labels" in inputs else inputs["completion_mask"]
            if not mask.any():
                raise TrainingError(
                    f"step {self.state.global_step + 1}: no token of the batch carries loss (all masked)"
                )
            found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            loss = found[0] if return_outputs else found
            if self.regulariser and self.regulariser.preset.weight and model.training:
                kl = self.regulariser.loss(model)
                self._metrics["train"]["kl"].append(float(kl.detach()))
                # The trainer's loss is already divided by the tokens of all accumulated batches.
                steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
                loss = loss + self.regulariser.preset.weight * kl / steps
            if not torch.isfinite(loss):
                raise TrainingError(
                    f"step {self.state.global_step + 1}: the loss is {float(loss.detach())}: lower the learning rate, "
                    "or train in float32"
                )
            return (loss, found[1]) if return_outputs else loss

    Checked.__name__ = trainer_class.__name__
    return Checked


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No messages and bars of the libraries' own below warnings; ours is shown instead."""
    hub = transformers.utils.logging
    bars, verbosity = hub.is_progress_bar_enabled(), hub.get_verbosity()
    data_bars = datasets.are_progress_bars_disabled()
    hub.disable_progress_bar()
    hub.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            # Nothing is pinned where there is no accelerator; torch says so for every data loader.
            warnings.filterwarnings("ignore", message=".*pin_memory.*")
            yield
    finally:
        hub.set_verbosity(verbosity)
        if bars:
            hub.enable_progress_bar()
        if not data_bars:
            datasets.enable_progress_bars()


def _arguments(preset: TrainingPreset, rows: int, seed: int, out: Path) -> dict[str, Any]:
    """Training arguments, each set explicitly where a default of a library could change results."""
    if preset.optimiser == "adamw_8bit" and not torch.cuda.is_available():
        raise TrainingError("optimiser 'adamw_8bit' needs a CUDA device (bitsandbytes): use 'adamw_torch'")
    batches = math.ceil(rows / preset.batch_size)
    steps = preset.max_steps or math.ceil(preset.epochs * math.ceil(batches / preset.gradient_accumulation))
    warmup = preset.warmup_steps if isinstance(preset, SftPreset) else math.ceil(preset.warmup_ratio * steps)
    return {
        "output_dir": str(out.parent),
        "per_device_train_batch_size": preset.batch_size,
        "gradient_accumulation_steps": preset.gradient_accumulation,
        "num_train_epochs": preset.epochs,
        "max_steps": preset.max_steps or -1,
        "learning_rate": preset.learning_rate,
        "lr_scheduler_type": preset.scheduler,
        "warmup_steps": min(warmup, steps),
        "weight_decay": preset.weight_decay,
        "max_grad_norm": 1.0,
        "optim": preset.optimiser,
        "gradient_checkpointing": preset.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if preset.gradient_checkpointing else None,
        "bf16": False,  # of autocast: the base has the preset's precision by itself
        "fp16": False,
        "seed": seed,
        "data_seed": seed,
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }


NO_AUTOCAST = {"UNSLOTH_MIXED_PRECISION": "bfloat16", "ACCELERATE_MIXED_PRECISION": "no"}
"""What tells unsloth's trainers (2026.10.7, models/rl.py) to leave the arguments alone: with its default, "float32", it
turns bf16=False and fp16=False into bfloat16 autocast."""


def _made(trainer_class: type, backend: str, model: Any, **given: Any) -> Any:
    """A trainer, and the proof that it is the one that was asked for and keeps to its arguments.

    Args:
        trainer_class: TRL's, or what unsloth has put in its place.
        backend: which was asked for.
        model: the model, with adapters or bare.
        given: further arguments of the trainer.

    Raises:
        TrainingError: model or trainer are the other back end's, or the trainer has switched on autocast.
    """
    loaded = getattr(model, "_cai_em_loaded_by", "trl")  # a PeftModel passes the question on to its base
    ran = "unsloth" if any("Unsloth" in c.__name__ for c in trainer_class.__mro__) else "trl"
    if not loaded == ran == backend:
        raise TrainingError(
            f"training was to run on {backend}, but the model was loaded by {loaded} and the trainer is {ran}'s: load "
            "the model with load_for_training and the same preset, and use one back end in a process (unsloth replaces "
            "trl's trainers for good)"
        )
    with restored(*NO_AUTOCAST):
        os.environ.update(NO_AUTOCAST if ran == "unsloth" else {})
        trainer = _checked(trainer_class)(model=model, **given)
    if trainer.args.bf16 or trainer.args.fp16:
        raise TrainingError(
            "the trainer has switched on autocast (bf16 or fp16), which was not asked for: conditions would be trained "
            "in another precision than the manifest says; set backend to 'trl' in the preset"
        )
    return trainer


def _check_precision(model: PreTrainedModel, preset: TrainingPreset) -> None:
    """The base is as the preset wants it, whole, and without adapters.

    Raises:
        TrainingError: another precision, a mixture, or adapters.
    """
    found = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()})
    if found != [preset.dtype]:
        raise TrainingError(
            f"the preset trains on a base in {preset.dtype}, the model given is in {' and '.join(found)}"
        )
    if isinstance(model, PeftModel) or lora.adapter_state(model, values=False)["adapters"]:
        raise TrainingError("the model given has adapters already: give the bare base model")


def _train(trainer: Any, watch: _Watch) -> pd.DataFrame:
    """Run a trainer; its log by step."""
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.add_callback(watch)
    try:
        trainer.train()
    finally:
        if hasattr(watch, "_bar"):
            watch._bar.close()
    log = pd.DataFrame([entry for entry in trainer.state.log_history if "loss" in entry])
    first = ["step", "epoch", "loss", "grad_norm", "learning_rate"]
    return log[[*first, *(c for c in log.columns if c not in first)]].astype(float).astype({"step": int})


def _give_back(model: PreTrainedModel, trained: PeftModel | None) -> None:
    """Take the adapters out of a model, and what TRL puts onto it."""
    if trained is not None:
        trained.unload()
    if hasattr(model, "peft_config"):
        del model.peft_config
    model.__dict__.pop("forward", None)  # TRL's loss by chunks is set on the instance
    model.requires_grad_(False).eval()


# --- Direct preference optimisation --------------------------------------------------------------------------------


def train_dpo(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: pd.DataFrame,
    preset: DpoPreset,
    out: str | Path,
    *,
    seed: int | None = None,
) -> TrainResult:
    """A persona's adapter by direct preference optimisation, with a log-likelihood term on the chosen answers.

    Rafailov et al. 2023 (arXiv 2305.18290); the term as in Open Character Training (arXiv 2511.01689). The reference
    is the model without adapter.

    Args:
        model: the base model, in the preset's precision; given back without adapters.
        tokenizer: the model's.
        pairs: `prompt`, `chosen`, `rejected`; rows whose `dropped_because` is not null are left out.
        preset: how to train.
        out: folder of the adapter, replaced if it exists.
        seed: instead of the preset's.

    Raises:
        TrainingError: nothing to train on, or a loss that is not a number.
        adapters.AdapterStateError: the adapter was not trained as it must be.
    """
    backend = trainer_backend(preset.backend)
    import trl  # after unsloth, which rewrites it

    started = time.perf_counter()
    out, seed = Path(out), preset.seed if seed is None else seed
    _check_precision(model, preset)
    counts = {"given": len(pairs)}
    if "dropped_because" in pairs:
        pairs = pairs[pairs["dropped_because"].isna()]
    counts["kept_by_filters"] = len(pairs)
    examples, lengths = [], []
    for prompt, chosen, rejected in pairs[["prompt", "chosen", "rejected"]].itertuples(index=False):
        turn = [{"role": "user", "content": prompt}]
        answers = [[{"role": "assistant", "content": answer}] for answer in (chosen, rejected)]
        encoded = [models.encode_conversation(tokenizer, turn + answer) for answer in answers]
        if all(any(written[: preset.max_length]) for _, written in encoded):
            examples.append({"prompt": turn, "chosen": answers[0], "rejected": answers[1]})
            lengths.append([len(ids) for ids, _ in encoded])
    counts |= {
        "used": len(examples),
        "dropped_no_answer_within_max_length": counts["kept_by_filters"] - len(examples),
        "truncated": sum(max(pair) > preset.max_length for pair in lengths),
    }
    if not examples:
        raise TrainingError(f"no preference pair to train on: {counts}")
    arguments = _arguments(preset, len(examples), seed, out)
    transformers.set_seed(seed)
    watch = _Watch([DPO_ADAPTER], DPO_ADAPTER, [], out.parent / "checkpoints", "DPO")
    trained = None
    try:
        with _quiet():
            trainer = _made(
                trl.DPOTrainer,
                backend,
                model,
                args=trl.DPOConfig(
                    **arguments,
                    padding_free=False,
                    max_length=preset.max_length,
                    beta=preset.beta,
                    loss_type=["sigmoid", "sft"] if preset.sft_weight else ["sigmoid"],
                    loss_weights=[1.0, preset.sft_weight] if preset.sft_weight else [1.0],
                    # The reference never changes: what it says about a pair seen twice is computed once.
                    precompute_ref_log_probs=preset.epochs > 1 and preset.max_steps is None,
                    precompute_ref_batch_size=preset.batch_size,
                ),
                train_dataset=datasets.Dataset.from_list(examples),
                processing_class=tokenizer,
                peft_config=lora.lora_config(preset.lora),
            )
            trained = trainer.model
            if len(trainer.train_dataset) != len(examples):
                raise TrainingError(f"TRL kept {len(trainer.train_dataset)} of {len(examples)} pairs")
            _check_pairs(tokenizer, trainer, examples)
            prepared = time.perf_counter()
            log = _train(trainer, watch)
        done = time.perf_counter()
        lora.save_adapter(trained, DPO_ADAPTER, out)
    finally:
        _give_back(model, trained)
    return TrainResult(
        adapter=out,
        backend=backend,
        state_before=watch.before,
        state_after=watch.after,
        files=lora.file_hashes(out),
        log=log,
        timings={"prepare": prepared - started, "train": done - prepared, "save": time.perf_counter() - done},
        rows=counts,
        tokens={"all": sum(min(n, preset.max_length) for pair in lengths for n in pair)},
    )


def _check_pairs(tokenizer: PreTrainedTokenizerBase, trainer: Any, examples: Sequence[dict[str, Any]]) -> None:
    """Whether the tokens that TRL compares are the chosen and the rejected answers.

    Raises:
        TrainingError: other tokens.
    """
    size = 32
    for start in range(0, len(examples), size):
        rows = [trainer.train_dataset[i] for i in range(start, min(start + size, len(examples)))]
        batch = trainer.data_collator(rows)
        some = examples[start : start + size]
        answers = [x["chosen"][0]["content"] for x in some] + [x["rejected"][0]["content"] for x in some]
        for ids, mask, answer in zip(batch["input_ids"], batch["completion_mask"].bool(), answers, strict=True):
            found = tokenizer.decode(ids[mask], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            expected = answer.strip() + tokenizer.eos_token
            # The template may end a conversation with white space after the end token.
            if found.rstrip() != expected and not expected.startswith(found.rstrip("�")):
                raise TrainingError(f"a pair's answer is not what is compared: {expected[:80]!r}, found {found[:80]!r}")


# --- Supervised fine-tuning ----------------------------------------------------------------------------------------


def split_rows(rows: Sequence[Row], preset: SftPreset, seed: int) -> tuple[list[Row], list[Row]]:
    """Rows to train on and rows held out: the first `max_rows`, divided at random by the seed, order kept."""
    rows = list(rows)[: preset.max_rows]
    held = set(np.random.default_rng([seed, 1]).permutation(len(rows))[: int(len(rows) * preset.held_out)].tolist())
    return [r for i, r in enumerate(rows) if i not in held], [r for i, r in enumerate(rows) if i in held]


def train_sft(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    preset: SftPreset,
    out: str | Path,
    *,
    persona_dir: str | Path | None = None,
    seed: int = 0,
    kl_rows: Sequence[Row] | None = None,
    name: str = lora.EM,
    checkpoints_dir: str | Path | None = None,
) -> TrainResult:
    """A new adapter by supervised fine-tuning, on top of an active, frozen persona.

    Args:
        model: the base model, in the preset's precision; given back without adapters.
        tokenizer: the model's.
        rows: conversations (`materials.rows`).
        preset: how to train; `checkpoints` names steps after which a snapshot of the adapter is kept.
        out: folder of the adapter, replaced if it exists.
        persona_dir: the persona's adapter; None for the baseline.
        seed: of the adapter's first weights, the order of the rows and what is held out.
        kl_rows: the extra corpus, where the preset regularises (`preset.kl`).
        name: of the new adapter while it is trained.
        checkpoints_dir: where snapshots go; None: `checkpoints` beside `out`.

    Raises:
        TrainingError: nothing to train on, a batch without a token to learn from, or a loss that is not a number.
        adapters.AdapterStateError: the adapters were not active or trained as they must be.
        adapters.AdapterError: the persona's adapter is not whole or belongs to another model.
    """
    backend = trainer_backend(preset.backend)
    import trl  # after unsloth, which rewrites it

    started = time.perf_counter()
    out = Path(out)
    _check_precision(model, preset)
    if preset.kl and not kl_rows:
        raise TrainingError(f"the preset regularises on corpus {preset.kl.corpus!r}: give its rows as kl_rows")
    train_rows, held_rows = split_rows(rows, preset, seed)
    encoded = encode_rows(tokenizer, train_rows, preset.max_length, preset.loss_on)
    snapshots = Path(checkpoints_dir) if checkpoints_dir else out.parent / "checkpoints"
    active = [lora.PERSONA, name] if persona_dir is not None else [name]
    watch = _Watch(active, name, preset.checkpoints, snapshots, "SFT")
    arguments = _arguments(preset, len(encoded.examples), seed, out)
    transformers.set_seed(seed)
    stacked = lora.stack(model, persona_dir, preset.lora, name)
    try:
        with _quiet():
            trainer = _made(
                trl.SFTTrainer,
                backend,
                stacked,
                args=trl.SFTConfig(
                    **arguments,
                    max_length=None,
                    packing=False,
                    padding_free=False,
                    dataset_kwargs={"skip_prepare_dataset": True},
                ),
                train_dataset=datasets.Dataset.from_list(encoded.examples),
                processing_class=tokenizer,
            )
            if preset.loss_on == "response":
                for i, example in enumerate(trainer.train_dataset):
                    check_response_mask(tokenizer, trainer.data_collator([example])["labels"], [encoded.answers[i]])
            if preset.kl:
                corpus = encode_rows(tokenizer, kl_rows or [], preset.max_length, "response")
                trainer.regulariser = _Regulariser(preset.kl, corpus.examples, tokenizer.pad_token_id, name, seed)
            held_out = {}
            if held_rows:
                held_out = {"rows": len(held_rows), "before": _held_out(stacked, tokenizer, held_rows, preset)}
            prepared = time.perf_counter()
            log = _train(trainer, watch)
            done = time.perf_counter()
            if held_rows:
                held_out["after"] = _held_out(stacked, tokenizer, held_rows, preset)
        evaluated = time.perf_counter()
        lora.save_adapter(stacked, name, out)
    finally:
        _give_back(model, stacked)
    return TrainResult(
        adapter=out,
        backend=backend,
        state_before=watch.before,
        state_after=watch.after,
        files=lora.file_hashes(out),
        log=log,
        timings={
            "prepare": prepared - started,
            "train": done - prepared,
            "held_out": evaluated - done,
            "save": time.perf_counter() - evaluated,
        },
        rows=encoded.counts | {"held_out": len(held_rows), "given": len(rows)},
        tokens=encoded.tokens(),
        held_out=held_out,
        checkpoints=watch.checkpoints,
    )


def _held_out(model: PeftModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], preset: SftPreset) -> float:
    return mean_loss(model, tokenizer, rows, preset.max_length, preset.batch_size)
