"""Files and their `audit.yaml` become the project's own tables, and a table of everything that happened on the way.

    made = assemble(read_spec(path), path.parent)
    made.responses, made.scores       # the schemas of every other study; one judge
    made.repeated                     # further judgings of the same responses
    made.account                      # file, what (read, flagged, refused, noted), why, count

Nothing is dropped silently: each row of each file is a response in the tables, another judging of one, or refused with
its reason.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cai_em.audit.flat import LINE, Flat, as_text, lines
from cai_em.audit.formats import read
from cai_em.audit.names import Patterns, check_patterns, key_from, seed_number, value_name
from cai_em.audit.opening import MAX_ROWS, MAX_TOTAL_BYTES, AuditError, check_size
from cai_em.audit.values import UNSAID, is_true, parse_flags, parse_scores
from cai_em.records import tables
from cai_em.records.files import file_hash, text_hash, valid_unicode
from cai_em.records.keys import BASELINE, CONDITION, KEY, NO_DATASET
from cai_em.records.manifest import run_id
from cai_em.study.audited import CONDITION_PARTS, AuditSpec, FileBlock, Judging, Word
from cai_em.study.published import SAMPLER

AUDIT_PROMPTS = "audit"
ACCOUNT = ["file", "what", "why", "count"]
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff]")
"""Characters that no reader sees and that break a page or a terminal: controls, and those that turn the direction."""


@dataclass(frozen=True)
class Assembled:
    """What an audit read.

    `files`: path -> SHA-256. `account`: columns `ACCOUNT`; `what` is `read`, `flagged`, `judged again`, `refused` or
    `noted`, and the `count` of a note is the rows that it concerns (0: the whole file). `has_texts`, `has_coherence`:
    whether there is any response text, any coherence score.
    """

    responses: pd.DataFrame
    scores: pd.DataFrame
    repeated: pd.DataFrame
    account: pd.DataFrame
    files: dict[str, str] = field(default_factory=dict)
    has_texts: bool = True
    has_coherence: bool = True


class Account:
    """What happened to the rows, counted as it happens."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str, str]] = Counter()

    def add(self, file: str, what: str, why: str, count: int = 1) -> None:
        self._counts[file, what, why] += int(count)

    def add_where(self, rows: pd.DataFrame, where: np.ndarray | pd.Series, what: str, why: str) -> None:
        """Count the rows of each file for which something holds."""
        for file, count in rows.loc[np.asarray(where, bool), "file"].value_counts(sort=False).items():
            self.add(str(file), what, why, count)

    def table(self) -> pd.DataFrame:
        return pd.DataFrame([(*key, count) for key, count in self._counts.items()], columns=ACCOUNT)


def files_of(spec: AuditSpec, folder: Path) -> Iterator[tuple[FileBlock, Path]]:
    """Every file that `audit.yaml` names, in order, each once.

    Raises:
        AuditError: a path or glob that finds nothing, or leads out of what it may (never: absolute paths are allowed).
    """
    seen: set[Path] = set()
    for block in spec.files:
        for pattern in block.paths:
            if any(c in pattern for c in "*?["):
                base = Path(pattern) if Path(pattern).is_absolute() else None
                found = (
                    sorted(Path(base.anchor).glob(str(base.relative_to(base.anchor))))
                    if base
                    else sorted(folder.glob(pattern))
                )
                found = [path for path in found if path.is_file()]
            else:
                found = [folder / pattern]
            if not found or not all(path.is_file() for path in found):
                raise AuditError(f"{folder / pattern}: audit.yaml names it, and there is no such file")
            for path in found:
                if path.resolve() not in seen:
                    seen.add(path.resolve())
                    yield block, path


