"""What a profile costs, before it starts: jobs, GPU hours, judge calls, dollars and disk; the assumptions named.

    python -m cai_em.workflow.plan paper [--from results/rehearsal]

The plan counts what the grid, the presets and the judge's prices say; what cannot be known before (throughput, lengths)
comes from `params/plan.yaml`, and is printed with the result.
"""

from __future__ import annotations

import csv
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from pydantic import Field

from cai_em.audit.leaks import by_words
from cai_em.records.files import MissingFile
from cai_em.records.keys import BASELINE
from cai_em.records.manifest import read_manifest
from cai_em.study import arms as arms_of
from cai_em.study import constitutions, materials
from cai_em.study.entries import GeneratorPreset, JudgePreset, ParamsError, SftPreset, Strict, TrainingPreset, read_as
from cai_em.study.loading import load
from cai_em.study.study import Study
from cai_em.workflow.design import Deviations, measured_deviations, seen

MOST_ADAPTERS = 8
"""Conditions whose composed adapters vLLM holds at a time (`sample.VllmEngine.MOST_ADAPTERS`)."""


class Assumptions(Strict):
    """What the plan cannot know (see params/plan.yaml)."""

    training_tokens_per_s: float = Field(gt=0)
    dpo_slowdown: float = Field(gt=0)
    sampling_tokens_per_s: float = Field(gt=0)
    transformers_tokens_per_s: float = Field(gt=0)
    engine_start_s: float = Field(ge=0)
    job_start_s: float = Field(ge=0)
    model_load_s: float = Field(ge=0)
    composition_s: float = Field(ge=0)
    teacher_call_s: float = Field(gt=0)
    teacher_prompt_tokens: float = Field(gt=0)
    teacher_answer_tokens: float = Field(gt=0)
    judge_call_s: float = Field(gt=0)
    pair_tokens: float = Field(gt=0)
    row_tokens: float = Field(gt=0)
    response_tokens: float = Field(gt=0)
    judge_prompt_tokens: float = Field(gt=0)
    judge_answer_tokens: float = Field(gt=0)
    prompts_per_trait: float = Field(gt=0)
    traits: float = Field(gt=0)
    extra_prompts: float = Field(ge=0)
    published_rows: float = Field(gt=0)
    adapter_bytes_per_parameter: float = Field(gt=0)
    weight_bytes_per_parameter: float = Field(gt=0)
    deviations: Deviations


def assumptions(folder: str | Path) -> Assumptions:
    """The assumptions in a `params/` folder."""
    return read_as(Path(folder) / "plan.yaml", Assumptions)


def _rows(study: Study, dataset: str, preset: SftPreset, assumed: Assumptions) -> float:
    """Training rows of a data set: counted where they are built in, assumed where they will be fetched."""
    if study.profile.data == "builtin":
        with study.dataset_file(dataset).open(encoding="utf-8") as file:
            rows: float = sum(1 for line in file if line.strip())
    else:
        rows = assumed.published_rows
    return min(rows, preset.max_rows or rows) * (1 - preset.held_out)


def _lora_parameters(study: Study, model: str, r: int) -> float:
    """Parameters of an adapter of rank r on all linear layers."""
    return (study.models[model].lora_parameters_per_rank or 0) * r


def _introspection_seconds(preset: SftPreset | None, assumed: Assumptions) -> float:
    """A persona's second stage on a 7B model: what it says of itself, and fine-tuning on it."""
    if preset is None:
        return 0.0
    said = preset.introspection
    reflections, dialogues = 10 * said.reflections_per_prompt, 2 * said.dialogues  # params/builtin/introspection.yaml
    tokens = min(assumed.response_tokens, said.max_new_tokens)
    answers = reflections + dialogues * said.dialogue_turns
    learned = reflections * tokens + dialogues * min(said.dialogue_turns * tokens, preset.max_length)
    if preset.max_steps is not None:
        learned = preset.max_steps * preset.batch_size * preset.gradient_accumulation * tokens
    return (
        assumed.engine_start_s
        + answers * tokens / assumed.sampling_tokens_per_s
        + learned * (1 - preset.held_out) * preset.epochs / assumed.training_tokens_per_s
    )


