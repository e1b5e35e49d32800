"""Every figure of a run, drawn and recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from cai_em.records.keys import NO_DATASET
from cai_em.report import style
from cai_em.report.figures.distributions import (
    cdf,
    em_rates,
    gates,
    histogram_grid,
    misalignment_rates,
    ridge,
    specification_curve,
    violin,
)
from cai_em.report.figures.means import (
    alignment_by_persona,
    arms,
    cross_model_figure,
    dataset_difficulty,
    forest,
    heatmap,
    hypothesis_differences,
    key_personas,
    misalignment_heatmap,
    twin_comparison,
)
from cai_em.report.figures.parts import Drawing, FigureRecord, record_figure, write_records
from cai_em.report.style import Look

TITLES = {
    "alignment": "Alignment by persona",
    "heatmap": "Alignment by persona and data set",
    "hypotheses": "Hypotheses: differences from the baseline",
    "forest": "Effect sizes",
    "twins": "Harmful and benign twin",
    "key-personas": "Key personas by data set",
    "difficulty": "Data-set difficulty",
    "cross-model": "Across models",
    "violin": "Distribution by persona",
    "rates": "Misalignment rates",
    "cdf": "Cumulative distributions",
    "ridge": "Distribution by data set",
    "histograms": "Histograms",
    "rates-heatmap": "Misalignment rates by condition",
    "arms": "The four arms",
    "gates": "Manipulation checks",
    "em-rates": "EM rates",
    "specification": "Specification curve",
}


def draw_all(
    scores: pd.DataFrame,
    out_dir: Path,
    look: Look,
    hypotheses: Sequence[Any] = (),
    *,
    tests: pd.DataFrame | None = None,
    outcomes: pd.DataFrame | None = None,
    specifications: Mapping[str, tuple[pd.DataFrame, str, str]] | None = None,
    confidence: float = 0.95,
) -> list[FigureRecord]:
    """Draw every figure that the tables allow, as SVG and PNG, and list them in `out_dir/figures.json`.

    Args:
        scores: score table (`cai_em.records.tables.SCORES`), one judge.
        out_dir: where `<key>-<model>.svg|png` go.
        look: labels, order, colours.
        hypotheses: entries with `label, personas, direction`; they name the key personas.
        tests: from `cai_em.analysis.classifiers.classify`.
        outcomes: from `cai_em.analysis.outcome.outcomes`.
        specifications: name -> (table of `specification_curve`, title, direction).
        confidence: of all intervals.

    Returns:
        One record per figure that was drawn. A figure that the data do not allow (one model only, no twin) is absent.
    """
    keys = [p for h in hypotheses for p in h.personas]
    custom = {p.key for p in look.personas if getattr(p, "custom", False)}
    records: list[FigureRecord] = []

    def keep(key: str, model: str, drawing: Drawing | None, name: str = "") -> None:
        if drawing is not None:
            records.append(record_figure(drawing, out_dir, look, key, TITLES[key], model, name))

    with style.style_context():
        for model in look.sort_models(scores["model"]):
            here = scores[scores["model"] == model]
            tuned = here[here["dataset"] != NO_DATASET]
            if tuned.empty:
                raise ValueError(
                    f"model {model!r}: every condition is without fine-tuning: there is nothing to compare"
                )
            # As published: custom constitutions were tried on one data set only and are left out of pooled figures.
            pooled = tuned[~tuned["persona"].isin(custom)]
            pooled = tuned if pooled.empty else pooled
            keep("alignment", model, alignment_by_persona(pooled, look, confidence))
            keep("heatmap", model, heatmap(tuned, look))
            keep("hypotheses", model, hypothesis_differences(tuned, look, hypotheses, confidence))
            keep("forest", model, forest(tuned, look, confidence))
            keep("twins", model, twin_comparison(pooled, look, confidence))
            keep("key-personas", model, key_personas(tuned, look, keys, confidence))
            keep("difficulty", model, dataset_difficulty(pooled, look, confidence))
            keep("violin", model, violin(pooled, look))
            keep("rates", model, misalignment_rates(pooled, look))
            keep("cdf", model, cdf(pooled, look, keys))
            keep("ridge", model, ridge(pooled, look))
            keep("histograms", model, histogram_grid(pooled, look))
            keep("rates-heatmap", model, misalignment_heatmap(tuned, look))
            keep("arms", model, arms(here, look, confidence))
            for table, key, draw in ((tests, "gates", gates), (outcomes, "em-rates", em_rates)):
                if table is not None and (table["model"] == model).any():
                    keep(key, model, draw(table[table["model"] == model], look))
        keep("cross-model", "", cross_model_figure(scores, look, confidence))
        for name, (table, title, direction) in (specifications or {}).items():
            keep("specification", "", specification_curve(table, look, title, direction), name)
    write_records(records, out_dir)
    return records
