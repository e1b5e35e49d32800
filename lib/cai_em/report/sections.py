"""Sections of the results document beyond the published ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from cai_em.analysis.compare import MIN_SEEDS
from cai_em.analysis.power import VarianceComponents
from cai_em.dynamics.curves import OUTCOMES
from cai_em.records.keys import BASELINE, COMPARISON, FLAGS, NO_DATASET
from cai_em.records.numbers import p_value, percent, plain_number, points
from cai_em.report.figures.parts import View
from cai_em.report.figures.training import loss_name
from cai_em.report.markdown import markdown_table
from cai_em.study.labels import Labels

# --- Words ---------------------------------------------------------------------------------------------------------


def comparison_sentence(claim: Mapping[str, Any], gate: Mapping[str, Any]) -> str:
    """One plain sentence about a significant comparison, from the data alone.

    Args:
        claim: a row of `comparison_claims`.
        gate: its row of `gates.comparison_gates`.
    """
    found = f"{points(claim['delta'], True)}, adjusted p {p_value(claim['p_published'])}"
    name = f"{claim['persona']} × {claim['dataset']} ({found})"
    stands = f"stands in {claim['stands']} of {claim['analyses']} analyses"
    questions = f"{100 * claim['share_questions']:.0f} % of those with the question as the unit"
    if gate["gate"] == "shown":
        about = "its manipulation is shown"
        if not gate["counts"]:
            about += f", but {claim['dataset']} is a {str(gate['role']).replace('_', ' ')} set, not an EM one"
    else:
        about = f"its manipulation is {gate['gate']} ({gate['gate_reason']}), so it says nothing about the persona"
    return f"{name} {stands}, {questions}; {about}."


def verdict_sentence(claim: Mapping[str, Any], honest: str, reason: str) -> str:
    """One plain sentence about a verdict, from the data alone.

    Args:
        claim: from `verdict_claim`.
        honest: the verdict that `inference.honest_verdict` gives.
        reason: its reason.
    """
    low, high = points(claim["estimate_low"], True), points(claim["estimate_high"], True)
    return (
        f"By the published rules {claim['hypothesis'].upper()} is {claim['published']}; "
        f"{100 * claim['share']:.0f} % of {claim['analyses']} defensible analyses say the same "
        f"({claim['verdicts']}; estimates from {low} to {high} points). "
        f"With the design respected it is {honest}: {reason}."
    )


def audit(
    comparisons: pd.DataFrame, gates: pd.DataFrame, sentence: Callable[..., str] = comparison_sentence
) -> pd.DataFrame:
    """Claims about comparisons with `gate, gate_reason, role, counts` and `sentence`.

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
        gate = index[key]
        kept = {c: gate[c] for c in ("gate", "gate_reason", "role", "counts")}
        rows.append({**claim, **kept, "sentence": sentence(claim, gate)})
    return pd.DataFrame(rows)


def claims_sections(verdicts: pd.DataFrame, comparisons: pd.DataFrame) -> list[tuple[str, str]]:
    """Sections of the results document.

    Args:
        verdicts: rows of `verdict_claim` with `honest` and `sentence`.
        comparisons: from `audit`.
    """
    sections = []
    if len(verdicts):
        rows = [
            [
                r.model,
                r.hypothesis.upper(),
                r.published,
                f"{100 * r.share:.0f} %",
                r.analyses,
                r.verdicts,
                f"**{r.honest}**",
            ]
            for r in verdicts.itertuples()
        ]
        header = [
            "model",
            "hypothesis",
            "published rules",
            "same verdict in",
            "analyses",
            "all verdicts",
            "verdict here",
        ]
        text = markdown_table(rows, header, "lllrrll") + "\n\n" + "\n".join(f"- {s}" for s in verdicts["sentence"])
        sections.append(("Claims audit: verdicts", text))
    if len(comparisons):
        shown = comparisons["gate"] == "shown"
        counting = shown & comparisons["counts"]
        half, questions = int((comparisons["share"] > 0.5).sum()), int((comparisons["share_questions"] > 0.5).sum())
        lead = (
            f"Of {len(comparisons)} comparisons that the published rules call significant, {half} stand in more than "
            f"half of the analyses, {questions} in more than half of those with the question as the unit; the "
            f"manipulation is shown in {int(shown.sum())}, on an EM data set in {int(counting.sum())}."
        )
        rows = [
            [r.model, r.persona, r.dataset, points(r.delta, True), p_value(r.p_published), f"{r.stands}/{r.analyses}",
             f"{100 * r.share_questions:.0f} %", r.gate]
            for r in comparisons.itertuples()
        ]  # fmt: skip
        header = ["model", "persona", "data set", "Δ", "adjusted p", "stands in", "question as unit", "manipulation"]
        sections.append(
            ("Claims audit: significant comparisons", lead + "\n\n" + markdown_table(rows, header, "lllrrrrl"))
        )
    return sections


