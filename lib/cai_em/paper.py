"""The paper's generated half: numbers, sentences, tables and figures from a run's results.

Prose stands in `paper/*.qmd` and holds no number of its own. `write_generated` writes into a folder of the run

- `_variables.yml`: every number of the prose, as `{{< var group.name >}}`; each is a link to its line in the appendix,
  which links to a table beside the page;
- `_generated/*.md`: sentences that depend on what was run, tables and figures with captions, labels and alternative
  text, included by the prose;
- `_generated/tables/*.csv`: every table that a number, a table or a figure of the page was taken from;
- `_generated/sources.json`: value, unit, table and rule of every number; hashes of all files that were read.

Nothing is computed here: what is shown stands in a table of `05_validity`, `06_results` or a later stage. Every block
exists whatever the profile: where a part has not been run, the block says so, so that the same prose renders after a
demo and after the full study. `cai_em.render` checks and renders what is written here.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from cai_em import figures as figure_module
from cai_em import params, published, report, run
from cai_em.figures import BASELINE, NO_DATASET, FigureRecord, slug
from cai_em.style import Look

GENERATED = "_generated"
VARIABLES = "_variables.yml"
LISTING = "sources.json"
TABLES_FOLDER = f"{GENERATED}/tables"


# --- Numbers that know where they come from -----------------------------------------------------------------------


@dataclass(frozen=True)
class Number:
    """A value of the prose: formatted, with unit, the table beside the page that holds it, and how it follows."""

    name: str
    value: str
    unit: str
    table: str
    how: str


class Numbers:
    """The values that the paper may use, and the tables that they come from.

    Args:
        repository: files are named relative to it.
        results: `results/<profile>`.
    """

    def __init__(self, repository: Path, results: Path) -> None:
        self.repository, self.results = repository.resolve(), Path(results).resolve()
        self.all: dict[str, Number] = {}
        self.used: set[str] = set()
        self.files: set[Path] = set()
        self.tables: dict[str, tuple[Path, pd.DataFrame | None, int]] = {}

    def add(self, name: str, value: object, unit: str, source: Path | str, how: str) -> str:
        """Record a value; returns it as a link to its line in the appendix.

        Args:
            name: `group.name`.
            value: formatted.
            unit: of the value; `text` for mere names, which are not traced.
            source: the result table that holds it, or the name that `csv` gave to one.
            how: how it follows from the table.

        Raises:
            ValueError: the name is not `group.name` in lower case, or is taken.
        """
        if not re.fullmatch(r"[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)+", name):
            raise ValueError(f"variable name {name!r}: expected words in lower case joined by dots")
        if name in self.all:
            raise ValueError(f"variable {name!r} is given twice")
        self.all[name] = Number(name, str(value), unit, self.csv(source) if isinstance(source, Path) else source, how)
        return self.markdown(name)

    def cite(self, name: str, value: object, unit: str, source: Path | str, how: str) -> str:
        """Record a value that generated text uses; returns it as a link."""
        self.add(name, value, unit, source, how)
        return self.link(name)

    def relative(self, source: Path) -> str:
        """A file relative to the repository, noted as read."""
        self.files.add(Path(source).resolve())
        return os.path.relpath(Path(source).resolve(), self.repository)

    def csv(self, source: Path, frame: pd.DataFrame | None = None, stem: str = "", more: int = 0) -> str:
        """The name of the table beside the page that holds a result table; it is written with the other tables.

        Args:
            source: a Parquet or CSV file; or any file, with `frame` as what to show of it.
            frame: what to write in place of the whole file.
            stem: what to call it; the file's own stem by default.
            more: how many further files `frame` was gathered from.

        Raises:
            ValueError: two files would get the same name.
        """
        source = Path(source).resolve()
        self.relative(source)
        inside = source.is_relative_to(self.results)
        place = source.relative_to(self.results).parts[0] if inside else source.parent.name
        name = f"{place}_{stem or source.stem}.csv"
        if self.tables.get(name, (source,))[0] != source:
            raise ValueError(f"{name}: both {self.tables[name][0]} and {source} would be written under this name")
        if frame is not None or name not in self.tables:
            self.tables[name] = (source, frame, more)
        return name

    def trace(self, *sources: Path) -> str:
        """The end of a caption: links to the tables that the float was made from."""
        names = [self.csv(source) for source in sources]
        return " Table: " + ", ".join(f"[`{n}`]({TABLES_FOLDER}/{n})" for n in names) + "." if names else ""

    def traced(self, name: str) -> bool:
        """Whether a value has a line in the appendix: measurements and verdicts have, mere names have not."""
        number = self.all[name]
        return bool(number.table) and number.unit != "text"

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

    def write_tables(self, folder: Path) -> None:
        """The tables beside the page, as CSV; floats with ten digits."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, (source, frame, _) in self.tables.items():
            frame = read_table(source) if frame is None else frame
            frame.to_csv(folder / name, index=False, float_format="%.10g")


# --- Markdown -----------------------------------------------------------------------------------------------------


def pipe_table(rows: Sequence[Sequence[object]], header: Sequence[str], align: str) -> str:
    """A pipe table whose dashes are as wide as its columns: pandoc takes relative widths of wide tables from them.

    Args:
        align: one of `l`, `r`, `c` per column.
    """
    cells = [[str(c).replace("|", "\\|").replace("\n", " ") for c in row] for row in [list(header), *rows]]
    shown = [[re.sub(r"\]\([^)]*\)|\{#[^}]*\}|[\[`\\*]", "", c) for c in row] for row in cells]
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


