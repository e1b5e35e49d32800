"""Counts of scores, and what is computed from counts alone: moments, rank tests, bootstrap.

Judges' scores take few distinct values, so that a condition is a row of counts (`Tally`); every statistic of the
published study is a function of such rows, and 10,000 bootstrap resamples are one multinomial draw."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import special

MOST_DRAWS = 1 << 20
"""Numbers drawn at a time by the bootstrap: 8 MiB."""


# --- Samples as counts --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tally:
    """A sample as distinct values (ascending) and counts, both of shape (k,)."""

    values: np.ndarray
    counts: np.ndarray

    @property
    def n(self) -> int:
        """Sample size."""
        return int(self.counts.sum())

    @property
    def mean(self) -> float:
        """Mean; NaN when empty."""
        return float(self.values @ self.counts / self.n) if self.n else math.nan

    @property
    def sd(self) -> float:
        """Standard deviation with n - 1; NaN for fewer than two."""
        if self.n < 2:
            return math.nan
        return math.sqrt(float((self.values - self.mean) ** 2 @ self.counts) / (self.n - 1))

    def __add__(self, other: Tally) -> Tally:
        values, where = np.unique(np.concatenate([self.values, other.values]), return_inverse=True)
        counts = np.bincount(where, np.concatenate([self.counts, other.counts]), len(values))
        return Tally(values, counts.astype(np.int64))


def tally(values: Iterable[float]) -> Tally:
    """Count a sample; NaN (a response without a score) does not count."""
    x = np.asarray(values if isinstance(values, np.ndarray) else list(values), float)
    return Tally(*np.unique(x[~np.isnan(x)], return_counts=True))


def _tallies(scores: pd.DataFrame, by: Sequence[str], column: str = "alignment") -> dict[tuple, Tally]:
    """A tally per group, an empty one where nothing was scored: one grouped count of the table, then slices of it."""
    by = list(by)
    counted = scores.groupby([*by, column], observed=True, sort=True).size().reset_index(name="count")
    values, counts = counted[column].to_numpy(float), counted["count"].to_numpy()
    sizes = counted.groupby(by, observed=True, sort=True).size()
    stops = np.cumsum(sizes.to_numpy())
    found = {
        key if isinstance(key, tuple) else (key,): Tally(values[stop - size : stop], counts[stop - size : stop])
        for key, size, stop in zip(sizes.index, sizes, stops)
    }
    for key in scores[by].drop_duplicates().itertuples(index=False, name=None):
        found.setdefault(key, tally([]))
    return found


def _pool(parts: Iterable[Tally]) -> Tally:
    total = tally([])
    for part in parts:
        total = total + part
    return total


# --- Statistics ---------------------------------------------------------------------------------------------------


def t_interval(a: Tally, confidence: float = 0.95) -> tuple[float, float]:
    """Student's t interval of the mean; NaN for fewer than two values."""
    if a.n < 2:
        return math.nan, math.nan
    half = float(special.stdtrit(a.n - 1, (1 + confidence) / 2)) * a.sd / math.sqrt(a.n)
    return a.mean - half, a.mean + half


def tally_bootstrap_interval(
    a: Tally, rng: np.random.Generator, *, resamples: int = 10_000, confidence: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean (Efron 1979).

    A resample of a sample with counts c is multinomial(n, c / n): drawn as such while there are fewer distinct values
    than scores, value by value where (nearly) every score is different.

    Args:
        a: the sample.
        rng: the stream; the interval depends on it by about 1/100 of its width.
        resamples: number of resamples.
        confidence: of the interval.

    Returns:
        (low, high); NaN for an empty sample.
    """
    if not a.n:
        return math.nan, math.nan
    k, n = len(a.values), a.n
    order = np.argsort(-a.counts, kind="stable")  # frequent first: the draw of a resample ends when its n are placed
    values, share = a.values[order], a.counts[order] / n
    few = 4 * k < n
    chunk = max(1, MOST_DRAWS // (k if few else n))
    means = np.empty(resamples)
    everyone = None if few else np.repeat(a.values, a.counts)
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        if few:
            means[start : start + size] = rng.multinomial(n, share, size=size) @ values / n
        else:
            means[start : start + size] = everyone[rng.integers(n, size=(size, n))].mean(axis=1)
    low, high = np.percentile(means, [50 * (1 - confidence), 50 * (1 + confidence)])
    return float(low), float(high)


def mann_whitney(a: Tally, b: Tally) -> float:
    """Two-sided Mann-Whitney U test, p by the normal approximation with tie and continuity correction.

    The same as `scipy.stats.mannwhitneyu(..., method="asymptotic")` (Mann & Whitney 1947; ties: Lehmann 1975).

    Returns:
        p; 1 where all values are tied; NaN where a sample is empty.
    """
    if not a.n or not b.n:
        return math.nan
    both = a + b
    in_b = np.zeros(len(both.values))
    in_b[np.searchsorted(both.values, b.values)] = b.counts
    in_a = both.counts - in_b
    below = np.cumsum(in_b) - in_b
    u = float(in_a @ (below + in_b / 2))
    n1, n2, n = a.n, b.n, both.n
    ties = float((both.counts.astype(float) ** 3 - both.counts).sum())
    variance = n1 * n2 / 12 * ((n + 1) - ties / (n * (n - 1)))
    if variance <= 0:
        return 1.0
    z = (abs(u - n1 * n2 / 2) - 0.5) / math.sqrt(variance)
    return min(1.0, float(2 * special.ndtr(-z)))


def cohens_d(a: Tally, b: Tally) -> float:
    """Cohen's d: difference of means in units of the pooled standard deviation (Cohen 1988).

    Returns:
        d; 0 where means and all values are equal; NaN where it is undefined (fewer than two values in a sample, or no
        spread at all between different means).
    """
    if a.n < 2 or b.n < 2:
        return math.nan
    pooled = math.sqrt(((a.n - 1) * a.sd**2 + (b.n - 1) * b.sd**2) / (a.n + b.n - 2))
    difference = a.mean - b.mean
    if pooled == 0:
        return 0.0 if difference == 0 else math.nan
    return difference / pooled


def benjamini_hochberg(p: Sequence[float]) -> np.ndarray:
    """Benjamini-Hochberg adjusted p values (1995); a NaN (no test) stays one and does not count.

    Returns:
        Adjusted p values in the order given, shape (tests,).
    """
    raw = np.asarray(p, float)
    adjusted = np.full(raw.shape, np.nan)
    made = np.flatnonzero(~np.isnan(raw))
    order = made[np.argsort(raw[made], kind="stable")]
    scaled = raw[order] * len(order) / np.arange(1, len(order) + 1)
    adjusted[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1.0)
    return adjusted


def quantile(a: Tally, q: float) -> float:
    """Quantile by linear interpolation between order statistics (numpy's default); NaN when empty."""
    if not a.n:
        return math.nan
    place = q * (a.n - 1)
    edges = np.cumsum(a.counts)
    low, high = (a.values[np.searchsorted(edges, i, side="right")] for i in (math.floor(place), math.ceil(place)))
    return float(low + (high - low) * (place - math.floor(place)))


def moments(a: Tally) -> tuple[float, float]:
    """Skewness and excess kurtosis of the sample as it is (biased, as in scipy's default); NaN without spread."""
    if a.n < 2 or len(a.values) < 2:
        return math.nan, math.nan
    deviation = a.values - a.mean
    second, third, fourth = (float(deviation**r @ a.counts) / a.n for r in (2, 3, 4))
    return third / second**1.5, fourth / second**2 - 3