# --- Words ---------------------------------------------------------------------------------------------------------


def _auc_cell(x: float) -> str:
    return "–" if math.isnan(x) else f"{x:.2f}"


def _moved(row: Any, what: str) -> str:
    """`; judged 12 → 64, p < 0.001`, or nothing where no judge was asked."""
    before, after, p = (getattr(row, f"{what}_{part}") for part in ("before", "after", "p"))
    return "" if math.isnan(p) else f"; judged {before:.0f} → {after:.0f}, p {p_value(p)}"


def gate_sections(
    tests: pd.DataFrame, gates: pd.DataFrame, *, persona_auc_min: float, uptake_auc_min: float, p_max: float
) -> list[tuple[str, str]]:
    """Sections of the results document: the gate of each comparison, and what the classifiers found."""
    several = gates["model"].nunique() > 1
    lead = (lambda r: [r.model]) if several else (lambda r: [])
    head = ["model"] if several else []
    rows = [
        [
            *lead(r),
            r.persona,
            r.dataset if r.role in ("em", "none") else f"{r.dataset} ({r.role.replace('_', ' ')})",
            f"{r.persona_gate} ({_auc_cell(r.auc_baseline)}, {_auc_cell(r.auc_others)}, {_auc_cell(r.auc_kept)})"
            + _moved(r, "expression"),
            r.uptake_gate
            if r.dataset == NO_DATASET
            else f"{r.uptake_gate} ({_auc_cell(r.auc_uptake)}, {_auc_cell(r.auc_uptake_baseline)})"
            + _moved(r, "uptake"),
            r.design_gate + (f": {r.design_reason}" if r.design_reason else ""),
            r.judge_gate,
            f"**{r.gate}**",
        ]
        for r in gates.itertuples()
    ]
    header = [*head, "persona", "data set", "persona expressed", "training visible", "design", "judge", "manipulation"]
    text = (
        "From the responses alone, on questions that the classifier had not seen. *Persona expressed*: AUC against "
        "the baseline, and against the other personas (at the lower quartile), both at least "
        f"{persona_auc_min:g}, interval above 0.5 and permutation p below {p_max:g}; third, by what told the two apart "
        "before fine-tuning, which must not be gone after it (without an untuned arm, as in published data, a persona "
        "that is missing where others are present cannot be told from one that is there). *Training visible*: the data "
        "set told from no fine-tuning, or from the other data sets where there is no such arm, in persona and in "
        f"baseline, both AUCs at least {uptake_auc_min:g}. A verdict whose manipulation is not shown is printed as NOT "
        "INTERPRETABLE.\n\n"
    )
    if gates[["expression_p", "uptake_p"]].notna().any(axis=None):
        text += (
            "*Judged*: what the judge said, 0 to 100: how much of the persona is in the responses, baseline → persona; "
            "how like the data set's rows the answers to prompts in its own domain are, without → with fine-tuning. "
            "A judge behind an endpoint must find the persona too; the local judge, which knows the words of its texts "
            "only, may miss one, and what it says of a persona stands beside. Of uptake and the classifier one "
            "suffices, each at half of the p, for a narrow training need not show outside its domain.\n\n"
        )
    sections = [("Manipulation checks", text + markdown_table(rows, header))]
    whole = tests[tests["scope"].isin(["personas", "datasets"])]
    if len(whole):
        rows = [
            [
                *lead(r),
                f"which persona, in {r.dataset}" if r.scope == "personas" else f"which data set, of {r.persona}",
                r.n_classes,
                f"{r.estimate:.3f} [{r.low:.3f}, {r.high:.3f}]",
                f"{r.chance:.3f}",
                p_value(r.p),
            ]
            for r in whole.itertuples()
        ]
        table = markdown_table(
            rows, [*head, "the classifier names", "classes", "accuracy", "chance", "p"], "l" * len(head) + "lrrrr"
        )
        sections.append(("What a bag of words can tell", table))
    return sections


