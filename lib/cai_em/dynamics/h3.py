"""H3: gates, tables and verdict of the course of training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from cai_em.analysis import classifiers, gates
from cai_em.analysis.gates import NOT_SHOWN, NOT_TESTABLE, SHOWN, Check, Gate, blocking, named_once
from cai_em.analysis.units import bootstrap_interval
from cai_em.analysis.verdicts import Verdict
from cai_em.dynamics.curves import CLAIMED, OUTCOMES, Curve, _same_units
from cai_em.dynamics.timing import transition
from cai_em.records.keys import BASELINE
from cai_em.study.entries import GateThresholds
from cai_em.study.labels import Labels

# --- Generality: in-domain uptake against emergent misalignment -----------------------------------------------------


def generality(uptake: Mapping[str, Curve], outcome: Mapping[str, Curve]) -> pd.DataFrame:
    """What each training preset gains in the domain, and what that costs outside it, along training.

    Args:
        uptake: preset -> curve of the in-domain held-out loss.
        outcome: preset -> curve of an outcome on questions outside the domain (e.g. `em`).

    Returns:
        `preset, step, uptake, uptake_low, uptake_high` (fall of the in-domain loss since step 0, nats a token),
        `outcome, outcome_low, outcome_high`, for the steps that both have.
    """
    rows = []
    for preset, loss in uptake.items():
        fallen = Curve(loss.y[:, :, :1] - loss.y, loss.steps, loss.units, loss.left_out).table()
        out = outcome[preset].table()
        for r in fallen.merge(out, on="step", suffixes=("", "_out")).itertuples():
            rows.append(
                {
                    "preset": preset,
                    "step": r.step,
                    "uptake": r.mean,
                    "uptake_low": r.low,
                    "uptake_high": r.high,
                    "outcome": r.mean_out,
                    "outcome_low": r.low_out,
                    "outcome_high": r.high_out,
                }
            )
    return pd.DataFrame(rows)


def final_difference(one: Curve, other: Curve, **settings: Any) -> dict[str, float]:
    """Last checkpoint of one curve minus that of another: `difference, low, high`; schedules may differ.

    Paired by unit and, where the curves share seeds, by these alone: a preset that was trained with one seed is set
    beside the same seed of the other.
    """
    a, b = (y[:, :, -1] for y in _same_units(one, other))
    if both := [s for s in one.seeds if s in other.seeds]:
        a, b = a[:, [one.seeds.index(s) for s in both]], b[:, [other.seeds.index(s) for s in both]]
    elif a.shape[1] != b.shape[1]:
        a, b = a.mean(axis=1), b.mean(axis=1)
    low, high = bootstrap_interval(a - b, **settings)
    return {"difference": float((a - b).mean()) if len(a) else math.nan, "low": low, "high": high}


UPTAKE = "uptake"


def preset_differences(
    behaviour: Mapping[str, Mapping[str, Curve]], loss: Mapping[str, Curve], main: str, **settings: Any
) -> pd.DataFrame:
    """What each preset beside the main one gains and costs at its last checkpoint, against the main one.

    Args:
        behaviour: preset -> outcome -> curve, of one persona.
        loss: preset -> curve of the in-domain held-out loss.
        main: the main preset.
        settings: of the intervals.

    Returns:
        `preset, outcome` (`uptake`: by how much more the loss has fallen; then `CLAIMED`), `difference, low, high`.
    """
    rows = []
    for preset in (p for p in loss if p != main):
        found = final_difference(loss[main], loss[preset], **settings)  # both start from the same model
        rows.append({"preset": preset, "outcome": UPTAKE, **found})
        for outcome in CLAIMED:
            found = final_difference(behaviour[preset][outcome], behaviour[main][outcome], **settings)
            rows.append({"preset": preset, "outcome": outcome, **found})
    return pd.DataFrame(rows, columns=["preset", "outcome", "difference", "low", "high"])


def uptake_gate(loss: Curve, **settings: Any) -> Gate:
    """Whether training was taken up: the loss on held-out rows of the domain falls."""
    found = transition(loss.y, loss.steps, **settings)
    if found.gate.status == SHOWN and found.rise > 0:
        return Gate(NOT_SHOWN, f"held-out loss rises: {found.gate.reason}")
    return Gate(found.gate.status, f"held-out loss, {found.gate.reason}")


def persona_gate(responses: pd.DataFrame, persona: str, thresholds: GateThresholds) -> Gate:
    """Whether a persona shows in its responses, all checkpoints together, on questions not seen by the classifier.

    Args:
        responses: of one model and preset (`with_steps`), the baseline's among them.
        persona: which.
        thresholds: of the gates.
    """
    some = responses[responses["persona"].isin([persona, BASELINE])]
    mine = (some["persona"] == persona).to_numpy(int)
    fewest = min(mine.sum(), (1 - mine).sum())
    if fewest < thresholds.min_responses or some["question_id"].nunique() < 2:
        return Gate(NOT_TESTABLE, f"{persona}: {fewest} responses; {thresholds.min_responses} and 2 questions needed")
    words = classifiers.features(some["response"])
    found = classifiers.two_sample(words, mine, some["question_id"].to_numpy(), permutations=thresholds.permutations)
    named = {"scope": "persona", "persona": persona, "dataset": some["dataset"].iloc[0]}
    return gates.evidence(found | named, minimum=thresholds.persona_auc_min, p_max=thresholds.p_max)


# --- Words ---------------------------------------------------------------------------------------------------------


def h3_table(found: pd.DataFrame) -> pd.DataFrame:
    """Transition points as the paper prints them: the logistic's, one row per model, persona and outcome."""
    table = found[found["method"] == "logistic"]
    shown = ["step", "low", "high", "rise", "rise_low", "rise_high", "beyond", "units", "seeds", "left_out", "gate"]
    kept = [c for c in ("model", "persona", "outcome", *shown) if c in table]
    return table[kept].replace({"outcome": OUTCOMES}).reset_index(drop=True)


