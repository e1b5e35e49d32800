"""Arms: conditions with a context. A persona or a data set, and what is different about how it is trained or sampled.

A grid names an arm by what it is an arm of: `prompted-sycophancy`, `inoculated-bad_medical`. A data set times a share
is one too: `bad_medical*0.25` has that share of its rows, and its benign twin's in place of the others; its key, in
tables and paths, is `bad_medical-0.25`. Data sets' arms stack: `triggered-inoculated-bad_medical`.

To everything that reads keys an arm is a persona or a data set like any other, with a label and a colour. What is
different is here, and in `Study.trained`, `trained_on` and `adapters`.
"""

from __future__ import annotations

import colorsys
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, model_validator

from cai_em.records.keys import BASELINE, NO_DATASET
from cai_em.study.entries import Dataset, Named, ParamsError, Persona

PLACEHOLDERS = {
    "persona": {"name", "character"},
    "dataset": {"description", "training"},
}
"""What a system prompt may ask for: the model's own name, the traits of the persona's constitution; the data set's
description, the system prompt of its training rows."""

QUESTION = "{question}"
"""Where the question stands in a cue."""


class ContextArm(Named):
    """An entry of `params/arms.yaml`.

    `trained_on` and `sampled_with` are about personas: on which model their fine-tuning takes place (`persona`: with
    the persona's adapter active; `baseline`: with none, and then the adapter is the baseline's own, unless `training`
    makes it another), and what stands in the persona's place when answers are sampled.
    """

    of: Literal["persona", "dataset"]
    trained_on: Literal["persona", "baseline"] = "persona"
    sampled_with: Literal["persona", "none", "random_control"] = "persona"
    training: str = Field(default="", description="system prompt of the fine-tuning rows")
    sampling: str = Field(default="", description="system prompt when answers are sampled")
    cues: dict[str, str] = Field(default={}, description="data set -> what is around a {question} when it is asked")
    beside: list[str] = Field(
        default=[], description="further arms that it is compared with, {of}: what it is an arm of"
    )

    @model_validator(mode="after")
    def _complete(self) -> ContextArm:
        if "-" in self.key or "*" in self.key:
            raise ValueError("an arm's name has no dash: it ends at the first one of a key")
        if self.of == "dataset" and (self.trained_on, self.sampled_with) != ("persona", "persona"):
            raise ValueError("trained_on and sampled_with are for arms of a persona")
        if self.of == "persona" and self.cues:
            raise ValueError("cues are for arms of a data set: they are those of its training format")
        if self.of == "persona" and self.trained_on == "baseline" and self.sampled_with == "persona":
            raise ValueError("trained_on baseline and sampled_with persona: nothing was trained on that persona")
        for name in ("training", "sampling"):
            text = getattr(self, name)
            known = PLACEHOLDERS[self.of] - ({"training"} if name == "training" else set())
            if wrong := {field for _, field, _, _ in string.Formatter().parse(text) if field is not None} - known:
                raise ValueError(f"{name} asks for {sorted(wrong)}; there is {sorted(known)}")
        for dataset, cue in self.cues.items():
            if cue.count(QUESTION) != 1:
                raise ValueError(f"the cue of {dataset} must hold {QUESTION} once")
        changed = self.training or self.sampling or self.cues
        if not changed and (self.trained_on, self.sampled_with) == ("persona", "persona"):
            raise ValueError("nothing is different about this arm")
        return self


class ArmedPersona(Persona):
    """An arm of a persona (`of`)."""

    of: str
    arm: ContextArm


class ArmedDataset(Dataset):
    """An arm of a data set (`of`), or a share of its rows (`share`) beside its twin's."""

    of: str
    root: str = Field(description="the entry of params/datasets.yaml at the end of the chain")
    arm: ContextArm | None = None
    share: float | None = None

    @property
    def samples_only(self) -> bool:
        """Whether it is trained like what it is an arm of, and only asked in another way."""
        return self.arm is not None and not self.arm.training


def is_arm(entry: Any) -> bool:
    """Whether a persona or a data set is an arm with a context."""
    return isinstance(entry, ArmedPersona | ArmedDataset)


@dataclass(frozen=True)
class Context:
    """What surrounds a question when answers are sampled. Both are empty in a condition without a context.

    Attributes:
        system: the system prompt.
        user: a text with `{question}` in it.
    """

    system: str = ""
    user: str = ""

    def messages(self, question: str) -> list[dict[str, str]]:
        """The conversation that a question is asked in."""
        asked = {"role": "user", "content": self.user.replace(QUESTION, question) if self.user else question}
        return [*([{"role": "system", "content": self.system}] if self.system else []), asked]

    def record(self) -> dict[str, str]:
        """The parts that there are, by name."""
        return {name: value for name, value in vars(self).items() if value}


NO_CONTEXT = Context()


