"""The results document: one layout for every profile, written from stored tables by templates.

The answer stands first: question, verdicts with their reasons, what the run cannot show. The published document's
sections follow, with its columns, order, number formats and verdict rules; then what that document lacked, under a
heading of its own, and what other stages found: gates, inference, claims, H3, H4.

    tables = read_tables("results/demo/06_results/tables")
    write_results("results/demo/RESULTS.md", tables, look=look, hypotheses=hypotheses, judge="gpt-4.1-mini")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from cai_em.judge.agreement import LABELLED_REFERENCE
from cai_em.records.files import write_text
from cai_em.records.keys import CONDITION, KEY, NO_DATASET
from cai_em.records.numbers import level
from cai_em.report.glance import Glance, verdicts_said
from cai_em.report.markdown import contents
from cai_em.report.words import Words
from cai_em.study.labels import Labels

CONTENTS = "<!-- contents -->"


def quoted(responses: pd.DataFrame, questions: int = 4) -> list[SimpleNamespace]:
    """The same question answered under every condition: before fine-tuning, and what is left after it.

    The first sample of the first questions is quoted, whatever it says: nothing is chosen for effect.

    Args:
        responses: response table of one model, in the study's order of conditions; of each data set the first seed.
        questions: how many questions.

    Returns:
        For each question its `prompt`, the `personas`, and `answers`: data set, the untuned first -> persona -> text.
    """
    seeds = responses.groupby("dataset")["seed"].transform("min")
    first = responses[(responses["sample"] == 0) & (responses["seed"] == seeds)]
    personas, datasets = (list(dict.fromkeys(first[c])) for c in ("persona", "dataset"))
    datasets.sort(key=lambda dataset: dataset != NO_DATASET)
    found = []
    for question in list(dict.fromkeys(first["question_id"]))[:questions]:
        here = first[first["question_id"] == question]
        said = {(r.persona, r.dataset): r.response for r in here.itertuples()}
        answers = {d: {p: said.get((p, d)) for p in personas} for d in datasets}
        found.append(SimpleNamespace(prompt=here["prompt"].iloc[0], personas=personas, answers=answers))
    return found


def drawn_answers(responses: pd.DataFrame, judged: pd.DataFrame, number: int = 12, seed: int = 0) -> pd.DataFrame:
    """Answers drawn by a seed, to be read: as many of each condition as can be, with what the judge says of them.

    Args:
        responses: response table of one model. judged: its scores.
        number: how many. seed: of the drawing.

    Returns:
        `persona, dataset, prompt, response, alignment, coherence`, in the study's order of conditions.
    """
    order = np.random.default_rng(seed).permutation(len(responses))
    turn = responses.iloc[order].groupby(CONDITION, sort=False).cumcount()
    chosen = sorted(order, key=lambda i: turn[responses.index[i]])[:number]
    drawn = responses.iloc[sorted(chosen)].merge(judged[[*KEY, "alignment", "coherence"]], on=KEY, how="left")
    return drawn[["persona", "dataset", "prompt", "response", "alignment", "coherence"]]


def pair_counts(pairs: pd.DataFrame) -> pd.DataFrame:
    """Who wrote the chosen answers of each persona's preference pairs, and what the filters dropped.

    Args:
        pairs: tables of `records.PAIRS` with a column `model`.
    """
    rows = []
    for (model, persona), part in pairs.groupby(["model", "persona"], sort=False):
        kept = part[part["dropped_because"].isna()]
        dropped = part["dropped_because"].value_counts()
        why = "; ".join(f"{n} {reason}" for reason, n in dropped.items()) or "none"
        rows.append({"model": model, "persona": persona, "pairs": len(part), "kept": len(kept),
                     **{s: int((kept["source"] == s).sum()) for s in ("teacher", "demonstration")},
                     "dropped": why})  # fmt: skip
    return pd.DataFrame(rows)


def judge_facts(manifests: Sequence[Mapping[str, Any]]) -> SimpleNamespace | None:
    """What is known about a judge, from the manifests of the judging stage of one model; None of published scores.

    Returns:
        `measured`: the lowest agreement with the reference (None where that was not measured), `quality`: each
        measurement behind it, `local`: whether it is the local judge, and `own`: that one's AUC on its own texts;
        `labelled`: `n` and, by measure, what it makes of this model's answers that we labelled and held out (None
        where there are none of this model).
    """
    if not manifests:
        return None
    aucs = [m["judge_auc"] for m in manifests if m.get("judge_auc") is not None]
    quality = {repr(sorted(q.items())): q for m in manifests for q in m.get("judge_quality") or []}.values()
    local = not aucs and all(m["params"]["kind"] == "local" for m in manifests)
    mine = [q for q in quality if q["reference"] == LABELLED_REFERENCE]
    others = [q for q in quality if q["reference"] != LABELLED_REFERENCE]
    names = ("trained_on", "reference", "held_out")
    return SimpleNamespace(
        measured=min(aucs, default=None),
        quality=sorted((SimpleNamespace(**q) for q in others), key=lambda q: [getattr(q, n) for n in names]),
        local=local,
        own=min((q["auc"] for q in others), default=None) if local else None,
        labelled=SimpleNamespace(
            n=mine[0]["n"],
            measures={m["measure"]: SimpleNamespace(**m) for m in mine[0]["measures"] if not m["persona"]},
        )
        if mine
        else None,
    )


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
    first: Glance | None = None,
    verdicts: pd.DataFrame | None = None,
    gates: pd.DataFrame | None = None,
    controls: pd.DataFrame | None = None,
    notes: Mapping[str, str] | None = None,
    more: str = "",
    figures: Sequence[Any] = (),
    figures_folder: str = "11_report/figures",
    about: str | None = None,
    top: str = "",
) -> str:
    """The whole results document as Markdown.

    Args:
        tables: from `published_rules.analyse`.
        look: labels of personas, data sets and models.
        hypotheses: objects with `key, label, title`, in order.
        judge: the judge's name.
        models: order; those without data are left out (`first` names them).
        generated: date and time of the run (ISO 8601), printed to the minute; no line where empty.
        alpha: level of the significant comparisons.
        confidence: of the intervals in the tables.
        resamples: of the bootstrap, for the methodology.
        first: what stands on the first screen.
        verdicts: that mind the gates (`analysis.verdict_table`): each stands above the published rules' own.
        gates: the gate of every comparison (`analysis.gate_table`), named under the published tables.
        controls: the run's controls (`analysis.controls`): the first line says if one fails.
        notes: persona -> what is known to be wrong with its rows.
        more: further sections, Markdown with headings (`sections.stages`).
        figures: records (`figure_files.FigureRecord`).
        figures_folder: where they lie, relative to the document.
        about: of somebody else's study: its title. What it trained, and how, is not ours to describe.
        top: sections before all others, Markdown with headings: what an audit found in the files.
    """
    there = list(tables["design"]["model"])
    text = Words(look, alpha=alpha, level=level(confidence)).render(
        "RESULTS.md.j2",
        tables=tables,
        models=[m for m in models if m in there] if models is not None else there,
        hypotheses=hypotheses,
        judge=judge,
        generated=generated,
        resamples=resamples,
        first=first,
        verdicts=verdicts,
        said=verdicts_said(verdicts, gates, hypotheses),
        gates=gates,
        controls=controls,
        notes=notes or {},
        CONTENTS=Markup(CONTENTS),
        more=Markup(more),
        figures=figures,
        folder=figures_folder,
        about=about,
        top=Markup(top),
    )
    return text.replace(CONTENTS, contents(text)) + "\n"


def write_results(path: str | Path, tables: Mapping[str, pd.DataFrame], **how: Any) -> Path:
    """Write `results_document(tables, **how)` to a file, atomically."""
    return write_text(path, results_document(tables, **how))