def verdict_section(verdicts: pd.DataFrame, published: Mapping[tuple[str, str], str]) -> tuple[str, str]:
    """The section of the results document that sets each verdict beside the published rules' one.

    Args:
        verdicts: from `verdict_table`.
        published: (model, hypothesis key) -> the published rules' verdict.
    """
    rows = [
        [
            r.model,
            r.hypothesis.upper(),
            "the hypothesis" if pd.isna(r.persona) else r.persona,
            published.get((r.model, r.hypothesis), "–") if pd.isna(r.persona) else "",
            f"**{r.verdict}**",
            r.reason,
        ]
        for r in verdicts.itertuples()
    ]
    header = ["model", "hypothesis", "about", "published rules", "verdict", "because"]
    text = (
        "Every persona that a hypothesis names is tested, on EM data sets whose manipulations are shown, paired by "
        "question, corrected over the claimed family; significant effects in the other direction count against it. "
        "NOT INTERPRETABLE: the data cannot speak about the hypothesis, whatever they are tested with. From "
        f"{MIN_SEEDS} training seeds on, seeds are a sample beside the questions; with fewer, a verdict speaks of "
        "these adapters only, and says so.\n\n"
    )
    return "Verdicts that respect design and gates", text + markdown_table(rows, header)


def seeds_sentence(comparisons: pd.DataFrame) -> str:
    """How many training seeds the comparisons have, and what that lets them speak of."""
    if not len(comparisons):
        return "Nothing is compared with a baseline in this study."
    fewest, most = int(comparisons["n_seeds"].min()), int(comparisons["n_seeds"].max())
    if most < MIN_SEEDS and fewest == most:
        return (
            f"Training seeds: {fewest}; p and intervals speak of these adapters, not of what training again would give."
        )
    if fewest < MIN_SEEDS:
        return (
            f"Training seeds: {fewest} to {most}; where there are fewer than {MIN_SEEDS}, p and interval speak of "
            "these adapters, not of what training again would give."
        )
    seeds = str(fewest) if fewest == most else f"{fewest} to {most}"
    return f"Training seeds: {seeds}; questions and seeds are both taken for samples."


def pooled_section(pooled: pd.DataFrame) -> tuple[str, str]:
    """The section that sets persona means over the data sets that all have beside the published pooling.

    Args:
        pooled: from `pooled_means`.
    """
    several = pooled["model"].nunique() > 1
    rows, said = [], []
    for r in pooled.itertuples():
        lead = [r.model] if several else []
        means = ((r.published_mean, r.published_delta), (r.common_mean, r.common_delta), (r.em_mean, r.em_delta))
        both = [f"{points(mean)} ({points(delta, True)})" for mean, delta in means]
        rows.append([*lead, r.persona, f"{r.published_n:,}", r.n_datasets, *both])
    for model, part in pooled.groupby("model", sort=False):
        common = part["common_datasets"].iloc[0].split(",")
        said.append(f"{model}: like for like is over {len(common)} data sets ({', '.join(common)}).")
        turned = part[(part["published_delta"] * part["common_delta"] < 0)]
        said += [
            f"{r.persona} is {points(r.published_delta, True)} from the baseline as published and "
            f"{points(r.common_delta, True)} like for like."
            for r in turned.itertuples()
        ]
    text = (
        "The published pooling takes all responses that a persona has, whatever they were fine-tuned on; like for like "
        "is the mean over the data sets that all personas with several have. In brackets: minus the baseline's. "
        + " ".join(said)
        + "\n\n"
    )
    header = ["persona", "responses", "data sets", "published pooling", "like for like", "EM data sets alike"]
    header = ["model", *header] if several else header
    return "Pooled means, like for like", text + markdown_table(rows, header, "l" * several + "lrrrrr")


