"""H3: when, in the course of training, emergent misalignment arises, and whether personas differ in it.

A run is trained with checkpoints, dense early (`dense_early`). Each is sampled and judged like any condition; its step
stands in the `dataset` key (`bad_medical~demo_trajectory@12`, see `at_step`), so that its responses and scores
are ordinary tables. What a checkpoint's adapter *is* comes from its weights: all of `geometry` follows from the inner
products of the runs' updates, which two small matrix products give without ever forming `B @ A`.

The transition point of a curve is the midpoint of a logistic in the logarithm of the step (a Hill curve),

    y(t) = low + rise * t^h / (t^h + t50^h),

chosen because the schedule is dense early, and because t50 means "half of the rise" whatever the rise's sharpness h: a
jump (h large) and a slow drift (h = 1) are both in the family. A *change point* (one jump between two checkpoints) is
fitted beside it: it assumes no shape, but can only lie between checkpoints. A transition is *shown* only if there is
something to time: the last third of the checkpoints must differ from the first third, an interval fixed in advance and
free of any search for the best split. Questions and seeds are resampled together (crossed, Owen 2007: conservative);
with one seed the interval says nothing about another training run, and `Transition.seeds` says so. No interval is finer
than the schedule: a jump lies somewhere between two checkpoints, and so its ends are moved out to the next ones.

Personas are compared run by run as well as question by question, and the larger p counts (`compare_transitions`): two
runs of one persona turn at different steps too. A single run per persona leaves H3 undecided.

    values = course(judged, losses)              # all that was measured, one long table
    transitions(values), transition_comparisons(values)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats as sps

from cai_em.analysis.counts import benjamini_hochberg
from cai_em.analysis.gates import INCONCLUSIVE, PRESENT, Gate
from cai_em.analysis.units import bootstrap_interval
from cai_em.dynamics.curves import CLAIMED, TrajectoryError, common, curves_of, thirds
from cai_em.records.keys import BASELINE
from cai_em.records.numbers import plain_number

Steps = Sequence[int] | np.ndarray

# --- Transition points ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Transition:
    """When a curve turns from one level to another.

    Attributes:
        step, low, high: transition point and interval, in steps; NaN where no transition is shown. The interval's ends
            are checkpoints: between two of them nothing was seen.
        rise, rise_low, rise_high: last third of the checkpoints minus first third.
        shown: whether the interval of `rise` leaves out 0.
        beyond: share of resamples whose point lies at the last checkpoint or after it: the curve had not levelled off,
            and its midpoint is an extrapolation.
        sharpness: h of the logistic; NaN for a change point.
        units, seeds: how many of each.
    """

    method: str
    step: float
    low: float
    high: float
    rise: float
    rise_low: float
    rise_high: float
    shown: bool
    beyond: float
    sharpness: float
    units: int
    seeds: int

    def as_dict(self) -> dict[str, Any]:
        """For a table."""
        return asdict(self)

    @property
    def gate(self) -> Gate:
        """Whether there is a transition to be timed."""
        what = "change {} [{}, {}]".format(
            *(plain_number(x, "+.3g") for x in (self.rise, self.rise_low, self.rise_high))
        )
        if math.isnan(self.rise_low):
            return Gate(INCONCLUSIVE, f"{what}: fewer than 3 units")
        return Gate(PRESENT if self.shown else INCONCLUSIVE, what)


SHARPNESS = (1.0, 2.0, 4.0, 8.0, 16.0)


def _family(method: str, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Candidate curves from 0 to 1: their midpoints (c,), sharpness (c,) and values (c, steps)."""
    t = np.asarray(steps, float)
    if method == "change point":
        after = np.arange(1, len(t))
        return (t[:-1] + t[1:]) / 2, np.full(len(after), np.nan), (np.arange(len(t)) >= after[:, None]).astype(float)
    if method != "logistic":
        raise TrajectoryError(f"unknown method {method!r}: 'logistic' or 'change point'")
    middle, h = (x.ravel() for x in np.meshgrid(np.geomspace(t[t > 0][0], 3 * t[-1], 100), SHARPNESS))
    with np.errstate(divide="ignore", over="ignore"):  # step 0: (m / 0)^h is infinite, the curve exactly 0
        return middle, h, 1 / (1 + (middle[:, None] / t) ** h[:, None])