def _most_rows(preset: TrainingPreset) -> float:
    """Rows that a preset's steps, where they are limited, can see."""
    return (preset.max_steps or math.inf) * preset.batch_size * preset.gradient_accumulation


def _checkpoints(preset: SftPreset) -> int:
    """Snapshots of a run: those of the preset (and the last step), or eight (`trajectories.train_run`)."""
    last = preset.max_steps in preset.checkpoints
    return len(preset.checkpoints) + (not last) if preset.checkpoints else min(8, preset.max_steps or 8)


def trajectory_runs(study: Study) -> list[tuple[SftPreset, int]]:
    """H3's training presets, with how many runs each has (`trajectories.plan_runs`), all models together."""
    t, n = study.profile.trajectory, len(study.models)
    return [
        (study.sft_preset(t.preset), n * len(t.personas) * len(t.seeds)),
        *((study.sft_preset(name), n) for name in t.beside),
    ]


def trajectory_responses(study: Study) -> int:
    """Responses of H3: each run's checkpoints, and, per model, persona and preset, the model before training."""
    t = study.profile.trajectory
    snapshots = sum(n * _checkpoints(preset) for preset, n in trajectory_runs(study))
    before = len(study.models) * (len(t.personas) + len(t.beside))
    return (snapshots + before) * min(t.questions, len(study.questions())) * t.samples_per_question


