"""Controls that belong to every run: what must show nothing shows nothing, what must show something does.

- *A/A*: the baseline against itself, every other response of a cell against the rest, by the estimand itself.
- *random adapter*: a persona that is none (a random direction of the same norm): its contrast should be nothing.
- *uptake*: the baseline's answers in the data sets' own domains moved towards their rows.

Negative controls fail at p < 0.01, for they are seen in every run; uptake fails where its interval ends below what
matters, and is unclear where it holds both that and nothing. A control that could not be run says so.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from cai_em.analysis.contrasts import POOLED, Cube, estimate_mean, find_all
from cai_em.analysis.gates import ABSENT, LEARNED_MATTERS, PRESENT, learned_gate
from cai_em.records.keys import BASELINE

PASSED, FAILED, UNCLEAR, NOT_RUN = "passed", "failed", "unclear", "not run"

LEVEL = 0.01
"""A negative control fails below this p."""

CONTROL_COLUMNS = ["model", "control", "about", "status", "estimate", "low", "high", "p", "reason"]


def halves(scores: pd.DataFrame) -> pd.DataFrame:
    """The baseline's rows as two personas: every other response of each cell is `A/A`."""
    rows = scores[scores["persona"] == BASELINE]
    rows = rows.sort_values("sample", kind="stable")
    odd = rows.groupby(["model", "dataset", "seed", "question_id"], sort=False).cumcount() % 2 == 1
    return rows.assign(persona=odd.map({True: "A/A", False: BASELINE}))


def controls(
    scores: pd.DataFrame,
    contrasts: pd.DataFrame,
    datasets: Iterable[Any],
    *,
    random: Collection[str] = (),
    moved: Mapping[tuple[str, str, str], np.ndarray] | None = None,
    level: float = LEVEL,
    alpha: float = 0.05,
    learned_matters: float = LEARNED_MATTERS,
) -> pd.DataFrame:
    """Every control that the data allow.

    Args:
        scores: score table of one judge. contrasts: from `contrast_table`.
        random: personas that are control adapters.
        moved: from `gates.uptakes`.
        level: below which p of a negative control fails. alpha, learned_matters: of the uptake, as its gate's.

    Returns:
        `CONTROL_COLUMNS`, by model.
    """
    em = [d for d in datasets if d.role == "em"]
    halved = halves(scores)
    twice = halved.groupby(["model", "dataset", "seed", "question_id"]).size().gt(1).all()
    cube = Cube.build(halved) if len(halved) and twice else None
    rows = []
    for model in scores["model"].unique():
        rows.append({"model": model, "control": "A/A", "about": BASELINE, **_same(cube, model, em, level)})
        for name in sorted(random):
            mine = contrasts[(contrasts["model"] == model) & (contrasts["persona"] == name)]
            mine = mine[(mine["dataset"] == POOLED) & (mine["outcome"] == "points")]
            mine = mine.sort_values("estimand", key=lambda e: e != "susceptibility", kind="stable")
            found = mine.iloc[0].to_dict() if len(mine) else {}
            rows.append({"model": model, "control": "random adapter", "about": name, **_nothing(found, level)})
        uptake = _learned(moved or {}, model, em, alpha, learned_matters)
        rows.append({"model": model, "control": "uptake", "about": BASELINE, **uptake})
    return pd.DataFrame(rows, columns=CONTROL_COLUMNS)


def _same(cube: Cube | None, model: str, em: list[Any], level: float) -> dict[str, Any]:
    for estimand in ("susceptibility", "after") if cube is not None else ():
        for reference in ("none", "twin"):
            found = [c.values(cube) for c in find_all(cube, estimand, model, "A/A", em, reference)]
            if found:
                e = estimate_mean(found)
                low, high = e.interval()
                return _nothing({"estimate": e.mean, "low": low, "high": high, "p": e.p()}, level)
    return {"status": NOT_RUN, "reason": "fewer than two responses to a question, or no EM data set"}


def _nothing(found: dict[str, Any], level: float) -> dict[str, Any]:
    if not found or math.isnan(found["p"]):
        return {"status": NOT_RUN, "reason": "no contrast"}
    kept = {k: found[k] for k in ("estimate", "low", "high", "p")}
    said = f"{found['estimate']:+.1f} points, p {found['p']:.3g}, fails below {level:g}"
    return kept | {"status": FAILED if found["p"] < level else PASSED, "reason": said}


def _learned(
    moved: Mapping[tuple[str, str, str], np.ndarray], model: str, em: list[Any], alpha: float, matters: float
) -> dict[str, Any]:
    parts = [moved[model, BASELINE, d.key] for d in em if (model, BASELINE, d.key) in moved]
    if not any(len(part) for part in parts):
        return {"status": NOT_RUN, "reason": "no answers in the data sets' own domains"}
    gate = learned_gate(parts, BASELINE, alpha=alpha, matters=matters)
    return {"status": {PRESENT: PASSED, ABSENT: FAILED}.get(gate.status, UNCLEAR), "reason": gate.reason}
