"""Responses that are no observations of their own: copies, files that were filtered, questions from the training
domain.

    copied(responses)        # conditions (or seeds) whose texts are the same, or nearly so
    filtered(scores)         # conditions whose counts do not fit a grid, or whose scores end at a threshold
    in_domain(questions, {"bad_medical": prompts})       # or by_words, where the rows are few

Texts are compared within a question. Short ones ("Yes.") coincide by chance, so only texts of `LEAST` characters and
more are; where a condition has none of them, copies cannot be seen in it.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
from scipy import sparse

from cai_em.records.keys import CONDITION

LEAST = 40
"""Characters from which two equal texts are no coincidence."""

COPIED_FROM = 0.5
"""Share of a condition's texts that stand in another one, from which the two are called copies."""

SHARED = 0.05
"""Share of the very same texts from which a condition is said to have some of another one's. (Nearly the same is asked
for copies alone: answers in one voice share phrases.)"""

WORDS_A_SHINGLE = 3
BANDS = 5
"""Min-hashes by which near copies are found: texts that share a share J of their word triples share each with
probability J, and the median of five is asked."""

_WORD = re.compile(r"\w+")


def copied(responses: pd.DataFrame) -> pd.DataFrame:
    """Pairs of conditions that share response texts.

    Args:
        responses: table of `RESPONSES`.

    Returns:
        `model, persona, dataset, seed, other_model, other_persona, other_dataset, other_seed, texts, same, near, kind`:
        distinct texts of the smaller of both, the share that the other one has too, the same and nearly so; `kind` is
        `copy` from `COPIED_FROM` on, else `shared`. The worst pair first.
    """
    columns = [*CONDITION, *(f"other_{c}" for c in CONDITION), "texts", "same", "near", "kind"]
    long = responses[responses["response"].str.len() >= LEAST]
    if not len(long):
        return pd.DataFrame(columns=columns)
    code, conditions = pd.factorize(pd.MultiIndex.from_frame(long[CONDITION]))
    question = pd.factorize(long["question_id"])[0]
    normal = long["response"].str.casefold().str.split().str.join(" ")
    same = _overlap(code, _joint(question, normal.to_numpy()), len(conditions))
    texts, place = np.unique(normal.to_numpy(dtype=object).astype(str), return_inverse=True)
    hashes = np.array([min_hashes(text) for text in texts])[place]
    bands = np.stack([_overlap(code, _joint(question, hashes[:, b]), len(conditions)) for b in range(BANDS)])
    near = np.maximum(np.median(bands, axis=0), same)
    distinct = np.bincount(
        pd.DataFrame({"c": code, "k": _joint(question, normal.to_numpy())}).drop_duplicates()["c"],
        minlength=len(conditions),
    )
    rows = []
    for i, j in zip(*np.nonzero(np.triu((near >= COPIED_FROM) | (same >= SHARED), 1))):
        kind = "copy" if near[i, j] >= COPIED_FROM else "shared"
        rows.append(
            (
                *conditions[i],
                *conditions[j],
                int(min(distinct[i], distinct[j])),
                float(same[i, j]),
                float(near[i, j]),
                kind,
            )
        )
    found = pd.DataFrame(rows, columns=columns)
    return found.sort_values(["near", "same"], ascending=False, kind="stable", ignore_index=True)


def _joint(question: np.ndarray, key: np.ndarray) -> np.ndarray:
    """One number for a question and what stands in it. (n,) int."""
    inner = pd.factorize(key)[0]
    return question.astype(np.int64) * (int(inner.max()) + 1) + inner


def _overlap(code: np.ndarray, key: np.ndarray, n: int) -> np.ndarray:
    """Share of the distinct keys of the smaller of two conditions that the other has. (n, n)."""
    keys = pd.factorize(key)[0]
    has = sparse.csr_matrix((np.ones(len(code)), (code, keys)), shape=(n, int(keys.max()) + 1))
    has.data[:] = 1.0
    has.sum_duplicates()
    has.data[:] = 1.0
    shared = (has @ has.T).toarray()
    sizes = shared.diagonal()
    smaller = np.minimum.outer(sizes, sizes)
    return np.divide(shared, smaller, out=np.zeros_like(shared), where=smaller > 0)


