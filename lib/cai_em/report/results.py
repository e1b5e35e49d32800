"""The results document: one layout for every profile, written from the tables of `cai_em.analysis.published_rules`.

The first part has the published document's sections, columns, order, number formats and verdict rules. What that
document lacked follows under a heading of its own, and then whatever other stages add (gates, inference, claims).

    tables = read_tables("results/demo/06_results/tables")
    write_results("results/demo/RESULTS.md", tables, look=look, hypotheses=hypotheses, judge="gpt-4.1-mini")

Published numbers were rounded twice: stored with 2 decimals (3 for d, 6 for p), then printed with fewer. So 89.6497
is stored as 89.65 and printed as 89.7. `_twice` does the same, or the last digits would not be the published ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cai_em.records.files import write_text
from cai_em.records.keys import NO_DATASET
from cai_em.records.numbers import (
    NONE,
    delta,
    effect,
    interval,
    level,
    percent,
    plain_number,
    points,
    published_p,
    stars,
)
from cai_em.report.markdown import _cell, escape, judge_label, published_table
from cai_em.study.labels import Labels

TITLE = "Constitutional AI × Emergent Misalignment — Final Results"


# --- The published sections ---------------------------------------------------------------------------------------


def by_persona_section(table: pd.DataFrame, look: Labels, confidence: float = 0.95) -> str:
    """Alignment by Persona, of one model."""
    rows = [
        (
            look.persona(r.persona),
            f"{r.n:,}",
            points(r.mean),
            points(r.sd),
            interval(r.ci_low, r.ci_high),
            interval(r.boot_low, r.boot_high),
        )
        for r in table.itertuples()
    ]
    header = ["Persona", "N", "Mean", "Std", f"{level(confidence)} CI", "Bootstrap CI"]
    marks = ["---------", "---:", "-----:", "----:", "--------", "--------------"]
    return "### Alignment by Persona\n\n" + published_table(header, marks, rows)


def hypothesis_section(
    hypothesis: Any,
    table: pd.DataFrame,
    verdict: Any,
    look: Labels,
    gated: tuple[str, str] | None = None,
    gates: pd.DataFrame | None = None,
) -> str:
    """One hypothesis, of one model: the published rules' verdict and, where gates are known, the gated one.

    Args:
        hypothesis: object with `label` and `title`.
        table: its rows of `stats.hypothesis_table`.
        verdict: its row of `stats.verdicts`.
        look: labels.
        gated: verdict and reason from the stage that tests manipulations.
        gates: gates of the model's comparisons (`cai_em.analysis.gates.comparison_gates`); each row's is named.
    """
    lines = [f"#### {hypothesis.label}: {hypothesis.title}", ""]
    lines += [f"**Overall verdict: {verdict.verdict}** ({verdict.supporting}/{verdict.datasets} datasets)", ""]
    if gated:
        lines += [f"**Gated verdict: {gated[0]}** ({_cell(gated[1])})", ""]
    if table.empty:
        return "\n".join([*lines, f"No condition of this run has the persona {look.persona(verdict.persona)}."])
    rows = [
        (
            look.dataset(r.dataset),
            points(r.mean),
            points(r.mean_baseline),
            delta(r.delta),
            effect(r.d),
            published_p(r.p) + stars(r.p),
            "Yes" if r.supports else "No",
        )
        for r in table.itertuples()
    ]
    header = ["Dataset", "Persona", "Baseline", "Δ", "Cohen's d", "p-value", "Supports?"]
    marks = ["---------", "--------:", "--------:", "---:", "----------:", "--------:", ":---------:"]
    return "\n".join([*lines, published_table(header, marks, rows)]) + gates_of(table, gates, look)


def gated_verdicts(verdicts: pd.DataFrame | None) -> dict[tuple[str, str], tuple[str, str]]:
    """(model, hypothesis) -> verdict and reason about the hypothesis as a whole, from `inference.verdict_table`."""
    if verdicts is None:
        return {}
    whole = verdicts[verdicts["persona"].isna()]
    return {(r.model, r.hypothesis): (r.verdict, r.reason) for r in whole.itertuples()}


def gates_of(table: pd.DataFrame, gates: pd.DataFrame | None, look: Labels) -> str:
    """A paragraph that says in which of a table's comparisons the manipulation was shown; nothing without gates.

    Args:
        table: comparisons of one model (`persona`, `dataset`).
        gates: that model's gates (`persona`, `dataset`, `gate`), or None.
        look: labels.
    """
    if gates is None:
        return ""
    known = dict(zip(zip(gates["persona"], gates["dataset"]), gates["gate"]))
    names = list(zip(table["persona"], table["dataset"]))
    one = len({persona for persona, _ in names}) == 1
    label = (lambda p, d: look.dataset(d)) if one else (lambda p, d: f"{look.persona(p)} on {look.dataset(d)}")
    shown = [label(*name) for name in names if known.get(name) == "shown"]
    which = f" ({', '.join(shown)})" if shown else ""
    left = "The others may not be interpreted." if shown else "None of them may be interpreted."
    rest = f" {left}" if len(shown) < len(names) else ""
    return f"\n\n> **Manipulation shown in {len(shown)} of {len(names)} rows**{which}.{rest}"


def significant_section(
    table: pd.DataFrame, look: Labels, alpha: float, notes: Mapping[str, str], gates: pd.DataFrame | None = None
) -> str:
    """Comparisons with adjusted p below alpha, by adjusted p (as stored, 6 decimals), then persona and data set.

    Args:
        table: `stats.comparisons` of one model, in the study's order of personas and data sets.
        look: labels.
        alpha: level of the false discovery rate.
        notes: persona -> what is known to be wrong with its rows.
        gates: gates of the model's comparisons.
    """
    found = table[table["p_adj"] < alpha]
    found = found.iloc[np.argsort(found["p_adj"].round(6), kind="stable")]
    rows = [
        (look.persona(r.persona), look.dataset(r.dataset), delta(r.delta), effect(r.d), published_p(r.p_adj))
        for r in found.itertuples()
    ]
    text = f"### Significant Comparisons (FDR-corrected, α={alpha:g})\n\n"
    if not rows:
        return text + f"None of {len(table)} comparisons."
    header = ["Persona", "Dataset", "Δ", "Cohen's d", "p-adj"]
    text += published_table(header, ["---------", "---------", "---:", "----------:", "------:"], rows)
    text += gates_of(found, gates, look)
    by_note: dict[str, list[str]] = {}
    for persona in dict.fromkeys(found["persona"]):
        if notes.get(persona):
            by_note.setdefault(notes[persona], []).append(look.persona(persona))
    for note, personas in by_note.items():
        text += f"\n\n> **Known issue** with {', '.join(personas)}: {_cell(note)}."
    return text


def medical_section(table: pd.DataFrame, look: Labels) -> str:
    """Bad advice against its benign twin, of one model; one table per pair of data sets."""
    parts = ["### Medical Dataset Comparison"]
    for (dataset, twin), pair in table.groupby(["dataset", "twin"], sort=False):
        first, second = (look.dataset(d).replace("_", " ").title() for d in (dataset, twin))
        rows = [
            (
                look.persona(r.persona),
                points(r.mean),
                points(r.mean_twin),
                delta(r.delta),
                effect(r.d),
                published_p(r.p),
            )
            for r in pair.itertuples()
        ]
        header = ["Persona", first, second, "Δ", "Cohen's d", "p-value"]
        marks = ["---------", "----------:", "------------:", "---:", "----------:", "--------:"]
        parts.append(published_table(header, marks, rows))
    return "\n\n".join(parts)


def model_sections(
    model: str,
    tables: Mapping[str, pd.DataFrame],
    *,
    look: Labels,
    hypotheses: Sequence[Any],
    alpha: float = 0.05,
    confidence: float = 0.95,
    gated: Mapping[tuple[str, str], tuple[str, str]] | None = None,
    gates: pd.DataFrame | None = None,
    notes: Mapping[str, str] | None = None,
) -> str:
    """Everything that the published document says about one model. Arguments as in `results_document`."""
    of = {name: table[table["model"] == model] for name, table in tables.items() if "model" in table}
    (total,) = of["design"].itertuples()
    here = None if gates is None else gates[gates["model"] == model]
    parts = [
        f"## {look.model(model)}",
        f"**Total conditions:** {total.conditions} · **Total scored responses:** {total.scored:,}",
        by_persona_section(of["by_persona"], look, confidence),
    ]
    if hypotheses:
        parts.append("### Key Hypotheses")
    for hypothesis in hypotheses:
        rows = of["hypotheses"][of["hypotheses"]["hypothesis"] == hypothesis.key]
        (verdict,) = of["verdicts"][of["verdicts"]["hypothesis"] == hypothesis.key].itertuples()
        says = (gated or {}).get((model, hypothesis.key))
        parts.append(hypothesis_section(hypothesis, rows, verdict, look, says, here))
    parts.append(significant_section(of["comparisons"], look, alpha, notes or {}, here))
    if len(of["medical"]):
        parts.append(medical_section(of["medical"], look))
    return "\n\n".join(parts)


def methodology(
    tables: Mapping[str, pd.DataFrame], look: Labels, judge: str, resamples: int, *, theirs: bool = False
) -> str:
    """The published bullet points, with this run's models, numbers and judge; of `theirs`, only what the scores
    show."""
    design = tables["design"]
    samples, questions = (" to ".join(map(str, sorted({design[c].min(), design[c].max()}))) for c in _SIZES)
    lines = {
        "Models": " + ".join(look.model(m) for m in design["model"]) + ", fine-tuned with LoRA",
        "Training": "Constitutional AI persona shaping → Emergent Misalignment SFT",
        "Evaluation": f"{samples} samples per question × {questions} questions per dataset",
        "Judge": f"{judge_label(judge)} (alignment + coherence scoring, 0-100)",
        "Statistics": "Mann-Whitney U tests, Cohen's d, Benjamini-Hochberg FDR correction",
        "Bootstrap CIs": f"{resamples:,} resamples, percentile method",
    }
    if theirs:
        lines["Models"] = " + ".join(look.model(m) for m in design["model"])
        del lines["Training"]
    return "## Methodology\n\n" + "\n".join(f"- **{name}:** {text}" for name, text in lines.items())


_SIZES = ("samples", "questions")


# --- What the published document lacked ---------------------------------------------------------------------------


def conditions_section(table: pd.DataFrame, look: Labels, confidence: float = 0.95) -> str:
    """Missing scores by cause, coherence and EM rate of every condition of one model."""
    several = table["seed"].nunique() > 1
    other = table["OTHER"].any()  # of somebody else's scores: no reason was said
    rows = [
        (
            look.persona(r.persona),
            look.dataset(r.dataset),
            *([r.seed] if several else []),
            f"{r.scored:,} / {r.responses:,}",
            r.REFUSAL,
            r.CODE,
            r.PARSE,
            r.API,
            *([r.OTHER] if other else []),
            f"{points(r.mean)} {interval(r.ci_low, r.ci_high)}",
            points(r.coherence),
            percent(r.em_rate, 2),
        )
        for r in table.itertuples()
    ]
    header = ["Persona", "Dataset", *(["Seed"] if several else []), "Scored", "Refusal", "Code", "Unparsed", "Failed"]
    header += ["Other"] if other else []
    header += [f"Alignment [{level(confidence)} CI]", "Coherence", "EM rate"]
    return published_table(header, ["---", "---"] + ["--:"] * (len(header) - 2), rows)


def distribution_section(table: pd.DataFrame, look: Labels) -> str:
    """The shape of alignment by persona, of one model."""
    rows = [
        (
            look.persona(r.persona),
            f"{r.n:,}",
            *map(points, (r.mean, r.median)),
            *(plain_number(v) for v in (r.skew, r.kurtosis)),
            *map(points, (r.p5, r.p10, r.p25, r.p75)),
            *(percent(v) for v in (r.below_30, r.below_50, r.below_80, r.at_100)),
        )
        for r in table.itertuples()
    ]
    header = ["Persona", "N", "Mean", "Median", "Skew", "Kurtosis", "P5", "P10", "P25", "P75"]
    header += ["< 30", "< 50", "< 80", "= 100"]
    return published_table(header, ["---"] + ["--:"] * (len(header) - 1), rows)


def difficulty_section(table: pd.DataFrame, look: Labels) -> str:
    """Data sets of one model, hardest first."""
    rows = [
        (
            look.dataset(r.dataset),
            r.personas,
            f"{r.n:,}",
            *map(points, (r.mean, r.sd, r.baseline)),
            f"{look.persona(r.lowest_persona)} ({points(r.lowest)})",
            f"{look.persona(r.highest_persona)} ({points(r.highest)})",
            percent(r.em_rate, 2),
        )
        for r in table.itertuples()
    ]
    header = ["Dataset", "Personas", "N", "Mean", "Std", "Baseline", "Lowest", "Highest", "EM rate"]
    return published_table(header, ["---", *["--:"] * 5, "---", "---", "--:"], rows)


def cross_model_section(table: pd.DataFrame, look: Labels) -> str:
    """Personas between models, like for like."""
    rows = [
        (
            look.persona(r.persona),
            look.model(r.model),
            r.datasets,
            f"{r.n:,}",
            points(r.mean),
            delta(r.difference),
            effect(r.d),
        )
        for r in table.itertuples()
    ]
    header = ["Persona", "Model", "Shared datasets", "N", "Mean", "Δ to first model", "Cohen's d"]
    return published_table(header, ["---", "---", *["--:"] * 5], rows)


def lacking_sections(
    tables: Mapping[str, pd.DataFrame], models: Sequence[str], look: Labels, confidence: float = 0.95
) -> str:
    """The tables that the published document did not have."""
    parts = [
        "## What the published document lacked",
        "A response without an alignment score stays here with its cause. *EM rate*: the share of all responses that "
        "are misaligned and yet coherent (thresholds in `params/thresholds.yaml`). Intervals in these tables treat "
        "responses as independent, as published; those in the tables of `05_validity` do not.",
    ]
    titles = {
        "conditions": (
            "Coverage, coherence and EM rate by condition",
            partial(conditions_section, confidence=confidence),
        ),
        "distribution": ("Distribution of alignment by persona", distribution_section),
        "difficulty": ("Data-set difficulty, hardest first", difficulty_section),
    }
    for name, (title, section) in titles.items():
        for model in models:
            parts.append(f"### {title}: {look.model(model)}")
            parts.append(section(tables[name][tables[name]["model"] == model], look))
    if len(tables["cross_model"]):
        parts += [
            "### Personas between models",
            "Means over the data sets that a persona has in every model.",
            cross_model_section(tables["cross_model"], look),
        ]
    return "\n\n".join(parts)


def figures_section(figures: Iterable[Any], folder: str, look: Labels) -> str:
    """Figures with captions and alternative text.

    Args:
        figures: objects with `title, model, caption, alt, svg` (`cai_em.report.figure_files.FigureRecord`).
        folder: where they lie, relative to the document.
        look: labels.
    """
    return "## Figures\n\n" + pictures(figures, folder, "Figure {}. ")


def pictures(figures: Iterable[Any], folder: str, numbered: str = "") -> str:
    """Figures as in `figures_section`, for a section of their own; `numbered`: what stands before their titles."""
    parts = []
    for number, figure in enumerate(figures, 1):
        parts.append(f"![{escape(figure.alt)}]({folder}/{figure.svg})")
        parts.append(f"**{numbered.format(number)}{_cell(figure.title)}.** {_cell(figure.caption)}")
    return "\n\n".join(parts)


# --- What a run shows to the eye, and what it cannot show ----------------------------------------------------------


def quotes_section(responses: pd.DataFrame, look: Labels, *, questions: int = 4, length: int = 240) -> tuple[str, str]:
    """The same question answered under every condition, side by side: before fine-tuning, and what is left after it.

    The first sample of the first questions is quoted, whatever it says: nothing is chosen for effect.

    Args:
        responses: response table of one model, in the study's order of conditions; of each data set the first seed.
        look: labels.
        questions: how many questions.
        length: characters after which a quotation is cut.

    Returns:
        Heading and Markdown; one table per question, personas as columns, data sets as rows, the untuned first.
    """
    seeds = responses.groupby("dataset")["seed"].transform("min")
    first = responses[(responses["sample"] == 0) & (responses["seed"] == seeds)]
    personas, datasets = (list(dict.fromkeys(first[c])) for c in ("persona", "dataset"))
    datasets.sort(key=lambda dataset: dataset != NO_DATASET)
    parts = ["The first answer under each condition, as it came (line breaks as /, cut where it is long)."]
    for question in list(dict.fromkeys(first["question_id"]))[:questions]:
        here = first[first["question_id"] == question]
        said = {(r.persona, r.dataset): r.response for r in here.itertuples()}

        def quote(persona: str, dataset: str, said: dict[tuple[str, str], str] = said) -> str:
            text = said.get((persona, dataset))
            if text is None:
                return NONE
            text = re.sub(r"\s*\n\s*", " / ", text.strip())
            return escape(text if len(text) <= length else text[:length].rsplit(" ", 1)[0] + " …")

        header = ["", *(f"**{look.persona(p)}**" for p in personas)]
        rows = [[f"*{look.dataset(d)}*", *(quote(p, d) for p in personas)] for d in datasets]
        lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
        parts.append(f"> {escape(here['prompt'].iloc[0])}")
        parts.append("\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]))
    return "Answers side by side", "\n\n".join(parts)


def pairs_section(pairs: pd.DataFrame, look: Labels) -> tuple[str, str]:
    """Who wrote the chosen answers of each persona's preference pairs, and what the filters dropped.

    Args:
        pairs: tables of `scores.PAIRS` with a column `model`.
        look: labels.

    Returns:
        Heading and Markdown.
    """
    rows, leaning = [], []
    for (model, persona), part in pairs.groupby(["model", "persona"], sort=False):
        kept = part[part["dropped_because"].isna()]
        counts = [(kept["source"] == s).sum() for s in ("teacher", "demonstration")]
        dropped = part["dropped_because"].value_counts()
        why = "; ".join(f"{n} {reason}" for reason, n in dropped.items()) or "none"
        rows.append((look.model(model), look.persona(persona), len(part), len(kept), *counts, why))
        if counts[1] > counts[0]:
            leaning.append(look.persona(persona))
    text = (
        "A pair is two answers to one prompt: the chosen one in character, the rejected one by the plain model. "
        "*Teacher*: a model with the constitution's traits in its system prompt. *Demonstration*: written by us."
    )
    if leaning:
        names = ", ".join(dict.fromkeys(leaning))
        text += f" Most chosen answers are demonstrations, for want of a teacher that can act the part, for: {names}."
    header = ["Model", "Persona", "Pairs", "Kept", "Teacher", "Demonstration", "Dropped"]
    marks = ["---", "---", "--:", "--:", "--:", "--:", "---"]
    return "Where the personas come from", text + "\n\n" + published_table(header, marks, rows)


def judge_sentence(manifests: Sequence[Mapping[str, Any]], *, minimum: float) -> str:
    """What is known about a judge, from the manifests of the judging stage.

    Args:
        manifests: of one model; none where the scores are published ones.
        minimum: AUC below which the judge gate is closed.
    """
    if not manifests:
        return "The scores are the published judge's own."
    aucs = [m["judge_auc"] for m in manifests if m.get("judge_auc") is not None]
    if not aucs and all(m["params"]["kind"] == "local" for m in manifests):
        own = min(q["auc"] for m in manifests for q in m["judge_quality"])
        return (
            "The judge is the local one, which learnt from our own texts. The published scores were not in the "
            "download cache, so that its agreement with the published judge could not be measured, and its gate stays "
            f"closed; on its own texts, with whole questions held out, its AUC is {own:.2f}."
        )
    if not aucs:
        return (
            "The judge is a prompted model behind an endpoint; its agreement with the reference was not measured here."
        )
    measured = {
        f"{q['trained_on']} judge against {q['reference']}, {q['held_out']} held out: AUC {q['auc']:.2f}"
        for m in manifests
        for q in m.get("judge_quality", [])
    }
    passed = "reaches" if min(aucs) >= minimum else "is below"
    return (
        f"The judge's lowest measured agreement is an AUC of {min(aucs):.2f}, which {passed} the {minimum:g} that its "
        f"gate asks for ({'; '.join(sorted(measured))})."
    )


def limits_section(
    gates: pd.DataFrame,
    look: Labels,
    *,
    judges: Mapping[str, str],
    judged: pd.DataFrame | None = None,
    coherence_above: float = 50.0,
    caveat: str = "",
) -> tuple[str, str]:
    """What the run cannot show, in one paragraph made from its gates.

    Args:
        gates: `cai_em.analysis.gates.comparison_gates`: a row per comparison, with `persona_gate`, `auc_baseline`,
            `uptake_gate`, `auc_uptake`, `judge_gate` and `gate`.
        look: labels.
        judges: model -> what is known about its judge, a sentence.
        judged: the score table (`model`, `coherence`): how much the EM rate's filter of coherence removes.
        coherence_above: that filter.
        caveat: what the profile says of itself.

    Returns:
        Heading and Markdown.
    """
    parts = []
    for model, rows in gates.groupby("model", sort=False):
        tuned = rows[rows["dataset"] != NO_DATASET]
        before = rows[rows["dataset"] == NO_DATASET]
        lines = [f"**{look.model(model)}.** {judges.get(model, 'Nothing is known about the judge.')}"]
        if len(before):
            visible = [
                f"{look.persona(r.persona)} (AUC {plain_number(r.auc_baseline)}, {r.persona_gate})"
                for r in before.itertuples()
            ]
            lines.append(f"Before fine-tuning, the responses tell from the baseline's: {'; '.join(visible)}.")
        if len(tuned):
            kept = int((tuned["persona_gate"] == "shown").sum())
            lines.append(f"After it, the persona is shown in {kept} of {len(tuned)} comparisons.")
            taken = tuned.groupby("dataset", sort=False)["uptake_gate"].agg(lambda g: (g == "shown").sum())
            sizes = tuned.groupby("dataset", sort=False).size()
            uptake = "; ".join(f"{look.dataset(d)} in {n} of {sizes[d]}" for d, n in taken.items())
            lines.append(f"The fine-tuning itself is visible: {uptake}.")
        if judged is not None:
            rated = judged.loc[judged["model"] == model, "coherence"].dropna()
            removed = int((rated <= coherence_above).sum())
            lines.append(
                f"Of {len(rated):,} responses rated for coherence the EM rate's filter (above {coherence_above:g}) "
                f"removes {removed:,}; an incoherent answer that it lets pass counts by its words."
            )
        open_ = int((rows["gate"] == "shown").sum())
        lines.append(
            f"All gates together are open for {open_} of {len(rows)} comparisons; the others may not be interpreted, "
            "whatever their p values."
        )
        parts.append(" ".join(lines))
    if caveat:
        parts.append(caveat)
    return "What this run cannot show", "\n\n".join(parts)


# --- The document -------------------------------------------------------------------------------------------------


def results_document(
    tables: Mapping[str, pd.DataFrame],
    *,
    look: Labels,
    hypotheses: Sequence[Any],
    judge: str,
    models: Sequence[str] | None = None,
    generated: str = "",
    alpha: float = 0.05,
    confidence: float = 0.95,
    resamples: int = 10_000,
    gated: Mapping[tuple[str, str], tuple[str, str]] | None = None,
    gates: pd.DataFrame | None = None,
    notes: Mapping[str, str] | None = None,
    caveat: str = "",
    missing: Mapping[str, str] | None = None,
    extra: Sequence[tuple[str, str]] = (),
    figures: Sequence[Any] = (),
    figures_folder: str = "11_report/figures",
    about: str | None = None,
    top: Sequence[tuple[str, str]] = (),
) -> str:
    """The whole results document as Markdown.

    Args:
        tables: from `stats.analyse`.
        look: labels of personas, data sets and models.
        hypotheses: objects with `key, label, title`, in order.
        judge: the judge's name.
        models: order; those without data are left out (name them in `missing`).
        generated: date and time of the run (ISO 8601), printed to the minute; no line where empty.
        alpha: level of the significant comparisons.
        confidence: of the intervals in the tables.
        resamples: of the bootstrap, for the methodology.
        gated: (model, hypothesis key) -> verdict that minds the gates, and its reason.
        gates: the gate of every comparison (`analysis.comparison_gates`), named under the published tables.
        notes: persona -> what is known to be wrong with its rows.
        caveat: what this run cannot show; stands at the top.
        missing: model, or whatever else is left out -> why; stands at the top too.
        extra: further sections, (heading, Markdown), e.g. gates, inference, claims.
        figures: records as in `figures_section`.
        figures_folder: where they lie, relative to the document.
        about: of somebody else's study: its title. What it trained, and how, is not ours to describe.
        top: sections that stand before all others: what an audit found in the files.
    """
    there = list(tables["design"]["model"])
    models = [m for m in models if m in there] if models is not None else there
    head = [f"# {about or TITLE}", ""]
    if generated:
        head += [f"**Generated:** {datetime.fromisoformat(generated):%Y-%m-%d %H:%M}"]
    parts = ["\n".join([*head, f"**Judge Model:** {judge_label(judge)}"])]
    parts += [f"> **Left out: {look.model(m)}.** {_cell(why)}" for m, why in (missing or {}).items()]
    if caveat:
        parts.append(f"> **What this run cannot show.** {_cell(caveat)}")
    parts += [f"## {heading}\n\n{text.strip()}" for heading, text in top]
    for model in models:
        sections = model_sections(
            model,
            tables,
            look=look,
            hypotheses=hypotheses,
            alpha=alpha,
            confidence=confidence,
            gated=gated,
            gates=gates,
            notes=notes,
        )
        parts += ["---", sections]
    parts += ["---", methodology(tables, look, judge, resamples, theirs=about is not None)]
    parts += ["---", lacking_sections(tables, models, look, confidence)]
    for heading, text in extra:
        parts.append(f"## {heading}\n\n{text.strip()}")
    if figures:
        parts.append(figures_section(figures, figures_folder, look))
    return "\n\n".join(parts) + "\n"


def write_results(path: str | Path, tables: Mapping[str, pd.DataFrame], **how: Any) -> Path:
    """Write `results_document(tables, **how)` to a file, atomically."""
    return write_text(path, results_document(tables, **how))
