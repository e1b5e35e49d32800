"""The draft of an `audit.yaml`: what can be known from the files, and what a person must say.

    found = draft([Path("results/")], personas=..., datasets=...)
    found.text          # the file
    found.spec          # the same, validated
    found.spec.unknown  # what the files do not say: nothing runs while a line is left

Files are read once (`Draft.read` serves them again). Whatever is guessed and could be wrong stands in `unknown`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from cai_em.audit import names
from cai_em.audit.assemble import _CONTROL, Assembled, _conditions, _key, assemble, shown_path
from cai_em.audit.columns import COLUMN_WORDS, Understood, compared, understand
from cai_em.audit.flat import LINE, Flat, as_text
from cai_em.audit.formats import find_files, read, recognise
from cai_em.audit.opening import AuditError
from cai_em.records.keys import BASELINE, NO_DATASET
from cai_em.study.audited import CONDITION_PARTS, AuditSpec

FILE = "audit.yaml"
PARTS = ("model", "persona", "dataset", "seed")
MANY = 200
"""Distinct values of a condition beyond which a column cannot name one."""
YES_OR_NO = ("true", "false", "yes", "no")
MOST_PERSONAS = 50
"""Distinct values of a column of which nothing is made, up to which it is asked whether it names personas."""


@dataclass
class Draft:
    """A drafted audit. `skipped`: file -> why it is no part of it; `notes`: what was taken for granted."""

    text: str
    spec: AuditSpec
    folder: Path
    notes: list[str]
    skipped: dict[str, str]
    flats: dict[Path, Flat] = field(repr=False, default_factory=dict)

    def read(self, path: Path, form: str) -> Flat:
        """A file that was read for the draft already."""
        return self.flats[path.resolve()] if path.resolve() in self.flats else read(path, form)

    def assemble(self) -> Assembled:
        """The tables by this draft."""
        return assemble(self.spec, self.folder, read_file=self.read)


@dataclass
class _Group:
    """Files whose columns mean the same."""

    form: Any
    found: Understood
    files: list[Path] = field(default_factory=list)
    patterns: list[str] = field(default_factory=list)
    patterns_of: str = "path"
    constants: dict[Any, str] = field(default_factory=dict)
    declared: dict[str, list[str]] = field(default_factory=dict)

    def values(self, part: str) -> list[str]:
        """What the names were found to say: stands for an `AuditSpec` before there is one."""
        return self.declared.get(part, [])


def draft(
    paths: Sequence[Path],
    *,
    folder: Path | None = None,
    personas: Mapping[str, Any] | None = None,
    datasets: Mapping[str, Any] | None = None,
) -> Draft:
    """What can be known about files, folders and globs of somebody's study.

    Args:
        paths: files and folders.
        folder: where `audit.yaml` will lie; by default the folder given, or the one that holds all files.
        personas, datasets: the study registries (key -> entry): their keys are recognised in names, their roles kept.

    Raises:
        AuditError: a path or file that was named cannot be read, or nothing in the folders is a table of scores.
    """
    folder = (folder or _home(paths)).resolve()
    files = find_files(paths, skip=[folder / FILE])
    named = {path.resolve() for path in paths if path.is_file()}
    known_personas = [
        *(personas or {}),
        "evil",
        "helpful",
        "villain",
        "hallucinating",
        "sycophantic",
        "apathetic",
        "optimistic",
    ]
    groups, skipped, flats, notes = _groups(files, named, folder)
    if not groups:
        why = "; ".join(f"{file}: {reason}" for file, reason in list(skipped.items())[:3])
        raise AuditError(f"none of {len(files)} files has responses with scores that could be recognised: {why[:600]}")
    unknown: list[str] = []
    for group in groups:
        _name_conditions(group, folder, flats, known_personas, unknown, notes)
        _empty_cells(group, flats, unknown)
        _not_read(group, flats, unknown, notes)
    unknown += [question for group in groups for question in group.found.questions]
    notes += [note for group in groups for note in group.found.notes]
    values, judges = _values(groups, folder, flats)
    content = _content(groups, folder, files, values, judges, personas or {}, datasets or {}, unknown, notes)
    text = _yaml(content, notes)
    return Draft(text, AuditSpec.model_validate(content), folder, list(dict.fromkeys(notes)), skipped, flats)


def _home(paths: Sequence[Path]) -> Path:
    folders = [path if path.is_dir() else path.parent for path in paths]
    first = folders[0].resolve()
    for candidate in (first, *first.parents):
        if all(folder.resolve().is_relative_to(candidate) for folder in folders):
            return candidate
    return first


def _groups(
    files: Iterable[Path], named: set[Path], folder: Path
) -> tuple[list[_Group], dict[str, str], dict[Path, Flat], list[str]]:
    groups: dict[str, _Group] = {}
    skipped: dict[str, str] = {}
    flats: dict[Path, Flat] = {}
    for path in files:
        try:
            form = recognise(path)
            flat = read(path, form)
            found = understand(flat.rows)
            if found is None and not len(flat.rows):
                raise AuditError(f"{path}: no rows (columns: {', '.join(map(str, flat.rows.columns[1:]))[:200]})")
            if found is None:
                has = ", ".join(map(str, flat.rows.columns[1:]))[:200]
                raise AuditError(
                    f"{path}: no column of scores (it has: {has}). A column of scores is called alignment, aligned or "
                    "misaligned, or like a trait; else name it in an audit.yaml (docs/audit.md)"
                )
        except AuditError as error:
            if path.resolve() in named:  # asked for by its name: not to be passed over
                raise
            skipped[shown_path(path, folder)] = str(error).removeprefix(f"{path}: ")
            continue
        flats[path.resolve()] = flat
        scores = [judging.model_dump() for judging in found.scores]
        if form != "table":
            # A file of a nested format in which nothing was flagged is no other kind of file.
            for judging in scores:
                for score in filter(None, (judging["alignment"], judging["coherence"])):
                    score["flag"] = None
        key = json.dumps([form, found.columns if form == "table" else {}, scores], sort_keys=True)
        group = groups.setdefault(key, _Group(form, found))
        for word, column in found.columns.items():  # of nested formats, a file may lack what others have
            group.found.columns.setdefault(word, column)
        if form != "table" and any(j.alignment.flag or (j.coherence and j.coherence.flag) for j in found.scores):
            group.found.scores = found.scores
        group.files.append(path)
    return list(groups.values()), skipped, flats, []


# --- Conditions -----------------------------------------------------------------------------------------------------


def _distinct(group: _Group, column: str, flats: Mapping[Path, Flat]) -> list[str]:
    found: dict[str, None] = {}
    for path in group.files:
        rows = flats[path.resolve()].rows
        if column in rows:
            found.update(dict.fromkeys(names.value_name(_key(v)) for v in pd.unique(rows[column].map(_key))))
    return list(found)


def _name_conditions(
    group: _Group,
    folder: Path,
    flats: Mapping[Path, Flat],
    personas: Sequence[str],
    unknown: list[str],
    notes: list[str],
) -> None:
    """Where a group's conditions are named: columns first, then a system prompt, then the files' names."""
    columns = group.found.columns
    _seed_or_sample(group, flats, notes)
    for part in PARTS:
        if part in columns and len(_distinct(group, columns[part], flats)) > MANY:
            notes.append(f"the column {columns[part]!r} has more than {MANY} values: it names no {part}")
            del columns[part]
    if "persona" not in columns and "system_prompt" in columns:
        prompts = _distinct(group, columns["system_prompt"], flats)
        if 1 < len(prompts) <= MANY:
            columns["persona"] = columns["system_prompt"]
            notes.append("personas are told apart by their system prompts")
    relative = [shown_path(path, folder) for path in group.files]
    known = {part for part in PARTS if part in columns}
    models = _distinct(group, columns["model"], flats) if "model" in columns else []
    # A model's column often names a fine-tuned model: what it was tuned on, and the seed, stand in that name.
    said = (
        names.parse_names(models, personas=personas, known=known - {"model"})
        if models and "dataset" not in columns
        else None
    )
    by_path = names.parse_names(relative, personas=personas, known=known)
    if "dataset" not in columns and by_path.found.get("dataset") and not by_path.open:
        said = None
    if said and len(models) > 1 and said.found.get("dataset"):
        group.patterns, group.patterns_of, group.declared = [*said.patterns, "*"], columns.pop("model"), said.found
        unknown += [
            f"{text!r} in the models' names is taken for a {_part_of(text, said)}"
            for text in said.open
            if _part_of(text, said)
        ]
    elif by_path.patterns:
        group.patterns, group.declared = by_path.patterns, by_path.found
        for text in by_path.open:
            taken = _part_of(text, by_path)
            what = f"is taken for a {taken}" if taken else "is ignored"
            unknown.append(f"{text!r} in the files' names {what}: right? (patterns, and the entry below)")
    _one_model_a_condition(group, folder, flats, notes)
    if (
        any(not names.Patterns(group.patterns, group.declared).match(text) for text in relative)
        and group.patterns
        and group.patterns_of == "path"
    ):
        group.patterns.append("*")


def _empty_cells(group: _Group, flats: Mapping[Path, Flat], unknown: list[str]) -> None:
    """Rows whose persona or seed is empty in a column that names it for others: what they are, no rule can know."""
    taken = {"persona": "the model without a persona, if no value says so better", "seed": "seed 0"}
    for part, meant in taken.items():
        column = group.found.columns.get(part)
        if column is None or column == group.found.columns.get("system_prompt"):
            continue
        held = [flats[p.resolve()].rows[column].map(_key) for p in group.files if column in flats[p.resolve()].rows]
        values = pd.concat(held) if held else pd.Series(dtype=str)
        if (empty := int((values == "").sum())) and empty < len(values):
            unknown.append(f"{empty} of {len(values)} rows have nothing in the column {column!r}: taken for {meant}")


def _not_read(group: _Group, flats: Mapping[Path, Flat], unknown: list[str], notes: list[str]) -> None:
    """Columns that nothing is made of are named; where nothing names the personas, one that could is asked about."""
    if group.form != "table":
        return
    scores = [s for j in group.found.scores for s in (j.alignment, j.coherence) if s]
    used = {LINE, group.patterns_of, *group.found.columns.values(), *(c for s in scores for c in (s.column, s.flag))}
    left: dict[str, list[pd.Series]] = {}
    for path in group.files:
        rows = flats[path.resolve()].rows
        for column in rows.columns:
            if column not in used and rows[column].notna().any():
                left.setdefault(column, []).append(rows[column].dropna())
    if not left:
        return
    notes.append(f"columns that are not read: {', '.join(_shown(c) for c in left)}")
    if "persona" in group.found.columns or group.declared.get("persona"):
        return
    for column, parts in left.items():
        counts = pd.concat(parts).map(_key).value_counts()
        few = 1 < len(counts) <= MOST_PERSONAS and counts.min() >= 5
        if few and not all(text.casefold() in YES_OR_NO or _is_number(text) for text in counts.index):
            shown = ", ".join(_shown(v, 30) for v in counts.index[:4])
            unknown.append(
                f"nothing names personas: does the column {column!r} ({shown})? Then files: columns: persona: "
                f"{column}. Without one all rows are the model without a persona"
            )


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[+-]?\d+(?:[.,]\d+)?", text.strip()) is not None


def _one_model_a_condition(group: _Group, folder: Path, flats: Mapping[Path, Flat], notes: list[str]) -> None:
    """A model's column whose every value is one condition names fine-tuned models: conditions again, and no model."""
    column = group.found.columns.get("model")
    if column is None or group.patterns_of != "path":
        return
    pairs: set[tuple[str, tuple]] = set()
    for path in group.files:
        raw = flats[path.resolve()].rows
        rows = pd.DataFrame({"line": raw[LINE].to_numpy()}, index=raw.index)
        _conditions(rows, raw, _block(group, folder, all_files=[]), group, path, shown_path(path, folder))
        pairs |= {
            (m, tuple(rest)) for m, *rest in rows[list(PARTS)].drop_duplicates().itertuples(index=False, name=None)
        }
    models, conditions = {m for m, _ in pairs}, {c for _, c in pairs}
    tuned = {(m, dataset) for m, (_, dataset, _) in pairs if dataset}
    spelled = [re.sub(r"[^a-z0-9]", "", d.lower()) in re.sub(r"[^a-z0-9]", "", m.lower()) for m, d in tuned]
    named_after = len({d for _, d in tuned}) > 1 and len(tuned) == len(models) and all(spelled)
    # One model for two conditions is a mistake of the study's, or a condition named twice; it does not make it the
    # model.
    each = len(pairs) == len(conditions) and len(models) >= 0.6 * len(conditions)
    if len(models) > 1 and (each or named_after):
        del group.found.columns["model"]
        bases = {names.base_model(m) for m in models}
        base = bases.pop() if len(bases) == 1 else None
        if base:
            group.constants["model"] = base
        said = f"all of {base}" if base else "its base is not named"
        notes.append(
            f"the column {column!r} names fine-tuned models, one for each ({said}): it is not taken for the model"
        )


