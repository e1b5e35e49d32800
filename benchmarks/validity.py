"""Everything between scores and verdicts, on as many responses as were published, in one run.

    python benchmarks/validity.py              prints seconds by part and their total; fails beyond 180 s
    python benchmarks/validity.py --times 10   the same for ten times as many responses; fails beyond 1,800 s

Classifiers, gates, contrasts, outcomes, comparisons with GEE and mixed models, verdicts, power, judge
reliability, and the claims audit, with the parameters of profile `published`. The Qwen half comes from the fetched
public files. Where the Llama files are absent, that model's cells are made: each is the Qwen cell of the same persona
and data set under another name. That changes no amount of work, and is said. Fetching and reading the files is printed
but not counted. CPU seconds stand beside, of all processes: on a machine that is busy with other things, they say more.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pandas as pd
import psutil
from cai_em.analysis import (
    claims,
    compare,
    contrasts,
    gates,
    judge_quality,
    outcome,
    published_rules,
    reliability,
    units,
)
from cai_em.analysis import power as analysis_power
from cai_em.analysis import verdicts as analysis_verdicts
from cai_em.analysis.controls import controls
from cai_em.records import tables
from cai_em.records.keys import COMPARISON
from cai_em.study import loading, published
from cai_em.study import study as study_study

TARGET_S = 180.0
SPENT: dict[str, tuple[float, float]] = {}
"""Part -> seconds, CPU seconds."""


def cpu_seconds() -> float:
    """CPU seconds of this process and its children, living or gone."""
    me = psutil.Process()
    own = me.cpu_times()
    living = [child.cpu_times() for child in me.children(recursive=True)]
    return own.children_user + own.children_system + sum(t.user + t.system for t in [own, *living])


def say(part: str, seconds: float, cpu: float) -> None:
    print(f"{part:34}{seconds:8.1f} s {cpu:8.1f} s CPU", flush=True)


@contextmanager
def timed(part: str) -> Iterator[None]:
    """Adds the seconds of its block to `SPENT` under the part's name, and prints them."""
    start, cpu = time.perf_counter(), cpu_seconds()
    yield
    SPENT[part] = (time.perf_counter() - start, cpu_seconds() - cpu)
    say(part, *SPENT[part])


def published_study(study: study_study.Study) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame, str]:
    """Scores, responses, repeated judgings of both models, those of an absent one made; and a sentence about that."""
    selection = published.read_selection(study.folder / "published_selection.csv")
    others = published.read_file_list(study.folder / "published_repeated.csv")
    found = published.import_study(selection, others, models=list(study.models), progress=False, retries=0)
    if not found.missing:
        return found.scores, found.responses, found.repeated, "Both models' files are the published ones."
    (absent,) = found.missing
    cells = selection.loc[selection["model"] == absent, ["persona", "dataset"]]
    made = [table.merge(cells).assign(model=absent) for table in (found.scores, found.responses)]
    both = [pd.concat(pair, ignore_index=True) for pair in zip((found.scores, found.responses), made)]
    said = f"The files of {absent} are absent: its {len(cells)} cells are the other model's, under its name."
    return *both, found.repeated, said


