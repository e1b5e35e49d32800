"""H3: gates, tables and verdict of the course of training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pandas as pd

from cai_em.analysis.gates import (
    INCONCLUSIVE,
    PRESENT,
    Gate,
    blocking,
    constant_judge,
    gated_verdict,
    named_once,
    voice,
)
from cai_em.analysis.judge_quality import judge_trust
from cai_em.analysis.units import MIN_SEEDS, bootstrap_interval
from cai_em.analysis.verdicts import Verdict
from cai_em.analysis.voices import Bag, told
from cai_em.dynamics.curves import CLAIMED, HELD_OUT, OUTCOMES, Curve, curves_of, same_units
from cai_em.dynamics.timing import transition
from cai_em.records.keys import BASELINE
from cai_em.study.entries import GateThresholds
from cai_em.study.labels import Labels

# --- Generality: in-domain uptake against emergent misalignment -----------------------------------------------------


def generality(
    course: pd.DataFrame, persona: str, outcomes: Sequence[str] = ("alignment", "em"), uptake: str = HELD_OUT
) -> pd.DataFrame:
    """What each training preset gains in the domain, and what that costs outside it, along training.

    Args:
        course: of all models and presets.
        persona: whose.
        outcomes: on questions outside the domain.
        uptake: the in-domain held-out loss.

    Returns:
        `preset, step, uptake, uptake_low, uptake_high` (fall of the in-domain loss since step 0, nats a token),
        `outcome, outcome_low, outcome_high`, for the steps that both have, `model` and `measure` (which outcome).
    """
    curves, tables = curves_of(course[course["persona"] == persona]), []
    for model in course["model"].unique():
        for measure in outcomes:
            for (of, preset, _, outcome), loss in curves.items():
                if of != model or outcome != uptake:
                    continue
                fallen = Curve(loss.y[:, :, :1] - loss.y, loss.steps, loss.units, loss.left_out).table()
                out = curves[model, preset, persona, measure].table()
                both = fallen.rename(columns={"mean": "uptake", "low": "uptake_low", "high": "uptake_high"}).merge(
                    out.rename(columns={"mean": "outcome", "low": "outcome_low", "high": "outcome_high"}), on="step"
                )
                both.insert(0, "preset", preset)
                tables.append(both.assign(model=model, measure=measure))
    return pd.concat(tables, ignore_index=True)


def final_difference(one: Curve, other: Curve, **settings: Any) -> dict[str, float]:
    """Last checkpoint of one curve minus that of another: `difference, low, high`; schedules may differ.

    Paired by unit and, where the curves share seeds, by these alone: a preset that was trained with one seed is set
    beside the same seed of the other.
    """
    a, b = (y[:, :, -1] for y in same_units(one, other))
    if both := [s for s in one.seeds if s in other.seeds]:
        a, b = a[:, [one.seeds.index(s) for s in both]], b[:, [other.seeds.index(s) for s in both]]
    elif a.shape[1] != b.shape[1]:
        a, b = a.mean(axis=1), b.mean(axis=1)
    low, high = bootstrap_interval(a - b, **settings)
    return {"difference": float((a - b).mean()) if len(a) else math.nan, "low": low, "high": high}


UPTAKE = "uptake"


def preset_differences(
    course: pd.DataFrame, persona: str, main: str, uptake: str = HELD_OUT, **settings: Any
) -> pd.DataFrame:
    """What each preset beside the main one gains and costs at its last checkpoint, against the main one.

    Args:
        course: of all models and presets.
        persona: whose.
        main: the main preset.
        uptake: the in-domain held-out loss.
        settings: of the intervals.

    Returns:
        `preset, outcome` (`uptake`: by how much more the loss has fallen; then `CLAIMED`), `difference, low, high`,
        `model`.
    """
    curves, rows = curves_of(course[course["persona"] == persona]), []
    for model, preset in dict.fromkeys(key[:2] for key in curves):
        if preset == main:
            continue
        for outcome in (uptake, *CLAIMED):
            pair = [curves[model, name, persona, outcome] for name in (preset, main)]
            if outcome == uptake:  # both start from the same model: what has fallen more is lower
                found = final_difference(*pair[::-1], **settings) | {"outcome": UPTAKE}
            else:
                found = final_difference(*pair, **settings) | {"outcome": outcome}
            rows.append({"preset": preset, **found, "model": model})
    return pd.DataFrame(rows, columns=["preset", "outcome", "difference", "low", "high", "model"])


def uptake_gate(loss: Curve, **settings: Any) -> Gate:
    """Whether training was taken up: the loss on held-out rows of the domain falls."""
    found = transition(loss.y, loss.steps, **settings)
    if found.gate.status == PRESENT and found.rise > 0:
        return Gate(INCONCLUSIVE, f"held-out loss rises: {found.gate.reason}")
    return Gate(found.gate.status, f"held-out loss, {found.gate.reason}")


def persona_gate(responses: pd.DataFrame, persona: str, thresholds: GateThresholds) -> Gate:
    """Whether a persona shows in its responses, all checkpoints together, on questions not seen by the classifier.

    Args:
        responses: of one model and preset (`with_steps`), the baseline's among them.
        persona: which.
        thresholds: of the gates.
    """
    some = responses[responses["persona"].isin([persona, BASELINE])]
    fewest = min((some["persona"] == p).sum() for p in (persona, BASELINE))
    if fewest < thresholds.min_responses or some["question_id"].nunique() < 2:
        why = f"{persona}: {fewest} responses; {thresholds.min_responses} and 2 questions needed"
        return Gate(INCONCLUSIVE, why)
    # All checkpoints of a training are one condition here: the voice, not the step, is asked for.
    bag = Bag.of(some.assign(dataset="(all steps)").reset_index(drop=True))
    mine, base = ([k for k in bag.rows if k[1] == p] for p in (persona, BASELINE))
    return voice(told(bag, mine, base)[0], f"{persona} against baseline", matters=thresholds.auc_matters)


def judge_gates(
    judged: pd.DataFrame, measured: pd.DataFrame | None, thresholds: GateThresholds, look: Labels
) -> dict[str, list[Gate]]:
    """Model -> its gates about the judge, one for each persona: what the persona's comparisons hang on.

    Args:
        judged: scores of all models.
        measured: the judge's agreement, slope and bias (`judge.measured_quality`).
        thresholds: of the gates.
        look: labels.
    """
    bounds: dict[str, Any] = {"auc_min": thresholds.judge_auc_min, "slope_min": thresholds.judge_slope_min}
    bounds["bias_max"] = thresholds.judge_bias_max
    found = {}
    for model, scores in judged.groupby("model", sort=False):
        each = judge_trust(measured, scores["persona"].unique(), constant=constant_judge(scores), **bounds)
        found[model] = [gate.called(f"judge, {look.persona(p)}", p) for p, gate in each.items()]
    return found


def h3_gates(
    course: pd.DataFrame,
    responses: pd.DataFrame,
    judge: Mapping[str, Sequence[Gate]],
    look: Labels,
    thresholds: GateThresholds,
    **settings: Any,
) -> dict[str, list[Gate]]:
    """Model -> all gates of H3: the judge's, then of each persona whether training was taken up and whether it shows.

    Args:
        course: of the main preset.
        responses: all checkpoints' responses (`with_steps`).
        judge: `judge_gates`.
        look: labels.
        thresholds: of the gates.
        settings: of the intervals.
    """
    found = {model: list(of) for model, of in judge.items()}
    for (model, preset, persona, outcome), loss in curves_of(course).items():
        if outcome != HELD_OUT:
            continue
        found[model].append(uptake_gate(loss, **settings).called(f"uptake, {look.persona(persona)}", persona))
        if persona != BASELINE:
            mine = responses[(responses["model"] == model) & (responses["preset"] == preset)]
            shows = persona_gate(mine, persona, thresholds)
            found[model].append(shows.called(f"persona, {look.persona(persona)}", persona))
    return found


# --- Verdict ---------------------------------------------------------------------------------------------------------


def h3_table(found: pd.DataFrame) -> pd.DataFrame:
    """Transition points as the paper prints them: the logistic's, one row per model, persona and outcome."""
    table = found[found["method"] == "logistic"]
    shown = ["step", "low", "high", "rise", "rise_low", "rise_high", "beyond", "units", "seeds", "left_out", "gate"]
    return table[["model", "persona", "outcome", *shown]].replace({"outcome": OUTCOMES}).reset_index(drop=True)


