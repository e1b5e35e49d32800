"""A page of a run for the visitors of its repository: first screen, verdicts, checks and audit, small enough to commit.

The run writes `11_report/page/`: `results.md`, made from `results.json` and the figures beside it, and nothing else.
`docs/results.md` is the published study's; `python -m cai_em.report.page results/published/11_report/page docs` puts it
there. So a test can make the page again from what was committed with it, and compare a run's with it.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from cai_em.records.files import write_text
from cai_em.report.figure_files import FigureRecord
from cai_em.report.glance import Glance, Opened, Said
from cai_em.report.words import Words
from cai_em.study.labels import Labels

PAGE, FACTS = "results.md", "results.json"
DIGITS = 6
"""Decimals that are kept of a number: more than is printed, fewer than machines differ in."""


def facts_of(
    first: Glance,
    tests: pd.DataFrame,
    audited: pd.DataFrame,
    replicated: pd.DataFrame | None,
    figures: Sequence[FigureRecord],
    *,
    profile: str,
    title: str,
) -> dict[str, Any]:
    """Everything that the page says, as JSON.

    Args:
        first: the first screen.
        tests: `analysis.classify`'s table: of it, whether a classifier can name the persona in a data set.
        audited: verdicts of the claims audit.
        replicated: `replication_check` of the published document, where there is one.
        figures: those of the checks, one a model.
    """
    whole = tests[tests["scope"] == "personas"] if len(tests) else pd.DataFrame(columns=TOLD)
    order = list(dict.fromkeys([*(v.model for v in first.verdicts), *whole["model"]]))
    whole = whole.sort_values("model", key=lambda m: m.map(order.index), kind="stable")
    said = ["model", "hypothesis", "analyses", "share", "share_questions"]
    printed = None if replicated is None else replicated[replicated["table"] == "all tables"]
    return {
        "profile": profile,
        "title": title,
        "first": asdict(first) | {"missing": dict(first.missing)},
        "told": _rows(whole[TOLD]),
        "audited": _rows(audited[said]) if len(audited) else [],
        "replicated": []
        if printed is None
        else _rows(printed[["model", "compared", "exact", "within one unit", "off"]]),
        "figures": [{"svg": f.svg, "alt": f.alt, "caption": f.caption} for f in figures],
    }


TOLD = ["model", "dataset", "estimate", "low", "high", "chance", "p"]


def _rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    return json.loads(table.to_json(orient="records", double_precision=DIGITS))


def page(facts: Mapping[str, Any], look: Labels) -> str:
    """The page as Markdown, from `facts_of`."""
    found = dict(facts["first"])
    verdicts = [Said(**v | {"personas": tuple(v["personas"])}) for v in found.pop("verdicts")]
    first = Glance(verdicts, [Opened(**o) for o in found.pop("opened")], **found)
    share = {(r["model"], r["hypothesis"]): r for r in facts["audited"]}
    return Words(look).render("page.md.j2", facts=facts, first=first, share=share) + "\n"


def write_page(folder: Path, facts: Mapping[str, Any], look: Labels, figures: Path) -> Path:
    """Write the page, what it was made from, and its figures (from the run's folder of figures)."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "figures").mkdir(parents=True)
    for figure in facts["figures"]:
        shutil.copyfile(figures / figure["svg"], folder / "figures" / figure["svg"])
    write_text(folder / FACTS, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    return write_text(folder / PAGE, page(facts, look))


def main(arguments: Sequence[str]) -> int:
    """Command line: FROM TO; what else lies in TO stays."""
    if len(arguments) != 2 or not (Path(arguments[0]) / PAGE).is_file():
        print(__doc__, file=sys.stderr)
        return 2
    shutil.copytree(arguments[0], arguments[1], dirs_exist_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
