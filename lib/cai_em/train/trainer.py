"""Training itself: rows to tokens, masks that are checked, a trainer that is watched, back ends."""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
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
from transformers.trainer_pt_utils import get_length_grouped_indices

from cai_em.model import adapters, load, stacking
from cai_em.records.files import restored
from cai_em.study.entries import DpoPreset, KlPreset, ModelSpec, SftPreset, TrainingPreset
from cai_em.train import fused, lean

Row = Sequence[dict[str, str]]
"""A row of a fine-tuning data set: the messages of a conversation, `[{"role": ..., "content": ...}, ...]`."""
IGNORED = -100
"""Label of a token that carries no loss."""


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
        checkpointing: whether activations were computed twice, to save memory.
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
    checkpointing: bool = False

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
            "gradient_checkpointing": self.checkpointing,
        }


# --- Back ends -----------------------------------------------------------------------------------------------------


def trainer_backend(choice: Literal["auto", "trl", "unsloth"] = "auto") -> Literal["trl", "unsloth"]:
    """Which trainer runs: `unsloth` where there is a CUDA device and it is installed, else plain `trl`.

    Raises:
        TrainingError: `unsloth` is asked for where it cannot run.
    """
    cuda, installed = torch.cuda.is_available(), fused.installed()
    if choice == "unsloth" and not (cuda or fused.allowed_on_cpu()):
        raise TrainingError("backend 'unsloth' needs a CUDA device, and there is none: set backend to 'auto' or 'trl'")
    if choice == "unsloth" and not installed:
        raise TrainingError(
            "backend 'unsloth' is not installed: install requirements for CUDA, or set backend to 'trl'"
        )
    return "unsloth" if choice == "unsloth" or (choice == "auto" and cuda and installed) else "trl"


def training_backend(preset: TrainingPreset) -> Literal["trl", "unsloth"]:
    """Which trainer a preset runs on here. One that regularises by KL needs logits with and without the new adapter in
    the midst of a step, which Unsloth's fused loss does not give: `auto` takes `trl` for it.

    Raises:
        TrainingError: `unsloth` is asked for where it cannot run.
    """
    regularised = isinstance(preset, SftPreset) and preset.kl is not None
    if regularised and preset.backend == "unsloth":
        raise TrainingError("backend 'unsloth' cannot regularise by KL: set backend to 'auto' or 'trl' in the preset")
    return "trl" if regularised else trainer_backend(preset.backend)


