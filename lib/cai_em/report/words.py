"""The language of the templates: documents are Jinja templates (`templates/*.md.j2`) over stored tables.

    words = Words(look, alpha=0.05, level="95%")
    words.render("RESULTS.md.j2", tables=tables, ...)
    words.macro("validity.md.j2", "pooled")(table)

A template says `{{ row.persona | persona }}`; a table is one line of Markdown for each row:

    {% call(r) table(found, "Persona | Mean", "lr") -%}
    {{ r.persona | persona }} | {{ r.mean | points }}
    {%- endcall %}

Escaping. What a template itself says is Markdown, and stands as it is. What an expression gives is text of our own
data (a label, a reason), and is escaped so far that it cannot break a table or open a tag (`cell`). Numbers that a
formatter has written stand as they are. Somebody else's text (a response, a prompt, a judge's answer) must go through
`foreign`, after which nothing in it is markup. A name that a template uses and nobody gave is an error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup

from cai_em.analysis.contrasts import CLOSED, POOLED
from cai_em.analysis.units import MIN_SEEDS
from cai_em.dynamics.directions import direction_label
from cai_em.dynamics.h4 import CONTRASTS, _how
from cai_em.records import numbers
from cai_em.records.keys import FLAGS, NO_DATASET
from cai_em.report.markdown import cell, cited, escape, heading_id, judge_label, listed, markdown_table, plainly
from cai_em.study.labels import Labels

TEMPLATES = Path(__file__).with_name("templates")


def as_rows(table: pd.DataFrame | Iterable[Any]) -> list[Any]:
    """A table's rows, with a column's value as an attribute."""
    return list(table.itertuples(index=False)) if isinstance(table, pd.DataFrame) else list(table)


def where(table: pd.DataFrame, **values: Any) -> pd.DataFrame:
    """The rows of a table in which columns have these values."""
    for column, value in values.items():
        table = table[table[column] == value] if len(table) else table
    return table


FOLDED_BEYOND = 24
"""A table of more rows is folded: whoever wants it opens it."""
SAID_ONCE_FROM = 3
"""From so many rows on, a column that says the same in each is said once, above the table."""


def table(
    found: pd.DataFrame | Iterable[Any], header: str, align: str, *, caller: Callable[[Any], str], whole: bool = False
) -> Markup:
    """A table as a template writes it: for each row, `caller` gives its cells with ` | ` between them.

    A long one is folded, and a column that says the same in every row stands above it instead.

    Args:
        whole: leave every column where it is, as in the published tables.
    """
    split = lambda line: re.split(r"(?<!\\)\|(?= |$)", line)  # noqa: E731
    cells = [[c.strip() for c in split(str(caller(row)).replace("\n", " "))] for row in as_rows(found)]
    names, said = [c.strip() for c in split(header)], ""
    if not whole and len(cells) >= SAID_ONCE_FROM:
        same = [i for i in range(1, len(names)) if names[i] and len({row[i] for row in cells}) == 1]
        kept = [i for i in range(len(names)) if i not in same]
        if same:
            once = (f"{names[i]} {cells[0][i]}" if cells[0][i] != numbers.NONE else f"no {names[i]}" for i in same)
            said = "In every row: " + "; ".join(once) + ".\n\n"
            align = "".join(align[i] for i in kept)
            cells, names = [[row[i] for i in kept] for row in cells], [names[i] for i in kept]
    text = markdown_table(cells, names, align)
    if len(cells) > FOLDED_BEYOND:
        text = (
            f"<details>\n<summary>{len(cells)} rows: {', '.join(filter(None, names))}</summary>\n\n{text}\n\n</details>"
        )
    return Markup(said + text)


def _finalize(value: Any) -> Any:
    if isinstance(value, Markup | jinja2.Undefined):
        return value
    return Markup(cell(value))


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _flags(row: Any) -> str:
    return " ".join(f"{getattr(row, f)} {f}" for f in FLAGS if getattr(row, f)) or "none"


def _significant(found: pd.DataFrame, alpha: float) -> pd.DataFrame:
    found = found[found["p_adj"] < alpha]
    return found.assign(_p=found["p_adj"].round(6)).sort_values("_p", kind="stable").drop(columns="_p")


def _shown_rows(found: pd.DataFrame, gates: pd.DataFrame) -> list[Any]:
    known = dict(zip(zip(gates["persona"], gates["dataset"]), gates["gate"]))
    return [r for r in as_rows(found) if known.get((r.persona, r.dataset)) == "present"]


def by_note(personas: Iterable[str], notes: Mapping[str, str]) -> list[tuple[str, list[str]]]:
    """What is known to be wrong, and the personas that it is true of."""
    found: dict[str, list[str]] = {}
    for persona in dict.fromkeys(personas):
        if notes.get(persona):
            found.setdefault(notes[persona], []).append(persona)
    return list(found.items())


def _last_of_presets(general: pd.DataFrame) -> list[SimpleNamespace]:
    """What each preset gained and cost at its last checkpoint: a row of each measure (`dynamics.generality`)."""
    last = general.groupby(["preset", "measure"], sort=False).last()
    return [
        SimpleNamespace(preset=p, em=last.loc[(p, "em")], alignment=last.loc[(p, "alignment")])
        for p in dict.fromkeys(general["preset"])
    ]


def _by_intervention(effects: pd.DataFrame) -> list[SimpleNamespace]:
    """The outcomes of each intervention, by name (`dynamics.effects`)."""
    every = {(r.target, r.dataset, r.outcome): r for r in as_rows(effects)}
    return [
        SimpleNamespace(**{o: every[r.target, r.dataset, o] for o in ("alignment", "em", "coherence")})
        for r in as_rows(where(effects, outcome="alignment"))
    ]


def _quotation(text: str | None, length: int = 240) -> str:
    if text is None:
        return numbers.NONE
    text = re.sub(r"\s*\n\s*", " / ", text.strip())
    return escape(text if len(text) <= length else text[:length].rsplit(" ", 1)[0] + " …")


def _signed_share(share: float, digits: int = 1) -> str:
    return numbers.NONE if math.isnan(share) else f"{100 * share:+.{digits}f} %"


def _span(values: pd.Series) -> str:
    return " to ".join(map(str, sorted({values.min(), values.max()})))


NUMBERS: dict[str, Callable[..., str]] = {
    "points": numbers.points,
    "delta": numbers.delta,
    "effect": numbers.effect,
    "p": numbers.p_value,
    "published_p": numbers.published_p,
    "stars": numbers.stars,
    "percent": numbers.percent,
    "whole_percent": lambda share: f"{100 * share:.0f} %",
    "count": lambda n: f"{n:,}",
    "decimals": lambda value, digits=2: numbers.plain_number(value, f".{digits}f"),
    "general": lambda value: f"{value:g}",
    "number": numbers.plain_number,
    "interval": numbers.interval,
    "share_or_points": lambda x, outcome: _signed_share(x) if outcome == "em" else numbers.delta(x),
    "per_norm": lambda x, outcome: _signed_share(x, 2) if outcome == "em" else f"{x:+.2f}",
    "by_outcome": lambda x, outcome: {
        "uptake": lambda: numbers.plain_number(x, "+.2f"), "em": lambda: numbers.percent(x),
        "alignment": lambda: numbers.delta(x),
    }[outcome](),
    "span": _span,
    "minute": lambda when: f"{datetime.fromisoformat(when):%Y-%m-%d %H:%M}",
    "flags": _flags,
    "foreign": lambda text: escape(str(text)),
    "plainly": lambda text: plainly(str(text)),
    "fixed": numbers.fixed,
    "set_points": numbers.typeset_points,
    "set_percent": numbers.typeset_percent,
    "set_range": numbers.typeset_range,
    "starred": lambda words: listed([f"*{w}*" for w in words]),
    "markdown": str,
    "cited": cited,
    "quotation": _quotation,
}  # fmt: skip
"""Filters that write Markdown: numbers as text (`records.numbers`), and foreign text made harmless."""
TEXTS: dict[str, Callable[..., Any]] = {
    "rows": as_rows,
    "where": where,
    "of_model": lambda tables, model: {n: where(t, model=model) for n, t in tables.items() if "model" in t},
    "shown_rows": _shown_rows,
    "by_note": by_note,
    "last_of_presets": _last_of_presets,
    "by_intervention": _by_intervention,
    "how": _how,
    "listed": lambda words: listed([str(w) for w in words]),
    "judge_label": judge_label,
    "heading_id": heading_id,
    "or_none": lambda value: numbers.NONE if _missing(value) else value,
    "counted": lambda values, noun: [f"{v} {noun}{'s' if v > 1 else ''}" for v in values],
}
"""Filters whose text is escaped like any other, and those that choose rows."""


class Words:
    """Templates with a study's labels.

    Args:
        look: labels.
        strict: nothing in a label or a reason may be markup (`text` is `foreign`): for documents that pandoc reads.
        settings: what every template may use: `alpha`, `level`.
    """

    def __init__(self, look: Labels, *, strict: bool = False, **settings: Any) -> None:
        self.environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(TEMPLATES),
            undefined=jinja2.StrictUndefined,
            autoescape=True,  # what is printed passes `_finalize`, which marks it as done: HTML's own rule never acts
            finalize=_finalize,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        trusted = {name: _trusted(write) for name, write in NUMBERS.items()}
        self.environment.filters |= trusted | TEXTS | {"text": trusted["foreign"] if strict else str}
        self.environment.filters |= {
            "persona": look.persona,
            "dataset": look.dataset,
            "model": look.model,
            "direction": lambda source: direction_label(source, look),
            "titled": lambda key: cell(look.dataset(key).replace("_", " ").title()),
            "bold_header": lambda personas: "".join(f" | **{cell(look.persona(p))}**" for p in personas),
            "significant": lambda found: _significant(found, settings["alpha"]),
        }
        self.environment.tests["missing"] = _missing
        self.environment.globals |= {
            "table": table, "interval": trusted["interval"], "set_range": trusted["set_range"],
            "look": look, "MIN_SEEDS": MIN_SEEDS, "POOLED": POOLED, "CLOSED": CLOSED,
            "NO_DATASET": NO_DATASET, "CONTRASTS": CONTRASTS,
        } | settings  # fmt: skip

    def render(self, name: str, **values: Any) -> str:
        """A template's text; blank lines in a row count once.

        Raises:
            jinja2.UndefinedError: the template uses a name that nobody gave.
        """
        return _tidy(self.environment.get_template(name).render(**values))

    def macro(self, name: str, macro: str) -> Callable[..., str]:
        """One macro of a template, as a function."""
        made = getattr(self.environment.get_template(name).module, macro)
        return lambda *args, **values: _tidy(made(*args, **values))


def _trusted(write: Callable[..., str]) -> Callable[..., Markup]:
    return lambda *args, **how: Markup(write(*args, **how))


def _tidy(text: str) -> str:
    return re.sub(r"\n{3,}", "\n\n", str(text)).strip()
