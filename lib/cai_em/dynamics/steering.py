"""H4 from end to end: directions of all models, the interventions along them, and what the models then say.

    arms = before_and_after(study.adapters, study.models, personas, dataset, seeds)
    found = find_directions(study.models, arms, questions, preset, probes, cells, contrast="adapter")
    planned = plan_interventions(found, arms, layers=[8, 12], strengths=[1], at=found.layer(12), strength=1)
    steered = steer(study.models, arms, planned, other_questions, preset, probes, cells)

One model is loaded at a time; what is finished is kept in `cells`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors.numpy import save_file

from cai_em.dynamics.directions import Contrast, before, cosine_table, reached
from cai_em.dynamics.interventions import (
    Intervention,
    Steered,
    contrasts_of,
    sample_steered,
    sweep,
    transfer,
)
from cai_em.model.activations import decoder_layers
from cai_em.model.layers import SteeringError, layer_number
from cai_em.model.load import load_model, load_tokenizer
from cai_em.records.files import atomic
from cai_em.records.keys import NO_DATASET
from cai_em.sample.conditions import Condition
from cai_em.study.entries import ModelSpec, SamplingPreset
from cai_em.study.study import Cell

UNTOUCHED = Intervention("none")
PLACE = ["model", "target", "dataset"]
"""What names a steered condition in a design, and in what was found for it."""


@dataclass(frozen=True)
class Arms:
    """Conditions before and after fine-tuning, by model and persona; of the latter, one per training seed."""

    dataset: str
    untuned: dict[str, dict[str, Condition]]
    tuned: dict[str, dict[str, list[Condition]]]

    def condition(self, model: str, persona: str, dataset: str) -> Condition:
        """The condition that is steered: before fine-tuning, or after it with the first seed."""
        return self.untuned[model][persona] if dataset == NO_DATASET else self.tuned[model][persona][0]

    @property
    def paths(self) -> list[Path]:
        """The folders of all their adapters."""
        tuned = (c for of in self.tuned.values() for runs in of.values() for c in runs)
        return sorted({path for c in tuned for path in c.paths})


def before_and_after(
    adapters: Callable[[Cell], Sequence[tuple[str, Path]]],
    models: Sequence[str] | Mapping[str, Any],
    personas: Sequence[str],
    dataset: str,
    seeds: Sequence[int],
) -> Arms:
    """Every persona's conditions without fine-tuning and after fine-tuning on a data set.

    Args:
        adapters: where a cell's adapters lie (`Study.adapters`).
        models, personas, dataset, seeds: which cells.
    """
    made = lambda m, p, d, s: Condition(m, p, d, s, tuple(adapters(Cell(m, p, d, s))))  # noqa: E731
    return Arms(
        dataset,
        {m: {p: made(m, p, NO_DATASET, 0) for p in personas} for m in models},
        {m: {p: [made(m, p, dataset, s) for s in seeds] for p in personas} for m in models},
    )


@dataclass(frozen=True)
class Directions:
    """What `find_directions` found, by model.

    Attributes:
        read: the responses that the directions were read from, empty ones left out, with `misaligned`.
        contrasts: model -> source -> contrast.
        depth: model -> its number of layers.
        probes: what the probe measured, by `<model> <condition>`.
    """

    read: pd.DataFrame
    contrasts: dict[str, dict[str, Contrast]]
    depth: dict[str, int]
    probes: dict[str, dict[str, Any]]

    @cached_property
    def vectors(self) -> dict[str, dict[str, dict[int, np.ndarray]]]:
        """Model -> source -> layer -> direction, at the layers that fine-tuning reaches."""
        return {m: {source: reached(c) for source, c in of.items()} for m, of in self.contrasts.items()}

    def reach(self, model: str) -> list[int]:
        """The layers of a model at which every source has a direction."""
        return sorted(set.intersection(*map(set, self.vectors[model].values())))

    def layer(self, number: int) -> dict[str, int]:
        """Model -> a layer, counted from either end.

        Raises:
            SteeringError: fine-tuning changes nothing there.
        """
        found = {m: layer_number(number, depth) for m, depth in self.depth.items()}
        for model, layer in found.items():
            if layer not in (reach := self.reach(model)):
                raise SteeringError(f"{model}: fine-tuning reaches layers {reach}, not layer {layer}")
        return found

    def layers(self, model: str, numbers: Sequence[int]) -> list[int]:
        """Layers of a model, counted from either end."""
        return [layer_number(i, self.depth[model]) for i in numbers]

    def lengths(self, numbers: Sequence[int], at: Mapping[str, int]) -> pd.DataFrame:
        """How long directions are beside the residual stream: `model, source, layer, direction, residual stream`."""
        return pd.DataFrame(
            [
                {
                    "model": m,
                    "source": source,
                    "layer": layer,
                    "direction": np.linalg.norm(v[layer]),
                    "residual stream": np.linalg.norm(self.contrasts[m][source].activations[:, layer], axis=1).mean(),
                }
                for m, of in self.vectors.items()
                for source, v in of.items()
                for layer in sorted({*self.layers(m, numbers), at[m]})
                if layer in v
            ]
        )

    def cosines(self, at: Mapping[str, int], draws: int) -> pd.DataFrame:
        """`cosine_table` of every model, at about ten layers and at one of interest, with `model`."""
        tables = []
        for m, of in self.vectors.items():
            first = next(iter(of.values()))
            some = {i for i in first if i % max(1, self.depth[m] // 10) == 0}
            for layer in sorted({*some, at[m]}):
                tables.append(cosine_table(self.contrasts[m], layer, draws=draws).assign(model=m))
        return pd.concat(tables, ignore_index=True)

    def save(self, path: Path) -> Path:
        """All directions, as `<model>/<source>/layer<i>`."""
        tensors = {
            f"{m}/{source}/layer{i}": np.asarray(x, np.float32)
            for m, of in self.vectors.items()
            for source, v in of.items()
            for i, x in v.items()
        }
        with atomic(path) as part:
            save_file(tensors, part)
        return path


def find_directions(
    models: Mapping[str, ModelSpec],
    arms: Arms,
    questions: Sequence[tuple[str, str]],
    preset: SamplingPreset,
    probe_prompts: Sequence[str],
    cells_dir: Path,
    *,
    contrast: str = "adapter",
    misaligned: Callable[[pd.DataFrame], pd.Series] | None = None,
) -> Directions:
    """Directions of every persona and run: the models answer, and the answers are read.

    Args:
        models: by key; one is loaded at a time.
        arms: whose directions.
        questions: (id, text): other ones than the directions are tried on.
        preset: every parameter of sampling.
        probe_prompts: what the probe compares logits on.
        cells_dir: folder of what is finished.
        contrast: `adapter` or `responses` (`contrasts_of`).
        misaligned: which of the responses are, in order; for `responses` alone.
    """
    tables, contrasts, depth = [], {}, {}
    probes: dict[str, dict[str, Any]] = {}
    for m, spec in models.items():
        model, tokenizer = load_model(spec, dtype=preset.dtype), load_tokenizer(spec)
        jobs = [(c, [UNTOUCHED]) for p, before in arms.untuned[m].items() for c in (before, *arms.tuned[m][p])]
        found = sample_steered(spec, model, tokenizer, jobs, questions, preset, probe_prompts, cells_dir)
        mine = found.responses[found.responses["response"].str.strip().ne("")].reset_index(drop=True)
        mine["misaligned"] = False
        if contrast == "responses" and misaligned is not None:
            mine["misaligned"] = misaligned(mine.drop(columns="misaligned")).astype(bool)
        mine["dataset"] = mine["dataset"].str.removesuffix(f"+{UNTOUCHED.name}")
        contrasts[m] = contrasts_of(model, tokenizer, arms.untuned[m], arms.tuned[m], mine, contrast, cells_dir)
        probes |= {f"{m} {name}": probe for name, probe in found.probes.items()}
        depth[m] = len(decoder_layers(model))
        tables.append(mine)
        del model
        gc.collect()
    return Directions(pd.concat(tables, ignore_index=True), contrasts, depth, probes)


@dataclass
class Planned:
    """What is to be done to the models.

    Attributes:
        jobs: (model, persona, data set) -> interventions on that condition.
        parts: `model, target, dataset` of each condition and the `part` that it belongs to: `sweep`, `transfer`.
    """

    jobs: dict[tuple[str, str, str], list[Intervention]]
    parts: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=[*PLACE, "part"]))

    def part(self, table: pd.DataFrame, name: str) -> pd.DataFrame:
        """The rows of a design, or of `effects`, that belong to a part."""
        wanted = pd.MultiIndex.from_frame(self.parts.loc[self.parts["part"] == name, PLACE])
        return table[pd.MultiIndex.from_frame(table[PLACE]).isin(wanted)]


def plan_interventions(
    found: Directions,
    arms: Arms,
    *,
    layers: Sequence[int],
    strengths: Sequence[float],
    at: Mapping[str, int],
    strength: float,
) -> Planned:
    """A sweep of the first persona's own direction, and the transfer of every direction to every persona.

    Args:
        found: the directions.
        arms: the conditions.
        layers, strengths: of the sweep: added to the untuned model (above 0) or subtracted from the tuned one (below).
        at, strength: of the transfer: the layer by model. Added to the untuned model; ablated from the tuned one.
    """
    jobs: dict[tuple[str, str, str], list[Intervention]] = {}
    parts = []
    for m, of in arms.untuned.items():
        jobs |= {(m, p, d): [UNTOUCHED] for p in of for d in (NO_DATASET, arms.dataset)}
        first = next(iter(of))
        swept = sweep(found.vectors[m][first], first, found.layers(m, layers), strengths)
        wanted = [("sweep", first, act, act.strength > 0) for act in swept]
        for p in of:
            moved = transfer(found.vectors[m], p, before(found.contrasts[m][p]), at[m], strength, seed=0)
            wanted += [("transfer", p, act, act.kind == "add") for act in moved]
        for part, p, act, on_untuned in wanted:
            arm = NO_DATASET if on_untuned else arms.dataset
            if act.name not in {a.name for a in jobs[m, p, arm]}:
                jobs[m, p, arm].append(act)
            parts.append((m, p, f"{arm}+{act.name}", part))
    return Planned(jobs, pd.DataFrame(parts, columns=[*PLACE, "part"]))


def steer(
    models: Mapping[str, ModelSpec],
    arms: Arms,
    planned: Planned,
    questions: Sequence[tuple[str, str]],
    preset: SamplingPreset,
    probe_prompts: Sequence[str],
    cells_dir: Path,
) -> Steered:
    """`sample_steered` of all models; what the probe measured, by `<model> <condition>`."""
    responses, designs = [], []
    probes: dict[str, dict[str, Any]] = {}
    for m, spec in models.items():
        model, tokenizer = load_model(spec, dtype=preset.dtype), load_tokenizer(spec)
        jobs = [(arms.condition(*of), acts) for of, acts in planned.jobs.items() if of[0] == m]
        found = sample_steered(spec, model, tokenizer, jobs, questions, preset, probe_prompts, cells_dir)
        responses.append(found.responses)
        designs.append(found.design)
        probes |= {f"{m} {name}": probe for name, probe in found.probes.items()}
        del model
        gc.collect()
    return Steered(pd.concat(responses, ignore_index=True), pd.concat(designs, ignore_index=True), probes)
