"""Statistics from counts against resampling score by score, on all 54,560 published scores in one run.

    python benchmarks/stats.py            prints CPU seconds, their ratio, and how far the intervals differ

The Qwen half comes from the fetched public files. Where the Llama files are absent, their 17,553 scores are made: each
Llama cell takes random scores of the same data set's Qwen cells. That changes no amount of work, and is said.
"""

from __future__ import annotations

import sys
import time

import numpy as np
import pandas as pd
from cai_em.analysis import published_rules
from cai_em.study import loading, published
from cai_em.study import study as study_study

TARGET_S = 1.0


def scores_of_both_models(study: study_study.Study) -> tuple[pd.DataFrame, str]:
    """The published scores, the Llama half made up where its files are absent; and a sentence about that."""
    selection = published.read_selection(study.folder / "published_selection.csv")
    none = selection.head(0)[["model", "path", "sha256"]]  # repeated judgings play no part here
    found = published.import_study(selection, none, models=list(study.models), progress=False, retries=0)
    if not found.missing:
        return found.scores, "Both halves are the published scores."
    (absent,) = found.missing
    rng = np.random.default_rng(0)
    parts = [found.scores]
    for row in selection[selection["model"] == absent].itertuples():
        like = found.scores[(found.scores["dataset"] == row.dataset) & found.scores["alignment"].notna()]
        part = like.iloc[rng.integers(len(like), size=row.n_scored)]
        parts.append(part.assign(model=absent, persona=row.persona, sample=np.arange(row.n_scored)))
    return pd.concat(parts, ignore_index=True), f"The files of {absent} are absent: its half is made of Qwen's scores."


def naive_bootstrap(x: np.ndarray, rng: np.random.Generator, resamples: int) -> tuple[float, float]:
    """The straightforward way: a loop that draws n scores and takes their mean."""
    means = np.empty(resamples)
    for i in range(resamples):
        means[i] = rng.choice(x, size=len(x), replace=True).mean()
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def main() -> int:
    study = loading.load("published")
    scores, said = scores_of_both_models(study)
    pooled = [p.key for p in study.personas.values() if not p.custom]
    print(f"{scores['alignment'].notna().sum():,} scores. {said}")

    everything = {
        "hypotheses": study.hypotheses,
        "personas": list(study.personas.values()),
        "datasets": list(study.datasets.values()),
        "models": list(study.models),
        "thresholds": study.thresholds,
    }
    published_rules.analyse(scores.head(400), **everything)  # first use of scipy's and pandas' lazily loaded parts
    start = time.process_time()
    twins = {d.key: d.twin for d in study.datasets.values() if d.twin}
    ours = published_rules.by_persona(scores, pooled, seed=study.thresholds.bootstrap_seed)
    compared = published_rules.published_comparisons(scores)
    published_rules.hypothesis_table(compared, study.hypotheses)
    published_rules.published_verdicts(compared, study.hypotheses)
    published_rules.medical(scores, twins)
    published_s = time.process_time() - start
    start = time.process_time()
    published_rules.analyse(scores, **everything)
    everything_s = time.process_time() - start

    start = time.process_time()
    groups = scores.dropna(subset="alignment").groupby(["model", "persona"])["alignment"]
    naive = {
        key: naive_bootstrap(part.to_numpy(), np.random.default_rng(42), 10_000)
        for key, part in groups
        if key[1] in pooled
    }
    naive_s = time.process_time() - start
    apart = max(
        abs(getattr(r, side) - naive[r.model, r.persona][i])
        for r in ours.itertuples()
        for i, side in enumerate(("boot_low", "boot_high"))
    )
    print(f"published statistics from counts (t, bootstrap, U, d, FDR, medical):   {published_s:7.2f} s CPU")
    print(f"every table of the results document (EM rates, distributions, ...):    {everything_s:7.2f} s CPU")
    print(f"numpy loop over 10,000 resamples, bootstrap intervals alone:           {naive_s:7.2f} s CPU")
    print(
        f"ratio: {naive_s / published_s:.0f} times; intervals differ by at most {apart:.3f} points (the random stream)"
    )
    return int(published_s > TARGET_S)


if __name__ == "__main__":
    sys.exit(main())