def h3_verdict(compared: pd.DataFrame, beside: Sequence[Gate], look: Labels, *, alpha: float = 0.05) -> Verdict:
    """What can be said about H3.

    Rules, the first that applies:

    1. NOT TESTABLE: no claimed outcome changes enough under both a persona and the baseline to be timed.
    2. NOT INTERPRETABLE: a gate fails for every comparison. One that fails for a persona blocks that persona's
       comparisons alone, and is named.
    3. UNDECIDED: one training run on a side: what differs may be the run.
    4. SUPPORTED: adjusted p < alpha for at least one; else UNDECIDED. With fewer than three training runs on a side it
       speaks of these adapters.

    Args:
        compared: `comparisons`.
        beside: gates.
        look: labels.
        alpha: significance level.
    """
    claimed = compared[compared["outcome"].isin(CLAIMED) & compared["shown"]] if len(compared) else compared
    if claimed.empty:
        why = "no behavioural outcome changes enough on both sides to be timed"
        return Verdict("NOT TESTABLE", why, cause="untimed")
    blocked = {p: blocking(beside, p, BASELINE) for p in claimed["persona"].unique()}
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
        return Verdict("NOT INTERPRETABLE", f"{why}, but not shown: {failed}", cause="gates")
    if left["seeds"].min() < 2:
        why = "one training run per persona: what differs between two personas may differ between two runs of one"
        return Verdict("UNDECIDED", why + without, cause="runs")
    if told:
        return Verdict("SUPPORTED", "; ".join(told) + without, recipe=left["seeds"].min() >= MIN_SEEDS)
    why = "no difference of transition points is told from chance, which does not show that they are equal"
    return Verdict("UNDECIDED", why + without, cause="wide")


def verdicts_of(
    hypothesis: str, tested: pd.DataFrame, beside: Mapping[str, Sequence[Gate]], say: Callable[..., Verdict]
) -> pd.DataFrame:
    """What `say(tests, gates)` says of every model, with its gates: `what, persona, status, reason, model`."""
    tables = []
    for model, mine in beside.items():
        here = tested[tested["model"] == model] if len(tested) else tested
        tables.append(gated_verdict(mine, say(here, mine), hypothesis).assign(model=model))
    return pd.concat(tables, ignore_index=True)


def h3_verdicts(
    compared: pd.DataFrame, beside: Mapping[str, Sequence[Gate]], look: Labels, *, alpha: float = 0.05
) -> pd.DataFrame:
    """`h3_verdict` of every model with its gates, as a table (`verdicts_of`)."""
    return verdicts_of("H3", compared, beside, partial(h3_verdict, look=look, alpha=alpha))