def count_of(number: int, noun: str) -> str:
    """`1 data set`, `2 data sets`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def listed(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return ", ".join(words[:-1]) + " and " + words[-1] if len(words) > 1 else "".join(words)


def _fixed(value: float | None, digits: int = 1, signed: bool = False) -> str:
    if value is None or pd.isna(value):
        return "–"
    return f"{float(value):{'+' if signed else ''}.{digits}f}".replace("-", "−")


def _points(value: float | None, signed: bool = False) -> str:
    """Points of alignment, rounded as everywhere in the results document (see `cai_em.report`)."""
    return _fixed(None if value is None else round(value, 2), 1, signed)


def _interval(low: float, high: float, digits: int = 1, signed: bool = False) -> str:
    if pd.isna(low):
        return "–"
    low, high = (_points(v, signed) if digits == 1 else _fixed(v, digits, signed) for v in (low, high))
    return f"\\[{low},\u00a0{high}\\]"


def _to(low: float, high: float, digits: int = 1) -> str:
    return f"{_fixed(low, digits)} to {_fixed(high, digits)}"


def _p(value: float) -> str:
    return "–" if pd.isna(value) else "<\u00a00.001" if value < 0.001 else f"{value:.3f}"


def _percent(share: float, digits: int = 1) -> str:
    return _fixed(100 * share, digits)


def _signed(look: Look, dataset: str) -> str:
    """A data set's label and the sign of its role, which never stands on a line of its own."""
    return look.signed(dataset).replace(" ", "\u00a0")


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
        figures: folders of figures (`cai_em.figures.write_records`, or a stage's manifest with `captions`).
        repository: files are named relative to it.
        missing: what was left out (a model, repeated judgings) -> why.
        notes: persona -> what is known to be wrong with its rows.
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
    figures: Sequence[Path]
    repository: Path
    missing: Mapping[str, str]
    notes: Mapping[str, str]

    def table(self, name: str) -> pd.DataFrame | None:
        """A result table by name; None where the run has none."""
        return read_table(self.tables[name]) if name in self.tables else None

    def results_table(self, name: str) -> pd.DataFrame:
        """A table of `06_results`, which every run has.

        Raises:
            FileNotFoundError: that stage has not been run.
        """
        return read_table(self.results_file(name))

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


def find_figures(results: Path) -> list[Path]:
    """The folders of a run that hold figures with captions."""
    found = {path.parent for path in Path(results).glob("[0-9][0-9]_*/**/figures.json")}
    return sorted(found | {path for path in Path(results).glob("[0-9][0-9]_*/figures") if _captions(path)})


def _captions(folder: Path) -> dict[str, str]:
    """Captions of a stage that lists them in its manifest: SVG file -> caption."""
    manifest = folder.parent / run.MANIFEST
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
    "pooled": Expected(("05_validity",), "means as published, like for like and on EM data sets"),
    "verdicts": Expected(("05_validity",), "hypotheses: published rules and ours (cai_em.inference.verdict_table)"),
    "tests": Expected(("05_validity",), "classifier two-sample tests (cai_em.gates.classify)"),
    "power": Expected(("05_validity",), "designs and what they can detect (cai_em.inference.power_table)"),
    "reliability": Expected(("05_validity", "08_claims"), "agreement of repeated judgings"),
    "claims": Expected(("08_claims",), "claims audit (cai_em.claims.audit), a row per claim"),
    "trajectories": Expected(("09_trajectories",), "H3 (cai_em.trajectories.paper_table)"),
    "h3": Expected(("09_trajectories",), "H3's verdict and gates (cai_em.trajectories.check_table)"),
    "beside": Expected(("09_trajectories",), "presets beside the main one (cai_em.trajectories.preset_differences)"),
    "steering": Expected(("10_steering",), "H4, transfer between personas (cai_em.steering.paper_table)"),
    "h4": Expected(("10_steering",), "H4's verdict, gates and contrast (cai_em.trajectories.check_table)"),
}
"""Tables that the paper shows where a run has them, by file stem."""


# --- What this run is ---------------------------------------------------------------------------------------------


def _status(x: Inputs, numbers: Numbers) -> dict[str, str]:
    """The callout at the top: which profile, when, what it cannot show, what is missing or known to be wrong."""
    manifest = x.results / "06_results" / run.MANIFEST
    when = json.loads(manifest.read_text(encoding="utf-8"))["written"][:10] if manifest.is_file() else ""
    where = f"`{numbers.relative(x.score_files[0])}`"
    if len(x.score_files) > 1:
        where = f"the {len(x.score_files)} score tables under `{os.path.relpath(_common(x.score_files), x.repository)}`"
    caveat = plain(" ".join(x.profile.get("caveat", "").split()))
    paragraphs = [
        f"*{plain(x.profile['title'])}.* Every number below was computed{f' on {when}' if when else ''} from {where} "
        f"and the tables made from {'them' if len(x.score_files) > 1 else 'it'}; a click on a number leads to the "
        "table that it came from (@tbl-sources).",
        caveat,
        *(f"**Left out: {x.look.model(m)}.** {plain(why.split('; ')[0])}." for m, why in x.missing.items()),
        *_known_issues(x, list(x.notes)),
    ]
    kind = "important" if caveat or x.missing else "note"
    text = "\n\n".join(filter(None, paragraphs))
    title = f"## Results shown: profile {x.profile['name']}"
    return {"made-by-run_all": f"::: {{.callout-{kind}}}\n\n{title}\n\n{text}\n\n:::\n"}


def _common(files: Sequence[Path]) -> Path:
    return Path(os.path.commonpath([Path(f).resolve() for f in files]))


def _known_issues(x: Inputs, personas: Sequence[str]) -> list[str]:
    """Notes of personas as paragraphs; personas with the same note share one."""
    by_note: dict[str, list[str]] = {}
    for persona in x.look.sort_personas(p for p in personas if p in x.notes):
        by_note.setdefault(x.notes[persona], []).append(x.look.persona(persona))
    return [f"**Known issue** with {plain(listed(names))}: {plain(note)}." for note, names in by_note.items()]


def _remarks(x: Inputs, personas: Sequence[str]) -> str:
    """What must be known to read a table: models that are not in it, known issues of the personas that are."""
    parts = [f"**Left out:** {plain(m)}, whose results this run could not have." for m in x.models_missing]
    parts += _known_issues(x, personas)
    return "\n" + "\n\n".join(parts) + "\n" if parts else ""


def _grid(x: Inputs, numbers: Numbers) -> dict[str, str]:
    conditions, design, look = x.results_table("conditions"), x.results_table("design"), x.look
    source, models = x.results_file("conditions"), x.models
    tuned = conditions[conditions["dataset"] != NO_DATASET]
    roles = {d: look.role(d) for d in look.sort_datasets(tuned["dataset"])}

    def count(name: str, value: int, how: str, cite: bool = True) -> str:
        return (numbers.cite if cite else numbers.add)(f"grid.{name}", f"{value:,}", "count", source, how)

    count("questions", int(design["questions"].max()), "most questions of a condition (`design`)", cite=False)
    count("responses", int(conditions["responses"].sum()), "sum of `responses`", cite=False)
    unscored = int((conditions["responses"] - conditions["scored"]).sum())
    count("unscored", unscored, "sum of `responses` minus sum of `scored`", cite=False)
    numbers.add("grid.judge", x.judge, "text", source, "name of the judge")
    named = listed([look.model(m) for m in models])
    personas = int(tuned.loc[tuned["persona"] != BASELINE, "persona"].nunique())
    seeds = int(tuned.groupby(["model", "persona", "dataset"])["seed"].nunique().max())
    shown_seeds = count("seeds", seeds, "most distinct `seed` of a model, persona and data set")
    arms = _arms(conditions)
    text = (
        f"This run has {count('conditions', len(conditions), 'rows')} conditions of {plain(named)}: the baseline and "
        f"{count('personas', personas, 'distinct `persona` beside the baseline')} "
        f"persona{'' if personas == 1 else 's'}, "
        f"{count('datasets', len(roles), 'distinct `dataset` other than none')} data "
        f"set{'' if len(roles) == 1 else 's'}, and {'' if seeds == 1 else 'up to '}{shown_seeds} training "
        f"seed{'' if seeds == 1 else 's'} in a cell (@tbl-grid). "
    )
    text += (
        "All four arms are there.\n"
        if len(arms) == len(ARMS)
        else f"Of the four arms it has {listed([f'*{a}*' for a in arms])}, and no other: what fine-tuning changed "
        "cannot be told from it.\n"
        if not any(a in arms for a in ("base", "persona alone"))
        else f"Of the four arms it has {listed([f'*{a}*' for a in arms])}, and no other.\n"
    )
    rows = []
    for model in models:
        part = conditions[conditions["model"] == model]
        rows.append(
            [look.model(model), part["persona"].nunique(), part["dataset"].nunique(), len(part),
             f"{int(part['responses'].sum()):,}", f"{int(part['scored'].sum()):,}",
             _flags(part[list(FLAGS)].sum()) or "none"]
        )  # fmt: skip
    header = ["Model", "Personas", "Data sets", "Conditions", "Responses", "Scored", "Without a score"]
    caption = "What was analysed. A response without a score is kept with its reason; personas include the baseline."
    table = pipe_table(rows, header, "lrrrrrl")
    blocks = {"design": text, "grid": floating("tbl-grid", table, caption + numbers.trace(source))}
    return blocks | {"roles": _roles(roles, look, count), "samples": _samples(conditions, design, numbers, source)}


