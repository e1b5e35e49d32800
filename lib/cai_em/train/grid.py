"""All of a persona's trainings in one process: one load of the base, each adapter handed over as it is finished.

    for number, done in train_tasks(spec, study.em_training, tasks, persona_dir=persona_dir):
        ...                            # a TrainResult, or a Failed; the caller commits it before the next one starts

A training draws nothing from the ones before it: seeds are set anew, the base is given back as it came, and so an
adapter is the same, byte for byte, alone or among others, in any order. A training that fails is reported and the next
one goes on; the caller says so at the end. With Unsloth the loop runs in a process of its own (`apart`).
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cai_em.model.adapters import WEIGHTS
from cai_em.records.files import atomic
from cai_em.records.manifest import MANIFEST, read_manifest, write_manifest
from cai_em.study.entries import DpoPreset, ModelSpec, SftPreset
from cai_em.train import apart
from cai_em.train.train import train_dpo, train_sft
from cai_em.train.trainer import Row, TrainingError, TrainResult, load_for_training, precision, training_backend

Loaded = Sequence[PreTrainedModel | PreTrainedTokenizerBase]
"""A base model, bare, and its tokenizer; empty where none is loaded."""


@dataclass(frozen=True)
class Task:
    """One adapter to be trained by `train.train_sft`; fields as its arguments."""

    rows: Sequence[Row]
    out: Path
    seed: int = 0
    kl_rows: Sequence[Row] | None = None
    name: str = "em"
    checkpoints_dir: Path | None = None


@dataclass(frozen=True)
class Failed:
    """A training that did not come to its end: the error in a line, and where it was raised."""

    error: str
    trace: str


def train_tasks(
    spec: ModelSpec,
    preset: SftPreset,
    tasks: Sequence[Task],
    *,
    persona_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
) -> Iterator[tuple[int, TrainResult | Failed]]:
    """Train adapters on one base, one after the other.

    Args:
        spec: the base model.
        preset: how to train; the same for all.
        tasks: what to train, in order.
        persona_dir: the persona that is active and frozen below them; None for the baseline.
        cache_dir: of converted models.

    Yields:
        (index of the task, what became of it), before the next one is begun where no other process is needed.

    Raises:
        apart.ChildDied: the process that trains was killed; what it had handed over stays.
    """
    if not tasks:
        return
    given = (spec, preset, list(tasks), persona_dir, cache_dir)
    yield from apart.stream(_each, *given) if training_backend(preset) == "unsloth" else _each(*given)


def _each(
    spec: ModelSpec,
    preset: SftPreset,
    tasks: Sequence[Task],
    persona_dir: str | Path | None,
    cache_dir: str | Path | None,
) -> Iterator[tuple[int, TrainResult | Failed]]:
    model, tokenizer = load_for_training(spec, preset, cache_dir, persona_dir)
    for number, task in enumerate(tasks):
        try:
            done: TrainResult | Failed = train_sft(
                model,
                tokenizer,
                task.rows,
                preset,
                task.out,
                persona_dir=persona_dir,
                seed=task.seed,
                kl_rows=task.kl_rows,
                name=task.name,
                checkpoints_dir=task.checkpoints_dir,
            )
        except Exception as error:  # noqa: BLE001 (reported with its place; the caller raises at the end)
            done = Failed(f"{type(error).__name__}: {error}", traceback.format_exc())
        yield number, done


def train_persona(
    spec: ModelSpec,
    preset: DpoPreset,
    pairs: pd.DataFrame,
    out: str | Path,
    *,
    loaded: Loaded | None = None,
    cache_dir: str | Path | None = None,
) -> TrainResult:
    """`train.train_dpo`, in this process or, with Unsloth, in one of its own.

    Args:
        spec: the base model.
        preset: how to train.
        pairs: preference pairs.
        out: folder of the adapter.
        loaded: the base, where the caller has it: taken where its precision is the preset's, and given back as it
            came. Unsloth loads its own.
        cache_dir: of converted models.
    """
    if training_backend(preset) == "unsloth":
        (result,) = apart.stream(_persona, spec, preset, pairs, out, cache_dir)
        return result
    if loaded and precision(loaded[0]) != [preset.dtype]:
        loaded = None
    model, tokenizer = loaded or load_for_training(spec, preset, cache_dir)
    return train_dpo(model, tokenizer, pairs, preset, out)


def _persona(
    spec: ModelSpec, preset: DpoPreset, pairs: pd.DataFrame, out: str | Path, cache_dir: str | Path | None
) -> Iterator[TrainResult]:
    model, tokenizer = load_for_training(spec, preset, cache_dir)
    yield train_dpo(model, tokenizer, pairs, preset, out)


def raise_failed(failed: Sequence[str], number: int) -> None:
    """At the end of a job: say which of its trainings failed, if any did.

    Raises:
        TrainingError: each that failed, with its error.
    """
    if failed:
        raise TrainingError(f"{len(failed)} of {number} trainings failed: {'; '.join(failed)}")


def is_finished(folder: str | Path, made_from: dict[str, Any]) -> bool:
    """Whether a cell's adapter is there, made from the same settings, code and persona.

    Args:
        folder: the cell's, with its manifest.
        made_from: what its manifest must say of that.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file() or not (folder / "adapter" / WEIGHTS).is_file():
        return False
    return read_manifest(folder).get("made_from") == made_from


def keep(
    folder: str | Path,
    result: TrainResult,
    *,
    inputs: Sequence[str | Path],
    params: dict[str, Any],
    seed: int,
    made_from: dict[str, Any],
) -> None:
    """Commit a finished cell: its log, and, last of all, its manifest.

    Args:
        folder: the cell's, in which the adapter lies already.
        result: what training it did.
        inputs: files and folders that it was made of.
        params: presets, written out.
        seed: of the training.
        made_from: by which a later run knows that it need not be made again (`is_finished`).
    """
    folder = Path(folder)
    with atomic(folder / "log.parquet") as unfinished:
        result.log.to_parquet(unfinished, index=False)
    write_manifest(
        folder,
        stage="02_finetune",
        inputs=inputs,
        outputs=[result.adapter, folder / "log.parquet", *(path for _, path in result.checkpoints)],
        params=params,
        seeds={"training": seed},
        adapter_state=result.adapter_state,
        timings=result.timings,
        made_from=made_from,
        summary=result.summary(),
    )
