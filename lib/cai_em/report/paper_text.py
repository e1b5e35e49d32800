"""The paper's sentences and tables, one function for each block that the prose includes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from cai_em.records import manifest as records_manifest
from cai_em.records.keys import BASELINE, NO_DATASET
from cai_em.records.numbers import fixed, typeset_interval, typeset_p, typeset_percent, typeset_points, typeset_range
from cai_em.report.figure_files import slug
from cai_em.report.inputs import FLAG_WORDS, Inputs, _flags, _float_of, _known_issues, _remarks, by_model
from cai_em.report.markdown import (
    TABLES_FOLDER,
    Numbers,
    _signed,
    absent,
    count_of,
    floating,
    listed,
    pipe_table,
    plain,
)
from cai_em.report.style import Look
from cai_em.study import study as study_study

# --- What this run is ---------------------------------------------------------------------------------------------


def _status(x: Inputs, numbers: Numbers) -> dict[str, str]:
    """The callout at the top: which profile, when, what it cannot show, what is missing or known to be wrong."""
    manifest = x.results / "06_results" / records_manifest.MANIFEST
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
             _flags(part[list(FLAG_WORDS)].sum()) or "none"]
        )  # fmt: skip
    header = ["Model", "Personas", "Data sets", "Conditions", "Responses", "Scored", "Without a score"]
    caption = "What was analysed. A response without a score is kept with its reason; personas include the baseline."
    table = pipe_table(rows, header, "lrrrrrl")
    blocks = {"design": text, "grid": floating("tbl-grid", table, caption + numbers.trace(source))}
    return blocks | {"roles": _roles(roles, look, count), "samples": _samples(conditions, design, numbers, source)}


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
    manifests = sorted((x.results / "02_finetune").rglob(records_manifest.MANIFEST))
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
            [look.persona(p), f"{int(row['n']):,}", typeset_points(row["mean"]), typeset_points(row["sd"]),
             typeset_interval(row["ci_low"], row["ci_high"]), typeset_interval(row["boot_low"], row["boot_high"]),
             int(row["datasets"]), *([typeset_points(shared.get((model, p)))] if shared else [])]
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
        return numbers.cite(f"baseline.{name}", typeset_points(value), "points", source, f"`mean`, baseline, {of}")

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
                f"persona.{k}_mean", typeset_points(pooled[p]), "points", x.results_file("by_persona"), f"`mean` of {p}"
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
                    [look.persona(persona), _signed(look, dataset), typeset_points(r["mean_persona"]),
                     typeset_points(r["mean_baseline"]), typeset_points(r["delta"], True),
                     typeset_interval(r["low"], r["high"], 1, True), typeset_p(r["p"]),
                     typeset_p(r.get("p_adjusted", float("nan"))),
                     typeset_p(r["p_equivalence"]), r.get("gate", "–")]
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
                (model, [_signed(look, dataset), fixed(row["estimate"], 2), fixed(row["chance"], 2),
                 typeset_interval(row["low"], row["high"], 2), typeset_p(row["p"]),
                 typeset_range(auc.min(), auc.max(), 2) if len(auc) else "–"])
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
            f"gates.{which}_accuracy", typeset_percent(row["estimate"], 0), "per cent", source, f"`estimate`, {how}"
        )
        chance = numbers.cite(
            f"gates.{which}_chance", typeset_percent(row["chance"], 0), "per cent", source, f"`chance`, {how}"
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
                 "–" if first is None else f"{typeset_percent(first['em_rate'])} "
                 f"\\[{typeset_range(100 * first['em_low'], 100 * first['em_high'])}\\]",
                 typeset_range(100 * other.min(), 100 * other.max()) if len(other) else "–",
                 f"{int(part['n'].sum() - part['scored'].sum()):,}",
                 "–" if first is None else fixed(first["icc"], 2),
                 "–" if first is None else fixed(first["effective_n"], 0),
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
        shown = cite(f"{name}rate", typeset_percent(row["em_rate"]), "per cent", "`em_rate`", where)
        low_high = typeset_range(100 * row["em_low"], 100 * row["em_high"])
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
    icc = cite("icc", fixed(worst["icc"], 2), "ratio", "`icc`", where)
    if worst["icc"] > 0:
        effective = cite("effective_n", fixed(worst["effective_n"], 0), "responses", "`effective_n`", where)
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
        (r.questions, r.seeds, r.samples): f"{fixed(r.detectable)} ({fixed(r.power, 2)})" for r in table.itertuples()
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


def _study_settings(study: study_study.Study) -> Iterator[tuple[str, str, object, Path]]:
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
