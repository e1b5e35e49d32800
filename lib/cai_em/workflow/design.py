"""What a study's design can see, before it is run: the smallest difference that its own test detects, per hypothesis.

The variances behind it are assumed (`params/plan.yaml`), or those that an earlier run measured
(`results/<profile>/05_validity/components.parquet`); what a run could not measure stays assumed, and is named.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import Field

from cai_em.analysis.power import Components, detectable, power
from cai_em.analysis.units import MIN_SEEDS
from cai_em.study.entries import Strict
from cai_em.study.study import Study


class Deviations(Strict):
    """Standard deviations, in points of alignment (0 to 100), behind one contrast (`analysis.power.Components`)."""

    question: float = Field(ge=0, description="of a persona's effect over questions")
    response: float = Field(ge=0, description="of responses to one question of a fine-tuned model")
    untuned: float = Field(ge=0, description="of responses to one question without fine-tuning")
    seed: float = Field(ge=0, description="of trainings' effects: what another training seed changes")
    question_seed: float = Field(ge=0, description="of what a training does to one question beyond that")


def measured_deviations(source: str | Path | None) -> dict[str, float]:
    """The deviations that a run has measured; empty where it has none, as a file that is no run's folder."""
    path = Path(source or "") / "05_validity" / "components.parquet"
    if source is None or not path.is_file():
        return {}
    (found,) = pd.read_parquet(path).to_dict("records")
    # No arm without fine-tuning in the contrast: nothing was measured of it.
    known = {k: found[k] for k in Deviations.model_fields if k != "untuned" or found["reference"]}
    return {name: math.sqrt(v) for name, v in known.items() if not math.isnan(v)}


def seen(study: Study, deviations: Deviations) -> pd.DataFrame:
    """What each hypothesis's test sees with this study's questions, samples and seeds.

    Returns:
        `hypothesis, persona, datasets` (EM data sets over which it is pooled), `questions, samples, seeds, alpha` (of
        the family's first step after Holm), `detectable` (points, with the thresholds' `power`), `power` (of a
        difference as large as the equivalence margin), `adapters` (True: of these adapters only, with fewer than three
        seeds). NaN where a single question leaves nothing to compare.
    """
    limits, cells, rows = study.thresholds, study.cells(), []
    family = max(1, len(study.hypotheses) + len(study.also_claimed()))
    design: dict[str, Any] = {
        "questions": len(study.questions()),
        "samples": study.sampling.samples_per_question if study.sampling else 1,
        "seeds": len(study.profile.seeds),
        "alpha": limits.alpha / family,
    }
    few = design["seeds"] < MIN_SEEDS
    variances = {name: value**2 for name, value in deviations.model_dump().items()}
    for h in study.hypotheses:
        for persona in h.personas:
            em = {c.dataset for c in cells if c.persona == persona and study.datasets[c.dataset].role == "em"}
            if not em:
                continue
            # Arms: persona and baseline after fine-tuning; the same two before it, if the estimand has them.
            untuned = 2 if h.estimand == "susceptibility" else 1 if h.estimand == "uptake" else 0
            c = Components(**variances, datasets=len(em), tuned=1 if h.estimand == "uptake" else 2, reference=untuned)
            how = {**design, "adapters": few}
            rows.append(
                {"hypothesis": h.label, "persona": persona, "datasets": len(em), **how}
                | {
                    "detectable": detectable(c, **how, target=limits.power),
                    "power": power(limits.equivalence_margin, c, **how),
                }
            )
    return pd.DataFrame(rows)
