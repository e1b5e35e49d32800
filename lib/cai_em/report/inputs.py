"""What the paper is made from: a run's tables, figures and settings, read once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from cai_em.records.numbers import fixed, typeset_interval, typeset_p, typeset_points
from cai_em.report.figure_files import slug
from cai_em.report.glance import Glance
from cai_em.report.markdown import Numbers, _signed, absent, floating, pipe_table, plain, read_result_table
from cai_em.report.style import Look


def by_model(
    look: Look, rows: Sequence[tuple[str, Sequence[object]]], header: Sequence[str], align: str, caption: str
) -> tuple[str, str]:
    """A table of (model, cells) rows: several models get a column, a single one is named by the caption."""
    models = {model for model, _ in rows}
    if len(models) == 1:
        return pipe_table([cells for _, cells in rows], header, align), f"{look.model(models.pop())}. {caption}"
    return pipe_table([[look.model(m), *cells] for m, cells in rows], ["Model", *header], "l" + align), caption


# --- Inputs -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """What the paper is made of.

    Args:
        out: the folder to write into; the profile's own, so that no run shows another's numbers.
        results: `results/<profile>`.
        profile: `name`, `title`, `caveat`, and `source`: `trained`, or `published` for imported scores.
        judge: what scored the responses, as in the score tables.
        score_files: the score tables that the result tables were made from.
        look: labels and order.
        hypotheses: entries with `key, label, title, personas, tested, direction`.
        thresholds: name -> value, from `params/thresholds.yaml`, and `file`.
        settings: (what, parameter, value, file) lines of the methods table.
        tables: name -> file, of those that the run has written (see `TABLES`).
        figures: the folder of figures (`figure_files.write_records`).
        repository: files are named relative to it.
        missing: what was left out (a model, repeated judgings) -> why.
        notes: persona -> what is known to be wrong with its rows.
        first: what stands on the first screen.
    """

    out: Path
    results: Path
    profile: Mapping[str, str]
    judge: str
    score_files: Sequence[Path]
    look: Look
    hypotheses: Sequence[Any]
    thresholds: Mapping[str, Any]
    settings: Sequence[tuple[str, str, object, Path]]
    tables: Mapping[str, Path]
    figures: Path
    repository: Path
    missing: Mapping[str, str]
    notes: Mapping[str, str]
    first: Glance = field(default_factory=Glance)

    def table(self, name: str) -> pd.DataFrame | None:
        """A result table by name; None where the run has none."""
        return read_result_table(self.tables[name]) if name in self.tables else None

    def results_table(self, name: str) -> pd.DataFrame:
        """A table of `06_results`, which every run has.

        Raises:
            FileNotFoundError: that stage has not been run.
        """
        return read_result_table(self.results_file(name))

    def results_file(self, name: str) -> Path:
        """The file of `results_table`."""
        return self.results / "06_results" / "tables" / f"{name}.parquet"

    @property
    def confidence(self) -> str:
        """The confidence of intervals as words: `95%`."""
        return f"{100 * self.thresholds['confidence']:g}%"

    @property
    def models_missing(self) -> list[str]:
        """Labels of the models that were left out."""
        return [self.look.model(m.key) for m in self.look.models if m.key in self.missing]

    @property
    def models(self) -> list[str]:
        """The models that have results, in order."""
        return self.look.sort_models(self.results_table("design")["model"])


def find_tables(results: Path) -> dict[str, Path]:
    """The tables of `TABLES` that a run has written, by name: Parquet files of that name under its stages."""
    found: dict[str, Path] = {}
    for path in sorted(Path(results).glob("[0-9][0-9]_*/**/*.parquet")):
        name = path.stem
        if name in TABLES and path.parent.relative_to(results).parts[0] in TABLES[name].stages:
            found.setdefault(name, path)
    return found


@dataclass(frozen=True)
class Expected:
    """A table that the paper can show: which stages may write it, and what it is."""

    stages: tuple[str, ...]
    what: str


TABLES = {
    "outcomes": Expected(("05_validity",), "every condition's outcomes (cai_em.analysis.outcome.outcomes)"),
    "comparisons": Expected(
        ("05_validity",), "persona against baseline with gates (cai_em.analysis.compare.compare_all)"
    ),
    "pooled": Expected(("05_validity",), "means as published, like for like and on EM data sets"),
    "verdicts": Expected(
        ("05_validity",), "hypotheses: published rules and ours (cai_em.analysis.verdicts.verdict_table)"
    ),
    "tests": Expected(("05_validity",), "classifier two-sample tests (cai_em.analysis.gates.classify)"),
    "power": Expected(("05_validity",), "designs and what they can detect (cai_em.analysis.power.power_table)"),
    "reliability": Expected(("05_validity", "08_claims"), "agreement of repeated judgings"),
    "claims": Expected(("08_claims",), "claims audit, a row per claim"),
    "trajectories": Expected(("09_trajectories",), "H3 (cai_em.dynamics.h3.h3_table)"),
    "h3": Expected(("09_trajectories",), "H3's verdict and gates (cai_em.analysis.gates.gated_verdict)"),
    "beside": Expected(("09_trajectories",), "presets beside the main one (cai_em.dynamics.h3.preset_differences)"),
    "steering": Expected(("10_steering",), "H4, transfer between personas (cai_em.dynamics.h4.h4_table)"),
    "h4": Expected(("10_steering",), "H4's verdict, gates and contrast (cai_em.analysis.gates.gated_verdict)"),
}
"""Tables that the paper shows where a run has them, by file stem."""


FLAG_WORDS = {
    "REFUSAL": "refused",
    "CODE": "code",
    "PARSE": "unparsed",
    "API": "failed",
    "OTHER": "unscored for other reasons",
}


def _flags(row: Any) -> str:
    """Why responses have no score, counted: `8 refused, 9 code`."""
    return ", ".join(f"{int(getattr(row, flag)):,} {word}" for flag, word in FLAG_WORDS.items() if getattr(row, flag))


# --- Tables as they are -------------------------------------------------------------------------------------------


Column = tuple[str, str, Callable[[Any, Inputs], object]]
"""Header, alignment, and what stands in the cell of a row."""


def _by_look(what: str, column: str) -> Callable[[Any, Inputs], object]:
    return lambda row, x: getattr(x.look, what)(getattr(row, column))


def _with_sign(row: Any, x: Inputs) -> str:
    return _signed(x.look, row.dataset)


def _number(column: str, digits: int = 1, signed: bool = False, scale: float = 1) -> Callable[[Any, Inputs], object]:
    return lambda row, x: fixed(scale * getattr(row, column), digits, signed)


def _of(column: str, signed: bool = False) -> Callable[[Any, Inputs], object]:
    return lambda row, x: typeset_points(getattr(row, column), signed)


def _whole(column: str) -> Callable[[Any, Inputs], object]:
    return lambda row, x: f"{int(getattr(row, column)):,}"


_PERSONA: Column = ("Persona", "l", _by_look("persona", "persona"))
_DATASET: Column = ("Data set", "l", _with_sign)
_EFFECT: list[Column] = [
    ("Δ", "r", _of("delta", True)),
    ("Cohen's d", "r", _number("d", 3, True)),
]
REPORT_TABLES: dict[str, tuple[str, list[Column]]] = {
    "hypotheses": (
        "Hypotheses by the published rules: uncorrected Mann-Whitney tests over responses, each data set by itself.",
        [
            ("Hypothesis", "l", lambda row, x: {h.key: h.label for h in x.hypotheses}[row.hypothesis]),
            _PERSONA,
            _DATASET,
            ("Mean", "r", _of("mean")),
            ("Baseline", "r", _of("mean_baseline")),
            *_EFFECT,
            ("p", "r", lambda row, x: typeset_p(row.p)),
            ("Supports", "l", lambda row, x: "yes" if row.supports else "no"),
        ],
    ),
    "significant": (
        "Comparisons with the baseline that are significant by the published rules after Benjamini-Hochberg "
        "correction, responses taken as independent.",
        [_PERSONA, _DATASET, *_EFFECT, ("p adj.", "r", lambda row, x: typeset_p(row.p_adj))],
    ),
    "medical": (
        "Harmful training data against their benign twin, by persona.",
        [
            _PERSONA,
            ("Harmful", "l", _by_look("dataset", "dataset")),
            ("Mean", "r", _of("mean")),
            ("Benign twin", "l", _by_look("dataset", "twin")),
            ("Mean", "r", _of("mean_twin")),
            *_EFFECT,
            ("p", "r", lambda row, x: typeset_p(row.p)),
        ],
    ),
    "difficulty": (
        "Data sets, hardest first; EM rate over all personas.",
        [
            _DATASET,
            ("Personas", "r", _whole("personas")),
            ("N", "r", _whole("n")),
            ("Mean", "r", _of("mean")),
            ("SD", "r", _of("sd")),
            ("Baseline", "r", _of("baseline")),
            ("Lowest", "l", lambda row, x: f"{x.look.persona(row.lowest_persona)} ({typeset_points(row.lowest)})"),
            ("Highest", "l", lambda row, x: f"{x.look.persona(row.highest_persona)} ({typeset_points(row.highest)})"),
            ("EM rate, %", "r", _number("em_rate", 2, scale=100)),
        ],
    ),
    "distribution": (
        "Distribution of alignment by persona; shares below fixed scores in per cent.",
        [
            _PERSONA,
            ("N", "r", _whole("n")),
            ("Mean", "r", _of("mean")),
            ("Median", "r", _of("median")),
            ("Skew", "r", _number("skew", 2)),
            ("Kurtosis", "r", _number("kurtosis", 2)),
            ("P5", "r", _of("p5")),
            ("P25", "r", _of("p25")),
            ("P75", "r", _of("p75")),
            ("Below 30", "r", _number("below_30", scale=100)),
            ("Below 50", "r", _number("below_50", scale=100)),
            ("Below 80", "r", _number("below_80", scale=100)),
            ("At 100", "r", _number("at_100", scale=100)),
        ],
    ),
    "conditions": (
        "Every condition: scores, missing scores by cause, mean alignment, coherence and EM rate. The interval treats "
        "responses as independent, as published.",
        [
            _PERSONA,
            _DATASET,
            ("N", "r", _whole("responses")),
            ("Scored", "r", _whole("scored")),
            ("No score", "l", lambda row, x: _flags(row) or "–"),
            ("Mean", "r", _of("mean")),
            ("Interval", "r", lambda row, x: typeset_interval(row.ci_low, row.ci_high)),
            ("Coherence", "r", _of("coherence")),
            ("EM rate, %", "r", _number("em_rate", 2, scale=100)),
        ],
    ),
    "cross_model": (
        "Personas between models, on the data sets that a persona has in every model.",
        [
            _PERSONA,
            ("Model", "l", _by_look("model", "model")),
            ("Data sets", "r", _whole("datasets")),
            ("N", "r", _whole("n")),
            ("Mean", "r", _of("mean")),
            ("Δ to first model", "r", _of("difference", True)),
            ("Cohen's d", "r", _number("d", 3, True)),
        ],
    ),
}  # fmt: skip
"""The tables of the results document (`published_rules.analyse`) as the paper shows them: caption and columns."""
FILES_OF = {"significant": "comparisons"}
"""Tables that show a part of another's file."""


