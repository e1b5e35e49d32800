"""TODO."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy.linalg
import scipy.sparse
import sklearn
from joblib import Parallel, delayed
from scipy.stats import rankdata
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from cai_em.analysis.units import DesignError, bootstrap_interval
from cai_em.records.keys import BASELINE, CONDITION, NO_DATASET

C = 1.0
"""Inverse regularisation of the logistic regression (scikit-learn's default)."""
SCOPES = {
    "persona": "persona against baseline",
    "persona_others": "persona against other personas",
    "persona_kept": "persona against baseline, learned before fine-tuning",
    "personas": "all personas of a data set",
    "dataset": "data set against no fine-tuning",
    "dataset_others": "data set against other data sets",
    "datasets": "all data sets of a persona",
    "expression": "judged persona expression against baseline",
    "uptake": "judged in its own domain against no fine-tuning",
}
"""What each test of `classify` tells apart."""


# --- Classifier two-sample tests -----------------------------------------------------------------------------------


def features(texts: Iterable[str]) -> scipy.sparse.csr_matrix:
    """TF-IDF of word 1-2-grams that occur in two texts or more, (n_texts, n_terms). Uses no label."""
    return TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True).fit_transform(texts)


def held_out_scores(x: scipy.sparse.csr_matrix, y: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Decision values of one-against-rest logistic regressions, each group predicted by a fit on the others.

    Args:
        x: (n, terms) features.
        y: (n,) class numbers 0..K-1.
        groups: (n,) questions.

    Returns:
        (n, K) decision values; for two classes (n, 2) with the first column the negative of the second.
    """
    k = int(y.max()) + 1
    scores = np.zeros((len(y), k))
    with sklearn.config_context(assume_finite=True):  # checking the same sparse matrix for NaN K times costs a third
        for group in np.unique(groups):
            test = groups == group
            x_train, x_test, y_train = x[~test], x[test], y[~test]
            for c in range(k) if k > 2 else [1]:
                model = LogisticRegression(C=C, solver="liblinear", dual=True, tol=1e-2, max_iter=1000, random_state=0)
                scores[test, c] = model.fit(x_train, y_train == c).decision_function(x_test)
    if k == 2:
        scores[:, 0] = -scores[:, 1]
    return scores


class OneStep:
    """The first Newton step of the logistic regression from zero, with whole groups left out, for many labellings.

    At zero every logistic weight is 1/4, so the step is ridge regression with penalty 4/C. Its predictions are linear
    in the labels: with G = (X X' + 4/C I)^-1, computed once, those of a group left out are y - G_gg^-1 (G y)_g.
    """

    def __init__(self, x: scipy.sparse.csr_matrix, groups: np.ndarray) -> None:
        gram = (x @ x.T).toarray().astype(np.float32)
        gram[np.diag_indices_from(gram)] += 4 / C
        factor, info = scipy.linalg.lapack.spotrf(gram, lower=1, overwrite_a=1)
        inverse, info = scipy.linalg.lapack.spotri(factor, lower=1, overwrite_c=1)
        if info:
            raise np.linalg.LinAlgError(f"features of {x.shape[0]} texts gave a singular kernel (info {info})")
        self._inverse = np.tril(inverse) + np.tril(inverse, -1).T
        self._groups = [np.flatnonzero(groups == g) for g in np.unique(groups)]
        self._blocks = [scipy.linalg.cho_factor(self._inverse[np.ix_(i, i)]) for i in self._groups]

    def predict(self, labels: np.ndarray) -> np.ndarray:
        """Held-out predictions, (n, m), of m label columns (n, m) with mean about zero."""
        labels = np.asarray(labels, np.float32)
        projected = self._inverse @ labels
        result = np.empty_like(labels)
        for rows, block in zip(self._groups, self._blocks):
            result[rows] = labels[rows] - scipy.linalg.cho_solve(block, projected[rows])
        return result


def permuted(y: np.ndarray, groups: np.ndarray, permutations: int, rng: np.random.Generator) -> np.ndarray:
    """Labels permuted within each group, (n, permutations): exchangeable when the conditions' responses are alike."""
    result = np.empty((len(y), permutations), dtype=y.dtype)
    for group in np.unique(groups):
        rows = np.flatnonzero(groups == group)
        result[rows] = rng.permuted(np.tile(y[rows, None], (1, permutations)), axis=0)
    return result


def group_auc(scores: np.ndarray, positive: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Area under the ROC curve within each group, so that differences between questions play no part.

    Args:
        scores: (n, m) m columns of scores; higher speaks for positive.
        positive: (n, m) or (n, 1) booleans.
        groups: (n,).

    Returns:
        (groups, m); NaN where a group lacks positives or negatives.
    """
    positive = np.broadcast_to(positive, scores.shape)
    result = []
    for group in np.unique(groups):
        rows = groups == group
        ranks, wanted = rankdata(scores[rows], axis=0), positive[rows]
        n1 = wanted.sum(axis=0)
        with np.errstate(invalid="ignore", divide="ignore"):  # a group without positives or negatives has no AUC
            result.append(((ranks * wanted).sum(axis=0) - n1 * (n1 + 1) / 2) / (n1 * (len(wanted) - n1)))
    return np.array(result)


def group_accuracy(scores: np.ndarray, y: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Balanced accuracy of the largest score within each group: mean over classes of the share named right.

    Chance is 1/K for any predictions that know nothing of the labels, whatever the classes' sizes.

    Args:
        scores: (n, K).
        y: (n,) class numbers.

    Returns:
        (groups,)
    """
    right = scores.argmax(axis=1) == y
    result = []
    for group in np.unique(groups):
        rows = groups == group
        result.append(np.mean([right[rows & (y == c)].mean() for c in np.unique(y[rows])]))
    return np.array(result)


def two_sample(
    x: scipy.sparse.csr_matrix, y: np.ndarray, groups: np.ndarray, *, permutations: int = 200, seed: int = 0
) -> dict[str, Any]:
    """Can the classifier tell two sets of responses apart on questions that it has not seen?

    Args:
        x: (n, terms) features.
        y: (n,) 0 or 1.
        groups: (n,) questions; at least two.

    Returns:
        `estimate, low, high` (AUC within question, mean over questions, bootstrap over questions), `chance`, `p`
        (one-sided), `estimate_one_step` (the AUC that `p` belongs to), `chance_low, chance_high` (its middle 95 % under
        permutation), `n, n_questions, permutations`.
    """
    rng = np.random.default_rng(seed)
    y = np.asarray(y, int)
    by_group = group_auc(held_out_scores(x, y, groups)[:, [1]], (y == 1)[:, None], groups)[:, 0]
    labels = np.column_stack([y, permuted(y, groups, permutations, rng)])
    one_step = OneStep(x, groups).predict(labels - y.mean())
    null = np.nanmean(group_auc(one_step, labels == 1, groups), axis=0)
    return _result("AUC", by_group, 0.5, null[0], null[1:], len(y), seed)


def pairwise_auc(
    scores: np.ndarray, labels: np.ndarray, c: int, others: Sequence[int], groups: np.ndarray
) -> np.ndarray:
    """AUC within each group of class `c` against each other class in turn.

    Ties count by the order of the rows, which must therefore be random with respect to the labels.

    Args:
        scores: (n, m) m columns of scores for class c.
        labels: (n, m) class numbers.

    Returns:
        (others, groups, m); NaN where a group lacks one of the two classes.
    """
    names = np.unique(groups)
    result = np.empty((len(others), len(names), scores.shape[1]))
    for g, name in enumerate(names):
        rows = groups == name
        order = np.argsort(scores[rows], axis=0, kind="stable")
        ranked = np.take_along_axis(labels[rows], order, axis=0)
        mine = ranked == c
        for o, other in enumerate(others):
            theirs = ranked == other
            below = (np.cumsum(theirs, axis=0) * mine).sum(axis=0)
            with np.errstate(invalid="ignore", divide="ignore"):  # a class missing from a group has no AUC
                result[o, g] = below / (mine.sum(axis=0) * theirs.sum(axis=0))
    return result


def _near(aucs: np.ndarray) -> np.ndarray:
    """AUCs by group against the class at the lower quartile of the others: (others, groups, m) -> (groups, m)."""
    means = np.nanmean(aucs, axis=1)
    place = np.argsort(means, axis=0, kind="stable")[(len(means) - 1) // 4]
    return np.take_along_axis(aucs, place[None, None, :], axis=0)[0]


def many_sample(
    x: scipy.sparse.csr_matrix,
    y: np.ndarray,
    groups: np.ndarray,
    *,
    reference: int | None = None,
    permutations: int = 200,
    cap: int = 20,
    seed: int = 0,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Can the classifier name which of K sets a response is from, and tell each set from the others?

    A set is told from the others when it is told from three quarters of them: the AUC given is the one against the
    set at the lower quartile. An average would not do: sets that a manipulation missed are all alike, yet each is
    easily told from those that it reached.

    Args:
        x, y, groups: as in `two_sample`, with classes 0..K-1.
        reference: a class (the baseline) that is left out of the others.
        cap: at most so many responses per class and question take part in the permutations, a random choice; the
            test stays exact, and costs a tenth.

    Returns:
        The accuracy (balanced, within question, mean over questions) and the K AUCs of each class against the others,
        each as `two_sample` gives them. With a single other class there is nothing to tell from, and no AUC.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(y))  # so that no tie is broken in favour of a class
    x, y, groups = x[order], np.asarray(y, int)[order], groups[order]
    k = int(y.max()) + 1
    scores = held_out_scores(x, y, groups)
    some = _capped(y, groups, cap)
    ys, gs = y[some], groups[some]
    labels = np.column_stack([ys, permuted(ys, gs, permutations, rng)])
    step = OneStep(x[some], gs)
    predicted = np.stack([step.predict((labels == c) - np.float32((ys == c).mean())) for c in range(k)])
    null = np.array([group_accuracy(predicted[:, :, m].T, labels[:, m], gs).mean() for m in range(permutations + 1)])
    accuracy = _result("accuracy", group_accuracy(scores, y, groups), 1 / k, null[0], null[1:], len(y), seed)
    rows = []
    classes = [c for c in range(k) if c != reference]
    for c in classes if len(classes) > 1 else []:
        others = [o for o in classes if o != c]
        near = _near(pairwise_auc(scores[:, [c]], y[:, None], c, others, groups))[:, 0]
        null = np.nanmean(_near(pairwise_auc(predicted[c], labels, c, others, gs)), axis=0)
        n = int(np.isin(y, classes).sum())
        rows.append({"class": c, **_result("AUC", near, 0.5, null[0], null[1:], n, seed)})
    return accuracy, rows


def _capped(y: np.ndarray, groups: np.ndarray, cap: int) -> np.ndarray:
    """The first `cap` rows of each class in each group; the rows are in random order already."""
    return np.flatnonzero(pd.DataFrame({"y": y, "g": groups}).groupby(["y", "g"]).cumcount().to_numpy() < cap)


def _result(
    metric: str, by_group: np.ndarray, chance: float, observed: float, null: np.ndarray, n: int, seed: int
) -> dict[str, Any]:
    by_group = by_group[~np.isnan(by_group)]
    low, high = bootstrap_interval(by_group, resamples=2000, seed=seed)
    return {
        "metric": metric,
        "estimate": float(by_group.mean()),
        "low": low,
        "high": high,
        "chance": chance,
        "p": float((1 + np.sum(null >= observed - 1e-9)) / (1 + len(null))),
        "estimate_one_step": float(observed),
        "chance_low": float(np.quantile(null, 0.025)),
        "chance_high": float(np.quantile(null, 0.975)),
        "n": n,
        "n_questions": len(by_group),
        "permutations": len(null),
    }


# --- All tests of a study ------------------------------------------------------------------------------------------


TEST_COLUMNS = [
    *("scope", "model", "persona", "dataset", "seed", "n_classes", "metric", "estimate", "low", "high", "chance", "p"),
    *("estimate_one_step", "chance_low", "chance_high", "n", "n_questions", "permutations"),
]
"""Columns of the table of tests, there even when no condition has enough responses for a test."""


def classify(
    responses: pd.DataFrame,
    *,
    permutations: int = 200,
    min_responses: int = 20,
    apart: Collection[str] = (),
    seed: int = 0,
    jobs: int = 1,
) -> pd.DataFrame:
    """Every classifier test that the conditions allow, from the responses alone.

    Args:
        responses: responses table (needs `response`), or scores joined with responses.
        min_responses: a condition with fewer takes no part.
        apart: personas that are compared with the baseline only, and are not among the others that a persona must be
            told from: those filed under a data set that they were not trained on.
        jobs: processes.

    Returns:
        One row per test: `scope` (see `SCOPES`), `model, persona, dataset, seed` (null where the test is about all),
        and what `two_sample` gives; `n_classes`. Tests that need a partner which is not there have no row.

    Raises:
        DesignError: fewer than two questions, so that none can be held out.
    """
    tasks = []
    for model, part in responses.groupby("model", sort=False):
        if part["question_id"].nunique() < 2:
            raise DesignError(f"{model}: one question only; to hold whole questions out there must be two or more")
        part = part.reset_index(drop=True)
        x = features(part["response"])
        groups = part["question_id"].to_numpy()
        rows = {key: idx for key, idx in part.groupby(CONDITION[1:]).indices.items() if len(idx) >= min_responses}
        for dataset, number in dict.fromkeys((d, s) for _, d, s in rows):
            members = {p: i for (p, d, s), i in rows.items() if (d, s) == (dataset, number)}
            tasks.append((_persona_tests, model, dataset, number, members, x, groups, frozenset(apart)))
            before = {p: i for (p, d, _), i in rows.items() if d == NO_DATASET}
            both = {
                (p, d): i for p in members if p in before for d, i in ((dataset, members[p]), (NO_DATASET, before[p]))
            }
            if dataset != NO_DATASET and (BASELINE, dataset) in both:
                tasks.append((_kept_tests, model, dataset, number, both, x, groups, None))
        for persona, number in dict.fromkeys((p, s) for p, d, s in rows if d != NO_DATASET):
            members = {d: i for (p, d, s), i in rows.items() if (p, s) == (persona, number) and d != NO_DATASET}
            # A model that was not fine-tuned has no training seed: it is the partner of every seed.
            untuned = next((i for (p, d, _), i in rows.items() if (p, d) == (persona, NO_DATASET)), None)
            tasks.append((_dataset_tests, model, persona, number, members, x, groups, untuned))
    settings = {"permutations": permutations, "seed": seed}
    found = Parallel(n_jobs=jobs)(delayed(_one_thread)(task[0], *_small(*task[1:]), **settings) for task in tasks)
    return pd.DataFrame([row for rows in found for row in rows], columns=TEST_COLUMNS)


def _one_thread(task: Callable[..., list[dict[str, Any]]], *arguments: Any, **settings: int) -> list[dict[str, Any]]:
    """A task with one thread for linear algebra: their number decides the last bits, and those decide between ties."""
    with threadpool_limits(1):
        return task(*arguments, **settings)


def _small(model: str, key: str, number: int, members: dict, x: Any, groups: np.ndarray, last: Any) -> tuple:
    """A task with only the rows and terms that it needs, so that little travels between processes."""
    untuned = last if isinstance(last, np.ndarray) else None
    used = np.concatenate([*members.values(), *([] if untuned is None else [untuned])])
    x = x[used]
    x = x[:, np.flatnonzero(x.getnnz(axis=0) > 1)]
    place = {row: i for i, row in enumerate(used)}
    renumber = lambda rows: np.array([place[r] for r in rows])  # noqa: E731
    members = {name: renumber(rows) for name, rows in members.items()}
    return model, key, number, members, x, groups[used], last if untuned is None else renumber(untuned)


def _pair(x: Any, groups: np.ndarray, one: np.ndarray, other: np.ndarray, **settings: int) -> dict[str, Any]:
    rows = np.concatenate([other, one])
    y = np.repeat([0, 1], [len(other), len(one)])
    return {"n_classes": 2, **two_sample(x[rows], y, groups[rows], **settings)}


def _all(x: Any, groups: np.ndarray, members: dict, reference: str | None, **settings: int) -> tuple[dict, list]:
    names = list(members)
    rows = np.concatenate(list(members.values()))
    y = np.repeat(np.arange(len(names)), [len(i) for i in members.values()])
    number = names.index(reference) if reference in names else None
    whole, each = many_sample(x[rows], y, groups[rows], reference=number, **settings)
    k = {"n_classes": len(names)}
    return k | whole, [(names[row.pop("class")], k | row) for row in each]


def _persona_tests(
    model: str,
    dataset: str,
    number: int,
    members: dict,
    x: Any,
    groups: np.ndarray,
    apart: frozenset[str],
    **settings: int,
) -> list[dict[str, Any]]:
    key = {"model": model, "dataset": dataset, "seed": number}
    rows = []
    if BASELINE in members:
        for persona in members:
            if persona != BASELINE:
                test = _pair(x, groups, members[persona], members[BASELINE], **settings)
                rows.append({"scope": "persona", **key, "persona": persona, **test})
    members = {persona: index for persona, index in members.items() if persona not in apart}
    if len(members) > 1:
        whole, each = _all(x, groups, members, BASELINE, **settings)
        rows.append({"scope": "personas", **key, "persona": None, **whole})
        rows += [{"scope": "persona_others", **key, "persona": persona, **test} for persona, test in each]
    return rows


def _kept_tests(
    model: str,
    dataset: str,
    number: int,
    members: dict[tuple[str, str], np.ndarray],
    x: Any,
    groups: np.ndarray,
    last: None,
    *,
    permutations: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Is what told each persona from the baseline *before* fine-tuning still there after it?

    A persona that is missing from its fine-tuned condition may be told from a baseline whose run differs, and from
    other personas, which are there. It cannot show what it showed before. Fitted on the untuned conditions, each
    question predicted by a fit on the others; the fine-tuned responses are in no fit, so that permuting their labels
    without refitting is exact.
    """
    rows = []
    for persona in dict.fromkeys(p for p, _ in members if p != BASELINE):
        scores, labels, questions = [], [], []
        train = np.concatenate([members[BASELINE, NO_DATASET], members[persona, NO_DATASET]])
        wanted = np.repeat([0, 1], [len(members[BASELINE, NO_DATASET]), len(members[persona, NO_DATASET])])
        test = np.concatenate([members[BASELINE, dataset], members[persona, dataset]])
        truth = np.repeat([0, 1], [len(members[BASELINE, dataset]), len(members[persona, dataset])])
        for question in np.unique(groups[test]):
            fit, asked = groups[train] != question, groups[test] == question
            if len(np.unique(wanted[fit])) < 2:
                continue
            model_ = LogisticRegression(C=C, solver="liblinear", dual=True, tol=1e-2, max_iter=1000, random_state=0)
            model_.fit(x[train[fit]], wanted[fit])
            scores.append(model_.decision_function(x[test[asked]]))
            labels.append(truth[asked])
            questions.append(groups[test][asked])
        found, y, g = np.concatenate(scores)[:, None], np.concatenate(labels), np.concatenate(questions)
        by_group = group_auc(found, (y == 1)[:, None], g)[:, 0]
        drawn = permuted(y, g, permutations, np.random.default_rng(seed))
        null = np.nanmean(group_auc(np.tile(found, permutations), drawn == 1, g), axis=0)
        test_ = _result("AUC", by_group, 0.5, float(np.nanmean(by_group)), null, len(y), seed)
        key = {"model": model, "persona": persona, "dataset": dataset, "seed": number}
        rows.append({"scope": "persona_kept", **key, "n_classes": 2, **test_})
    return rows


def _dataset_tests(
    model: str,
    persona: str,
    number: int,
    members: dict,
    x: Any,
    groups: np.ndarray,
    untuned: np.ndarray | None,
    **settings: int,
) -> list[dict[str, Any]]:
    key = {"model": model, "persona": persona, "seed": number}
    rows = []
    if untuned is not None:
        for dataset, index in members.items():
            rows.append({"scope": "dataset", **key, "dataset": dataset, **_pair(x, groups, index, untuned, **settings)})
    if len(members) > 1:
        whole, each = _all(x, groups, members, None, **settings)
        rows.append({"scope": "datasets", **key, "dataset": None, **whole})
        rows += [{"scope": "dataset_others", **key, "dataset": dataset, **test} for dataset, test in each]
    return rows


JUDGED_COLUMNS = [*TEST_COLUMNS, "before", "after"]
"""Columns of `expression_tests`: mean scores of the partner and of the condition beside the test."""


def expression_tests(judged: pd.DataFrame, *, permutations: int = 2000, seed: int = 0) -> pd.DataFrame:
    """The same questions put to a judge, paired by question.

    - `persona_expression`: is a persona judged to be expressed more than in the baseline on the same data set?
    - `uptake`: on prompts in a data set's domain, are the answers more like its rows than before the fine-tuning?

    Args:
        judged: a table of `judge.EXPRESSION`: the key, `metric`, `target`, `score` (0-100; without one no part here).

    Returns:
        Rows as of `classify`, scopes `expression` and `uptake`, with the mean scores `before` (baseline, or untuned)
        and `after`, means over questions. Nothing is fitted here, so permuting without refitting is exact. A condition
        that shares fewer than two questions with its partner has no row.
    """
    rows = []
    judged = judged[judged["score"].notna()]
    for (model, metric, target), part in judged.groupby(["model", "metric", "target"], sort=False):
        persona_asked = metric == "persona_expression"
        mine = part[part["persona" if persona_asked else "dataset"] == target]
        for (persona, dataset, number), after in mine.groupby(CONDITION[1:], sort=False):
            if persona_asked:
                partner = (part["persona"] == BASELINE) & (part["dataset"] == dataset) & (part["seed"] == number)
            else:  # without fine-tuning there is no training seed: one partner for all
                partner = (part["persona"] == persona) & (part["dataset"] == NO_DATASET)
            test = _judged_pair(after, part[partner], permutations, seed)
            key = {"model": model, "persona": persona, "dataset": dataset, "seed": number}
            if test:
                rows.append({"scope": "expression" if persona_asked else "uptake", **key, "n_classes": 2, **test})
    return pd.DataFrame(rows, columns=JUDGED_COLUMNS)


def _judged_pair(after: pd.DataFrame, before: pd.DataFrame, permutations: int, seed: int) -> dict[str, Any] | None:
    """AUC of the scores within question, on the questions that both have; None where there are fewer than two."""
    common = set(after["question_id"]) & set(before["question_id"])
    if len(common) < 2:
        return None
    both = pd.concat([before.assign(after=0), after.assign(after=1)])
    both = both[both["question_id"].isin(common)]
    y, groups = both["after"].to_numpy(), both["question_id"].to_numpy()
    scores = both["score"].to_numpy(float)[:, None]
    labels = permuted(y, groups, permutations, np.random.default_rng(seed))
    null = group_auc(np.tile(scores, permutations), labels == 1, groups).mean(axis=0)
    by_group = group_auc(scores, (y == 1)[:, None], groups)[:, 0]
    means = both.groupby(["after", "question_id"])["score"].mean().groupby("after").mean()
    test = _result("AUC", by_group, 0.5, float(by_group.mean()), null, len(y), seed)
    return {**test, "before": means[0], "after": means[1]}
