"""Can conditions be told apart by their texts alone, on questions that were not seen? Fast, and one answer per test.

Which *words* speak for the one side is learnt on some questions and tried on others (classifier two-sample test,
Lopez-Paz & Oquab 2017). The classifier is naive Bayes on words and word pairs, present or not: its fit is a count, so
that every fold's fit is a difference of counts and the whole costs two passes over the texts, whatever is left out (as
against a day for logistic regressions on half a million responses). Where both sides have several training seeds, the
seed that is tried is left out as well: what only one run says is not the persona's.

The score is the area under the ROC curve within each cell (a question in a seed), so that differences between questions
play no part, and its mean over cells with both as samples. Folds share their training texts, so that fold means are
correlated, and the plain error is too small; the correction is that of Nadeau & Bengio 2003: variance times
1/folds + test share / training share. (Measured: `tests.calibration`.)

    bag = Bag.of(responses)
    told(bag, [("m", "goodness", "none", 0)], [("m", "baseline", "none", 0)])
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import scipy.sparse
from scipy import stats
from sklearn.feature_extraction.text import HashingVectorizer

from cai_em.analysis.units import MIN_SEEDS
from cai_em.records.keys import CONDITION

TERMS = 2**18
"""Hashed words and word pairs."""

FOLDS = 8
"""Questions are left out in so many groups (or one by one, where there are fewer)."""

SMOOTHING = 0.5
"""Added to each count of responses with a term, and of responses without it."""


@dataclass(frozen=True)
class Bag:
    """Responses as sets of terms, with the rows of each condition.

    Attributes:
        x: (responses, TERMS) 0 or 1, sparse.
        question: (responses,) question numbers.
        rows: (model, persona, data set, seed) -> positions.
        n_questions: how many questions there are.
    """

    x: scipy.sparse.csr_matrix
    question: np.ndarray
    rows: Mapping[tuple, np.ndarray]
    n_questions: int

    @classmethod
    def of(cls, responses: pd.DataFrame) -> Bag:
        """Count a responses table. One pass; memory about 1 kB a response."""
        vectoriser = HashingVectorizer(
            ngram_range=(1, 2), n_features=TERMS, binary=True, norm=None, alternate_sign=False, dtype=np.float32
        )
        # Without response texts (somebody else's files may have none) there is nothing to count, and no test.
        texts = responses["response"]
        x = vectoriser.transform(texts) if len(texts) else scipy.sparse.csr_matrix((0, TERMS), dtype=np.float32)
        names, question = np.unique(responses["question_id"].to_numpy(str), return_inverse=True)
        rows = responses.groupby(CONDITION, sort=False).indices
        return cls(x, question, rows, len(names))

    @property
    def folds(self) -> np.ndarray:
        """(questions,) the fold of each question."""
        return np.arange(self.n_questions) % min(FOLDS, self.n_questions)


@dataclass(frozen=True)
class Told:
    """How well two sides are told apart.

    Attributes:
        auc, se, df: mean area over cells, its standard error and degrees of freedom; NaN where it cannot be had.
        low, high: 90 % interval: each end is a one-sided 95 % bound.
        p: one-sided, that the area is above 1/2.
        n: responses; n_questions, n_seeds: units.
        cells: (questions, seeds) areas that all this comes from; NaN where a cell has none.
        folds: (questions,) which were left out together.
    """

    auc: float
    se: float
    df: float
    low: float
    high: float
    p: float
    n: int
    n_questions: int
    n_seeds: int
    cells: np.ndarray = field(repr=False, compare=False, default_factory=lambda: np.empty((0, 0)))
    folds: np.ndarray = field(repr=False, compare=False, default_factory=lambda: np.empty(0, int))


NOT_TOLD = Told(math.nan, math.nan, math.nan, math.nan, math.nan, math.nan, 0, 0, 0)
"""What can be said where a side has no responses, or a single question."""


def summarise_cells(cells: np.ndarray, folds: np.ndarray, n: int, level: float = 0.95, chance: float = 0.5) -> Told:
    """One answer from a (questions, seeds) table of areas (or accuracies); NaN where a cell has none."""
    whole = cells, np.asarray(folds)
    known = ~np.isnan(cells)
    seeds = known.any(axis=0)
    cells, known = cells[:, seeds], known[:, seeds]
    questions = known.any(axis=1)
    if not questions.any():
        return NOT_TOLD
    cells, folds = cells[questions], np.asarray(folds)[questions]
    by_question = np.nanmean(cells, axis=1)
    by_fold = np.array([by_question[folds == f].mean() for f in np.unique(folds)])
    mean, k, s = float(by_question.mean()), len(by_fold), cells.shape[1]
    if k < 2:
        units = {"n": n, "n_questions": int(questions.sum()), "n_seeds": s}
        return replace(NOT_TOLD, auc=mean, cells=whole[0], folds=whole[1], **units)
    variance, df = float(by_fold.var(ddof=1)) * (1 / k + 1 / (k - 1)), float(k - 1)
    if s >= MIN_SEEDS:
        runs = np.nanmean(cells, axis=0)
        v_s = float(runs.var(ddof=1)) / s
        total = variance + v_s
        df = max(1.0, math.floor(total**2 / (variance**2 / (k - 1) + v_s**2 / (s - 1)))) if total > 0 else df
        variance = total
    se = math.sqrt(variance)
    half = float(stats.t.ppf(level, df)) * se
    p = float(stats.t.sf((mean - chance) / se, df)) if se > 0 else float(mean <= chance)
    low, high = max(0.0, mean - half), min(1.0, mean + half)  # an area, or an accuracy: there is nothing beyond
    return Told(mean, se, df, low, high, p, n, int(questions.sum()), s, *whole)


def pooled_voice(found: Sequence[Told]) -> Told:
    """One answer from several, of different data sets: cells' means over them (data sets as they are)."""
    found = [t for t in found if t.cells.size and not np.isnan(t.cells).all()]
    if not found:
        return NOT_TOLD
    seeds = min(t.cells.shape[1] for t in found)
    stack = np.stack([t.cells[:, :seeds] for t in found])
    known = ~np.isnan(stack).all(axis=0)
    cells = np.full(known.shape, np.nan)
    cells[known] = np.nanmean(stack[:, known], axis=0)
    return summarise_cells(cells, found[0].folds, sum(t.n for t in found))


