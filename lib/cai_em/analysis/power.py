"""What a design can detect: variance components of comparisons, power, and the smallest effect that shows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd
from scipy import stats

from cai_em.analysis.compare import MIN_SEEDS, _crossed, _mean_squares
from cai_em.analysis.units import DesignError, partner, question_differences
from cai_em.records.keys import COMPARISON

# --- Power ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VarianceComponents:
    """What a difference of means is made of, in squared points of alignment; NaN: not to be estimated from the data.

    Var(difference) = question / Q + 2 seed / S + (question_seed + 2 response / n) / (Q S), for Q questions, S seeds, n
    samples.
    """

    question: float
    """variance over questions of the true persona effect; from one seed, with `question_seed` in it"""
    response: float
    """variance of responses to one question; NaN from one sample per question"""
    seed: float = math.nan
    """variance of a training run's mean over seeds; NaN from one seed"""
    question_seed: float = math.nan
    """variance over questions and seeds of what a training run does to one question; NaN from one seed"""


def variance_components(persona: pd.DataFrame, baseline: pd.DataFrame) -> VarianceComponents:
    """Variance components of one comparison, by the method of moments (negative ones are 0).

    Args:
        persona, baseline: score rows of one condition each, as for `question_differences`.

    Returns:
        The components; those of seeds are NaN where the sides have fewer than two seeds in common, all of them with
        fewer than two questions or one sample per question.
    """
    d = question_differences(persona, baseline)
    sides = [s[s["alignment"].notna()] for s in (persona, baseline)]
    cells = [s.groupby(["question_id", "seed"])["alignment"].agg(["mean", "var", "size"]) for s in sides]
    q, s = d.shape
    noise = sum(float((c["var"] / c["size"]).mean()) for c in cells)
    response = float(pd.concat([c["var"] for c in cells]).mean())
    if q < 2 or math.isnan(noise):  # one sample per question: its noise cannot be told from the questions' variance
        return VarianceComponents(math.nan, response)
    if s < 2:
        return VarianceComponents(max(0.0, float(d[:, 0].var(ddof=1)) - noise), response)
    ms_q, ms_s, ms_e = _mean_squares(d)
    seed, both = max(0.0, (ms_s - ms_e) / q / 2), max(0.0, ms_e - noise)
    return VarianceComponents(max(0.0, (ms_q - ms_e) / s), response, seed, both)


def typical_components(scores: pd.DataFrame, comparisons: Iterable[tuple[str, str, str]]) -> VarianceComponents:
    """The mean of the variance components of several comparisons (model, persona, dataset), for planning.

    Comparisons of which a component cannot be estimated take no part in its mean; it is NaN where none can give it.
    """
    parts = dict(list(scores.groupby(COMPARISON, sort=False)))
    found = [variance_components(parts[c], parts[partner(c)]) for c in comparisons]
    if not found:
        raise DesignError("no comparison to take variance components from")
    return VarianceComponents(**pd.DataFrame(found).mean().to_dict())


def _expected_error(components: VarianceComponents, questions: int, samples: int, seeds: int) -> tuple[float, float]:
    """Standard error that `primary_test` is to expect of a design, and its degrees of freedom."""
    noise = 2 * components.response / samples
    noise += 0.0 if math.isnan(components.question_seed) else components.question_seed
    ms_q = seeds * components.question + noise
    if seeds < MIN_SEEDS:
        return math.sqrt(ms_q / (questions * seeds)), questions - 1
    ms_s = 2 * questions * components.seed + noise
    if not math.isfinite(ms_q + ms_s):
        return math.nan, math.nan
    combined, df = _crossed(ms_q, ms_s, noise, questions, seeds)
    return math.sqrt(combined / (questions * seeds)), df


def power(
    effect: float, components: VarianceComponents, *, questions: int, samples: int, seeds: int = 1, alpha: float = 0.05
) -> float:
    """Power of `primary_test` at level alpha: noncentral t with the error and degrees of freedom that it will have.

    With fewer than `MIN_SEEDS` seeds that is the paired t test of these adapters, to which the variance between
    trainings does not belong; with more, the test over questions and seeds.

    Returns:
        A share; NaN for a single question, or where a component that the design needs is not known.
    """
    if questions < 2:
        return math.nan
    se, df = _expected_error(components, questions, samples, seeds)
    if not math.isfinite(se):
        return math.nan
    if se == 0:
        return float(effect != 0)
    critical, shift = stats.t.ppf(1 - alpha / 2, df), abs(effect) / se
    other_side = stats.nct.cdf(-critical, df, shift) if shift < 5 else 0.0  # below 1e-8, and scipy's is NaN for some
    return float(stats.nct.sf(critical, df, shift) + other_side)


def detectable_effect(
    components: VarianceComponents,
    *,
    questions: int,
    samples: int,
    seeds: int = 1,
    alpha: float = 0.05,
    target: float = 0.8,
) -> float:
    """Smallest difference, in points, that the design detects with the target power; NaN where `power` is NaN."""
    design = {"questions": questions, "samples": samples, "seeds": seeds, "alpha": alpha}
    if math.isnan(power(1.0, components, **design)):
        return math.nan
    low, high = 0.0, 1e-3
    while power(high, components, **design) < target:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if power(middle, components, **design) >= target else (middle, high)
    return high


def power_table(
    components: VarianceComponents,
    *,
    questions: Iterable[int] = (8, 16, 24, 54),
    samples: Iterable[int] = (1, 10, 50, 200),
    seeds: Iterable[int] = (1, 3, 5),
    effect: float = 5.0,
    alpha: float = 0.05,
    target: float = 0.8,
) -> pd.DataFrame:
    """What designs can see: `questions, samples, seeds, power` (of `effect`), `detectable` (with power `target`).

    Designs whose test needs the variance between trainings have no row where the data do not give it (one seed).
    """
    samples, seeds = list(samples), [s for s in seeds if s < MIN_SEEDS or not math.isnan(components.seed)]
    rows = []
    for q in questions:
        for n in samples:
            for s in seeds:
                design = {"questions": q, "samples": n, "seeds": s, "alpha": alpha}
                rows.append(
                    {
                        "questions": q,
                        "samples": n,
                        "seeds": s,
                        "power": power(effect, components, **design),
                        "detectable": detectable_effect(components, **design, target=target),
                    }
                )
    return pd.DataFrame(rows)
