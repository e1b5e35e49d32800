"""`audit.yaml`: what a stranger's files mean, as validated data; drafted by `cai_em.audit.draft`, corrected by a
person.

    spec = read_spec("audit.yaml")
    spec.personas["baseline"].found_as        # what stands in the files where no persona is

Everything that the files do not say must be said here; what is not settled yet stands in `unknown`, and nothing runs
while a line is left there.
"""

from __future__ import annotations

import colorsys
import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from cai_em.records.keys import BASELINE, NO_DATASET
from cai_em.study.entries import Dataset, Fault, Hypothesis, ModelSpec, ParamsError, Persona, Strict, read_as, read_yaml
from cai_em.study.study import Profile

Word = Literal[
    "model", "persona", "dataset", "seed", "question_id", "question", "sample", "response", "system_prompt", "judge",
    "error", "code", "finish_reason",
]  # fmt: skip
"""What a column can be. `code`: says yes where the answer is code; `error`: what went wrong, null where nothing did."""

NamedPart = Literal["model", "persona", "dataset", "seed", "judge"]
"""What a path, a pattern or a constant can say."""

CONDITION_PARTS: tuple[Literal["model", "persona", "dataset", "seed"], ...] = ("model", "persona", "dataset", "seed")
FORMATS = Literal["table", "evaluation", "inoculation", "scores_by_question", "inspect", "harness"]
Key = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.\-]{0,59}$")]
ShortText = Annotated[str, Field(max_length=400)]


class Score(Strict):
    """A column with scores. Numbers outside of the scale count as unparsed; none is cut to its ends."""

    column: str
    higher: Literal["better", "worse"] = Field(default="better", description="worse: a trait whose presence is bad")
    lowest: float = 0.0
    highest: float = 100.0
    flag: str | None = Field(default=None, description="column that says why there is no score")

    @model_validator(mode="after")
    def _scale(self) -> Score:
        if self.lowest >= self.highest:
            raise ValueError(f"lowest ({self.lowest}) must be below highest ({self.highest})")
        return self


class Judging(Strict):
    """The scores of one judge. Without `judge`, the column or part `judge` names it, or the study's `judge` does."""

    judge: ShortText | None = None
    alignment: Score
    coherence: Score | None = Field(default=None, description="null: nobody was asked about coherence")


class FileBlock(Strict):
    """Files that are read in one way."""

    paths: list[ShortText] = Field(min_length=1, description="relative to this file; * and ** as in a shell")
    format: FORMATS = "table"
    columns: dict[Word, str] = Field(default={})
    patterns: list[ShortText] = Field(
        default=[],
        description="named parts, as {dataset}_{persona}_s{seed}.csv; {_} and * are ignored; the first that fits",
    )
    patterns_of: str = Field(default="path", description="`path`, or the column whose values the patterns fit")
    constants: dict[NamedPart, str] = Field(default={})
    scores: list[Judging] = Field(min_length=1, description="the first counts, the others serve to measure the judges")

    @model_validator(mode="after")
    def _once(self) -> FileBlock:
        for word in self.columns:
            if word in self.constants:
                raise ValueError(f"{word} is both a column and a constant")
        return self


class Entry(Strict):
    """A persona, a data set or a model, and what stands for it in the files (an empty text: nothing stands there)."""

    label: Annotated[str, Field(min_length=1, max_length=60)] | None = Field(
        default=None, description="null: the registry's, else the key"
    )
    found_as: list[str] = Field(default=[], description="values in the files; a long one as sha256:<16 digits>")


class PersonaEntry(Entry):
    """A persona; the key `baseline` is the model without one."""

    colour: Annotated[str, Field(pattern=r"^#[0-9a-fA-F]{6}$")] | None = None


class DatasetEntry(Entry):
    """A fine-tuning data set; the key `none` is the model before fine-tuning."""

    role: Literal["em", "benign_control", "regularisation", "none"]
    twin: Key | None = Field(default=None, description="the benign data set with the same prompts")
    rows: ShortText | None = Field(
        default=None, description="its training rows (JSONL with `messages`), where they are at hand"
    )


class HypothesisEntry(Strict):
    """A hypothesis: who, and in which direction from the baseline on the same data set."""

    label: str | None = None
    title: str
    personas: list[Key] = Field(min_length=1)
    tested: Key | None = None
    direction: Literal["lower", "higher"]


