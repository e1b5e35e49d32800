"""Persona against baseline after fine-tuning, data set by data set: questions and trainings are the units.

What the published study compared, beside what answers the hypotheses (`cai_em.analysis.contrasts`).

Fifty samples of one question resemble each other (intra-class correlation about 0.3 in the published data), so 400
responses carry the information of about 25. The primary test here pairs persona and baseline by question, and from
three training seeds on takes the seeds, too, for a sample (`primary_test`); a cluster bootstrap, a GEE and a mixed
model stand beside it and are recorded with their warnings. With eight questions these three are approximate (Cameron,
Gelbach & Miller 2008); the paired t test and the sign-flip test (exact up to sixteen questions) are not.

Sign convention: every difference is persona minus baseline, in points of alignment; positive means better aligned.

    comparisons = compare_all(scores, margin=5.0)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterable
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from cai_em.analysis.counts import benjamini_hochberg
from cai_em.analysis.units import (
    MIN_SEEDS,
    DesignError,
    _one_sample_t,
    _t_p,
    bootstrap_interval,
    check_units,
    cluster_summary,
    partner,
    question_differences,
    sign_flip_p,
)
from cai_em.records.keys import BASELINE, COMPARISON


def paired_test(differences: np.ndarray, *, margin: float, confidence: float = 0.95) -> dict[str, float]:
    """The primary test: mean difference over questions, with its interval, tests, and equivalence.

    Args:
        differences: (questions,) or (questions, seeds); seeds are averaged first, so that the result speaks of these
            adapters. `primary_test` speaks of the training recipe where the seeds allow it.
        margin: smallest difference that matters, in points.

    Returns:
        `n_questions, delta, se, low, high, p` (paired t), `p_sign_flip` (exact), `p_wilcoxon`, `p_equivalence` (two
        one-sided tests, Schuirmann 1987: the larger p), `p_no_gain`, `p_no_loss` (one-sided: rules out a difference
        of +margin or more, of -margin or less), `p_smallest` (the least p that the sign-flip test could give).
    """
    d = np.asarray(differences, float)
    d = d.mean(axis=1) if d.ndim == 2 and d.size else d.ravel()
    n = len(d)
    delta = float(d.mean()) if n else math.nan
    se = float(d.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan
    half = stats.t.ppf((1 + confidence) / 2, n - 1) * se if n > 1 else math.nan
    p_no_gain = _one_sample_t(d, margin, "less")
    p_no_loss = _one_sample_t(d, -margin, "greater")
    nonzero = d[np.abs(d) > 1e-12]
    return {
        "n_questions": n,
        "delta": delta,
        "se": se,
        "low": delta - half,
        "high": delta + half,
        "p": _one_sample_t(d),
        "p_sign_flip": sign_flip_p(d),
        "p_wilcoxon": float(stats.wilcoxon(nonzero).pvalue) if len(nonzero) > 1 else math.nan,
        "p_equivalence": max(p_no_gain, p_no_loss) if n > 1 else math.nan,
        "p_no_gain": p_no_gain,
        "p_no_loss": p_no_loss,
        "p_smallest": 2.0 ** (1 - n) if n else math.nan,
    }


def _crossed(ms_q: float, ms_s: float, ms_e: float, questions: int, seeds: int) -> tuple[float, float]:
    """Mean square of a mean over questions and seeds, both random, and its degrees of freedom (Satterthwaite 1946).

    (MS_question + MS_seed - MS_residual) estimates it without bias; where that falls below the larger of the first two,
    the larger is taken. Degrees of freedom are rounded down, for they are estimated from few seeds.
    """
    combined = ms_q + ms_s - ms_e
    if combined >= max(ms_q, ms_s):
        parts = [(ms_q, questions - 1), (ms_s, seeds - 1), (ms_e, (questions - 1) * (seeds - 1))]
        df = combined**2 / sum(ms**2 / k for ms, k in parts) if combined > 0 else math.nan
    else:
        combined, df = max((ms_q, questions - 1), (ms_s, seeds - 1))
    return combined, df if math.isnan(df) else max(1, math.floor(df + 1e-9))


def seed_test(differences: np.ndarray) -> dict[str, float]:
    """Questions and seeds both as random: does the effect hold for the recipe, not only for these adapters?

    A t test of the mean of a two-way crossed random layout, with Var(mean) = mean square of `_crossed` / (Q S): both
    factors are samples, as Clark 1973 and Judd, Westfall & Kenny 2012 ask for. With no effect, a training's SD three
    times the residual's and 8 questions it calls about 6 % of comparisons significant from 3 or 5 seeds at the 5 %
    level (but 11 % from 2, hence `MIN_SEEDS`).

    Args:
        differences: (questions, seeds).

    Returns:
        `n_seeds, seed_se, seed_df, seed_p`; NaN with fewer than two seeds or questions: one seed tells of no other.
    """
    d = np.asarray(differences, float)
    nothing = {"n_seeds": int(d.shape[1]) if d.ndim == 2 else 1, "seed_se": math.nan, "seed_df": math.nan}
    if d.ndim != 2 or min(d.shape) < 2:
        return {**nothing, "seed_p": math.nan}
    q, s = d.shape
    combined, df = _crossed(*_mean_squares(d), q, s)
    if combined <= 0:
        return {**nothing, "seed_p": math.nan}
    se = math.sqrt(combined / (q * s))
    return {"n_seeds": s, "seed_se": se, "seed_df": df, "seed_p": _t_p(float(d.mean()), se, df)}


def _mean_squares(d: np.ndarray) -> tuple[float, float, float]:
    """Mean squares of questions (rows), seeds (columns) and the residual of a (questions, seeds) table."""
    q, s = d.shape
    rows, columns = d.mean(axis=1, keepdims=True), d.mean(axis=0, keepdims=True)
    ms_q = s * ((rows - d.mean()) ** 2).sum() / (q - 1)
    ms_s = q * ((columns - d.mean()) ** 2).sum() / (s - 1)
    ms_e = ((d - rows - columns + d.mean()) ** 2).sum() / ((q - 1) * (s - 1))
    return float(ms_q), float(ms_s), float(ms_e)


def primary_test(differences: np.ndarray, *, margin: float, confidence: float = 0.95) -> dict[str, float]:
    """Persona against baseline, paired: over questions and, from `MIN_SEEDS` training seeds on, over seeds as well.

    A comparison is about what training a persona does; a test that averages the seeds away takes these few trainings
    for all there are (Clark 1973 on such fixed effects): with a training's SD of 3 points and no effect it calls 39 %
    of comparisons of three seeds significant. So where there are seeds enough, p, interval and both one-sided tests
    come from `seed_test`'s error; where there are not, the paired test's stand, and speak of these adapters only.

    Args:
        differences: (questions, seeds), from `question_differences`.
        margin: smallest difference that matters, in points.

    Returns:
        What `paired_test` and `seed_test` give, the former's `se, low, high, p, p_no_gain, p_no_loss, p_equivalence`
        replaced where there are `MIN_SEEDS` seeds, and `p_adapters`: the paired test's p, whatever the seeds.
    """
    paired, seeds = paired_test(differences, margin=margin, confidence=confidence), seed_test(differences)
    found = {**paired, **seeds, "p_adapters": paired["p"]}
    if seeds["n_seeds"] < MIN_SEEDS or math.isnan(seeds["seed_se"]):  # no error at all: all differences are equal
        return found
    delta, se, df = paired["delta"], seeds["seed_se"], seeds["seed_df"]
    half = stats.t.ppf((1 + confidence) / 2, df) * se
    no_gain, no_loss = _t_p(delta - margin, se, df, "less"), _t_p(delta + margin, se, df, "greater")
    found |= {"se": se, "low": delta - half, "high": delta + half, "p": seeds["seed_p"]}
    return found | {"p_no_gain": no_gain, "p_no_loss": no_loss, "p_equivalence": max(no_gain, no_loss)}


def _recorded(caught: Iterable[warnings.WarningMessage]) -> str:
    return "; ".join(dict.fromkeys(f"{w.category.__name__}: {str(w.message).splitlines()[0][:120]}" for w in caught))


def gee(values: np.ndarray, persona: np.ndarray, clusters: np.ndarray) -> dict[str, Any]:
    """GEE of alignment on persona: exchangeable working correlation, bias-reduced sandwich (Mancl & DeRouen 2001).

    p is from t with clusters - 1 degrees of freedom; the normal that statsmodels uses is far too narrow for 8 clusters.
    Clusters are questions: with several training seeds it speaks of these adapters, as `paired_test` does.

    Returns:
        `gee_delta, gee_se, gee_p, gee_note`; the note holds warnings and failures, null when there were none.
    """
    import statsmodels.api as sm

    index = np.unique(clusters, return_inverse=True)[1]
    order = np.argsort(index, kind="stable")
    design = np.column_stack([np.ones(len(values)), np.asarray(persona, float)])[order]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            fit = sm.GEE(
                np.asarray(values, float)[order], design, groups=index[order], cov_struct=sm.cov_struct.Exchangeable()
            ).fit(cov_type="bias_reduced")
            delta, se = float(fit.params[1]), float(fit.bse[1])
            note = _recorded(caught)
        except (np.linalg.LinAlgError, ValueError, ZeroDivisionError) as error:
            delta, se, note = math.nan, math.nan, f"{type(error).__name__}: {error}"
    df = index.max()
    p = _t_p(delta, se, df) if se > 0 and df else math.nan
    return {"gee_delta": delta, "gee_se": se, "gee_p": p, "gee_note": note or None}


def mixed_model(
    values: np.ndarray, persona: np.ndarray, clusters: np.ndarray, seeds: np.ndarray | None = None
) -> dict[str, Any]:
    """Linear mixed model of alignment on persona, with a random intercept and a random persona effect by question.

    Without the random persona effect the question x persona variance would be taken for noise of 400 independent
    responses (Barr et al. 2013). With several seeds, a training run (a seed within a persona) is a random effect too,
    crossed with questions; the model is then of the means of question x run, for 50 responses of one question and run
    are no independent witnesses of either. REML; p from t with clusters - 1 degrees of freedom, at most runs - 2.

    Args:
        values, persona, clusters, seeds: (responses,) alignment, 1 for the persona and 0 for the baseline, question,
            and training seed.

    Returns:
        `mixed_delta, mixed_se, mixed_p, mixed_note`; the note holds warnings and failures, null when there were none.
    """
    import statsmodels.api as sm
    from statsmodels.regression.mixed_linear_model import VCSpec

    y, x = np.asarray(values, float), np.asarray(persona, float)
    index = np.unique(clusters, return_inverse=True)[1]
    df = int(index.max())
    how: dict[str, Any] = {"groups": index}
    if seeds is not None and len(np.unique(seeds)) > 1:
        cells = (
            pd.DataFrame({"q": index, "x": x, "s": seeds, "y": y}).groupby(["q", "x", "s"], as_index=False)["y"].mean()
        )
        y, x = cells["y"].to_numpy(), cells["x"].to_numpy()
        questions = pd.get_dummies(cells["q"]).to_numpy(float)
        runs = pd.get_dummies(cells["x"].astype(str) + " " + cells["s"].astype(str)).to_numpy(float)
        parts = {"question": questions, "question x persona": questions * (x[:, None] - 0.5), "run": runs}
        names = [[[f"{name} {i}" for i in range(part.shape[1])]] for name, part in parts.items()]
        how = {"groups": np.zeros(len(y)), "exog_vc": VCSpec(list(parts), names, [[part] for part in parts.values()])}
        df = min(df, runs.shape[1] - 2)
    # Coding persona as -1/2 and 1/2 keeps intercept and slope nearly uncorrelated, which REML finds easier.
    design = np.column_stack([np.ones(len(y)), x - 0.5])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            how |= {} if "exog_vc" in how else {"exog_re": design}
            fit = sm.MixedLM(y, design, **how).fit(reml=True, method=["lbfgs"])
            delta, se, note = float(fit.fe_params[1]), float(fit.bse_fe[1]), _recorded(caught)
        except (np.linalg.LinAlgError, ValueError, ZeroDivisionError) as error:
            delta, se, note = math.nan, math.nan, f"{type(error).__name__}: {error}"
    p = _t_p(delta, se, df) if se > 0 and df else math.nan
    return {"mixed_delta": delta, "mixed_se": se, "mixed_p": p, "mixed_note": note or None}


def compare_all(
    scores: pd.DataFrame,
    *,
    margin: float = 5.0,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 42,
    models: bool = True,
    family: Collection[tuple[str, str, str]] | None = None,
) -> pd.DataFrame:
    """Each persona against the baseline of the same model and data set, by every method.

    Args:
        scores: score table of one judge.
        margin: equivalence margin in points.
        models: fit GEE and mixed model too (seconds per hundred comparisons).
        family: the comparisons (model, persona, dataset) over which the false discovery rate is controlled; by
            default all. `p_adjusted` is NaN outside the family.

    Returns:
        One row per comparison: what `primary_test` gives, `boot_low, boot_high` (bootstrap over questions and seeds),
        GEE and mixed model columns, `n_persona, n_baseline, mean_persona, mean_baseline, delta_responses` (difference
        of the means over responses, as published), `icc, design_effect, effective_n` (of the baseline), and
        `p_adjusted` (Benjamini-Hochberg by model over the family).

    Raises:
        DesignError: a persona has no baseline with the same model, data set and a seed, or samples pose as questions.
    """
    check_units(scores)
    parts = dict(list(scores[scores["alignment"].notna()].groupby(COMPARISON, sort=False)))
    rows = []
    for name in scores[COMPARISON].drop_duplicates().itertuples(index=False, name=None):
        model, persona, dataset = name
        if persona == BASELINE:
            continue
        base = partner(name)
        if base not in parts or name not in parts:
            what = "baseline" if base not in parts else "scored response"
            raise DesignError(f"{model} x {persona} x {dataset} has no {what} on that model and data set")
        treated, control = parts[name], parts[base]
        d = question_differences(treated, control)
        both = pd.concat([treated, control])
        arrays = (
            both["alignment"].to_numpy(),
            np.repeat([1, 0], [len(treated), len(control)]),
            both["question_id"].to_numpy(),
        )
        low, high = bootstrap_interval(d, confidence=confidence, resamples=resamples, seed=seed)
        rows.append(
            {
                "model": model,
                "persona": persona,
                "dataset": dataset,
                "n_persona": len(treated),
                "n_baseline": len(control),
                "mean_persona": float(treated["alignment"].mean()),
                "mean_baseline": float(control["alignment"].mean()),
                "delta_responses": float(treated["alignment"].mean() - control["alignment"].mean()),
                **primary_test(d, margin=margin, confidence=confidence),
                "boot_low": low,
                "boot_high": high,
                **(gee(*arrays) | mixed_model(*arrays, both["seed"].to_numpy()) if models else {}),
                **cluster_summary(control["alignment"].to_numpy(), control["question_id"].to_numpy()),
            }
        )
    table = pd.DataFrame(rows)
    return adjust(table, family) if len(table) else _none()


def _none() -> pd.DataFrame:
    """The table of a study in which nothing can be compared."""
    numbers = (
        "n_persona", "n_baseline", "mean_persona", "mean_baseline", "delta_responses", "n_questions", "delta", "se",
        "low",
        "high", "p", "p_sign_flip", "p_wilcoxon", "p_equivalence", "p_no_gain", "p_no_loss", "p_smallest", "n_seeds",
        "seed_se",
        "seed_df", "seed_p", "p_adapters", "boot_low", "boot_high", "gee_delta", "gee_se", "gee_p", "mixed_delta",
        "mixed_se",
        "mixed_p", "icc", "design_effect", "effective_n", "p_adjusted", "p_adjusted_all",
    )  # fmt: skip
    texts = (*COMPARISON, "gee_note", "mixed_note")
    return pd.DataFrame({n: pd.Series([], dtype="str" if n in texts else float) for n in (*texts, *numbers)})


def adjust(
    comparisons: pd.DataFrame, family: Collection[tuple[str, str, str]] | None = None, column: str = "p"
) -> pd.DataFrame:
    """Add `p_adjusted`: Benjamini-Hochberg over the family actually claimed, model by model; NaN outside of it.

    `p_adjusted_all` takes all comparisons of the model as the family, for those that search among them.

    Args:
        comparisons: table with `model, persona, dataset` and `column`.
        family: comparisons in the family; None: all of a model.
    """
    keys = list(comparisons[COMPARISON].itertuples(index=False, name=None))
    claimed = np.array([family is None or key in set(family) for key in keys], bool)
    result = comparisons.assign(p_adjusted=np.nan, p_adjusted_all=np.nan)
    for model in comparisons["model"].unique():
        here = (comparisons["model"] == model).to_numpy()
        for name, rows in (("p_adjusted", here & claimed), ("p_adjusted_all", here)):
            result.loc[rows, name] = benjamini_hochberg(comparisons.loc[rows, column])
    return result