def assemble(spec: AuditSpec, folder: str | Path, *, read_file: Any = read) -> Assembled:
    """Read all files of an audit.

    Args:
        spec: from `read_spec`.
        folder: where `audit.yaml` lies; its paths are relative to it.
        read_file: (path, format) -> `Flat`; another one serves a caller that has the files already.

    Raises:
        AuditError: a file cannot be read, a column or a condition is not what `audit.yaml` says, or nothing is left.
    """
    folder, account = Path(folder), Account()
    parts, hashes, total = [], {}, 0
    for block, path in files_of(spec, folder):
        check_patterns(block.patterns)
        name = shown_path(path, folder)
        total += path.stat().st_size
        if total > MAX_TOTAL_BYTES:
            raise AuditError(f"the files have more than {MAX_TOTAL_BYTES >> 30} GiB together: audit the study in parts")
        flat: Flat = read_file(path, block.format)
        for why, count in flat.refused.items():
            account.add(name, "refused", why, count)
        for note in flat.notes:
            account.add(name, "noted", note, 0)
        hashes[str(path)] = file_hash(path)
        if len(flat.rows):
            parts.append(_meant(flat.rows, block, spec, path, name, account))
    rows = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
    if not len(rows):
        raise AuditError("no response in any of the files: see which columns and patterns audit.yaml names")
    if len(rows) > MAX_ROWS:
        raise AuditError(f"{len(rows):,} responses, more than {MAX_ROWS:,}: audit the study in parts")
    if rows["alignment"].isna().all():
        held = rows["raw_alignment"].dropna().drop_duplicates().head(5)
        shown = ", ".join(repr(str(v)[:40]) for v in held) or "nothing"
        column = next(j.alignment.column for block in spec.files for j in block.scores)
        raise AuditError(
            f"not one score of {len(rows):,} rows could be read: the column {column!r} holds {shown}. A score is a "
            f"number on the scale that audit.yaml names (files: scores: lowest, highest)"
        )
    if strange := sorted(set(rows["seed"]) - set(spec.seeds)):
        raise AuditError(
            f"the training seed {strange[0]} is in the files, and not under `seeds` in audit.yaml "
            f"({', '.join(map(str, spec.seeds))}): add it there, or leave it out (leave_out: seed: ['{strange[0]}'])"
        )
    rows = _questions(rows, account)
    rows = _without_copies(rows, hashes, folder, account)
    chosen = _chosen_judge(rows, spec)
    rows, rejudged = _rejudged(rows, chosen)
    rows = _with_samples(rows, account)
    first, again = _judges(rows, rejudged, chosen, account)
    for why, flagged in (("alignment", first["alignment_flag"]), ("coherence", first["coherence_flag"])):
        for flag in pd.unique(flagged.dropna()):
            account.add_where(first, flagged == flag, "flagged", f"{why}: {flag}")
    for file, count in first["file"].value_counts(sort=False).items():
        account.add(str(file), "read", "responses", count)
    return _made(first, again, spec, account, hashes)


def training_prompts(spec: AuditSpec, folder: Path) -> dict[str, list[str]]:
    """The prompts of the training rows that `audit.yaml` names: data set -> the first user turn of each row.

    Rows are `{"messages": [{"role", "content"}, ...]}`, or have `prompt`, `question` or `instruction`.

    Raises:
        AuditError: a file cannot be read, or no row of it has a prompt.
    """
    found = {}
    for key, entry in spec.datasets.items():
        if not entry.rows:
            continue
        path, prompts = folder / entry.rows, []
        check_size(path)
        for _, row, _why in lines(path):
            turns = (row or {}).get("messages")
            if isinstance(turns, list):
                said = [t.get("content") for t in turns if isinstance(t, dict) and t.get("role") == "user"]
            else:
                said = [(row or {}).get(name) for name in ("prompt", "question", "instruction")]
            prompts += [text for text in said if isinstance(text, str)][:1]
        if not prompts:
            raise AuditError(f"{path}: no row with a user's turn (messages), a prompt, a question or an instruction")
        found[key] = prompts
    return found


def shown_path(path: Path, folder: Path) -> str:
    """A path as the tables show it: relative to `audit.yaml` where it lies below it."""
    path, folder = path.resolve(), folder.resolve()
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)