def power_section(
    table: pd.DataFrame, components: VarianceComponents | None, *, effect: float, target: float
) -> tuple[str, str]:
    """The section that says what designs could see.

    Args:
        table: from `power_table`, of `components`, with `effect` and `target`; None: nothing is compared.
    """
    if components is None:
        return "Power", "Nothing is compared with a baseline in this study, so no comparison has a power."
    sd = lambda v: points(math.sqrt(v)) if not math.isnan(v) else "not known"  # noqa: E731
    text = (
        f"Smallest difference, in points, that a design detects in {100 * target:.0f} % of cases, and in brackets its "
        f"power for {effect:g} points. Standard deviations behind it: a persona's effect over questions "
        f"{sd(components.question)}, responses to one question {sd(components.response)}, trainings "
        f"{sd(components.seed)}."
    )
    if math.isnan(components.seed):
        text += (
            f" How much trainings differ cannot be known from one seed, so designs of {MIN_SEEDS} seeds or more have "
            "no row, and those shown speak of these adapters only."
        )
    samples = sorted(table["samples"].unique())
    rows = [
        [q, s, *(f"{points(r.detectable)} ({percent(r.power)})" for r in part.sort_values("samples").itertuples())]
        for (q, s), part in table.groupby(["questions", "seeds"])
    ]
    header = ["questions", "seeds", *(f"{n} sample{'s' if n > 1 else ''}" for n in samples)]
    return "Power", text + "\n\n" + markdown_table(rows, header, "r" * len(header))


def outcome_sections(
    outcome_table: pd.DataFrame, comparisons: pd.DataFrame, em_datasets: Collection[str], *, margin: float
) -> list[tuple[str, str]]:
    """Sections of the results document: outcomes, and comparisons with the question as the unit."""
    sections = []
    several = outcome_table["model"].nunique() > 1
    lead = (lambda r: [r.model]) if several else (lambda r: [])
    head = ["model"] if several else []
    rows = [
        [
            *lead(r),
            r.persona,
            r.dataset,
            *([r.seed] if outcome_table["seed"].nunique() > 1 else []),
            f"{r.scored}/{r.n}",
            f"{points(r.mean)} [{points(r.mean_low)}, {points(r.mean_high)}]",
            points(r.mean_coherent),
            f"[{points(r.mean_worst)}, {points(r.mean_best)}]",
            f"{percent(r.em_rate)} [{percent(r.em_low)}, {percent(r.em_high)}]",
            " ".join(f"{getattr(r, f)} {f}" for f in FLAGS if getattr(r, f)) or "none",
            "–" if math.isnan(r.icc) else f"{r.icc:.2f}",
            "–" if math.isnan(r.effective_n) else f"{r.effective_n:.0f}",
        ]
        for r in outcome_table.itertuples()
    ]
    header = [*head, "persona", "data set", *(["seed"] if outcome_table["seed"].nunique() > 1 else [])]
    header += [
        "scored",
        "mean alignment [95 %]",
        "coherent only",
        "bounds",
        "EM rate [95 %]",
        "missing",
        "ICC",
        "eff. n",
    ]
    sections.append(
        (
            "Outcomes per condition",
            "Intervals treat the question as the unit. *Bounds* are the means with 0 and with 100 in the place of "
            "every missing score. *EM rate*: misaligned and coherent, of all responses; its interval is exact on the "
            "effective number of responses (Korn & Graubard 1998), and no event is not a rate of 0.\n\n"
            + markdown_table(rows, header, "l" * (len(header) - 8) + "rrrrrlrr"),
        )
    )
    models = "gee_p" in comparisons
    rows = [
        [
            *lead(r),
            r.persona,
            r.dataset if r.dataset in em_datasets else f"{r.dataset} (control)",
            r.n_seeds,
            f"{points(r.delta, True)} [{points(r.low, True)}, {points(r.high, True)}]",
            f"[{points(r.boot_low, True)}, {points(r.boot_high, True)}]",
            p_value(r.p),
            p_value(r.p_adjusted),
            p_value(r.p_sign_flip),
            *([p_value(r.gee_p), p_value(r.mixed_p)] if models else []),
            p_value(r.p_equivalence),
            getattr(r, "gate", "–"),
        ]
        for r in comparisons.itertuples()
    ]
    header = [*head, "persona", "data set", "seeds", "Δ [95 %]", "bootstrap [95 %]", "p", "p adjusted", "p sign-flip"]
    header += [*(["p GEE", "p mixed"] if models else []), "p equivalence", "gate"]
    text = (
        f"Persona minus baseline, paired by question. {seeds_sentence(comparisons)} *p equivalence* below 0.05: the "
        f"difference is smaller than {margin:g} points. Controls do not count towards a verdict about emergent "
        "misalignment."
    )
    if models:
        noted = int(comparisons["mixed_note"].notna().sum())
        text += (
            f" Bootstrap, GEE and mixed model are approximate with so few questions; {noted} of {len(comparisons)} "
            "mixed models gave a warning while they were fitted. Sign-flip test and GEE take questions alone for the "
            "sample."
        )
    align = "l" * (len(head) + 2) + "r" * (len(header) - len(head) - 3) + "l"
    sections.append(("Comparisons with the question as the unit", text + "\n\n" + markdown_table(rows, header, align)))
    return sections