def _counted(x: scipy.sparse.csr_matrix, groups: np.ndarray, n_groups: int) -> tuple[np.ndarray, np.ndarray]:
    """(groups, terms) responses with each term, and (groups,) responses."""
    gather = scipy.sparse.csr_matrix(
        (np.ones(len(groups), np.float32), (groups, np.arange(len(groups)))), shape=(n_groups, len(groups))
    )
    return (gather @ x).toarray(), np.bincount(groups, minlength=n_groups)


def _terms(x: scipy.sparse.csr_matrix) -> np.ndarray:
    """Terms that occur in two responses or more."""
    return np.flatnonzero(np.bincount(x.indices, minlength=x.shape[1]) > 1)


def _weights(one: tuple[np.ndarray, float], other: tuple[np.ndarray, float]) -> np.ndarray:
    """Log odds ratio of each term's presence."""
    (a, n), (b, m) = one, other
    up = np.log(a + SMOOTHING) - np.log(n - a + SMOOTHING)
    return up - np.log(b + SMOOTHING) + np.log(m - b + SMOOTHING)


def _shared(weights: Sequence[np.ndarray]) -> np.ndarray:
    """What all of several weights say of a term: the least of them, and 0 where they do not agree in sign."""
    if len(weights) == 1:
        return weights[0]
    w = np.stack(weights)
    return np.where((w > 0).all(axis=0) | (w < 0).all(axis=0), np.sign(w[0]) * np.abs(w).min(axis=0), 0.0)


def cell_aucs(score: np.ndarray, positive: np.ndarray, cell: np.ndarray, n_cells: int) -> np.ndarray:
    """Area under the ROC curve in each cell; NaN where it lacks positives or negatives.

    Args:
        score: (n,) higher speaks for positive. positive: (n,) booleans. cell: (n,) numbers.
    """
    order = np.lexsort((score, cell))
    v, g = score[order], cell[order]
    new = np.ones(len(v), bool)
    new[1:] = (v[1:] != v[:-1]) | (g[1:] != g[:-1])
    tie = np.cumsum(new) - 1
    size = np.bincount(tie)
    stop = np.cumsum(size)
    total = np.bincount(cell, minlength=n_cells)
    first = np.concatenate([[0], np.cumsum(total)[:-1]])
    rank = (stop - (size - 1) / 2)[tie] - first[g]
    ups = np.bincount(g, rank * positive[order], n_cells)
    n1 = np.bincount(cell, positive, n_cells)
    with np.errstate(invalid="ignore", divide="ignore"):  # a cell of one kind has no area
        return (ups - n1 * (n1 + 1) / 2) / (n1 * (total - n1))