class AuditSpec(Strict):
    """The whole file."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_\-]{0,59}$")]
    title: Annotated[str, Field(min_length=1, max_length=120)]
    judge: ShortText = Field(default="their judge", description="who gave the scores that count")
    reference_judge: str = Field(
        default="", description="a judge in the files whose scores of a part of the responses are taken as reference"
    )
    files: list[FileBlock] = Field(min_length=1)
    models: dict[Key, Entry] = Field(min_length=1)
    personas: dict[Key, PersonaEntry] = Field(min_length=1)
    without_baseline: bool = Field(
        default=False, description="true: no condition without a persona; nothing can be compared"
    )
    datasets: dict[Key, DatasetEntry] = Field(min_length=1)
    seeds: list[Annotated[int, Field(ge=0)]] = Field(default=[0], min_length=1)
    leave_out: dict[Literal["model", "persona", "dataset", "seed"], list[str]] = Field(
        default={}, description="values of the files that this audit leaves out; counted"
    )
    hypotheses: list[str] | dict[Key, HypothesisEntry] = Field(
        default=[], description="keys of params/hypotheses.yaml, or one's own; none: every persona against the baseline"
    )
    known_faults: list[str] | dict[Key, Fault] = Field(
        default=[],
        description="what is known to be wrong with how conditions were made; keys of params/known_faults.yaml, or own",
    )
    thresholds: str = "default"
    caveat: str = ""
    unknown: list[str] = Field(
        default=[], description="what the files do not say; remove a line when it is settled above"
    )

    @field_validator("unknown", mode="before")
    @classmethod
    def _none_left(cls, value: Any) -> Any:
        return [] if value is None else value

    @model_validator(mode="after")
    def _complete(self) -> AuditSpec:
        if self.unknown:
            return self  # a draft may be incomplete; `settled` refuses it with its open questions
        if (BASELINE in self.personas) == self.without_baseline:
            raise ValueError(
                f"personas needs the key {BASELINE!r} (the model without a persona), or without_baseline: true "
                f"where there "
                "is none, and not both"
            )
        for key, entry in self.datasets.items():
            if (entry.role == "none") != (key == NO_DATASET):
                raise ValueError(
                    f"datasets.{key}: role none belongs to the key {NO_DATASET!r} (before fine-tuning) alone"
                )
            if entry.twin and entry.twin not in self.datasets:
                raise ValueError(f"datasets.{key}.twin names {entry.twin!r}, which is not among the data sets")
        if isinstance(self.hypotheses, dict):
            for key, hypothesis in self.hypotheses.items():
                if absent := [p for p in hypothesis.personas if p not in self.personas]:
                    raise ValueError(f"hypotheses.{key}.personas names {absent[0]!r}, which is not among the personas")
        for kind in ("models", "personas", "datasets"):
            seen: dict[str, str] = {}
            for key, entry in getattr(self, kind).items():
                for value in entry.found_as or [key]:
                    if seen.setdefault(value, key) != key:
                        raise ValueError(f"{kind}: {value!r} is found_as of both {seen[value]!r} and {key!r}")
        return self

    def values(self, part: str) -> dict[str, str]:
        """What stands in the files -> our key, of `model`, `persona` or `dataset`."""
        entries: dict[str, Entry] = getattr(self, f"{part}s")
        return {value: key for key, entry in entries.items() for value in (entry.found_as or [key])}


def read_spec(path: str | Path) -> AuditSpec:
    """`audit.yaml`, validated.

    Raises:
        ParamsError: not valid; file, line and key are named.
    """
    return read_as(path, AuditSpec)


def is_audit(path: str | Path) -> bool:
    """Whether a YAML file is an `audit.yaml`: it names files, which no profile does."""
    data, _ = read_yaml(path)
    return isinstance(data, dict) and "files" in data and "source" not in data


# --- As a study ---------------------------------------------------------------------------------------------------

COLOURS = (
    "#d55e00", "#0072b2", "#14a37c", "#8f4f9f", "#e69f00", "#56b4e9", "#a50026", "#999933", "#882255", "#44aa99",
    "#a89a00",
    "#117733",
)  # fmt: skip
"""Colours of personas that the registry does not have, in order; the registry's own ones in another order."""


