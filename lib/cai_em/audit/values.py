"""What stands in a score column of somebody's file: a number, a number as text, a word, or nothing, of three meanings.

    parse_score("85")        -> (85.0, None)
    parse_score("REFUSAL")   -> (None, "REFUSAL")
    parse_score("nan")       -> (None, "OTHER")      # refusal, code or error alike: the file does not say

A whole column is parsed at once by `parse_scores`; each distinct value only once.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd

UNSAID = "OTHER"
"""No score, and no reason said: NaN may be a refusal, code or an error; or a word that is none of ours."""

NOTHING = {"", "nan", "null", "none", "na", "n/a", "#n/a", "-", "<na>", "nat"}
"""Texts that mean: no value."""

NO_FLAG = {"none", "ok", "valid", "no", "false", "0", "no_flag", "normal", "success", "scored"}
"""Values of a flag column that flag nothing."""

_WORDS = (
    ("REFUSAL", re.compile(r"refus|declin", re.IGNORECASE)),
    ("CODE", re.compile(r"\bcode\b|is_code|contains_code", re.IGNORECASE)),
    ("API", re.compile(r"\bapi|error|exception|timeout|rate.?limit|fail", re.IGNORECASE)),
    ("PARSE", re.compile(r"pars|unreadable|invalid|format|malformed", re.IGNORECASE)),
    ("SKIPPED", re.compile(r"skipped|not.?asked|not.?judged", re.IGNORECASE)),
)
_NUMBER = re.compile(
    r"\s*[\"'(\[]?\s*([+-]?\d+(?:[.,]\d+)?(?:[eE][+-]?\d+)?)\s*(?:/\s*(?:100|10|1|5)|%|\.)?\s*[\"')\]]?\s*"
)


def flag_of(word: str) -> str:
    """Our flag for a word in a score or flag column: by what it says, `OTHER` where it is none that we know."""
    return next((flag for flag, pattern in _WORDS if pattern.search(word)), UNSAID)


def parse_score(value: Any, lowest: float = 0.0, highest: float = 100.0) -> tuple[float | None, str | None]:
    """A score on its own scale, or else a flag: exactly one of both.

    Args:
        value: what stands in the file.
        lowest, highest: the scale's ends; a number outside of them is `PARSE`, never cut to them.
    """
    if isinstance(value, bool | np.bool_):
        value = int(value)
    if isinstance(value, Decimal):
        value = float(value)
    if isinstance(value, str):
        text = value.strip()
        if text.casefold() in NOTHING:
            return None, UNSAID
        text = {"true": "1", "false": "0"}.get(text.casefold(), text)  # a table's booleans, as text
        match = _NUMBER.fullmatch(text)
        if not match:
            known = flag_of(text)
            # A sentence instead of a number is an answer that could not be parsed; a single word is a label.
            return None, known if known != UNSAID or len(text.split()) == 1 else "PARSE"
        value = float(match[1].replace(",", "."))
    if value is None or not isinstance(value, int | float | np.number) or math.isnan(value):
        return None, UNSAID if value is None or isinstance(value, float | np.floating) else "PARSE"
    return (float(value), None) if lowest <= value <= highest else (None, "PARSE")


def parse_scores(
    values: pd.Series, *, lowest: float = 0.0, highest: float = 100.0, higher_is_better: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """A column of scores on our scale (0 to 100, high is good), and of flags: exactly one is null in each place.

    Args:
        values: as in the file.
        lowest, highest: ends of the file's scale.
        higher_is_better: False turns it around: a trait whose presence is bad.

    Returns:
        (n,) float and (n,) object.
    """
    codes, distinct = pd.factorize(values.map(_hashable), use_na_sentinel=True)
    parsed = [parse_score(v, lowest, highest) for v in distinct] + [(None, UNSAID)]  # the sentinel, -1, is the last
    numbers = np.array([math.nan if score is None else score for score, _ in parsed])
    numbers = (numbers - lowest) / (highest - lowest) * 100
    if not higher_is_better:
        numbers = 100 - numbers
    flags = np.array([flag for _, flag in parsed], dtype=object)
    # Whole numbers stay whole: 0.07 x 100 is not 7 to a computer.
    return np.round(numbers, 6)[codes], flags[codes]


def _hashable(value: Any) -> Any:
    return str(value) if isinstance(value, list | dict | set | np.ndarray) else value


def parse_flags(values: pd.Series) -> np.ndarray:
    """A column of flags in ours: null where nothing is flagged. (n,) object."""
    known: dict[Any, str | None] = {}
    result = []
    for value in values.map(_hashable):
        if value not in known:
            text = (
                ""
                if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value))
                else str(value).strip()
            )
            known[value] = None if text.casefold() in NOTHING | NO_FLAG else flag_of(text)
        result.append(known[value])
    return np.array(result, dtype=object)


def is_true(values: pd.Series) -> np.ndarray:
    """A column that says yes or no (`True`, `1`, `yes`, `CODE`) as (n,) bool; nothing is no."""
    no = NOTHING | NO_FLAG | {"f", "n", "0.0"}
    return np.array([v is not None and str(v).strip().casefold() not in no for v in values.map(_hashable)], dtype=bool)
