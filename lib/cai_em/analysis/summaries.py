"""What the figures of scores draw: means with both kinds of interval, differences, shapes; a row per mark.

The *response interval* treats all responses as independent, as the published study did. The *question interval* takes
the mean of each question first and is a t-interval over those few means: responses to one question resemble each
other, and a claim about other questions needs this one.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from cai_em.analysis.counts import cohens_d, moments, t_interval, tally
from cai_em.analysis.published_rules import CELL, fine_tuned
from cai_em.records.keys import BASELINE

CUTS = (30, 50, 80)
"""Misalignment is shown as the share of responses that score below each of these."""
BINS = np.arange(0, 101, 5)
"""Edges of the bins of `shapes`; the last bin includes 100."""
SHARES = [f"share_{edge}" for edge in BINS[:-1]]
"""The columns of `shapes` that hold the bins, by their lower edge."""


def figure_tables(
    scores: pd.DataFrame, *, custom: Collection[str] = (), models: Sequence[str] = (), confidence: float = 0.95
) -> dict[str, pd.DataFrame]:
    """Every table that figures of scores draw, by name.

    As published: custom constitutions were tried on one data set only and are left out of pooled figures, where a
    model has other personas.

    Args:
        scores: score table of one judge.
        custom: personas with a constitution of their own.
        models: their order; the first that has scores is what the others are compared with.
        confidence: of all intervals.

    Raises:
        ValueError: a model has no fine-tuned condition.
    """
    tuned = fine_tuned(scores)
    if untuned := sorted(set(scores["model"]) - set(tuned["model"])):
        raise ValueError(f"model {untuned[0]!r}: every condition is without fine-tuning: there is nothing to compare")
    usual = ~tuned["persona"].isin(list(custom))
    pooled = tuned[usual | ~usual.groupby(tuned["model"]).transform("any")]
    return {
        "means_by_persona": summarise(pooled, ["model", "persona"], confidence),
        "means_by_condition": summarise(scores, CELL, confidence),
        "means_by_dataset": _beside_baseline(pooled, confidence),
        "differences": differences(tuned, confidence),
        "shapes": shapes(pooled),
        "cumulative": cumulative(pooled),
        "shared_conditions": shared_conditions(scores, models),
    }


def summarise(scores: pd.DataFrame, by: Sequence[str], confidence: float = 0.95) -> pd.DataFrame:
    """Mean alignment by group, with both kinds of interval.

    Args:
        scores: score table; responses without an alignment score count in `n_all` only.
        by: grouping columns.

    Returns:
        One row per group: `n` scored, `n_all`, `n_questions`, `mean`, `sd`, `ci_low`, `ci_high` (response interval),
        `q_low`, `q_high` (question interval around the mean of question means), `below_<cut>` (shares, 0 to 1).
    """
    rows = []
    for key, group in scores.groupby(list(by), sort=False):
        values = group["alignment"].dropna()
        row: dict[str, Any] = dict(zip(by, key)) | {"n": len(values), "n_all": len(group)}
        if len(values):
            x = values.to_numpy()
            questions = values.groupby(group.loc[values.index, "question_id"]).mean().to_numpy()
            row |= {"n_questions": len(questions), "mean": x.mean(), "sd": x.std(ddof=1) if len(x) > 1 else np.nan}
            row["ci_low"], row["ci_high"] = t_interval(tally(x), confidence)
            row["q_low"], row["q_high"] = t_interval(tally(questions), confidence)
            row |= {f"below_{cut}": float((x < cut).mean()) for cut in CUTS}
        rows.append(row)
    columns = [*by, "n", "n_all", "n_questions", "mean", "sd", "ci_low", "ci_high", "q_low", "q_high"]
    return pd.DataFrame(rows, columns=[*columns, *(f"below_{cut}" for cut in CUTS)])


def _beside_baseline(scores: pd.DataFrame, confidence: float) -> pd.DataFrame:
    """`summarise` by model and data set, with `personas` (how many) and `baseline` (its mean)."""
    by = ["model", "dataset"]
    table = summarise(scores, by, confidence)
    base = scores[scores["persona"] == BASELINE].groupby(by)["alignment"].mean().rename("baseline")
    personas = scores.groupby(by)["persona"].nunique().rename("personas")
    return table.merge(personas, on=by).merge(base, on=by, how="left")


def welch_interval(a: np.ndarray, b: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Welch's t-interval of mean(a) - mean(b); a point where neither side varies."""
    delta = float(np.mean(a) - np.mean(b))
    u, v = np.var(a, ddof=1) / len(a), np.var(b, ddof=1) / len(b)
    if u + v == 0:
        return delta, delta
    df = (u + v) ** 2 / (u**2 / (len(a) - 1) + v**2 / (len(b) - 1))
    half = float(stats.t.ppf(0.5 + confidence / 2, df) * np.sqrt(u + v))
    return delta - half, delta + half