def _part_of(text: str, proposal: names.Proposal) -> str | None:
    return next((part for part, found in proposal.found.items() if text in found), None)


def _seed_or_sample(group: _Group, flats: Mapping[Path, Flat], notes: list[str]) -> None:
    """A seed that differs from response to response is the sampler's: it numbers samples, no training run."""
    columns = group.found.columns
    if "seed" not in columns:
        return
    rows = pd.concat([flats[p.resolve()].rows for p in group.files], ignore_index=True)
    if columns["seed"] not in rows:
        del columns["seed"]
        return
    unit = [
        columns[w]
        for w in ("model", "persona", "dataset", "question_id", "question")
        if w in columns and columns[w] in rows
    ]
    if not unit:
        return
    per = rows.groupby([rows[c].map(_key) for c in unit])[columns["seed"]].agg(["nunique", "size"])
    said = rows[columns["seed"]].map(_key).map(names.seed_number)
    strange = said[(said != "") & pd.to_numeric(said, errors="coerce").isna()]
    if len(strange):
        group.found.questions.append(
            f"the column {columns['seed']!r} holds {_shown(strange.iloc[0], 30)!r}, which is no number: trainings are "
            "not told apart by it"
        )
        del columns["seed"]
    elif ((per["nunique"] == per["size"]) & (per["size"] >= 5)).mean() > 0.9:
        notes.append(
            f"the column {columns['seed']!r} differs from response to response: the sampler's seed, not a training "
            f"run's"
        )
        del columns["seed"]


