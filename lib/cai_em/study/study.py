"""The study as validated data: what is in `params/*.yaml`, checked before any work starts.

`load("demo")` gives a `Study`: a profile with everything that it names looked up (models, personas, data sets,
presets, hypotheses, thresholds), the grid's cells, and where each artefact of the run lies. Unknown keys are refused;
every error names the file, the line and the key.

    study = load("demo")
    for cell in study.cells():
        print(cell.model, cell.persona, cell.dataset, cell.seed, cell.arm)
"""

from __future__ import annotations

import csv
import itertools
import math
import os
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, create_model, model_validator

from cai_em.records.keys import BASELINE, NO_DATASET
from cai_em.study.arms import ArmedDataset, ArmedPersona, ContextArm, dataset_arm, persona_arm
from cai_em.study.entries import (
    Arm,
    Dataset,
    DpoPreset,
    Fault,
    FileStem,
    GeneratorPreset,
    Hypothesis,
    JudgePreset,
    ModelSpec,
    Named,
    ParamsError,
    Persona,
    Positive,
    SamplingPreset,
    Seed,
    SftPreset,
    Strict,
    Thresholds,
    explain,
    read_questions,
    read_yaml,
)


class Block(Strict):
    """A part of the grid: the product of two lists (for all the profile's models, or those named)."""

    personas: list[str] = Field(min_length=1)
    datasets: list[str] = Field(min_length=1)
    models: list[str] | None = None


class Trajectory(Strict):
    """H3: training runs with checkpoints."""

    personas: list[str] = Field(min_length=1)
    dataset: str
    preset: str
    seeds: list[Seed] = Field(default=[0], min_length=1)
    questions: Positive = 8
    samples_per_question: Positive = 4
    max_new_tokens: Positive | None = Field(default=None, description="null: the sampling preset's")
    beside: list[str] = Field(default=[], description="further presets, for the first persona and seed: rank, KL")
    out_of_domain: list[str] = Field(default=[], description="data sets on whose rows the loss is watched too")
    loss_rows: Positive = Field(default=8, description="rows per data set on which the loss is measured")


class Steering(Strict):
    """H4: directions of emergent misalignment and their transfer between personas.

    With several seeds in the profile, each persona's direction is found once per seed: what differs between two runs
    of one persona is no difference between personas.
    """

    personas: list[str] = Field(min_length=1)
    dataset: str
    layers: list[int] = Field(
        min_length=1, description="layers at which the direction is tried; negative counts from the last"
    )
    strengths: list[float] = Field(
        min_length=1, description="times the direction: above 0 on the untuned model, below on the tuned"
    )
    samples_per_question: Positive = 4
    questions: Positive = 8
    max_new_tokens: Positive | None = Field(default=None, description="null: the sampling preset's")
    contrast: Literal["adapter", "responses"] = "adapter"
    source_questions: Positive = Field(default=8, description="further questions that the direction is found on")
    source_samples: Positive = 2
    transfer_layer: int | None = Field(default=None, description="null: the middle one of layers")
    transfer_strength: Annotated[float, Field(gt=0)] = 1.0
    shuffles: Positive = 500


class Manipulation(Strict):
    """Manipulation checks by the judge: uptake on prompts in each data set's own domain, and persona expression."""

    samples: Positive = Field(default=1, description="answers to each in-domain prompt")
    max_new_tokens: Positive | None = Field(default=None, description="of those; null: the sampling preset's")
    rated: Positive | None = Field(
        default=None, description="main responses per question rated for persona expression; null: all"
    )