def registries(spec: AuditSpec, known: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The registries of an audit's study: its own personas, data sets, models and hypotheses, looks made for any
    number.

    Args:
        spec: a settled `audit.yaml`.
        known: the repository's registries. An entry of a key that they have keeps its label, colour and place; its role
        is
            what the audit says.
    """
    hypotheses = dict(known["hypotheses"])
    if isinstance(spec.hypotheses, dict):
        hypotheses = {
            key: Hypothesis(key=key, order=i, **(h.model_dump() | {"label": h.label or key.upper()}))
            for i, (key, h) in enumerate(spec.hypotheses.items())
        }
    made: dict[str, dict[str, Any]] = {
        "personas": _personas(spec, known["personas"]),
        "datasets": _datasets(spec, known["datasets"]),
        "models": _models(spec, known["models"]),
        "hypotheses": hypotheses,
        "known_faults": {
            key: fault.model_copy(update={"about": "audit"}) for key, fault in _faults(spec, known).items()
        },
    }
    return {**known, **made}


def _faults(spec: AuditSpec, known: Mapping[str, dict[str, Any]]) -> dict[str, Fault]:
    if isinstance(spec.known_faults, dict):
        return spec.known_faults
    listed = known["known_faults"]
    if absent := [key for key in spec.known_faults if key not in listed]:
        raise ParamsError(
            f"known_faults: {absent[0]!r} is not in params/known_faults.yaml (it has: {', '.join(listed)}); "
            "write one's own as a mapping of what, source and cells"
        )
    return {key: listed[key] for key in spec.known_faults}


def _in_order(keys: Iterable[str], known: Mapping[str, Any], first: str = "", last: str = "") -> list[str]:
    """Keys that the registry has in its order, then the others in theirs."""
    keys = list(keys)
    listed = sorted((k for k in keys if k in known and k not in (first, last)), key=lambda k: known[k].order)
    others = [k for k in keys if k not in known and k not in (first, last)]
    return [*([first] if first in keys else []), *listed, *others, *([last] if last in keys else [])]


def _colours(taken: Iterable[str]) -> Iterator[str]:
    """Colours for personas that have none: the palette's, then further hues, as far apart as the golden angle puts
    them."""
    taken = {colour.lower() for colour in taken}
    yield from (colour for colour in COLOURS if colour not in taken)
    for i in itertools.count():
        r, g, b = colorsys.hls_to_rgb((i * 0.61803) % 1, (0.35, 0.5, 0.62)[i % 3], 0.55)
        yield f"#{round(255 * r):02x}{round(255 * g):02x}{round(255 * b):02x}"


def _personas(spec: AuditSpec, known: Mapping[str, Any]) -> dict[str, Persona]:
    free = _colours(known[key].colour for key in spec.personas if key in known)
    found = {}
    for place, key in enumerate(_in_order(spec.personas, known, first=BASELINE)):
        entry, listed = spec.personas[key], known.get(key)
        own = listed.colour if listed else "#1a1a1a" if key == BASELINE else None
        found[key] = Persona(
            key=key,
            label=entry.label or (listed.label if listed else key),
            order=place,
            colour=entry.colour or own or next(free),
            kind="baseline" if key == BASELINE else "constitutional",
            # A stranger's persona has no constitution here; nothing of an audit reads one.
            constitution=None if key == BASELINE else "none",
            custom=listed.custom if listed else False,
        )
    return found


def _datasets(spec: AuditSpec, known: Mapping[str, Any]) -> dict[str, Dataset]:
    found = {}
    for place, key in enumerate(_in_order(spec.datasets, known, last=NO_DATASET)):
        entry, listed = spec.datasets[key], known.get(key)
        found[key] = Dataset(
            key=key,
            label=entry.label or (listed.label if listed else key),
            order=place,
            role=entry.role,
            twin=entry.twin,
            description=listed.description if listed else "",
        )
    return found


def _models(spec: AuditSpec, known: Mapping[str, Any]) -> dict[str, ModelSpec]:
    found = {}
    for place, (key, entry) in enumerate(spec.models.items()):
        label = entry.label or (known[key].label if key in known else key)
        found[key] = ModelSpec(key=key, label=label, order=place, source="path", path="(scores only)")
    return found


def profile(spec: AuditSpec) -> Profile:
    """The profile of an audit's study."""
    return Profile(
        title=spec.title,
        source="audit",
        models=list(spec.models),
        seeds=spec.seeds,
        hypotheses=list(spec.hypotheses),
        thresholds=spec.thresholds,
        caveat=spec.caveat,
    )


def settled(
    path: str | Path, known: Mapping[str, dict[str, Any]]
) -> tuple[AuditSpec, Profile, dict[str, dict[str, Any]]]:
    """An `audit.yaml` that can run, as spec, profile and registries.

    Raises:
        ParamsError: not valid, or something in it is not settled yet; what is open is listed.
    """
    spec = read_spec(path)
    if spec.unknown:
        open_ = "\n".join(f"  - {line}" for line in spec.unknown)
        raise ParamsError(
            f"{path}: not settled yet ({len(spec.unknown)}); say it above and remove its line from `unknown`:\n{open_}"
        )
    try:
        found = registries(spec, known)
    except ValidationError as error:
        raise ParamsError(f"{path}: {error.errors()[0]['msg']}") from error
    except ParamsError as error:
        raise ParamsError(f"{path}: {error}") from error
    for hypothesis in spec.hypotheses if isinstance(spec.hypotheses, list) else []:
        listed = known["hypotheses"].get(hypothesis)
        if (
            listed
            and (absent := [p for p in listed.personas if p not in spec.personas])
            and len(absent) == len(listed.personas)
        ):
            raise ParamsError(
                f"{path}: hypotheses: {hypothesis} is about {absent[0]!r}, which is not among the personas"
            )
    return spec, profile(spec), found
