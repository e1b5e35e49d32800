"""What a design can see: power of the very test that decides, with every variance that its estimate has.

The estimate's sufficient statistics are drawn (a normal mean, chi-square mean squares) and the test of
`contrasts.estimate_mean` is applied to each draw, so that its estimated degrees of freedom are in the answer. The draws
are the same for every effect, so that power is smooth in it.

A variance that the data cannot give (how much trainings differ, from one seed) is NaN, and so is every power that needs
it: with fewer than three seeds the test speaks of these adapters, and what it sees of the *recipe's* effect depends on
how much trainings differ.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from cai_em.analysis.contrasts import ArmContrast, Cube, find_all, identification, trainings
from cai_em.analysis.units import MIN_SEEDS, DesignError
from cai_em.records.keys import NO_DATASET

DRAWS = 20_000


@dataclass(frozen=True)
class Components:
    """Variances behind one contrast pooled over data sets, in squared points; NaN: not to be had from the data.

    Var(mean) = question / Q + reference * untuned / (n Q)
              + seed / (S D) + (question_seed + tuned * response / n) / (Q S D)

    for Q questions, S seeds, n samples a question and D data sets.
    """

    question: float
    """over questions, of the mean over data sets"""
    response: float
    """of responses to one question of one condition; NaN from one sample a question"""
    seed: float
    """of a training's contrast (all its fine-tuned arms) in one data set; NaN from one seed"""
    question_seed: float
    """what a training does to one question beyond that; NaN from one seed"""
    datasets: int = 1
    tuned: int = 2
    """fine-tuned arms of the contrast"""
    reference: int = 2
    """arms without fine-tuning, which all trainings share"""
    untuned: float = 0.0
    """variance of responses to one question without fine-tuning"""


def components(cube: Cube, group: Sequence[ArmContrast]) -> Components:
    """Variance components of one persona's contrasts over data sets, by the method of moments (negative ones are 0)."""
    parts = [c.values(cube) for c in group]
    known = ~np.logical_or.reduce([np.isnan(x).any(axis=1) for x in parts])
    parts = [x[known] for x in parts]
    q, d = int(known.sum()), len(parts)
    keys = dict.fromkeys(key for c in group for key, _ in c.arms)
    response, samples = _responses(cube, [key for key in keys if key[2] != NO_DATASET])
    untuned, asked = _responses(cube, [key for key in keys if key[2] == NO_DATASET])
    tuned = sum(key[2] != NO_DATASET for key, _ in group[0].arms)
    reference = len(group[0].arms) - tuned
    found = Components(math.nan, response, math.nan, math.nan, d, tuned, reference, untuned)
    if q < 2 or math.isnan(response) or (reference and math.isnan(untuned)):
        return found
    run, residual = trainings(parts)
    rate = sum(1 / x.shape[1] for x in parts) / d**2
    noise = tuned * response / samples
    between = float(np.mean([x.mean(axis=1) for x in parts], axis=0).var(ddof=1))
    between -= reference * untuned / asked if reference else 0.0
    if math.isnan(run):
        return replace(found, question=max(0.0, between - noise * rate))
    both = max(0.0, residual - noise)
    seed = max(0.0, run - residual / q)
    return replace(found, question=max(0.0, between - residual * rate), seed=seed, question_seed=both)


def claimed_groups(cube: Cube, hypotheses: Iterable[Any], datasets: Iterable[Any]) -> list[list[ArmContrast]]:
    """The contrasts behind each persona of each hypothesis, for planning: its own estimand where the data identify it,
    else what they have (`after`)."""
    datasets, groups = list(datasets), []
    for model in dict.fromkeys(m for m, _, _ in cube.conditions):
        for h in hypotheses:
            for persona in h.personas:
                for estimand in (h.estimand, "after"):
                    reference, _ = identification(cube, estimand, model, persona, datasets)
                    if reference is not None:
                        em = [d for d in datasets if d.role == "em"]
                        groups.append(find_all(cube, estimand, model, persona, em, reference or "none"))
                        break
    return [g for g in groups if g]


def typical_components(cube: Cube, groups: Sequence[Sequence[ArmContrast]]) -> Components:
    """The mean of the components of several personas' contrasts, each over those that have it; NaN where none has.

    Raises:
        DesignError: no contrast to take them from.
    """
    if not groups:
        raise DesignError("no contrast to take variance components from")
    table = pd.DataFrame([vars(components(cube, g)) for g in groups])
    mean = table.mean().to_dict()
    return Components(**{k: round(v) if k in ("datasets", "tuned", "reference") else v for k, v in mean.items()})


def _responses(cube: Cube, keys: Sequence[tuple[str, str, str]]) -> tuple[float, float]:
    """Mean variance of responses within a cell, and mean scored responses of a cell; NaN without."""
    means = [cube.conditions[key].means for key in keys]
    if not means:
        return 0.0, 1.0
    variances = np.concatenate([m["variance"].ravel() for m in means])
    known = variances[~np.isnan(variances)]
    samples = float(np.mean(np.concatenate([m["scored"].ravel() for m in means])))
    return (float(known.mean()) if len(known) else math.nan), samples