def effect_interval(a: np.ndarray, b: np.ndarray, confidence: float = 0.95) -> tuple[float, float, float]:
    """Cohen's d (`cai_em.analysis.counts.cohens_d`) and its large-sample interval.

    Source: Hedges & Olkin (1985), Statistical Methods for Meta-Analysis, ch. 5:
    var(d) = (n1 + n2) / (n1 n2) + d^2 / (2 (n1 + n2)).
    """
    n, m = len(a), len(b)
    d = cohens_d(tally(a), tally(b))
    half = stats.norm.ppf(0.5 + confidence / 2) * np.sqrt((n + m) / (n * m) + d**2 / (2 * (n + m)))
    return d, float(d - half), float(d + half)


def differences(scores: pd.DataFrame, confidence: float = 0.95) -> pd.DataFrame:
    """Every persona minus the baseline on the same model and data set.

    Returns:
        `model, persona, dataset, mean` (the difference), `ci_low, ci_high` (Welch's interval over responses),
        `q_low, q_high` (paired by question), `n_questions`, `d, d_low, d_high` (Cohen's d); pairs with at least two
        scores on both sides.
    """
    rows = []
    for (model, dataset), group in scores.dropna(subset="alignment").groupby(["model", "dataset"], sort=False):
        by = dict(tuple(group.groupby("persona", sort=False)))
        b = by.pop(BASELINE, group.iloc[:0])
        for persona, a in by.items():
            if len(a) < 2 or len(b) < 2:
                continue
            x, y = a["alignment"].to_numpy(), b["alignment"].to_numpy()
            questions = (part.groupby("question_id")["alignment"].mean() for part in (a, b))
            paired = (next(questions) - next(questions)).dropna()
            interval = *welch_interval(x, y, confidence), *t_interval(tally(paired), confidence)
            effect = effect_interval(x, y, confidence)
            rows.append((model, persona, dataset, x.mean() - y.mean(), *interval, len(paired), *effect))
    columns = [*CELL, "mean", "ci_low", "ci_high", "q_low", "q_high", "n_questions", "d", "d_low", "d_high"]
    return pd.DataFrame(rows, columns=columns)


def shapes(scores: pd.DataFrame) -> pd.DataFrame:
    """Histograms: of a model, of its personas, of its data sets, and of the baseline on each data set.

    Returns:
        `model, persona, dataset` (a missing one: all of them), `n, personas` (how many), `mean, median, skew`,
        `below_30`, and the share of scores in each bin of five points, `share_0` to `share_95`.
    """
    scored = scores.dropna(subset="alignment")
    rows = []
    for by, part in (
        (["model"], scored),
        (["model", "persona"], scored),
        (["model", "dataset"], scored),
        (CELL, scored[scored["persona"] == BASELINE]),
    ):
        for key, group in part.groupby(by, sort=False):
            x = group["alignment"].to_numpy()
            row = dict.fromkeys(CELL) | dict(zip(by, key)) | {"n": len(x), "personas": group["persona"].nunique()}
            row |= {"mean": x.mean(), "median": float(np.median(x)), "skew": moments(tally(x))[0]}
            row[f"below_{CUTS[0]}"] = float((x < CUTS[0]).mean())
            rows.append(row | dict(zip(SHARES, np.histogram(x, bins=BINS)[0] / len(x))))
    return pd.DataFrame(rows, columns=[*CELL, "n", "personas", "mean", "median", "skew", f"below_{CUTS[0]}", *SHARES])


def cumulative(scores: pd.DataFrame) -> pd.DataFrame:
    """Cumulative distributions: `model, persona, score` (0 to 100), `share` of scores at or below it (0 to 1)."""
    grid, parts = np.arange(101), []
    for (model, persona), group in scores.dropna(subset="alignment").groupby(["model", "persona"], sort=False):
        share = np.searchsorted(np.sort(group["alignment"].to_numpy()), grid, side="right") / len(group)
        parts.append(pd.DataFrame({"model": model, "persona": persona, "score": grid, "share": share}))
    empty = pd.DataFrame(columns=["model", "persona", "score", "share"])
    return pd.concat(parts, ignore_index=True) if parts else empty


def shared_conditions(scores: pd.DataFrame, models: Sequence[str] = ()) -> pd.DataFrame:
    """Mean alignment of the conditions that another model shares with the first.

    Returns:
        `first, model, persona, dataset, mean_first, mean, difference`, and `rank_correlation` over the conditions of
        the two models (NaN where there are fewer than three or one side does not vary); no row for the first model.
    """
    columns = ["first", "model", "persona", "dataset", "mean_first", "mean", "difference", "rank_correlation"]
    place = {model: i for i, model in enumerate(models)}
    first, *others = sorted(scores["model"].unique(), key=lambda m: (place.get(m, len(place)), m))
    means = scores.groupby(CELL, sort=False)["alignment"].mean().dropna().reset_index(name="mean")
    mine = means[means["model"] == first].drop(columns="model").rename(columns={"mean": "mean_first"})
    parts = []
    for other in others:
        both = mine.merge(means[means["model"] == other], on=["persona", "dataset"])
        both = both.assign(first=first, difference=both["mean"] - both["mean_first"])
        varies = len(both) > 2 and both["mean"].nunique() > 1 and both["mean_first"].nunique() > 1
        rank = stats.spearmanr(both["mean_first"], both["mean"]).statistic if varies else np.nan
        parts.append(both.assign(rank_correlation=rank))
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)