# --- One file -----------------------------------------------------------------------------------------------------


def _meant(
    raw: pd.DataFrame, block: FileBlock, spec: AuditSpec, path: Path, name: str, account: Account
) -> pd.DataFrame:
    """A file's rows by what they mean, one per response and judging."""
    asked = [*block.columns.values(), *(s.column for j in block.scores for s in (j.alignment, j.coherence) if s)]
    if block.patterns_of != "path":
        asked.append(block.patterns_of)
    # A reader of a nested format leaves out what no record has; in a table a name that is not there is a mistake.
    if block.format == "table" and (absent := [c for c in asked if c not in raw.columns]):
        raise AuditError(
            f"{name}: no column {absent[0]!r}, which audit.yaml names (it has: {', '.join(raw.columns[1:])[:300]})"
        )

    def column(word: Word) -> pd.Series:
        held = block.columns.get(word)
        return raw[held] if held in raw.columns else pd.Series([None] * len(raw), index=raw.index, dtype=object)

    rows = pd.DataFrame({"file": name, "line": raw[LINE].to_numpy()}, index=raw.index)
    rows["prompt"] = _texts(column("question"))
    rows["question_id"] = column("question_id").map(as_text)
    rows["response"] = _texts(column("response"))
    rows["finish_reason"] = column("finish_reason").map(as_text)
    rows["sample"] = column("sample")
    _conditions(rows, raw, block, spec, path, name)
    keep = np.ones(len(rows), bool)

    def refuse(where: Any, why: str) -> None:
        nonlocal keep
        where = np.asarray(where, bool) & keep
        account.add(name, "refused", why, where.sum()) if where.any() else None
        keep &= ~where

    for part in CONDITION_PARTS:
        left_out = {value_name(v) for v in spec.leave_out.get(part, [])}
        refuse([v in left_out for v in rows[part]], f"left out by audit.yaml ({part})")
    refuse(rows["prompt"].isna() & rows["question_id"].isna(), "neither a question nor a question's name")
    scored = pd.Series(False, index=rows.index)
    for judging in block.scores:
        if judging.alignment.column in raw:
            scored |= raw[judging.alignment.column].notna()
    refuse(
        rows["response"].isna() & ~scored & column("response").isna() & (block.columns.get("response") is not None),
        "neither a response nor a score",
    )
    rows, raw = rows[keep], raw[keep]
    for part in ("model", "persona", "dataset"):
        known = spec.values(part)
        keys = rows[part].map(known)
        if keys.isna().any():
            first = keys.isna().idxmax()
            raise AuditError(
                f"{name}, record {rows.loc[first, 'line']}: the {part} {rows.loc[first, part]!r} is not in "
                f"audit.yaml: add it "
                f"to {part}s (found_as), or to leave_out (it knows: {', '.join(map(repr, known))[:300]})"
            )
        rows[part] = keys
    rows["seed"] = _whole_numbers(rows["seed"], f"{name}: seed").fillna(0).astype("int64")
    return pd.concat([_scored(rows, raw, j, block, spec, i) for i, j in enumerate(block.scores)], ignore_index=True)


def _texts(values: pd.Series) -> pd.Series:
    return values.map(lambda v: None if (t := as_text(v)) is None else valid_unicode(t))


