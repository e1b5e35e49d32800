"""Schemas of the tables that pass between the stages: declared once, checked on every write and read.

The score table is the hinge of the project: whatever was trained here or published elsewhere becomes the same
table, and everything after it is one code path. A response without a score is kept, with the flag that says why;
exactly one of score and flag is null, so nothing can be dropped silently.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd
import pandera.pandas as pa

from cai_em.records import files
from cai_em.records.files import atomic, valid_unicode
from cai_em.records.keys import CONDITION, FLAGS, KEY, SKIPPED

# --- Tables on disk -----------------------------------------------------------------------------------------------


def write_tables(tables: Mapping[str, pd.DataFrame], folder: str | Path, *, only: bool = False) -> list[Path]:
    """Write each table as Parquet (exact) and CSV (to read), atomically.

    Args:
        tables: name -> table.
        folder: where `<name>.parquet` and `<name>.csv` go.
        only: the folder is of these tables alone: others there are of an earlier run, and are removed.

    Returns:
        The paths.
    """
    paths = []
    for name, table in tables.items():
        for suffix, write in ((".parquet", table.to_parquet), (".csv", table.to_csv)):
            path = Path(folder) / f"{name}{suffix}"
            with atomic(path) as part:
                write(part, index=False)
            paths.append(path)
    if only:
        remove_others(folder, [path.name for path in paths], (".parquet", ".csv"))
    return paths


def remove_others(folder: str | Path, made: Iterable[str], suffixes: Sequence[str]) -> None:
    """Remove from a folder the files with these suffixes that an earlier run made there and this one did not."""
    made = set(made)
    for path in Path(folder).iterdir():
        if path.suffix in suffixes and path.name not in made:
            path.unlink()


def read_tables(folder: str | Path) -> dict[str, pd.DataFrame]:
    """The tables that `write_tables` wrote.

    Raises:
        FileNotFoundError: the folder has none.
    """
    paths = sorted(Path(folder).glob("*.parquet"))
    if not paths:
        raise FileNotFoundError(f"{folder}: no tables there: run the stage that writes them (./run_all.sh) first")
    return {path.stem: pd.read_parquet(path) for path in paths}


JUDGE_MODES = ("integer", "logprob", "local")


class TableError(ValueError):
    """A table does not have the declared schema. The message names the table, the column and examples."""


def _text(nullable: bool = False) -> pa.Column:
    return pa.Column(str, nullable=nullable, coerce=True)


def _score() -> pa.Column:
    return pa.Column(float, pa.Check.in_range(0, 100), nullable=True, coerce=True)


def _flag(*more: str) -> pa.Column:
    return pa.Column(str, pa.Check.isin([*FLAGS, *more]), nullable=True, coerce=True)


_KEY_COLUMNS = {
    "model": _text(),
    "persona": _text(),
    "dataset": _text(),
    "seed": pa.Column("int64", pa.Check.ge(0), coerce=True),
    "question_id": _text(),
    "sample": pa.Column("int64", pa.Check.ge(0), coerce=True),
}


def _one_of(score: str, flag: str) -> pa.Check:
    return pa.Check(
        lambda t: t[score].isna() != t[flag].isna(),
        error=f"exactly one of {score} and {flag} must be null",
    )


RESPONSES = pa.DataFrameSchema(
    {
        **_KEY_COLUMNS,
        "prompt": _text(),
        "response": _text(),
        "n_tokens": pa.Column("Int64", nullable=True, coerce=True),
        "finish_reason": _text(nullable=True),
        "sampler": _text(),
        "adapters": _text(),
        "run_id": _text(),
        "context": pa.Column(str, nullable=True, coerce=True, required=False),
    },
    unique=KEY,
    strict=True,
    ordered=True,
    name="responses",
)
SCORES = pa.DataFrameSchema(
    {
        **_KEY_COLUMNS,
        "judge": _text(),
        "judge_mode": pa.Column(str, pa.Check.isin(JUDGE_MODES), coerce=True),
        "prompt_version": _text(),
        "alignment": _score(),
        "alignment_flag": _flag(),
        "coherence": _score(),
        "coherence_flag": _flag(SKIPPED),
        "raw": _text(),
    },
    checks=[_one_of("alignment", "alignment_flag"), _one_of("coherence", "coherence_flag")],
    unique=[*KEY, "judge", "judge_mode", "prompt_version"],
    strict=True,
    ordered=True,
    name="scores",
)
CAPABILITY = pa.DataFrameSchema(
    {
        **{name: column for name, column in _KEY_COLUMNS.items() if name in CONDITION},
        "item": _text(),
        "subject": _text(),
        "options": pa.Column("int64", pa.Check.ge(2), coerce=True),
        "chosen": pa.Column("int64", pa.Check.ge(0), coerce=True),
        "correct": pa.Column(bool, coerce=True),
        "margin": pa.Column(float, coerce=True),
    },
    unique=[*CONDITION, "item"],
    strict=True,
    ordered=True,
    name="capability",
)
"""Multiple-choice answers of conditions. `margin`: log-probability a token of the right option less the best wrong
one's (infinite where an option was out of an engine's sight)."""
PAIRS = pa.DataFrameSchema(
    {
        "persona": _text(),
        "trait": _text(),
        "prompt": _text(),
        "chosen": _text(),
        "rejected": _text(),
        "source": pa.Column(str, pa.Check.isin(("teacher", "demonstration")), coerce=True),
        "dropped_because": _text(nullable=True),
    },
    strict=True,
    ordered=True,
    name="pairs",
)


def required(schema: pa.DataFrameSchema) -> list[str]:
    """The columns that every table of a schema has, in order."""
    return [name for name, column in schema.columns.items() if column.required]


def validate(table: pd.DataFrame, schema: pa.DataFrameSchema, where: str = "") -> pd.DataFrame:
    """Check a table against its schema and return it with the declared dtypes and column order.

    Args:
        table: the table; columns may stand in any order, an index is dropped. Lone surrogates in texts become U+FFFD.
        schema: `RESPONSES`, `SCORES` or `PAIRS` (or another pandera schema).
        where: what to name in an error, usually the file.

    Raises:
        TableError: a column is missing, unknown or of the wrong type, or a value or key is not allowed. Every
            failing check is listed with up to three example rows.
    """
    place = f"{where}: " if where else ""
    wanted = [name for name in schema.columns if name in {*required(schema), *table.columns}]
    missing = [c for c in wanted if c not in table.columns]
    unknown = [c for c in table.columns if c not in wanted]
    if missing or unknown:
        raise TableError(f"{place}table '{schema.name}' has missing columns {missing} and unknown columns {unknown}")
    table = table[wanted].reset_index(drop=True)
    for column in wanted:
        spec = schema.columns[column]
        # A column of nulls only has no type of its own; pandera would call it an object or a float.
        if str(spec.dtype) == "str" and spec.nullable and table[column].isna().all():
            table[column] = table[column].astype("str")
        elif table[column].dtype == object:  # no other dtype can hold a lone surrogate
            table[column] = table[column].map(lambda v: valid_unicode(v) if isinstance(v, str) else v)
    try:
        return schema.validate(table, lazy=True)
    except pa.errors.SchemaErrors as error:
        cases = error.failure_cases
        lines = []
        for (column, check), group in cases.groupby(["column", "check"], dropna=False, sort=False):
            rows = [f"row {i}: {v!r}" for i, v in zip(group["index"].head(3), group["failure_case"].head(3))]
            lines.append(f"  {column}: {check} fails for {len(group)} value(s), e.g. " + "; ".join(rows))
        raise TableError(f"{place}table '{schema.name}' is not valid:\n" + "\n".join(lines)) from error


def write_table(table: pd.DataFrame, schema: pa.DataFrameSchema, path: str | Path) -> Path:
    """Validate a table and write it as Parquet, atomically: a reader sees the old file or the whole new one."""
    path = Path(path)
    table = validate(table, schema, str(path))
    with files.atomic(path) as part:
        table.to_parquet(part, index=False)
    return path


def read_table(path: str | Path, schema: pa.DataFrameSchema) -> pd.DataFrame:
    """Read a Parquet table and validate it.

    Raises:
        FileNotFoundError: no such file; the message names the stage that writes it, as the folder tells.
        TableError: the table does not have the declared schema.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: run the stage that writes it (./run_all.sh) first")
    return validate(pd.read_parquet(path), schema, str(path))


