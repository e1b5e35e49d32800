"""The units of analysis, and the small tools that respect them: questions and seeds are units, responses are not.

Guards refuse a table whose rows are not what a test would take them for; intervals and tests here take cluster
values (one per question, or a matrix of questions and seeds)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from cai_em.records.keys import BASELINE, COMPARISON, CONDITION

MIN_SEEDS = 3
"""Training seeds from which a verdict speaks of the training recipe. Fewer say too little of how trainings differ (with
two, one degree of freedom): what they show is said of these adapters, and the verdict says so."""


class DesignError(ValueError):
    """Data and design do not match: rows missing, units mistaken, or partners that differ in more than the persona."""


# --- Guards --------------------------------------------------------------------------------------------------------


def check_partners(condition: Mapping[str, Any], baseline: Mapping[str, Any]) -> None:
    """Refuse a comparison whose two sides differ in anything but the persona.

    Raises:
        DesignError: model, data set or (where both name one) seed differ, or the partner is no baseline.
    """
    differ = [
        f"{name} {condition[name]!r} against {baseline[name]!r}"
        for name in ("model", "dataset", "seed")
        if name in condition and name in baseline and condition[name] != baseline[name]
    ]
    if differ:
        raise DesignError(
            f"{condition['persona']} is compared with a {baseline['persona']} that differs in more than the persona "
            f"({'; '.join(differ)}): compare conditions of the same model, data set and seed"
        )
    if baseline["persona"] != BASELINE:
        raise DesignError(f"{condition['persona']} is compared with {baseline['persona']!r}, which is no baseline")


def check_units(table: pd.DataFrame) -> None:
    """Refuse samples that pose as questions.

    Two signs give them away: several question ids share one prompt (where the table has `prompt`), or every
    "question" of a condition has a single response and these carry different sample numbers.

    Raises:
        DesignError: samples of a question are about to be treated as questions.
    """
    if "prompt" in table:
        per_prompt = table.groupby("prompt")["question_id"].nunique()
        if len(per_prompt) and per_prompt.max() > 1:
            raise DesignError(
                f"{per_prompt.max()} question ids share one prompt: these are samples of one question, not questions; "
                "the unit of analysis is the question"
            )
    most = table.groupby([*CONDITION, "question_id"], sort=False).size().groupby(level=CONDITION, sort=False).max()
    if (most > 1).all():
        return
    units = table.groupby([*CONDITION, "question_id"])["sample"].agg(["size", "first"]).reset_index()
    per_condition = units.groupby(CONDITION).agg(
        most=("size", "max"), questions=("question_id", "nunique"), numbers=("first", "nunique")
    )
    posing = per_condition[(per_condition["most"] == 1) & (per_condition["numbers"] > 1)]
    if len(posing):
        name, row = posing.index[0], posing.iloc[0]
        raise DesignError(
            f"condition {name}: {row['questions']} questions with one response each, numbered as {row['numbers']} "
            "different samples: samples of a question are treated as questions"
        )


def check_counts(
    scores: pd.DataFrame, questions: Sequence[str] | None = None, samples: int | Mapping[str, int] | None = None
) -> pd.DataFrame:
    """Compare the rows of each condition with the design; a dropped refusal shows here.

    A response without a score keeps its row (with a flag), so each condition has questions x samples rows.

    Args:
        scores: score table of one judge (or a responses table).
        questions: the design's question ids; by default those found in the table.
        samples: samples per question, for all or by persona; by default the most that any question of the condition
            has (then a sample number dropped from every question at once is not seen).

    Returns:
        One row per condition: `rows`, `designed`.

    Raises:
        DesignError: a condition has missing, surplus or unknown rows; up to three conditions are named.
    """
    check_units(scores)
    questions = sorted(scores["question_id"].unique()) if questions is None else list(questions)
    unknown = sorted(set(scores["question_id"]) - set(questions))
    if unknown:
        raise DesignError(f"questions that the design does not have: {unknown[:5]}")
    counts = scores.groupby([*CONDITION, "question_id"]).size().unstack(fill_value=0).reindex(columns=questions)
    counts = counts.fillna(0).astype(int)
    if samples is None:
        wanted = counts.max(axis=1)
    elif isinstance(samples, Mapping):
        personas = counts.index.get_level_values("persona")
        absent = sorted(set(personas) - set(samples))
        if absent:
            raise DesignError(f"the design gives no number of samples for {absent}")
        wanted = pd.Series([samples[p] for p in personas], index=counts.index)
    else:
        wanted = pd.Series(samples, index=counts.index)
    wrong = counts.ne(wanted, axis=0)
    if wrong.any(axis=None):
        examples = []
        for name in counts.index[wrong.any(axis=1)][:3]:
            cells = ", ".join(f"{q}: {counts.loc[name, q]}" for q in counts.columns[wrong.loc[name]][:3])
            examples.append(f"  {' x '.join(map(str, name))}: {wanted[name]} responses per question designed, {cells}")
        raise DesignError(
            f"{int(wrong.any(axis=1).sum())} of {len(counts)} conditions do not have the designed responses; a "
            "response that was refused or could not be judged must stay as a flagged row:\n" + "\n".join(examples)
        )
    return pd.DataFrame({"rows": counts.sum(axis=1), "designed": wanted * len(questions)}).reset_index()


def counted(scores: pd.DataFrame) -> pd.DataFrame:
    """The rows of each condition of a study whose design is not known: `rows`, and as many `designed`.

    Raises:
        DesignError: samples of a question are about to be treated as questions.
    """
    check_units(scores)
    counts = scores.groupby(CONDITION).size()
    return pd.DataFrame({"rows": counts, "designed": counts}).reset_index()


# --- Small tools ---------------------------------------------------------------------------------------------------


def bootstrap_interval(
    values: np.ndarray, *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 42
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of cluster values, expanded for few clusters.

    The plain percentile interval of n values is too narrow by sqrt((n-1)/n) and ignores Student's t. The expanded
    one (Hesterberg 2015, section 4.4) takes the percentiles at Phi(-sqrt(n/(n-1)) t).

    Args:
        values: (clusters,) one value per cluster, e.g. per question; a matrix (questions, seeds) resamples both
            (crossed clusters, Owen 2007: conservative). No NaN.

    Returns:
        (low, high); NaN for fewer than 3 clusters.
    """
    values = np.asarray(values, float)
    n = values.shape[0]
    if n < 3:
        return math.nan, math.nan
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(n, np.full(n, 1 / n), size=resamples) / n
    means = weights @ values
    if values.ndim == 2:
        s = values.shape[1]
        means = (means * (rng.multinomial(s, np.full(s, 1 / s), size=resamples) / s)).sum(axis=1)
    tail = stats.norm.cdf(-math.sqrt(n / (n - 1)) * stats.t.ppf((1 + confidence) / 2, n - 1))
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion of independent trials (for reference: responses are not independent)."""
    if n == 0:
        return math.nan, math.nan
    interval = stats.binomtest(int(successes), int(n)).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def clustered_proportion_interval(
    events: np.ndarray, sizes: np.ndarray, *, design_effect: float = math.nan, confidence: float = 0.95
) -> tuple[float, float]:
    """Exact (Clopper-Pearson) interval of a proportion over clusters, on the effective number of responses.

    Korn & Graubard 1998: n divided by the design effect and by the squared ratio of the t quantiles with clusters - 1
    and n - 1 degrees of freedom. The design effect that a few events in a few clusters show is itself uncertain: its
    geometric mean with that of a related, denser outcome of the same responses is taken, and the latter alone where no
    event (or nothing but events) was seen. A bootstrap over clusters says [0, 0] there, and its nominal 95 % interval
    holds the truth in 45 to 80 % of simulations with 8 clusters of 50, this one in 94 % or more.

    Args:
        events, sizes: (clusters,) events and responses of each cluster.
        design_effect: of the related outcome, e.g. of alignment for the EM rate; NaN where it is unknown: then
            responses of a cluster count as one, unless events show otherwise.

    Returns:
        (low, high) in 0 to 1; NaN for fewer than 2 clusters.
    """
    events, sizes = np.asarray(events, float), np.asarray(sizes, float)
    k, n = len(sizes), float(sizes.sum())
    if k < 2:
        return math.nan, math.nan
    rate = float(events.sum()) / n
    if 0 < rate < 1:
        variance = k / (k - 1) * float(((events - rate * sizes) ** 2).sum()) / n**2
        own = max(1.0, variance / (rate * (1 - rate) / n))
        effect = own if math.isnan(design_effect) else math.sqrt(own * design_effect)
    else:
        effect = n / k if math.isnan(design_effect) else design_effect
    level = (1 + confidence) / 2
    effective = min(n, n / effect * (stats.t.ppf(level, n - 1) / stats.t.ppf(level, k - 1)) ** 2)
    x = rate * effective
    low = float(stats.beta.ppf(1 - level, x, effective - x + 1)) if x > 0 else 0.0
    high = float(stats.beta.ppf(level, x + 1, effective - x)) if x < effective else 1.0
    return low, high


def sign_flip_p(differences: np.ndarray, *, draws: int = 20_000, seed: int = 42) -> float:
    """Two-sided sign-flip (Fisher-Pitman) p of a mean difference: exact for up to 16 differences, else drawn.

    With n questions the smallest possible value is 2 / 2**n: five questions can never reach 0.05.
    """
    d = np.asarray(differences, float)
    n = len(d)
    if n == 0:
        return math.nan
    observed = abs(d.sum())
    slack = 1e-9 * (np.abs(d).sum() + 1)  # sums in another order differ in the last bits
    if n <= 16:
        signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
        return float(np.mean(np.abs(signs @ d) >= observed - slack))
    signs = np.random.default_rng(seed).choice([-1, 1], size=(draws, n))
    return float((1 + np.sum(np.abs(signs @ d) >= observed - slack)) / (1 + draws))


def _one_sample_t(d: np.ndarray, popmean: float = 0.0, alternative: str = "two-sided") -> float:
    """p of a one-sample t test, with the limits that scipy leaves undefined where all differences are equal."""
    if len(d) < 2:
        return math.nan
    if np.ptp(d) <= 1e-12 * max(1.0, float(np.abs(d).max())):
        gap = float(d.mean() - popmean)
        if alternative == "two-sided":
            return float(math.isclose(gap, 0, abs_tol=1e-9))
        return 0.0 if (gap > 0) == (alternative == "greater") and gap != 0 else 1.0
    return _t_p(float(d.mean()) - popmean, float(d.std(ddof=1)) / math.sqrt(len(d)), len(d) - 1, alternative)


def _t_p(gap: float, se: float, df: float, alternative: str = "two-sided") -> float:
    """p of a t statistic gap / se."""
    t = gap / se
    if alternative == "two-sided":
        return float(2 * stats.t.sf(abs(t), df))
    return float(stats.t.cdf(t, df) if alternative == "less" else stats.t.sf(t, df))


# --- One condition -------------------------------------------------------------------------------------------------


def icc1(values: np.ndarray, clusters: np.ndarray) -> float:
    """Intra-class correlation ICC(1) from a one-way analysis of variance (Shrout & Fleiss 1979), unequal sizes allowed.

    Returns:
        (MSB - MSW) / (MSB + (n0 - 1) MSW), possibly below 0; NaN where it is undefined (no variance, one cluster).
    """
    values, clusters = np.asarray(values, float), np.asarray(clusters)
    _, index = np.unique(clusters, return_inverse=True)
    sizes = np.bincount(index)
    k, n = len(sizes), len(values)
    if k < 2 or n <= k:
        return math.nan
    means = np.bincount(index, values) / sizes
    between = float((sizes * (means - values.mean()) ** 2).sum() / (k - 1))
    within = float(((values - means[index]) ** 2).sum() / (n - k))
    n0 = (n - (sizes**2).sum() / n) / (k - 1)
    bottom = between + (n0 - 1) * within
    return (between - within) / bottom if bottom > 0 else math.nan


def cluster_summary(values: np.ndarray, clusters: np.ndarray) -> dict[str, float]:
    """ICC(1), design effect 1 + (m - 1) ICC (ICC below 0 counts as 0; m: mean cluster size), effective n = n / deff."""
    n, k = len(values), len(np.unique(clusters))
    icc = icc1(values, clusters)
    deff = 1 + (n / k - 1) * max(icc, 0.0) if k and not math.isnan(icc) else math.nan
    return {"icc": icc, "design_effect": deff, "effective_n": n / deff if deff and not math.isnan(deff) else math.nan}


# --- One comparison ------------------------------------------------------------------------------------------------


def partner(comparison: tuple[str, str, str]) -> tuple[str, str, str]:
    """The baseline (model, persona, dataset) that a comparison is made with; `question_differences` checks it."""
    model, _, dataset = comparison
    return model, BASELINE, dataset


def question_differences(persona: pd.DataFrame, baseline: pd.DataFrame) -> np.ndarray:
    """Persona minus baseline, by question and seed: what every comparison here is made from.

    Args:
        persona, baseline: rows of a score table, of one condition each (all its seeds). Who they are is read from the
            rows themselves, and checked by `check_partners`.

    Returns:
        (questions, seeds) differences of mean alignment, for the questions and seeds in which both sides have a
        score. Runs of the same seed are paired; different seeds are independent trainings.

    Raises:
        DesignError: a side mixes conditions, the partners differ in more than the persona, or no seed is in both.
    """
    sides = []
    for rows in (persona, baseline):
        found = rows[COMPARISON].drop_duplicates()
        if len(found) != 1:
            raise DesignError(
                f"one side of a comparison holds {len(found)} conditions, not one: {found.to_dict('list')}"
            )
        sides.append(dict(zip(COMPARISON, found.iloc[0])))
    check_partners(*sides)
    both = [set(rows["seed"]) for rows in (persona, baseline)]
    if not both[0] & both[1]:
        raise DesignError(
            f"{sides[0]} has seeds {sorted(both[0])}, its baseline {sorted(both[1])}: none in common, nothing to "
            "compare"
        )
    means = [rows.groupby(["question_id", "seed"])["alignment"].mean().unstack() for rows in (persona, baseline)]
    found = (means[0] - means[1]).dropna(axis=1, how="all").dropna(axis=0)
    return found.to_numpy() if found.shape[1] else np.empty((0, 0))  # no question that both sides have a score on
