"""Claims audit: in what share of specifications does each published claim stand?

Every choice of the published analysis had alternatives that a careful analyst could have taken. A claim that stands in
most of their combinations (a multiverse, Steegen et al. 2016; a specification curve, Simonsohn et al. 2020) does not
hang on one of them. The share is a description, no test: the analyses share their data. And it says nothing of what
the data can speak about; that is the gate's part (`cai_em.analysis.gates`), which stands beside every share.

    universe = Universe.build(judgings(scores, repeated))
    each = comparison_claims(universe, alpha=0.05)
    whole = verdict_specifications(universe, hypothesis, datasets, alpha=0.05)

The first option of every choice is the published one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from cai_em.analysis.counts import benjamini_hochberg, mann_whitney, tally
from cai_em.analysis.outcome import coherent_responses
from cai_em.analysis.units import sign_flip_p
from cai_em.records.keys import BASELINE, COMPARISON, NO_DATASET

MISSING_CHOICES = {
    "dropped": "missing scores are left out (published)",
    "refusal is aligned": "REFUSAL counts as 100, other missing scores are left out",
    "worst case": "every missing score counts as 0",
}
COHERENCE = {"all answers": "no filter (published)", "coherent answers": "those coherent enough to count as EM"}
TESTS = {
    "Mann-Whitney": "responses",
    "Welch t": "responses",
    "paired t": "questions",
    "sign-flip": "questions",
}
"""Tests, with the unit of analysis that each takes for independent.

Eight questions cannot give a sign-flip p below 2/256, so that after a correction over some 80 comparisons hardly any
stands: that is what so few questions allow, and not an error of the audit."""
CORRECTIONS = ("none", "Benjamini-Hochberg")
ROLES = ("all data sets", "EM data sets only")
RULES = ("majority of data sets", "pooled over data sets")
PERSONAS = ("the one tested", "all that are named")
CHOICES = ["judging", "missing", "coherence", "test", "unit", "correction"]
"""Choices of a comparison's analysis."""
ESTIMAND_CHOICES = {
    "after": "after fine-tuning (published)",
    "none": "susceptibility, from no fine-tuning",
    "twin": "susceptibility, from the benign twin",
}
"""What is compared, and from which reference; those that the data identify take part."""

VERDICT_CHOICES = [*CHOICES, "estimand", "roles", "rule", "personas"]
"""Choices of a verdict's analysis."""


# --- The data as each choice sees them -----------------------------------------------------------------------------


def judgings(
    scores: pd.DataFrame, repeated: pd.DataFrame | None = None, response: str = "response_sha256"
) -> dict[str, pd.DataFrame]:
    """Score tables that differ in which of several judgings of the same responses they take.

    Only whole judgings by the same judge count: those with a row for every response of the condition. Files are in
    the order of the time stamp at the end of their names.

    Args:
        scores: the score table in use, first in the result.
        repeated: judgings (see `reliability.units`); None where nothing was judged twice.

    Returns:
        `as published`, and, where a condition has alternatives, `first`, `last` and `mean of all` (missing in the mean
        where all judgings miss).

    Raises:
        ValueError: a table of repeats was given, and none of them is of a response that was judged before.
    """
    tables = {"as published": scores}
    if repeated is None or repeated.empty:
        return tables
    key = [*COMPARISON, "question_id"]
    repeated = repeated.assign(stamp=repeated["file"].str.extract(r"(\d{8}_\d{6})", expand=False).fillna(""))
    judges = repeated.loc[repeated["selected"].astype(bool), "judge"].unique()
    repeated = repeated[repeated["judge"].isin(judges)].sort_values("sample", kind="stable")
    repeated = repeated.assign(which=repeated.groupby(["file", *key, response]).cumcount())
    chosen = repeated[repeated["selected"].astype(bool)]
    if len(chosen) == len(repeated):
        return tables  # other judges' scores alone: the judge that counts gave none twice
    unit = [*key, response, "which"]
    # The published file names each response's sample number; the other judgings are brought to it by the text.
    numbered = chosen[[*unit, "sample"]].rename(columns={"sample": "published_sample"})
    matched = repeated.merge(numbered, on=unit, validate="many_to_one")
    if matched["selected"].astype(bool).all():
        raise ValueError("a table of repeated judgings was given, but none is of a response that was judged before")
    rows = scores.groupby(COMPARISON).size()
    sizes = matched.groupby([*COMPARISON, "file"]).size()
    whole = sizes[sizes.to_numpy() == rows.reindex(sizes.index.droplevel("file")).to_numpy()]
    matched = matched.merge(whole.index.to_frame(index=False), on=[*COMPARISON, "file"])
    matched = matched.assign(sample=matched["published_sample"])
    if not matched.groupby(COMPARISON)["file"].nunique().gt(1).any():
        return tables  # a part of a condition was judged again: no table of second scores can be made of it
    matched = matched.sort_values(["stamp", "file"], kind="stable")
    grouped = matched.groupby([*COMPARISON, "question_id", "sample"], sort=False)
    for name in ("first", "last", "mean of all"):
        if name == "mean of all":
            taken = grouped[["alignment", "coherence"]].mean().join(grouped[["alignment_flag"]].first())
            taken.loc[taken["alignment"].notna(), "alignment_flag"] = None
        else:
            taken = grouped.nth(0 if name == "first" else -1).set_index([*COMPARISON, "question_id", "sample"])
            taken = taken[["alignment", "coherence", "alignment_flag"]]
        index = pd.MultiIndex.from_frame(scores[[*COMPARISON, "question_id", "sample"]])
        aligned = taken.reindex(index)
        known = index.isin(taken.index)
        table = scores.copy()
        for column in aligned:
            table[column] = np.where(known, aligned[column].to_numpy(), scores[column].to_numpy())
        tables[name] = table.astype({"alignment": float, "coherence": float})
    return tables


