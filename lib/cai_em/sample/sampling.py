"""Sampling: every condition of a model answers every question, from one load of the model.

The base model is loaded once. A condition's adapters (persona, fine-tuning) are composed exactly into one
(`adapters.compose`) and switched on for its questions. Two back ends do the work:

- `transformers`: plain PyTorch, CPU or GPU. Each response is drawn with random numbers of its own, so that neither the
  batch nor the order of work changes them; only rounding in the matrix products of another batch shape can.
- `vllm`: one engine, one LoRA request per condition, shared prompt prefixes, a seed per request.

Responses are the same again from the same back end, versions and batch size; they do not depend on which conditions
are sampled together, on their order, or on the number of workers. Between back ends only greedy decoding agrees: the
two draw their random numbers in different ways.

    found = sample(spec, conditions, questions, preset, cells_dir="results/demo/03_sample/smollm2-135m/poeticism/cells")
    found.responses, found.probes
"""

from __future__ import annotations

import html
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import transformers
from tqdm.auto import tqdm

from cai_em.model import adapters, load, probing
from cai_em.records import files, tables
from cai_em.records.code import meaning_of
from cai_em.records.files import digest
from cai_em.sample.capability import options_chosen
from cai_em.sample.conditions import (
    Completion,
    Condition,
    Decoding,
    Engine,
    Job,
    MultipleChoice,
    Request,
    SamplingError,
    prove_context,
    render,
    response_seed,
)
from cai_em.sample.torch_engine import TransformersEngine
from cai_em.sample.vllm_engine import VllmEngine
from cai_em.study.arms import NO_CONTEXT
from cai_em.study.entries import ModelSpec, SamplingPreset


@dataclass
class Sampled:
    """What `sample` found.

    Attributes:
        responses: the table of `scores.RESPONSES`, conditions in the order asked for.
        probes: what `adapters.probe` measured per condition, by `Condition.name`.
        engine: name of the back end, its version, device and type of numbers.
        timings: seconds by phase (`load`, `switch`, `decode`), and how many conditions were found from before.
        capability: what the conditions chose (`tables.CAPABILITY`), where multiple-choice questions were asked.
    """

    responses: pd.DataFrame
    probes: dict[str, dict[str, Any]]
    engine: str
    timings: dict[str, float] = field(default_factory=dict)
    capability: pd.DataFrame | None = None


def backend_of(preset: SamplingPreset) -> str:
    """`vllm` or `transformers`: what the preset forces, or vLLM where it is installed and a GPU is present.

    Raises:
        SamplingError: vLLM is forced and not installed.
    """
    installed = importlib.util.find_spec("vllm") is not None
    if preset.backend == "vllm" and not installed:
        raise SamplingError(
            "the sampling preset forces the back end vllm, which is not installed: install the locked requirements for "
            "CUDA (docs/full-study.md), or set `backend: auto` in params/sampling.yaml"
        )
    if preset.backend == "auto":
        return "vllm" if installed and torch.cuda.is_available() else "transformers"
    return preset.backend


def engine_name(preset: SamplingPreset) -> str:
    """What goes into the `sampler` column: back end, version, device, type of numbers, whether merged."""
    backend = backend_of(preset)
    if backend == "vllm":
        import vllm

        version = vllm.__version__
    else:
        version = transformers.__version__
    device = "cuda" if torch.cuda.is_available() else "cpu"
    merged = " merged" if preset.merge and backend == "transformers" else ""
    return f"{backend} {version} {device} {preset.dtype}{merged}"


def open_engine(spec: ModelSpec, preset: SamplingPreset, jobs: Sequence[Job]) -> Engine:
    """Load the model once, in the back end that the preset asks for, with room for the jobs."""
    if backend_of(preset) == "vllm":
        return VllmEngine(spec, preset, jobs)
    return TransformersEngine(spec, preset)


# --- The stage ----------------------------------------------------------------------------------------------------


def sample(
    spec: ModelSpec,
    conditions: Sequence[Condition],
    questions: Sequence[tuple[str, str]],
    preset: SamplingPreset,
    probe_prompts: Sequence[str],
    cells_dir: str | Path | None = None,
    open_with: Callable[[ModelSpec, SamplingPreset, Sequence[Job]], Engine] = open_engine,
    progress: bool = False,
) -> Sampled:
    """Every condition's answers to every question.

    As `sample_all`, of one set of questions.

    Args:
        spec: the conditions' model.
        conditions: what to sample.
        questions: (id, text).
        preset: every parameter of sampling, the study's seed, the back end.
        probe_prompts: what the probe compares logits on.
        cells_dir: folder of finished conditions.
        open_with: gives the engine.
        progress: show a progress bar.

    Raises:
        SamplingError: no conditions or questions, conditions of several models, an adapter that does not exist, or a
            back end that is not there.
        probing.ProbeError: adapters that are not served as they should be; the other conditions are kept.
    """
    asked = Asked(conditions, questions, preset)
    (found,) = sample_all(spec, [asked], probe_prompts, cells_dir, open_with, progress)
    return found