FLAGS = {"REFUSAL": "refused", "CODE": "code", "PARSE": "unparsed", "API": "failed", "OTHER": "unscored for other reasons"}


def _flags(row: Any) -> str:
    """Why responses have no score, counted: `8 refused, 9 code`."""
    return ", ".join(f"{int(getattr(row, flag)):,} {word}" for flag, word in FLAGS.items() if getattr(row, flag))


ARMS = ("base", "persona alone", "fine-tuning alone", "both")


def _arms(conditions: pd.DataFrame) -> list[str]:
    """The arms of the design that a run has."""
    baseline, tuned = conditions["persona"] == BASELINE, conditions["dataset"] != NO_DATASET
    masks = (baseline & ~tuned, ~baseline & ~tuned, baseline & tuned, ~baseline & tuned)
    return [arm for arm, mask in zip(ARMS, masks) if mask.any()]


def _roles(roles: Mapping[str, str], look: Look, count: Callable[..., str]) -> str:
    """Which data sets of the run have which role."""
    parts = []
    for role, name, one, more in (
        ("em", "em_datasets", "EM data set", "EM data sets"),
        ("benign_control", "controls", "benign control", "benign controls"),
        ("regularisation", "corpora", "regularisation corpus", "regularisation corpora"),
    ):
        sets = [look.dataset(d) for d, r in roles.items() if r == role]
        if sets or role == "em":
            number = count(name, len(sets), f"distinct `dataset` with role {role}")
            parts.append(f"{number} {one if len(sets) == 1 else more}" + (f" ({plain(listed(sets))})" if sets else ""))
    return f"This run has {listed(parts)}.\n"


def _samples(conditions: pd.DataFrame, design: pd.DataFrame, numbers: Numbers, source: Path) -> str:
    """How often a question was answered: conditions differ in it."""
    questions = conditions["model"].map(design.set_index("model")["questions"])
    times = (conditions["responses"] / questions).round().astype(int)
    usual = int(times.mode().max())
    rest = conditions[times != usual]
    how = "most common `responses` divided by the number of questions"
    text = (
        f"Each condition answers {numbers.link('grid.questions')} open questions, "
        f"{numbers.cite('grid.samples', usual, 'count', source, how)} times each"
    )
    if len(rest):
        fewest, most = int(times[rest.index].min()), int(times[rest.index].max())
        span = f"{fewest}" if fewest == most else f"{fewest} to {most}"
        others = numbers.cite("grid.samples_elsewhere", span, "count", source, "`responses` by questions, elsewhere")
        how = "conditions with another number of responses"
        some = numbers.cite("grid.other_samples", len(rest), "count", source, how)
        text += f"; {some} condition{'' if len(rest) == 1 else 's'} only {others} times"
    return text + ".\n"


def _provenance(x: Inputs, numbers: Numbers) -> dict[str, str]:
    """Whether this run trained and sampled, and what its manifests attest; or where its scores came from."""
    if x.profile.get("source") != "trained":
        text = (
            "**In this run** nothing was trained, sampled or judged: responses and scores are the published ones "
            "[@arenacapstone2026], read from a pinned commit and checked against its hashes. No adapter could be "
            "looked at. Which were active when a response was written can only be inferred from the responses "
            "(@sec-gates).\n"
        )
        return {"provenance": text}
    manifests = sorted((x.results / "02_finetune").rglob(run.MANIFEST))
    rows = []
    for path in manifests:
        record = json.loads(path.read_text(encoding="utf-8"))
        state = (record.get("adapter_state") or {}).get("after_last_step") or {}
        model, persona, dataset, seed = path.parent.relative_to(x.results / "02_finetune").parts
        active, trainable = (" + ".join(state.get(key) or []) for key in ("active", "trainable"))
        base = state.get("base_trainable")
        steps = (record.get("summary") or {}).get("steps")
        rows.append([model, persona, dataset, seed, active, trainable, base, state.get("base_dtype"), steps])
        numbers.relative(path)
    if not rows:
        return {"provenance": "**In this run** no manifest of a training was found: nothing can be said of adapters.\n"}
    header = ["model", "persona", "dataset", "seed", "active", "trainable", "base_trainable", "dtype", "steps"]
    frame = pd.DataFrame(rows, columns=header)
    table = numbers.csv(manifests[0], pd.DataFrame(rows, columns=header), "adapters", len(manifests) - 1)
    frame = numbers.tables[table][1]
    stacked = frame[frame["persona"] != BASELINE]
    right = stacked[(stacked["active"] == "persona + em") & (stacked["trainable"] == "em")]

    def number(key: str, value: int, how: str) -> str:
        return numbers.cite(f"adapters.{key}", f"{value:,}", "count", table, how)

    attested = number("right", len(right), "rows of these with active = persona + em and trainable = em")
    text = (
        f"**In this run** {number('trained', len(frame), 'rows')} EM adapters were trained, "
        f"{number('stacked', len(stacked), 'rows with a persona other than the baseline')} of them on top of a "
        f"persona. In {attested} of these the manifest records that both adapters took part in the forward pass and "
        f"that the EM adapter alone learned ([`{table}`]({TABLES_FOLDER}/{table})). The probe of the logits preceded "
        "every sampling; what it found is in the manifests of the responses.\n"
    )
    return {"provenance": text}


# --- Results ------------------------------------------------------------------------------------------------------


def _baseline(x: Inputs, model: str) -> pd.Series:
    """Mean alignment of the baseline on each data set of a model, all seeds together."""
    table = x.results_table("conditions")
    table = table[(table["model"] == model) & (table["persona"] == BASELINE) & (table["scored"] > 0)]
    sums = (table["mean"] * table["scored"]).groupby(table["dataset"]).sum()
    return sums / table.groupby("dataset")["scored"].sum()