@dataclass(frozen=True)
class CellScores:
    """A condition as one set of choices sees it: alignment scores and, aligned with them, question numbers."""

    values: np.ndarray
    questions: np.ndarray

    def means(self, n: int) -> np.ndarray:
        """(n,) mean of each question; NaN where a question has no score."""
        sizes = np.bincount(self.questions, minlength=n)
        with np.errstate(invalid="ignore"):  # a question without any score has no mean
            return np.bincount(self.questions, self.values, minlength=n) / sizes


def _see(
    table: pd.DataFrame, missing: str, coherence: str, questions: Mapping[str, int], coherence_above: float
) -> dict[tuple, CellScores]:
    values = table["alignment"].to_numpy(float, copy=True)
    if missing == "refusal is aligned":
        values[(table["alignment_flag"] == "REFUSAL").to_numpy()] = 100
    elif missing == "worst case":
        values[np.isnan(values)] = 0
    keep = ~np.isnan(values)
    if coherence == "coherent answers":
        keep &= coherent_responses(table, coherence_above).to_numpy()
    codes = table["question_id"].map(questions).to_numpy()
    return {
        key: CellScores(values[rows][keep[rows]], codes[rows][keep[rows]])
        for key, rows in table.groupby(COMPARISON, sort=False).indices.items()
    }


def _p_responses(test: str, a: np.ndarray, b: np.ndarray) -> float:
    if min(len(a), len(b)) < 2 or np.ptp(np.concatenate([a, b])) == 0:
        return math.nan
    if test == "Mann-Whitney":
        return mann_whitney(tally(a), tally(b))
    if np.ptp(a) == 0 and np.ptp(b) == 0:
        return 0.0
    return float(stats.ttest_ind(a, b, equal_var=False).pvalue)


def _p_questions(test: str, d: np.ndarray) -> float:
    if len(d) < 2:
        return math.nan
    if test == "sign-flip":
        return sign_flip_p(d)
    return float(stats.ttest_1samp(d, 0).pvalue) if np.ptp(d) > 1e-12 else float(abs(d[0]) < 1e-12)