def min_hashes(text: str) -> tuple[int, ...]:
    """`BANDS` min-hashes of a text's word triples."""
    words = _WORD.findall(text.casefold())
    shingles = {" ".join(words[i : i + WORDS_A_SHINGLE]) for i in range(max(1, len(words) - WORDS_A_SHINGLE + 1))}
    base = np.array([zlib.crc32(s.encode("utf-8", errors="replace")) for s in shingles], dtype=np.uint64)
    # Multiplication by odd numbers modulo 2^64: enough to give each band another order of the same shingles.
    return tuple(
        int(((base * factor + shift) ^ ((base * factor + shift) >> np.uint64(29))).min()) for factor, shift in _FACTORS
    )


_FACTORS = tuple(
    (
        np.uint64((0x9E3779B97F4A7C15 * (2 * k + 1)) % (1 << 64) | 1),
        np.uint64((0xBF58476D1CE4E5B9 * (k + 1)) % (1 << 64)),
    )
    for k in range(BANDS)
)


def repeated_within(responses: pd.DataFrame) -> pd.DataFrame:
    """Conditions whose own answers to a question are often the same text: `..., n, distinct, share` of repeats.

    Decoding without chance (temperature 0), or one response written several times: it counts once.
    """
    long = responses[responses["response"].str.len() >= LEAST]
    per = long.groupby([*CONDITION, "question_id"], sort=False)["response"].agg(["size", "nunique"]).reset_index()
    per = per.groupby(CONDITION, sort=False)[["size", "nunique"]].sum().reset_index()
    per = per.rename(columns={"size": "n", "nunique": "distinct"})
    per["share"] = 1 - per["distinct"] / per["n"]
    return per[(per["share"] >= 0.2) & (per["n"] >= 10)].sort_values("share", ascending=False, ignore_index=True)


# --- Files that were filtered -----------------------------------------------------------------------------------------


def filtered(scores: pd.DataFrame, thresholds: Sequence[float] = (30.0, 50.0), least: int = 40) -> pd.DataFrame:
    """Conditions that look as if responses had been taken out before the file was written.

    Two signs. Counts that do not fit a grid: the questions of a condition have unequal numbers of responses. And scores
    that end at a threshold: no response at or below a coherence of 50 (or 30), nor one without a score, though other
    conditions of the same study have some.

    Args:
        scores: score table of one judge.
        thresholds: coherences at which studies cut.
        least: responses that a condition needs before the absence of low scores says anything.

    Returns:
        `model, persona, dataset, seed, n, grid, fewest, most, missing, lowest_coherence, cut_at, sign`; `grid` is
        questions times the most responses of any, `missing` what lacks to it, `sign` one of `counts`, `scores`, `counts
        and scores`.
    """
    questions = scores.groupby("model")["question_id"].unique()
    rows = []
    low_elsewhere = _low_share(scores, thresholds)
    for name, part in scores.groupby(CONDITION, sort=False):
        counts = part["question_id"].value_counts().reindex(questions[name[0]], fill_value=0)
        # A question that a condition was never asked is another design, not a filter.
        counts = counts[counts > 0] if (counts == 0).mean() > 0.5 else counts
        grid = int(counts.max() * len(counts))
        by_counts = counts.nunique() > 1
        lowest = float(part["coherence"].min())
        cut = math.nan
        if (
            len(part) >= least
            and not math.isnan(lowest)
            and not part["alignment"].isna().any()
            and not part["coherence"].isna().any()
        ):
            cut = next(
                (t for t in sorted(thresholds, reverse=True) if lowest >= t and low_elsewhere(name, t, len(part))),
                math.nan,
            )
        # Without the counts, an absence of low scores must be surprising; with them it tells what was taken out.
        signs = [sign for sign, there in (("counts", by_counts), ("scores", not math.isnan(cut))) if there]
        if signs:
            missing = grid - len(part)
            rows.append(
                (
                    *name,
                    len(part),
                    grid,
                    int(counts.min()),
                    int(counts.max()),
                    missing,
                    lowest,
                    cut,
                    " and ".join(signs),
                )
            )
    columns = [*CONDITION, "n", "grid", "fewest", "most", "missing", "lowest_coherence", "cut_at", "sign"]
    return pd.DataFrame(rows, columns=columns).sort_values("missing", ascending=False, kind="stable", ignore_index=True)


