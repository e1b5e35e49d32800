"""H3: the runs whose course is looked at: their schedules, their training, the geometry of their adapters."""

from __future__ import annotations

import gc
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from cai_em.dynamics.curves import TrajectoryError
from cai_em.model.activations import mean_logprobs
from cai_em.model.adapters import WEIGHTS, AdapterFiles, read_adapter
from cai_em.model.load import load_model, load_tokenizer
from cai_em.model.probing import Slots
from cai_em.records.code import meaning_of
from cai_em.records.files import digest, file_hash
from cai_em.records.manifest import read_manifest, write_manifest
from cai_em.sample.conditions import Condition
from cai_em.sample.sampling import sample
from cai_em.study.entries import ModelSpec, SamplingPreset, SftPreset
from cai_em.study.materials import Messages
from cai_em.train import grid

Personas = Mapping[tuple[str, str], Sequence[tuple[str, Path]]]
"""(model, persona) -> its adapters, `[("persona", folder)]`, or `[]` for the baseline."""


# --- Schedule and names --------------------------------------------------------------------------------------------


def dense_early(last: int, count: int, first: int = 1) -> list[int]:
    """Up to `count` checkpoint steps from `first` to `last`, evenly spaced in the logarithm: dense early, distinct.

    Raises:
        TrajectoryError: fewer than one step or checkpoint.
    """
    if not 1 <= first <= last or count < 1:
        raise TrajectoryError(f"no schedule of {count} checkpoints from step {first} to {last}: each must be 1 or more")
    count = min(count, last - first + 1)
    steps = sorted({int(s) for s in np.rint(np.geomspace(first, last, count))} | {last})
    # Rounding merges the first steps of a short run; the gaps are filled from the front, where most happens.
    free = iter(sorted(set(range(first, last)) - set(steps)))
    while len(steps) < count:
        steps.append(next(free))
    return sorted(steps)


def first_trained(preset: SftPreset, steps: int) -> int:
    """The first step after which anything is learnt: under warm-up the rate starts from 0."""
    return min(steps, 2 if preset.warmup_steps and preset.scheduler != "constant" else 1)


_LABEL = re.compile(r"^(?P<dataset>[^~@]+)~(?P<preset>[^~@]+)@(?P<step>\d+)$")


def at_step(dataset: str, preset: str, step: int) -> str:
    """The `dataset` key of a checkpoint's condition; step 0 is the model before training."""
    return f"{dataset}~{preset}@{step}"


def with_steps(table: pd.DataFrame) -> pd.DataFrame:
    """A table of checkpoints with `dataset` as it was before `at_step`, and columns `preset` and `step`.

    Raises:
        TrajectoryError: a `dataset` that is not a checkpoint's.
    """
    parts = table["dataset"].str.extract(_LABEL)
    wrong = table.loc[parts["step"].isna(), "dataset"]
    if len(wrong):
        raise TrajectoryError(f"{len(wrong)} rows are not of a checkpoint, e.g. dataset {wrong.iloc[0]!r}")
    return table.assign(dataset=parts["dataset"], preset=parts["preset"], step=parts["step"].astype(int))


# --- Runs ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A training run with checkpoints."""

    model: str
    preset: str
    persona: str
    seed: int

    def folder(self, stage: Path) -> Path:
        """Where its snapshots lie."""
        return stage / "runs" / self.model / self.preset / self.persona / f"seed{self.seed}"

    def conditions(self, dataset: str, persona: Sequence[tuple[str, Path]], stage: Path) -> list[Condition]:
        """The conditions of its checkpoints on disk, step 0 first (that of its persona alone, for the first seed).

        Args:
            dataset: what it is trained on.
            persona: the persona's adapter, `[("persona", folder)]`, or `[]`.
            stage: the stage's folder.
        """
        found = [(0, tuple(persona))] + [
            (int(path.name.removeprefix("step")), (*persona, ("em", path)))
            for path in sorted(self.folder(stage).glob("step*"))
        ]
        # An early snapshot may differ from no training by less than the probe can see; the last one must not.
        return [
            Condition(
                self.model,
                self.persona,
                at_step(dataset, self.preset, step),
                self.seed,
                adapters,
                may_be_idle=("em",) if 0 < step < found[-1][0] else (),
            )
            for step, adapters in found
        ]