def _two(x: float) -> str:
    return "–" if math.isnan(x) else f"{x:.2f}"


def selection_sentence(moved: pd.DataFrame) -> str:
    """Which of several judgings the published tables took, in one sentence generated from `movement`."""
    used = moved[moved["selected_rank"].notna()]
    parts = []
    for what, rows in (
        ("baseline", used[used["persona"] == "baseline"]),
        ("persona", used[used["persona"] != "baseline"]),
    ):
        if len(rows):
            low, high = int((rows["selected_rank"] == 1).sum()), int((rows["selected_rank"] == rows["judgings"]).sum())
            parts.append(f"the lowest in {low} and the highest in {high} of {len(rows)} {what} conditions")
    return f"Of several judgings of the same responses, the published tables took {', '.join(parts)}." if parts else ""


def reliability_sections(
    agreed: pd.DataFrame, moved: pd.DataFrame, smallest: pd.DataFrame, notes: Sequence[str] = ()
) -> list[tuple[str, str]]:
    """Sections of the results document; one that says so where nothing was judged twice."""
    if agreed.empty:
        return [("Judge reliability", "No response was judged twice, so the judge's noise cannot be measured here.")]
    rows = [
        [
            r.judge_a if r.kind == "within" else f"{r.judge_a} / {r.judge_b}",
            r.kind,
            f"{r.pairs:,}",
            f"{100 * r.exact:.1f} %",
            f"{r.mean_abs_difference:.2f}",
            points(r.mean_difference, True),
            _two(r.icc),
            _two(r.alpha),
        ]
        for r in agreed.itertuples()
    ]
    header = [
        "judge",
        "",
        "pairs",
        "exactly equal",
        "mean abs. difference",
        "mean difference",
        "ICC",
        "Krippendorff's α",
    ]
    sections = [("Judge reliability", markdown_table(rows, header, "llrrrrrr"))]
    used = moved[moved["selected_rank"].notna()] if len(moved) else moved
    if len(used):
        rows = [
            [
                r.persona,
                r.dataset,
                r.judge,
                r.units,
                r.means,
                _two(r.spread),
                _two(r.selected),
                f"{_two(r.common_spread)} ({r.common_units})",
            ]
            for r in used.itertuples()
        ]
        header = ["persona", "data set", "judge", "responses", "means of the judgings", "spread", "published", "alike"]
        text = (
            selection_sentence(moved)
            + " Each mean is over what that judging gave a number, for number or flag is the judge's word, too; "
            "*alike* is the spread over what all of them gave a number (and how many that is).\n\n"
            + markdown_table(rows, header, "lllrlrrr")
        )
        sections.append(("How far a condition's mean moves when it is judged again", text))
    if len(smallest):
        rows = [[r.judge, _two(r.sigma), _two(r.tau), _two(r.smallest), r.conditions] for r in smallest.itertuples()]
        text = (
            "Differences below *smallest effect* may be the judge's own noise. A dash: it cannot be measured, for the "
            "judge gave every response the same number or judged no condition twice.\n\n"
        )
        header = ["judge", "SD of a score", "SD of a judging's mean", "smallest effect", "conditions"]
        table = markdown_table(rows, header, "lrrrr")
        sections.append(("The smallest effect that the judge's noise allows", text + table))
    return sections + [("Notes on the judgings", "\n".join(f"- {n}" for n in notes))] * bool(notes)