def _alignment(x: Inputs, numbers: Numbers) -> dict[str, str]:
    """Means by persona: a table per model, and what it says of the first."""
    look, source = x.look, x.results_file("by_persona")
    table, pooled = x.results_table("by_persona"), x.table("pooled")
    shared = {} if pooled is None else pooled.set_index(["model", "persona"])["common_mean"].to_dict()
    blocks = []
    for number, model in enumerate(look.sort_models(table["model"])):
        here = table[table["model"] == model].set_index("persona")
        rows = [
            [look.persona(p), f"{int(row['n']):,}", _points(row["mean"]), _points(row["sd"]),
             _interval(row["ci_low"], row["ci_high"]), _interval(row["boot_low"], row["boot_high"]),
             int(row["datasets"]), *([_points(shared.get((model, p)))] if shared else [])]
            for p, row in ((p, here.loc[p]) for p in look.sort_personas(here.index))
        ]  # fmt: skip
        header = ["Persona", "N", "Mean", "SD", f"{x.confidence} CI", "Bootstrap CI", "Data sets"]
        caption = (
            f"Mean alignment by persona, {look.model(model)}, over fine-tuned conditions. Both intervals treat "
            "responses as independent, as the published document did; those over questions are in @fig-alignment."
        )
        if shared:
            header.append("Like for like")
            sets = pooled.loc[pooled["model"] == model, "common_datasets"].iloc[0]
            caption += (
                f" *Like for like*: the mean of the means on {count_of(len(sets.split(',')), 'data set')}, those that "
                "every persona has."
            )
        label = "tbl-alignment" + (f"-{slug(model)}" if number else "")
        trace = numbers.trace(source, *([x.tables["pooled"]] if shared else []))
        blocks.append(floating(label, pipe_table(rows, header, "l" + "r" * (len(header) - 1)), caption + trace))
    blocks.append(_remarks(x, []))
    return {"alignment": "\n".join(blocks), "alignment-text": _alignment_text(x, numbers)}


def _alignment_text(x: Inputs, numbers: Numbers) -> str:
    """What the first model's means say, with what they can be compared with."""
    look, model = x.look, x.models[0]
    base, source = _baseline(x, model), x.results_file("conditions")
    untuned, base = base.get(NO_DATASET), base.drop(NO_DATASET, errors="ignore")

    def mean(name: str, value: float, of: str) -> str:
        return numbers.cite(f"baseline.{name}", _points(value), "points", source, f"`mean`, baseline, {of}")

    parts = []
    if len(base) > 1:
        worst, best = base.idxmin(), base.idxmax()
        parts.append(
            f"In {plain(look.model(model))}, the baseline's mean alignment is lowest on {plain(look.dataset(worst))} "
            f"({mean('worst_mean', base[worst], worst)} points) and highest on {plain(look.dataset(best))} "
            f"({mean('best_mean', base[best], best)})."
        )
    elif len(base):
        parts.append(
            f"In {plain(look.model(model))}, the baseline's mean alignment on {plain(look.dataset(base.index[0]))} is "
            f"{mean('worst_mean', base.iloc[0], base.index[0])} points."
        )
    if untuned is not None:
        below = int((base < untuned).sum())
        how = "data sets on which the baseline's `mean` is below that without fine-tuning"
        parts.append(
            f"Without fine-tuning it is {mean('untuned_mean', untuned, 'none')}; it lies below that on "
            f"{numbers.cite('baseline.lowered', below, 'count', source, how)} of {count_of(len(base), 'data set')}."
        )
    elif len(base):
        parts.append(
            "There is no condition without fine-tuning in this run, so that these means compare data sets with each "
            "other, and none with the untouched model."
        )
    pooled = x.results_table("by_persona")
    pooled = pooled[pooled["model"] == model].set_index("persona")["mean"]
    if len(pooled) > 1:
        low, high = pooled.idxmin(), pooled.idxmax()
        values = (
            numbers.cite(
                f"persona.{k}_mean", _points(pooled[p]), "points", x.results_file("by_persona"), f"`mean` of {p}"
            )
            for k, p in (("lowest", low), ("highest", high))
        )
        parts.append(
            f"Pooled over their data sets, personas and baseline lie between {next(values)} "
            f"({plain(look.persona(low))}) and {next(values)} ({plain(look.persona(high))})."
        )
    return " ".join(parts) + "\n"


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
        (v.model, [v.label, f"{v.published} ({v.supporting} of {v.datasets})", f"**{v.verdict}**", plain(v.reason)])
        for v in found
    ]
    caption = (
        "Verdicts. *Published rules*: uncorrected tests over responses, all data sets counted, one persona per "
        "hypothesis. *Here*: every persona named, paired by question, corrected, EM data sets only, and only where "
        "the manipulation is shown."
    )
    header = ["Hypothesis", "Published rules", "Here", "Why"]
    content, caption = by_model(look, rows, header, "llll", caption)
    trace = numbers.trace(x.tables["verdicts"], x.results_file("verdicts"))
    return {"hypotheses": listing, "verdicts": floating("tbl-verdicts", content, caption + trace)}


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
    supports = x.results_table("verdicts").set_index(["model", "hypothesis"])
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
        text = "Comparisons with the baseline were not made in this run.\n"
        return {"comparisons": absent("tbl-comparisons", what, "05_validity"), "comparisons-text": text}
    source = x.tables["comparisons"]
    keys = {p for h in x.hypotheses for p in h.personas}
    table = table[table["dataset"] != NO_DATASET]
    blocks = []
    for number, model in enumerate(look.sort_models(table["model"])):
        part = table[(table["model"] == model) & (table["persona"].isin(keys) if keys else True)]
        part = part.drop_duplicates(["persona", "dataset"]).set_index(["persona", "dataset"])
        rows = []
        for persona in look.sort_personas(p for p, _ in part.index):
            for dataset in look.sort_datasets(d for p, d in part.index if p == persona):
                r = part.loc[(persona, dataset)]
                rows.append(
                    [look.persona(persona), _signed(look, dataset), _points(r["mean_persona"]),
                     _points(r["mean_baseline"]), _points(r["delta"], True),
                     _interval(r["low"], r["high"], 1, True), _p(r["p"]), _p(r.get("p_adjusted", float("nan"))),
                     _p(r["p_equivalence"]), r.get("gate", "–")]
                )  # fmt: skip
        caption = (
            f"{'Personas of the hypotheses' if keys else 'Personas'} against the baseline on the same data set, "
            f"{look.model(model)}. Δ with its interval, and p, are paired by question. *p equiv.* below "
            f"{x.thresholds['alpha']:g} means that the difference is smaller than "
            f"{x.thresholds['equivalence_margin']:g} points. ● EM data set, ■ benign control, ▲ regularisation corpus."
        )
        header = ["Persona", "Data set", "Mean", "Baseline", "Δ", x.confidence, "p", "p adj.", "p equiv.", "Gate"]
        label = "tbl-comparisons" + (f"-{slug(model)}" if number else "")
        blocks.append(floating(label, pipe_table(rows, header, "llrrrrrrrl"), caption + numbers.trace(source)))
    blocks.append(_remarks(x, [p for p in table["persona"].unique() if p in keys]))
    return {"comparisons": "\n".join(blocks), "comparisons-text": _comparisons_text(x, numbers, table, source)}