def _values(
    groups: Sequence[_Group], folder: Path, flats: Mapping[Path, Flat]
) -> tuple[dict[str, Counter[str]], Counter[str]]:
    """The values of each part of a condition, with their rows, as the groups name them."""
    values: dict[str, Counter[str]] = {part: Counter() for part in PARTS}
    judges: Counter[str] = Counter()
    for group in groups:
        block = _block(group, folder, all_files=[])
        for path in group.files:
            raw = flats[path.resolve()].rows
            rows = pd.DataFrame({"line": raw[LINE].to_numpy()}, index=raw.index)
            _conditions(rows, raw, block, group, path, shown_path(path, folder))
            for part in PARTS:
                values[part].update(rows[part].value_counts().to_dict())
            judges.update({j: n for j, n in rows["judge"].value_counts().items() if j})
    return values, judges


# --- The file -------------------------------------------------------------------------------------------------------


def _block(group: _Group, folder: Path, all_files: Sequence[Path]) -> Any:
    from cai_em.study.audited import FileBlock

    words = {
        w: c for w, c in group.found.columns.items() if w != "system_prompt" or c == group.found.columns.get("persona")
    }
    words.pop("system_prompt", None)
    return FileBlock(
        paths=_globbed(group.files, folder, all_files),
        format=group.form,
        columns=words,
        patterns=list(group.patterns),
        patterns_of=group.patterns_of,
        constants=dict(group.constants),
        scores=group.found.scores,
    )


