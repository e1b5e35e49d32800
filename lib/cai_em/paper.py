"""The paper's generated half: numbers, tables and figures from results; the check that nothing is typed or stale.

Prose stands in `paper/*.qmd` and holds no number of its own. `write_generated` writes beside it

- `_variables.yml`: every number of the prose, as `{{< var group.name >}}`; each is a link to its line in the appendix,
  which links to the table file that it came from;
- `_generated/*.md`: tables and figures with captions, labels and alternative text, included by the prose;
- `_generated/sources.json`: value, unit, file and rule of every number; hashes of all files that were read.

Every block exists whatever the profile: where a part has not been run, the block says so, so that the same prose
renders after a demo and after the full study. `check` finds typed digits, unknown or unused variables, references and
citations that do not resolve, and results newer than what was generated. `preview` renders the same sources without
Quarto.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pypandoc
import yaml

from cai_em import figures as figure_module
from cai_em import params, report, run, stats
from cai_em.figures import BASELINE, NO_DATASET, FigureRecord, slug, summarise
from cai_em.style import Look

UNKNOWN = "not measured"
"""What stands in the prose where a part has not been run."""


# --- Numbers that know where they come from -----------------------------------------------------------------------


@dataclass(frozen=True)
class Number:
    """A value of the prose: formatted, with unit, file (relative to the repository) and how it follows from the "
    "file."""

    name: str
    value: str
    unit: str
    source: str
    how: str


class Numbers:
    """The values that the prose may use.

    Args:
        repository: sources are written relative to it.
    """

    def __init__(self, repository: Path) -> None:
        self.repository = repository.resolve()
        self.all: dict[str, Number] = {}
        self.used: set[str] = set()
        self.files: set[Path] = set()

    def add(self, name: str, value: object, unit: str, source: Path | None, how: str) -> str:
        """Record a value; returns it as a link to its line in the appendix.

        Raises:
            ValueError: the name is not `group.name` in lower case, or is taken.
        """
        if not re.fullmatch(r"[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)+", name):
            raise ValueError(f"variable name {name!r}: expected words in lower case joined by dots")
        if name in self.all:
            raise ValueError(f"variable {name!r} is given twice")
        self.all[name] = Number(name, str(value), unit, self.relative(source) if source else "", how)
        return self.markdown(name)

    def relative(self, source: Path) -> str:
        """A file relative to the repository, noted as read."""
        self.files.add(source.resolve())
        return os.path.relpath(source.resolve(), self.repository)

    def traced(self, name: str) -> bool:
        """Whether a value has a line in the appendix: measurements and verdicts have, mere names have not."""
        number = self.all[name]
        return bool(number.source) and number.unit != "text"

    def markdown(self, name: str) -> str:
        """A value as it stands in the text: a link to where it comes from."""
        value = self.all[name].value
        return f"[{value}](#n-{slug(name)})" if self.traced(name) else plain(value)

    def link(self, name: str) -> str:
        """The same, noted as used by generated text."""
        self.used.add(name)
        return self.markdown(name)

    def tree(self) -> dict[str, Any]:
        """Nested mapping for `_variables.yml`."""
        tree: dict[str, Any] = {}
        for name in self.all:
            *groups, last = name.split(".")
            node = tree
            for group in groups:
                node = node.setdefault(group, {})
            node[last] = self.markdown(name)
        return tree


# --- Markdown -----------------------------------------------------------------------------------------------------


def pipe_table(rows: Sequence[Sequence[object]], header: Sequence[str], align: str) -> str:
    """A pipe table whose dashes are as wide as its columns: pandoc takes relative widths of wide tables from them.

    Args:
        align: one of `l`, `r`, `c` per column.
    """
    cells = [[str(c).replace("|", "\\|").replace("\n", " ") for c in row] for row in [list(header), *rows]]
    shown = [[re.sub(r"\]\([^)]*\)|[\[`\\]", "", c) for c in row] for row in cells]
    widths = [min(max(3, *(len(row[i]) for row in shown)), 44) for i in range(len(header))]
    rule = {"l": lambda w: ":" + "-" * (w - 1), "r": lambda w: "-" * (w - 1) + ":", "c": lambda w: f":{'-' * (w - 2)}:"}
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    lines.insert(1, "|" + "|".join(rule[a](w + 2) for a, w in zip(align, widths)) + "|")
    return "\n".join(lines)


def floating(label: str, content: str, caption: str) -> str:
    """A cross-referenceable float (`fig-…` or `tbl-…`): content, then the caption as the last paragraph."""
    return f"::: {{#{label}}}\n\n{content}\n\n{caption}\n\n:::\n"


def absent(label: str, what: str, stage: str) -> str:
    """The float that stands where a part has not been run: labels resolve, and the reader is told."""
    return floating(label, "*Not part of this run.*", f"{what} (stage `{stage}`, where the data allow it).")


def plain(text: str) -> str:
    """Text of data as Markdown that shows it as it is: nothing in it can become markup, a shortcode or a citation."""
    return report.escape(str(text))


def _fixed(value: float | None, digits: int = 1, signed: bool = False) -> str:
    if value is None or pd.isna(value):
        return "–"
    # Points are rounded as the published document rounds them, so that paper and results document never differ.
    value = round(float(value), 2) if digits == 1 else float(value)
    return f"{value:{'+' if signed else ''}.{digits}f}".replace("-", "−")


def _interval(low: float, high: float, digits: int = 1, signed: bool = False) -> str:
    if pd.isna(low):
        return "–"
    return f"\\[{_fixed(low, digits, signed)},\u00a0{_fixed(high, digits, signed)}\\]"


def _p(value: float) -> str:
    return "–" if pd.isna(value) else "<\u00a00.001" if value < 0.001 else f"{value:.3f}"


def read_table(path: Path) -> pd.DataFrame:
    """A result table, Parquet or CSV."""
    return pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)


def by_model(
    look: Look, rows: Sequence[tuple[str, Sequence[object]]], header: Sequence[str], align: str, caption: str
) -> tuple[str, str]:
    """A table of (model, cells) rows: several models get a column, a single one is named by the caption."""
    models = {model for model, _ in rows}
    if len(models) == 1:
        return pipe_table([cells for _, cells in rows], header, align), f"{look.model(models.pop())}. {caption}"
    return pipe_table([[look.model(m), *cells] for m, cells in rows], ["Model", *header], "l" + align), caption