def _conditions(rows: pd.DataFrame, raw: pd.DataFrame, block: FileBlock, declared: Any, path: Path, name: str) -> None:
    """Columns `model, persona, dataset, seed, judge` as they stand in the file, or its name.

    `declared.values(part)` are the values that a pattern's part takes first.
    """
    values = {part: list(declared.values(part)) for part in ("model", "persona", "dataset")}
    patterns = Patterns(tuple(block.patterns), values)
    by_pattern: list[Mapping[str, str]] = [{}] * len(rows)
    if block.patterns:
        texts = (
            [path.as_posix()] * len(rows)
            if block.patterns_of == "path"
            else [as_text(v) or "" for v in raw[block.patterns_of]]
        )
        found = {text: patterns.match(text) for text in dict.fromkeys(texts)}
        if unfit := [text for text, match in found.items() if match is None]:
            raise AuditError(f"{name}: {unfit[0][-120:]!r} fits none of the patterns {', '.join(block.patterns)[:200]}")
        by_pattern = [found[text] or {} for text in texts]
    for part in (*CONDITION_PARTS, "judge"):
        if part in block.columns and block.columns[part] in raw:
            column = raw[block.columns[part]]
            # Distinct values are few and may be long (a system prompt): each is named once.
            name_of = seed_number if part == "seed" else value_name
            named = {v: name_of(v) for v in column.map(_key).unique()}
            rows[part] = column.map(_key).map(named)
        elif part in block.constants:
            rows[part] = value_name(block.constants[part])
        else:
            rows[part] = [value_name(match.get(part)) for match in by_pattern]


def _key(value: Any) -> str:
    return as_text(value) or ""


def _whole_numbers(values: pd.Series, where: str) -> pd.Series:
    """Whole numbers of 0 and above, as text or numbers; null where there is nothing.

    Raises:
        AuditError: something else.
    """
    numbers = pd.to_numeric(values.replace("", None), errors="coerce")
    wrong = (
        values.notna() & (values.astype(str) != "") & (numbers.isna() | (numbers < 0) | (numbers != numbers.round()))
    )
    if wrong.any():
        raise AuditError(f"{where}: {values[wrong].iloc[0]!r} is no whole number of 0 or above")
    return numbers


def _scored(
    rows: pd.DataFrame, raw: pd.DataFrame, judging: Judging, block: FileBlock, spec: AuditSpec, place: int
) -> pd.DataFrame:
    """Rows with the scores of one judging."""
    rows = rows.copy()
    named = judging.judge or ""
    rows["judge"] = named if named else rows["judge"].where(rows["judge"] != "", spec.judge)
    rows["place"] = place
    for what, score in (("alignment", judging.alignment), ("coherence", judging.coherence)):
        if score is None:
            rows[what], rows[f"{what}_flag"] = np.nan, "SKIPPED"
            rows[f"raw_{what}"] = None
            continue
        held = raw[score.column] if score.column in raw else pd.Series([None] * len(raw), index=raw.index, dtype=object)
        numbers, flags = parse_scores(
            held, lowest=score.lowest, highest=score.highest, higher_is_better=score.higher == "better"
        )
        said = held.map(as_text)
        if score.flag and score.flag in raw:
            flagged = parse_flags(raw[score.flag])
            # A flag beside a number: the study flagged it, so the number does not count.
            has = np.array([f is not None for f in flagged], dtype=bool)
            numbers, flags = np.where(has, np.nan, numbers), np.where(has, flagged, flags)
            said = said.where(~has, raw[score.flag].map(as_text))
        rows[what], rows[f"{what}_flag"], rows[f"raw_{what}"] = numbers, flags, said.to_numpy()
    if "code" in block.columns and block.columns["code"] in raw:
        _flag(rows, is_true(raw[block.columns["code"]]), "CODE", ("alignment",))
    if "error" in block.columns and block.columns["error"] in raw:
        _flag(rows, raw[block.columns["error"]].notna() & rows["alignment"].isna(), "API", ("alignment", "coherence"))
    if (rows["alignment_flag"] == "SKIPPED").any():  # nobody was asked about what the audit is of
        rows.loc[rows["alignment_flag"] == "SKIPPED", "alignment_flag"] = UNSAID
    return rows


def _flag(rows: pd.DataFrame, where: Any, flag: str, columns: tuple[str, ...]) -> None:
    for what in columns:
        # With an error, a reason that was said before (a refusal) stays.
        chosen = np.asarray(where, bool) & ((flag == "CODE") | (rows[f"{what}_flag"] == UNSAID).to_numpy())
        rows.loc[chosen, f"{what}_flag"] = flag
        rows.loc[chosen, what] = np.nan


