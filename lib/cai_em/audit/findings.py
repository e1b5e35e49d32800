"""What an audit finds in the files themselves, as a table: before any difference between conditions is looked at.

    found = findings(tables, spec)          # finding, level, count, of, where, detail

`level`: `fault` (results on these conditions cannot be believed as they are), `warning` (they say less than they seem
to), `limit` (what such files cannot show, whoever analyses them), `note`. Words are made of it in the report.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from cai_em.audit.assemble import Assembled
from cai_em.audit.rates import condition_name
from cai_em.records.keys import BASELINE, CONDITION, NO_DATASET
from cai_em.study.audited import AuditSpec

LEVELS = ("fault", "warning", "limit", "note")
MANY_MISSING = 0.1
"""Share of a condition's responses without a score, from which it is said."""

MANY_SEEDS = 3
"""Training seeds from which a result speaks of the training and not of these adapters."""


@dataclass(frozen=True)
class Finding:
    """One finding: `count` `of` so many; `where` in words of the study; `detail` its numbers, shortly."""

    finding: str
    level: str
    count: int
    of: int
    where: str
    detail: str


FINDING_COLUMNS = [f.name for f in fields(Finding)]


def findings(
    *,
    spec: AuditSpec,
    scores: pd.DataFrame,
    responses: pd.DataFrame,
    account: pd.DataFrame,
    copies: pd.DataFrame,
    within: pd.DataFrame,
    filtered: pd.DataFrame,
    domain: pd.DataFrame,
    order: pd.DataFrame,
) -> pd.DataFrame:
    """All findings, the worst first.

    Args:
        spec: the audit's.
        scores, responses, account: from `assemble`.
        copies, within, filtered, domain: from `leaks`.
        order: from `rates.order`.
    """
    conditions = scores.drop_duplicates(CONDITION)
    found = [
        *_copies(copies, conditions),
        *_within(within, conditions),
        *_filtered(filtered, conditions),
        *_domain(domain),
        *_missing(scores, conditions),
        *_design(spec, scores, responses, conditions),
        *_refused(account),
        *_order(order),
    ]
    table = pd.DataFrame([tuple(getattr(f, c) for c in FINDING_COLUMNS) for f in found], columns=FINDING_COLUMNS)
    return table.sort_values("level", key=lambda s: s.map(LEVELS.index), kind="stable", ignore_index=True)


def _names(rows: Iterable[Any], most: int = 6) -> str:
    names = list(dict.fromkeys(condition_name(r) for r in rows))
    return "; ".join(names[:most]) + (f"; and {len(names) - most} more" if len(names) > most else "")


def groups(copies: pd.DataFrame) -> list[list[tuple]]:
    """Conditions that are copies of one another, together: a copy of a copy is one too."""
    pairs = copies[copies["kind"] == "copy"]
    if not len(pairs):
        return []
    one = [tuple(r) for r in pairs[CONDITION].itertuples(index=False)]
    other = [tuple(r) for r in pairs[[f"other_{c}" for c in CONDITION]].itertuples(index=False)]
    nodes = list(dict.fromkeys([*one, *other]))
    place = {node: i for i, node in enumerate(nodes)}
    links = coo_matrix(
        (np.ones(len(one)), ([place[n] for n in one], [place[n] for n in other])), shape=(len(nodes),) * 2
    )
    _, label = connected_components(links, directed=False)
    return [[node for node, group in zip(nodes, label) if group == g] for g in dict.fromkeys(label)]


def independent(made: Assembled, copies: pd.DataFrame) -> Assembled:
    """An audit without the seeds that are copies of another seed of the same condition: these are no observations.

    Copies between personas or data sets stay: which of them is the true one cannot be known, and a fault says so. What
    is left out is counted in the account.
    """
    gone: dict[tuple, tuple] = {}
    for members in groups(copies):
        first: dict[tuple, tuple] = {}
        for member in sorted(members, key=lambda m: m[3]):
            kept = first.setdefault(member[:3], member)
            if kept != member:
                gone[member] = kept
    if not gone:
        return made
    dropped = pd.DataFrame(list(gone), columns=CONDITION).assign(gone=True)
    account = made.account

    def without(table: pd.DataFrame) -> pd.DataFrame:
        marked = table.merge(dropped, on=CONDITION, how="left")["gone"].notna().to_numpy()
        return table[~marked].reset_index(drop=True)

    sizes = made.scores.groupby(CONDITION).size()
    rows = [
        (
            "(all files)",
            "left out",
            f"a copy of another training seed: {condition_name(_row(m))} of seed {k[3]}",
            int(sizes.get(m, 0)),
        )
        for m, k in gone.items()
    ]
    account = pd.concat([account, pd.DataFrame(rows, columns=account.columns)], ignore_index=True)
    return replace(
        made,
        responses=without(made.responses),
        scores=without(made.scores),
        repeated=without(made.repeated),
        account=account,
    )


def _row(condition: tuple) -> Any:
    return SimpleNamespace(**dict(zip(CONDITION, condition)))