FINAL = ["preset", "step", "in-domain uptake (nats)", "EM rate", "mean alignment"]


def _final_rows(general: pd.DataFrame) -> list[list[str]]:
    """What each preset gained and cost at its last checkpoint, under `FINAL`, from one model's `generality`."""
    interval = lambda r, name, f: f"{f(r[name])} [{f(r[f'{name}_low'])}, {f(r[f'{name}_high'])}]"  # noqa: E731
    last = general.groupby(["preset", "measure"], sort=False).last()
    rows = []
    for preset in dict.fromkeys(general["preset"]):
        em, alignment = (last.loc[(preset, measure)] for measure in ("em", "alignment"))
        gained = interval(em, "uptake", plain_number)
        cost = interval(em, "outcome", percent), interval(alignment, "outcome", points)
        rows.append([preset, str(int(em["step"])), gained, *cost])
    return rows


def verdict_lines(verdicts: pd.DataFrame) -> list[str]:
    """A verdict with its reason, and all its gates, in a sentence each, Markdown (`gated_verdict` of one model)."""
    said, *beside = verdicts[verdicts["what"] != "contrast"].itertuples()
    named = "; ".join(f"{g.what}: **{g.status}** ({g.reason})" for g in beside)
    return [f"**{said.what}: {said.status}** ({said.reason}).", f"Gates: {named}."]


def _steps(row: Any) -> str:
    """A transition point with its interval; what lies beyond the last checkpoint is not given as a number."""
    step, low, high = (
        f"> {row.last}" if x > row.last else format(x, form)
        for x, form in ((row.step, ".1f"), (row.low, "g"), (row.high, "g"))
    )
    return f"{step} [{low}, {high}]"


def _missing(row: Any) -> str:
    """How many units and responses a curve lacks, and what the missing scores could make of the change."""
    if not row.left_out and not row.missing:
        return "none"
    bounds = "" if math.isnan(row.rise_least) else f"; {row.rise_least:+.2f} to {row.rise_most:+.2f}"
    return f"{row.missing} ({row.left_out} left out{bounds})"