def load_for_training(
    spec: ModelSpec,
    preset: TrainingPreset,
    cache_dir: str | Path | None = None,
    persona_dir: str | Path | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model in the preset's precision, by the back end that the preset and the machine call for.

    Args:
        spec: which model.
        preset: how it will be trained.
        cache_dir: of converted models.
        persona_dir: the persona on which adapters will be trained; None for none. Unsloth, whose kernels know one
            adapter, is given a base with the persona folded in; with trl the persona is stacked later (`train_sft`).
    """
    tokenizer = load.load_tokenizer(spec, cache_dir)
    if training_backend(preset) == "trl":
        return load.load_model(spec, preset.dtype, cache_dir), tokenizer
    return fused.load_with_unsloth(spec, preset, cache_dir, persona_dir), tokenizer


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

    Answers are learned without white space around them: some templates take it away (Llama's), others keep it (Qwen's),
    and one data set must not be two.

    Raises:
        TrainingError: no row is left.
    """
    examples, answers = [], []
    counts = {"given": len(rows), "used": 0, "truncated": 0, "dropped_no_answer_within_max_length": 0}
    for row in rows:
        row = [{**m, "content": m["content"].strip()} if _answer(m) else m for m in row]
        ids, written = load.encode_conversation(tokenizer, row)
        if row[0]["role"] == "system":
            counts["with_system_prompt"] = counts.get("with_system_prompt", 0) + 1
            _check_system(tokenizer, row[0]["content"], ids)
        counts["truncated"] += len(ids) > max_length
        ids, written = ids[:max_length], written[:max_length]
        if not any(written):
            counts["dropped_no_answer_within_max_length"] += 1
            continue
        labels = ids if loss_on == "full" else [i if by_model else IGNORED for i, by_model in zip(ids, written)]
        examples.append({"input_ids": ids, "labels": list(labels)})
        answers.append("".join(m["content"] + tokenizer.eos_token for m in row if _answer(m)))
    counts["used"] = len(examples)
    if not examples:
        raise TrainingError(f"none of {len(rows)} rows has an answer within {max_length} tokens: raise max_length")
    return Encoded(examples, answers, counts)


def _check_system(tokenizer: PreTrainedTokenizerBase, prompt: str, ids: Sequence[int]) -> None:
    """Whether a row's system prompt is in its tokens: a chat template may leave it out.

    Raises:
        TrainingError: it is not.
    """
    rendered = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if prompt.strip() not in rendered:
        raise TrainingError(
            f"a row's system prompt is not in its tokens: expected {prompt!r:.90}, and the row is {rendered!r:.120}: "
            "the model's chat template leaves it out"
        )


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
    with torch.no_grad(), stacking.without(model, name):
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
        self.before = stacking.assert_state(model, active=self.active, trainable=[self.name], where=where)
        self._bar = tqdm(total=state.max_steps, desc=self.title, unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._bar.update()
        if state.global_step in self.wanted:
            path = adapters.save_adapter(model, self.name, self.folder / f"step{state.global_step:05d}")
            self.checkpoints.append((state.global_step, path))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            # Looked at here, where the trainer has fetched it anyway: in the step it would make the device wait.
            if not math.isfinite(float(logs["loss"])):
                raise TrainingError(
                    f"step {state.global_step}: the loss is {float(logs['loss'])}: lower the learning rate, or train "
                    "in float32"
                )
            self._bar.set_postfix(loss=f"{float(logs['loss']):.3f}", refresh=False)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._bar.close()
        where = "after the last step"
        self.after = stacking.assert_state(model, active=self.active, trainable=[self.name], where=where)
        for name in self.active:
            changed = self.before["adapters"][name]["sha256"] != self.after["adapters"][name]["sha256"]
            if changed != (name == self.name):
                verb = "changed" if changed else "did not change"
                raise stacking.AdapterStateError(
                    f"adapter state {where}: the tensors of {name!r} {verb} during training"
                )


class ByLength(torch.utils.data.Sampler):
    """Rows in an order in which those of an update are of like length: hardly any padding, and no row beside another.

    As transformers' own grouping (random stretches of fifty updates, sorted by length within), except that its updates
    go from long to short fifty at a time, and these come in random order: a rate that falls meets every length alike.
    The order is the seed's, whatever was drawn before. Shorter than the others can only the last update be.

    Args:
        lengths: of the rows, tokens.
        update: rows per update.
        seed: of the order.
    """

    def __init__(self, lengths: Sequence[int], update: int, seed: int) -> None:
        self.lengths, self.update = list(lengths), update
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        found = get_length_grouped_indices(self.lengths, self.update, generator=self.generator)
        whole = len(found) // self.update
        for number in [*torch.randperm(whole, generator=self.generator).tolist(), whole]:
            yield from found[number * self.update : (number + 1) * self.update]


def _checked(trainer_class: type) -> type:
    """A trainer that stops at a loss that is not a number and at a batch without a token to learn from."""
    import trl

    plain = issubclass(trainer_class, trl.SFTTrainer) and _ran(trainer_class) == "trl"

    class Checked(trainer_class):
        regulariser: _Regulariser | None = None
        lean = by_length = False
        data_collator: Callable[[Any], Any]

        def __init__(self, *args: Any, **given: Any) -> None:
            super().__init__(*args, **given)
            collate = self.plain_collator = self.data_collator

            def collated(rows: Any) -> Any:
                """On the CPU, where looking costs nothing: on a GPU each look in the step would wait for it."""
                batch = collate(rows)
                mask = batch["labels"] != IGNORED if "labels" in batch else batch["completion_mask"]
                if not mask.any():
                    raise TrainingError(
                        f"step {self.state.global_step + 1}: no token of the batch carries loss (all masked)"
                    )
                return batch

            self.data_collator = collated

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            if not self.by_length:
                return super()._get_train_sampler(train_dataset)
            lengths = [len(row["input_ids"]) for row in self.train_dataset]
            update = self.args.train_batch_size * self.args.gradient_accumulation_steps
            return ByLength(lengths, update, self.args.data_seed)

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None):
            if self.lean and "labels" in inputs and not return_outputs:
                found = loss = lean.response_loss(model, inputs, num_items_in_batch)
            elif plain and not return_outputs:
                # The loss alone: TRL measures entropy and accuracy beside it, and fetches them in every micro-step.
                found = loss = transformers.Trainer.compute_loss(
                    self, model, inputs | {"use_cache": False}, num_items_in_batch=num_items_in_batch
                )
            else:
                found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
                loss = found[0] if return_outputs else found
            if self.regulariser and self.regulariser.preset.weight and model.training:
                kl = self.regulariser.loss(model)
                self._metrics["train"]["kl"].append(kl.detach())
                # The trainer's loss is already divided by the tokens of all accumulated batches.
                steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
                loss = loss + self.regulariser.preset.weight * kl / steps
            return (loss, found[1]) if return_outputs else loss

        def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
            if not self.lean or return_outputs:
                return super()._compute_loss(model, inputs, return_outputs)
            loss, logged = lean.preference_loss(model, self, inputs)
            for key, value in logged.items():
                self._metrics["train"][key].append(float(value))
            return loss

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


def _arguments(preset: DpoPreset | SftPreset, rows: int, seed: int, out: Path, checkpointing: bool) -> dict[str, Any]:
    """Training arguments, each set explicitly where a default of a library could change results."""
    if preset.optimiser == "adamw_8bit" and not torch.cuda.is_available():
        raise TrainingError("optimiser 'adamw_8bit' needs a CUDA device (bitsandbytes): use 'adamw_torch'")
    batches = math.ceil(rows / preset.batch_size)
    steps = preset.max_steps or math.ceil(preset.epochs * math.ceil(batches / preset.gradient_accumulation))
    warmup = math.ceil(preset.warmup_ratio * steps) if isinstance(preset, DpoPreset) else preset.warmup_steps
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
        "gradient_checkpointing": checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if checkpointing else None,
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


def _ran(trainer_class: type) -> Literal["trl", "unsloth"]:
    """Whose trainer a class is: Unsloth puts its own in the place of TRL's."""
    return "unsloth" if any("Unsloth" in c.__name__ for c in trainer_class.__mro__) else "trl"


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
    ran = _ran(trainer_class)
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


def precision(model: torch.nn.Module) -> list[str]:
    """The precisions of a model's parameters: one, unless it is a mixture."""
    return sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()})