def plan_runs(
    models: Sequence[str], personas: Sequence[str], seeds: Sequence[int], preset: str, beside: Sequence[str] = ()
) -> list[Run]:
    """The runs: every persona and seed with the main preset; further presets for the first persona and seed."""
    main = [Run(m, preset, p, s) for m in models for p in personas for s in seeds]
    return main + [Run(m, other, personas[0], seeds[0]) for m in models for other in beside]


def train_run(
    this: Run,
    spec: ModelSpec,
    preset: SftPreset,
    rows: Sequence[Messages],
    stage: Path,
    *,
    persona_dir: Path | None,
    kl_rows: Sequence[Messages] | None = None,
) -> dict[str, Any]:
    """Train a run, unless the same one (preset, rows, persona's adapter, code) has been trained to its end before.

    Args:
        this: which run.
        spec: its model.
        preset: how to train; without `checkpoints` it gets a dense-early schedule of eight. Nothing is held out here:
            held-out rows must be the same for all seeds, so the caller takes them out of `rows`.
        rows: the training rows.
        stage: the stage's folder.
        persona_dir: the persona's adapter; None for the baseline.
        kl_rows: the extra corpus of a KL-regularised preset.

    Returns:
        The run's manifest.
    """
    folder = this.folder(stage)
    # As the trainer counts: the last batch of an epoch may be smaller.
    steps = preset.max_steps or math.ceil(
        preset.epochs * math.ceil(math.ceil(len(rows) / preset.batch_size) / preset.gradient_accumulation)
    )
    wanted = [s for s in preset.checkpoints or dense_early(steps, 8, first_trained(preset, steps)) if s <= steps]
    preset = preset.model_copy(update={"held_out": 0.0, "checkpoints": sorted({*wanted, steps})})
    persona = file_hash(Path(persona_dir) / "adapter_model.safetensors") if persona_dir else None
    code = meaning_of("cai_em.train.grid")
    made_from = digest([asdict(this), spec, preset, list(rows), list(kl_rows or []), persona, code])
    if (folder / "manifest.json").is_file() and (found := read_manifest(folder)).get("made_from") == made_from:
        snapshots = [folder / f"step{step:05d}" / WEIGHTS for step in found["summary"]["checkpoints"]]
        if all(path.is_file() for path in snapshots):
            return found
    shutil.rmtree(folder, ignore_errors=True)
    task = grid.Task(rows, folder / "adapter", this.seed, kl_rows, checkpoints_dir=folder)
    ((_, result),) = grid.train_tasks(spec, preset, [task], persona_dir=persona_dir)
    if isinstance(result, grid.Failed):
        raise TrajectoryError(f"{this}: {result.error}\n{result.trace}")
    result.log.to_parquet(folder / "log.parquet", index=False)
    write_manifest(
        folder,
        stage="09_trajectories/run",
        inputs=[persona_dir] if persona_dir else [],
        outputs=[folder / "log.parquet", *(path for _, path in result.checkpoints)],
        params={"run": this, "preset": preset},
        seeds={"training": this.seed},
        adapter_state=result.adapter_state,
        timings=result.timings,
        made_from=made_from,
        summary=result.summary(),
    )
    return read_manifest(folder)


def train_runs(
    runs: Sequence[Run],
    models: Mapping[str, ModelSpec],
    presets: Mapping[str, SftPreset],
    rows: Sequence[Messages],
    stage: Path,
    *,
    personas: Personas,
    corpora: Mapping[str, Sequence[Messages]],
) -> pd.DataFrame:
    """`train_run` of every run.

    Args:
        runs: which.
        models: their models, by key.
        presets: how to train, by name.
        rows: the training rows.
        stage: the stage's folder.
        personas: (model, persona) -> its adapters.
        corpora: preset -> the extra corpus, where it is KL-regularised.

    Returns:
        `model, preset, persona, seed, steps, first_loss, last_loss`.
    """
    found = []
    for this in tqdm(runs, desc="runs"):
        persona = personas[this.model, this.persona]
        made = train_run(
            this,
            models[this.model],
            presets[this.preset],
            rows,
            stage,
            persona_dir=persona[0][1] if persona else None,
            kl_rows=corpora.get(this.preset),
        )
        gc.collect()
        found.append(asdict(this) | {k: made["summary"][k] for k in ("steps", "first_loss", "last_loss")})
    return pd.DataFrame(found)