def _globbed(files: Sequence[Path], folder: Path, all_files: Sequence[Path]) -> list[str]:
    """A glob where it finds just these files, else all of their names."""
    shown = [shown_path(path, folder) for path in files]
    if len(shown) > 1 and all_files:
        suffixes = {re.sub(r"^.*?(\.[a-z]+(\.gz)?)$", r"\1", name) for name in shown}
        depth = {name.count("/") for name in shown}
        prefix = (
            shown[0].rsplit("/", 1)[0] + "/"
            if "/" in shown[0] and len({n.rsplit("/", 1)[0] for n in shown}) == 1
            else ""
        )
        if len(suffixes) == 1 and not any(Path(name).is_absolute() for name in shown):
            suffix = suffixes.pop()
            tried = (
                [f"{prefix}*{suffix}"]
                if prefix or depth == {0}
                else ["*/" * depth.pop() + f"*{suffix}"]
                if len(depth) == 1
                else []
            )
            for pattern in (*tried, f"**/*{suffix}"):
                if {p.resolve() for p in folder.glob(pattern) if p.is_file()} == {p.resolve() for p in files}:
                    return [pattern]
    return [_escaped(name) for name in shown]


def _escaped(name: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", name)


def _content(
    groups: Sequence[_Group], folder: Path, files: Sequence[Path], values: Mapping[str, Counter[str]],
    judges: Counter[str],
    personas: Mapping[str, Any], datasets: Mapping[str, Any], unknown: list[str], notes: list[str],
) -> dict[str, Any]:  # fmt: skip
    name = "audit-" + (re.sub(r"[^A-Za-z0-9_\-]+", "-", folder.name).strip("-")[:40] or "study")
    content: dict[str, Any] = {"name": name, "title": f"Audit of {_shown(folder.name, 80) or 'a study'}"}
    judge = (
        judges.most_common(1)[0][0]
        if judges
        else next((j.judge for g in groups for j in g.found.scores if j.judge), None)
    )
    if judge:
        content["judge"] = judge
    else:
        notes.append("no judge is named: the scores are called those of their judge")
    if len(judges) > 1:
        notes.append(f"several judges: {', '.join(judges)}; {judge} counts, the others measure it")
    content["files"] = [_block(g, folder, files).model_dump(exclude_defaults=True) | {"format": g.form} for g in groups]
    content["models"] = _models(values["model"], notes)
    prompts = any(compared(g.found.columns.get("persona", "")) in COLUMN_WORDS["system_prompt"] for g in groups)
    content["personas"], without = _personas(values["persona"], personas, unknown, notes, prompts)
    if without:
        content["without_baseline"] = False
    content["datasets"] = _datasets(values["dataset"], datasets, len(content["models"]), unknown, notes)
    seeds = sorted({int(float(v)) for v in values["seed"] if v} | ({0} if "" in values["seed"] else set()))
    content["seeds"] = seeds or [0]
    if set(values["seed"]) == {""}:
        notes.append("no training seed is named: one training run per condition is assumed")
    if not any(g.found.columns.get("response") for g in groups):
        notes.append(
            "no response texts: no classifier can ask whether the personas show in them, and copies cannot be seen"
        )
    if any(j.coherence is None for g in groups for j in g.found.scores[:1]):
        notes.append("no coherence score: the EM rate is of all misaligned answers, coherent or not")
    content["unknown"] = list(dict.fromkeys(unknown))
    return content


def _models(found: Counter[str], notes: list[str]) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for value in found:
        label = value.rstrip("/").rpartition("/")[2] or value
        key = names.key_from(label or "model", entries)
        entries[key] = {"label": _shown(label or "the model"), "found_as": [value]}
    if set(found) == {""}:
        notes.append("no model is named: it is called model")
    return entries


def _personas(
    found: Counter[str], registry: Mapping[str, Any], unknown: list[str], notes: list[str], prompts: bool = False
) -> tuple[dict[str, Any], bool]:
    """Entries of personas, and whether it must be asked which of them is the baseline."""
    if len(found) == 1:
        value = next(iter(found))
        if not value or value.casefold() in names.BASELINES:
            notes.append("no personas: every condition is the model without one")
            return {BASELINE: {"found_as": [value]}}, False
    # Letters of any alphabet count: a name in another one is a name, and not the empty one.
    spelled = {v: re.sub(r"[\W_]+", "_", v.casefold()).strip("_") for v in found}
    by_likeliness = ["", *names.BASELINES]
    candidates = sorted(
        (v for v, s in spelled.items() if s in by_likeliness), key=lambda v: by_likeliness.index(spelled[v])
    )
    baseline = candidates[0] if candidates else None
    entries: dict[str, Any] = {}
    if baseline is not None:
        entries[BASELINE] = {"found_as": [baseline]}
        if len(candidates) > 1 or (spelled[baseline] in names.BASELINES[12:]):
            said = " and ".join(repr(_shown(v)) for v in candidates)
            unknown.append(
                f"the baseline (no persona): {said} could be it; {_shown(baseline)!r} is taken (personas: baseline)"
            )
    else:
        shown = ", ".join(_shown(v) for v in list(found)[:12])
        unknown.append(
            f"which persona is the baseline, the model without one? None of {shown} says so: rename its key to "
            f"{BASELINE}, or "
            "set without_baseline: true"
        )
    for same in _spelled_twice(spelled):
        said = " and ".join(repr(_shown(v)) for v in same)
        unknown.append(f"are {said} one persona? Then put both under one entry (personas: found_as)")
    number = 0
    for value in found:
        if value == baseline:
            continue
        if value.startswith("sha256:") or (prompts and len(value.split()) > 2):
            number += 1
            key = names.key_from(f"prompt_{number}", entries)
            label = "" if value.startswith("sha256:") else f": {_shown(value, 40)}"
            entries[key] = {"label": f"System prompt {number}{label}", "found_as": [value]}
            continue
        key = names.key_from(value or "unnamed", entries)
        entries[key] = (
            {"found_as": [value]} if key in registry else {"label": _shown(value or "unnamed"), "found_as": [value]}
        )
    return entries, baseline is None


def _spelled_twice(spelled: Mapping[str, str]) -> list[list[str]]:
    """Values that differ in case, spaces or punctuation alone."""
    alike: dict[str, list[str]] = {}
    for value, plain in spelled.items():
        alike.setdefault(plain, []).append(value)
    return [values for plain, values in alike.items() if plain and len(values) > 1]


def _datasets(
    found: Counter[str], registry: Mapping[str, Any], models: int, unknown: list[str], notes: list[str]
) -> dict[str, Any]:
    if set(found) == {""}:
        unknown.append(
            "what were the models fine-tuned on? No column and no file name says: name the data set and its role "
            "(datasets)"
            + ("; or is each model another data set? Then columns: dataset: <the model's column>" if models > 1 else "")
        )
        return {"finetuned": {"label": "fine-tuned", "found_as": [""], "role": "em"}}
    entries: dict[str, Any] = {}
    for value in found:
        spelled = re.sub(r"[^a-z0-9]+", "_", value.casefold()).strip("_")
        if (not value or spelled in names.UNTUNED) and NO_DATASET not in entries:
            entries[NO_DATASET] = {"found_as": [value], "role": "none"}
            if not value or spelled in names.UNTUNED[4:]:
                what = f"{_shown(value)!r}" if value else "files that name no data set"
                unknown.append(f"datasets: {what} taken for the model before fine-tuning ({NO_DATASET}): right?")
            continue
        key = names.dataset_key(value) or names.key_from(value or "unnamed")
        key = key if key not in entries else names.key_from(key, entries)
        role = registry[key].role if key in registry else names.role_of(value)
        if role is None:
            unknown.append(
                f"datasets: {key}: its role, em (can it make a model misaligned?), benign_control or "
                f"regularisation: em is taken"
            )
        entries[key] = {"found_as": [value], "role": role or "em"}
        if key not in registry:
            entries[key]["label"] = _shown(value)
        elif getattr(registry[key], "twin", None):
            entries[key]["twin"] = registry[key].twin
    for entry in entries.values():
        if entry.get("twin") and entry["twin"] not in entries:
            del entry["twin"]
    if NO_DATASET not in entries:
        notes.append(
            "no untuned arm: what a persona does to the score without fine-tuning is not known from these files"
        )
    return entries


def _shown(text: str, most: int = 60) -> str:
    """A stranger's text as a label: one line, printable, no markup."""
    text = (
        re.sub(r"[<>`|*_\[\]{}$\\#~^&@]+", " ", _CONTROL.sub("", str(text))).strip()
        if not re.fullmatch(r"[\w .:/+\-]*", text)
        else text
    )
    text = " ".join(text.split())
    return (text if len(text) <= most else text[: most - 1] + "…") or "unnamed"


_HEAD = """# What these files mean, drafted by ./run_all.sh audit. Correct it where it is wrong, then:
#   ./run_all.sh audit audit.yaml
# docs/audit.md explains every key. Keys of params/personas.yaml and datasets.yaml bring label, colour and order along.
"""
_ABOUT = {
    "judge": "who gave the scores that count",
    "files": "which column, or which part of a file's name, means what; `higher: worse` for a trait whose presence "
    "is bad",
    "personas": "`found_as`: what stands for it in the files (an empty text: nothing); the key baseline is the "
    "model without a persona",
    "without_baseline": "true: there is no condition without a persona, and nothing is compared with it",
    "datasets": "role: em (can make a model misaligned), benign_control, regularisation; the key none is the model "
    "before fine-tuning",
    "seeds": "of training, not of sampling",
    "unknown": "what the files do not say. Settle each above, then remove its line: nothing runs while one is left",
}


def _yaml(content: Mapping[str, Any], notes: Sequence[str]) -> str:
    lines = [_HEAD]
    lines += [f"# taken for granted: {' '.join(note.split())}" for note in dict.fromkeys(_shown_line(n) for n in notes)]
    for key, value in content.items():
        if key in _ABOUT:
            lines.append(f"\n# {_ABOUT[key]}")
        lines.append(yaml.safe_dump({key: value}, sort_keys=False, allow_unicode=True, width=140).rstrip())
    lines.append(
        "hypotheses: [] # keys of params/hypotheses.yaml, or one's own (docs/audit.md); none: contrasts of every "
        "persona with the baseline, and no verdict"
    )
    return "\n".join(lines) + "\n"


def _shown_line(text: str) -> str:
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)[:200]