# --- Blocks -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """What the paper is made of.

    Args:
        paper: the folder of the prose.
        results: `results/<profile>`.
        profile: `name`, `title`, `caveat`.
        scores: score table of one judge, and `score_files`: where it lies.
        look: labels and order.
        hypotheses: entries with `key, label, title, personas, tested, direction`.
        thresholds: name -> value, from `params/thresholds.yaml`.
        settings: (what, parameter, value, file) lines of the methods table.
        tables: name -> file, of those that the run has written (see `TABLES`).
        figures: folders of figures (`cai_em.figures.write_records`, or a stage's manifest with `captions`).
        repository: files are named relative to it.
    """

    paper: Path
    results: Path
    profile: Mapping[str, str]
    scores: pd.DataFrame
    score_files: Sequence[Path]
    look: Look
    hypotheses: Sequence[Any]
    thresholds: Mapping[str, Any]
    settings: Sequence[tuple[str, str, object, Path]]
    tables: Mapping[str, Path]
    figures: Sequence[Path]
    repository: Path

    def table(self, name: str) -> pd.DataFrame | None:
        """A result table by name; None where the run has none."""
        return read_table(self.tables[name]) if name in self.tables else None


def find_tables(results: Path) -> dict[str, Path]:
    """The tables of `TABLES` that a run has written, by name: Parquet files of that name under its stages."""
    found: dict[str, Path] = {}
    for path in sorted(Path(results).glob("[0-9][0-9]_*/**/*.parquet")):
        name = path.stem
        if name in TABLES and path.parent.relative_to(results).parts[0] in TABLES[name].stages:
            found.setdefault(name, path)
    return found


def find_figures(results: Path) -> list[Path]:
    """The folders of a run that hold figures with captions."""
    found = {path.parent for path in Path(results).glob("[0-9][0-9]_*/**/figures.json")}
    return sorted(found | {path for path in Path(results).glob("[0-9][0-9]_*/figures") if _captions(path)})


def _captions(folder: Path) -> dict[str, str]:
    """Captions of a stage that lists them in its manifest: SVG file -> caption."""
    manifest = folder.parent / "manifest.json"
    if not manifest.is_file():
        return {}
    return json.loads(manifest.read_text(encoding="utf-8")).get("captions") or {}


def _records(folder: Path) -> list[FigureRecord]:
    if (folder / "figures.json").is_file():
        return figure_module.read_records(folder)
    # Such a stage has no alternative text of its own: the caption's first sentence names what is drawn.
    return [
        FigureRecord(Path(svg).stem, "", Path(svg).stem, text, text.split(". ")[0], svg, Path(svg).stem + ".png")
        for svg, text in _captions(folder).items()
        if (folder / svg).is_file()
    ]


@dataclass(frozen=True)
class Expected:
    """A table that the paper can show: which stages may write it, and what it is."""

    stages: tuple[str, ...]
    what: str


TABLES = {
    "outcomes": Expected(("05_validity",), "every condition's outcomes (cai_em.inference.outcomes)"),
    "comparisons": Expected(("05_validity",), "persona against baseline with gates (cai_em.inference.compare_all)"),
    "verdicts": Expected(("05_validity",), "hypotheses: published rules and ours (cai_em.inference.verdict_table)"),
    "tests": Expected(("05_validity",), "classifier two-sample tests (cai_em.gates.classify)"),
    "power": Expected(("05_validity",), "designs and what they can detect (cai_em.inference.power_table)"),
    "reliability": Expected(("05_validity", "08_claims"), "agreement of repeated judgings"),
    "claims": Expected(("08_claims",), "claims audit (cai_em.claims.audit), a row per claim"),
    "trajectories": Expected(("09_trajectories",), "H3 (cai_em.trajectories.paper_table)"),
    "steering": Expected(("10_steering",), "H4, transfer between personas"),
}
"""Tables that the paper shows where a run has them, by file stem."""


def _grid(x: Inputs, numbers: Numbers) -> dict[str, str]:
    scores, look, source = x.scores, x.look, x.score_files[0]
    models = look.sort_models(scores["model"])
    tuned = scores[scores["dataset"] != NO_DATASET]
    roles = pd.Series({d: look.role(d) for d in tuned["dataset"].unique()})
    count = lambda name, value, how: numbers.add(f"grid.{name}", f"{value:,}", "count", source, how)  # noqa: E731
    numbers.add("grid.models", " and ".join(look.model(m) for m in models), "text", source, "labels of `model`")
    count("conditions", scores.groupby(["model", "persona", "dataset", "seed"]).ngroups, "distinct conditions")
    count("responses", len(scores), "rows")
    count("scored", int(scores["alignment"].notna().sum()), "rows with an alignment score")
    count("unscored", int(scores["alignment"].isna().sum()), "rows without an alignment score")
    count("personas", int(tuned.loc[tuned["persona"] != BASELINE, "persona"].nunique()), "distinct `persona`")
    count("datasets", int(roles.size), "distinct `dataset` other than none")
    count("em_datasets", int((roles == "em").sum()), "data sets with role em")
    count("controls", int((roles != "em").sum()), "data sets with another role")
    count("questions", int(scores["question_id"].nunique()), "distinct `question_id`")
    per_question = scores.groupby(["model", "persona", "dataset", "seed", "question_id"]).size()
    count("samples", int(per_question.median()), "median responses of a question in a condition")
    count("seeds", int(tuned.groupby(["model", "persona", "dataset"])["seed"].nunique().max()), "most seeds of a cell")
    numbers.add("grid.judge", ", ".join(sorted(scores["judge"].unique())), "text", source, "distinct `judge`")
    rows = []
    for model in models:
        part = scores[scores["model"] == model]
        flags = part["alignment_flag"].value_counts()
        rows.append(
            [look.model(model), part["persona"].nunique(), part["dataset"].nunique(),
             part.groupby(["persona", "dataset", "seed"]).ngroups, f"{len(part):,}",
             f"{int(part['alignment'].notna().sum()):,}",
             ", ".join(f"{n:,} {flag}" for flag, n in flags.items()) or "none"]
        )  # fmt: skip
    header = ["Model", "Personas", "Data sets", "Conditions", "Responses", "Scored", "Without a score"]
    caption = "What was analysed. A response without a score is kept with its reason; personas include the baseline."
    return {"grid": floating("tbl-grid", pipe_table(rows, header, "lrrrrrl"), caption)}


def _alignment(x: Inputs, numbers: Numbers) -> dict[str, str]:
    look, source = x.look, x.score_files[0]
    custom = {p.key for p in look.personas if getattr(p, "custom", False)}
    tuned = x.scores[(x.scores["dataset"] != NO_DATASET) & ~x.scores["persona"].isin(custom)]
    blocks, rows = [], []
    for number, model in enumerate(look.sort_models(tuned["model"])):
        here = tuned[tuned["model"] == model]
        table = summarise(here, ["persona"]).set_index("persona")
        shared = figure_module.like_for_like(here)
        fair = summarise(here[here["dataset"].isin(shared)], ["persona"]).set_index("persona")
        rows = []
        for persona in look.sort_personas(table.index):
            row = table.loc[persona]
            rows.append(
                [look.persona(persona), f"{int(row['n']):,}", _fixed(row["mean"]), _fixed(row["sd"]),
                 _interval(row["ci_low"], row["ci_high"]), _interval(row["q_low"], row["q_high"]),
                 _fixed(fair["mean"].get(persona))]
            )  # fmt: skip
        caption = (
            f"Mean alignment by persona, {look.model(model)}. The first interval treats responses as independent, as "
            f"the published document did; the second is over the means of the questions. *Like for like* uses only the "
            f"{len(shared)} data sets that every persona has."
        )
        header = ["Persona", "N", "Mean", "SD", "95% responses", "95% questions", "Like for like"]
        label = "tbl-alignment" + (f"-{slug(model)}" if number else "")
        blocks.append(floating(label, pipe_table(rows, header, "lrrrrrr"), caption))
        if number == 0:
            cells = summarise(here, ["persona", "dataset"]).set_index(["persona", "dataset"])["mean"]
            numbers.add("main.model", look.model(model), "text", source, "first model in the study's order")
            for which, pick in (("highest", table["mean"].idxmax()), ("lowest", table["mean"].idxmin())):
                numbers.add(f"persona.{which}", look.persona(pick), "text", source, f"persona with the {which} mean")
                how = f"mean `alignment` of {pick}, all its data sets"
                numbers.add(f"persona.{which}_mean", _fixed(table.loc[pick, "mean"]), "points", source, how)
            base = cells.get(BASELINE)
            if base is not None and len(base):
                for which, pick in (("worst", base.idxmin()), ("best", base.idxmax())):
                    how = f"data set with the {'lowest' if which == 'worst' else 'highest'} baseline mean"
                    numbers.add(f"baseline.{which}", look.dataset(pick), "text", source, how)
                    how = f"mean `alignment` of the baseline on {pick}"
                    numbers.add(f"baseline.{which}_mean", _fixed(base[pick]), "points", source, how)
    return {"alignment": "\n".join(blocks)}


def _hypotheses(x: Inputs, numbers: Numbers) -> dict[str, str]:
    look = x.look
    lines = []
    for h in x.hypotheses:
        names = " and ".join(look.persona(p) for p in h.personas)
        way = "lower" if h.direction == "lower" else "higher"
        lines.append(
            f"- **{h.label}.** {plain(h.title)}. Tested: {names}; predicted: {way} alignment than the baseline."
        )
    listing = "\n".join(lines) or "This profile registers no hypothesis."
    found = _verdicts(x)
    if not found:
        what = "Verdicts by the published rules and by rules that respect the design"
        return {"hypotheses": listing, "verdicts": absent("tbl-verdicts", what, "05_validity")}
    rows = [
        (
            v.model,
            [
                v.label,
                f"{v.published} ({v.supporting} of {v.datasets})",
                f"**{v.verdict}**",
                plain(v.reason),
            ],
        )
        for v in found
    ]
    numbers.relative(x.tables["verdicts"])
    caption = (
        "Verdicts. *Published rules*: uncorrected tests over responses, all data sets counted, one persona per "
        "hypothesis. *Here*: every persona named, paired by question, corrected, EM data sets only, and only where "
        "the manipulation is shown."
    )
    header = ["Hypothesis", "Published rules", "Here", "Why"]
    return {"hypotheses": listing, "verdicts": floating("tbl-verdicts", *by_model(look, rows, header, "llll", caption))}


@dataclass(frozen=True)
class _Verdict:
    model: str
    label: str
    published: str
    supporting: int
    datasets: int
    verdict: str
    reason: str


def _verdicts(x: Inputs) -> list[_Verdict]:
    """Both verdicts of every hypothesis and model; empty where the stage has not been run."""
    table = x.table("verdicts")
    if table is None or table.empty:
        return []
    supports = stats.verdicts(stats.comparisons(x.scores), x.hypotheses, alpha=float(x.thresholds["alpha"]))
    supports = supports.set_index(["model", "hypothesis"])
    labels = {h.key: h.label for h in x.hypotheses}
    found = []
    for row in table[table["persona"].isna()].itertuples():
        count = supports.loc[(row.model, row.hypothesis)]
        label = labels.get(row.hypothesis, row.hypothesis)
        sides = (int(count["supporting"]), int(count["datasets"]))
        found.append(_Verdict(row.model, label, row.published_rules, *sides, row.verdict, row.reason))
    return found


def _comparisons(x: Inputs, numbers: Numbers) -> dict[str, str]:
    look, table = x.look, x.table("comparisons")
    if table is None or table.empty:
        what = "Differences from the baseline, paired by question"
        return {"comparisons": absent("tbl-comparisons", what, "05_validity")}
    source = x.tables["comparisons"]
    keys = {p for h in x.hypotheses for p in h.personas}
    table = table[table["dataset"] != NO_DATASET]
    em = table[table["dataset"].map(look.role) == "em"]
    alpha = float(x.thresholds["alpha"])
    blocks = []
    for number, model in enumerate(look.sort_models(table["model"])):
        part = table[(table["model"] == model) & table["persona"].isin(keys)].set_index(["persona", "dataset"])
        rows = []
        for persona in look.sort_personas(p for p, _ in part.index):
            for dataset in look.sort_datasets(d for p, d in part.index if p == persona):
                r = part.loc[(persona, dataset)]
                rows.append(
                    [look.persona(persona), look.signed(dataset), _fixed(r["mean_persona"]), _fixed(r["mean_baseline"]),
                     f"{_fixed(r['delta'], 1, True)} {_interval(r['low'], r['high'], 1, True)}", _p(r["p"]),
                     _p(r.get("p_adjusted", float("nan"))), _p(r["p_equivalence"]), r.get("gate", "–")]
                )  # fmt: skip
        caption = (
            f"Personas of the hypotheses against the baseline on the same data set, {look.model(model)}. Δ with its "
            "interval, and p, are paired by question. *p equivalence* below the significance level means that the "
            "difference is smaller than the margin. ● EM data set, ■ benign control, ▲ regularisation corpus."
        )
        header = ["Persona", "Data set", "Mean", "Baseline", "Δ", "p", "p adj.", "p equiv.", "Gate"]
        label = "tbl-comparisons" + (f"-{slug(model)}" if number else "")
        blocks.append(floating(label, pipe_table(rows, header, "llrrrrrrl"), caption))
    main = look.sort_models(table["model"])[0]
    mine = em[em["model"] == main]
    significant = int((mine["p_adjusted"] < alpha).sum()) if "p_adjusted" in mine else 0
    numbers.add("comparisons.em", len(mine), "count", source, f"comparisons of {main} on EM data sets")
    numbers.add("comparisons.significant", significant, "count", source, "of these, with p_adjusted below alpha")
    if "gate" in mine:
        how = "of these, with gate = shown"
        numbers.add("comparisons.interpretable", int((mine["gate"] == "shown").sum()), "count", source, how)
    return {"comparisons": "\n".join(blocks)}


def _gates(x: Inputs, numbers: Numbers) -> dict[str, str]:
    look, tests = x.look, x.table("tests")
    whole = None if tests is None else tests[tests["scope"] == "personas"]
    if whole is None or whole.empty:
        return {"gates": absent("tbl-gates", "Whether a classifier can name the persona of a response", "05_validity")}
    source = x.tables["tests"]
    pairs = tests[tests["scope"] == "persona"]
    rows = []
    for model in look.sort_models(whole["model"]):
        for dataset in look.sort_datasets(whole.loc[whole["model"] == model, "dataset"]):
            row = whole[(whole["model"] == model) & (whole["dataset"] == dataset)].iloc[0]
            auc = pairs.loc[(pairs["model"] == model) & (pairs["dataset"] == dataset), "estimate"]
            rows.append(
                (model, [look.signed(dataset), _fixed(row["estimate"], 2), _fixed(row["chance"], 2),
                 _interval(row["low"], row["high"], 2), _p(row["p"]),
                 f"{_fixed(auc.min(), 2)} to {_fixed(auc.max(), 2)}" if len(auc) else "–"])
            )  # fmt: skip
    main = whole[(whole["model"] == look.sort_models(whole["model"])[0]) & (whole["dataset"] != NO_DATASET)]
    if len(main):
        excess = main["estimate"] - main["chance"]
        least, most = main.loc[excess.idxmin()], main.loc[excess.idxmax()]
        for which, row in (("least", least), ("most", most)):
            dataset = row["dataset"]
            how = f"data set where the persona classifier exceeds chance {which}"
            numbers.add(f"gates.{which}_dataset", look.dataset(dataset), "text", source, how)
            how = f"`estimate`, scope personas, {dataset}"
            numbers.add(f"gates.{which}_accuracy", _fixed(100 * row["estimate"], 0), "per cent", source, how)
            how = f"`chance`, scope personas, {dataset}"
            numbers.add(f"gates.{which}_chance", _fixed(100 * row["chance"], 0), "per cent", source, how)
    caption = (
        "Can a classifier name the persona of a response to a question that it has not seen? Accuracy over all "
        "personas of a data set with its bootstrap interval and permutation p, and the range of the AUC of single "
        "personas against the baseline."
    )
    header = ["Data set", "Accuracy", "Chance", "95%", "p", "AUC against baseline"]
    return {"gates": floating("tbl-gates", *by_model(look, rows, header, "lrrrrr", caption))}


def _outcomes(x: Inputs, numbers: Numbers) -> dict[str, str]:
    look, table = x.look, x.table("outcomes")
    if table is None or table.empty:
        what = "EM rate, missing scores and effective sample size by data set"
        return {"outcomes": absent("tbl-outcomes", what, "05_validity")}
    source, rows = x.tables["outcomes"], []
    for model in look.sort_models(table["model"]):
        for dataset in look.sort_datasets(table.loc[table["model"] == model, "dataset"]):
            part = table[(table["model"] == model) & (table["dataset"] == dataset)]
            base = part[part["persona"] == BASELINE]
            other = part.loc[part["persona"] != BASELINE, "em_rate"]
            first = base.iloc[0] if len(base) else None
            rows.append(
                (model, [look.signed(dataset),
                 "–" if first is None else f"{_fixed(100 * first['em_rate'])} "
                 f"{_interval(100 * first['em_low'], 100 * first['em_high'])}",
                 f"{_fixed(100 * other.min())} to {_fixed(100 * other.max())}" if len(other) else "–",
                 f"{int(part['n'].sum() - part['scored'].sum()):,}",
                 "–" if first is None else _fixed(first["icc"], 2),
                 "–" if first is None else _fixed(first["effective_n"], 0),
                 "–" if first is None else int(first["n"])])
            )  # fmt: skip
    main = table[(table["model"] == look.sort_models(table["model"])[0]) & (table["persona"] == BASELINE)]
    tuned = main[main["dataset"] != NO_DATASET]
    if len(tuned):
        worst = tuned.loc[tuned["em_rate"].idxmax()]
        where = f"baseline on {worst['dataset']}"
        numbers.add(
            "em.dataset", look.dataset(worst["dataset"]), "text", source, "data set with the highest baseline EM rate"
        )
        numbers.add("em.rate", _fixed(100 * worst["em_rate"]), "per cent", source, f"`em_rate`, {where}")
        interval = f"{_fixed(100 * worst['em_low'])} to {_fixed(100 * worst['em_high'])}"
        numbers.add("em.interval", interval, "per cent", source, f"`em_low` to `em_high`, {where}")
        numbers.add("em.icc", _fixed(worst["icc"], 2), "ratio", source, f"`icc`, {where}")
        numbers.add("em.effective_n", _fixed(worst["effective_n"], 0), "responses", source, f"`effective_n`, {where}")
        numbers.add("em.n", int(worst["scored"]), "responses", source, f"`scored`, {where}")
    caption = (
        "EM rate in per cent (95% interval counting questions) of the baseline and its range over personas; "
        "responses without a score; intra-class correlation (ICC) and effective number of responses of the baseline "
        "condition."
    )
    header = ["Data set", "EM rate, baseline", "Personas", "No score", "ICC", "Eff. n", "n"]
    return {"outcomes": floating("tbl-outcomes", *by_model(look, rows, header, "lrrrrrr", caption))}


def _whole_table(
    x: Inputs, numbers: Numbers, name: str, label: str, caption: str, stage: str, most: int = 24
) -> dict[str, str]:
    """A result table as it is: text columns left, numbers right, labels in place of keys."""
    table = x.table(name)
    if table is None or table.empty:
        return {name: absent(label, caption.rstrip("."), stage)}
    numbers.relative(x.tables[name])
    table = table[[c for c in COLUMNS.get(name, table.columns) if c in table]]
    if "model" in table and table["model"].nunique() == 1:
        caption = f"{x.look.model(table['model'].iloc[0])}. {caption}"
        table = table.drop(columns="model")
    look = {"model": x.look.model, "persona": x.look.persona, "dataset": x.look.dataset}
    align, columns = "", []
    for column in table.columns:
        values = table[column]
        number = pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)
        align += "r" if number else "l"
        digits = 0 if pd.api.types.is_integer_dtype(values) else 3
        if number:
            columns.append([_fixed(v, digits) for v in values])
        else:
            columns.append([look[column](str(v)) if column in look else plain(str(v)) for v in values])
    rows = list(zip(*columns))
    if len(rows) > most:
        caption += f" The first {most} of {len(rows):,} lines; the rest is in the file."
    header = [str(c).replace("_", " ") for c in table.columns]
    return {name: floating(label, pipe_table(rows[:most], header, align), caption)}


COLUMNS = {
    "claims": ["model", "claim", "analyses", "share", "share_questions", "gate"],
    "reliability": [
        "judge_a", "judge_b", "units", "pairs", "exact", "within_5", "mean_abs_difference", "mean_difference", "icc",
    ],
}  # fmt: skip
"""What fits on a page of a table that has more; the rest is in the file."""


def _sentences(x: Inputs) -> str:
    """What the audit says of the hypotheses, one sentence each; those about single comparisons are in the file."""
    table = x.table("claims")
    if table is None or table.empty:
        return ""
    labels = {h.label for h in x.hypotheses}
    lines = [f"- {plain(row.sentence)}" for row in table.itertuples() if row.claim in labels]
    return "\n" + "\n".join(lines) + "\n" if lines else ""


def _settings(x: Inputs, numbers: Numbers) -> dict[str, str]:
    for name, unit, how in (
        ("alpha", "probability", "significance level"),
        ("equivalence_margin", "points", "smallest difference that matters"),
        ("em_alignment_below", "points", "alignment below which a response is misaligned"),
        ("em_coherence_above", "points", "coherence above which a response is coherent"),
        ("confidence", "share", "confidence of intervals"),
    ):
        value = x.thresholds[name]
        shown = f"{100 * value:g}" if name == "confidence" else f"{value:g}"
        numbers.add(f"thresholds.{name}", shown, "per cent" if name == "confidence" else unit,
                    Path(x.thresholds["file"]), how)  # fmt: skip
    rows = []
    for what, parameter, value, file in x.settings:
        rows.append([what, parameter, plain(str(value)), f"`{numbers.relative(Path(file))}`"])
    if not rows:
        block = absent(
            "tbl-settings", "Parameters of training, sampling and judging: this profile imports scores", "params/"
        )
    else:
        caption = "Parameters of this run, from the files that every stage read."
        block = floating("tbl-settings", pipe_table(rows, ["Stage", "Parameter", "Value", "File"], "llll"), caption)
    return {"settings": block}


def _status(x: Inputs, numbers: Numbers) -> dict[str, str]:
    caveat = plain(" ".join(x.profile.get("caveat", "").split()))
    callout = (
        f"::: {{.callout-{'important' if caveat else 'note'}}}\n\n## Results shown: profile {x.profile['name']}\n\n"
        f"*{plain(x.profile['title'])}.* Every number below was computed from `{numbers.relative(x.score_files[0])}` "
        f"and the tables made from it; a click on a number leads to the file that it came from (@tbl-sources)."
        + (f"\n\n{caveat}" if caveat else "")
        + "\n\n:::\n"
    )
    return {"status": callout}


def _findings(x: Inputs, numbers: Numbers) -> dict[str, str]:
    """The abstract's findings: sentences for which the run has the data, and no others."""
    have = numbers.all
    link = numbers.link
    found = [
        f"We analyse {link('grid.scored')} scored responses of {link('grid.models')} in {link('grid.conditions')} "
        f"conditions."
    ]
    if "baseline.worst_mean" in have:
        found.append(
            f"Without a persona, mean alignment is lowest after {link('baseline.worst')} "
            f"({link('baseline.worst_mean')} of a hundred points)."
        )
    if "em.rate" in have:
        found.append(
            f"The rate of emergent misalignment reaches {link('em.rate')} % ({link('em.interval')}) after "
            f"{link('em.dataset')}."
        )
    if "gates.most_accuracy" in have:
        found.append(
            f"A classifier that must name the persona of a response is right in {link('gates.least_accuracy')} % of "
            f"cases on {link('gates.least_dataset')} (chance {link('gates.least_chance')} %), and in "
            f"{link('gates.most_accuracy')} % on {link('gates.most_dataset')} (chance {link('gates.most_chance')} %)."
        )
    for v in _verdicts(x):
        name = f"verdict.{slug(v.label)}_{slug(v.model)}".replace("-", "_")
        how = f"`verdict` on {v.label} in {v.model}"
        numbers.add(name, v.verdict, "verdict", x.tables["verdicts"], how)
        found.append(
            f"{v.label} ({x.look.model(v.model)}), {v.published} by the published rules, is {link(name)} here."
        )
    return {"findings": " ".join(found) + "\n"}


def _figures(x: Inputs, folder: Path) -> dict[str, str]:
    """A block per figure; the first model's figure has the plain label, others the model's name in theirs.

    Figures of H3 and H4 come as they are, in two blocks of their own.
    """
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    by_key: dict[str, list[FigureRecord]] = {}
    extra: dict[str, list[str]] = {"trajectories": [], "steering": []}
    for source in x.figures:
        for record in _records(source):
            shutil.copyfile(source / record.svg, folder / "figures" / record.svg)
            stage = next((name for name in extra if name in str(source)), None)
            key = record.key if record.key in figure_module.TITLES else record.key.split("-")[0]
            if stage:
                label = f"fig-{stage}-{slug(record.key)}-{slug(record.model)}".rstrip("-")
                extra[stage].append(_figure(label, record))
            else:
                by_key.setdefault(key, []).append(record)
    blocks = {}
    for key, title in figure_module.TITLES.items():
        parts = []
        for number, record in enumerate(by_key.get(key, [])):
            label = f"fig-{key}" + (f"-{slug(record.key)}-{slug(record.model)}".rstrip("-") if number else "")
            parts.append(_figure(label, record))
        blocks[f"fig-{key}"] = "\n".join(parts) or absent(f"fig-{key}", title, STAGE_OF.get(key, "06_results"))
    return blocks | {f"fig-{stage}": "\n".join(parts) for stage, parts in extra.items()}


STAGE_OF = {"specification": "08_claims"}


def _figure(label: str, record: FigureRecord) -> str:
    alt = record.alt.replace('"', "'").replace("\\", "")
    image = f'![](_generated/figures/{record.svg}){{width=100% fig-alt="{alt}"}}'
    return floating(label, image, plain(record.caption))


def _sources(numbers: Numbers, paper: Path) -> str:
    rows = []
    for number in sorted(numbers.all.values(), key=lambda n: n.name):
        if not numbers.traced(number.name):
            continue
        target = os.path.relpath(numbers.repository / number.source, paper.resolve())
        rows.append(
            [f"[{number.name}]{{#n-{slug(number.name)}}}", number.value, number.unit,
             f"[`{number.source}`]({target})", number.how]
        )  # fmt: skip
    caption = "Where each number of the text comes from: the file, and how the number follows from it."
    return floating("tbl-sources", pipe_table(rows, ["Name", "Value", "Unit", "File", "How"], "lrlll"), caption)


def _versions(x: Inputs, numbers: Numbers, versions: Mapping[str, str]) -> str:
    rows = [[f"`{name}`", plain(version)] for name, version in sorted(versions.items())]
    return floating("tbl-versions", pipe_table(rows, ["Package", "Version"], "ll"), "Versions that made these results.")


def sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_generated(x: Inputs, versions: Mapping[str, str] | None = None) -> dict[str, Number]:
    """Write `_variables.yml` and `_generated/` from a profile's results, replacing what was there.

    Args:
        x: the results.
        versions: package -> version, for the reproducibility section.

    Returns:
        The numbers of the prose by name.
    """
    numbers = Numbers(x.repository)
    folder = x.paper / "_generated"
    shutil.rmtree(folder, ignore_errors=True)
    blocks = _figures(x, folder)
    for make in (_status, _grid, _alignment, _settings, _hypotheses, _comparisons, _gates, _outcomes, _findings):
        blocks |= make(x, numbers)
    for name, caption, stage in (
        ("claims", "Claims audit: in what share of the defensible analyses each published claim stands.", "08_claims"),
        ("reliability", "Agreement of repeated judgings of the same responses.", "05_validity"),
        ("power", "What designs can detect.", "05_validity"),
        ("trajectories", "H3: when misalignment arises, by persona.", "09_trajectories"),
        ("steering", "H4: transfer of the misalignment direction between personas.", "10_steering"),
    ):
        blocks |= _whole_table(x, numbers, name, f"tbl-{name}", caption, stage)
    blocks["claims"] += _sentences(x)
    _fill_unmeasured(x.paper, numbers)
    blocks["sources"] = _sources(numbers, x.paper)
    blocks["versions"] = _versions(x, numbers, versions or {})
    for name, text in blocks.items():
        (folder / f"{name}.md").write_text(text, encoding="utf-8")
    hashes = {os.path.relpath(p, numbers.repository): sha256(p) for p in sorted(numbers.files | set(x.tables.values()))}
    listing = {
        "profile": x.profile["name"],
        "repository": os.path.relpath(numbers.repository, x.paper.resolve()),
        "inputs": hashes,
        "used": sorted(numbers.used),
        "numbers": {name: asdict(n) for name, n in numbers.all.items()},
    }
    (folder / "sources.json").write_text(json.dumps(listing, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    text = yaml.safe_dump(numbers.tree(), allow_unicode=True, sort_keys=True, width=10_000)
    (x.paper / "_variables.yml").write_text("# Written by cai_em.paper: do not edit.\n" + text, encoding="utf-8")
    return dict(numbers.all)


def generate(study: params.Study, scores: pd.DataFrame, look: Look, folder: Path | None = None) -> dict[str, Number]:
    """`write_generated` for a study: everything that its run has written, whatever was run.

    Args:
        study: the profile that the paper is to show.
        scores: its score table, one judge.
        look: labels and order.
        folder: the paper; the repository's by default.
    """
    repository = study.folder.parent
    inputs = Inputs(
        paper=Path(folder) if folder else repository / "paper",
        results=study.dir,
        profile={"name": study.name, "title": study.profile.title, "caveat": study.profile.caveat},
        scores=scores,
        score_files=study.score_files(),
        look=look,
        hypotheses=study.hypotheses,
        thresholds=study.thresholds.model_dump() | {"file": study.folder / "thresholds.yaml"},
        settings=list(_study_settings(study)),
        tables=find_tables(study.dir),
        figures=find_figures(study.dir),
        repository=repository,
    )
    return write_generated(inputs, run.versions())


def _study_settings(study: params.Study) -> Iterator[tuple[str, str, object, Path]]:
    """Lines of the methods table: what the presets of a profile set; what is off or empty is left out."""
    presets = {
        "preference pairs": (study.generator, "generators"),
        "persona": (study.persona_training, "training"),
        "fine-tuning": (study.em_training, "training"),
        "sampling": (study.sampling, "sampling"),
        "judge": (study.judge, "judges"),
    }

    def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
        for key, value in values.items():
            if isinstance(value, Mapping):
                yield from flat(value, f"{prefix}{key}.")
            elif value not in (None, False, "", [], 0) or key in ("seed", "temperature", "dropout"):
                yield f"{prefix}{key}", ", ".join(map(str, value)) if isinstance(value, list) else value

    for what, (preset, file) in presets.items():
        if preset is not None:
            for parameter, value in flat(preset.model_dump(mode="json", exclude={"api_key_env", "base_url", "kind"})):
                yield what, parameter, value, study.folder / f"{file}.yaml"


def _fill_unmeasured(paper: Path, numbers: Numbers) -> None:
    """Numbers that the prose uses and this run cannot give read "not measured", so that the page still renders."""
    for name in sorted({v for path in prose_files(paper) for v in VAR.findall(path.read_text(encoding="utf-8"))}):
        if name not in numbers.all and name.split(".")[0] in OPTIONAL:
            numbers.add(name, UNKNOWN, "text", None, "the stage that measures it was not run")


OPTIONAL = ("baseline", "comparisons", "em", "gates", "verdict")
"""Groups of variables that a run may lack."""


# --- The check ----------------------------------------------------------------------------------------------------

VAR = re.compile(r"\{\{<\s*var\s+([A-Za-z0-9_.\-]+)\s*>\}\}")
INCLUDE = re.compile(r"\{\{<\s*include\s+(\S+)\s*>\}\}")
CROSSREF = ("fig", "tbl", "sec", "eq", "lst")
ALLOWED_DIGITS = re.compile(r"\bH[1-9]\b")
"""Digits that are names: hypotheses."""


def prose_files(paper: Path) -> list[Path]:
    """The hand-written sources."""
    return sorted(paper.glob("*.qmd"))


def _blank(match: re.Match[str]) -> str:
    """Same number of lines, no text: positions stay right."""
    return re.sub(r"[^\n]", " ", match[0])


def _without_code(text: str) -> str:
    """Text without front matter, comments, code and mathematics that names symbols only."""
    text = re.sub(r"\A---\n.*?\n---\n", _blank, text, flags=re.S)
    for pattern in (r"<!--.*?-->", r"^```.*?^```", r"`[^`\n]*`"):
        text = re.sub(pattern, _blank, text, flags=re.S | re.M)
    return text


def _typed_digits(path: Path, text: str) -> list[str]:
    bare = _without_code(text)
    for pattern in (
        r"\{\{<.*?>\}\}",
        r"\]\([^)\n]*\)",
        r"\{[^}\n]*\}",
        r"(?<!\w)-?@[A-Za-z][\w:.\-]*",
        r"https?://\S+",
    ):
        bare = re.sub(pattern, _blank, bare)
    bare = ALLOWED_DIGITS.sub("", bare)
    return [
        f"{path.name}:{n}: a typed number {m[0]!r}: use {{{{< var … >}}}} or an included table"
        for n, line in enumerate(bare.splitlines(), 1)
        for m in re.finditer(r"[\w.,%]*\d[\w.,%]*", line)
    ]


def expand(paper: Path, path: Path, problems: list[str] | None = None, seen: tuple[Path, ...] = ()) -> str:
    """A source with its includes in place, as Quarto does it: as text, paths relative to `paper`."""
    text = path.read_text(encoding="utf-8")
    problems = [] if problems is None else problems
    lines = []
    for n, line in enumerate(text.splitlines(), 1):
        match = INCLUDE.search(line)
        if not match:
            lines.append(line)
            continue
        target = paper / match[1]
        if line.strip() != match[0]:
            problems.append(f"{path.name}:{n}: an include must stand alone on its line: {line.strip()!r}")
        elif target in seen:
            problems.append(f"{path.name}:{n}: {match[1]} includes itself")
        elif not target.is_file():
            problems.append(f"{path.name}:{n}: included file {match[1]} does not exist: run a profile first")
        else:
            lines += ["", expand(paper, target, problems, (*seen, target)), ""]
    return "\n".join(lines)


def check(paper: Path, main: str = "index.qmd") -> list[str]:
    """Everything that would make the paper wrong, one line each; empty when it is sound.

    Quarto only warns of references that do not resolve, so they are errors here.
    """
    paper = Path(paper)
    problems: list[str] = []
    whole = expand(paper, paper / main, problems)
    for path in prose_files(paper):
        problems += _typed_digits(path, path.read_text(encoding="utf-8"))
    problems += _check_variables(paper)
    problems += _check_references(paper, _without_code(whole))
    problems += _check_stale(paper)
    included = {m for path in prose_files(paper) for m in INCLUDE.findall(path.read_text(encoding="utf-8"))}
    problems += [f"{p.name}: no source includes it" for p in prose_files(paper) if p.name not in {main, *included}]
    return problems


def _check_variables(paper: Path) -> list[str]:
    file = paper / "_variables.yml"
    if not file.is_file():
        return ["_variables.yml does not exist: run a profile first"]
    flat: dict[str, Any] = {}

    def walk(node: Mapping[str, Any], prefix: str) -> None:
        for key, value in node.items():
            if isinstance(value, Mapping):
                walk(value, f"{prefix}{key}.")
            else:
                flat[f"{prefix}{key}"] = value

    walk(yaml.safe_load(file.read_text(encoding="utf-8")) or {}, "")
    problems, used = [], set()
    for path in prose_files(paper):
        for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            for name in VAR.findall(line):
                used.add(name)
                if name not in flat:
                    problems.append(f"{path.name}:{n}: variable {name} is not in _variables.yml")
    listing = paper / "_generated" / "sources.json"
    written = set(json.loads(listing.read_text(encoding="utf-8"))["used"]) if listing.is_file() else set()
    problems += [f"_variables.yml: {name} is used nowhere" for name in sorted(set(flat) - used - written)]
    return problems


def _check_references(paper: Path, text: str) -> list[str]:
    problems = []
    labels = re.findall(rf"\{{#((?:{'|'.join(CROSSREF)})-[\w\-]+)", text)
    anchors = set(re.findall(r"\{[^}]*#([\w\-]+)", text))
    problems += [
        f"label {label} is defined {labels.count(label)} times"
        for label in sorted(set(labels))
        if labels.count(label) > 1
    ]
    bibliography = (paper / "references.bib").read_text(encoding="utf-8")
    keys = re.findall(r"^@\w+\{([^,\s]+),", bibliography, flags=re.M)
    cited = set()
    for name in re.findall(r"(?<![\w\\])@([A-Za-z]\w*(?:[:.\-]\w+)*)", re.sub(r"\{\{<.*?>\}\}", "", text)):
        if name.split("-")[0] in CROSSREF and "-" in name:
            if name not in labels:
                problems.append(f"reference @{name} has no target")
        elif name not in keys:
            problems.append(f"citation @{name} is not in references.bib")
        else:
            cited.add(name)
    problems += [f"references.bib: {key} is cited nowhere" for key in keys if key not in cited]
    problems += [f"references.bib: {key} is given twice" for key in sorted(set(keys)) if keys.count(key) > 1]
    for target in sorted(set(re.findall(r"\]\(#([\w\-]+)\)", text))):
        if target not in anchors:
            problems.append(f"link to #{target} has no target")
    for image in re.findall(r"!\[[^\]]*\]\(([^)\s]+)", text):
        if not (paper / image).is_file():
            problems.append(f"image {image} does not exist")
    return sorted(set(problems))


def _check_stale(paper: Path) -> list[str]:
    file = paper / "_generated" / "sources.json"
    if not file.is_file():
        return ["_generated/sources.json does not exist: run a profile first"]
    listing = json.loads(file.read_text(encoding="utf-8"))
    repository = (paper / listing["repository"]).resolve()
    problems = []
    for name, wanted in listing["inputs"].items():
        path = repository / name
        if not path.is_file():
            problems.append(f"_generated/ was made from {name}, which is gone")
        elif sha256(path) != wanted:
            problems.append(f"_generated/ is stale: {name} has changed since")
    return problems


def variables(paper: Path) -> dict[str, Any]:
    """The nested mapping of `_variables.yml`."""
    return yaml.safe_load((paper / "_variables.yml").read_text(encoding="utf-8")) or {}


def substitute(text: str, values: Mapping[str, Any]) -> str:
    """Text with `{{< var … >}}` replaced, outside code.

    Raises:
        KeyError: a variable that is not there.
    """

    def look_up(match: re.Match[str]) -> str:
        node: Any = values
        for part in match[1].split("."):
            node = node[part]
        return str(node)

    return VAR.sub(look_up, text)


# --- The preview --------------------------------------------------------------------------------------------------


class PaperError(RuntimeError):
    """The paper cannot be rendered; the message says why."""


def preview(paper: Path, out: Path, main: str = "index.qmd") -> Path:
    """Render the paper without Quarto, as a preview: one self-contained HTML page, or Typst source for a PDF.

    Includes and variables are put in place as Quarto would; pandoc with citeproc and `_preview/filter.lua` does
    numbering, cross-references and callouts.

    Args:
        paper: the folder of the prose.
        out: `.html` or `.typ`.

    Raises:
        PaperError: an include, a variable, a reference or a citation does not resolve.
    """
    paper, out = Path(paper).resolve(), Path(out).resolve()
    problems: list[str] = []
    text = expand(paper, paper / main, problems)
    if problems:
        raise PaperError("\n".join(problems))
    try:
        text = substitute(text, variables(paper))
    except KeyError as error:
        raise PaperError(f"variable {error} is not in _variables.yml: run a profile first") from error
    config = yaml.safe_load((paper / "_quarto.yml").read_text(encoding="utf-8"))
    command = [pypandoc.get_pandoc_path(), "--from", "markdown", "--standalone",
               "--toc", "--toc-depth=2", "--number-sections", "--mathml", 
               "--lua-filter", str(paper / "_preview" / "filter.lua"), "--citeproc",
               "--bibliography", str(paper / config["bibliography"]), "--metadata", "link-citations=true",
               "--resource-path", str(paper), "--output", str(out)]  # fmt: skip
    if out.suffix == ".html":
        command += ["--to", "html5", "--embed-resources", "--section-divs",
                    "--css", str(paper / "_preview" / "preview.css"), "--metadata", "lang=en"]  # fmt: skip
    else:
        for extra in config["format"]["typst"].get("include-in-header", []):
            command += ["--variable", f"header-includes={extra['text']}"]
    out.parent.mkdir(parents=True, exist_ok=True)
    run = subprocess.run(command, input=text, text=True, capture_output=True, cwd=paper, check=False)
    if run.returncode or "[WARNING]" in run.stderr or "unresolved" in run.stderr:
        raise PaperError(f"pandoc: {run.stderr.strip() or 'failed'}")
    return out


# --- The command line ---------------------------------------------------------------------------------------------


def build(paper: Path, out: Path) -> str:
    """Check the paper and render it to `out`: by Quarto where it is installed, else as the built-in preview.

    Args:
        paper: the folder of the prose, with its generated half.
        out: where the HTML page goes; Quarto's PDF goes beside it.

    Returns:
        What was made, in words.

    Raises:
        PaperError: the check found problems, or the rendering failed.
    """
    problems = check(paper)
    if problems:
        raise PaperError("the paper is not sound:\n" + "\n".join(problems))
    out.parent.mkdir(parents=True, exist_ok=True)
    quarto = shutil.which("quarto")
    if quarto is None:
        preview(paper, out)
        return f"{out}: a preview by pandoc; for the paper itself install Quarto and run `quarto render {paper}`"
    run_quarto = subprocess.run([quarto, "render", str(paper)], capture_output=True, text=True, check=False)
    if run_quarto.returncode:
        raise PaperError(f"quarto render {paper} failed:\n{run_quarto.stdout}\n{run_quarto.stderr}")
    for name in ("index.html", "index.pdf"):
        if (paper / name).is_file():
            shutil.copyfile(paper / name, out.with_name(name))
    return f"{out}: rendered by Quarto"


def main(arguments: Sequence[str]) -> int:
    """Command line: `python -m cai_em.paper check|build [PAPER] [OUT]`."""
    command, *rest = arguments or ["check"]
    paper = Path(rest[0]) if rest else params.root() / "paper"
    if command == "check":
        problems = check(paper)
        print("\n".join(problems) or f"{paper}: sound")
        return int(bool(problems))
    if command == "build" and len(rest) == 2:
        try:
            print(build(paper, Path(rest[1])))
        except PaperError as error:
            print(error, file=sys.stderr)
            return 1
        return 0
    print(main.__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