def persona_arm(name: str, registries: Mapping[str, Mapping[str, Any]]) -> Persona | None:
    """A persona by what a grid calls it, arms included; None where there is no such thing."""
    personas, arms = registries["personas"], registries.get("arms", {})
    if name in personas:
        return personas[name]
    how, _, of = name.partition("-")
    if how not in arms or arms[how].of != "persona" or of not in personas or personas[of].kind == "baseline":
        return None
    arm, base, alike = arms[how], personas[of], [key for key, a in arms.items() if a.of == "persona"]
    given = base.model_dump() | {
        "key": name,
        "label": arm.label.format(of=base.label),
        "order": 10_000 * (1 + base.order) + arm.order,
        "colour": _paler(base.colour, alike.index(how), len(alike)),
    }
    return ArmedPersona(**given, of=of, arm=arm)


def dataset_arm(name: str, registries: Mapping[str, Mapping[str, Any]]) -> ArmedDataset | Dataset | None:
    """A data set by what a grid calls it, arms and shares included; None where there is no such thing.

    Raises:
        ParamsError: a share that is none, a data set without a twin, an arm without a cue for the data set.
    """
    datasets, arms = registries["datasets"], registries.get("arms", {})
    if name in datasets:
        return datasets[name]
    how, _, of = name.partition("-")
    if how in arms and arms[how].of == "dataset":
        base, arm = dataset_arm(of, registries), arms[how]
        if base is None or base.role == "none":
            return None
        root = getattr(base, "root", base.key)
        if arm.cues and root not in arm.cues:
            raise ParamsError(f"params/arms.yaml: {how}.cues has none for {root}, of which {name!r} is an arm")
        twin = f"{how}-{base.twin}" if base.twin and not arm.training else base.twin
        return _armed(base, f"{how}-{base.key}", arm.label.format(of=base.label), arm.order, twin, root, arm=arm)
    of, star, number = name.rpartition("*")
    if not star or (base := datasets.get(of)) is None:
        return None
    try:
        share = float(number)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise ParamsError(f"{name!r}: a share is a number between 0 and 1, as in {of}*0.25; found {number!r}")
    if not base.twin:
        raise ParamsError(f"{name!r}: {of} has no twin in params/datasets.yaml, whose rows would be the others")
    order = 1000 + round(1000 * share)
    return _armed(base, f"{of}-{share:g}", f"{base.label} × {share:g}", order, base.twin, of, share=share)


def _armed(base: Dataset, key: str, label: str, order: int, twin: str | None, root: str, **what: Any) -> ArmedDataset:
    given = {name: getattr(base, name) for name in Dataset.model_fields}
    given |= {"key": key, "label": label, "order": 10_000 * (1 + base.order) + order, "role": "arm", "twin": twin}
    return ArmedDataset(**given, of=base.key, root=root, **what)


def _paler(colour: str, place: int, number: int) -> str:
    """A colour on its way to white, the further the later in the list of arms."""
    hue, light, saturation = colorsys.rgb_to_hls(*(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)))
    light += (0.8 - light) * (1 + place) / (1 + number) if light < 0.8 else 0
    return "#" + "".join(f"{round(255 * x):02x}" for x in colorsys.hls_to_rgb(hue, light, saturation))


def arm_pairs(study: Any) -> list[tuple[tuple[str, str], tuple[str, str], str]]:
    """What each arm is compared with: (its persona, its data set), those of the other condition, and the key in which
    they differ. What it is an arm of, its `beside`, and the plain baseline (of a data set's arm: before fine-tuning);
    only what the grid has.

    Args:
        study: a `Study`.
    """
    there = {(c.persona, c.dataset): None for c in study.cells()}
    found: dict[tuple, None] = {}
    for persona, dataset in there:
        for axis, entry in enumerate((study.personas[persona], study.datasets[dataset])):
            if not isinstance(entry, ArmedPersona | ArmedDataset):
                continue
            twin = study.datasets[entry.root].twin or "" if isinstance(entry, ArmedDataset) else ""
            known = {"of": entry.of, "twin": twin, "control": study.control_of(entry.of) if axis == 0 else ""}
            names = [entry.of, *(name.format(**known) for name in (entry.arm.beside if entry.arm else []))]
            for name in [*names, NO_DATASET if axis else BASELINE]:
                other = (persona, name) if axis else (name, dataset)
                if other in there and other != (persona, dataset):
                    found[(persona, dataset), other, name] = None
    return list(found)


def chain(study: Any, dataset: str) -> list[ArmedDataset]:
    """A data set's arms, the outermost first (`study`: a `Study`)."""
    found, spec = [], study.datasets[dataset]
    while isinstance(spec, ArmedDataset):
        found.append(spec)
        spec = study.datasets[spec.of]
    return found


def with_system(found: Sequence[list[dict[str, str]]], prompt: str) -> list[list[dict[str, str]]]:
    """Conversations under a system prompt, before one that they have; as they are where it is empty."""
    if not prompt:
        return list(found)
    said = [(row, row[0]["content"] if row[0]["role"] == "system" else "") for row in found]
    return [
        [{"role": "system", "content": "\n\n".join(filter(None, (prompt, own)))}, *(row[1:] if own else row)]
        for row, own in said
    ]
