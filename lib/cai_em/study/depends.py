"""What a job of each stage depends on in `params/`, as one hash: when it changes, the job runs again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from cai_em.records.files import digest, file_hash
from cai_em.records.keys import BASELINE
from cai_em.study import sources
from cai_em.study.arms import ArmedPersona, chain
from cai_em.study.entries import Persona
from cai_em.study.materials import LOCAL_JUDGE_FILES
from cai_em.study.study import Study


def _rated_in(study: Study, model: str, shard: str) -> list[Persona]:
    """The personas whose expression is judged in a shard: its own, and all of them where the baseline is in it."""
    here = {c.persona for c in study.shard_cells(model, shard)}
    return [p for p in study.used_personas() if p.constitution and (p.key in here or BASELINE in here)]


def settings(study: Study, stage: str, **cell: Any) -> str:
    """Hash of everything in `params/` that a job of a stage depends on: when it changes, the job runs again."""
    return digest(dict(_settings(study, stage, **cell)))


def _settings(
    study: Study,
    stage: str,
    model: str | None = None,
    persona: str | None = None,
    dataset: str | None = None,
    **rest: Any,
) -> Iterator[tuple[str, Any]]:
    yield "rest", rest
    if model:
        # Where ready-made personas lie concerns only those that are taken from there (below).
        yield "model", study.models[model].model_copy(update={"persona_adapters": []})
    if persona:
        yield "persona", _colourless(study.personas[persona])
    p = study.profile
    if p.data == "fetched":
        yield "fetched", file_hash(study.folder / "fetched.yaml")
    if stage == "01_teacher":
        yield "presets", [study.generator, p.data]
        yield "constitution", file_hash(study.constitution_file(persona))
    elif stage == "01_personas":
        way = study.persona_way(model, persona)
        yield "presets", [study.generator, study.persona_training, p.data, way]
        if way == "hub":
            yield "hub", study.models[model].hub_adapter(persona)
        if study.introspection:
            yield "introspection", [study.introspection, file_hash(study.introspection_file())]
        if study.personas[persona].constitution:
            yield "constitution", file_hash(study.constitution_file(persona))
    elif stage == "02_finetune":
        yield "preset", [study.em_training, study.datasets[dataset], p.data]
        corpora = [*study.row_sources(dataset), *([study.em_training.kl.corpus] if study.em_training.kl else [])]
        yield "rows", [file_hash(study.dataset_file(d)) for d in corpora if study.datasets[d].builtin]
        yield from _arms(study, [(persona, dataset)], "training")
    elif stage == "03_sample":
        yield "preset", [study.sampling, p.questions, p.questions_limit]
        yield "cells", [vars(c) for c in study.shard_cells(model, rest["shard"])]
        yield "questions", file_hash(study.questions_file())
        yield from _arms(study, [(c.persona, c.dataset) for c in study.shard_cells(model, rest["shard"])], "sampling")
        yield "probe", file_hash(study.builtin("questions", "probe.yaml"))
        if p.capability:
            yield "capability", [p.capability, file_hash(study.builtin("capability.yaml"))]
        if p.manipulation:
            yield "in domain", [p.manipulation, file_hash(study.builtin("questions", "in_domain.yaml"))]
    elif stage == "04_judge":
        yield from _judge_settings(study)
        if p.manipulation:
            # Rows and responses come with the responses' own dependencies; the characters of the baseline do not.
            characters = _rated_in(study, model, rest["shard"])
            yield "manipulation", [p.manipulation, file_hash(study.builtin("judge_prompts.yaml"))]
            yield "characters", [file_hash(study.constitution_file(q.key)) for q in characters]
    else:
        personas = study.used_personas()  # figures are drawn by one stage: to others a colour is nothing
        personas = personas if stage == "11_report" else list(map(_colourless, personas))
        yield "registries", [personas, study.used_datasets(), study.hypotheses, list(study.models.values())]
        yield "thresholds", study.thresholds
        yield "known faults", study.known_faults
        yield "profile", p
        if p.source == "published":
            lists = ("published_selection.csv", "published_repeated.csv")
            yield "selection", [file_hash(study.folder / name) for name in lists]
        if p.reference_scores:
            yield "reference scores", file_hash(study.folder / p.reference_scores)
        if study.audit is not None:
            yield "audit", study.audit
        if stage == "05_validity" and (p.source != "trained" or study.judge.kind != "local"):
            measured = sorted((study.folder / "judge_quality").glob("*.json"))
            if measured:  # a judge that was calibrated since is another judge to the gates
                yield "judge quality", [[path.name, file_hash(path)] for path in measured]
        if stage in ("09_trajectories", "10_steering") and p.source == "trained":
            yield from _judge_settings(study)
            names = (study.profile.questions, "probe", *(["general"] if stage == "10_steering" else []))
            files = [study.builtin("questions", f"{name}.yaml") for name in names]
            yield "sampling", [study.sampling, [file_hash(file) for file in files]]
        if stage == "09_trajectories" and (t := p.trajectory):
            presets = [study.sft_preset(name) for name in (t.preset, *t.beside)]
            rows = [t.dataset, *t.out_of_domain, *(preset.kl.corpus for preset in presets if preset.kl)]
            yield "presets", [*presets, *(study.datasets[d] for d in rows)]
            yield "rows", [file_hash(study.dataset_file(d)) for d in rows if study.datasets[d].builtin]


def _arms(study: Study, cells: Sequence[tuple[str, str]], when: str) -> Iterator[tuple[str, Any]]:
    """What (persona, data set) take from params/arms.yaml, and the constitution of a persona that is prompted; nothing
    where none of them is an arm."""
    personas = [study.personas[p] for p in dict.fromkeys(p for p, _ in cells)]
    prompted = [p for p in personas if isinstance(p, ArmedPersona) and getattr(p.arm, when)]
    found: list[Any] = [p.arm for p in personas if isinstance(p, ArmedPersona)]
    armed = [d for dataset in dict.fromkeys(d for _, d in cells) for d in chain(study, dataset)]
    found += [[d.key, d.arm, d.description] for d in armed]
    if found:
        yield "arms", [found, [file_hash(study.constitution_file(p.key)) for p in prompted]]


def _colourless(persona: Persona) -> Persona:
    return persona.model_copy(update={"colour": ""})


def _judge_settings(study: Study) -> Iterator[tuple[str, Any]]:
    """What a stage that judges depends on."""
    yield "judge", study.judge
    yield "prompts", file_hash(study.folder / study.judge.prompts_file)
    if study.judge.kind == "local":
        yield "training", [file_hash(study.builtin(name)) for name in LOCAL_JUDGE_FILES]
        # With them at hand it is another judge: all responses are scored again, lest two judges share a study.
        selection = study.folder / "published_selection.csv"
        yield "published scores at hand", sources.at_hand(selection, models=sources.REFERENCE_MODELS)