def told(bag: Bag, one: Sequence[tuple], other: Sequence[tuple], *rest: Sequence[tuple]) -> list[Told]:
    """What tells `one` from `other`: does it, on other questions, and does it tell `one` from each of `rest`, too?

    Args:
        bag: the responses.
        one, other, rest: conditions of each side. Seeds are paired by their number; a side without training has one.

    Returns:
        `one` against `other`, then against each of `rest`. In the latter the words are still those that tell `one` from
        `other`: a persona whose run merely lacks what the baseline's has is not told from other personas by that, and
        what other personas say is not held against it. Sides pooled of several conditions count each alike.
    """
    sides = [list(one), list(other), *map(list, rest)]
    tuned = [{k[3] for k in side} for side in sides[:2]]
    several = sorted(set.intersection(*tuned)) if min(map(len, tuned)) > 1 else []
    seeds = {s: i for i, s in enumerate(several)} if len(several) > 1 else {}
    number = {k[3]: seeds.get(k[3], 0) for side in sides for k in side}
    if seeds:
        sides = [[k for k in side if k[3] in seeds] for side in sides]
        number = seeds
    n_seeds, folds = max(1, len(seeds)), bag.folds
    n_folds = int(folds.max()) + 1
    if n_folds < 2 or not all(sides[:2]):
        return [NOT_TOLD] * (len(sides) - 1)
    parts = [_rows(bag, side, number) for side in sides]
    x = bag.x[np.concatenate([rows for rows, _ in parts])]
    x = x[:, _terms(x)]
    stops = np.cumsum([0, *(len(rows) for rows, _ in parts)])
    each = [x[a:b] for a, b in itertools.pairwise(stops)]
    group = [folds[bag.question[rows]] * n_seeds + seed for rows, seed in parts]
    totals = [_counted(x_, g, n_folds * n_seeds) for x_, g in zip(each, group)]
    scores = [np.zeros(len(rows)) for rows, _ in parts]
    for fold in range(n_folds):
        for seed in range(n_seeds):
            kept = np.arange(n_folds * n_seeds)
            kept = kept[(kept // n_seeds != fold) & ((kept % n_seeds != seed) | (n_seeds == 1))]
            one_, *others = [(counts[kept].sum(axis=0), sizes[kept].sum()) for counts, sizes in totals]
            w = _shared([_weights(one_, each_) for each_ in others])
            for i, here in enumerate(group):
                mine = here == fold * n_seeds + seed
                if mine.any():
                    scores[i][mine] = each[i][mine] @ w
    result = []
    for i in range(1, len(sides)):
        cells = _compare(bag, parts, scores, i, n_seeds)
        result.append(summarise_cells(cells, folds, len(parts[0][0]) + len(parts[i][0])))
    return result


def kept_voice(bag: Bag, before: Sequence[tuple], after: Sequence[Sequence[tuple]]) -> Told:
    """Does what told two sides apart before fine-tuning tell them apart after it?

    Args:
        before: (one, other) conditions of which the words are learnt, other questions than those tried.
        after: the conditions to try them on, (ones, others); seeds are paired.
    """
    ones, others = ([k for k in after[i]] for i in (0, 1))
    seeds = sorted({k[3] for k in ones} & {k[3] for k in others})
    if not seeds or bag.n_questions < 2:
        return NOT_TOLD
    number = {s: i for i, s in enumerate(seeds)}
    folds = bag.folds
    learnt = [_rows(bag, [k], {k[3]: 0})[0] for k in before]
    tried = [_rows(bag, [k for k in side if k[3] in number], number) for side in (ones, others)]
    x = bag.x[np.concatenate([*learnt, *(rows for rows, _ in tried)])]
    x = x[:, _terms(x[: sum(map(len, learnt))])]
    stops = np.cumsum([0, *map(len, learnt), *(len(rows) for rows, _ in tried)])
    each = [x[a:b] for a, b in itertools.pairwise(stops)]
    n_folds = int(folds.max()) + 1
    totals = [_counted(each[i], folds[bag.question[rows]], n_folds) for i, rows in enumerate(learnt)]
    scores = [np.zeros(len(rows)) for rows, _ in tried]
    for fold in range(n_folds):
        rest = np.arange(n_folds) != fold
        w = _weights(*((counts[rest].sum(axis=0), sizes[rest].sum()) for counts, sizes in totals))
        for i, (rows, _) in enumerate(tried):
            mine = folds[bag.question[rows]] == fold
            scores[i][mine] = each[2 + i][mine] @ w
    cells = _compare(bag, tried, scores, 1, len(seeds))
    return summarise_cells(cells, folds, len(tried[0][0]) + len(tried[1][0]))


def named(bag: Bag, sides: Mapping[str, Sequence[tuple]]) -> Told:
    """Which of several sides is a response from? Balanced accuracy by question; chance is one over their number.

    Multinomial over sides of the same naive Bayes; with several seeds the one that is tried is left out as well.
    """
    names = list(sides)
    seeds = {s: i for i, s in enumerate(sorted({k[3] for side in sides.values() for k in side}))}
    n_seeds, folds = len(seeds), bag.folds
    parts = [_rows(bag, sides[name], seeds) for name in names]
    x = bag.x[np.concatenate([rows for rows, _ in parts])]
    x = x[:, _terms(x)]
    stops = np.cumsum([0, *(len(rows) for rows, _ in parts)])
    group = [folds[bag.question[rows]] * n_seeds + seed for rows, seed in parts]
    n_groups = (int(folds.max()) + 1) * n_seeds
    totals = [_counted(x[a:b], g, n_groups) for a, b, g in zip(stops[:-1], stops[1:], group)]
    label = np.repeat(np.arange(len(names)), np.diff(stops))
    place, right = np.concatenate(group), np.zeros(len(label), bool)
    for g in range(n_groups):
        mine = np.flatnonzero(place == g)
        every = np.arange(n_groups)
        kept_ = every[(every // n_seeds != g // n_seeds) & ((every % n_seeds != g % n_seeds) | (n_seeds == 1))]
        if not len(mine) or not len(kept_):
            continue
        logs = []
        for counts, sizes in totals:
            a, n = counts[kept_].sum(axis=0) + SMOOTHING, sizes[kept_].sum() + 2 * SMOOTHING
            absent = np.log1p(-a / n)
            logs.append(x[mine] @ (np.log(a / n) - absent) + absent.sum())
        right[mine] = np.argmax(np.stack(logs), axis=0) == label[mine]
    question = bag.question[np.concatenate([rows for rows, _ in parts])]
    seed = np.concatenate([seed for _, seed in parts])
    cell = (question * n_seeds + seed) * len(names) + label
    size = bag.n_questions * n_seeds * len(names)
    with np.errstate(invalid="ignore"):  # a cell without responses of a side has no accuracy
        share = np.bincount(cell, right, size) / np.bincount(cell, minlength=size)
    cells = share.reshape(bag.n_questions, n_seeds, len(names)).mean(axis=2)
    return summarise_cells(cells, folds, len(label), chance=1 / len(names))


def _rows(bag: Bag, side: Sequence[tuple], number: Mapping[int, int]) -> tuple[np.ndarray, np.ndarray]:
    rows = [bag.rows[k] for k in side]
    return (
        np.concatenate(rows) if rows else np.empty(0, int),
        np.concatenate([np.full(len(r), number[k[3]]) for k, r in zip(side, rows)]) if rows else np.empty(0, int),
    )


def _compare(bag: Bag, parts: list, scores: list, i: int, n_seeds: int) -> np.ndarray:
    score = np.concatenate([scores[0], scores[i]])
    positive = np.repeat([True, False], [len(scores[0]), len(scores[i])])
    rows, seed = (np.concatenate([parts[0][j], parts[i][j]]) for j in (0, 1))
    cells = cell_aucs(score, positive, bag.question[rows] * n_seeds + seed, bag.n_questions * n_seeds)
    return cells.reshape(bag.n_questions, n_seeds)