def _comparisons_text(x: Inputs, numbers: Numbers, table: pd.DataFrame, source: Path) -> str:
    model, alpha = x.look.sort_models(table["model"])[0], float(x.thresholds["alpha"])
    mine = table[(table["model"] == model) & (table["dataset"].map(x.look.role) == "em")]
    if mine.empty:
        return "No persona was compared with the baseline on an EM data set.\n"
    cite = lambda name, value, how: numbers.cite(f"comparisons.{name}", value, "count", source, how)  # noqa: E731
    every = cite("em", len(mine), f"rows of {model} on EM data sets")
    text = f"Of {every} comparisons of a persona with the baseline on EM data sets"
    if "p_adjusted" in mine:
        significant = int((mine["p_adjusted"] < alpha).sum())
        said = cite("significant", significant, f"of these, with `p_adjusted` below {alpha:g}")
        text += f", {said} {'is' if significant == 1 else 'are'} significant after correction when paired by question"
    if "gate" in mine:
        shown = int((mine["gate"] == "shown").sum())
        said = cite("interpretable", shown, "of these, with `gate` = shown")
        text += f", and {said} {'has' if shown == 1 else 'have'} a manipulation that is shown"
    return text + ".\n"


def _gates(x: Inputs, numbers: Numbers) -> dict[str, str]:
    look, tests = x.look, x.table("tests")
    whole = None if tests is None else tests[tests["scope"] == "personas"]
    if whole is None or whole.empty:
        block = absent("tbl-gates", "Whether a classifier can name the persona of a response", "05_validity")
        return {"gates": block, "gates-text": "No classifier was asked to name personas in this run.\n"}
    source = x.tables["tests"]
    pairs = tests[tests["scope"] == "persona"]
    rows = []
    for model in look.sort_models(whole["model"]):
        for dataset in look.sort_datasets(whole.loc[whole["model"] == model, "dataset"]):
            row = whole[(whole["model"] == model) & (whole["dataset"] == dataset)].iloc[0]
            auc = pairs.loc[(pairs["model"] == model) & (pairs["dataset"] == dataset), "estimate"]
            rows.append(
                (model, [_signed(look, dataset), _fixed(row["estimate"], 2), _fixed(row["chance"], 2),
                 _interval(row["low"], row["high"], 2), _p(row["p"]),
                 _to(auc.min(), auc.max(), 2) if len(auc) else "–"])
            )  # fmt: skip
    caption = (
        "Can a classifier name the persona of a response to a question that it has not seen? Accuracy over all "
        "personas of a data set with its bootstrap interval and permutation p, and the range of the AUC of single "
        "personas against the baseline."
    )
    header = ["Data set", "Accuracy", "Chance", x.confidence, "p", "AUC against baseline"]
    content, caption = by_model(look, rows, header, "lrrrrr", caption)
    block = floating("tbl-gates", content, caption + numbers.trace(source))
    return {"gates": block, "gates-text": _gates_text(x, numbers, whole, source)}


def _gates_text(x: Inputs, numbers: Numbers, whole: pd.DataFrame, source: Path) -> str:
    """On which data set the classifier sees personas least, and most."""
    main = whole[(whole["model"] == x.look.sort_models(whole["model"])[0]) & (whole["dataset"] != NO_DATASET)]
    if main.empty:
        return "After fine-tuning, no classifier was asked to name personas in this run.\n"
    excess = main["estimate"] - main["chance"]
    picks = {"most": main.loc[excess.idxmax()]}
    if len(main) > 1:
        picks = {"least": main.loc[excess.idxmin()], **picks}
    parts = []
    for which, row in picks.items():
        dataset = row["dataset"]
        numbers.add(f"gates.{which}_dataset", x.look.dataset(dataset), "text", source, f"exceeds chance {which}")
        how = f"scope personas, {dataset}"
        right = numbers.cite(
            f"gates.{which}_accuracy", _percent(row["estimate"], 0), "per cent", source, f"`estimate`, {how}"
        )
        chance = numbers.cite(
            f"gates.{which}_chance", _percent(row["chance"], 0), "per cent", source, f"`chance`, {how}"
        )
        parts.append(f"in {right} % of cases on {numbers.link(f'gates.{which}_dataset')} (chance {chance} %)")
    return f"A classifier that must name the persona of a response is right {listed(parts)}.\n"


def _outcomes(x: Inputs, numbers: Numbers) -> dict[str, str]:
    look, table = x.look, x.table("outcomes")
    if table is None or table.empty:
        what = "EM rate, missing scores and effective sample size by data set"
        text = "EM rates were not computed in this run.\n"
        return {"outcomes": absent("tbl-outcomes", what, "05_validity"), "em-text": text, "em-finding": ""}
    source, rows = x.tables["outcomes"], []
    for model in look.sort_models(table["model"]):
        for dataset in look.sort_datasets(table.loc[table["model"] == model, "dataset"]):
            part = table[(table["model"] == model) & (table["dataset"] == dataset)]
            base = part[part["persona"] == BASELINE]
            other = part.loc[part["persona"] != BASELINE, "em_rate"]
            first = base.iloc[0] if len(base) else None
            rows.append(
                (model, [_signed(look, dataset),
                 "–" if first is None else f"{_percent(first['em_rate'])} "
                 f"\\[{_to(100 * first['em_low'], 100 * first['em_high'])}\\]",
                 _to(100 * other.min(), 100 * other.max()) if len(other) else "–",
                 f"{int(part['n'].sum() - part['scored'].sum()):,}",
                 "–" if first is None else _fixed(first["icc"], 2),
                 "–" if first is None else _fixed(first["effective_n"], 0),
                 "–" if first is None else int(first["n"])])
            )  # fmt: skip
    caption = (
        f"EM rate in per cent ({x.confidence} interval on the effective number of responses) of the baseline and its "
        "range over personas; responses without a score; intra-class correlation (ICC) and effective number of "
        "responses of the baseline condition."
    )
    header = ["Data set", "EM rate, baseline", "Personas", "No score", "ICC", "Eff. n", "n"]
    content, caption = by_model(look, rows, header, "lrrrrrr", caption)
    block = floating("tbl-outcomes", content, caption + numbers.trace(source))
    rate, icc = _em_text(x, numbers, table, source)
    return {"outcomes": block, "em-text": f"{rate} {icc}\n", "em-finding": rate}