def _check_precision(model: PreTrainedModel, preset: TrainingPreset) -> None:
    """The base is as the preset wants it, whole, and without adapters.

    Raises:
        TrainingError: another precision, a mixture, or adapters.
    """
    found = precision(model)
    if found != [preset.dtype]:
        raise TrainingError(
            f"the preset trains on a base in {preset.dtype}, the model given is in {' and '.join(found)}"
        )
    if isinstance(model, PeftModel) or stacking.adapter_state(model, values=False)["adapters"]:
        raise TrainingError("the model given has adapters already: give the bare base model")


@contextlib.contextmanager
def _tf32() -> Iterator[None]:
    """TF32 for float32 products on a GPU (those of the adapters): while training, and not where a proof is taken."""
    kept = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = kept


def _train(trainer: Any, watch: _Watch) -> pd.DataFrame:
    """Run a trainer; its log by step."""
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.add_callback(watch)
    try:
        with _tf32():
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


# --- Supervised fine-tuning ----------------------------------------------------------------------------------------


def split_rows(rows: Sequence[Row], preset: SftPreset, seed: int) -> tuple[list[Row], list[Row]]:
    """Rows to train on and rows held out: the first `max_rows`, divided at random by the seed, order kept."""
    rows = list(rows)[: preset.max_rows]
    held = set(np.random.default_rng([seed, 1]).permutation(len(rows))[: int(len(rows) * preset.held_out)].tolist())
    return [r for i, r in enumerate(rows) if i not in held], [r for i, r in enumerate(rows) if i in held]