class Profile(Strict):
    """A study: names from the registries, and the grid."""

    title: str
    source: Literal["trained", "published", "audit"]
    models: list[str] = Field(min_length=1)
    grid: list[Block] = Field(default=[])
    seeds: list[Seed] = Field(default=[0], min_length=1)
    data: Literal["builtin", "fetched"] = "builtin"
    questions: FileStem = "eval"
    questions_limit: Positive | None = None
    generator: str | None = None
    personas_from: Literal["train", "hub"] = "train"
    persona_training: str | None = None
    em_training: str | None = None
    sampling: str | None = None
    judge: str | None = None
    shards: Literal["persona", "model"] | Positive = Field(
        default="persona",
        description="how a model's conditions are spread over sampling jobs: one a persona, one in all, or so many",
    )
    cells_per_job: Positive | None = Field(
        default=None, description="fine-tunings of one persona in one job, which loads the model once; null: all"
    )
    gpu: bool = Field(default=False, description="training and sampling jobs ask for a GPU")
    hypotheses: list[str] = Field(default=[])
    thresholds: str = "default"
    reference_scores: str = Field(
        default="", description="a CSV in params/ with reference scores of some responses: key columns and `score`"
    )
    manipulation: Manipulation | None = None
    capability: Literal["text", "letter"] | None = Field(
        default=None, description="multiple-choice questions beside: options as text, or by their letter"
    )
    trajectory: Trajectory | None = None
    steering: Steering | None = None
    caveat: str = Field(default="", description="what this profile cannot show, for the results document")

    @model_validator(mode="after")
    def _complete(self) -> Profile:
        if self.source == "trained":
            needed = ["persona_training", "em_training", "sampling", "judge"]
            if self.personas_from == "train":  # otherwise it depends on the models: Study._check_ways
                needed.append("generator")
            missing = [name for name in needed if getattr(self, name) is None]
            if missing or not self.grid:
                raise ValueError(f"a trained profile needs {', '.join(missing or ['grid'])}")
        elif self.grid:
            raise ValueError("a profile of scores that others made takes its cells from them: remove grid")
        for name in ("models", "seeds", "hypotheses"):
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise ValueError(f"{name} names something twice: {values}")
        return self


@dataclass(frozen=True, order=True)
class Cell:
    """One condition of the grid."""

    model: str
    persona: str
    dataset: str
    seed: int

    @property
    def arm(self) -> Arm:
        """`base`, `persona` (persona adapter only), `em` (EM adapter only) or `both`."""
        if self.persona == BASELINE:
            return "base" if self.dataset == NO_DATASET else "em"
        return "persona" if self.dataset == NO_DATASET else "both"


_REGISTRIES: dict[str, type[Strict] | Any] = {
    "models": ModelSpec,
    "personas": Persona,
    "datasets": Dataset,
    "arms": ContextArm,
    "hypotheses": Hypothesis,
    "known_faults": Fault,
    "training": Annotated[DpoPreset | SftPreset, Field(discriminator="kind")],
    "sampling": SamplingPreset,
    "generators": GeneratorPreset,
    "judges": JudgePreset,
    "thresholds": Thresholds,
}


def _registry(name: str, folder: Path) -> dict[str, Any]:
    """A registry file (`params/<name>.yaml`: key -> entry) as models; entries of `Named` get key and order."""
    path = folder / f"{name}.yaml"
    data, lines = read_yaml(path)
    kind = _REGISTRIES[name]
    if not isinstance(data, dict):
        raise ParamsError(f"{path}: expected a mapping of keys to entries, found {type(data).__name__}")
    if isinstance(kind, type) and issubclass(kind, Named):
        for order, (key, entry) in enumerate(data.items()):
            if not isinstance(entry, dict):
                raise ParamsError(f"{path}:{lines[(key,)]}: {key}: expected a mapping, found {entry!r}")
            data[key] = {"key": key, "order": order, **entry}
    if kind is JudgePreset:
        data = {key: {"name": key, **entry} if isinstance(entry, dict) else entry for key, entry in data.items()}

    registry: Any = create_model("Registry", entries=(dict[str, kind], ...))  # type: ignore[valid-type]
    try:
        return registry(entries=data).entries
    except ValidationError as error:
        # Locations start with "entries"; discriminated unions add the tag: neither is in the file.
        shifted = {("entries", *loc): line for loc, line in lines.items()}
        shifted |= {("entries", loc[0], tag, *loc[1:]): n for loc, n in lines.items() if loc for tag in ("dpo", "sft")}
        raise explain(error, path, shifted) from error