def _em_text(x: Inputs, numbers: Numbers, table: pd.DataFrame, source: Path) -> tuple[str, str]:
    """The baseline's highest EM rate after fine-tuning beside the rate without it; and what its ICC means."""
    model = x.look.sort_models(table["model"])[0]
    main = table[(table["model"] == model) & (table["persona"] == BASELINE)]
    tuned, untuned = main[main["dataset"] != NO_DATASET], main[main["dataset"] == NO_DATASET]
    if tuned.empty:
        return "The baseline was not fine-tuned in this run.", ""

    def cite(name: str, value: str, unit: str, column: str, where: str) -> str:
        return numbers.cite(f"em.{name}", value, unit, source, f"{column}, baseline on {where}")

    def rate(name: str, row: pd.Series) -> str:
        where = row["dataset"]
        shown = cite(f"{name}rate", _percent(row["em_rate"]), "per cent", "`em_rate`", where)
        low_high = _to(100 * row["em_low"], 100 * row["em_high"])
        return f"{shown} % ({cite(f'{name}interval', low_high, 'per cent', '`em_low` to `em_high`', where)})"

    worst = tuned.loc[tuned["em_rate"].idxmax()]
    where = worst["dataset"]
    text = (
        f"In {plain(x.look.model(model))} the baseline's EM rate after fine-tuning is highest on "
        f"{plain(x.look.dataset(where))}: {rate('', worst)}."
    )
    if untuned.empty:
        text += " What it was before fine-tuning is not known: this run has no such condition."
    elif untuned.iloc[0]["em_rate"] >= worst["em_rate"]:
        text += f" Without fine-tuning it is {rate('untuned_', untuned.iloc[0])}, so that no rise is seen."
    else:
        text += f" Without fine-tuning it is {rate('untuned_', untuned.iloc[0])}."
    n = cite("n", f"{int(worst['scored'])}", "responses", "`scored`", where)
    icc = cite("icc", _fixed(worst["icc"], 2), "ratio", "`icc`", where)
    if worst["icc"] > 0:
        effective = cite("effective_n", _fixed(worst["effective_n"], 0), "responses", "`effective_n`", where)
        meaning = (
            "The interval counts effective responses, for which there is good reason: the intra-class correlation of "
            f"that condition is {icc}, so that its {n} scored responses carry the information of {effective}."
        )
    else:
        meaning = (
            f"The intra-class correlation of that condition is estimated at {icc}: its {n} scored responses give no "
            "sign that answers to one question resemble each other, and cannot rule it out."
        )
    return text, meaning


def _models(x: Inputs, numbers: Numbers, figures: Mapping[str, str]) -> dict[str, str]:
    """The section on several models: what they share, or that there is one only."""
    table = x.results_table("cross_model")
    if len(x.models) == 1 or table.empty:
        left = f" ({plain(listed(x.models_missing))} had to be left out)" if x.models_missing else ""
        text = f"What holds in one model may not hold in another, and this run has only one{left}.\n"
        return {"models": text}
    text = (
        "What holds in one model may not hold in another; @fig-cross-model compares the conditions that models share, "
        "and @tbl-cross-model the personas, on the data sets that each has in every model.\n\n"
    )
    return {"models": text + figures["fig-cross-model"] + "\n" + _float_of(x, numbers, "cross_model", table)}


def _optional(x: Inputs, numbers: Numbers, figures: Mapping[str, str], reliability: str) -> dict[str, str]:
    """Parts that some runs have: each with the sentence that introduces it, or one that says why it is not there."""
    arms = "The arms of the design are in @fig-arms.\n\n" + figures["fig-arms"]
    if "fig-arms" not in figures["drawn"]:
        arms = "The arms of the design cannot be compared: this run has fine-tuned conditions only.\n"
    if x.table("reliability") is None or x.table("reliability").empty:
        judge = (
            "In this run each response was judged once, so that the judge's disagreement with itself is not known.\n"
        )
    else:
        judge = (
            "@tbl-reliability compares repeated judgings of the same responses: an effect smaller than the "
            f"disagreement of the judge with itself cannot be told from it.\n\n{reliability}"
        )
    return {"arms": arms, "judge-agreement": judge}


def _findings(x: Inputs, numbers: Numbers, blocks: Mapping[str, str]) -> dict[str, str]:
    """The abstract's findings: sentences for which the run has the data, and no others."""
    conditions = x.results_table("conditions")
    how = "sum of `scored`"
    scored = numbers.cite(
        "grid.scored", f"{int(conditions['scored'].sum()):,}", "count", x.results_file("conditions"), how
    )
    named = listed([x.look.model(m) for m in x.models])
    found = [
        f"Here, {scored} scored responses of {plain(named)} in {numbers.link('grid.conditions')} conditions are "
        "analysed.",
        blocks["em-finding"],
        blocks["gates-text"].strip() if x.table("tests") is not None else "",
    ]
    for v in _verdicts(x):
        name = f"verdict.{slug(v.label)}_{slug(v.model)}".replace("-", "_")
        verdict = numbers.cite(name, v.verdict, "verdict", x.tables["verdicts"], f"`verdict` on {v.label} in {v.model}")
        found.append(f"{v.label} ({x.look.model(v.model)}), {v.published} by the published rules, is {verdict} here.")
    return {"findings": " ".join(filter(None, found)) + "\n"}


# --- Tables as they are -------------------------------------------------------------------------------------------

Column = tuple[str, str, Callable[[Any, Inputs], object]]
"""Header, alignment, and what stands in the cell of a row."""


def _by_look(what: str, column: str) -> Callable[[Any, Inputs], object]:
    return lambda row, x: getattr(x.look, what)(getattr(row, column))


def _with_sign(row: Any, x: Inputs) -> str:
    return _signed(x.look, row.dataset)


def _number(column: str, digits: int = 1, signed: bool = False, scale: float = 1) -> Callable[[Any, Inputs], object]:
    return lambda row, x: _fixed(scale * getattr(row, column), digits, signed)