@dataclass(frozen=True)
class _Draws:
    """Noise of the mean, and the half width beyond which it is significant, for many studies of one design."""

    noise: np.ndarray
    critical: np.ndarray

    def power(self, effect: float) -> float:
        return float(np.mean(np.abs(effect + self.noise) > self.critical))


def _draw(c: Components, questions: int, samples: int, seeds: int, alpha: float, draws: int, adapters: bool) -> _Draws:
    """`adapters`: the effect is that of these adapters, so that trainings' variance is no noise."""
    rng = np.random.default_rng(0)
    q, s, d = questions, seeds, c.datasets
    both = 0.0 if math.isnan(c.question_seed) else c.question_seed
    cell = both + c.tuned * c.response / samples
    per_question = c.question + c.reference * c.untuned / samples + cell / (s * d)
    seed = 0.0 if adapters or c.seed == 0 else c.seed
    noise = rng.standard_normal(draws) * math.sqrt(per_question / q + seed / (s * d))
    v_q = per_question * rng.chisquare(q - 1, draws) / (q - 1) / q
    if s < MIN_SEEDS:
        return _Draws(noise, np.sqrt(v_q) * stats.t.ppf(1 - alpha / 2, q - 1))
    free = d * (s - 1)
    v_s = (seed + cell / q) * rng.chisquare(free, draws) / free / (s * d)
    v_e = cell * rng.chisquare(free * (q - 1), draws) / (free * (q - 1)) / (s * d * q)
    total = v_q + v_s - v_e
    larger, df_larger = np.maximum(v_q, v_s), np.where(v_q >= v_s, q - 1, free)
    satterthwaite = total**2 / (v_q**2 / (q - 1) + v_s**2 / free + v_e**2 / (free * (q - 1)))
    as_sum = total >= larger
    df = np.maximum(1, np.floor(np.where(as_sum, satterthwaite, df_larger) + 1e-9))
    return _Draws(noise, np.sqrt(np.where(as_sum, total, larger)) * stats.t.ppf(1 - alpha / 2, df))


def power(
    effect: float,
    c: Components,
    *,
    questions: int,
    samples: int,
    seeds: int,
    alpha: float = 0.05,
    adapters: bool = False,
    draws: int = DRAWS,
) -> float:
    """Chance that the test is significant at alpha when the true contrast is `effect` points.

    Args:
        adapters: the effect of these very adapters (all that fewer than three seeds can speak of) instead of the
            recipe's.

    Returns:
        A share; NaN where a variance that it needs is not known, or for a single question.
    """
    made = _made(c, questions, samples, seeds, alpha, adapters, draws)
    return made.power(effect) if made else math.nan


def detectable(
    c: Components,
    *,
    questions: int,
    samples: int,
    seeds: int,
    alpha: float = 0.05,
    target: float = 0.8,
    adapters: bool = False,
    draws: int = DRAWS,
) -> float:
    """Smallest effect, in points, that the design sees with the target power; NaN where power is."""
    made = _made(c, questions, samples, seeds, alpha, adapters, draws)
    return _smallest(made, target) if made else math.nan


def _smallest(made: _Draws, target: float) -> float:
    low, high = 0.0, 1e-3
    while made.power(high) < target and high < 1e6:
        high *= 2
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if made.power(middle) >= target else (middle, high)
    return high


def _made(
    c: Components, questions: int, samples: int, seeds: int, alpha: float, adapters: bool, draws: int
) -> _Draws | None:
    lacking = math.isnan(c.question) or math.isnan(c.response) or (not adapters and math.isnan(c.seed))
    if questions < 2 or lacking or (adapters and seeds >= MIN_SEEDS):
        return None
    return _draw(c, questions, samples, seeds, alpha, draws, adapters)


def power_table(
    c: Components,
    *,
    questions: Iterable[int] = (8, 16, 24, 54),
    samples: Iterable[int] = (1, 10, 50, 200),
    seeds: Iterable[int] = (1, 3, 5),
    effect: float = 5.0,
    alpha: float = 0.05,
    target: float = 0.8,
    draws: int = DRAWS,
) -> pd.DataFrame:
    """Designs and what they see: `questions, samples, seeds, power` (of `effect`), `detectable` (with power `target`),
    and `power_adapters, detectable_adapters` for fewer than three seeds. Unknown is NaN, in a row of its own."""
    rows = []
    samples, seeds = list(samples), list(seeds)
    for q in questions:
        for n in samples:
            for s in seeds:
                row: dict[str, float] = {"questions": q, "samples": n, "seeds": s}
                for suffix, adapters in (("", False), ("_adapters", True)):
                    made = _made(c, q, n, s, alpha, adapters, draws)
                    row[f"power{suffix}"] = made.power(effect) if made else math.nan
                    row[f"detectable{suffix}"] = _smallest(made, target) if made else math.nan
                rows.append(row)
    return pd.DataFrame(rows)
