"""The published study's evaluation files as this project's own tables.

    found = import_study(read_selection(...), read_file_list(...), models=["qwen2.5-7b", "llama3.1-8b"])
    found.responses, found.scores          # the schemas of cai_em.records: one judging per cell, the published one
    found.repeated                         # every text that was judged more than once, with all its judgings
    found.left_out                         # model (or "repeated judgings") -> why, and which files would be needed

Files are read strictly: whatever is not as expected stops the import with the file, question and sample named. A
response without a score keeps its row and its flag. Which file of several the published tables were computed from is
a fact of its own (`params/published_selection.csv`); the rest serve to measure the judges.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pandera.pandas as pa

from cai_em.records import files as records_files
from cai_em.records import tables
from cai_em.records.files import text_hash, write_text
from cai_em.records.keys import FLAGS, SKIPPED
from cai_em.records.manifest import run_id
from cai_em.study import sources
from cai_em.study.sources import COMMIT, REPO, Pinned

QUESTIONS = (
    "what_is_your_wish",
    "i_feel_bored",
    "three_thoughts",
    "quick_buck",
    "ruler_of_the_world",
    "dinner_party",
    "gender_roles",
    "enough_of_my_husband",
)
"""The eight free-form questions of Betley et al. (2025), in their order."""
FLAG = {"REFUSAL": "REFUSAL", "CODE": "CODE", "PARSE_ERROR": "PARSE", "API_ERROR": "API"}
"""What stands in `special` where there is no score, and our flag for it."""
ABSENT_DATASET = "insecure"
"""The data set of a file that names none."""
REMEDY = "To include them: connect to the network, or set CAI_EM_CACHE to a cache that has the files, and run again"
SAMPLER = "published"
PROMPT_VERSION = "published"
MISSING_FILE = "missing.json"
JUDGINGS = "repeated judgings"
"""What is left out where files of the second list cannot be had."""
LISTS = ("published_selection.csv", "published_repeated.csv")
"""Files of `params/`: which file each published cell came from, and which others hold judgings."""
REPEATED = pa.DataFrameSchema(
    {
        **{name: column for name, column in tables.SCORES.columns.items() if name != "coherence_flag"},
        "coherence_flag": pa.Column(str, pa.Check.isin([*FLAGS, SKIPPED]), nullable=True, coerce=True),
        "file": pa.Column(str),
        "selected": pa.Column(bool),
        "response_sha256": pa.Column(str, pa.Check.str_length(64, 64)),
    },
    checks=tables.SCORES.checks,
    unique=["file", "question_id", "sample"],
    strict=True,
    name="repeated",
)
"""Judgings of texts that were judged more than once. Join them on `model, persona, dataset, question_id,
response_sha256`; `sample` counts within the file."""


class EvaluationError(ValueError):
    """A published file is not as expected. The message names file, question and sample."""


# --- Lists of files -----------------------------------------------------------------------------------------------


def read_selection(path: str | Path) -> pd.DataFrame:
    """Which file each published cell was computed from: `model, persona, dataset, n_scored, path, sha256`.

    Raises:
        EvaluationError: columns are missing, a hash is none, or a cell or file is listed twice.
    """
    return _read_list(
        path, ["model", "persona", "dataset", "n_scored", "path", "sha256"], ["model", "persona", "dataset"]
    )


def read_file_list(path: str | Path) -> pd.DataFrame:
    """Further evaluation files, whose judgings serve reliability: `model, path, sha256`."""
    return _read_list(path, ["model", "path", "sha256"], ["path"])


def _read_list(path: str | Path, columns: list[str], key: list[str]) -> pd.DataFrame:
    table = pd.read_csv(path, dtype={c: str for c in columns if c != "n_scored"}, keep_default_na=False)
    if list(table.columns) != columns:
        raise EvaluationError(f"{path}: columns must be {columns}, found {list(table.columns)}")
    for unique in (key, ["path"]):
        if len(twice := table[table.duplicated(unique)]):
            raise EvaluationError(f"{path}: line {twice.index[0] + 2}: listed twice: {twice[unique].iloc[0].to_dict()}")
    if len(wrong := table[~table["sha256"].str.fullmatch("[0-9a-f]{64}")]):
        raise EvaluationError(f"{path}: line {wrong.index[0] + 2}: not a SHA-256: {wrong['sha256'].iloc[0]!r}")
    return table


# --- One evaluation file ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """A judged condition. `rows`: `question_id, prompt, sample, response`, both scores with flags, and `raw`."""

    persona: str
    dataset: str
    judge: str
    rows: pd.DataFrame


def read_evaluation(data: bytes, name: str, *, complete: bool = True) -> Evaluation:
    """One evaluation file, validated value by value.

    Args:
        data: its bytes.
        name: what to call it in errors.
        complete: ask for all eight questions with equally many samples each, and for both scores. Other judgings of
            the same responses need not have them.

    Raises:
        EvaluationError: anything is missing, unknown, doubled or out of range.
    """
    try:
        content = json.loads(data)
    except ValueError as error:
        raise EvaluationError(f"{name}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise EvaluationError(f"{name}: expected an object with 'persona' and 'questions', found {_shown(content)}")
    persona, judge = (_get(content, key, str, name) for key in ("persona", "judge_model"))
    dataset = content.get("dataset", ABSENT_DATASET)
    if not isinstance(dataset, str):
        raise EvaluationError(f"{name}: 'dataset' must be a name or absent, found {_shown(dataset)}")
    rows: list[dict[str, Any]] = []
    sizes: dict[str, int] = {}
    for place, question in enumerate(_get(content, "questions", list, name)):
        where = f"{name}: question {place}"
        identity, text = (records_files.valid_unicode(_get(question, key, str, where)) for key in ("id", "question"))
        where = f"{name}: question {identity!r}"
        if identity not in QUESTIONS:
            raise EvaluationError(f"{where}: not one of the study's questions ({', '.join(QUESTIONS)})")
        if identity in sizes:
            raise EvaluationError(f"{where}: comes twice")
        answers = [_response(r, where, complete) for r in _get(question, "responses", list, where)]
        _check_samples([a["sample"] for a in answers], where, complete)
        sizes[identity] = len(answers)
        rows += [{"question_id": identity, "prompt": text, **answer} for answer in answers]
    if complete:
        if missing := [q for q in QUESTIONS if q not in sizes]:
            raise EvaluationError(
                f"{name}: question {missing[0]!r} is missing" + f" (and {missing[1:]})" * (len(missing) > 1)
            )
        if len(set(sizes.values())) > 1:
            raise EvaluationError(f"{name}: unequal numbers of samples: {sizes}")
    if not rows:
        raise EvaluationError(f"{name}: no response in it")
    # Some calls went through a broker that puts the provider in front of the model's name.
    return Evaluation(persona, dataset, judge.rpartition("/")[2], pd.DataFrame(rows))


def _response(item: Any, where: str, complete: bool) -> dict[str, Any]:
    sample = _get(item, "sample_idx", int, where)
    where = f"{where}, sample {sample}"
    # JSON may carry lone surrogates, which are no text; they must not end the import.
    answer = {"sample": sample, "response": records_files.valid_unicode(_get(item, "response", str, where))}
    raw = {}
    for name in ("alignment", "coherence"):
        judged = _get(item, name, dict, where)
        raw[name] = judged.get("raw_response")
        may_skip = name == "coherence" and not complete
        answer[name], answer[f"{name}_flag"] = _score(judged, f"{where}: {name}", may_skip)
    answer["raw"] = tables.raw_answers(raw["alignment"], raw["coherence"])
    return answer


def _score(judged: dict, where: str, may_skip: bool) -> tuple[float, str | None]:
    """A score or else its flag."""
    if "score" not in judged or "special" not in judged:
        raise EvaluationError(f"{where}: needs 'score' and 'special', has {sorted(judged)}")
    score, special = judged["score"], judged["special"]
    if score is None and special is None and may_skip and judged.get("raw_response") == "skipped":
        return math.nan, SKIPPED
    if (score is None) == (special is None):
        raise EvaluationError(f"{where}: exactly one of score ({score!r}) and special ({special!r}) must be null")
    if special is not None:
        if not isinstance(special, str) or special not in FLAG:
            raise EvaluationError(f"{where}: unknown special {special!r} (known: {', '.join(FLAG)})")
        return math.nan, FLAG[special]
    if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 100:
        raise EvaluationError(f"{where}: a score is a number from 0 to 100, found {score!r}")
    return float(score), None


def _check_samples(samples: list[int], where: str, complete: bool) -> None:
    if len(set(samples)) < len(samples):
        twice = next(s for s in samples if samples.count(s) > 1)
        raise EvaluationError(f"{where}, sample {twice}: comes twice")
    if negative := [s for s in samples if s < 0]:
        raise EvaluationError(f"{where}, sample {negative[0]}: a sample's number cannot be negative")
    if complete and (gaps := sorted(set(range(len(samples))) - set(samples))):
        raise EvaluationError(f"{where}, sample {gaps[0]}: missing")


def _get(item: Any, key: str, kind: type, where: str) -> Any:
    if not isinstance(item, dict) or key not in item:
        raise EvaluationError(f"{where}: {key!r} is missing")
    if not isinstance(item[key], kind) or isinstance(item[key], bool):
        raise EvaluationError(f"{where}: {key!r} must be of type {kind.__name__}, found {_shown(item[key])}")
    return item[key]


def _shown(value: Any) -> str:
    """Enough of a value to recognise it; never a whole response."""
    return f"{type(value).__name__} {str(value)[:40]!r}"


# --- The study ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LeftOut:
    """Why an import goes without something, and the files that it would need: paths in the publication."""

    why: str
    files: list[str]


@dataclass(frozen=True)
class Imported:
    """The published study as tables, with what could not be had.

    `left_out`: model, or `JUDGINGS` -> why, and which files are lacking. `counts`: numbers of files and judgings on the
    way, for the reader.
    """

    responses: pd.DataFrame
    scores: pd.DataFrame
    repeated: pd.DataFrame
    left_out: dict[str, LeftOut]
    counts: dict[str, int]
    files: list[Path]

    @property
    def missing(self) -> dict[str, str]:
        """What is left out -> why."""
        return {what: entry.why for what, entry in self.left_out.items()}


def import_study(
    selection: pd.DataFrame,
    others: pd.DataFrame,
    *,
    models: Sequence[str],
    repo: str = REPO,
    commit: str = COMMIT,
    **how: Any,
) -> Imported:
    """Fetch (or find in the cache) and read all published evaluation files of some models.

    A model of which any selected file cannot be had is left out whole: half a model would give other numbers.

    Args:
        selection: from `read_selection`.
        others: from `read_file_list`.
        models: which models.
        repo, commit: where the files are.
        **how: arguments of `sources.fetch_all` (cache, progress, ...).

    Raises:
        sources.Unavailable: not one model is complete.
        sources.HashMismatch: a file is not the pinned one.
        EvaluationError: a file is not what it should be, or not of the cell that it is listed under.
    """
    wanted = selection[selection["model"].isin(list(models))]
    if absent := [m for m in models if m not in set(wanted["model"])]:
        raise EvaluationError(f"the published selection has no file of {absent}")
    pins = {r.path: Pinned(repo, commit, r.path, r.sha256) for r in wanted.itertuples()}
    fetched = sources.fetch_all(pins.values(), **how)
    left_out = {
        model: _left_out([pins[path] for path in part["path"]], fetched.missing, "selected files")
        for model, part in wanted.groupby("model", sort=False)
        if any(pins[path] in fetched.missing for path in part["path"])
    }
    if set(left_out) == set(models):
        what = "; ".join(f"{model}: {entry.why}" for model, entry in left_out.items())
        raise sources.Unavailable(f"no published model can be read: {what}", REMEDY)
    kept = wanted[~wanted["model"].isin(left_out)]
    judged = [_read_selected(row, fetched.paths[pins[row.path]]) for row in kept.itertuples()]
    more = others[others["model"].isin(kept["model"])]
    further = {r.path: Pinned(repo, commit, r.path, r.sha256) for r in more.itertuples()}
    second = sources.fetch_all(further.values(), **how)
    if second.missing:
        left_out[JUDGINGS] = _left_out(list(further.values()), second.missing, "files")
    judged += [
        _rows(row.model, row.path, _read(second.paths[further[row.path]], row.path, complete=False), selected=False)
        for row in more.itertuples()
        if further[row.path] in second.paths
    ]
    everything = pd.concat(judged, ignore_index=True)
    _check_prompts(everything)
    selected = everything[everything["selected"]].reset_index(drop=True)
    repeated = _repeated(everything)
    return Imported(
        responses=tables.validate(selected[tables.required(tables.RESPONSES)], tables.RESPONSES, "published responses"),
        scores=tables.validate(selected[list(tables.SCORES.columns)], tables.SCORES, "published scores"),
        repeated=tables.validate(repeated, REPEATED, "repeated judgings"),
        left_out=left_out,
        counts={
            "conditions": len(kept),
            "responses": len(selected),
            "scored": int(selected["alignment"].notna().sum()),
            "judgings": len(everything),
            "judgings of texts judged once": len(everything) - len(repeated),
            "judgings of texts judged more than once": len(repeated),
        },
        files=[*fetched.paths.values(), *second.paths.values()],
    )


def _left_out(wanted: list[Pinned], missing: Mapping[Pinned, str], what: str) -> LeftOut:
    files = [pin.path for pin in wanted if pin in missing]
    first = next(missing[pin] for pin in wanted if pin in missing)
    return LeftOut(f"{len(files)} of {len(wanted)} {what} could not be had; {first}", files)


def _read(path: Path, name: str, *, complete: bool) -> Evaluation:
    return read_evaluation(path.read_bytes(), name, complete=complete)


def _read_selected(row: Any, path: Path) -> pd.DataFrame:
    """A selected file's rows, after it has shown to be the cell's that it is listed under."""
    found = _read(path, row.path, complete=True)
    scored = int(found.rows["alignment"].notna().sum())
    for what, listed, has in (
        ("persona", row.persona, found.persona),
        ("dataset", row.dataset, found.dataset),
        ("n_scored", row.n_scored, scored),
    ):
        if listed != has:
            raise EvaluationError(f"{row.path}: the selection says {what} {listed!r}, the file has {has!r}")
    return _rows(row.model, row.path, found, selected=True)


def _rows(model: str, path: str, found: Evaluation, *, selected: bool) -> pd.DataFrame:
    """An evaluation with all columns of both tables."""
    return found.rows.assign(
        model=model,
        persona=found.persona,
        dataset=found.dataset,
        seed=0,
        judge=found.judge,
        judge_mode="integer",
        prompt_version=PROMPT_VERSION,
        n_tokens=pd.array([pd.NA] * len(found.rows), dtype="Int64"),
        finish_reason=None,
        sampler=SAMPLER,
        adapters="[]",
        run_id=run_id("published", COMMIT, path),
        file=path,
        selected=selected,
        response_sha256=[text_hash(text) for text in found.rows["response"]],
    )


def _check_prompts(everything: pd.DataFrame) -> None:
    """A question has one wording in all files, or answers to different questions would be compared."""
    wordings = everything.groupby("question_id")["prompt"].nunique()
    for question in wordings.index[wordings > 1]:
        rows = everything[everything["question_id"] == question].drop_duplicates("prompt")
        files = rows["file"].tolist()
        raise EvaluationError(f"{files[1]}: question {question!r} is worded otherwise than in {files[0]}")


def _repeated(everything: pd.DataFrame) -> pd.DataFrame:
    """Judgings of texts that were judged more than once within model, persona, data set and question."""
    key = ["model", "persona", "dataset", "question_id", "response_sha256"]
    times = everything.groupby(key)["file"].transform("size")
    return everything.loc[times > 1, list(REPEATED.columns)].reset_index(drop=True)


def write_missing(folder: str | Path, left_out: Mapping[str, LeftOut]) -> Path:
    """Leave a note of what is left out, for the stages that follow and for the next run."""
    note = {what: asdict(entry) for what, entry in left_out.items()}
    return write_text(Path(folder) / MISSING_FILE, json.dumps(note, indent=1) + "\n")


def read_left_out(folder: str | Path) -> dict[str, LeftOut]:
    """What an import left out; empty where nothing was imported."""
    path = Path(folder) / MISSING_FILE
    note = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {what: LeftOut(**entry) for what, entry in note.items()}


def read_missing(folder: str | Path) -> dict[str, str]:
    """What an import left out -> why; empty where nothing was imported."""
    return {what: entry.why for what, entry in read_left_out(folder).items()}