def run_geometries(runs: Sequence[Run], presets: Mapping[str, SftPreset], stage: Path) -> pd.DataFrame:
    """`geometry` of all runs' snapshots, from no update at step 0 on, with the runs' names as columns.

    Of a rank-1 adapter it is that of B alone, the vector that is written into the residual stream.
    """
    tables = []
    for this in runs:
        part: Literal["update", "B"] = "B" if presets[this.preset].lora.r == 1 else "update"
        paths = sorted(this.folder(stage).glob("step*"))
        steps = [0, *(int(path.name.removeprefix("step")) for path in paths)]
        found = geometry(gram([None, *(read_adapter(path) for path in paths)], part), steps)
        tables.append(found.assign(**asdict(this), part=part))
    return pd.concat(tables, ignore_index=True)


# --- Snapshots -----------------------------------------------------------------------------------------------------


def snapshots(runs: Sequence[Run], dataset: str, personas: Personas, stage: Path) -> list[Condition]:
    """The conditions of all runs' snapshots, each once: the model before training is the same for every seed."""
    found = [c for this in runs for c in this.conditions(dataset, personas[this.model, this.persona], stage)]
    first = {this.model: this.seed for this in reversed(runs)}
    return [c for c in found if not c.dataset.endswith("@0") or c.seed == first[c.model]]


def sample_snapshots(
    models: Mapping[str, ModelSpec],
    conditions: Sequence[Condition],
    questions: Sequence[tuple[str, str]],
    preset: SamplingPreset,
    probe_prompts: Sequence[str],
    cells_dir: Path,
) -> tuple[pd.DataFrame, dict[str, dict[str, Any]]]:
    """Every condition's responses, model by model, and what the probe measured, by `<model> <condition>`."""
    tables: list[pd.DataFrame] = []
    probes: dict[str, dict[str, Any]] = {}
    for model, spec in models.items():
        mine = [c for c in conditions if c.model == model]
        found = sample(spec, mine, questions, preset, probe_prompts, cells_dir, progress=True)
        tables.append(found.responses)
        probes |= {f"{model} {name}": probe for name, probe in found.probes.items()}
    return pd.concat(tables, ignore_index=True), probes


def measure_losses(
    models: Mapping[str, ModelSpec],
    conditions: Sequence[Condition],
    sets: Mapping[str, Sequence[Messages]],
    dtype: Literal["float32", "bfloat16"],
) -> pd.DataFrame:
    """`losses` of every condition: `set, row, loss, model, persona, dataset, seed, preset, step`."""
    tables = []
    for model, spec in models.items():
        base, tokenizer = load_model(spec, dtype=dtype), load_tokenizer(spec)
        slots = Slots(base)
        for c in tqdm([c for c in conditions if c.model == model], desc="losses"):
            with slots.composed(c.adapters):
                found = losses(base, tokenizer, sets)
            tables.append(found.assign(model=model, persona=c.persona, dataset=c.dataset, seed=c.seed))
        del base, slots
        gc.collect()
    return with_steps(pd.concat(tables, ignore_index=True))


# --- What a checkpoint's adapter is ---------------------------------------------------------------------------------