class Study:
    """A profile with everything that it names, its cells, and the places of its artefacts."""

    def __init__(
        self,
        name: str,
        profile: Profile,
        registries: dict[str, dict[str, Any]],
        folder: Path,
        audit: Any = None,
        audit_file: Path | None = None,
    ) -> None:
        self.name = name
        self.audit, self.audit_file = audit, audit_file
        self.profile = profile
        self.folder = folder
        self._registries = registries
        self.thresholds: Thresholds = self.entry("thresholds", profile.thresholds, "thresholds")
        self.models: dict[str, ModelSpec] = {m: self.entry("models", m, "models") for m in profile.models}
        self.personas: dict[str, Persona] = dict(registries["personas"])
        self.datasets: dict[str, Dataset] = dict(registries["datasets"])
        self.hypotheses: list[Hypothesis] = [self.entry("hypotheses", h, "hypotheses") for h in profile.hypotheses]
        self._dataset_keys = self._with_arms()
        faults: dict[str, Fault] = registries["known_faults"]
        self.known_faults = {key: fault for key, fault in faults.items() if fault.about == profile.source}
        for preset, registry in (
            ("generator", "generators"),
            ("persona_training", "training"),
            ("em_training", "training"),
            ("sampling", "sampling"),
        ):
            value = getattr(profile, preset)
            setattr(self, preset, self.entry(registry, value, preset) if value else None)
        judge = os.environ.get("CAI_EM_JUDGE") or profile.judge
        self.judge: JudgePreset | None = self.entry("judges", judge, "judge (or CAI_EM_JUDGE)") if judge else None

    audit: Any
    """The `AuditSpec` of a study whose source is `audit`, else None."""

    audit_file: Path | None
    """Where that is written: paths in it are relative to its folder."""

    generator: GeneratorPreset | None
    persona_training: DpoPreset | None
    em_training: SftPreset | None
    sampling: SamplingPreset | None

    def __repr__(self) -> str:
        return f"<Study {self.name}: {len(self.cells())} conditions of {', '.join(self.models)}>"

    def entry(self, registry: str, key: str, used_as: str) -> Any:
        """An entry of `params/<registry>.yaml`.

        Raises:
            ParamsError: there is none of that name; the message says what wanted it, and what there is.
        """
        known = self._registries[registry]
        if key not in known:
            raise ParamsError(
                f"profile {self.name!r}: {used_as} names {key!r}, which params/{registry}.yaml does not have "
                f"(it has: {', '.join(known)})"
            )
        return known[key]

    def _with_arms(self) -> dict[str, str]:
        """Add the arms that grid and hypotheses name; returns how the grid spells data sets -> key."""
        grid = self.profile.grid
        named = [*(p for block in grid for p in block.personas), *(p for h in self.hypotheses for p in h.personas)]
        for name in named:
            if armed := persona_arm(name, self._registries):
                self.personas[name] = armed
        keys: dict[str, str] = {}
        for name in [d for block in grid for d in block.datasets]:
            found = dataset_arm(name, self._registries)
            while isinstance(found, ArmedDataset):
                keys.setdefault(name, found.key)
                self.datasets[found.key] = found
                name = name.partition("-")[2] if found.share is None else found.of
                found = dataset_arm(name, self._registries)
        return keys

    def varied(self, **changes: Any) -> Study:
        """The same study with other values of its profile, such as another `grid`."""
        return Study(self.name, self.profile.model_copy(update=changes), self._registries, self.folder)

    def dataset_key(self, name: str) -> str:
        """The key of a data set as the grid spells it: `bad_medical*0.25` is `bad_medical-0.25`."""
        return self._dataset_keys.get(name, name)

    def also_claimed(self) -> list[str]:
        """Hypotheses of other stages that this study's documents claim too: they count in the family."""
        return [key for key, part in (("h3", self.profile.trajectory), ("h4", self.profile.steering)) if part]

    def sft_preset(self, name: str) -> SftPreset:
        """A preset of params/training.yaml by name, for stages that name their own; loading refuses another kind."""
        return self.entry("training", name, "a training preset")

    @property
    def introspection(self) -> SftPreset | None:
        """The preset of the personas' second stage, if they have one."""
        name = self.persona_training.introspection if self.persona_training else None
        return self.entry("training", name, "persona_training's introspection") if name else None

    def introspection_file(self) -> Path:
        """What a persona is asked about itself in the second stage."""
        return self.builtin("introspection.yaml")

    def persona_way(self, model: str, persona: str) -> Literal["baseline", "train", "hub", "random_control"]:
        """How a persona's adapter is had: trained here where the hub has none, even with `personas_from: hub`."""
        kind = self.personas[persona].kind
        if kind != "constitutional":
            return kind
        ready = self.profile.personas_from == "hub" and self.models[model].hub_adapter(persona)
        return "hub" if ready else "train"

    # --- The grid ---

    def cells(self) -> list[Cell]:
        """All conditions, in the order of the registries; a cell named by two blocks counts once."""
        return list(self._cells)

    @cached_property  # every rule of every job asks for them
    def _cells(self) -> list[Cell]:
        if self.profile.source == "published":
            with (self.folder / "published_selection.csv").open(newline="", encoding="utf-8") as file:
                found = {Cell(r["model"], r["persona"], r["dataset"], 0) for r in csv.DictReader(file)}
            return sorted((c for c in found if c.model in self.models), key=self._order)
        if self.audit is not None:  # what may be in the files; which of them are is seen when they are read
            every = itertools.product(self.models, self.personas, self.datasets, self.profile.seeds)
            return sorted((Cell(*c) for c in every), key=self._order)
        found = set()
        for block in self.profile.grid:
            models = block.models or self.profile.models
            datasets = list(map(self.dataset_key, block.datasets))
            for combination in itertools.product(models, block.personas, datasets, self.profile.seeds):
                cell = Cell(*combination)
                # Without fine-tuning there is nothing that a training seed could change.
                found.add(Cell(cell.model, cell.persona, NO_DATASET, 0) if cell.dataset == NO_DATASET else cell)
        if found and any(c.dataset == NO_DATASET for c in found):
            found |= {Cell(c.model, BASELINE, NO_DATASET, 0) for c in found}
        return sorted(found, key=self._order)

    def _order(self, cell: Cell) -> tuple:
        return (
            list(self.models).index(cell.model),
            self.personas[cell.persona].order,
            self.datasets[cell.dataset].order,
            cell.seed,
        )

    def used_personas(self) -> list[Persona]:
        """The personas of the grid, in order."""
        used = {c.persona for c in self.cells()}
        return [p for p in sorted(self.personas.values(), key=lambda p: p.order) if p.key in used]

    def used_datasets(self) -> list[Dataset]:
        """The data sets of the grid, in order, `none` included where the grid has it."""
        used = {c.dataset for c in self.cells()}
        return [d for d in sorted(self.datasets.values(), key=lambda d: d.order) if d.key in used]

    def persona_cells(self) -> list[tuple[str, str]]:
        """(model, persona) of every persona adapter to make."""
        return list(dict.fromkeys((c.model, persona) for c in self.cells() for persona in self.adapters_of(c)))

    def em_cells(self) -> list[Cell]:
        """The cells for which an EM adapter is trained."""
        return list(itertools.chain.from_iterable(self._em_cells.values()))

    # --- Arms: which adapters a condition is made of ---

    def trained(self, cell: Cell) -> Cell:
        """The cell whose EM adapter a condition takes: its own, but for arms that are only sampled in another way."""
        persona, dataset = self.personas[cell.persona], self.datasets[cell.dataset]
        who = cell.persona
        if isinstance(persona, ArmedPersona) and not persona.arm.training:
            who = persona.of if persona.arm.trained_on == "persona" else BASELINE
        while isinstance(dataset, ArmedDataset) and dataset.samples_only:
            dataset = self.datasets[dataset.of]
        return Cell(cell.model, who, dataset.key, cell.seed)

    def active_in_training(self, persona: str) -> str:
        """The persona whose adapter is active, and frozen, when fine-tuning takes place; empty: none."""
        entry = self.personas[persona]
        if isinstance(entry, ArmedPersona):
            return entry.of if entry.arm.trained_on == "persona" else ""
        return "" if persona == BASELINE else persona

    def active_in_sampling(self, persona: str) -> str:
        """The persona whose adapter is active when answers are sampled; empty: none."""
        entry = self.personas[persona]
        if not isinstance(entry, ArmedPersona):
            return self.active_in_training(persona)
        return {"persona": entry.of, "none": "", "random_control": self.control_of(entry.of)}[entry.arm.sampled_with]

    def control_of(self, persona: str) -> str:
        """The random control with a persona's norm; empty: there is none."""
        return next((p.key for p in self.personas.values() if p.norm_of == persona and type(p) is Persona), "")

    def adapters_of(self, cell: Cell) -> list[str]:
        """The personas whose adapters must be there before a condition can be sampled."""
        tuned = cell.dataset != NO_DATASET
        found = (self.active_in_sampling(cell.persona), self.active_in_training(self.trained(cell).persona) * tuned)
        return list(dict.fromkeys(filter(None, found)))

    def finetune_jobs(self) -> list[tuple[str, str, int]]:
        """(model, persona, part) of every fine-tuning job, parts counted from 1: all cells of a persona share one load
        of the model, unless `cells_per_job` spreads them over more jobs."""
        found = []
        for (model, persona), cells in self._em_cells.items():
            parts = math.ceil(len(cells) / (self.profile.cells_per_job or len(cells)))
            found += [(model, persona, part) for part in range(1, parts + 1)]
        return found

    def finetune_job(self, model: str, persona: str, part: int) -> list[Cell]:
        """The cells of one fine-tuning job."""
        cells = self._em_cells.get((model, persona), [])
        size = self.profile.cells_per_job or len(cells)
        return cells[(part - 1) * size : part * size]

    @cached_property
    def _em_cells(self) -> dict[tuple[str, str], list[Cell]]:
        """The cells that are trained, by model and persona, all in the order of the registries."""
        tuned = dict.fromkeys(self.trained(c) for c in self._cells if c.dataset != NO_DATASET)
        found: dict[tuple[str, str], list[Cell]] = {}
        for cell in sorted(tuned, key=self._order):
            found.setdefault((cell.model, cell.persona), []).append(cell)
        return found

    def shards(self) -> list[tuple[str, str]]:
        """(model, shard) of every sampling job: a shard is one persona, `all` with `shards: model`, or with a number
        `part1`, `part2`, ... of each model."""
        how = self.profile.shards
        if not isinstance(how, int):
            return list(dict.fromkeys((c.model, c.persona if how == "persona" else "all") for c in self.cells()))
        cells = Counter(c.model for c in self.cells())
        return [(model, f"part{i}") for model, n in cells.items() for i in range(1, min(how, n) + 1)]

    def shard_cells(self, model: str, shard: str) -> list[Cell]:
        """The cells of one sampling job.

        With a number they are neighbours in the grid's order, so that a persona's conditions lie in few shards.
        """
        cells = [c for c in self.cells() if c.model == model]
        if not isinstance(self.profile.shards, int):
            return [c for c in cells if shard in (c.persona, "all")]
        number, part = min(self.profile.shards, len(cells)), int(shard.removeprefix("part"))
        return cells[(part - 1) * len(cells) // number : part * len(cells) // number]

    # --- Places ---

    @property
    def dir(self) -> Path:
        """`results/<profile>` (under `CAI_EM_RESULTS` where that is set)."""
        base = os.environ.get("CAI_EM_RESULTS")
        return (Path(base) if base else self.folder.parent / "results") / self.name

    def persona_dir(self, model: str, persona: str) -> Path:
        """Where a persona's pairs and adapter lie."""
        return self.dir / "01_personas" / model / persona

    def em_dir(self, cell: Cell) -> Path:
        """Where the EM adapter of a cell lies."""
        return self.dir / "02_finetune" / cell.model / cell.persona / cell.dataset / f"seed{cell.seed}"

    def finetune_mark(self, model: str, persona: str, part: int) -> Path:
        """What a fine-tuning job writes when all of its cells are finished."""
        return self.dir / "02_finetune" / model / persona / f"job{part}.json"

    def adapters(self, cell: Cell) -> list[tuple[str, Path]]:
        """The adapters that a condition composes, persona first: `[]` for base. `control`: one in a persona's place."""
        found, active = [], self.active_in_sampling(cell.persona)
        if active:
            entry = self.personas[cell.persona]
            name = "control" if isinstance(entry, ArmedPersona) and active != entry.of else "persona"
            found.append((name, self.persona_dir(cell.model, active) / "adapter"))
        if cell.dataset != NO_DATASET:
            found.append(("em", self.em_dir(self.trained(cell)) / "adapter"))
        return found

    def trained_on(self, cell: Cell) -> list[tuple[str, Path]]:
        """The persona adapter that a condition's EM adapter was trained on top of: `[]` for none."""
        active = self.active_in_training(self.trained(cell).persona) if cell.dataset != NO_DATASET else ""
        return [("persona", self.persona_dir(cell.model, active) / "adapter")] if active else []

    def absent(self, cell: Cell) -> list[tuple[str, Path]]:
        """The persona adapter that was active in training, and must not be when answers are sampled."""
        return [part for part in self.trained_on(cell) if part not in self.adapters(cell)]

    def sample_dir(self, model: str, shard: str) -> Path:
        """Where the responses of a shard lie."""
        return self.dir / "03_sample" / model / shard

    def judge_dir(self, model: str, shard: str) -> Path:
        """Where the scores of a shard lie."""
        return self.dir / "04_judge" / model / shard

    def stage_dir(self, stage: str) -> Path:
        """Where a stage with one job per profile writes, e.g. `05_validity`."""
        return self.dir / stage

    @property
    def imported(self) -> Path | None:
        """Where the import stage of scores that others made writes; None for a trained study."""
        stage = {"published": "07_published", "audit": "07_audit"}.get(self.profile.source)
        return self.stage_dir(stage) if stage else None

    def artefact_dirs(self) -> list[Path]:
        """Every folder in which a finished run leaves a manifest, the run's own last."""
        p, trained = self.profile, self.profile.source == "trained"
        found = [self.persona_dir(m, persona) for m, persona in self.persona_cells()] if trained else []
        found += [self.em_dir(c) for c in self.em_cells()] if trained else []
        found += [self.imported] if self.imported else []
        for model, shard in self.shards() if trained else ():
            found += [self.sample_dir(model, shard), self.judge_dir(model, shard)]
        stages = ["05_validity", "06_results", "08_claims"]
        stages += [s for s, wanted in (("09_trajectories", p.trajectory), ("10_steering", p.steering)) if wanted]
        return [*found, *map(self.stage_dir, [*stages, "11_report"]), self.dir]

    def response_files(self) -> list[Path]:
        """The response tables that the analysis reads, whatever their source."""
        if self.imported:
            return [self.imported / "responses.parquet"]
        return [self.sample_dir(m, s) / "responses.parquet" for m, s in self.shards()]

    def score_files(self) -> list[Path]:
        """The score tables that the analysis reads, whatever their source."""
        if self.imported:
            return [self.imported / "scores.parquet"]
        return [self.judge_dir(m, s) / "scores.parquet" for m, s in self.shards()]

    def builtin(self, *parts: str) -> Path:
        """A file of `params/builtin/`."""
        return self.folder.joinpath("builtin", *parts)

    def constitution_file(self, persona: str) -> Path:
        """The built-in constitution of a persona."""
        return self.builtin("constitutions", f"{self.personas[persona].constitution}.yaml")

    def row_sources(self, dataset: str) -> list[str]:
        """The data sets whose rows a data set is made of: itself; of an arm, what it is an arm of, and of a share the
        twin."""
        found: list[str] = []
        entry = self.datasets[dataset]
        while isinstance(entry, ArmedDataset):
            found += [entry.twin] if entry.share is not None and entry.twin else []
            entry = self.datasets[entry.of]
        return [entry.key, *found]

    def dataset_file(self, dataset: str) -> Path:
        """The built-in rows of a data set."""
        return self.builtin("datasets", f"{self.datasets[dataset].builtin}.jsonl")

    def questions_file(self) -> Path:
        """The question set: built-in, or fetched when the profile's data are."""
        return self.builtin("questions", f"{self.profile.questions}.yaml")

    def questions(self) -> list[tuple[str, str]]:
        """(id, text) of the profile's questions.

        Raises:
            ParamsError: the file is missing or malformed, or an id or a text comes twice.
        """
        return read_questions(self.questions_file())[: self.profile.questions_limit]