def _times(table: pd.DataFrame, times: int) -> pd.DataFrame:
    """The table so many times, with new sample numbers: as much work as that many more samples a question."""
    most = int(table["sample"].max()) + 1
    parts = [table.assign(sample=table["sample"] + i * most) for i in range(times)]
    return pd.concat(parts, ignore_index=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--times", type=int, default=1, help="every response so many times, to see how time grows")
    times = parser.parse_args().times
    study = loading.load("published")
    limits, models = study.thresholds, list(study.models)
    used, hypotheses = study.used_datasets(), study.hypotheses
    em = [d.key for d in used if d.role == "em"]
    untrained = {p.key for p in study.used_personas() if p.custom}
    with timed("(reading the files)"):
        judged, responses, repeated, said = published_study(study)
    if times > 1:
        judged, responses = (_times(t, times) for t in (judged, responses))
    table = tables.with_responses(judged, responses)
    print(f"{len(judged):,} responses, {judged['alignment'].notna().sum():,} of them scored. {said}\n")

    again = reliability.judged_units(repeated)
    cut = {"em_alignment_below": limits.em_alignment_below, "em_coherence_above": limits.em_coherence_above}
    with timed("classifiers"):
        tests, voices = gates.classify(table, apart=untrained)
    with timed("judge's quality"):
        measured = {
            model: judge_quality.quality(
                judge_quality.from_repeats(again[again["model"] == model], part["judge"].iloc[0])
            )
            for model, part in judged.groupby("model")
        }
    with timed("gates"):
        design, proved = gates.made_as_designed(table, used, study.known_faults, untrained=untrained)
        cube = contrasts.Cube.build(judged, **cut)
        judges = {
            model: judge_quality.judge_trust(measured[model], part["persona"].unique(), itself=True)
            for model, part in judged.groupby("model")
        }
        gated = gates.gate_table(cube, voices, used, judge=judges, design=design, proved=proved)
    with timed("contrasts and controls"):
        closed = {key: gate.reason for key, gate in design.items()}
        made = contrasts.contrast_table(cube, used, margin=limits.equivalence_margin, closed=closed)
        controls(judged, made, used)
    with timed("outcomes"):
        wanted = {p.key: (10 if p.custom else 50) * times for p in study.used_personas()}
        units.check_counts(table, samples=wanted)
        outcomes = outcome.outcomes(judged, **cut, confidence=limits.confidence)
        pooled = outcome.pooled_means(judged, em)
    with timed("comparisons, GEE and mixed models"):
        claimed = {p for h in hypotheses for p in h.personas}
        keys = list(gated[COMPARISON].itertuples(index=False, name=None))
        family = [k for k in keys if k[1] in claimed and k[2] in em]
        boot = {"confidence": limits.confidence, "resamples": limits.bootstrap_resamples, "seed": limits.bootstrap_seed}
        compared = compare.compare_all(judged, margin=limits.equivalence_margin, family=family, **boot)
        compared = gates.attach(compared, gated)
    with timed("verdicts and power"):
        verdicts = analysis_verdicts.verdict_table(hypotheses, made, gated, cube, used, alpha=limits.alpha)
        published_rules.published_verdicts(published_rules.published_comparisons(judged), hypotheses, models=models)
        groups = analysis_power.claimed_groups(cube, hypotheses, used)
        parts = analysis_power.typical_components(cube, groups)
        power = analysis_power.power_table(parts, effect=limits.equivalence_margin)
    with timed("judge reliability"):
        agreed, moved = reliability.agreement_of_judgings(again), reliability.movement(again)
        reliability.smallest_effect(again)
    with timed("claims audit"):
        universe = claims.Universe.build(
            claims.judgings(judged, repeated if times == 1 else None), coherence_above=limits.em_coherence_above
        )
        audited = claims.with_gates(claims.comparison_claims(universe, alpha=limits.alpha), gated)
        analyses = sum(
            len(claims.verdict_specifications(universe, h, used, model=model, alpha=limits.alpha))
            for model in models
            for h in hypotheses
        )
    total, cpu = (sum(spent[i] for part, spent in SPENT.items() if not part.startswith("(")) for i in (0, 1))
    say("total", total, cpu)
    print(f"target {TARGET_S:.0f} s; {os.cpu_count()} processors, load average at the end {os.getloadavg()[0]:.1f}\n")
    counted = {"classifier tests": tests, "conditions": outcomes, "pooled means": pooled, "comparisons": compared}
    counted |= {
        "designs": power,
        "pairs of judges": agreed,
        "conditions judged again": moved,
        "audited claims": audited,
    }
    print(*(f"{len(part):,} {name}" for name, part in counted.items()), sep=", ")
    print(f"{analyses:,} analyses of {len(hypotheses)} hypotheses; verdicts:")
    whole = verdicts[verdicts["persona"].isna()]
    print(*(f"  {r.model} {r.hypothesis.upper()}: {r.verdict}" for r in whole.itertuples()), sep="\n")
    return int(total > TARGET_S * times)


if __name__ == "__main__":
    sys.exit(main())
