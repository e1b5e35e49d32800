"""The paper's blocks: what each shows, taken from tables; how it is said stands in `templates/paper.md.j2`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
from markupsafe import Markup

from cai_em.analysis.contrasts import CLOSED, POOLED
from cai_em.analysis.units import MIN_SEEDS
from cai_em.records import manifest as records_manifest
from cai_em.records.keys import BASELINE, NO_DATASET
from cai_em.records.numbers import fixed, typeset_interval, typeset_p, typeset_percent, typeset_points, typeset_range
from cai_em.report.figure_files import slug
from cai_em.report.glance import Said
from cai_em.report.inputs import FLAG_WORDS, Inputs, _flags, _float_of, by_model, report_tables, whole_table
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
    read_result_table,
)
from cai_em.report.words import Words, by_note, where
from cai_em.study import study as study_study


class Blocks:
    """What the prose includes, by name: each method gives one or several blocks.

    Args:
        x: the results.
        numbers: where the values go that a block cites.
        figures: name -> figures as floats; `drawn`: which the run has.
    """

    def __init__(self, x: Inputs, numbers: Numbers, figures: Mapping[str, str]) -> None:
        self.x, self.numbers, self.figures = x, numbers, figures
        self.words = Words(x.look, strict=True, cite=_as_markdown(numbers.cite), link=_as_markdown(numbers.link))
        self.em: list[str] = []
        self.shown: dict[tuple[str, str], Markup] = {}

    def say(self, macro: str, *values: Any) -> str:
        """A macro of `paper.md.j2` as a block."""
        return self.words.macro("paper.md.j2", macro)(*values) + "\n"

    def caption(self, macro: str, *values: Any) -> str:
        """The same as a caption."""
        return self.say(macro, *values).strip()

    def all(self) -> dict[str, str]:
        """Every block, whatever the profile."""
        blocks = {n: text for n, text in self.figures.items() if n not in ("fig-arms", "fig-cross-model", "drawn")}
        for make in (self.status, self.settings, self.grid, self.provenance, self.alignment, self.hypotheses,
                     self.contrasts, self.comparisons, self.gates, self.outcomes):  # fmt: skip
            blocks |= make()
        for name, caption, stage in WHOLE_TABLES:
            blocks |= whole_table(self.x, self.numbers, name, f"tbl-{name}", caption, stage)
        for hypothesis, parts in DYNAMICS.items():
            tables, figures = [Markup(blocks.pop(part)) for part in parts], Markup(blocks.pop(FIGURES_OF[hypothesis]))
            blocks[hypothesis] = self.say(hypothesis, hypothesis in self.x.tables, tables, figures)
        blocks["claims"] += self.sentences()
        table = self.x.table("reliability")
        reliability = "" if table is None or table.empty else blocks["reliability"]
        del blocks["reliability"]
        arms = self.figures["fig-arms"] if "fig-arms" in self.figures["drawn"] else ""
        blocks |= {
            "arms": self.say("arms", Markup(arms)),
            "judge-agreement": self.say("judge_agreement", Markup(reliability)),
        }
        return blocks | self.models() | self.power() | self.report_tables() | self.findings(blocks["gates-text"])

    def notes(self, personas: Sequence[str]) -> list[tuple[str, list[str]]]:
        """What is known to be wrong with the rows of some personas, and their labels."""
        look = self.x.look
        found = by_note(look.sort_personas(p for p in personas if p in self.x.notes), self.x.notes)
        return [(note, [look.persona(p) for p in named]) for note, named in found]

    def remarks(self, personas: Sequence[str]) -> str:
        """What must be known to read a table: models that are not in it, known issues of the personas that are."""
        said = self.say("remarks", self.x.models_missing, self.notes(personas))
        return f"\n{said}" if said.strip() else ""

    # --- What this run is -----------------------------------------------------------------------------------------

    def status(self) -> dict[str, str]:
        """The first screen: the answer at a glance, then which profile it is from and when that was run."""
        x = self.x
        manifest = x.results / "06_results" / records_manifest.MANIFEST
        when = json.loads(manifest.read_text(encoding="utf-8"))["written"][:10] if manifest.is_file() else ""
        file = self.numbers.relative(x.score_files[0])
        folder = os.path.relpath(os.path.commonpath([Path(f).resolve() for f in x.score_files]), x.repository)
        for v in x.first.verdicts:
            source = x.tables["verdicts" if v.hypothesis in {h.key for h in x.hypotheses} else v.hypothesis]
            how = f"verdict on {v.label} in {v.model}"
            self.shown[v.model, v.hypothesis] = Markup(
                self.numbers.cite(f"verdict.{_name(v.label)}_{_name(v.model)}", v.verdict, "verdict", source, how)
            )
        where_from = when, file, folder, len(x.score_files)
        said = self.say("status", x.first, self.shown, x.profile["title"], *where_from, x.profile["name"])
        return {"made-by-run_all": said, "issues": self.say("issues", self.notes(list(x.notes)))}

    def grid(self) -> dict[str, str]:
        """The design: models, personas, data sets, seeds, arms, roles and samples."""
        x, look, numbers = self.x, self.x.look, self.numbers
        conditions, design, source = (
            x.results_table("conditions"),
            x.results_table("design"),
            x.results_file("conditions"),
        )
        tuned = conditions[conditions["dataset"] != NO_DATASET]
        roles = {d: look.role(d) for d in look.sort_datasets(tuned["dataset"])}
        responses = int(conditions["responses"].sum())
        for name, value, how in (
            ("questions", int(design["questions"].max()), "most questions of a condition (`design`)"),
            ("responses", responses, "sum of `responses`"),
            ("unscored", responses - int(conditions["scored"].sum()), "sum of `responses` minus sum of `scored`"),
        ):
            numbers.add(f"grid.{name}", f"{value:,}", "count", source, how)
        numbers.add("grid.judge", x.judge, "text", source, "name of the judge")
        grid = SimpleNamespace(
            conditions=len(conditions),
            models=listed([look.model(m) for m in x.models]),
            personas=int(tuned.loc[tuned["persona"] != BASELINE, "persona"].nunique()),
            datasets=len(roles),
            seeds=int(tuned.groupby(["model", "persona", "dataset"])["seed"].nunique().max()),
            arms=_arms(conditions),
        )
        rows = []
        for model in x.models:
            part = conditions[conditions["model"] == model]
            rows.append(
                [look.model(model), part["persona"].nunique(), part["dataset"].nunique(), len(part),
                 f"{int(part['responses'].sum()):,}", f"{int(part['scored'].sum()):,}",
                 _flags(part[list(FLAG_WORDS)].sum()) or "none"]
            )  # fmt: skip
        header = ["Model", "Personas", "Data sets", "Conditions", "Responses", "Scored", "Without a score"]
        caption = (
            "What was analysed. A response without a score is kept with its reason; personas include the baseline."
        )
        table = floating("tbl-grid", pipe_table(rows, header, "lrrrrrl"), caption + numbers.trace(source))
        sets = [(role, *names, [look.dataset(d) for d, r in roles.items() if r == role]) for role, *names in ROLE_NAMES]
        found = [part for part in sets if part[-1] or part[0] == "em"]
        return {
            "design": self.say("design", grid, source),
            "grid": table,
            "roles": self.say("roles", found, source),
            "samples": self.samples(conditions, design, source),
        }

    def samples(self, conditions: pd.DataFrame, design: pd.DataFrame, source: Path) -> str:
        """How often a question was answered: conditions differ in it."""
        questions = conditions["model"].map(design.set_index("model")["questions"])
        times = (conditions["responses"] / questions).round().astype(int)
        usual = int(times.mode().max())
        rest = times[times != usual]
        span = f"{rest.min()}" if rest.nunique() == 1 else f"{rest.min()} to {rest.max()}"
        return self.say(
            "samples", usual, SimpleNamespace(conditions=len(rest), span=span) if len(rest) else None, source
        )

    def provenance(self) -> dict[str, str]:
        """Whether this run trained and sampled, and what its manifests attest; or where its scores came from."""
        x, folder = self.x, self.x.results / "02_finetune"
        origin = x.profile.get("source")
        trained = origin == "trained"
        manifests = sorted(folder.rglob(records_manifest.MANIFEST)) if trained else []
        rows, bare = [], []
        for path in manifests:
            record = json.loads(path.read_text(encoding="utf-8"))
            state = (record.get("adapter_state") or {}).get("after_last_step") or {}
            active, trainable = (" + ".join(state.get(key) or []) for key in ("active", "trainable"))
            steps = (record.get("summary") or {}).get("steps")
            arm = ((record.get("params") or {}).get("persona") or {}).get("arm") or {}
            bare.append(arm.get("trained_on") == "baseline")  # its persona is a prompt in the rows
            rows.append([*path.parent.relative_to(folder).parts, active, trainable, state.get("base_trainable"),
                         state.get("base_dtype"), steps])  # fmt: skip
            self.numbers.relative(path)
        if not rows:
            return {"provenance": self.say("provenance", origin, None, "", "")}
        header = ["model", "persona", "dataset", "seed", "active", "trainable", "base_trainable", "dtype", "steps"]
        frame = pd.DataFrame(rows, columns=header)
        table = self.numbers.csv(manifests[0], frame, "adapters", len(manifests) - 1)
        stacked = frame[(frame["persona"] != BASELINE) & ~pd.Series(bare)]
        right = where(stacked, active="persona + em", trainable="em")
        adapters = SimpleNamespace(all=len(frame), stacked=len(stacked), right=len(right))
        return {"provenance": self.say("provenance", origin, adapters, table, TABLES_FOLDER)}

    def settings(self) -> dict[str, str]:
        """The parameters of the run, and the thresholds that the prose names."""
        x, numbers = self.x, self.numbers
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
        caption = "Parameters of this run, from the files that every stage read."
        table = pipe_table(rows, ["Stage", "Parameter", "Value", "File"], "llll")
        return {"settings": self.say("settings", Markup(floating("tbl-settings", table, caption) if rows else ""))}

    # --- Results --------------------------------------------------------------------------------------------------

    def alignment(self) -> dict[str, str]:
        """Means by persona: a table per model, and what each says."""
        x, look, source = self.x, self.x.look, self.x.results_file("by_persona")
        table, pooled = x.results_table("by_persona"), x.table("pooled")
        shared = {} if pooled is None else pooled.set_index(["model", "persona"])["common_mean"].to_dict()
        blocks = []
        for number, model in enumerate(look.sort_models(table["model"])):
            here = where(table, model=model).set_index("persona")
            rows = [
                [look.persona(p), f"{int(row['n']):,}", typeset_points(row["mean"]), typeset_points(row["sd"]),
                 typeset_interval(row["ci_low"], row["ci_high"]), typeset_interval(row["boot_low"], row["boot_high"]),
                 int(row["datasets"]), *([typeset_points(shared.get((model, p)))] if shared else [])]
                for p, row in ((p, here.loc[p]) for p in look.sort_personas(here.index))
            ]  # fmt: skip
            header = ["Persona", "N", "Mean", "SD", f"{x.confidence} CI", "Bootstrap CI", "Data sets"]
            header += ["Like for like"] if shared else []
            sets = len(where(pooled, model=model)["common_datasets"].iloc[0].split(",")) if shared else 0
            caption = self.caption("alignment_caption", model, sets)
            label = "tbl-alignment" + (f"-{slug(model)}" if number else "")
            caption += self.numbers.trace(source, *([x.tables["pooled"]] if shared else []))
            blocks.append(floating(label, pipe_table(rows, header, "l" + "r" * (len(header) - 1)), caption))
        blocks.append(self.remarks([]))
        said = []
        for model in x.models:
            base, main = _baseline(x, model), where(table, model=model).set_index("persona")["mean"]
            untuned, base = base.get(NO_DATASET), base.drop(NO_DATASET, errors="ignore")
            of = model, _name(model)
            said.append(self.say("alignment", *of, base, untuned, main, x.results_file("conditions"), source))
        return {"alignment": "\n".join(blocks), "alignment-text": "\n".join(said)}

    def hypotheses(self) -> dict[str, str]:
        """What was registered, and both verdicts on it."""
        x, found = self.x, _verdicts(self.x)
        listing = self.say("hypotheses", x.hypotheses).rstrip("\n")
        if not found:
            what = "Verdicts by the published rules and by rules that respect the design"
            return {"hypotheses": listing, "verdicts": absent("tbl-verdicts", what, "05_validity")}
        because = self.words.macro("glance.md.j2", "because")
        rows = [
            (v.model, [v.label, f"**{v.verdict}**", because(v), f"{v.published} ({supporting} of {datasets})"])
            for v, supporting, datasets in found
        ]
        header = ["Hypothesis", "Here", "Why", "Published rules"]
        content, caption = by_model(x.look, rows, header, "llll", self.caption("verdicts_caption"))
        caption += self.numbers.trace(x.tables["verdicts"], x.results_file("verdicts"))
        return {"hypotheses": listing, "verdicts": floating("tbl-verdicts", content, caption)}

    def contrasts(self) -> dict[str, str]:
        """What fine-tuning changed in each persona beside what it changed in the baseline, over the EM data sets."""
        x, look, table = self.x, self.x.look, self.x.table("contrasts")
        caption = self.caption("contrasts_caption", x.confidence)
        if table is not None and len(table):
            table = table[(table["estimand"] == "susceptibility") & table["dataset"].isin([POOLED, CLOSED])]
        if table is None or table.empty:
            return {"contrasts": absent("tbl-contrasts", caption.rstrip("."), "05_validity")}
        rows = []
        for (model, persona, reference, design), part in table.groupby(
            ["model", "persona", "reference", "dataset"], sort=False
        ):
            by = part.set_index("outcome")
            cells = [
                f"{typeset_points(r['estimate'], True)} {typeset_interval(r['low'], r['high'], 1, True)}, "
                f"p {typeset_p(r['p'])}"
                for r in by.reindex(["points", "em_rate", "ranks"]).to_dict("records")
            ]
            row = [look.persona(persona), "before fine-tuning" if reference == NO_DATASET else "its benign twin"]
            rows.append((model, [*row, *cells, "closed" if design == CLOSED else "open"]))
        header = ["Persona", "Beside", "Points", "EM rate, points of %", "Ranks", "Design"]
        content, caption = by_model(look, rows, header, "llrrrl", caption)
        return {"contrasts": floating("tbl-contrasts", content, caption + self.numbers.trace(x.tables["contrasts"]))}

    def comparisons(self) -> dict[str, str]:
        """Differences of the hypotheses' personas from the baseline: a table per model, and what each says."""
        x, look, table = self.x, self.x.look, self.x.table("comparisons")
        if table is None or table.empty:
            what = "Differences from the baseline, paired by question"
            text = "Comparisons with the baseline were not made in this run.\n"
            return {"comparisons": absent("tbl-comparisons", what, "05_validity"), "comparisons-text": text}
        source, alpha = x.tables["comparisons"], float(x.thresholds["alpha"])
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
            caption = self.caption("comparisons_caption", bool(keys), model, alpha, x.thresholds["equivalence_margin"])
            header = ["Persona", "Data set", "Mean", "Baseline", "Δ", x.confidence, "p", "p adj.", "p equiv.", "Gate"]
            label = "tbl-comparisons" + (f"-{slug(model)}" if number else "")
            table_ = pipe_table(rows, header, "llrrrrrrrl")
            blocks.append(floating(label, table_, caption + self.numbers.trace(source)))
        blocks.append(self.remarks([p for p in table["persona"].unique() if p in keys]))
        em = table[table["dataset"].map(look.role) == "em"]
        said = [
            self.caption("comparisons", where(em, model=model), model, _name(model), alpha, source)
            for model in look.sort_models(table["model"])
        ]
        return {"comparisons": "\n".join(blocks), "comparisons-text": " ".join(said) + "\n"}

    def gates(self) -> dict[str, str]:
        """Whether a classifier can name the personas; on which data set it sees them least, and most."""
        x, look, tests = self.x, self.x.look, self.x.table("tests")
        whole = None if tests is None else where(tests, scope="personas")
        if whole is None or whole.empty:
            block = absent("tbl-gates", "Whether a classifier can name the persona of a response", "05_validity")
            return {"gates": block, "gates-text": "No classifier was asked to name personas in this run.\n"}
        source, rows = x.tables["tests"], []
        for model in look.sort_models(whole["model"]):
            for dataset in look.sort_datasets(where(whole, model=model)["dataset"]):
                row = where(whole, model=model, dataset=dataset).iloc[0]
                auc = where(tests, scope="persona", model=model, dataset=dataset)["estimate"]
                rows.append(
                    (model, [_signed(look, dataset), fixed(row["estimate"], 2), fixed(row["chance"], 2),
                     typeset_interval(row["low"], row["high"], 2), typeset_p(row["p"]),
                     typeset_range(auc.min(), auc.max(), 2) if len(auc) else "–"])
                )  # fmt: skip
        header = ["Data set", "Accuracy", "Chance", x.confidence, "p", "AUC against baseline"]
        content, caption = by_model(look, rows, header, "lrrrrr", self.caption("gates_caption"))
        block = floating("tbl-gates", content, caption + self.numbers.trace(source))
        said = []
        for model in look.sort_models(whole["model"]):
            main = where(whole, model=model)
            main = main[main["dataset"] != NO_DATASET]
            excess = main["estimate"] - main["chance"]
            picks = {"least": main.loc[excess.idxmin()]} if len(main) > 1 else {}
            picks |= {"most": main.loc[excess.idxmax()]} if len(main) else {}
            said.append(self.caption("gates", picks, model, _name(model), source))
        return {"gates": block, "gates-text": " ".join(said) + "\n"}

    def outcomes(self) -> dict[str, str]:
        """EM rates by data set; the baseline's highest after fine-tuning beside the rate without it."""
        x, look, table = self.x, self.x.look, self.x.table("outcomes")
        if table is None or table.empty:
            what = "EM rate, missing scores and effective sample size by data set"
            text = "EM rates were not computed in this run.\n"
            return {"outcomes": absent("tbl-outcomes", what, "05_validity"), "em-text": text}
        source, rows = x.tables["outcomes"], []
        for model in look.sort_models(table["model"]):
            for dataset in look.sort_datasets(where(table, model=model)["dataset"]):
                part = where(table, model=model, dataset=dataset)
                base, other = where(part, persona=BASELINE), part.loc[part["persona"] != BASELINE, "em_rate"]
                own = ["–"] * 4
                if len(base):
                    first = base.iloc[0]
                    low_high = typeset_range(100 * first["em_low"], 100 * first["em_high"])
                    own = [f"{typeset_percent(first['em_rate'])} \\[{low_high}\\]", fixed(first["icc"], 2),
                           fixed(first["effective_n"], 0), str(int(first["n"]))]  # fmt: skip
                span = typeset_range(100 * other.min(), 100 * other.max()) if len(other) else "–"
                unscored = f"{int(part['n'].sum() - part['scored'].sum()):,}"
                rows.append((model, [_signed(look, dataset), own[0], span, unscored, *own[1:]]))
        header = ["Data set", "EM rate, baseline", "Personas", "No score", "ICC", "Eff. n", "n"]
        content, caption = by_model(look, rows, header, "lrrrrrr", self.caption("outcomes_caption", x.confidence))
        block = floating("tbl-outcomes", content, caption + self.numbers.trace(source))
        said = []
        for model in look.sort_models(table["model"]):
            base, name = where(table, model=model, persona=BASELINE), _name(model)
            tuned, untuned = base[base["dataset"] != NO_DATASET], where(base, dataset=NO_DATASET)
            worst = None if tuned.empty else tuned.loc[tuned["em_rate"].idxmax()]
            before = None if untuned.empty else untuned.iloc[0]
            self.em.append(self.caption("em_rate", model, name, worst, before, source))
            said.append(f"{self.em[-1]} {self.caption('em_icc', name, worst, source)}".strip())
        return {"outcomes": block, "em-text": "\n\n".join(said) + "\n"}

    def models(self) -> dict[str, str]:
        """The section on several models: what they share, or that there is one only."""
        x, table = self.x, self.x.results_table("cross_model")
        several = len(x.models) > 1 and not table.empty
        floats = (
            self.figures["fig-cross-model"] + "\n" + _float_of(x, self.numbers, "cross_model", table) if several else ""
        )
        return {"models": self.say("models", several, x.models_missing, Markup(floats))}

    def report_tables(self) -> dict[str, str]:
        """The tables of the results document; of the comparisons, those that are significant by the published rules."""
        x, alpha, source = self.x, float(self.x.thresholds["alpha"]), self.x.results_file("comparisons")
        compared = x.results_table("comparisons")
        found = compared[compared["p_adj"] < alpha].sort_values("p_adj", kind="stable")
        text = self.say("significant", found, compared, alpha, source)
        tables = report_tables(x, self.numbers, found)
        tables["table-significant"] = f"{text}\n{tables['table-significant']}"
        if len(found):
            tables["table-significant"] += self.remarks(list(found["persona"].unique()))
        return tables

    def findings(self, gates: str) -> dict[str, str]:
        """The abstract's findings: sentences for which the run has the data, and no others."""
        x, scored = self.x, int(self.x.results_table("conditions")["scored"].sum())
        gates = gates.strip() if x.table("tests") is not None else ""
        models = listed([x.look.model(m) for m in x.models])
        em = Markup(" ".join(self.em))
        tested = [said for said in x.first.hypotheses if said[0].published]
        return {"findings": self.say("findings", models, scored, x.results_file("conditions"), em, Markup(gates),
                                     tested, self.shown)}  # fmt: skip

    def power(self) -> dict[str, str]:
        """What designs can detect: questions and seeds down, samples across."""
        x, table = self.x, self.x.table("power")
        caption = self.caption(
            "power_caption", x.thresholds["power"], x.thresholds["alpha"], x.thresholds["equivalence_margin"]
        )
        if table is None or table.empty:
            return {"power": absent("tbl-power", caption.rstrip("."), "05_validity")}
        samples = sorted(table["samples"].unique())
        cells = {(r.questions, r.seeds, r.samples): _seen(r) for r in table.itertuples()}
        rows = [
            [questions, seeds, *(cells.get((questions, seeds, s), "–") for s in samples)]
            for questions, seeds in sorted({(q, s) for q, s, _ in cells})
        ]
        header = ["Questions", "Seeds", *(count_of(int(s), "sample") for s in samples)]
        content = pipe_table(rows, header, "r" * len(header))
        return {"power": floating("tbl-power", content, caption + self.numbers.trace(x.tables["power"]))}

    def sentences(self) -> str:
        """What the audit says of the hypotheses, a sentence each; single comparisons are in the tables."""
        claims = self.x.tables.get("claims")
        audited = claims and claims.with_name("verdicts.parquet")
        if not audited or not audited.is_file():
            return ""
        said = self.words.macro("sentences.md.j2", "verdict")
        lines = [f"- {said(row)}" for row in read_result_table(audited).itertuples()]
        return "\n" + "\n".join(lines) + "\n" if lines else ""


