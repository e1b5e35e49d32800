"""Numbers as text: the only formatters, so that one number reads the same wherever it stands.

Published numbers were rounded twice: stored with 2 decimals (3 for d, 6 for p), then printed with fewer. So 89.6497
is stored as 89.65 and printed as 89.7. `rounded_twice` does the same, or the last digits would not be the published
ones. The paper's forms (`typeset_...`) are the same numbers with typographic minus signs and spaces that do not break.
"""

from __future__ import annotations

import math

import pandas as pd

STARS = ((0.001, "***"), (0.01, "**"), (0.05, "*"))
NONE = "–"
"""Printed where there is no number."""


def fixed(value: float | None, digits: int = 1, signed: bool = False) -> str:
    """A number with so many decimals and a typographic minus; an en dash where there is none, and no minus before 0."""
    if value is None or pd.isna(value):
        return NONE
    return f"{round(float(value), digits) + 0.0:{'+' if signed else ''}.{digits}f}".replace("-", "−")


def plain_number(value: float, form: str = ".2f") -> str:
    """A number in a format of Python's; an en dash where there is none."""
    return NONE if math.isnan(value) else format(value, form)


def rounded_twice(value: float | None, stored: int, printed: int, sign: bool = False) -> str:
    """A number as the published study has it: rounded to `stored` decimals, then printed with `printed`."""
    if value is None or math.isnan(value):
        return NONE
    return f"{round(value, stored):{'+' if sign else ''}.{printed}f}"


def points(value: float | None, signed: bool = False) -> str:
    """Points of alignment: 89.7; with its sign, a difference."""
    return rounded_twice(value, 2, 1, sign=signed)


def delta(value: float | None) -> str:
    """A difference in points: +0.4."""
    return points(value, signed=True)


def effect(value: float) -> str:
    """An effect size: 0.045."""
    return rounded_twice(value, 3, 3)


def published_p(value: float) -> str:
    """A p value with four decimals, as the published document has it."""
    return rounded_twice(value, 6, 4)


def p_value(value: float | None) -> str:
    """A p value to read: three decimals, or a bound."""
    if value is None or math.isnan(value):
        return NONE
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def stars(p: float) -> str:
    """`***` below 0.001, `**` below 0.01, `*` below 0.05."""
    return next((mark for limit, mark in STARS if p < limit), "")


def interval(low: float, high: float) -> str:
    """[89.1, 90.2]."""
    return f"[{points(low)}, {points(high)}]"


def level(confidence: float) -> str:
    """A level of confidence: 95%."""
    return f"{100 * confidence:g}%"


def percent(share: float | None, decimals: int = 1) -> str:
    """A share as per cent: 11.0 %."""
    return NONE if share is None or math.isnan(share) else f"{100 * share:.{decimals}f} %"


# --- As the paper sets them ----------------------------------------------------------------------------------------


def typeset_points(value: float | None, signed: bool = False) -> str:
    """`points` with a typographic minus."""
    return fixed(None if value is None else round(value, 2), 1, signed)


def typeset_interval(low: float, high: float, digits: int = 1, signed: bool = False) -> str:
    """An interval whose brackets make no Markdown link, and which never breaks."""
    if pd.isna(low):
        return NONE
    ends = (typeset_points(v, signed) if digits == 1 else fixed(v, digits, signed) for v in (low, high))
    return "\\[" + ",\u00a0".join(ends) + "\\]"


def typeset_range(low: float, high: float, digits: int = 1) -> str:
    """From the least to the most."""
    return f"{fixed(low, digits)} to {fixed(high, digits)}"


def typeset_p(value: float) -> str:
    """`p_value`, never broken."""
    return p_value(None if pd.isna(value) else value).replace(" ", "\u00a0")


def typeset_percent(share: float, digits: int = 1) -> str:
    """A share as per cent, without the sign."""
    return fixed(100 * share, digits)