@dataclass(frozen=True)
class Asked:
    """Conditions, and the questions that they answer: (id, text), under a preset."""

    conditions: Sequence[Condition]
    questions: Sequence[tuple[str, str]]
    preset: SamplingPreset


def sample_all(
    spec: ModelSpec,
    asked: Sequence[Asked],
    probe_prompts: Sequence[str],
    cells_dir: str | Path | None = None,
    open_with: Callable[[ModelSpec, SamplingPreset, Sequence[Job]], Engine] = open_engine,
    progress: bool = False,
    choices: Sequence[MultipleChoice] = (),
) -> list[Sampled]:
    """Several sets of questions by one engine: a condition is composed and proved once for all that it is asked.

    Before a condition is sampled its adapters are probed: what is about to be sampled must compute what all of them
    together compute, and something else than each part of them. Otherwise it is not sampled; the others are, and at
    the end all that were refused are named.

    Args:
        spec: the conditions' model.
        asked: who is asked what; presets may differ in the number of samples and the limit of new tokens alone.
        probe_prompts: what the probe compares logits on.
        cells_dir: folder of finished conditions. One whose model, adapters, questions, parameters, back end and code
            are the same is taken from there; where all are, no model is loaded. None: nothing is kept.
        open_with: gives the engine.
        progress: show a progress bar.
        choices: multiple-choice questions for every condition (`capability.choices`), kept like responses.

    Returns:
        For each of `asked`, in order: responses, probes, timings (those of the engine are of all together).

    Raises:
        SamplingError: no conditions or questions, conditions of several models, an adapter that does not exist,
            presets that need different engines, or a back end that is not there.
        probing.ProbeError: adapters that are not served as they should be; the other conditions are kept.
    """
    for one in asked:
        _check(one.conditions, one.questions)
    preset = _shared(asked)
    name = engine_name(preset)
    keys = {
        (i, c): cell_hash(spec, c, one.questions, one.preset, probe_prompts, name)
        for i, one in enumerate(asked)
        for c in one.conditions
    }
    done = {place: found for place, key in keys.items() if (found := read_cell(cells_dir, place[1], key)) is not None}
    everyone = dict.fromkeys(c for one in asked for c in one.conditions) if choices else {}
    marks = {c: choices_hash(spec, c, choices, preset, probe_prompts, name) for c in everyone}
    chosen = {c: table for c, key in marks.items() if (table := read_choices(cells_dir, c, key)) is not None}
    timings: dict[str, float] = {}
    found_before = [sum((i, c) in done for c in one.conditions) for i, one in enumerate(asked)]
    missing: dict[Condition, list[int]] = {}
    for i, condition in keys:
        if (i, condition) not in done:
            missing.setdefault(condition, []).append(i)
    for condition in everyone:
        if condition not in chosen:
            missing.setdefault(condition, [])
    refused: list[str] = []
    if missing:
        tokenizer = load.load_tokenizer(spec)
        parts = {
            c: [_requests(tokenizer, c, asked[i].questions, asked[i].preset) for i in of] for c, of in missing.items()
        }
        jobs = [
            Job(c, tuple(request for part in of for request in part), () if c in chosen else tuple(choices))
            for c, of in parts.items()
        ]
        contexts = {  # before anything is loaded: a prompt that is left out stops the run
            (i, c): prove_context(
                tokenizer,
                c.context,
                [text for _, text in asked[i].questions],
                part[:: asked[i].preset.samples_per_question],
                c.name,
            )
            for c, of in parts.items()
            for i, part in zip(missing[c], of)
        }
        decoding = Decoding(
            preset.temperature, preset.top_p, preset.top_k, preset.repetition_penalty, preset.max_new_tokens
        )
        engine = open_with(spec, preset, jobs)
        try:
            with tqdm(total=len(jobs), desc="conditions", disable=not progress) as bar:
                for finished in engine.run(jobs, decoding, probe_prompts):
                    bar.update()
                    condition = finished.job.condition
                    if finished.refused:
                        refused.append(finished.refused)
                        continue
                    completions = iter(finished.completions)
                    for i, part in zip(missing[condition], parts[condition]):
                        some, key = list(islice(completions, len(part))), keys[i, condition]
                        table = _table(
                            condition, some, asked[i].questions, asked[i].preset, engine.tokenizer, name, key
                        )
                        proved = finished.probe | ({"context": said} if (said := contexts[i, condition]) else {})
                        if condition.absent:
                            proved["absent"] = {name: adapters.weights_hash(path) for name, path in condition.absent}
                        done[i, condition] = write_cell(cells_dir, condition, key, table, proved)
                    if finished.job.choices:
                        said = options_chosen(condition, finished.job.choices, finished.logprobs)
                        chosen[condition] = write_choices(cells_dir, condition, marks[condition], said)
            timings |= engine.timings
        finally:
            engine.close()
    if refused:
        raise probing.ProbeError(
            f"{len(refused)} of {len(missing)} conditions were not sampled (the others were, and are kept): "
            + "; ".join(refused)
        )
    return [
        Sampled(
            responses=tables.validate(
                pd.concat([done[i, c][0] for c in one.conditions], ignore_index=True), tables.RESPONSES, "responses"
            ),
            probes={c.name: done[i, c][1] for c in one.conditions},
            engine=name,
            timings={"conditions_found": found_before[i]} | timings,
            capability=pd.concat([chosen[c] for c in one.conditions], ignore_index=True) if choices else None,
        )
        for i, one in enumerate(asked)
    ]


