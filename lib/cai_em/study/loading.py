"""From a profile's name to a study: its entries read, its references and contradictions checked."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from cai_em.records.files import root
from cai_em.records.keys import BASELINE, NO_DATASET
from cai_em.study.arms import ArmedPersona, persona_arm
from cai_em.study.audited import is_audit, settled
from cai_em.study.entries import DpoPreset, ParamsError, SftPreset, read_as, read_yaml
from cai_em.study.study import _REGISTRIES, Cell, Profile, Study, _registry


@cache
def _registries(folder: Path) -> dict[str, dict[str, Any]]:
    found = {name: _registry(name, folder) for name in _REGISTRIES}
    _check_references(found, folder)
    return found


def _check_references(registries: dict[str, dict[str, Any]], folder: Path) -> None:
    """Entries of the registries that name an entry which is not there."""
    named = (
        ("datasets", "twin", "datasets"),
        ("personas", "norm_of", "personas"),
        ("hypotheses", "personas", "personas"),
    )
    problems = []
    for registry, field, known in named:
        for key, entry in registries[registry].items():
            value = getattr(entry, field)
            for name in value if isinstance(value, list) else [value] if value else []:
                if name not in registries[known] and not (field == "personas" and persona_arm(name, registries)):
                    path = folder / f"{registry}.yaml"
                    line = read_yaml(path)[1].get((key, field))
                    problems.append(
                        f"{path}:{line}: {key}.{field} names {name!r}, which {known}.yaml does not have "
                        f"(it has: {', '.join(registries[known])})"
                    )
    if problems:
        raise ParamsError("\n".join(problems))


def _check(study: Study) -> None:
    """Contradictions between entries, found before any work."""
    p = study.profile
    if p.source != "trained":
        return
    if not isinstance(study.persona_training, DpoPreset) or not isinstance(study.em_training, SftPreset):
        raise ParamsError(f"profile {study.name!r}: persona_training must be a dpo preset and em_training an sft one")
    second = study.introspection
    if second is not None and (not isinstance(second, SftPreset) or second.introspection is None):
        raise ParamsError(
            f"profile {study.name!r}: persona_training's introspection, {study.persona_training.introspection!r}, "
            "must be an sft preset with a part `introspection` (how many reflections and dialogues)"
        )
    for i, block in enumerate(p.grid):
        where = f"grid[{i}]"
        for persona in block.personas:
            if persona not in study.personas:
                study.entry("personas", persona, f"{where}.personas")
            _check_arm(study, persona, f"{where}.personas")
        for dataset in block.datasets:
            if study.dataset_key(dataset) not in study.datasets:
                study.entry("datasets", dataset, f"{where}.datasets")
        for model in block.models or []:
            if model not in study.models:
                raise ParamsError(f"profile {study.name!r}: {where}.models names {model!r}, not one of {p.models}")
    cells = set(study.cells())
    _check_ways(study)
    for cell in sorted(cells):
        partner = Cell(cell.model, BASELINE, cell.dataset, cell.seed)
        if partner not in cells:
            raise ParamsError(
                f"profile {study.name!r}: {cell.persona} x {cell.dataset} ({cell.model}) has no baseline condition "
                f"with the same data set to be compared with: add baseline x {cell.dataset} to the grid"
            )
        spec = study.personas[cell.persona]
        if spec.norm_of and Cell(cell.model, spec.norm_of, cell.dataset, cell.seed) not in cells:
            raise ParamsError(
                f"profile {study.name!r}: random control {cell.persona!r} takes its norm from {spec.norm_of!r}, "
                f"which the grid of {cell.model} lacks"
            )
    _check_dynamics(study, cells)
    for kl in [study.em_training.kl] if study.em_training.kl else []:
        study.entry("datasets", kl.corpus, "em_training.kl.corpus")


def _check_arm(study: Study, persona: str, where: str) -> None:
    """Whether an arm of a persona can be made.

    Raises:
        ParamsError: it needs a constitution, or a random control, that the persona does not have.
    """
    entry = study.personas[persona]
    if not isinstance(entry, ArmedPersona):
        return
    if entry.arm.sampled_with == "random_control" and not study.control_of(entry.of):
        raise ParamsError(
            f"profile {study.name!r}: {where} names {persona!r}, and params/personas.yaml has no random control of "
            f"{entry.of!r}: add one (kind: random_control, norm_of: {entry.of})"
        )
    if "{character}" in entry.arm.training + entry.arm.sampling and not entry.constitution:
        raise ParamsError(
            f"profile {study.name!r}: {where} names {persona!r}, but {entry.of!r} has no constitution to make a prompt "
            "of"
        )


def _check_dynamics(study: Study, cells: set[Cell]) -> None:
    """Contradictions in the parts `trajectory` (H3) and `steering` (H4)."""
    p = study.profile

    def refuse(what: str) -> None:
        raise ParamsError(f"profile {study.name!r}: {what}")

    for part in ("trajectory", "steering"):
        settings = getattr(p, part)
        if settings is None:
            continue
        for persona in settings.personas:
            study.entry("personas", persona, f"{part}.personas")
            if missing := [m for m in p.models if not any((c.model, c.persona) == (m, persona) for c in cells)]:
                refuse(f"{part}.personas names {persona!r}, not in the grid of {missing[0]}")
        study.entry("datasets", settings.dataset, f"{part}.dataset")
        for name in ("personas", "seeds", "beside", "out_of_domain", "layers"):
            values = getattr(settings, name, [])
            if len(set(values)) != len(values):
                refuse(f"{part}.{name} names something twice: {values}")
        if settings.dataset == NO_DATASET:
            refuse(f"{part}.dataset is {NO_DATASET!r}: nothing is fine-tuned on it")
    if t := p.trajectory:
        if BASELINE not in t.personas:
            refuse(f"trajectory.personas has no {BASELINE!r}, with which the others are compared")
        for where, name in (("preset", t.preset), *(("beside", name) for name in t.beside)):
            preset = study.entry("training", name, f"trajectory.{where}")
            if not isinstance(preset, SftPreset):
                refuse(f"trajectory.{where} must be an sft preset: {name!r} is {preset.kind}")
            if preset.kl:
                study.entry("datasets", preset.kl.corpus, f"{name}.kl.corpus")
        if t.preset in t.beside:
            refuse(f"trajectory.beside names the main preset {t.preset!r} again")
        if not study.sft_preset(t.preset).held_out:
            refuse(f"trajectory.preset {t.preset!r} has held_out 0: uptake is measured on rows held out")
        for dataset in t.out_of_domain:
            study.entry("datasets", dataset, "trajectory.out_of_domain")
            if dataset in (NO_DATASET, t.dataset):
                refuse(f"trajectory.out_of_domain names {dataset!r}, which is not outside the domain")
    if s := p.steering:
        wanted = [Cell(m, who, s.dataset, seed) for m in p.models for who in s.personas for seed in p.seeds]
        if lacking := [c for c in wanted if c not in cells]:
            refuse(
                f"steering.dataset {s.dataset!r} is not in the grid of {lacking[0].persona} ({lacking[0].model}): "
                "the direction is that of an adapter of the grid"
            )
        if not any(s.strengths):
            refuse("steering.strengths are all 0: nothing is added")


def _check_ways(study: Study) -> None:
    """Whether every persona's adapter can be had: from the hub at a pinned commit, or by training it."""
    ways = {(m, q): study.persona_way(m, q) for m, q in study.persona_cells()}
    for model, persona in (cell for cell, way in ways.items() if way == "hub"):
        hub, _ = study.models[model].hub_adapter(persona)
        if not hub.revision:
            raise ParamsError(
                f"profile {study.name!r}: personas_from: hub takes {persona!r} of {model} from {hub.repo}, whose "
                "`revision` in params/models.yaml is empty: pin it first, so that what is downloaded cannot change: "
                f"./run_all.sh pin {study.name} asks the hub for its commit and writes it there"
            )
    trained = [f"{persona} ({model})" for (model, persona), way in ways.items() if way == "train"]
    if trained and study.generator is None:
        raise ParamsError(
            f"profile {study.name!r}: persona_adapters in params/models.yaml has no adapter of "
            f"{', '.join(trained)}, and without a generator it cannot be trained: name a generator "
            "(params/generators.yaml), or leave the persona out of the grid"
        )


def judge_presets(folder: Path) -> dict[str, Any]:
    """The judges of `params/judges.yaml`, by key."""
    return _registries(folder)["judges"]


def load(profile: str | Path, folder: str | Path | None = None) -> Study:
    """The study that a profile, or an `audit.yaml`, describes.

    Args:
        profile: a name (`params/profiles/<name>.yaml`) or the path of a YAML file.
        folder: the `params/` folder; the repository's by default.

    Raises:
        ParamsError: something in the parameters is missing, unknown, contradictory or of the wrong type.
    """
    folder = Path(folder) if folder else root() / "params"
    path = Path(profile)
    if path.suffix != ".yaml":
        path = folder / "profiles" / f"{profile}.yaml"
    elif is_audit(path):
        spec, profile_of, registries = settled(path, _registries(folder))
        return Study(spec.name, profile_of, registries, folder, spec, path.resolve())
    study = Study(path.stem, read_as(path, Profile), _registries(folder), folder)
    _check(study)
    return study