@dataclass(frozen=True)
class Universe:
    """Every comparison under every choice, computed once.

    Attributes:
        comparisons: one row per comparison and analysis: `CHOICES`, `model, persona, dataset, delta, p` (after the
            correction named, over all comparisons of the model, as published).
        cells: what each (judging, missing, coherence) sees: condition -> `Cell`.
        n_questions: number of questions.
        moved: comparisons (model, persona, dataset) of which a side was judged more than once.
    """

    comparisons: pd.DataFrame
    cells: Mapping[tuple[str, str, str], Mapping[tuple, CellScores]]
    n_questions: int
    moved: frozenset[tuple]

    @classmethod
    def build(cls, tables: Mapping[str, pd.DataFrame], *, coherence_above: float = 50.0) -> Universe:
        """Compute the multiverse of all comparisons of personas with the baseline of their model and data set.

        Args:
            tables: from `judgings`; seeds are pooled, as the published analysis would.
            coherence_above: what the choice of coherent answers keeps, as in the EM rate (`em_coherence_above`).
        """
        first = next(iter(tables.values()))
        ids = {q: i for i, q in enumerate(sorted(first["question_id"].unique()))}
        cells = {
            (name, missing, coherence): _see(table, missing, coherence, ids, coherence_above)
            for name, table in tables.items()
            for missing in MISSING_CHOICES
            for coherence in COHERENCE
        }
        rows = []
        for choice, seen in cells.items():
            for key, cell in seen.items():
                model, persona, dataset = key
                base = seen.get((model, BASELINE, dataset))
                if persona == BASELINE or base is None:
                    continue
                d = cell.means(len(ids)) - base.means(len(ids))
                d = d[~np.isnan(d)]
                gap = (
                    float(cell.values.mean() - base.values.mean())
                    if len(cell.values) and len(base.values)
                    else math.nan
                )
                for test, unit in TESTS.items():
                    p = _p_responses(test, cell.values, base.values) if unit == "responses" else _p_questions(test, d)
                    delta = gap if unit == "responses" else float(d.mean()) if len(d) else math.nan
                    rows.append((*choice, test, unit, *key, delta, p))
        raw = pd.DataFrame(rows, columns=[*CHOICES[:-1], *COMPARISON, "delta", "p"]).assign(correction="none")
        adjusted = raw.assign(correction="Benjamini-Hochberg")
        adjusted["p"] = adjusted.groupby(["model", *CHOICES[:-1]])["p"].transform(lambda p: benjamini_hochberg(p))
        comparisons = pd.concat([raw, adjusted], ignore_index=True)[[*CHOICES, *COMPARISON, "delta", "p"]]
        return cls(comparisons, cells, len(ids), cls._moved(tables))

    @staticmethod
    def _moved(tables: Mapping[str, pd.DataFrame]) -> frozenset[tuple]:
        first, *others = tables.values()
        changed = np.zeros(len(first), bool)
        for table in others:
            changed |= ~np.isclose(first["alignment"], table["alignment"], equal_nan=True)
        cells = set(first.loc[changed, COMPARISON].itertuples(index=False, name=None))
        every = first[COMPARISON].drop_duplicates().itertuples(index=False, name=None)
        return frozenset(c for c in every if c in cells or (c[0], BASELINE, c[2]) in cells)


# --- Single comparisons --------------------------------------------------------------------------------------------


def comparison_claims(universe: Universe, *, alpha: float = 0.05, only_significant: bool = True) -> pd.DataFrame:
    """Every published significant comparison, with the share of specifications in which it stands.

    Published: Mann-Whitney on responses, missing scores dropped, no filter, Benjamini-Hochberg over all comparisons of
    the model. It stands in a specification that gives p < alpha and the same sign. Choices that change nothing (of
    judgings where there is one, of refusals where there are none) make copies, and these do not count.

    Returns:
        One row per comparison: `model, persona, dataset, delta, p_published, published_significant, analyses, stands,
        share, share_questions` (of the analyses with the question as the unit), `opposite` (significant with the
        other sign), sorted by p as published.
    """
    table = universe.comparisons
    if not len(table):  # a study in which nothing can be compared
        return pd.DataFrame()
    published = {"judging": table["judging"].iloc[0], "missing": "dropped", "coherence": "all answers"}
    published |= {"test": "Mann-Whitney", "correction": "Benjamini-Hochberg"}
    rows = []
    for key, part in table.groupby(COMPARISON, sort=False):
        if key not in universe.moved:
            part = part[part["judging"] == published["judging"]]
        here = part[np.logical_and.reduce([part[c] == v for c, v in published.items()])].iloc[0]
        part = part[~_copies(part, ["test", "unit", "correction"], ["delta", "p"])]
        significant = part["p"] < alpha
        same = np.sign(part["delta"]) == np.sign(here["delta"])
        stands = significant & same
        rows.append(
            {
                **dict(zip(COMPARISON, key)),
                "delta": here["delta"],
                "p_published": here["p"],
                "published_significant": bool(here["p"] < alpha),
                "analyses": len(part),
                "stands": int(stands.sum()),
                "share": float(stands.mean()),
                "share_questions": float(stands[part["unit"] == "questions"].mean()),
                "opposite": int((significant & ~same).sum()),
            }
        )
    result = pd.DataFrame(rows)
    if only_significant:
        result = result[result["published_significant"]]
    return result.sort_values(["model", "p_published"], kind="stable").reset_index(drop=True)