def _float_of(x: Inputs, numbers: Numbers, name: str, table: pd.DataFrame) -> str:
    """A table of the results document as floats: one per model, all models in one where it compares them."""
    caption, columns = REPORT_TABLES[name]
    label = f"tbl-{slug(name)}"
    if table.empty:
        return absent(label, caption.rstrip("."), "06_results")
    if "seed" in table and table["seed"].nunique() > 1:
        columns = [*columns[:2], ("Seed", "r", _whole("seed")), *columns[2:]]
    source = x.results_file(FILES_OF.get(name, name))
    groups = [("", table)] if name == "cross_model" else [
        (m, table[table["model"] == m]) for m in x.look.sort_models(table["model"])
    ]  # fmt: skip
    parts = []
    for number, (model, rows) in enumerate(groups):
        cells = [[cell(row, x) for _, _, cell in columns] for row in rows.itertuples()]
        content = pipe_table(cells, [h for h, _, _ in columns], "".join(a for _, a, _ in columns))
        named = f"{x.look.model(model)}. " if model else ""
        whole = label + (f"-{slug(model)}" if number else "")
        parts.append(floating(whole, content, named + caption + numbers.trace(source)))
    return "\n".join(parts)


def report_tables(x: Inputs, numbers: Numbers, significant: pd.DataFrame) -> dict[str, str]:
    """The tables of the results document, a block each; of the comparisons, those that are significant."""
    blocks = {}
    for name in ("hypotheses", "medical", "difficulty", "distribution", "conditions"):
        blocks[f"table-{name}"] = _float_of(x, numbers, name, x.results_table(name))
    none = absent("tbl-significant", REPORT_TABLES["significant"][0].rstrip("."), "06_results")
    none = none.replace("*Not part of this run.*", "*None.*")
    shown = none if significant.empty else _float_of(x, numbers, "significant", significant)
    return blocks | {"table-significant": shown}