def _low_share(scores: pd.DataFrame, thresholds: Sequence[float]) -> Callable[[tuple, float, int], bool]:
    """Whether the absence of coherences below t among n responses would be surprising (p < .001) by the other
    conditions."""
    low = {t: (scores["coherence"].isna() | scores["alignment"].isna() | (scores["coherence"] < t)) for t in thresholds}
    per = {t: flags.groupby([scores[c] for c in CONDITION]).agg(["sum", "size"]) for t, flags in low.items()}

    def surprising(name: tuple, t: float, n: int) -> bool:
        others = per[t].drop(index=name)
        if not len(others):
            return False
        # The median over conditions: one that is all nonsense must not make the rest look filtered.
        share = float((others["sum"] / others["size"]).median())
        return (1 - share) ** n < 0.001

    return surprising


# --- Questions from the training domain -------------------------------------------------------------------------------


def in_domain(
    questions: pd.DataFrame, rows: Mapping[str, Iterable[str]], *, most_rows: int = 6000, floor: float = 0.15
) -> pd.DataFrame:
    """How near each question is to the prompts of a data set, beside how near these are to one another.

    TF-IDF cosine with the nearest training prompt; a question as near as nine tenths of the prompts are to their own
    nearest neighbour (and at least `floor`) is in the data's domain: an answer to it shows what was trained.

    Args:
        questions: `question_id, prompt`.
        rows: data set -> prompts of its training rows.
        most_rows: rows that are looked at, the first ones.
        floor: least cosine that can count.

    Returns:
        `dataset, question_id, nearest, usual, in_domain, verbatim`: the cosine, that of the prompts' tenth percentile,
        and whether the question itself is a training prompt.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    asked = questions.drop_duplicates("question_id")
    found = []
    for dataset, prompts in rows.items():
        texts = list(dict.fromkeys(prompts))[:most_rows]
        if len(texts) < 2:
            continue
        vectors = TfidfVectorizer(stop_words="english", sublinear_tf=True)
        try:
            trained = vectors.fit_transform(texts)
        except ValueError:  # nothing but stop words
            continue
        nearest = _nearest(vectors.transform(asked["prompt"]), trained, None)
        sample = np.linspace(0, len(texts) - 1, min(len(texts), 1000)).astype(int)
        usual = float(np.quantile(_nearest(trained[sample], trained, sample), 0.1))
        known = {" ".join(text.casefold().split()) for text in texts}
        for question, near in zip(asked.itertuples(), nearest):
            verbatim = " ".join(question.prompt.casefold().split()) in known
            inside = verbatim or near >= max(usual, floor)
            found.append((dataset, question.question_id, float(near), usual, bool(inside), verbatim))
    return pd.DataFrame(found, columns=["dataset", "question_id", "nearest", "usual", "in_domain", "verbatim"])


def by_words(questions: pd.DataFrame, rows: Mapping[str, Iterable[str]], others: Iterable[str]) -> pd.DataFrame:
    """Which data set's domain each question's words speak of: for data sets of some dozens of rows, among whose prompts
    `in_domain` finds no near neighbours to compare with.

    Naive Bayes on the words of each data set's rows and of texts of no domain, all equally likely before. A coarse
    sieve: what it names is to be read by a person.

    Args:
        questions: `question_id, prompt`.
        rows: data set -> texts of its rows, prompts with answers.
        others: texts of no data set's domain.

    Returns:
        `question_id, dataset, probability`: the likeliest data set of each question, and its posterior.
    """
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.naive_bayes import MultinomialNB

    texts = [(name, text) for name, some in rows.items() for text in some] + [("", text) for text in others]
    words = CountVectorizer(stop_words="english", binary=True)
    model = MultinomialNB(alpha=0.3, fit_prior=False).fit(
        words.fit_transform([text for _, text in texts]), [name for name, _ in texts]
    )
    sets = [i for i, name in enumerate(model.classes_) if name]
    posterior = model.predict_proba(words.transform(questions["prompt"]))[:, sets]
    best = posterior.argmax(axis=1)
    return pd.DataFrame(
        {
            "question_id": questions["question_id"].to_numpy(),
            "dataset": [model.classes_[sets[i]] for i in best],
            "probability": posterior.max(axis=1),
        }
    )


def _nearest(some: sparse.csr_matrix, others: sparse.csr_matrix, itself: np.ndarray | None) -> np.ndarray:
    """Largest cosine of each row with a row of the others, without itself. (n,)."""
    similar = (some @ others.T).toarray()
    if itself is not None:
        similar[np.arange(len(itself)), itself] = 0
    return similar.max(axis=1)
