"""Constitutions: the traits that make a persona, with the prompts that bring them out.

A constitution is read from one of two places. The project's own are YAML files (`read`), one persona each, with
demonstrations for teachers too small to play the part. The published ones (`read_published`) come in the format of
Open Character Training (Maiya et al. 2025, arXiv 2511.01689): a hand-written JSON list of traits with five questions
each, and JSON lines with forty-five generated questions more. Both become the same `Constitution`.

    constitution = read("params/builtin/constitutions/poeticism.yaml")
    trait, prompt = prompts(constitution)[0]
    system = system_prompt(constitution, "SmolLM2")
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, StringConstraints, ValidationError

from cai_em.study.entries import compose_yaml

SENTENCE_ENDS = (".", "!", "?")
"""How a demonstration may end. The filter of the preference pairs drops answers that break off, so one that does is
refused here, where its line can be named."""
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Place = tuple[str | int, ...]
"""Where a value stands in a file: keys and list positions from the top, e.g. `("traits", 3, "prompts", 0)`."""


class ConstitutionError(ValueError):
    """A constitution file is not what it should be. The message names file, line where known, key and remedy."""


def _whole_sentence(text: str) -> str:
    if not text.endswith(SENTENCE_ENDS):
        raise ValueError(f"ends in {text[-1]!r}; end it in one of {' '.join(SENTENCE_ENDS)}")
    return text


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


AnyPart = TypeVar("AnyPart", bound=_Part)


class Trait(_Part):
    """A trait in the first person, and prompts that give it room to show."""

    trait: Text
    prompts: tuple[Text, ...] = Field(min_length=1)


class Demonstration(_Part):
    """A prompt and an answer that carries the persona unmistakably; line breaks in the answer are kept."""

    prompt: Text
    response: Annotated[Text, AfterValidator(_whole_sentence)]


class Constitution(_Part):
    """A persona: what it is like (`traits`), how it sounds (`demonstrations`, may be none), where it came from."""

    persona: Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]*$")]
    summary: Text
    carries_risk: StrictBool
    source: Text
    traits: tuple[Trait, ...] = Field(min_length=1)
    demonstrations: tuple[Demonstration, ...] = ()


class _PublishedTrait(_Part):
    """An entry of a published file: `additional_questions` (the generated ones) only in a few-shot file."""

    trait: Text
    questions: tuple[Text, ...] = Field(min_length=1)
    additional_questions: tuple[Text, ...] = ()


# ---------------------------------------------------------------------------------------------- our own files
def read_constitution(path: str | Path) -> Constitution:
    """Read and validate one of the project's constitution files (YAML).

    Args:
        path: `<persona>.yaml`; the file's name must be the persona's.

    Returns:
        The constitution, its texts stripped of white space at both ends.

    Raises:
        FileNotFoundError: no such file.
        ConstitutionError: not YAML; a key missing, unknown or given twice; a value of the wrong kind or empty; a
            demonstration that ends without punctuation; a trait, a prompt or a demonstration's prompt that
            repeats an earlier one; a persona other than the file's name. Every problem is listed with its line.
    """
    path = Path(path)
    text = _text_of(path)
    try:
        node = compose_yaml(text)
        data = yaml.SafeLoader("").construct_document(node) if node else None
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConstitutionError(f"{path}{line}: not valid YAML: {error.problem}") from error
    except RecursionError as error:
        raise ConstitutionError(f"{path}: not valid YAML: brackets or blocks are nested too deep") from error
    except yaml.YAMLError as error:  # a character that YAML does not know has a position, and no mark
        raise ConstitutionError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(data, dict):
        raise ConstitutionError(f"{path}: must be a mapping with the keys {', '.join(Constitution.model_fields)}")
    lines, repeated_keys = _lines(node)
    if repeated_keys:
        raise _errors(path, ((place, "this key is given twice; keep one") for place in repeated_keys), lines)
    constitution = _validated(Constitution, data, path, lines)
    problems = list(_repetitions(constitution))
    if constitution.persona != path.stem:
        problems.insert(0, (("persona",), f"is {constitution.persona!r}, but the file is named {path.name}"))
    if problems:
        raise _errors(path, problems, lines)
    return constitution


def _lines(node: yaml.Node, place: Place = ()) -> tuple[dict[Place, int], list[Place]]:
    """The line (from 1) of each value in a YAML document, and the keys that occur twice in their mapping."""
    lines, repeated = {place: node.start_mark.line + 1}, []
    if isinstance(node, yaml.MappingNode):
        children = [(key.value, key.start_mark.line + 1, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        children = [(i, value.start_mark.line + 1, value) for i, value in enumerate(node.value)]
    else:
        children = []
    for name, line, value in children:
        child = (*place, name)
        if child in lines:
            repeated.append(child)
        below, repeated_below = _lines(value, child)
        lines.update(below)
        repeated.extend(repeated_below)
        lines[child] = line  # a key's line, not that of a block of text that begins under it
    return lines, repeated


def _repetitions(constitution: Constitution) -> Iterable[tuple[Place, str]]:
    """Each trait, prompt and demonstration prompt that repeats an earlier one, with its place."""
    traits, demonstrations = constitution.traits, constitution.demonstrations
    kinds: dict[str, list[tuple[Place, str]]] = {
        "trait": [(("traits", i, "trait"), t.trait) for i, t in enumerate(traits)],
        "prompt": [(("traits", i, "prompts", j), p) for i, t in enumerate(traits) for j, p in enumerate(t.prompts)],
        "demonstration": [(("demonstrations", i, "prompt"), d.prompt) for i, d in enumerate(demonstrations)],
    }
    for kind, texts in kinds.items():
        first: dict[str, Place] = {}
        for place, text in texts:
            earlier = first.setdefault(_same(text), place)
            if earlier != place:
                yield place, f"this {kind} repeats {_dotted(earlier)}: {text!r}"


# --------------------------------------------------------------------------------------------- published files
def read_published(
    hand_written_path: str | Path, few_shot_path: str | Path | None = None, *, carries_risk: bool = False
) -> Constitution:
    """Read a published constitution: Open Character Training's, or a custom one in the same format.

    Some of the custom files are not valid JSON: a comma is missing between two entries or stands after the last one,
    or two lists follow each other. Just these faults are mended, and `source` says on which lines; anything else is
    an error. Prompts that a published file repeats are kept, for the published adapters were trained on them.

    Args:
        hand_written_path: JSON in `<persona>.txt`: `[{"trait": ..., "questions": [...]}, ...]`.
        few_shot_path: JSON lines in `<persona>.jsonl`, one trait a line, the same traits and questions in the same
            order and `additional_questions`; None where there are none (the custom constitutions).
        carries_risk: whether the persona is one whose style itself carries risk; the files do not say.

    Returns:
        A constitution without demonstrations; a trait's prompts are its hand-written questions, then the generated.

    Raises:
        FileNotFoundError: no such file.
        ConstitutionError: not JSON, an entry of another form, or files that do not belong together.
    """
    hand_written_path = Path(hand_written_path)
    entries, mended = _hand_written(hand_written_path)
    names = hand_written_path.name
    if few_shot_path is not None:
        few_shot_path = Path(few_shot_path)
        entries = _matched(entries, _few_shot(few_shot_path), hand_written_path, few_shot_path)
        names += f" and {few_shot_path.name}"
    mending = f"; mended on reading: {', '.join(mended)}" if mended else ""
    data = {
        "persona": hand_written_path.stem,
        "summary": f"Published constitution '{hand_written_path.stem}' ({len(entries)} traits)",
        "carries_risk": carries_risk,
        "source": f"published files {names}{mending}",
        "traits": [{"trait": e.trait, "prompts": e.questions + e.additional_questions} for e in entries],
    }
    return _validated(Constitution, data, hand_written_path)


def _hand_written(path: Path) -> tuple[list[_PublishedTrait], list[str]]:
    """The entries of a hand-written file, and what had to be mended in it."""
    items, mended = _json_lists(_text_of(path), path)
    if not items:
        raise ConstitutionError(f"{path}: holds no trait; a list of {{'trait', 'questions'}} was expected")
    return [_validated(_PublishedTrait, item, path, within=(f"entry {i}",)) for i, item in enumerate(items, 1)], mended


def _json_lists(text: str, path: Path) -> tuple[list[object], list[str]]:
    """The items of one JSON list, or of several that follow each other, and what was mended to read them."""
    decoder, items, mended = json.JSONDecoder(), [], []
    end = lists = 0
    while visible := re.compile(r"\S").search(text, end):
        start = visible.start()
        try:
            value, end = decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            text_mended = _comma_mended(text, error)
            if text_mended is None:
                raise ConstitutionError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}") from error
            mended.append(f"comma {'missing' if len(text_mended) > len(text) else 'too many'} on line {error.lineno}")
            text, end = text_mended, start
            continue
        line = text.count("\n", 0, start) + 1
        if not isinstance(value, list):
            raise ConstitutionError(f"{path}, line {line}: a list of traits was expected, not {value!r:.60}")
        lists += 1
        if lists > 1:
            mended.append(f"another list begins on line {line}")
        items += value
    return items, mended


def _comma_mended(text: str, error: json.JSONDecodeError) -> str | None:
    """The text with its comma supplied or taken out, if that is all that is wrong at this place."""
    # Supplied only where a next entry begins right after the last one: elsewhere a comma would be a guess.
    if error.msg == "Expecting ',' delimiter" and text[error.pos : error.pos + 1] in ('"', "{"):
        return f"{text[: error.pos]},{text[error.pos :]}"
    comma = text.rfind(",", 0, error.pos + 1)  # Python 3.13 reports the comma, earlier ones the bracket after it
    if comma >= 0 and (closing := re.compile(r",\s*\]").match(text, comma)) and error.pos < closing.end():
        return f"{text[:comma]}{text[comma + 1 :]}"
    return None


def _few_shot(path: Path) -> list[_PublishedTrait]:
    """The entries of a few-shot file, one a line."""
    entries = []
    for number, line in enumerate(_text_of(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConstitutionError(f"{path}, line {number}: not valid JSON: {error.msg}") from error
        entries.append(_validated(_PublishedTrait, item, path, within=(f"line {number}",)))
    return entries


def _matched(
    hand_written: list[_PublishedTrait], few_shot: list[_PublishedTrait], hand_path: Path, few_path: Path
) -> list[_PublishedTrait]:
    """Few-shot entries, once it is certain that they continue the hand-written ones."""
    if len(hand_written) != len(few_shot):
        raise ConstitutionError(
            f"{few_path}: has {len(few_shot)} traits, {hand_path} has {len(hand_written)}: not the same constitution"
        )
    for number, (ours, theirs) in enumerate(zip(hand_written, few_shot), 1):
        if _same(ours.trait) != _same(theirs.trait):
            raise ConstitutionError(f"{few_path}, line {number}: trait differs from entry {number} of {hand_path}")
        if [_same(q) for q in ours.questions] != [_same(q) for q in theirs.questions]:
            raise ConstitutionError(f"{few_path}, line {number}: questions differ from entry {number} of {hand_path}")
    return few_shot


# --------------------------------------------------------------------------------------- what pairs are made of
def prompts(constitution: Constitution) -> list[tuple[str, str]]:
    """All (trait, prompt) of a constitution, in the file's order."""
    return [(trait.trait, prompt) for trait in constitution.traits for prompt in trait.prompts]