def _of(column: str, signed: bool = False) -> Callable[[Any, Inputs], object]:
    return lambda row, x: _points(getattr(row, column), signed)


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
            ("p", "r", lambda row, x: _p(row.p)),
            ("Supports", "l", lambda row, x: "yes" if row.supports else "no"),
        ],
    ),
    "significant": (
        "Comparisons with the baseline that are significant by the published rules after Benjamini-Hochberg "
        "correction, responses taken as independent.",
        [_PERSONA, _DATASET, *_EFFECT, ("p adj.", "r", lambda row, x: _p(row.p_adj))],
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
            ("p", "r", lambda row, x: _p(row.p)),
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
            ("Lowest", "l", lambda row, x: f"{x.look.persona(row.lowest_persona)} ({_points(row.lowest)})"),
            ("Highest", "l", lambda row, x: f"{x.look.persona(row.highest_persona)} ({_points(row.highest)})"),
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
            ("Interval", "r", lambda row, x: _interval(row.ci_low, row.ci_high)),
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
"""The tables of the results document (`cai_em.stats.analyse`) as the paper shows them: caption and columns."""

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


def _report_tables(x: Inputs, numbers: Numbers) -> dict[str, str]:
    """The tables of the results document, a block each."""
    blocks = {}
    for name in ("hypotheses", "medical", "difficulty", "distribution", "conditions"):
        blocks[f"table-{name}"] = _float_of(x, numbers, name, x.results_table(name))
    compared, alpha = x.results_table("comparisons"), float(x.thresholds["alpha"])
    found = compared[compared["p_adj"] < alpha].sort_values("p_adj", kind="stable")
    how = f"`p_adj` below {alpha:g}"
    file = x.results_file("comparisons")
    some = numbers.cite("published.significant", len(found), "count", file, how)
    every = numbers.cite("published.comparisons", len(compared), "count", file, "rows")
    text = f"By the published rules {some} of {every} comparisons with the baseline are significant after correction"
    if found.empty:
        block = absent("tbl-significant", REPORT_TABLES["significant"][0].rstrip("."), "06_results")
        block = block.replace("*Not part of this run.*", "*None.*")
    else:
        text += " (@tbl-significant)"
        block = _float_of(x, numbers, "significant", found) + _remarks(x, list(found["persona"].unique()))
    return blocks | {"table-significant": f"{text}.\n\n{block}"}


def _whole_table(
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
        caption += f" The first {most} of {len(rows):,} lines; all are in the table behind the link."
    caption += numbers.trace(x.tables[name])
    header = [str(c).replace("_", " ") for c in table.columns]
    return {name: floating(label, pipe_table(rows[:most], header, align), caption)}


COLUMNS = {
    "claims": ["model", "claim", "analyses", "share", "share_questions", "gate"],
    "reliability": [
        "judge_a", "judge_b", "units", "pairs", "exact", "within_5", "mean_abs_difference", "mean_difference", "icc",
    ],
}  # fmt: skip
"""What fits on a page of a table that has more; the rest is in the file."""


def _power(x: Inputs, numbers: Numbers) -> dict[str, str]:
    """What designs can detect: questions and seeds down, samples across."""
    table, effect, target = x.table("power"), x.thresholds["equivalence_margin"], x.thresholds["power"]
    caption = (
        f"What other designs could see: the smallest difference, in points of alignment, that is detected with a "
        f"probability of {target:g} at a significance level of {x.thresholds['alpha']:g}; in brackets the power to "
        f"detect a difference of {effect:g} points."
    )
    if table is None or table.empty:
        return {"power": absent("tbl-power", caption.rstrip("."), "05_validity")}
    samples = sorted(table["samples"].unique())
    cells = {
        (r.questions, r.seeds, r.samples): f"{_fixed(r.detectable)} ({_fixed(r.power, 2)})" for r in table.itertuples()
    }
    rows = [
        [questions, seeds, *(cells.get((questions, seeds, s), "–") for s in samples)]
        for questions, seeds in sorted({(q, s) for q, s, _ in cells})
    ]
    header = ["Questions", "Seeds", *(count_of(int(s), "sample") for s in samples)]
    content = pipe_table(rows, header, "r" * len(header))
    return {"power": floating("tbl-power", content, caption + numbers.trace(x.tables["power"]))}


def _sentences(x: Inputs) -> str:
    """What the audit says of the hypotheses, one sentence each; those about single comparisons are in the file."""
    table = x.table("claims")
    if table is None or table.empty:
        return ""
    labels = {h.label for h in x.hypotheses}
    lines = [f"- {plain(row.sentence)}" for row in table.itertuples() if row.claim in labels]
    return "\n" + "\n".join(lines) + "\n" if lines else ""


def _settings(x: Inputs, numbers: Numbers) -> dict[str, str]:
    shown = {k: v for k, v in x.thresholds.items() if k != "file" and not isinstance(v, Mapping)}
    source = numbers.csv(Path(x.thresholds["file"]), pd.DataFrame(shown.items(), columns=["threshold", "value"]))
    for name, unit, how in (
        ("alpha", "probability", "significance level"),
        ("equivalence_margin", "points", "smallest difference that matters"),
        ("em_alignment_below", "points", "alignment below which a response is misaligned"),
        ("em_coherence_above", "points", "coherence above which a response is coherent"),
        ("confidence", "per cent", "confidence of intervals"),
    ):
        value = x.thresholds[name]
        numbers.add(f"thresholds.{name}", f"{100 * value if name == 'confidence' else value:g}", unit, source, how)
    rows = [
        [what, parameter, plain(str(value)), f"`{numbers.relative(Path(file))}`"]
        for what, parameter, value, file in x.settings
    ]
    if not rows:
        text = "This profile imports scores: nothing was trained, sampled or judged with parameters of ours.\n"
        return {"settings": text}
    caption = "Parameters of this run, from the files that every stage read."
    block = floating("tbl-settings", pipe_table(rows, ["Stage", "Parameter", "Value", "File"], "llll"), caption)
    return {"settings": f"Parameters are in @tbl-settings.\n\n{block}"}


# --- Figures ------------------------------------------------------------------------------------------------------

FIGURE_TABLES = {
    "alignment": "by_persona",
    "heatmap": "conditions",
    "hypotheses": "hypotheses",
    "forest": "comparisons",
    "twins": "medical",
    "key-personas": "conditions",
    "difficulty": "difficulty",
    "cross-model": "cross_model",
    "violin": "distribution",
    "rates": "distribution",
    "cdf": "distribution",
    "histograms": "distribution",
    "ridge": "distribution_by_condition",
    "rates-heatmap": "distribution_by_condition",
    "arms": "conditions",
}
"""Figure -> the table of `06_results` that holds its numbers."""
VALIDITY_TABLES = {"gates": "tests", "em-rates": "outcomes", "specification": "claims", "hypotheses": "comparisons"}
"""Figure -> the table of another stage that holds (more of) its numbers."""


def _figures(x: Inputs, numbers: Numbers) -> dict[str, str]:
    """A block per figure; the first model's figure has the plain label, others the model's name in theirs.

    Figures of H3 and H4 come as they are, in two blocks of their own. The block `drawn` names the keys that the run
    has.
    """
    folder = x.out / GENERATED / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    by_key: dict[str, list[tuple[FigureRecord, str]]] = {}
    extra: dict[str, list[str]] = {"trajectories": [], "steering": []}
    for source in x.figures:
        listing = source / "figures.json"
        numbers.relative(listing if listing.is_file() else source.parent / run.MANIFEST)
        stage = next((name for name in extra if name in str(source)), "")
        for record in _records(source):
            numbers.relative(source / record.svg)
            name = f"{stage}-{record.svg}" if stage else record.svg
            shutil.copyfile(source / record.svg, folder / name)
            key = record.key if record.key in figure_module.TITLES else record.key.split("-")[0]
            if stage:
                label = f"fig-{stage}-{slug(record.key)}-{slug(record.model)}".rstrip("-")
                extra[stage].append(_figure(label, record, name, ""))
            else:
                by_key.setdefault(key, []).append((record, name))
    blocks = {"drawn": " ".join(f"fig-{key}" for key in by_key)}
    for key, title in figure_module.TITLES.items():
        parts = []
        for number, (record, name) in enumerate(by_key.get(key, [])):
            label = f"fig-{key}" + (f"-{slug(record.key)}-{slug(record.model)}".rstrip("-") if number else "")
            files = [x.results_file(FIGURE_TABLES[key])] if key in FIGURE_TABLES else []
            files += [x.tables[VALIDITY_TABLES[key]]] if VALIDITY_TABLES.get(key) in x.tables else []
            parts.append(_figure(label, record, name, numbers.trace(*files)))
        blocks[f"fig-{key}"] = "\n".join(parts) or absent(f"fig-{key}", title, STAGE_OF.get(key, "06_results"))
    return blocks | {f"fig-{stage}": "\n".join(parts) for stage, parts in extra.items()}


STAGE_OF = {"specification": "08_claims"}


def _figure(label: str, record: FigureRecord, name: str, trace: str) -> str:
    alt = record.alt.replace('"', "'").replace("\\", "")
    image = f'![]({GENERATED}/figures/{name}){{width=100% fig-alt="{alt}"}}'
    return floating(label, image, plain(record.caption) + trace)


# --- Where things come from ---------------------------------------------------------------------------------------


def _sources(numbers: Numbers) -> str:
    """The line of every number, and the file behind every table beside the page."""
    rows = [
        [f"[{n.name}]{{#n-{slug(n.name)}}}", n.value, n.unit, f"[{n.table}]({TABLES_FOLDER}/{n.table})", n.how]
        for n in sorted(numbers.all.values(), key=lambda n: n.name)
        if numbers.traced(n.name)
    ]
    caption = "Where each number of the text comes from: the table beside this page, and how it follows from it."
    first = floating("tbl-sources", pipe_table(rows, ["Name", "Value", "Unit", "Table", "How"], "lrlll"), caption)
    rows = [
        [f"[{name}]({TABLES_FOLDER}/{name})",
         f"`{os.path.relpath(file, numbers.repository)}`" + (f" and {more} more like it" if more else ""),
         f"`{params.file_hash(file)[:8]}`"]
        for name, (file, _, more) in sorted(numbers.tables.items())
    ]  # fmt: skip
    caption = "The tables beside this page, the file that each was written from, and the beginning of its SHA-256."
    second = floating("tbl-tables", pipe_table(rows, ["Table", "Made from", "SHA-256"], "lll"), caption)
    return f"{first}\n{second}"


def _versions(versions: Mapping[str, str]) -> str:
    rows = [[f"`{name}`", plain(version)] for name, version in sorted(versions.items())]
    return floating("tbl-versions", pipe_table(rows, ["Package", "Version"], "ll"), "Versions that made these results.")


# --- Writing ------------------------------------------------------------------------------------------------------


def write_generated(x: Inputs, versions: Mapping[str, str] | None = None) -> dict[str, Number]:
    """Write `_variables.yml` and `_generated/` into `x.out` from a profile's results, replacing what was there.

    Args:
        x: the results.
        versions: package -> version, for the reproducibility section.

    Returns:
        The numbers of the prose by name.

    Raises:
        FileNotFoundError: `06_results` has not been run.
    """
    numbers = Numbers(x.repository, x.results)
    folder = x.out / GENERATED
    shutil.rmtree(folder, ignore_errors=True)
    figures = _figures(x, numbers)
    blocks = {name: text for name, text in figures.items() if name not in ("fig-arms", "fig-cross-model", "drawn")}
    for make in (_status, _settings, _grid, _provenance, _alignment, _hypotheses, _comparisons, _gates, _outcomes):
        blocks |= make(x, numbers)
    for name, caption, stage in (
        ("claims", "Claims audit: in what share of the defensible analyses each published claim stands.", "08_claims"),
        ("reliability", "Agreement of repeated judgings of the same responses.", "05_validity"),
        ("h3", "H3: the verdict, and what it hangs on.", "09_trajectories"),
        ("trajectories", "H3: when misalignment arises, by persona.", "09_trajectories"),
        ("beside", "Training presets beside the main one, at the last checkpoint.", "09_trajectories"),
        ("h4", "H4: the verdict, what it hangs on, and which contrast gave the directions.", "10_steering"),
        ("steering", "H4: transfer of the misalignment direction between personas.", "10_steering"),
    ):
        blocks |= _whole_table(x, numbers, name, f"tbl-{name}", caption, stage)
    blocks["claims"] += _sentences(x)
    blocks |= _optional(x, numbers, figures, blocks.pop("reliability")) | _models(x, numbers, figures)
    blocks |= _power(x, numbers) | _report_tables(x, numbers) | _findings(x, numbers, blocks)
    del blocks["em-finding"]
    blocks["sources"] = _sources(numbers)
    blocks["versions"] = _versions(versions or {})
    for name, text in blocks.items():
        (folder / f"{name}.md").write_text(text, encoding="utf-8")
    numbers.write_tables(x.out / TABLES_FOLDER)
    text = yaml.safe_dump(numbers.tree(), allow_unicode=True, sort_keys=True, width=10_000)
    (x.out / VARIABLES).write_text("# Written by cai_em.paper: do not edit.\n" + text, encoding="utf-8")
    stages = {path.relative_to(x.results).parts[0] for path in x.tables.values()} | {"06_results"}
    manifests = {file for stage in stages if (file := x.results / stage / run.MANIFEST).is_file()}
    read = numbers.files | {Path(f).resolve() for f in (*x.score_files, *x.tables.values(), *manifests)}
    listing = {
        "profile": x.profile["name"],
        "inputs": {os.path.relpath(p, numbers.repository): params.file_hash(p) for p in sorted(read)},
        "written": {os.path.relpath(p, x.out): params.file_hash(p) for p in sorted(folder.rglob("*")) if p.is_file()},
        "used": sorted(numbers.used),
        "numbers": {name: asdict(n) for name, n in numbers.all.items()},
    }
    (folder / LISTING).write_text(json.dumps(listing, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return dict(numbers.all)


def generate(study: params.Study, judge: str, look: Look, out: Path) -> dict[str, Number]:
    """`write_generated` for a study: everything that its run has written, whatever was run.

    Args:
        study: the profile that the paper is to show.
        judge: what scored the responses.
        look: labels and order.
        out: the folder to write into.
    """
    trained = study.profile.source == "trained"
    inputs = Inputs(
        out=Path(out),
        results=study.dir,
        profile={"name": study.name, "title": study.profile.title, "caveat": study.profile.caveat,
                 "source": study.profile.source},
        judge=judge,
        score_files=study.score_files(),
        look=look,
        hypotheses=study.hypotheses,
        thresholds=study.thresholds.model_dump() | {"file": study.folder / "thresholds.yaml"},
        settings=list(_study_settings(study)),
        tables=find_tables(study.dir),
        figures=find_figures(study.dir),
        repository=study.folder.parent,
        missing=published.read_missing(study.stage_dir("07_published")),
        notes={p.key: p.note for p in study.used_personas() if p.note and not trained},
    )  # fmt: skip
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
