"""What a profile costs, before it starts: jobs, GPU hours, judge calls, dollars and disk; the assumptions named.

    python -m cai_em.plan paper

The plan counts what the grid, the presets and the judge's prices say; what cannot be known before (throughput, lengths)
comes from `params/plan.yaml`, and is printed with the result.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pandas as pd
from pydantic import Field

from cai_em.params import BASELINE, ParamsError, SftPreset, Strict, Study, load, read_as


class Assumptions(Strict):
    """What the plan cannot know (see params/plan.yaml)."""

    training_tokens_per_s: float = Field(gt=0)
    dpo_slowdown: float = Field(gt=0)
    sampling_tokens_per_s: float = Field(gt=0)
    engine_start_s: float = Field(ge=0)
    job_start_s: float = Field(ge=0)
    pair_tokens: float = Field(gt=0)
    row_tokens: float = Field(gt=0)
    response_tokens: float = Field(gt=0)
    judge_prompt_tokens: float = Field(gt=0)
    judge_answer_tokens: float = Field(gt=0)
    pairs_per_trait: float = Field(gt=0)
    traits: float = Field(gt=0)
    published_rows: float = Field(gt=0)
    adapter_bytes_per_parameter: float = Field(gt=0)


def assumptions(folder: str | Path) -> Assumptions:
    """The assumptions in a `params/` folder."""
    return read_as(Path(folder) / "plan.yaml", Assumptions)


def _rows(study: Study, dataset: str, preset: SftPreset, assumed: Assumptions) -> float:
    """Training rows of a data set: counted where they are built in, assumed where they will be fetched."""
    if study.profile.data == "builtin":
        with study.dataset_file(dataset).open(encoding="utf-8") as file:
            rows = sum(1 for line in file if line.strip())
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


def _most_rows(preset: SftPreset) -> float:
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
        (study.training_preset(t.preset), n * len(t.personas) * len(t.seeds)),
        *((study.training_preset(name), n) for name in t.beside),
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


def plan(study: Study, assumed: Assumptions) -> pd.DataFrame:
    """Jobs, GPU hours, judge calls, dollars and disk of each stage.

    Returns:
        A row per stage and `total`; columns `jobs`, `gpu_hours` (hours of one device; on a CPU profile the figure has
        no meaning and is null), `judge_calls`, `usd`, `disk_gb`.
    """
    p, sampling, judge = study.profile, study.sampling, study.judge
    seconds: dict[str, float] = {}
    rows: dict[str, dict] = {}
    gigabytes = 1e-9 * assumed.adapter_bytes_per_parameter

    def size(model: str) -> float:
        return (study.models[model].parameters_b or 7) / 7

    personas = study.persona_cells()
    dpo = study.persona_training
    pairs = assumed.traits * assumed.pairs_per_trait * study.generator.samples_per_prompt
    seconds["01_personas"] = sum(
        assumed.job_start_s
        + size(model)
        * (
            pairs * dpo.epochs * assumed.pair_tokens * assumed.dpo_slowdown / assumed.training_tokens_per_s
            + pairs * assumed.response_tokens / assumed.sampling_tokens_per_s
            + _introspection_seconds(study.introspection, assumed)
        )
        for model, persona in personas
        if study.personas[persona].kind == "constitutional"
    )
    # With a second stage: both stages' adapters, and their sum, whose rank is the sum of theirs.
    ranks = 2 * (dpo.lora.r + study.introspection.lora.r) if study.introspection else dpo.lora.r
    rows["01_personas"] = {
        "jobs": len(personas),
        "disk_gb": sum(_lora_parameters(study, m, ranks) for m, _ in personas) * gigabytes,
    }

    em, cells = study.em_training, study.em_cells()
    seconds["02_finetune"] = sum(
        assumed.job_start_s
        + size(c.model)
        * _rows(study, c.dataset, em, assumed)
        * em.epochs
        * assumed.row_tokens
        / assumed.training_tokens_per_s
        for c in cells
    )
    rows["02_finetune"] = {
        "jobs": len(cells),
        "disk_gb": sum(_lora_parameters(study, c.model, em.lora.r) for c in cells) * gigabytes,
    }

    conditions, shards = study.cells(), study.shards()
    per_condition = len(study.questions()) * sampling.samples_per_question
    responses = per_condition * len(conditions)
    tokens = min(assumed.response_tokens, sampling.max_new_tokens)
    seconds["03_sample"] = len(shards) * assumed.engine_start_s + sum(
        size(c.model) * per_condition * tokens / assumed.sampling_tokens_per_s for c in conditions
    )
    rows["03_sample"] = {"jobs": len(shards), "disk_gb": responses * 4e-6}

    calls = 2 * responses if judge.kind == "openai" else 0
    usd = calls * (
        (assumed.judge_prompt_tokens + tokens) * judge.usd_per_1m_input
        + assumed.judge_answer_tokens * judge.usd_per_1m_output
    )
    rows["04_judge"] = {"jobs": len(shards), "judge_calls": calls, "usd": usd / 1e6, "disk_gb": calls * 2e-6}

    def judging(sampled: int) -> dict[str, float]:
        calls = 2 * sampled if judge.kind == "openai" else 0
        usd = calls * (
            (assumed.judge_prompt_tokens + tokens) * judge.usd_per_1m_input
            + assumed.judge_answer_tokens * judge.usd_per_1m_output
        )
        return {"jobs": 1, "judge_calls": calls, "usd": usd / 1e6}

    weight = sum(map(size, study.models)) / len(study.models)
    if p.trajectory:
        runs = trajectory_runs(study)
        sampled = trajectory_responses(study)
        trained = sum(
            n * min(_rows(study, p.trajectory.dataset, preset, assumed) * preset.epochs, _most_rows(preset))
            for preset, n in runs
        )
        seconds["09_trajectories"] = weight * (
            trained * assumed.row_tokens / assumed.training_tokens_per_s
            + sampled * tokens / assumed.sampling_tokens_per_s
        ) + len(study.models) * (assumed.job_start_s + assumed.engine_start_s)
        held = sum(
            n * _checkpoints(preset) * sum(_lora_parameters(study, m, preset.lora.r) for m in study.models)
            for preset, n in runs
        ) / len(study.models)  # fmt: skip
        rows["09_trajectories"] = judging(sampled) | {"disk_gb": held * gigabytes}
    if p.steering:
        read, tried = steering_responses(study)
        # Steering hooks run on transformers, an order of magnitude below vLLM; so does reading activations.
        seconds["10_steering"] = weight * (read + tried) * tokens / (assumed.sampling_tokens_per_s / 10)
        rows["10_steering"] = judging(tried + (read if p.steering.contrast == "responses" else 0)) | {"disk_gb": 0.1}
    rows["analysis, report, paper"] = {"jobs": 5, "disk_gb": 0.1}

    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("stage")
    for column in ("jobs", "judge_calls", "usd", "disk_gb"):
        table[column] = table.get(column, pd.Series(dtype=float)).fillna(0.0).astype(float)
    table["gpu_hours"] = pd.Series(seconds) / 3600 if p.gpu else float("nan")
    table = table[["jobs", "gpu_hours", "judge_calls", "usd", "disk_gb"]]
    table.loc["total"] = table.sum(min_count=1)
    return table.astype({"jobs": int, "judge_calls": int})


def text(study: Study) -> str:
    """The plan as text: the grid in words, the table, the assumptions."""
    if study.profile.source == "published":
        return (
            f"{study.profile.title}: {len(study.cells())} published conditions; nothing is trained, sampled or judged"
        )
    assumed = assumptions(study.folder)
    table = plan(study, assumed)
    cells = study.cells()
    em = sum(study.datasets[c.dataset].role == "em" for c in cells)
    shown = table.map(lambda x: "" if pd.isna(x) or x == 0 else f"{x:,.1f}" if isinstance(x, float) else f"{x:,}")
    return "\n".join(
        [
            f"{study.profile.title}: {len(cells)} conditions of {', '.join(m.label for m in study.models.values())} "
            f"({len({c.persona for c in cells} - {BASELINE})} personas, {em} conditions with an EM data set, "
            f"seeds {', '.join(map(str, study.profile.seeds))}); judge: {study.judge.name}",
            "",
            shown.to_string(),
            "",
            "Assumed (params/plan.yaml): "
            + ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in assumed.model_dump().items()),
            *(
                ["", f"The judge's cost cap is ${study.judge.cost_cap_usd:g}: the run stops cleanly there and resumes."]
                if study.judge.cost_cap_usd
                else []
            ),
        ]
    )


def main(arguments: list[str]) -> int:
    """Command line: `python -m cai_em.plan PROFILE`."""
    try:
        print(text(load(arguments[0] if arguments else "demo")))
    except ParamsError as error:
        print(f"the parameters are not valid:\n{error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