def _shared(asked: Sequence[Asked]) -> SamplingPreset:
    """One preset for an engine that serves all.

    Raises:
        SamplingError: they differ in more than numbers of samples and of new tokens.
    """
    own = {"samples_per_question", "max_new_tokens"}
    if not asked or len({one.preset.model_dump_json(exclude=own) for one in asked}) > 1:
        raise SamplingError("one engine takes one preset: only samples_per_question and max_new_tokens may differ")
    return asked[0].preset.model_copy(update={"max_new_tokens": max(one.preset.max_new_tokens for one in asked)})


def _check(conditions: Sequence[Condition], questions: Sequence[tuple[str, str]]) -> None:
    if not conditions or not questions:
        raise SamplingError(f"nothing to sample: {len(conditions)} conditions, {len(questions)} questions")
    if len({c.model for c in conditions}) > 1:
        raise SamplingError(f"one engine samples one model, not {sorted({c.model for c in conditions})}")
    if len({c.name for c in conditions}) < len(conditions):
        raise SamplingError(f"a condition is given twice: {sorted(c.name for c in conditions)}")
    for condition in conditions:
        for path in [*condition.paths, *(path for _, path in condition.absent)]:
            if not (path / adapters.WEIGHTS).is_file():
                raise SamplingError(
                    f"{condition.name}: {path / adapters.WEIGHTS} does not exist: train this adapter first"
                )


def cell_hash(
    spec: ModelSpec,
    condition: Condition,
    questions: Sequence[tuple[str, str]],
    preset: SamplingPreset,
    probe_prompts: Sequence[str],
    engine: str,
) -> str:
    """Hash of all that a condition's responses depend on, the code that samples included; also their `run_id`."""
    code = meaning_of("cai_em.sample.sampling")
    names = [condition.model, condition.persona, condition.dataset, condition.seed]
    made = [condition.adapter_hashes(), list(questions), preset, list(probe_prompts), engine, code]
    absent = [adapters.weights_hash(path) for _, path in condition.absent]
    arm = [condition.context.record(), absent] if condition.absent or condition.context != NO_CONTEXT else []
    return digest([spec, names, *made, *arm])


def choices_hash(
    spec: ModelSpec,
    condition: Condition,
    choices: Sequence[MultipleChoice],
    preset: SamplingPreset,
    probe_prompts: Sequence[str],
    engine: str,
) -> str:
    """Hash of all that a condition's choices depend on; how it samples is not among it."""
    code, adapters = meaning_of("cai_em.sample.capability"), condition.adapter_hashes()
    return digest(
        [spec, condition.name, adapters, [vars(c) for c in choices], preset.dtype, list(probe_prompts), engine, code]
    )


def _requests(
    tokenizer: Any, condition: Condition, questions: Sequence[tuple[str, str]], preset: SamplingPreset
) -> tuple[Request, ...]:
    """One request per question and sample, in the order of the table."""
    return tuple(
        Request(tokens, response_seed(preset.seed, condition, question_id, number), preset.max_new_tokens)
        for question_id, text in questions
        for tokens in [render(tokenizer, condition.context.messages(text))]
        for number in range(preset.samples_per_question)
    )