def _fit(curves: np.ndarray, steps: np.ndarray, method: str, sign: float) -> tuple[np.ndarray, np.ndarray]:
    """Least squares over the family, low and rise in closed form: best midpoints and sharpness of (n, steps) curves.

    For a given shape the residual falls by the squared projection on the centred, normalised shape, so the best one
    has the largest projection in the direction of the rise.
    """
    middle, h, shapes = _family(method, steps)
    shapes = shapes - shapes.mean(axis=1, keepdims=True)
    shapes /= np.linalg.norm(shapes, axis=1, keepdims=True)
    best = (sign * (curves - curves.mean(axis=1, keepdims=True)) @ shapes.T).argmax(axis=1)
    return middle[best], h[best]


def _weights(n: int, resamples: int, rng: np.random.Generator) -> np.ndarray:
    return rng.multinomial(n, np.full(n, 1 / n), size=resamples) / n


def _tail(n: int, confidence: float) -> float:
    """Tail probability of the expanded percentile interval (Hesterberg 2015, as in `inference.bootstrap_interval`)."""
    return float(sps.norm.cdf(-math.sqrt(n / (n - 1)) * sps.t.ppf((1 + confidence) / 2, n - 1)))


def _bootstrap_p(d: np.ndarray, units: int) -> float:
    """Two-sided p of a bootstrapped difference: below 1 - confidence where the expanded interval leaves out 0."""
    share = (1 + min((d <= 0).sum(), (d >= 0).sum())) / (1 + len(d))
    if share >= 0.5 or units < 2:
        return 1.0
    return float(2 * sps.t.cdf(sps.norm.ppf(share) * math.sqrt((units - 1) / units), units - 1))


def _rise(y: np.ndarray) -> np.ndarray:
    """Last third of the checkpoints minus first third, (units, seeds)."""
    first, last = thirds(y)
    return last - first


def _to_checkpoints(interval: Sequence[float], steps: np.ndarray) -> tuple[float, float]:
    """An interval moved out to the checkpoints around it; beyond the last one it stays open (as it is)."""
    low, high = interval
    before = max(0, int(np.searchsorted(steps, low, "right")) - 1)
    return float(steps[before]), float(high if high > steps[-1] else steps[np.searchsorted(steps, high)])


def _resampled(y: np.ndarray, unit_weights: np.ndarray, seed_weights: np.ndarray) -> np.ndarray:
    """Mean curves (resamples, steps) under weights of units and seeds."""
    return np.einsum("bu,bs,usk->bk", unit_weights, seed_weights, y, optimize=True)


def transition(
    y: np.ndarray,
    steps: Steps,
    *,
    method: str = "logistic",
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 42,
) -> Transition:
    """The transition point of a curve, with a bootstrap interval over units and seeds.

    Args:
        y: (units, seeds, steps), as `curve` gives it.
        steps: ascending.
        method: `logistic` (midpoint in log steps) or `change point` (one jump between two checkpoints).
        confidence, resamples, seed: of the bootstrap.

    Raises:
        TrajectoryError: shapes do not match, NaN, or fewer than 4 checkpoints.
    """
    y, steps = _checked(y, steps)
    units, seeds, _ = y.shape
    if not units:
        nan = math.nan
        return Transition(method, nan, nan, nan, nan, nan, nan, False, nan, nan, 0, seeds)
    rise = _rise(y)
    low, high = bootstrap_interval(rise, confidence=confidence, resamples=resamples, seed=seed)
    shown = bool(low > 0 or high < 0)
    sign = 1.0 if rise.mean() >= 0 else -1.0
    found, sharpness = _fit(y.mean(axis=(0, 1))[None], steps, method, sign)
    beyond, interval = math.nan, (math.nan, math.nan)
    if shown:
        rng = np.random.default_rng(seed)
        curves = _resampled(y, _weights(units, resamples, rng), _weights(seeds, resamples, rng))
        drawn, _ = _fit(curves, steps, method, sign)
        tail = _tail(units, confidence)
        interval = _to_checkpoints(np.quantile(drawn, [tail, 1 - tail]), steps)
        beyond = float(np.mean(drawn >= min(steps[-1], _family(method, steps)[0].max())))
    return Transition(
        method=method,
        step=float(found[0]) if shown else math.nan,
        low=interval[0],
        high=interval[1],
        rise=float(rise.mean()),
        rise_low=low,
        rise_high=high,
        shown=shown,
        beyond=beyond,
        sharpness=float(sharpness[0]) if shown else math.nan,
        units=units,
        seeds=seeds,
    )


