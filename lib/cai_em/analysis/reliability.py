"""How well judgings of the same responses agree, and what that leaves room for.

A *judging* is one run of one judge over responses: a file. The same response judged several times gives the judge's
noise directly: how often two judgings give the same number, how far they differ, how far a condition's mean moves from
one judging to the next, and the smallest difference between two conditions that is larger than that.

    table = judged_units(repeated)
    agreement(table); movement(table); smallest_effect(table)
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from cai_em.analysis.units import icc1

JUDGED_CELL = ["model", "persona", "dataset"]


def judged_units(repeated: pd.DataFrame, response: str = "response_sha256") -> pd.DataFrame:
    """Repeated judgings with the unit that each row judges, the units judged once left out.

    A unit is a response: condition, question, text, and, where one judging has the same text several times, which of
    them in the order of the sample numbers.

    Args:
        repeated: score columns and `file` (the judging), `selected` (whether the published tables came from it), and
            the response's hash.
        response: name of the hash column.

    Returns:
        The rows of units with two judgings or more, with `unit`, and `alignment` as float.

    Raises:
        ValueError: a column is missing.
    """
    missing = [
        c
        for c in [*JUDGED_CELL, "question_id", "sample", "judge", "file", "selected", "alignment", response]
        if c not in repeated
    ]
    if missing:
        raise ValueError(f"table of repeated judgings lacks columns {missing}; it has {list(repeated)}")
    key = [*JUDGED_CELL, "question_id", response]
    table = repeated.sort_values("sample", kind="stable")
    table = table.assign(which=table.groupby(["file", *key]).cumcount())
    table["unit"] = table.groupby([*key, "which"]).ngroup()
    several = table.groupby("unit")["file"].transform("nunique") > 1
    return table[several].drop(columns="which").reset_index(drop=True)


def _pairs(table: pd.DataFrame) -> pd.DataFrame:
    """Every pair of judgings of every unit: judges, files, both scores (NaN: none)."""
    columns = ["unit", "judge", "file", "alignment", *JUDGED_CELL]
    table = table[columns].sort_values(["unit", "judge", "file"], kind="stable").reset_index(drop=True)
    place = table.groupby("unit").cumcount()
    both = []
    for step in range(1, int(place.max()) + 1 if len(place) else 1):
        other = table.shift(-step)
        same = (other["unit"] == table["unit"]).to_numpy()
        pair = table[same].rename(columns={"judge": "judge_a", "file": "file_a", "alignment": "a"})
        both.append(pair.assign(judge_b=other["judge"][same], file_b=other["file"][same], b=other["alignment"][same]))
    return pd.concat(both, ignore_index=True) if both else pd.DataFrame(columns=[*columns, "judge_b", "file_b", "b"])


def alpha(table: pd.DataFrame) -> float:
    """Krippendorff's alpha for interval data over all judgings of the table; NaN where it is undefined.

    1 - observed / expected disagreement (Krippendorff 2011) as sums of squares: the general form, over a matrix of all
    pairs of values, would need terabytes for scores that are no integers.
    """
    scored = table[table["alignment"].notna()]
    several = scored[scored.groupby("unit")["unit"].transform("size") > 1]
    values = several["alignment"].to_numpy(float)
    n = len(values)
    expected = float(((values - values.mean()) ** 2).sum() / (n - 1)) if n else 0.0
    if expected == 0:
        return math.nan
    within = several.groupby("unit")["alignment"].agg(["var", "size"])
    return 1 - float((within["size"] * within["var"]).sum() / n) / expected


def _agreement(pairs: pd.DataFrame, rows: pd.DataFrame) -> dict[str, Any]:
    scored = pairs[pairs["a"].notna() & pairs["b"].notna()]
    gap = (scored["b"] - scored["a"]).to_numpy(float)
    several = rows[rows["alignment"].notna()]
    several = several[several.groupby("unit")["unit"].transform("size") > 1]
    return {
        "units": int(pairs["unit"].nunique()),
        "pairs": len(scored),
        "one_missing": int((pairs["a"].isna() != pairs["b"].isna()).sum()),
        "exact": float(np.mean(gap == 0)) if len(gap) else math.nan,
        "within_5": float(np.mean(np.abs(gap) <= 5)) if len(gap) else math.nan,
        "mean_abs_difference": float(np.abs(gap).mean()) if len(gap) else math.nan,
        "mean_difference": float(gap.mean()) if len(gap) else math.nan,
        "noise_sd": float(math.sqrt(np.mean(gap**2) / 2)) if len(gap) else math.nan,
        "icc": icc1(several["alignment"].to_numpy(), several["unit"].to_numpy()) if len(several) else math.nan,
        "alpha": alpha(rows),
    }


def agreement_of_judgings(table: pd.DataFrame, least: int = 20) -> pd.DataFrame:
    """Agreement within each judge and between each pair of judges.

    Args:
        table: from `units`.
        least: pairs of judges with fewer pairs of scores are left out.

    Returns:
        One row per pair of judges: `judge_a, judge_b, kind` (within, between), `units, pairs, one_missing` (pairs of
        which one judging gave no score), `exact, within_5` (shares), `mean_abs_difference, mean_difference` (b - a;
        within a judge files are in the order of their names), `noise_sd` (SD of one judging, sqrt(mean square / 2)),
        `icc` (ICC(1)), `alpha` (Krippendorff, interval).
    """
    pairs = _pairs(table)
    rows = []
    for (a, b), part in pairs.groupby(["judge_a", "judge_b"]):
        # Between judges, alpha and ICC take one judging of each, so that agreement within a judge does not enter.
        part = part if a == b else part.drop_duplicates(["unit"])
        files = pd.concat([part[["unit", "file_a"]].set_axis(["unit", "file"], axis=1),
                           part[["unit", "file_b"]].set_axis(["unit", "file"], axis=1)]).drop_duplicates()  # fmt: skip
        judged = table.merge(files, on=["unit", "file"])
        found = _agreement(part, judged)
        if found["pairs"] >= least:
            rows.append({"judge_a": a, "judge_b": b, "kind": "within" if a == b else "between", **found})
    return pd.DataFrame(rows)


def movement(table: pd.DataFrame, least: int = 20) -> pd.DataFrame:
    """How far each condition's mean moves from one judging to another, of the same responses.

    A judging's *own* mean is over what it gave a number. Whether a response gets a number or a flag is the judge's
    word, too: leaving out what another judging flagged would take a part of the noise for none. The means over what all
    of them gave a number stand beside.

    Args:
        table: from `units`.
        least: a judging with fewer units in common with the rest is left out.

    Returns:
        One row per condition and judge with two judgings or more: `judgings, units` (judged by all of them), `lowest,
        highest, spread, sd` (of their own means), `selected` (the own mean of the published judging, NaN where it is
        not among them), `selected_rank` (1: the lowest), `means` (text, ascending), `scored` (text, in the same order),
        and `common_units` (given a number by all), `common_means, common_spread, common_selected`. Spreads and SDs are
        NaN where all scores are the same number: such a judging can show no noise.
    """
    rows = []
    for (*cell, judge), part in table.groupby([*JUDGED_CELL, "judge"]):
        part = part.assign(row=1)
        asked = part.pivot_table(index="unit", columns="file", values="row", aggfunc="size", fill_value=0) > 0
        asked = asked.loc[:, asked.sum() >= least]
        # Judgings of disjoint sets of responses have nothing to compare; keep those that share units with the fullest.
        if asked.shape[1] > 1:
            fullest = asked.columns[asked.sum().argmax()]
            shared = asked[asked[fullest]]
            shared = shared.loc[:, shared.sum() >= least]
            asked = shared[shared.all(axis=1)]
        if asked.shape[1] < 2 or len(asked) < least:
            continue
        grid = part.pivot_table(index="unit", columns="file", values="alignment", aggfunc="first", dropna=False)
        grid = grid.loc[asked.index, asked.columns]
        means = grid.mean().sort_values(kind="stable")
        common = grid.dropna()
        constant = bool(grid.max(axis=None) == grid.min(axis=None))
        chosen = set(part.loc[part["selected"].astype(bool), "file"]) & set(means.index)
        rank = next((i + 1 for i, f in enumerate(means.index) if f in chosen), None)
        alike = common.mean().sort_values()
        rows.append(
            {
                **dict(zip(JUDGED_CELL, cell)),
                "judge": judge,
                "judgings": len(means),
                "units": len(grid),
                "lowest": float(means.iloc[0]),
                "highest": float(means.iloc[-1]),
                "spread": math.nan if constant else float(means.iloc[-1] - means.iloc[0]),
                "sd": math.nan if constant else float(means.std(ddof=1)),
                "selected": float(means.iloc[rank - 1]) if rank else math.nan,
                "selected_rank": rank,
                "means": ", ".join(f"{m:.2f}" for m in means),
                "scored": ", ".join(str(n) for n in grid[means.index].notna().sum()),
                "common_units": len(common),
                "common_means": ", ".join(f"{m:.2f}" for m in alike) if len(common) else "",
                "common_spread": math.nan if constant else float(alike.max() - alike.min()),
                "common_selected": float(common[means.index[rank - 1]].mean()) if rank else math.nan,
            }
        )
    table = pd.DataFrame(rows)
    return table.astype({"selected_rank": "Int64"}) if len(table) else table


def smallest_effect(table: pd.DataFrame, *, n: int = 400, confidence: float = 0.95, least: int = 20) -> pd.DataFrame:
    """The smallest difference of two conditions' means that a judge's noise leaves room for.

    Judging the same two conditions again would move their difference by sqrt(2 (tau^2 + sigma^2 / n)): tau is how far
    a whole judging's own mean moves beyond the noise of single scores (drift of the judge, and its word on what gets a
    score at all), sigma the SD of a single score's repeats. A difference below z times that may be the judge's alone.

    Args:
        table: from `units`.
        n: responses per condition.

    Returns:
        One row per judge with repeats: `judge, sigma, tau, conditions` (with repeated means), `smallest`. All NaN where
        the judge gave every response that it saw again the same number: that shows a constant, and no absence of noise.
    """
    moved = movement(table, least)
    within = agreement_of_judgings(table, least)
    rows = []
    for judge in within.loc[within["kind"] == "within", "judge_a"] if len(within) else []:
        sigma = float(within.loc[(within["judge_a"] == judge) & (within["judge_b"] == judge), "noise_sd"].iloc[0])
        given = table[(table["judge"] == judge) & table["alignment"].notna()]
        again = given.loc[given.groupby("unit")["unit"].transform("size") > 1, "alignment"]
        sigma = sigma if again.nunique() > 1 else math.nan
        means = moved[(moved["judge"] == judge) & moved["sd"].notna()] if len(moved) else moved
        if len(means):
            weights = means["judgings"] - 1
            extra = (weights * (means["sd"] ** 2 - sigma**2 / means["units"])).sum() / weights.sum()
            tau = math.sqrt(max(0.0, float(extra)))
        else:
            tau = math.nan
        z = stats.norm.ppf((1 + confidence) / 2)
        drift = 0.0 if math.isnan(tau) else tau**2
        rows.append(
            {
                "judge": judge,
                "sigma": sigma,
                "tau": tau,
                "conditions": len(means),
                "smallest": float(z * math.sqrt(2 * (drift + sigma**2 / n))),
            }
        )
    return pd.DataFrame(rows)