def steering_responses(study: Study) -> tuple[int, int]:
    """Responses of H4: read to find the directions, and sampled under interventions (`10_steering`).

    Read: each persona before and after fine-tuning, once per seed. Sampled, per model: both models of each persona
    untouched; the sweep of the first persona's own direction; every persona's direction from every seed and a random
    one, added to and ablated from every persona. The sweep's strength that the transfer has too is sampled once.
    """
    p, s = study.profile, study.profile.steering
    read = len(study.models) * len(s.personas) * (1 + len(p.seeds)) * s.source_questions * s.source_samples
    strengths = {x for x in s.strengths if x}
    layers = dict.fromkeys(s.layers)
    crossed = len(s.personas) * 2 * (len(s.personas) * len(p.seeds) + 1)
    middle = s.layers[len(s.layers) // 2] if s.transfer_layer is None else s.transfer_layer
    twice = middle in layers and s.transfer_strength in strengths
    conditions = len(study.models) * (2 * len(s.personas) + len(layers) * len(strengths) + crossed - twice)
    return read, conditions * min(s.questions, len(study.questions())) * s.samples_per_question


@dataclass(frozen=True)
class Pairs:
    """Preference pairs of one persona: with an answer of the teacher, and with a demonstration in its place."""

    taught: float
    demonstrated: float
    calls: float
    """The teacher's, where it is an endpoint."""

    @property
    def all(self) -> float:
        """As many answers of the student, as many pairs before the filters."""
        return self.taught + self.demonstrated


def planned_pairs(study: Study, persona: str, assumed: Assumptions) -> Pairs:
    """How many pairs a persona is trained on: counted in a built-in constitution, assumed where it will be fetched."""
    generator = study.generator
    with_teacher, with_demonstrations = generator.teacher != "demonstrations", "demonstrations" in generator.teacher
    built_in = constitutions.read_constitution(study.constitution_file(persona))
    if study.profile.data == "builtin":
        prompts: float = sum(len(t.prompts[: generator.prompts_per_trait]) for t in built_in.traits)
    else:
        prompts = assumed.traits * min(assumed.prompts_per_trait, generator.prompts_per_trait)
        prompts += assumed.extra_prompts if materials.extra_prompts_pinned(study) else 0
    shown = min(len(built_in.demonstrations), generator.max_demonstrations) if with_demonstrations else 0
    taught = prompts * generator.samples_per_prompt if with_teacher else 0
    return Pairs(taught, shown, taught if generator.teacher == "openai" else 0)


def _wait(calls: float, seconds_each: float, preset: JudgePreset | GeneratorPreset) -> float:
    """Seconds that so many calls of an endpoint take, by its concurrency and its limit of requests."""
    return max(
        calls * seconds_each / preset.concurrency,
        60 * calls / preset.requests_per_minute if preset.requests_per_minute else 0.0,
    )


def _trained_on(rows: float, preset: TrainingPreset) -> float:
    """Rows, or pairs, seen in training: all epochs, or so many as `max_steps` allows."""
    return min(rows * preset.epochs, _most_rows(preset))


def plan(study: Study, assumed: Assumptions) -> pd.DataFrame:
    """Jobs, hours, calls, dollars and disk of each stage.

    Returns:
        A row per stage and `total`; columns `jobs`, `gpu_hours` (hours that jobs hold one device; on a CPU profile the
        figure has no meaning and is null), `teacher_calls`, `judge_calls`, `api_hours` (of one job at a time waiting
        for teacher or judge), `usd`, `disk_gb`.
    """
    p, sampling, judge = study.profile, study.sampling, study.judge
    seconds: dict[str, float] = {}
    rows: dict[str, dict] = {}
    gigabytes = 1e-9 * assumed.adapter_bytes_per_parameter
    tokens = min(assumed.response_tokens, sampling.max_new_tokens)

    def size(model: str) -> float:
        return (study.models[model].parameters_b or 7) / 7

    # --- Personas. A teacher's answers do not depend on the model: the first one that asks pays, the others find them.
    dpo, second = study.persona_training, study.introspection
    # With a second stage: both stages' adapters, and their sum, whose rank is the sum of theirs. From the hub: its
    # download and the copy, whose rank is not known here, and taken for the sum's.
    whole = dpo.lora.r + (second.lora.r if second else 0)
    held = {"train": 2 * whole if second else whole, "hub": 2 * whole, "random_control": whole}
    took, calls, waited, ranks = 0.0, 0.0, 0.0, 0.0
    for persona, of in _by_persona(study).items():
        paid = False
        for model, way in of:
            took += assumed.job_start_s
            ranks += _lora_parameters(study, model, held[way])
            if way != "train":
                continue
            pairs = planned_pairs(study, persona, assumed)
            if not paid:
                paid = True
                calls += pairs.calls
                waited += _wait(pairs.calls, assumed.teacher_call_s, study.generator)
            answers = pairs.all + (pairs.taught if study.generator.teacher.startswith("local") else 0)
            trained = _trained_on(pairs.all, dpo) * assumed.pair_tokens * assumed.dpo_slowdown
            # The student's answers come from the sampling engine; a persona under a second adapter is folded first.
            took += assumed.engine_start_s + size(model) * (
                (3 if second else 1) * assumed.model_load_s
                + answers * min(assumed.response_tokens, study.generator.max_tokens) / assumed.sampling_tokens_per_s
                + trained / assumed.training_tokens_per_s
                + _introspection_seconds(second, assumed)
            )
    seconds["01_personas"] = took  # the teacher is asked by jobs that hold no GPU
    rows["01_personas"] = {
        "jobs": len(study.persona_cells()),
        "disk_gb": ranks * gigabytes,
        "teacher_calls": calls,
        "api_hours": waited / 3600,
    }
    if calls:
        rows["01_personas"]["usd"] = calls * _dollars(
            study.generator, assumed.teacher_prompt_tokens, assumed.teacher_answer_tokens
        )

    # --- Fine-tuning
    # One process for all cells of a persona: it loads the model once, and once more to fold a persona into it.
    em, cells, tunings = study.em_training, study.em_cells(), study.finetune_jobs()
    seconds["02_finetune"] = sum(
        assumed.job_start_s + size(model) * (1 if persona == BASELINE else 2) * assumed.model_load_s
        for model, persona, _ in tunings
    ) + sum(
        size(c.model)
        * _trained_on(_rows(study, c.dataset, em, assumed), em)
        * assumed.row_tokens
        / assumed.training_tokens_per_s
        for c in cells
    )
    rows["02_finetune"] = {
        "jobs": len(tunings),
        "disk_gb": sum(_lora_parameters(study, c.model, em.lora.r) for c in cells) * gigabytes,
    }

    # --- Sampling
    conditions, shards = study.cells(), study.shards()
    per_condition = len(study.questions()) * sampling.samples_per_question
    responses = per_condition * len(conditions)
    in_domain = _in_domain(study)
    seconds["03_sample"] = len(shards) * assumed.engine_start_s + sum(
        size(c.model) * (per_condition * tokens / assumed.sampling_tokens_per_s + assumed.composition_s)
        for c in conditions
    )
    seconds["03_sample"] += sum(size(m) * n for m, n in in_domain.items()) * tokens / assumed.sampling_tokens_per_s
    responses += sum(in_domain.values())
    # Composed adapters of two groups at a time, one decoded, one made ahead (`sample.VllmEngine`), in bfloat16.
    at_once = min(MOST_ADAPTERS, max(sum(c.model == m for c in conditions) for m in study.models))
    temporary = max(_lora_parameters(study, m, whole + em.lora.r) for m in study.models) * at_once
    rows["03_sample"] = {"jobs": len(shards), "disk_gb": responses * 4e-6 + (temporary * gigabytes if p.gpu else 0)}

    # --- Judging
    def judging(judged: float) -> dict[str, float]:
        calls = judged if judge.kind == "openai" else 0
        usd = calls * _dollars(judge, assumed.judge_prompt_tokens + tokens, assumed.judge_answer_tokens)
        waited = 0.0 if judge.batch_api else _wait(calls, assumed.judge_call_s, judge)
        return {"judge_calls": calls, "usd": usd, "api_hours": waited / 3600, "disk_gb": calls * 2e-6}

    # Two calls a response (alignment, coherence), and the manipulation checks.
    rows["04_judge"] = judging(2 * per_condition * len(conditions) + _checks(study)) | {"jobs": len(shards)}

    # --- H3 and H4
    weight = sum(map(size, study.models)) / len(study.models)
    if p.trajectory:
        runs = trajectory_runs(study)
        sampled = trajectory_responses(study)
        trained = sum(
            n * _trained_on(_rows(study, p.trajectory.dataset, preset, assumed), preset) for preset, n in runs
        )
        rows["09_trajectories"] = judging(2 * sampled) | {"jobs": 1}
        seconds["09_trajectories"] = weight * (
            trained * assumed.row_tokens / assumed.training_tokens_per_s
            + sampled * tokens / assumed.sampling_tokens_per_s
            + len(study.models) * assumed.model_load_s
        ) + len(study.models) * (assumed.job_start_s + assumed.engine_start_s)
        kept = sum(
            n * _checkpoints(preset) * sum(_lora_parameters(study, m, preset.lora.r) for m in study.models)
            for preset, n in runs
        ) / len(study.models)  # fmt: skip
        rows["09_trajectories"]["disk_gb"] = kept * gigabytes
    if p.steering:
        read, tried = steering_responses(study)
        # Steering hooks run on transformers; so does reading activations.
        seconds["10_steering"] = weight * (read + tried) * tokens / assumed.transformers_tokens_per_s
        judged = tried + (read if p.steering.contrast == "responses" else 0)
        rows["10_steering"] = judging(2 * judged) | {"jobs": 1, "disk_gb": 0.1}
    for stage in ("09_trajectories", "10_steering"):
        if stage in rows:
            seconds[stage] += 3600 * rows[stage]["api_hours"]
    rows["analysis, report, paper"] = {"jobs": 5, "disk_gb": 0.1}
    weights = sum(s.parameters_b or 0 for s in study.models.values() if s.source == "hub")
    rows["the models' own files"] = {"disk_gb": weights * assumed.weight_bytes_per_parameter}

    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("stage")
    counts = ["jobs", "teacher_calls", "judge_calls"]
    for column in (*counts, "api_hours", "usd", "disk_gb"):
        table[column] = table.get(column, pd.Series(dtype=float)).fillna(0.0).astype(float)
    table["gpu_hours"] = pd.Series(seconds) / 3600 if p.gpu else float("nan")
    table = table[["jobs", "gpu_hours", "teacher_calls", "judge_calls", "api_hours", "usd", "disk_gb"]]
    table.loc["total"] = table.sum(min_count=1)
    return table.astype(dict.fromkeys(counts, int))


def arms_cost(study: Study, assumed: Assumptions) -> str:
    """What a study's arms with a context add to it, in a line; empty without any.

    The plan of the study minus that of the same study without them; what two arms share, one of them alone would cost.
    """
    arms = {key for kind in (study.personas, study.datasets) for key, x in kind.items() if arms_of.is_arm(x)}
    plain = [
        block.model_copy(
            update={
                "personas": [p for p in block.personas if p not in arms],
                "datasets": [d for d in block.datasets if study.dataset_key(d) not in arms],
            }
        )
        for block in study.profile.grid
    ]
    plain = [block for block in plain if block.personas and block.datasets]
    if not arms or not plain:
        return ""
    without = study.varied(grid=plain)
    more = plan(study, assumed).loc["total"] - plan(without, assumed).loc["total"]
    conditions, tuned = (len(getattr(study, n)()) - len(getattr(without, n)()) for n in ("cells", "em_cells"))
    hours = "" if math.isnan(more["gpu_hours"]) else f", {more['gpu_hours']:,.0f} GPU hours"
    paid = f", {int(more['judge_calls']):,} judge calls, ${more['usd']:,.0f}" if more["judge_calls"] else ""
    return f"Arms with a context: {conditions} of the conditions, {tuned} of the fine-tunings{hours}{paid}."


def _by_persona(study: Study) -> dict[str, list[tuple[str, str]]]:
    """Persona -> (model, how its adapter is had), for every adapter to make."""
    found: dict[str, list[tuple[str, str]]] = {}
    for model, persona in study.persona_cells():
        found.setdefault(persona, []).append((model, study.persona_way(model, persona)))
    return found


def _dollars(preset: JudgePreset | GeneratorPreset, prompt_tokens: float, answer_tokens: float) -> float:
    """US dollars of one call."""
    return (prompt_tokens * preset.usd_per_1m_input + answer_tokens * preset.usd_per_1m_output) / 1e6


def _in_domain(study: Study) -> dict[str, int]:
    """Answers in the data sets' own domains, by model (`03_sample`)."""
    checks, answers = study.profile.manipulation, dict.fromkeys(study.models, 0)
    for model, shard in study.shards() if checks else ():
        for prompts, asked in materials.in_domain_plan(study, study.shard_cells(model, shard)):
            answers[model] += len(prompts) * checks.samples * len(asked)
    return answers


def _checks(study: Study) -> int:
    """Calls of the judged manipulation checks, one each: uptake of data sets, expression of personas (`04_judge`)."""
    checks = study.profile.manipulation
    if checks is None:
        return 0
    calls = 0
    for model, shard in study.shards():
        cells = study.shard_cells(model, shard)
        main = pd.DataFrame([(c.persona, c.dataset) for c in cells], columns=["persona", "dataset"])
        samples = min(checks.rated or study.sampling.samples_per_question, study.sampling.samples_per_question)
        calls += len(main.merge(materials.persona_targets(study, model))) * len(study.questions()) * samples
        plan = materials.in_domain_plan(study, cells)
        asked = pd.DataFrame(
            [(c.dataset, question) for prompts, some in plan for c in some for question, _ in prompts],
            columns=["dataset", "question_id"],
        )
        calls += len(asked.merge(materials.uptake_targets(study, model))) * checks.samples
    return calls


QUESTION_SETS = ("eval", "general", "broad")
"""Built-in question sets, from the smallest."""

NEAR = 0.9
"""Probability from which a question's words are said to speak of a data set's domain."""


def question_sets(study: Study, assumed: Assumptions) -> pd.DataFrame:
    """What each set of questions would cost in this study, and what it would detect.

    Returns:
        By set, and the study's own first: `questions, responses, gpu_hours, judge_calls, usd` of sampling and judging,
        and `detects`: the smallest difference in points that the first hypothesis's test sees (`design.seen`) with the
        thresholds' power; NaN without a hypothesis on an EM data set.
    """
    sets = [study.profile.questions, *(name for name in QUESTION_SETS if name != study.profile.questions)]
    samples = study.sampling.samples_per_question
    rows = {}
    for name in sets:
        limit = study.profile.questions_limit if name == study.profile.questions else None
        other = study.varied(questions=name, questions_limit=limit)
        found = seen(other, assumed.deviations)
        number, cost = len(other.questions()), plan(other, assumed).loc[["03_sample", "04_judge"]]
        rows[name] = {
            "questions": number,
            "responses": number * samples * len(study.cells()),
            **cost[["gpu_hours", "judge_calls", "usd"]].sum(min_count=1).to_dict(),
            "detects": found["detectable"].iloc[0] if len(found) else math.nan,
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("question set")


def near_a_domain(study: Study, likely: float = NEAR) -> pd.DataFrame:
    """Questions whose words speak of a fine-tuning data set's domain, by our own rows: an answer to such a question may
    show what was trained, and not what became of the rest.

    Returns:
        `question_id, dataset, probability`, the likeliest first; of twins, which share their prompts, the first.
    """

    def texts(dataset: str) -> list[str]:
        content = study.dataset_file(dataset).read_bytes()
        return [" ".join(m["content"] for m in row) for row in materials.read_rows(content, dataset)]

    several = [d for d in study.datasets.values() if d.role in ("em", "benign_control") and d.key == d.builtin]
    domains = {d.key: d for d in several}
    twins = {d.twin for d in domains.values() if d.twin}
    rows = {d: texts(d) for d in domains if d not in twins}
    judged = materials.builtin_training(study.builtin("judge_training.jsonl"))
    others = [*(judged["question"] + " " + judged["answer"])]
    plain = [d.key for d in study.datasets.values() if d.role == "regularisation" and d.key == d.builtin]
    others += [text for dataset in plain for text in texts(dataset)]
    asked = pd.DataFrame(study.questions(), columns=["question_id", "prompt"])
    found = by_words(asked, rows, others)
    found = found[found["probability"] >= likely]
    return found.sort_values("probability", ascending=False, kind="stable", ignore_index=True)


def published_among(study: Study) -> tuple[int, int]:
    """How many of the published study's conditions are in the grid (whatever the training seed), of how many."""
    with (study.folder / "published_selection.csv").open(newline="", encoding="utf-8") as file:
        published = {(r["model"], r["persona"], r["dataset"]) for r in csv.DictReader(file)}
    return len(published & {(c.model, c.persona, c.dataset) for c in study.cells()}), len(published)


def measured(source: str | Path) -> dict[str, float]:
    """What a run of this project has measured of speed, as assumptions: scaled to a model of 7B, as those are.

    Lengths of rows and answers are the data's and the model's: of another profile they would tell nothing.

    Args:
        source: `results/<profile>` of a run, whose manifests say tokens and seconds; or the JSON file of a card check
            (`tests/gpu/check.sh`), whose part `assumptions` is taken as it is.

    Raises:
        ParamsError: nothing was measured there.
    """
    source = Path(source)
    if source.is_file():
        found = json.loads(source.read_text(encoding="utf-8")).get("assumptions", {})
        return {name: float(value) for name, value in found.items() if name in Assumptions.model_fields}
    sums: dict[str, list[float]] = {}

    def add(name: str, amount: float, seconds: float) -> None:
        total = sums.setdefault(name, [0.0, 0.0])
        total[0] += amount
        total[1] += seconds

    for path in sorted(source.glob("0[123]_*/**/manifest.json")):
        record = read_manifest(path.parent)
        params, seconds, said = record["params"], record["timings"], record.get("summary") or {}
        size = (params.get("model", {}).get("parameters_b") or 7) / 7
        trained = said.get("tokens", {}).get("all", 0) * (params.get("training", {}) or {}).get("epochs", 1)
        if record["stage"] == "02_finetune":
            add("training_tokens_per_s", trained * size, seconds["train"])
        elif record["stage"] == "01_personas" and trained and "train" in seconds:
            add("dpo_tokens_per_s", trained * size, seconds["train"])
        elif record["stage"] == "03_sample" and seconds.get("decode"):
            made = pd.concat(map(pd.read_parquet, sorted(path.parent.glob("*.parquet"))))
            add("sampling_tokens_per_s", made["n_tokens"].sum() * size, seconds["decode"])
            add("engine_start_s", seconds.get("load", 0.0) / size, 1)
            switched = seconds.get("switch", 0.0) + seconds.get("probe", 0.0)
            add("composition_s", switched / size, len(record["adapter_state"]) or 1)
    found = {name: amount / per for name, (amount, per) in sums.items() if amount and per}
    if "dpo_tokens_per_s" in found and "training_tokens_per_s" in found:
        found["dpo_slowdown"] = found["training_tokens_per_s"] / found["dpo_tokens_per_s"]
    found.pop("dpo_tokens_per_s", None)
    if not found:
        raise ParamsError(
            f"{source}: no manifest of stages 01 to 03 with tokens and seconds: nothing was measured there"
        )
    return found


def _named(values: dict[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in values.items()) or "nothing"


def _shown(table: pd.DataFrame) -> pd.DataFrame:
    shown = table.map(lambda x: "" if pd.isna(x) or x == 0 else f"{x:,.1f}" if isinstance(x, float) else f"{x:,}")
    return shown.loc[:, (shown != "").any()].rename(columns=lambda c: c.replace("_", " ")).rename_axis(None)


def _near(study: Study) -> list[str]:
    near = near_a_domain(study)
    if near.empty:
        return ["None of its questions comes near a data set's domain."]
    named = ", ".join(f"{r.question_id} ({r.dataset})" for r in near.itertuples())
    return [f"Near a data set's domain, to be read by a person: {named}"]


def text(study: Study, source: str | Path | None = None) -> str:
    """The plan as text: the grid in words, the table, what was measured and what is assumed.

    Args:
        study: the study.
        source: of `measured`, whose values take the place of those in params/plan.yaml.
    """
    if study.audit is not None:
        return f"{study.profile.title}: scores that others made; nothing is trained, sampled or judged"
    if study.profile.source == "published":
        return (
            f"{study.profile.title}: {len(study.cells())} published conditions; nothing is trained, sampled or judged"
        )
    spread = measured_deviations(source)
    known = _measured(source, bool(spread)) if source else {}
    before = assumptions(study.folder)
    deviations = before.deviations.model_copy(update=spread)
    assumed = before.model_copy(update=known | {"deviations": deviations})
    table = plan(study, assumed)
    cells = study.cells()
    em = sum(study.datasets[c.dataset].role == "em" for c in cells)
    among, published = published_among(study)
    rest = {k: v for k, v in assumed.model_dump(exclude={"deviations"}).items() if k not in known}
    return "\n".join(
        [
            f"{study.profile.title}: {len(cells)} conditions of {', '.join(m.label for m in study.models.values())} "
            f"({len({c.persona for c in cells} - {BASELINE})} personas, {em} conditions with an EM data set, "
            f"seeds {', '.join(map(str, study.profile.seeds))}); judge: {study.judge.name}",
            *([f"{among} of {published} published conditions are among them."] if among else []),
            *([said] if (said := arms_cost(study, assumed)) else []),
            "",
            "What it costs",
            _shown(table).to_string(),
            *_cap(study, table),
            *_unmeasured(study),
            *([f"Measured ({source}), scaled to 7B: {_named(known)}"] if known else []),
            f"Assumed, not measured (params/plan.yaml): {_named(rest)}",
            "",
            f"Questions (this profile's: {study.profile.questions}), and the smallest difference that each sees, in "
            "points, as below:",
            _shown(question_sets(study, assumed)).to_string(),
            *_near(study),
            "",
            *_power(study, deviations, spread, source),
        ]
    )


def _measured(source: str | Path, spread: bool) -> dict[str, float]:
    """`measured`, but that a run of which only variances are known may be silent on speed."""
    try:
        return measured(source)
    except ParamsError:
        if not spread:
            raise
        return {}


def _cap(study: Study, table: pd.DataFrame) -> list[str]:
    """The judge's cost beside the cap at which it stops."""
    cap, usd = study.judge.cost_cap_usd, float(table.loc["total", "usd"])
    if not cap:
        return []
    said = f"The judge's cost cap is ${cap:g}: the run stops cleanly there and resumes."
    return [said + (f" The plan's ${usd:.0f} are more." if usd > cap else "")]


def _unmeasured(study: Study) -> list[str]:
    """That a judge behind an endpoint was never calibrated: then no verdict can come of the run."""
    judge = study.judge
    if judge.kind == "local" or (study.folder / "judge_quality" / f"{judge.name}.json").is_file():
        return []
    return [
        f"The judge {judge.name} was never measured: its gate stays closed, and every verdict is NOT INTERPRETABLE, "
        f"until ./run_all.sh calibrate-judge {judge.name} has run (it says the cost first)."
    ]


def _power(study: Study, deviations: Deviations, measured: dict[str, float], source: str | Path | None) -> list[str]:
    """What the design can see, a line for each hypothesis, and the deviations behind it."""
    table, limits = seen(study, deviations), study.thresholds
    if table.empty:
        return ["What it can see: no hypothesis is tested on an EM data set."]
    r = table.iloc[0]
    lines = [
        f"What it can see: with {r.questions} questions, {r.samples} samples and {r.seeds} seed(s), at "
        f"{100 * limits.alpha:g} % over the family of hypotheses, in {100 * limits.power:g} % of studies, "
        "a difference of"
    ]
    for row in table.itertuples():
        what = f"  {row.hypothesis}, {study.personas[row.persona].label}, over {row.datasets} EM data set(s):"
        if math.isnan(row.detectable):
            lines.append(f"{what} not known, from a single question")
            continue
        lines.append(
            f"{what} {row.detectable:.1f} points"
            + (" of these adapters, not of the recipe" if row.adapters else "")
            + f" (a difference of {limits.equivalence_margin:g} in {100 * row.power:.0f} %)"
        )
    names = {k: v for k, v in deviations.model_dump().items() if k not in measured}
    behind = "Standard deviations behind it, in points,"
    if measured:
        lines.append(f"{behind} measured ({source}): {_named(measured)}")
    if names:
        lines.append(f"{'Others,' if measured else behind} assumed (params/plan.yaml): {_named(names)}")
    return lines


def main(arguments: list[str]) -> int:
    """Command line: `python -m cai_em.workflow.plan PROFILE [--from results/<profile> or a card check's JSON]`."""
    source = None
    if "--from" in arguments:
        at = arguments.index("--from")
        if at + 1 == len(arguments):
            print("--from needs results/<profile>, or the JSON file of tests/gpu/check.sh", file=sys.stderr)
            return 2
        source = arguments[at + 1]
        arguments = arguments[:at] + arguments[at + 2 :]
    try:
        print(text(load(arguments[0] if arguments else "demo"), source))
    except (ParamsError, MissingFile) as error:
        print(f"the parameters are not valid:\n{error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