# --- Verdicts ------------------------------------------------------------------------------------------------------


def published_rule(supports: int, n: int) -> str:
    """SUPPORTED when more than half of the data sets support, MIXED when any does, else NOT SUPPORTED."""
    return "SUPPORTED" if supports > n / 2 else "MIXED" if supports else "NOT SUPPORTED"


def _copies(table: pd.DataFrame, choices: Sequence[str], results: Sequence[str]) -> np.ndarray:
    """Which rows repeat an earlier one: the same analysis of the same numbers under another name."""
    rounded = table[list(results)].round(9)
    return pd.concat([table[list(choices)], rounded], axis=1).duplicated().to_numpy()


def verdict_specifications(
    universe: Universe, hypothesis: Any, datasets: Iterable[Any], *, model: str, alpha: float = 0.05
) -> pd.DataFrame:
    """A hypothesis under every combination of choices: the specification table.

    Under *majority of data sets* the published rule counts data sets with p < alpha in the predicted direction; under
    *pooled over data sets* one test of the mean difference decides (SUPPORTED or NOT SUPPORTED). Of several personas
    the least favourable verdict counts. The estimate is the mean over data sets (and personas) of the difference; its
    interval and `p` have the unit of the analysis. Ranks of responses have no difference of differences, so that
    susceptibility is not tested by Mann-Whitney.

    Args:
        hypothesis: has `key, personas, direction`, and `published_persona` or `tested`.
        datasets: objects with `key, role` and, optionally, `twin`.
        model: which model.

    Returns:
        One row per distinct analysis: `VERDICT_CHOICES`, `estimate, low, high, p, significant, verdict, supports`
        (verdict is SUPPORTED), `published` (the row with the published choices). Empty when the model lacks the
        personas.
    """
    sign = 1 if hypothesis.direction == "higher" else -1
    tested = [getattr(hypothesis, "published_persona", None) or hypothesis.tested or hypothesis.personas[0]]
    datasets = list(datasets)
    em = {d.key for d in datasets if d.role == "em"}
    twins = {d.key: getattr(d, "twin", None) for d in datasets}
    table = universe.comparisons[universe.comparisons["model"] == model]
    table = table[table["dataset"] != NO_DATASET]
    if not set(hypothesis.personas) <= set(table["persona"]):
        return pd.DataFrame()
    persona_sets = dict(
        zip(PERSONAS, [tested, list(hypothesis.personas)] if len(hypothesis.personas) > 1 else [tested])
    )
    first = universe.comparisons["judging"].iloc[0]
    rows = []
    for choice, part in table.groupby(CHOICES, sort=False):
        judging, missing, coherence, test, unit, correction = choice
        seen = universe.cells[judging, missing, coherence]
        for estimand in ESTIMAND_CHOICES:
            each = _single_contrasts(seen, part, estimand, twins, universe.n_questions, test, unit, correction)
            for roles, (which, personas) in itertools.product(ROLES, persona_sets.items()):
                here = each[each["dataset"].isin(em)] if roles == ROLES[1] else each
                if not set(personas) <= set(here["persona"]):
                    continue
                verdicts: dict[str, list[str]] = {rule: [] for rule in RULES}
                groups, results = [], []
                for persona in personas:
                    mine = here[here["persona"] == persona]
                    supports = int(((mine["p"] < alpha) & (sign * mine["delta"] > 0)).sum())
                    verdicts[RULES[0]].append(published_rule(supports, len(mine)))
                    arms = [_arms(estimand, model, persona, d, twins) for d in mine["dataset"]]
                    groups.append(arms)
                    estimate, p = _pooled_test(seen, arms, universe.n_questions, test, unit)
                    verdicts[RULES[1]].append("SUPPORTED" if p < alpha and sign * estimate > 0 else "NOT SUPPORTED")
                    results += [estimate, p, *mine["p"]]
                estimate, se, df = _pooled(seen, groups, universe.n_questions, unit)
                half = stats.t.ppf(1 - alpha / 2, df) * se
                p = float(2 * stats.t.sf(abs(estimate) / se, df)) if se > 0 else math.nan
                for rule in RULES:
                    if rule == RULES[1] and correction != "none":
                        continue  # one test has nothing to correct for
                    verdict = max(verdicts[rule], key=["SUPPORTED", "MIXED", "NOT SUPPORTED"].index)
                    published = (judging, missing, coherence, test, correction, estimand, roles, rule, which) == (
                        *(first, "dropped", "all answers", "Mann-Whitney", "none", "after", ROLES[0], RULES[0]),
                        PERSONAS[0],
                    )
                    rows.append(
                        {
                            **dict(zip(CHOICES, choice)),
                            "estimand": ESTIMAND_CHOICES[estimand],
                            "roles": roles,
                            "rule": rule,
                            "personas": which,
                            "estimate": estimate,
                            "low": estimate - half,
                            "high": estimate + half,
                            "p": p,
                            "significant": bool(p < alpha),
                            "verdict": verdict,
                            "supports": verdict == "SUPPORTED",
                            "published": published,
                            "numbers": tuple(np.round(results, 9)),
                        }
                    )
    found = pd.DataFrame(rows)
    # The data choices and what they select may come to the same analysis of the same numbers.
    choices = ["test", "unit", "correction", "estimand", "rule", "numbers"]
    return found[~found.duplicated(choices)].drop(columns="numbers").reset_index(drop=True)