WHOLE_TABLES = (
    ("claims", "Claims audit: in what share of the defensible analyses each published claim stands.", "08_claims"),
    ("reliability", "Agreement of repeated judgings of the same responses.", "05_validity"),
    ("h3", "H3: the verdict, and what it hangs on.", "09_trajectories"),
    ("trajectories", "H3: when misalignment arises, by persona.", "09_trajectories"),
    ("beside", "Training presets beside the main one, at the last checkpoint.", "09_trajectories"),
    ("h4", "H4: the verdict, what it hangs on, and which contrast gave the directions.", "10_steering"),
    ("steering", "H4: transfer of the misalignment direction between personas.", "10_steering"),
)
"""Tables that are shown as they are: name, caption, stage."""
ROLE_NAMES = (
    ("em", "em_datasets", "EM data set", "EM data sets"),
    ("benign_control", "controls", "benign control", "benign controls"),
    ("regularisation", "corpora", "regularisation corpus", "regularisation corpora"),
    ("arm", "arms", "arm with a context", "arms with a context"),
)
DYNAMICS = {"h3": ("h3", "trajectories", "beside"), "h4": ("h4", "steering")}
"""The tables of the stages that need training: each stage is one block, a sentence where it was not run."""
FIGURES_OF = {"h3": "fig-trajectories", "h4": "fig-steering"}
DESIGN_ARMS = ("base", "persona alone", "fine-tuning alone", "both")