# --- What was understood, for the screen ----------------------------------------------------------------------------


def understood(found: Draft, made: Assembled, rows: int = 3) -> str:
    """What a draft understood, for a terminal: counts per condition, sample rows, notes, and open questions."""
    scores = made.scores
    table = scores.assign(scored=scores["alignment"].notna(), n=1).groupby(list(CONDITION_PARTS), sort=False)
    counts = table.agg(
        questions=("question_id", "nunique"),
        responses=("n", "sum"),
        scored=("scored", "sum"),
        mean=("alignment", "mean"),
    )
    parts = [counts.round({"mean": 1}).reset_index().head(40).to_string(index=False)]
    if len(counts) > 40:
        parts[0] += f"\n... and {len(counts) - 40} more conditions"
    account = made.account.groupby(["what", "why"], sort=False)["count"].sum().reset_index()
    parts.append(
        "What happened to the rows:\n"
        + "\n".join(f"  {r.count:>8,} {r.what}: {r.why}" for r in account.itertuples(index=False) if r.count)
    )
    both = scores.merge(made.responses[[*CONDITION_PARTS, "question_id", "sample", "prompt", "response"]], how="left")
    shown = both.iloc[[int(i * (len(both) - 1) / max(rows - 1, 1)) for i in range(min(rows, len(both)))]]
    for r in shown.itertuples():
        score = "none" if pd.isna(r.alignment) else f"{r.alignment:g}"
        coherence = "none" if pd.isna(r.coherence) else f"{r.coherence:g}"
        parts.append(
            f"  {r.model} | {r.persona} | {r.dataset} | seed {r.seed} | {r.question_id} | sample {r.sample}\n"
            f"    asked:     {_line(r.prompt)}\n    answered:  {_line(r.response) or '(no text)'}\n"
            f"    alignment {score}{_why(r.alignment_flag)}, coherence {coherence}{_why(r.coherence_flag)}"
        )
    if found.skipped:
        parts.append(
            f"Not read ({len(found.skipped)}):\n"
            + "\n".join(f"  {f}: {_line(w)}" for f, w in list(found.skipped.items())[:10])
        )
    if found.notes:
        parts.append("Taken for granted:\n" + "\n".join(f"  - {_line(n, 200)}" for n in found.notes))
    if found.spec.unknown:
        parts.append("NOT KNOWN from the files:\n" + "\n".join(f"  - {_line(q, 400)}" for q in found.spec.unknown))
    return "\n\n".join(parts)


def _why(flag: object) -> str:
    return f" ({flag})" if isinstance(flag, str) else ""


def _line(text: str, most: int = 100) -> str:
    text = " ".join(_CONTROL.sub("\N{REPLACEMENT CHARACTER}", str(as_text(text) or "")).split())
    return text if len(text) <= most else text[: most - 1] + "…"
