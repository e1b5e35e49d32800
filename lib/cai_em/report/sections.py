"""Sections of the results document on what the stages found: each is a template over the tables that a stage stored."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
from markupsafe import Markup

from cai_em.analysis.contrasts import POOLED
from cai_em.analysis.gates import PRESENT
from cai_em.dynamics.curves import OUTCOMES
from cai_em.records.keys import BASELINE
from cai_em.report.figures.parts import View
from cai_em.report.figures.training import loss_name
from cai_em.report.words import Words, where
from cai_em.study.labels import Labels


def read_stage(folder: Path) -> Mapping[str, pd.DataFrame]:
    """The tables in a stage's folder, by name; one that it had no reason to write is empty."""
    found: defaultdict[str, pd.DataFrame] = defaultdict(pd.DataFrame)
    return found | {path.stem: pd.read_parquet(path) for path in sorted(folder.glob("*.parquet"))}


def stages(
    results: Path,
    view: View,
    thresholds: Any,
    *,
    em_datasets: Collection[str],
    figures: Sequence[Any] = (),
    trajectory: Any = None,
    steering: Any = None,
    caveat: str = "",
) -> str:
    """Everything that the stages beside `06_results` found, Markdown with headings.

    Args:
        results: `results/<profile>`.
        view: labels, and what is asked.
        thresholds: the study's, as the stages took them.
        em_datasets: data sets with the role `em`; the others count as controls.
        figures: records of all figures; those of H3 and H4 stand in their sections.
        trajectory, steering: the profile's plans of H3 and H4; None where it has none.
        caveat: what this run cannot show.
    """

    def dynamics(stage: str, verdicts: str, text: Callable[[Mapping[str, pd.DataFrame]], str]) -> SimpleNamespace:
        tables = read_stage(results / stage)
        models = list(dict.fromkeys(tables[verdicts]["model"]))
        of = {m: {n: where(t, model=m) if "model" in t else t for n, t in tables.items()} for m in models}
        texts = {m: Markup(text(mine)) for m, mine in of.items()}
        return SimpleNamespace(texts=texts, figures=[f for f in figures if f.stage == stage])

    def h3(t: Mapping[str, pd.DataFrame]) -> str:
        titles = {o: loss_name(view, o) for o in t["transitions"]["outcome"].unique() if o not in OUTCOMES}
        first = trajectory.personas[0]
        return h3_section(t["transitions"], t["comparisons"], t["h3"], view.look, titles=titles,
                          general=t["generality"], beside=t["beside"], persona=first, caveat=caveat)  # fmt: skip

    def h4(t: Mapping[str, pd.DataFrame]) -> str:
        near = t["cosines"][t["cosines"]["layer"] == where(t["transfer"], kind="add")["layer"].iloc[0]]
        contrast = where(t["h4"], what="contrast")["status"].iloc[0]
        return h4_section(t["transfer"], near, t["tests"], t["h4"], view.look, contrast=contrast, caveat=caveat)

    return Words(view.look).render(
        "stages.md.j2",
        checked=read_stage(results / "05_validity"),
        audited=read_stage(results / "08_claims"),
        thresholds=thresholds,
        em_datasets=em_datasets,
        h3=dynamics("09_trajectories", "h3", h3) if trajectory else None,
        h4=dynamics("10_steering", "h4", h4) if steering else None,
        folder="11_report/figures",
    )


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
    said = Words(look).macro("h3.md.j2", "h3")
    return said(found, compared, verdicts, names, general, beside, persona, caveat)


def h4_section(
    found: pd.DataFrame,
    cosines: pd.DataFrame,
    tests: pd.DataFrame,
    verdicts: pd.DataFrame,
    look: Labels,
    *,
    contrast: str = "adapter",
    caveat: str = "",
) -> str:
    """H4's part of the results document, Markdown without a heading.

    Args:
        found: `effects` of the transfer matrix.
        cosines: `cosine_table` at the transfer layer.
        tests: `transfer_tests`.
        verdicts: H4's verdict and its gates, of one model (`h4_verdicts`).
        look: labels.
        contrast: which of `dynamics.h4.CONTRASTS` gave the directions.
        caveat: what this run cannot show.
    """
    return Words(look).macro("h4.md.j2", "h4")(found, cosines, tests, verdicts, contrast, caveat)


def audit_findings(findings: pd.DataFrame, gates: pd.DataFrame, look: Labels) -> str:
    """Heading and Markdown of what an audit found, one a line, the worst first; then what the gates of the comparisons
    say.

    Args:
        findings: of `07_audit`.
        gates: of `05_validity`.
        look: labels.
    """
    return Words(look).macro("audit.md.j2", "findings")(findings, _manipulation(gates))


def _manipulation(gates: pd.DataFrame) -> SimpleNamespace | None:
    """In how many comparisons the persona is present, and all gates are; None where nothing is compared."""
    gates = gates[gates["dataset"] != POOLED]
    if not len(gates):
        return None
    shown = gates["persona_gate"] == PRESENT
    lacking = sorted(set(gates["persona"]) - set(gates.loc[shown, "persona"]))
    # Whether it could have been seen: by texts, and with someone else to tell a persona from.
    seen = gates[["auc_baseline", "auc_others"]].notna().all(axis=1).any()
    level = "note" if not lacking else "limit" if not seen else "warning" if shown.any() else "fault"
    opened = int((gates["gate"] == PRESENT).sum())
    return SimpleNamespace(level=level, shown=int(shown.sum()), of=len(gates), lacking=lacking, open=opened)


def audit_rates(rates: pd.DataFrame, findings: pd.DataFrame, look: Labels) -> str:
    """Heading and Markdown of every EM rate at once: a row a condition, a column a rule, with clustered intervals."""
    rules = rates.drop_duplicates("rule")
    conditions = [
        SimpleNamespace(model=model, persona=persona, dataset=dataset, seed=seed, n=int(part["n"].iloc[0]),
                        rates=list(part.set_index("rule").loc[rules["rule"]].itertuples()))
        for (model, persona, dataset, seed), part in rates.groupby(["model", "persona", "dataset", "seed"], sort=False)
    ]  # fmt: skip
    return Words(look).macro("audit.md.j2", "rates")(conditions, list(rules["label"]), findings)


def audit_account(account: pd.DataFrame, look: Labels) -> str:
    """Heading and Markdown of what was read, flagged and refused, and why; file by file it stands in the table."""
    read = account.groupby(["what", "why"], sort=False).agg(count=("count", "sum"), files=("file", "nunique"))
    files = account.loc[account["what"] == "read", "file"].nunique()
    return Words(look).macro("audit.md.j2", "account")(read.rename(columns={"count": "n"}).reset_index(), files)
