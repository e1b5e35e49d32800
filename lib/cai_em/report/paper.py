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
demo and after the full study. `cai_em.report.render` checks and renders what is written here.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import yaml

from cai_em.records import files as records_files
from cai_em.records import manifest
from cai_em.report import figure_files
from cai_em.report.drawing import FIGURES
from cai_em.report.glance import Glance
from cai_em.report.inputs import Inputs, find_tables
from cai_em.report.markdown import (
    GENERATED,
    MARKUP,
    TABLES_FOLDER,
    Number,
    Numbers,
    _sources,
    _versions,
    absent,
    cited,
    floating,
    plain,
)
from cai_em.report.paper_text import Blocks, _study_settings
from cai_em.report.style import Look
from cai_em.study import published
from cai_em.study import study as study_study

VARIABLES = "_variables.yml"
SOURCES_LISTING = "sources.json"


# --- Figures ------------------------------------------------------------------------------------------------------


def _figures(x: Inputs, numbers: Numbers) -> dict[str, str]:
    """A block per figure; the first model's figure has the plain label, others the model's name in theirs.

    Figures of H3 and H4 stand together, in two blocks, each with its model's name. The block `drawn` names the keys
    that the run has.
    """
    folder = x.out / GENERATED / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    numbers.relative(x.figures / figure_files.FIGURE_LIST)
    parts: dict[str, list[str]] = {figure.block: [] for figure in FIGURES.values()}
    drawn = set()
    for record in figure_files.read_records(x.figures):
        numbers.relative(x.figures / record.svg)
        shutil.copyfile(x.figures / record.svg, folder / record.svg)
        figure = FIGURES[record.key]
        named = figure.section or figure.block in drawn
        drawn.add(figure.block)
        trace = numbers.trace(*(figure_files.table_file(x.results, table) for table in record.tables))
        label = f"fig-{Path(record.svg).stem}" if named else figure.block
        parts[figure.block].append(_figure(label, record, trace))
    blocks = {"drawn": " ".join(sorted(drawn))}
    for figure in FIGURES.values():
        none = "" if figure.section else absent(figure.block, figure.title, figure.stage)
        blocks[figure.block] = "\n".join(parts[figure.block]) or none
    return blocks


def _figure(label: str, record: figure_files.FigureRecord, trace: str) -> str:
    alt = record.alt.replace('"', "'").replace("\\", "")
    image = f'![]({GENERATED}/figures/{record.svg}){{width=100% fig-alt="{alt}"}}'
    return floating(label, image, plain(record.caption) + trace)


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
    blocks = Blocks(x, numbers, figures).all()
    for name in sorted(blocks):
        if name.startswith(("fig-", "table-")) or name in ("alignment", "comparisons"):
            numbers.add(f"refs.{name.replace('-', '_')}", cited(blocks[name]), MARKUP, "", "a float of every model")
    blocks["sources"] = _sources(numbers)
    blocks["versions"] = _versions(versions or {})
    for name, text in blocks.items():
        (folder / f"{name}.md").write_text(text, encoding="utf-8")
    numbers.write_tables(x.out / TABLES_FOLDER)
    text = yaml.safe_dump(numbers.tree(), allow_unicode=True, sort_keys=True, width=10_000)
    (x.out / VARIABLES).write_text("# Written by cai_em.report.paper: do not edit.\n" + text, encoding="utf-8")
    stages = {path.relative_to(x.results).parts[0] for path in x.tables.values()} | {"06_results"}
    manifests = {file for stage in stages if (file := x.results / stage / manifest.MANIFEST).is_file()}
    read = numbers.files | {Path(f).resolve() for f in (*x.score_files, *x.tables.values(), *manifests)}
    listing = {
        "profile": x.profile["name"],
        "inputs": {os.path.relpath(p, numbers.repository): records_files.file_hash(p) for p in sorted(read)},
        "written": {
            os.path.relpath(p, x.out): records_files.file_hash(p) for p in sorted(folder.rglob("*")) if p.is_file()
        },
        "used": sorted(numbers.used),
        "numbers": {name: asdict(n) for name, n in numbers.all.items()},
    }
    (folder / SOURCES_LISTING).write_text(json.dumps(listing, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return dict(numbers.all)


def generate(study: study_study.Study, judge: str, look: Look, out: Path, first: Glance) -> dict[str, Number]:
    """`write_generated` for a study: everything that its run has written, whatever was run.

    Args:
        study: the profile that the paper is to show.
        judge: what scored the responses.
        look: labels and order.
        out: the folder to write into.
        first: what stands on the first screen.
    """
    trained = study.profile.source == "trained"
    inputs = Inputs(
        out=Path(out),
        results=study.dir,
        profile={"name": study.name, "title": study.profile.title, "caveat": study.profile.caveat,
                 "source": "audited" if study.audit is not None else study.profile.source},
        judge=judge,
        score_files=study.score_files(),
        look=look,
        hypotheses=study.hypotheses,
        thresholds=study.thresholds.model_dump() | {"file": study.folder / "thresholds.yaml"},
        settings=list(_study_settings(study)),
        tables=find_tables(study.dir),
        figures=study.stage_dir("11_report") / "figures",
        repository=study.folder.parent,
        missing=published.read_missing(study.stage_dir("07_published")),
        notes={p.key: p.note for p in study.used_personas() if p.note and not trained},
        first=first,
    )  # fmt: skip
    return write_generated(inputs, manifest.versions())