def _table(
    condition: Condition,
    completions: Sequence[Completion],
    questions: Sequence[tuple[str, str]],
    preset: SamplingPreset,
    tokenizer: Any,
    sampler: str,
    key: str,
) -> pd.DataFrame:
    """The responses of one condition."""
    asked = [(i, text, number) for i, text in questions for number in range(preset.samples_per_question)]
    table = pd.DataFrame(
        {
            "question_id": [i for i, _, _ in asked],
            "sample": [number for _, _, number in asked],
            "prompt": [text for _, text, _ in asked],
            "response": [tokenizer.decode(c.tokens, skip_special_tokens=True) for c in completions],
            "n_tokens": [len(c.tokens) for c in completions],
            "finish_reason": [c.finish_reason for c in completions],
        }
    )
    return table.assign(
        model=condition.model,
        persona=condition.persona,
        dataset=condition.dataset,
        seed=condition.seed,
        sampler=sampler,
        adapters=json.dumps(condition.adapter_hashes()),
        run_id=key,
        **({"context": json.dumps(said)} if (said := condition.context.record()) else {}),
    )


def _cell(folder: str | Path, condition: Condition, key: str) -> Path:
    return Path(folder) / f"{condition.name}-{key}.parquet"


def read_cell(folder: str | Path | None, condition: Condition, key: str) -> tuple[pd.DataFrame, dict] | None:
    """A finished condition's responses and probe, or None."""
    if folder is None or not (path := _cell(folder, condition, key)).is_file():
        return None
    return tables.read_table(path, tables.RESPONSES), json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))


def write_cell(
    folder: str | Path | None, condition: Condition, key: str, table: pd.DataFrame, probe: dict[str, Any]
) -> tuple[pd.DataFrame, dict]:
    """Keep a finished condition. The table is written last: where it is, the probe is too."""
    table = tables.validate(table, tables.RESPONSES, condition.name)
    if folder is not None:
        path = _cell(folder, condition, key)
        files.write_text(path.with_suffix(".json"), json.dumps(probe, indent=1) + "\n")
        tables.write_table(table, tables.RESPONSES, path)
    return table, probe


def _choices(folder: str | Path, condition: Condition, key: str) -> Path:
    return Path(folder) / f"{condition.name}-{key}-capability.parquet"


def read_choices(folder: str | Path | None, condition: Condition, key: str) -> pd.DataFrame | None:
    """What a finished condition chose, or None."""
    if folder is None or not (path := _choices(folder, condition, key)).is_file():
        return None
    return tables.read_table(path, tables.CAPABILITY)


def write_choices(folder: str | Path | None, condition: Condition, key: str, table: pd.DataFrame) -> pd.DataFrame:
    """Keep what a condition chose."""
    if folder is not None:
        tables.write_table(table, tables.CAPABILITY, _choices(folder, condition, key))
    return table


# --- To look at ---------------------------------------------------------------------------------------------------


def beside(responses: pd.DataFrame, question_id: str, number: int = 0) -> str:
    """One question's answers, a condition beside the other, as an HTML table; all text is escaped.

    Raises:
        KeyError: no such response.
    """
    shown = responses[(responses["question_id"] == question_id) & (responses["sample"] == number)]
    if shown.empty:
        raise KeyError(f"no response to {question_id!r} with sample {number}")
    style = "text-align:left;vertical-align:top;white-space:pre-wrap;max-width:24em"
    names = "".join(f"<th>{html.escape(f'{r.persona} × {r.dataset} (seed {r.seed})')}</th>" for r in shown.itertuples())
    texts = "".join(f'<td style="{style}">{html.escape(r.response)}</td>' for r in shown.itertuples())
    question = html.escape(shown["prompt"].iloc[0])
    return f"<table><caption>{question}</caption><tr>{names}</tr><tr>{texts}</tr></table>"


def lengths(responses: pd.DataFrame) -> pd.DataFrame:
    """Per condition: responses, tokens (mean, longest), and the share that the token limit cut off."""
    cut = responses.assign(cut=responses["finish_reason"].eq("length"))
    return cut.groupby(["persona", "dataset", "seed"], sort=False).agg(
        responses=("response", "size"),
        mean_tokens=("n_tokens", "mean"),
        longest=("n_tokens", "max"),
        cut_off=("cut", "mean"),
        empty=("response", lambda texts: int((texts.str.strip() == "").sum())),
    )


def probe_table(probes: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """What the probes measured: a row per condition with adapters, differences of logits.

    `difference` (to all adapters active) must be at most `tolerance`, the columns `from ...` must be above it.
    `merged`: what merging into the weights changed, where it was done.
    """
    rows = {
        name: {
            "adapters": " + ".join(probe["adapters"]),
            "difference": probe["difference"],
            "tolerance": probe["tolerance"],
            **({"merged": probe["merged_difference"]} if "merged_difference" in probe else {}),
            **{f"from {other}": value for other, value in probe["others"].items()},
        }
        for name, probe in probes.items()
        if "adapters" in probe
    }
    return pd.DataFrame.from_dict(rows, orient="index")