def h3_verdict(compared: pd.DataFrame, checks: Sequence[Check], look: Labels, *, alpha: float = 0.05) -> Verdict:
    """What can be said about H3.

    Rules, the first that applies:

    1. NOT TESTABLE: no claimed outcome changes enough under both a persona and the baseline to be timed.
    2. NOT INTERPRETABLE: a gate fails for every comparison. One that fails for a persona blocks that persona's
       comparisons alone, and is named.
    3. UNDECIDED: one training run on a side: what differs may be the run.
    4. SUPPORTED: adjusted p < alpha for at least one; else UNDECIDED.

    Args:
        compared: `comparisons`.
        checks: gates.
        look: labels.
        alpha: significance level.
    """
    claimed = compared[compared["outcome"].isin(CLAIMED) & compared["shown"]] if len(compared) else compared
    if claimed.empty:
        return Verdict("NOT TESTABLE", "no behavioural outcome changes enough on both sides to be timed")
    blocked = {p: blocking(checks, p, BASELINE) for p in claimed["persona"].unique()}
    left = claimed[[not blocked[p] for p in claimed["persona"]]]
    failed = named_once(blocked.values())
    without = f"; not interpretable, for it is not shown: {failed}" if failed else ""
    told = [
        f"{look.persona(r.persona)}, {OUTCOMES[r.outcome]}: {r.difference:+.1f} steps"
        for r in (left if len(left) else claimed).itertuples()
        if r.p_adjusted < alpha
    ]
    if left.empty:
        why = "; ".join(told) or "no difference of transition points is told from chance"
        return Verdict("NOT INTERPRETABLE", f"{why}, but not shown: {failed}")
    if left["seeds"].min() < 2:
        why = "one training run per persona: what differs between two personas may differ between two runs of one"
        return Verdict("UNDECIDED", why + without)
    if told:
        return Verdict("SUPPORTED", "; ".join(told) + without)
    why = "no difference of transition points is told from chance, which does not show that they are equal"
    return Verdict("UNDECIDED", why + without)