def _checked(y: np.ndarray, steps: Steps) -> tuple[np.ndarray, np.ndarray]:
    y, steps = np.asarray(y, float), np.asarray(steps)
    if y.ndim != 3 or y.shape[2] != len(steps) or np.isnan(y).any():
        raise TrajectoryError(f"expected (units, seeds, {len(steps)}) values without NaN, found shape {y.shape}")
    if len(steps) < 4 or (np.diff(steps) <= 0).any():
        raise TrajectoryError(f"expected at least 4 ascending steps, found {list(steps)}")
    return y, steps


def compare_transitions(
    y: np.ndarray,
    baseline: np.ndarray,
    steps: Steps,
    *,
    method: str = "logistic",
    confidence: float = 0.95,
    resamples: int = 4000,
    seed: int = 42,
) -> dict[str, Any]:
    """Whether a persona's transition comes at another step than the baseline's.

    Both curves are refitted in every resample with the *same* questions, and with the same seeds where both have as
    many (runs of one seed see the same rows in the same order): what is compared is paired. Resampling two or three
    seeds tells little of how much runs differ, so the runs' own midpoints are tested too (`between_runs`): the larger
    p counts, and the interval holds both. With one run on a side there is no such test, and p is of these runs alone.
    Two points between the same two checkpoints cannot be told apart but by the form of the curve.

    Args:
        y, baseline: (units, seeds, steps) of the same units, in the same order.
        steps, method, confidence, resamples, seed: as for `transition`.

    Returns:
        `difference` in steps (persona minus baseline; a point beyond the last checkpoint counts as lying at it), `low`,
        `high`, two-sided `p` (the larger of `p_questions`, by bootstrap, and `p_runs`), `shown` (both transitions are),
        `units`, `seeds`. Without a transition on both sides there is nothing to compare: NaN.
    """
    (y, steps), (baseline, _) = _checked(y, steps), _checked(baseline, steps)
    if y.shape[0] != baseline.shape[0]:
        raise TrajectoryError(f"{y.shape[0]} units against {baseline.shape[0]}: use the units that both have")
    single = [transition(v, steps, method=method, confidence=confidence, seed=seed) for v in (y, baseline)]
    units, seeds = y.shape[0], (y.shape[1], baseline.shape[1])
    found: dict[str, Any] = dict.fromkeys(("difference", "low", "high", "p", "p_questions", "p_runs"), math.nan)
    shown = all(t.shown for t in single)
    if shown:
        rng = np.random.default_rng(seed)
        by_unit = _weights(units, resamples, rng)
        by_seed = [_weights(n, resamples, rng) for n in seeds]
        if seeds[0] == seeds[1]:
            by_seed[1] = by_seed[0]
        drawn = [
            _fit(_resampled(v, by_unit, w), steps, method, math.copysign(1, t.rise))[0]
            for v, w, t in zip((y, baseline), by_seed, single)
        ]
        # Beyond the last checkpoint nothing was seen: a point there counts as if it lay at it.
        d, tail = np.subtract(*(np.minimum(x, steps[-1]) for x in drawn)), _tail(units, confidence)
        first, second = (min(t.step, float(steps[-1])) for t in single)
        runs = [
            np.minimum(_fit(v.mean(axis=0), steps, method, math.copysign(1, t.rise))[0], steps[-1])
            for v, t in zip((y, baseline), single)
        ]
        between = between_runs(*runs, grain=_grain(method, steps, (first, second)), confidence=confidence)
        by_question = _bootstrap_p(d, units)
        found = {
            "difference": first - second,
            "low": float(np.nanmin([np.quantile(d, tail), between["low"]])),
            "high": float(np.nanmax([np.quantile(d, 1 - tail), between["high"]])),
            "p": float(np.nanmax([by_question, between["p"]])),
            "p_questions": by_question,
            "p_runs": between["p"],
        }
    return found | {"shown": shown, "units": units, "seeds": min(seeds)}