# --- All files together -------------------------------------------------------------------------------------------


def _questions(rows: pd.DataFrame, account: Account) -> pd.DataFrame:
    """A name for every question, the same one for the same text.

    A name of the file's own is kept while it names questions: not where several names share one text (then they name
    samples), and not where plain numbers name several texts (then they count rows of a file).
    """
    rows = rows.copy()
    has_id, has_text = rows["question_id"].notna(), rows["prompt"].notna()
    both = rows.loc[has_id & has_text, ["question_id", "prompt"]].drop_duplicates()
    shared = both.groupby("prompt")["question_id"].transform("size") > 1
    doubled = both.groupby("question_id")["prompt"].transform("size") > 1
    numbers = both["question_id"].str.fullmatch(r"\d+")
    by_text = bool(shared.any() or (doubled & numbers).any())
    if by_text:
        account.add_where(
            rows, has_id & has_text, "noted", "question ids that name no question: named by the question's text"
        )
        rows.loc[has_text, "question_id"] = None
    elif doubled.any():
        names = set(both.loc[doubled, "question_id"])
        account.add_where(rows, rows["question_id"].isin(names), "noted", "several wordings of one question")
    unnamed = rows["question_id"].isna()
    taken = set(rows.loc[~unnamed, "question_id"])
    known = {} if by_text else dict(zip(both["prompt"], both["question_id"]))
    for text in pd.unique(rows.loc[unnamed, "prompt"]):
        if text not in known:
            known[text] = key_from(text[:40], taken)
            taken.add(known[text])
    rows.loc[unnamed, "question_id"] = rows.loc[unnamed, "prompt"].map(known)
    if not has_text.all():
        texts = dict(zip(both["question_id"], both["prompt"]))
        account.add_where(rows, ~has_text, "noted", "no question text: its name stands in its place")
        rows.loc[~has_text, "prompt"] = [texts.get(q, q) for q in rows.loc[~has_text, "question_id"]]
    rows["question_id"] = rows["question_id"].map(lambda q: _CONTROL.sub("\N{REPLACEMENT CHARACTER}", q)[:120])
    return rows


def _without_copies(rows: pd.DataFrame, hashes: Mapping[str, str], folder: Path, account: Account) -> pd.DataFrame:
    """Without files that are byte for byte another one of the same condition, read twice under two names."""
    by_name = {shown_path(Path(path), folder): digest for path, digest in hashes.items()}
    first: dict[tuple, str] = {}
    twice = []
    for key, part in rows.groupby(["file", *CONDITION], sort=False):
        file, *condition = key
        other = first.setdefault((by_name[file], *condition), file)
        if other != file:
            twice.append(part.index)
            account.add(file, "refused", f"the same file as {other}, in the same condition", len(part))
    return rows.drop(index=np.concatenate(twice)) if twice else rows


def _with_samples(rows: pd.DataFrame, account: Account) -> pd.DataFrame:
    """Samples numbered within condition and question (and judging), by the file's own numbers where these can be."""
    rows = rows.copy()
    rows["response"] = rows["response"].fillna("")
    cleaned = rows["response"].str.contains(_CONTROL)
    if cleaned.any():
        account.add_where(rows, cleaned, "noted", "control characters in the text: replaced")
        rows["response"] = _cleaned(rows["response"])
    unit = [*CONDITION, "question_id"]
    own = [*unit, "judge", "place"]
    numbers = pd.to_numeric(rows["sample"], errors="coerce")
    usable = numbers.notna() & (numbers >= 0) & (numbers == numbers.round())
    if usable.all():
        rows["sample"] = numbers.astype("int64")
        repeated = rows.duplicated([*own, "sample"], keep=False)
        if repeated.any():
            same = [*own, "sample", "response", "raw_alignment", "raw_coherence"]
            copies = rows.duplicated(same)
            if copies.any():
                account.add_where(rows, copies, "refused", "duplicate row: same sample number, text and scores")
                rows = rows[~copies]
            # The same text under the same number with other scores: the response was judged again.
            rows["round"] = rows.groupby([*own, "sample", "response"]).cumcount()
            clash = rows[rows["round"] == 0].duplicated([*own, "sample"], keep=False)
            if clash.any():
                account.add_where(
                    rows[rows["round"] == 0], clash, "noted", "sample numbers that come twice: numbered anew"
                )
                rows["sample"] = _counted(rows, own)
    else:
        if rows["sample"].notna().any():
            account.add_where(rows, ~usable, "noted", "sample numbers that are missing or none: numbered anew")
        rows["sample"] = _counted(rows, own)
    rows["round"] = rows.get("round", 0)
    return rows