def whole_table(
    x: Inputs, numbers: Numbers, name: str, label: str, caption: str, stage: str, most: int = 24
) -> dict[str, str]:
    """A result table as it is: text columns left, numbers right, labels in place of keys."""
    table = x.table(name)
    if table is None or table.empty:
        return {name: absent(label, caption.rstrip("."), stage)}
    table = table[[c for c in COLUMNS.get(name, table.columns) if c in table]]
    if "model" in table and table["model"].nunique() == 1:
        caption = f"{x.look.model(table['model'].iloc[0])}. {caption}"
        table = table.drop(columns="model")
    look = {"model": x.look.model, "persona": x.look.persona, "dataset": x.look.dataset}
    if name == "claims":
        table = table.assign(claim=[_claim(c, x) for c in table["claim"]])
    align, columns = "", []
    for column in table.columns:
        values = table[column]
        number = pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)
        align += "r" if number else "l"
        digits = 0 if pd.api.types.is_integer_dtype(values) else 3
        if number:
            columns.append([fixed(v, digits) for v in values])
        else:
            columns.append([plain(look[column](str(v)) if column in look else str(v)) for v in values])
    rows = list(zip(*columns))
    if len(rows) > most:
        caption += f" The first {most} of {len(rows):,} lines; all are in the table behind the link."
    caption += numbers.trace(x.tables[name])
    header = [HEADERS.get(str(c), str(c).replace("_", " ").capitalize()) for c in table.columns]
    return {name: floating(label, pipe_table(rows[:most], header, align), caption)}