def _grain(method: str, steps: np.ndarray, points: Sequence[float]) -> float:
    """How far apart the fit's candidate midpoints lie, around some points."""
    candidates = np.unique(_family(method, steps)[0])
    return float(np.mean(np.interp(points, candidates, np.gradient(candidates))))


def between_runs(
    one: np.ndarray, other: np.ndarray, *, grain: float = 0.0, confidence: float = 0.95
) -> dict[str, float]:
    """t test of two sets of runs, one number per run: paired where there are as many (same seeds), else Welch's.

    Args:
        one, other: (runs,) each.
        grain: spacing of the values that a number can take; runs that look equal differ by about that.
        confidence: of the interval.

    Returns:
        `low, high` of the difference of means, two-sided `p`; NaN with a single run on a side.
    """
    one, other = np.asarray(one, float), np.asarray(other, float)
    if min(len(one), len(other)) < 2:
        return dict.fromkeys(("low", "high", "p"), math.nan)
    rounding = grain**2 / 12
    if len(one) == len(other):
        variance, df = max(np.var(one - other, ddof=1), 2 * rounding) / len(one), len(one) - 1
    else:
        parts = np.array([max(np.var(x, ddof=1), rounding) / len(x) for x in (one, other)])
        variance = parts.sum()
        df = variance**2 / (parts**2 / [len(one) - 1, len(other) - 1]).sum() if variance else 1
    difference, se = float(one.mean() - other.mean()), math.sqrt(variance)
    half = se * float(sps.t.ppf((1 + confidence) / 2, df))
    p = 2 * float(sps.t.sf(abs(difference) / se, df)) if se else float(difference == 0)
    return {"low": difference - half, "high": difference + half, "p": p}


def transitions(course: pd.DataFrame, **settings: Any) -> pd.DataFrame:
    """Transition points, by both methods, of all curves of one preset, models one after the other."""
    rows = []
    for (model, _, persona, outcome), c in curves_of(course).items():
        for method in ("logistic", "change point"):
            found = transition(c.y, c.steps, method=method, **settings)
            rows.append(
                {
                    "persona": persona,
                    "outcome": outcome,
                    **found.as_dict(),
                    "gate": found.gate.status,
                    "last": c.steps[-1],
                    "left_out": len(c.left_out),
                    "missing": c.missing,
                    "rise_least": c.rise_bounds[0],
                    "rise_most": c.rise_bounds[1],
                    "model": model,
                }
            )
    return pd.DataFrame(rows)


def transition_comparisons(course: pd.DataFrame, baseline: str = BASELINE, **settings: Any) -> pd.DataFrame:
    """Each persona's transition against the baseline's, by model and outcome, of one preset.

    `p_adjusted`: Benjamini-Hochberg over the outcomes that H3 claims (`CLAIMED`), model by model; the others stand
    beside, untested.
    """
    curves, rows = curves_of(course), []
    for (model, preset, persona, outcome), c in curves.items():
        base = curves.get((model, preset, baseline, outcome))
        if persona != baseline and base is not None:
            found = compare_transitions(*common(c, base), c.steps, **settings)
            rows.append({"persona": persona, "outcome": outcome, **found, "model": model})
    table = pd.DataFrame(rows)
    if table.empty:
        return table
    claimed = table["p"].where(table["outcome"].isin(CLAIMED))
    table.insert(table.shape[1] - 1, "p_adjusted", claimed.groupby(table["model"]).transform(benjamini_hochberg))
    return table