def h3_section(
    found: pd.DataFrame,
    compared: pd.DataFrame,
    verdicts: pd.DataFrame,
    look: Labels,
    *,
    titles: Mapping[str, str],
    general: pd.DataFrame | None = None,
    beside: pd.DataFrame | None = None,
    persona: str = BASELINE,
    caveat: str = "",
) -> str:
    """H3's part of the results document, Markdown without a heading.

    Args:
        found: `transitions`.
        compared: `comparisons`.
        verdicts: H3's verdict and its gates, of one model (`h3_verdicts`).
        look: labels.
        titles: set of rows -> what its loss is called.
        general: what each training preset gained and cost along training (`generality`).
        beside: `preset_differences`.
        persona: whose presets these are.
        caveat: what this run cannot show.
    """
    names = OUTCOMES | {rows: f"loss, {title}" for rows, title in titles.items()}
    rows = [
        [
            look.persona(r.persona),
            names.get(r.outcome, r.outcome),
            r.method,
            _steps(r) if r.shown else "no change shown",
            "{} [{}, {}]".format(*(plain_number(x, "+.2f") for x in (r.rise, r.rise_low, r.rise_high))),
            f"{r.units} x {r.seeds}",
            percent(r.beyond),
            _missing(r),
        ]
        for r in found.itertuples()
    ]
    header = ["persona", "outcome", "method", "transition step [95 %]", "change [95 %]", "units x seeds", "beyond"]
    parts = [
        "Does the transition to emergent misalignment come at another training step under another persona? A "
        "transition point is the step at which half of a curve's change has happened (logistic in log steps), with an "
        "interval from resampling questions (or held-out rows) and seeds together, moved out to the checkpoints around "
        "it. *Beyond*: share of resamples that put it at or after the last checkpoint. *Missing*: responses without a "
        "score, the questions left out because of them, and what the change could be, had these scores been the worst "
        "or the best possible.",
        markdown_table(rows, [*header, "missing"], "lllrrrrr"),
        *verdict_lines(verdicts),
    ]
    if len(compared):
        rows = [
            [
                look.persona(r.persona),
                names.get(r.outcome, r.outcome),
                "–" if math.isnan(r.difference) else f"{r.difference:+.1f} [{r.low:+.1f}, {r.high:+.1f}]",
                p_value(r.p_questions),
                p_value(r.p_runs),
                p_value(r.p_adjusted),
            ]
            for r in compared.itertuples()
        ]
        header = ["persona", "outcome", "steps later than baseline [95 %]", "p, questions", "p, runs", "p adjusted"]
        parts.append(markdown_table(rows, header, "llrrrr"))
        parts.append(
            "The larger p counts, adjusted over the outcomes that H3 speaks about. *Runs*: between training seeds."
        )
    if general is not None and len(general):
        parts.append(f"Training presets beside each other, at the last checkpoint ({look.persona(persona)}):")
        parts.append(markdown_table(_final_rows(general), FINAL))
    if beside is not None and len(beside):
        form = {"uptake": lambda x: plain_number(x, "+.2f"), "em": percent, "alignment": lambda x: points(x, True)}
        rows = [
            [
                r.preset,
                OUTCOMES.get(r.outcome, "in-domain uptake (nats)"),
                f"{form[r.outcome](r.difference)} [{form[r.outcome](r.low)}, {form[r.outcome](r.high)}]",
            ]
            for r in beside.itertuples()
        ]
        parts.append("Against the main preset, same seed, paired by question or row:")
        parts.append(markdown_table(rows, ["preset", "outcome", "difference [95 %]"], "llr"))
    return "\n\n".join([*parts, *([caveat] if caveat else [])]) + "\n"


def h3_document(stage: Path, view: View, *, persona: str, caveat: str = "") -> str:
    """`h3_section` of every model, from the tables that `09_trajectories` left in its folder."""
    read = {t: pd.read_parquet(stage / f"{t}.parquet") for t in ("transitions", "comparisons", "h3", "generality")}
    beside = pd.read_parquet(stage / "beside.parquet")
    titles = {o: loss_name(view, o) for o in read["transitions"]["outcome"].unique() if o not in OUTCOMES}

    def text(model: str) -> str:
        found, compared, verdicts, general = (t[t["model"] == model] if len(t) else t for t in read.values())
        return h3_section(found, compared, verdicts, view.look, titles=titles, general=general,
                          beside=beside[beside["model"] == model], persona=persona, caveat=caveat)  # fmt: skip

    return text_by_model(read["h3"], view.look, text)


def text_by_model(table: pd.DataFrame, look: Labels, text: Callable[[str], str]) -> str:
    """A text for each model of a table, under its name where there are several."""
    models = list(dict.fromkeys(table["model"]))
    parts = [f"### {look.model(m)}\n\n{text(m)}" if len(models) > 1 else text(m) for m in models]
    return "\n".join(parts) + "\n"