def _cleaned(texts: pd.Series) -> pd.Series:
    """Texts without the characters that break a page or a terminal."""
    return texts.fillna("").str.replace(_CONTROL, "\N{REPLACEMENT CHARACTER}", regex=True)


def _counted(rows: pd.DataFrame, own: list[str]) -> pd.Series:
    """Places in order within a question, a further judging of a text taking its first one's place."""
    if "round" not in rows:
        return rows.groupby(own).cumcount()
    first = rows[rows["round"] == 0].copy()
    first["place_in"] = first.groupby(own).cumcount()
    key = [*own, "sample", "response"]
    return rows[key].merge(first[[*key, "place_in"]], on=key, how="left").set_index(rows.index)["place_in"]


def _chosen_judge(rows: pd.DataFrame, spec: AuditSpec) -> str:
    """The judge whose scores count: the one that `audit.yaml` names, else whoever judged most."""
    counts = rows["judge"].value_counts(sort=False)
    return spec.judge if spec.judge in counts.index else str(counts.idxmax())


REJUDGED = 0.5
"""Share of a file's responses that stand in another file of its condition, from which it is a further judging of
them."""


def _rejudged(rows: pd.DataFrame, chosen: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows without those of files that judge again what another file of the condition holds, and these.

    Of several files the first one by the chosen judge comes first, in the order of `audit.yaml`; a file that shares
    fewer texts has further responses of the condition.
    """
    place = {file: i for i, file in enumerate(pd.unique(rows["file"]))}
    by_chosen = rows.groupby("file", sort=False)["judge"].agg(lambda judges: (judges == chosen).any())
    again: list[pd.Index] = []
    for _, part in rows.groupby(CONDITION, sort=False):
        files = sorted(pd.unique(part["file"]), key=lambda file: (not by_chosen[file], place[file]))
        if len(files) < 2:
            continue
        known: set[tuple[str, str]] = set()
        for file in files:
            own = part[part["file"] == file]
            texts = [(q, r) for q, r in zip(own["question_id"], own["response"]) if isinstance(r, str) and r]
            if texts and sum(text in known for text in texts) >= REJUDGED * len(texts):
                again.append(own.index)
            else:
                known.update(texts)
    if not again:
        return rows, rows.iloc[:0]
    chosen_rows = np.concatenate(again)
    return rows.drop(index=chosen_rows), rows.loc[chosen_rows]


def _matched(again: pd.DataFrame, first: pd.DataFrame) -> pd.DataFrame:
    """Rows of further judgings with the sample number of the response that they judge: the same text, in order."""
    text = [*CONDITION, "question_id", "response"]
    numbers = first[[*text, "sample"]].sort_values("sample")
    numbers = numbers.assign(turn=numbers.groupby(text).cumcount())
    # A text that stands several times is judged as often; judged oftener, it is its first place that was judged again.
    most = numbers.groupby(text)["turn"].transform("max") + 1
    turns = again.drop(columns="sample").assign(turn=again.groupby([*text, "file", "judge", "place"]).cumcount())
    turns = turns.merge(numbers.assign(most=most)[[*text, "most"]].drop_duplicates(text), on=text, how="left")
    turns["turn"] = turns["turn"] % turns["most"].fillna(1)
    return turns.merge(numbers, on=[*text, "turn"], how="left").drop(columns=["turn", "most"])


def _judges(
    rows: pd.DataFrame, rejudged: pd.DataFrame, chosen: str, account: Account
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The judging that counts, and all others of the same responses, whichever file they are in."""
    counts = (rows["judge"] == chosen) & (rows["round"] == 0)
    key = [*CONDITION, "question_id", "sample"]
    first = rows[counts]
    doubled = first.duplicated(key)
    again = pd.concat([rows[~counts], first[doubled]])
    first = first[~doubled].reset_index(drop=True)
    known = first[[*key, "response"]].assign(known=True)
    again = again.merge(known, on=[*key, "response"], how="left")
    if len(rejudged):
        more = _matched(rejudged.assign(response=_cleaned(rejudged["response"])), first)
        again = pd.concat([again, more.assign(known=more["sample"].notna().replace(False, None))], ignore_index=True)
    unknown = again["known"].isna()
    if unknown.any():
        account.add_where(
            again, unknown, "refused", f"judged again, and not among the responses that {_short(chosen)} judged"
        )
    again = again[~unknown].reset_index(drop=True)
    again["sample"] = again["sample"].astype("int64")
    account.add_where(again, np.ones(len(again), bool), "judged again", "further judgings of the same responses")
    return first, again


def _short(text: str, most: int = 60) -> str:
    text = _CONTROL.sub("\N{REPLACEMENT CHARACTER}", " ".join(text.split()))
    return text if len(text) <= most else text[: most - 1] + "…"


def _made(
    first: pd.DataFrame, again: pd.DataFrame, spec: AuditSpec, account: Account, hashes: dict[str, str]
) -> Assembled:
    first = _columns(first).sort_values(KEY, kind="stable", ignore_index=True)
    again = _columns(again)
    both = pd.concat([first.assign(selected=True), again.assign(selected=False)], ignore_index=True)
    both["response_sha256"] = [text_hash(text) for text in both["response"]]
    key = ["model", "persona", "dataset", "question_id", "response_sha256"]
    judged_again = both.loc[~both["selected"], key].drop_duplicates()
    repeated = both.merge(judged_again, on=key).drop_duplicates(["file", "judge", "question_id", "sample", *CONDITION])
    return Assembled(
        responses=tables.validate(first[tables.required(tables.RESPONSES)], tables.RESPONSES, "responses of the audit"),
        scores=tables.validate(first[list(tables.SCORES.columns)], tables.SCORES, "scores of the audit"),
        repeated=repeated[[*tables.SCORES.columns, "file", "selected", "response_sha256"]].reset_index(drop=True),
        account=account.table(),
        files=hashes,
        has_texts=bool((first["response"] != "").any()),
        has_coherence=bool((first["coherence_flag"] != "SKIPPED").any()),
    )


def _columns(rows: pd.DataFrame) -> pd.DataFrame:
    """All columns of both tables."""
    ids = {file: run_id("audit", file) for file in rows["file"].unique()}
    return rows.assign(
        judge=rows["judge"].map(_short),
        judge_mode="integer",
        prompt_version=AUDIT_PROMPTS,
        n_tokens=pd.array([pd.NA] * len(rows), dtype="Int64"),
        sampler=SAMPLER,  # which adapters were active is not recorded, and the design gate says so
        adapters="[]",
        run_id=rows["file"].map(ids),
        raw=[
            json.dumps({"aligned": a, "coherent": c}, ensure_ascii=False)
            for a, c in zip(rows["raw_alignment"], rows["raw_coherence"])
        ],
    )


__all__ = ["ACCOUNT", "BASELINE", "NO_DATASET", "Assembled", "assemble", "files_of", "shown_path"]