def gram(checkpoints: Sequence[AdapterFiles | None], part: Literal["update", "B"] = "update") -> np.ndarray:
    """Inner products of adapters' updates.

    The update of a module is `scale * B @ A`; <s1 B1 A1, s2 B2 A2> = s1 s2 tr((B1' B2)(A2 A1')), so that only
    (rank, rank) matrices are formed. Unlike A and B themselves, the update does not depend on how a LoRA of rank
    above 1 splits it among its factors. `part="B"` compares the B matrices alone, as Turner et al. (2025, arXiv
    2506.11613) do for rank 1, where B is the vector that is written into the residual stream.

    Args:
        checkpoints: adapters of the same shape (`adapters.read_adapter`), in order; None: no update (step 0).
        part: of what.

    Returns:
        (checkpoints, checkpoints), float64.

    Raises:
        TrajectoryError: adapters on different modules.
    """
    adapters = [c for c in checkpoints if c is not None]
    modules = {tuple(a.modules) for a in adapters}
    if len(modules) > 1:
        raise TrajectoryError("the checkpoints adapt different modules: they are not of one run")
    found = np.zeros((len(checkpoints),) * 2)
    for i, one in enumerate(checkpoints):
        for j, other in enumerate(checkpoints[: i + 1]):
            if one is not None and other is not None:
                found[i, j] = found[j, i] = _inner(one, other, part)
    return found


def _inner(one: AdapterFiles, other: AdapterFiles, part: str) -> float:
    total = 0.0
    for module, (a1, b1) in one.modules.items():
        a2, b2 = other.modules[module]
        between = b1.double().T @ b2.double()
        if part == "B":
            total += float(torch.trace(between))
        else:
            total += one.scale * other.scale * float((between * (a1.double() @ a2.double().T)).sum())
    return total


def geometry(products: np.ndarray, steps: Sequence[int]) -> pd.DataFrame:
    """How a run's update grows and turns, from its Gram matrix.

    Args:
        products: (steps, steps) of `gram`.
        steps: the checkpoints' steps, ascending, step 0 included where the run starts from nothing.

    Returns:
        One row per step: `norm` of the update, and `norm_share` of the largest; `moved`: length of the way since the
        step before; `rotation`: cosine between the differences to the step before and to the step after (the local
        cosine similarity of Turner et al. 2025; 1: straight on, 0: at a right angle, NaN at the ends and where nothing
        moved); `to_final`: cosine with the last step's update. Cosines depend on the spacing: compare runs of one
        schedule.
    """
    g, n = np.asarray(products, float), len(steps)
    if g.shape != (n, n):
        raise TrajectoryError(f"{n} steps, but a Gram matrix of shape {g.shape}")
    d = g[1:, 1:] - g[1:, :-1] - g[:-1, 1:] + g[:-1, :-1]  # inner products of successive differences
    norm, moved = np.sqrt(np.clip(np.diag(g), 0, None)), np.sqrt(np.clip(np.diag(d), 0, None))
    with np.errstate(invalid="ignore", divide="ignore"):  # a difference of length 0 has no direction
        rotation = np.diag(d, 1) / (moved[:-1] * moved[1:])
        to_final = g[:, -1] / (norm * norm[-1])
    ends = np.full(n, np.nan)
    ends[1:-1] = np.where(np.isfinite(rotation), rotation, np.nan)
    return pd.DataFrame(
        {
            "step": list(steps),
            "norm": norm,
            "norm_share": norm / (norm.max() or np.nan),
            "moved": np.concatenate([[np.nan], moved]),
            "rotation": ends,
            "to_final": np.where(np.isfinite(to_final), to_final, np.nan),
        }
    )


def losses(model: torch.nn.Module, tokenizer: Any, sets: Mapping[str, Sequence[Messages]]) -> pd.DataFrame:
    """Loss of a model on rows that it was not trained on.

    Args:
        model: with the checkpoint's adapters active.
        tokenizer: its tokenizer.
        sets: name -> rows, each one question and one answer (`materials.rows`).

    Returns:
        `set, row, loss` (mean negative log-likelihood of the answer's tokens, nats), one row per row.

    Raises:
        TrajectoryError: a row with more than one question and one answer.
    """
    tables = []
    for name, rows in sets.items():
        wrong = [i for i, row in enumerate(rows) if [m["role"] for m in row] != ["user", "assistant"]]
        if wrong:
            raise TrajectoryError(f"rows {wrong[:5]} of {name} are not one question and one answer")
        prompts, answers = ([row[i]["content"] for row in rows] for i in (0, 1))
        loss = -mean_logprobs(model, tokenizer, prompts, answers)
        tables.append(pd.DataFrame({"set": name, "row": range(len(rows)), "loss": loss}))
    return pd.concat(tables, ignore_index=True)