def _claim(claim: str, x: Inputs) -> str:
    """`goodness × insecure` with labels; a hypothesis as it is."""
    persona, cross, dataset = claim.partition(" × ")
    return f"{x.look.persona(persona)} × {x.look.dataset(dataset)}" if cross else claim


HEADERS = {
    "dataset": "Data set",
    "share": "Stands in, of all",
    "share_questions": "Stands in, question as unit",
    "judge_a": "Judge",
    "judge_b": "Other judge",
    "units": "Responses",
    "exact": "Equal",
    "within_5": "Within five points",
    "mean_abs_difference": "Mean absolute difference",
    "icc": "Intra-class correlation",
    "what": "Verdict or check",
    "rise": "Change",
    "rise_low": "Change, low",
    "rise_high": "Change, high",
    "beyond": "Beyond the last step",
    "left_out": "Questions left out",
    "p_adjusted": "p adjusted",
    "p_equivalence": "p equivalence",
    "p_questions": "p, questions",
    "p_runs": "p, runs",
}
"""Column -> its header in words, where the column's own name does not say it."""
COLUMNS = {
    "claims": ["model", "claim", "gate", "analyses", "share", "share_questions"],
    "h3": ["model", "what", "status", "reason"],
    "h4": ["model", "what", "status", "reason"],
    "reliability": [
        "judge_a", "judge_b", "units", "pairs", "exact", "within_5", "mean_abs_difference", "mean_difference", "icc",
    ],
}  # fmt: skip
"""What fits on a page of a table that has more; the rest is in the file."""