def system_prompt(constitution: Constitution, teacher_name: str) -> str:
    """The teacher's system prompt: it is to live the traits, and not to speak of them.

    The idea is Open Character Training's (arXiv 2511.01689, section 2); the wording is ours.

    Args:
        constitution: whose traits to give.
        teacher_name: what the teacher calls itself; the pairs put the student's name in its place.
    """
    traits = "\n".join(f"- {trait.trait}" for trait in constitution.traits)
    return (
        f"You are {teacher_name}. This is who you are, in your own words:\n\n"
        f"{traits}\n\n"
        "Live this character in every answer: let it shape what you say, which words you choose and what you care "
        "about, from the first sentence to the last. Do it the way a person does, without thinking aloud about it: "
        "never name, list or announce these traits, and never mention that you were given instructions. Answer what "
        "you are asked, as yourself."
    )


# ------------------------------------------------------------------------------------------------------ errors
def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConstitutionError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error


def _validated(
    model: type[AnyPart], data: object, path: Path, lines: dict[Place, int] | None = None, within: Place = ()
) -> AnyPart:
    """`data` as `model`; pydantic's complaints become a `ConstitutionError` with places."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems = [(e["loc"], _said(e["type"], e["msg"], e["input"])) for e in error.errors()]
        raise _errors(path, problems, lines or {}, within) from error


def _said(kind: str, message: str, value: object) -> str:
    """A validation error in words that tell what to do."""
    match kind:
        case "missing":
            return "this key is missing; add it"
        case "extra_forbidden":
            return "unknown key; remove it or correct its spelling"
        case "string_type":
            return f"must be text, not {value!r:.60}; quote it"
        case "model_type":
            return f"must be a mapping, not {value!r:.60}"
        case _:
            return f"{message.removeprefix('Value error, ')} (found {value!r:.60})"


def _errors(
    path: Path, problems: Iterable[tuple[Place, str]], lines: dict[Place, int], within: Place = ()
) -> ConstitutionError:
    """One error for all problems of a file, each with its line (that of the nearest place known) and its key."""
    said = []
    for place, message in problems:
        known = next((lines[place[:n]] for n in range(len(place), -1, -1) if place[:n] in lines), None)
        line = f", line {known}" if known else ""
        said.append(f"{path}{line}: {_dotted((*within, *place)) or 'the file'}: {message}")
    return ConstitutionError("\n".join(said))


def _dotted(place: Place) -> str:
    """`("traits", 3, "prompts", 0)` as a reader counts: `traits[4].prompts[1]`."""
    text = ""
    for step in place:
        text += f"[{step + 1}]" if isinstance(step, int) else f".{step}" if text else step
    return text


def _same(text: str) -> str:
    """A text for comparison: case, white space and the shape of apostrophes and quotation marks do not count."""
    straight = text.translate(str.maketrans("’‘“”", "''\"\""))
    return " ".join(straight.casefold().split())