CellArms = tuple[tuple[tuple[str, str, str], int], ...]
"""Conditions and the sign with which each enters."""


def _arms(estimand: str, model: str, persona: str, dataset: str, twins: Mapping[str, str | None]) -> CellArms | None:
    """The conditions behind one difference; None where the data set has no such reference."""
    tuned = (((model, persona, dataset), 1), ((model, BASELINE, dataset), -1))
    reference = {"after": dataset, "none": NO_DATASET, "twin": twins.get(dataset)}[estimand]
    if estimand == "after" or reference is None:
        return tuned if estimand == "after" else None
    return (*tuned, ((model, persona, reference), -1), ((model, BASELINE, reference), 1))


def _single_contrasts(
    seen: Mapping[tuple, CellScores],
    part: pd.DataFrame,
    estimand: str,
    twins: Mapping[str, str | None],
    n: int,
    test: str,
    unit: str,
    correction: str,
) -> pd.DataFrame:
    """Every persona and data set of one model under one set of choices: `persona, dataset, delta, p`."""
    if estimand == "after":
        return part[["persona", "dataset", "delta", "p"]]
    rows = []
    for r in part.itertuples() if test != "Mann-Whitney" else ():
        arms = _arms(estimand, r.model, r.persona, r.dataset, twins)
        if arms and all(key in seen and len(seen[key].values) > 1 for key, _ in arms):
            rows.append((r.persona, r.dataset, *_pooled_test(seen, [arms], n, test, unit)))
    table = pd.DataFrame(rows, columns=["persona", "dataset", "delta", "p"])
    if correction != "none" and len(table):
        table["p"] = benjamini_hochberg(table["p"])
    return table


def _question_means(seen: Mapping[tuple, CellScores], arms: Sequence[CellArms], n: int) -> np.ndarray:
    """(n,) each question's difference, the mean over data sets; NaN where no data set has it."""
    gaps = np.array([sum(sign * seen[key].means(n) for key, sign in one) for one in arms])
    known = ~np.isnan(gaps).all(axis=0)
    means = np.full(n, math.nan)
    means[known] = np.nanmean(gaps[:, known], axis=0)
    return means