def read_all(paths: Sequence[str | Path], schema: pa.DataFrameSchema) -> pd.DataFrame:
    """Read several Parquet tables of one schema into one, validated as a whole (keys unique across files)."""
    if not paths:
        raise ValueError(f"no files given for table '{schema.name}'")
    return validate(pd.concat([read_table(p, schema) for p in paths], ignore_index=True), schema, f"{len(paths)} files")


def one_judge(scores: pd.DataFrame) -> str:
    """The name of the one judge that gave all scores: conditions judged by several are not comparable.

    Raises:
        TableError: several judges, modes or versions of prompts (of training texts, for the local judge); each is named
            with the conditions that it judged.
    """
    found = scores.groupby(["judge", "judge_mode", "prompt_version"], sort=False)
    if len(found) > 1:
        who = [
            f"{' / '.join(key)} judged {', '.join(dict.fromkeys(part['model'] + ' ' + part['persona']))}"
            for key, part in found
        ]
        raise TableError(
            f"scores of {len(found)} judges in one study: {'; '.join(who)}. Remove 04_judge from its results and run "
            "again, so that one judge scores all (answers that were paid for stay in the cache)"
        )
    return str(scores["judge"].iloc[0])


def with_responses(scores: pd.DataFrame, responses: pd.DataFrame) -> pd.DataFrame:
    """Scores with `prompt`, `response` and what else the responses table knows, joined on `KEY`.

    Raises:
        TableError: a score has no response (a response without a score is an error of the judge stage, which
            writes a flagged row for each; it is raised here too).
    """
    joined = scores.merge(responses, on=KEY, how="outer", indicator=True, validate="many_to_one")
    lonely = joined["_merge"].value_counts()
    if lonely.get("left_only", 0) or lonely.get("right_only", 0):
        raise TableError(
            f"{lonely.get('left_only', 0)} scores without a response and "
            f"{lonely.get('right_only', 0)} responses without a score: judge and sample stages do not match"
        )
    return joined.drop(columns="_merge")


def raw_answers(aligned: object, coherent: object) -> str:
    """The `raw` column: both raw answers of the judge as JSON text."""
    return valid_unicode(json.dumps({"aligned": aligned, "coherent": coherent}, ensure_ascii=False))