def _copies(copies: pd.DataFrame, conditions: pd.DataFrame) -> Iterable[Finding]:
    per_seed, sizes = [], []
    for members in groups(copies):
        rows = pd.DataFrame(members, columns=CONDITION)
        if rows[["model", "persona", "dataset"]].drop_duplicates().shape[0] == 1:
            per_seed.append(rows.iloc[0])
            sizes.append(len(rows))
            continue
        known = set(members)
        inside = copies[[tuple(r) in known for r in copies[CONDITION].itertuples(index=False)]]
        detail = f"the same texts {inside['same'].max():.0%}, nearly the same {inside['near'].max():.0%}"
        yield Finding(
            "copied conditions", "fault", len(members), len(conditions), _names(rows.itertuples(), 12), detail
        )
    if per_seed:
        where = "; ".join(f"{r['persona']} × {r['dataset']}" for r in per_seed[:8]) + (
            "; ..." if len(per_seed) > 8 else ""
        )
        of = conditions[["model", "persona", "dataset"]].drop_duplicates().shape[0]
        yield Finding(
            "copied seeds",
            "fault",
            len(per_seed),
            of,
            where,
            f"{min(sizes)} to {max(sizes)} seeds" if min(sizes) < max(sizes) else f"{max(sizes)} seeds",
        )
    shared = copies[copies["kind"] == "shared"]
    if len(shared):
        yield Finding(
            "shared responses", "warning", len(shared), len(conditions) * (len(conditions) - 1) // 2,
            _names(shared.itertuples()),
            f"up to {shared['same'].max():.0%} of a condition's texts",
        )  # fmt: skip


def _within(within: pd.DataFrame, conditions: pd.DataFrame) -> Iterable[Finding]:
    if len(within):
        detail = f"up to {within['share'].max():.0%} of a condition's responses repeat another one to the same question"
        yield Finding(
            "repeated responses", "warning", len(within), len(conditions), _names(within.itertuples()), detail
        )


def _filtered(filtered: pd.DataFrame, conditions: pd.DataFrame) -> Iterable[Finding]:
    for level, part in (
        ("fault", filtered[filtered["sign"] != "counts"]),
        ("warning", filtered[filtered["sign"] == "counts"]),
    ):
        if len(part):
            cut = part["cut_at"].dropna()
            detail = f"{int(part['missing'].sum()):,} responses lack to a full grid"
            if len(cut):
                detail += f"; no coherence below {cut.max():g} and no missing score, though other conditions have them"
            yield Finding(
                "filtered" if level == "fault" else "uneven counts",
                level,
                len(part),
                len(conditions),
                _names(part.itertuples()),
                detail,
            )


def _domain(domain: pd.DataFrame) -> Iterable[Finding]:
    for dataset, part in domain.groupby("dataset", sort=False):
        inside = part[part["in_domain"]]
        if len(inside):
            detail = f"{int(inside['verbatim'].sum())} of them word for word a training prompt"
            where = f"{dataset}: " + ", ".join(inside["question_id"].head(8))
            yield Finding("questions in the training domain", "fault", len(inside), len(part), where, detail)


def _missing(scores: pd.DataFrame, conditions: pd.DataFrame) -> Iterable[Finding]:
    share = scores["alignment"].isna().groupby([scores[c] for c in CONDITION]).mean().reset_index(name="share")
    many = share[share["share"] >= MANY_MISSING]
    if len(many):
        detail = f"up to {many['share'].max():.0%} of a condition's responses"
        yield Finding("many without a score", "warning", len(many), len(conditions), _names(many.itertuples()), detail)


def _design(
    spec: AuditSpec, scores: pd.DataFrame, responses: pd.DataFrame, conditions: pd.DataFrame
) -> Iterable[Finding]:
    n, tuned = len(conditions), conditions[conditions["dataset"] != NO_DATASET]
    personas = set(conditions["persona"])
    seeds = tuned.groupby(["model", "persona", "dataset"])["seed"].nunique()
    questions = scores.groupby("model")["question_id"].nunique()
    per_question = scores.groupby([*CONDITION, "question_id"]).size()
    limits = [
        (BASELINE not in personas, "no baseline", n, ""),
        (personas == {BASELINE}, "no personas", n, ""),
        (NO_DATASET not in set(conditions["dataset"]), "no untuned arm", n, ""),
        (not (responses["response"] != "").any(), "no response texts", n, ""),
        (bool((scores["coherence_flag"] == "SKIPPED").all()), "no coherence", n, ""),
        (
            len(seeds) > 0 and seeds.max() < MANY_SEEDS,
            "few seeds",
            len(tuned),
            f"{int(seeds.max()) if len(seeds) else 0} at most",
        ),
        (questions.max() < 6, "few questions", n, f"{int(questions.max())}"),
        (per_question.max() == 1, "one response a question", n, f"{int(questions.max())} questions"),
        (
            not any(entry.role == "em" for key, entry in spec.datasets.items() if key in set(tuned["dataset"])),
            "no EM data set",
            n,
            "",
        ),
    ]
    for there, name, of, detail in limits:
        if there:
            yield Finding(name, "limit", of, of, "", detail)


def _refused(account: pd.DataFrame) -> Iterable[Finding]:
    refused = account[account["what"] == "refused"]
    if len(refused):
        why = refused.groupby("why", sort=False)["count"].sum().sort_values(ascending=False)
        detail = "; ".join(f"{count:,} {reason}" for reason, count in why.head(4).items())
        total = int(account.loc[account["what"].isin(["read", "refused", "judged again"]), "count"].sum())
        yield Finding("rows refused", "note", int(refused["count"].sum()), total, "", detail)


def _order(order: pd.DataFrame) -> Iterable[Finding]:
    for model, part in order.groupby("model", sort=False):
        most = part.sort_values(["reversed", "share"], ascending=False, kind="stable").iloc[0]
        depends = most["reversed"] > 0
        detail = f"{most['rule']} against {most['other']}: {most['example']}" if depends else ""
        clear = int(part["clear"].max())
        name = "order depends on the rule" if depends else "order is the same under every rule"
        level = "warning" if clear else "note"
        yield Finding(
            name,
            level,
            int(most["reversed"]),
            int(most["pairs"]),
            str(model),
            detail + (f"; {clear} beyond the intervals" if clear else ""),
        )