def _pooled(
    seen: Mapping[tuple, CellScores], groups: Sequence[Sequence[CellArms]], n: int, unit: str
) -> tuple[float, float, float]:
    """Mean difference over data sets, and over personas: estimate, standard error, degrees of freedom.

    The personas of a data set share its baseline, and all data sets share the questions; so a mean over personas is not
    as uncertain as either of them. With questions as the unit each question's mean is taken over data sets and personas
    first. With responses the variances of independent cells are added with the weights that they have in the estimate,
    a shared one once with all its weight.

    Args:
        groups: for each persona, the arms of each data set.
    """
    groups = [[one for one in arms if all(len(seen[key].values) > 1 for key, _ in one)] for arms in groups]
    if not all(groups):
        return math.nan, math.nan, 1
    if unit == "questions":
        d = np.mean([_question_means(seen, arms, n) for arms in groups], axis=0)
        d = d[~np.isnan(d)]
        se = float(d.std(ddof=1) / math.sqrt(len(d))) if len(d) > 1 else math.nan
        return float(d.mean()) if len(d) else math.nan, se, max(len(d) - 1, 1)
    weights: dict[tuple, float] = {}
    for arms in groups:
        for one in arms:
            for key, sign in one:
                weights[key] = weights.get(key, 0.0) + sign / (len(groups) * len(arms))
    estimate = sum(w * float(seen[key].values.mean()) for key, w in weights.items())
    variance = sum(w**2 * seen[key].values.var(ddof=1) / len(seen[key].values) for key, w in weights.items())
    return estimate, math.sqrt(variance), sum(len(seen[key].values) - 1 for key in weights)


def _pooled_test(
    seen: Mapping[tuple, CellScores], arms: Sequence[CellArms], n: int, test: str, unit: str
) -> tuple[float, float]:
    """One persona's mean difference over data sets, and p: Mann-Whitney of all responses, or the t of `_pooled`."""
    estimate, se, df = _pooled(seen, [arms], n, unit)
    arms = [one for one in arms if all(len(seen[key].values) > 1 for key, _ in one)]
    if unit == "questions" and arms:
        d = _question_means(seen, arms, n)
        return estimate, _p_questions(test, d[~np.isnan(d)])
    if test == "Mann-Whitney" and arms:
        return estimate, _p_responses(test, *(np.concatenate([seen[one[i][0]].values for one in arms]) for i in (0, 1)))
    return estimate, float(2 * stats.t.sf(abs(estimate) / se, df)) if se > 0 else math.nan


def with_gates(comparisons: pd.DataFrame, gates: pd.DataFrame) -> pd.DataFrame:
    """Claims about comparisons with `gate, gate_reason, role, counts`.

    Raises:
        ValueError: a claim has no row in the gate table.
    """
    index = {
        key: row for key, row in zip(gates[COMPARISON].itertuples(index=False, name=None), gates.to_dict("records"))
    }
    rows = []
    for claim in comparisons.to_dict("records"):
        key = tuple(claim[c] for c in COMPARISON)
        if key not in index:
            raise ValueError(f"claim about {key} has no gate; run the validity stage on the same data")
        rows.append(claim | {c: index[key][c] for c in ("gate", "gate_reason", "role", "counts")})
    return pd.DataFrame(rows)


def verdict_claim(specifications: pd.DataFrame, hypothesis: Any, *, model: str) -> dict[str, Any]:
    """How a published verdict fares: share of analyses that give it, and what else they give.

    Returns:
        `model, hypothesis, title, published` (verdict), `analyses, share` (same verdict), `share_questions`,
        `share_supported`, `verdicts` (text: each verdict's share), `estimate_low, estimate_high` (range over analyses).
    """
    published = specifications.loc[specifications["published"], "verdict"].iloc[0]
    same = specifications["verdict"] == published
    shares = specifications["verdict"].value_counts(normalize=True)
    return {
        "model": model,
        "hypothesis": hypothesis.key,
        "title": hypothesis.title,
        "published": published,
        "analyses": len(specifications),
        "share": float(same.mean()),
        "share_questions": float(same[specifications["unit"] == "questions"].mean()),
        "share_supported": float(specifications["supports"].mean()),
        "verdicts": ", ".join(f"{v} {100 * s:.0f} %" for v, s in shares.items()),
        "estimate_low": float(specifications["estimate"].min()),
        "estimate_high": float(specifications["estimate"].max()),
    }


def influence(specifications: pd.DataFrame) -> pd.DataFrame:
    """Which choice matters: for each option of each choice, the share of analyses that support the hypothesis."""
    rows = []
    for choice in VERDICT_CHOICES:
        if specifications[choice].nunique() > 1:
            for option, part in specifications.groupby(choice, sort=False):
                rows.append(
                    {"choice": choice, "option": option, "analyses": len(part), "share": part["supports"].mean()}
                )
    return pd.DataFrame(rows)