def _arms(conditions: pd.DataFrame) -> list[str]:
    """The arms of the design that a run has."""
    baseline, tuned = conditions["persona"] == BASELINE, conditions["dataset"] != NO_DATASET
    masks = (baseline & ~tuned, ~baseline & ~tuned, baseline & tuned, ~baseline & tuned)
    return [arm for arm, mask in zip(DESIGN_ARMS, masks) if mask.any()]


def _as_markdown(write: Callable[..., str]) -> Callable[..., Markup]:
    return lambda *args: Markup(write(*args))


def _baseline(x: Inputs, model: str) -> pd.Series:
    """Mean alignment of the baseline on each data set of a model, all seeds together."""
    table = x.results_table("conditions")
    table = table[(table["model"] == model) & (table["persona"] == BASELINE) & (table["scored"] > 0)]
    sums = (table["mean"] * table["scored"]).groupby(table["dataset"]).sum()
    return sums / table.groupby("dataset")["scored"].sum()


def _name(text: str) -> str:
    """A key or label as a part of a number's name."""
    return slug(text).replace("-", "_")


def _verdicts(x: Inputs) -> list[tuple[Said, int, int]]:
    """Every verdict with how many data sets support it by the published rules, of how many."""
    if "verdicts" not in x.tables:
        return []
    supports = x.results_table("verdicts").set_index(["model", "hypothesis"])[["supporting", "datasets"]].astype(int)
    keys = {h.key for h in x.hypotheses}
    return [(v, *supports.loc[(v.model, v.hypothesis)]) for v in x.first.verdicts if v.hypothesis in keys]


def _seen(r: Any) -> str:
    """What a design sees: of the recipe, or with few seeds of these adapters."""
    power, smallest = (r.power_adapters, r.detectable_adapters) if r.seeds < MIN_SEEDS else (r.power, r.detectable)
    return "not known" if pd.isna(power) else f"{fixed(smallest)} ({fixed(power, 2)})"


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
