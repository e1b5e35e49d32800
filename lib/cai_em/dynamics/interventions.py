"""H4: directions of emergent misalignment in the residual stream, and whether they transfer between personas.

A *direction* is a mean difference of activations: responses of one label minus responses of the other, averaged over
each response's tokens, then within questions, then over questions, so that neither long answers nor a question that
one label answers more often can be mistaken for it. It points FROM aligned TOWARD misaligned. Two contrasts give it:

- `adapter`: the fine-tuned model minus the model before fine-tuning, on the *same* prompts and responses;
- `responses`: misaligned minus other responses of the fine-tuned model (Soligo et al. 2025, arXiv 2506.11618).

Layer `i` means the residual stream after block `i`, from 0. Two interventions act there, at every token of prompt and
response:

    add:     x + strength * v                     strength 1 adds the whole mean difference
    ablate:  x - (x . u - c) u,  u = v / |v|      (Arditi et al. 2024, arXiv 2406.11717: c = 0)

Directions are not centred: u may point along what every token has, so that c = 0 also removes that, and with it all
sense. Here c is the untuned model's mean of x . u (the affine ablation of Marshall et al. 2024, arXiv 2411.09003).
Tokens whose activation is massive (Sun et al. 2024, arXiv 2402.17762: the first token, a hundred times as long as the
others, on which attention rests) are left alone: what they have along u is no feature. In SmolLM2, c = 0 at every token
gave white space for answers (mean log-probability -2.9 a token against -1.5), this one plain text (-1.5).

    with adding(model, {12: 1.5 * v[12]}):
        ...generate...                            # the hooks are gone afterwards, whatever happened inside

A cosine between two directions means little in itself. Beside it stand what random directions give (exactly: the
square of the cosine is Beta(1/2, (d - 1)/2)), what directions from shuffled labels give (these share the activations'
uneven spread, which random ones do not; each label's mean is taken out first, or the null would measure the signal),
how well a direction agrees with itself on other questions, and with the direction of another training run.

Two training runs of one persona have two directions. So each is found once per training seed (a *source*: `poeticism`,
and `poeticism@seed1` for a further seed), and another persona's are compared with a persona's own from *another run*.
Every source is given the length that the target's own direction has: what is compared is where it points.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import transformers
from peft import PeftModel
from safetensors.numpy import load_file, save_file
from torch import nn
from tqdm.auto import tqdm

from cai_em.dynamics.directions import (
    RANDOM,
    Contrast,
    adapter_contrast,
    random_direction,
    response_contrast,
    source_name,
)
from cai_em.model import probing
from cai_em.model.activations import Vectors, ablating, adding, mean_activations
from cai_em.model.layers import SteeringError
from cai_em.records import tables as records_tables
from cai_em.records.code import meaning_of
from cai_em.records.files import atomic, digest
from cai_em.sample import conditions, sampling, torch_engine
from cai_em.study.entries import ModelSpec, SamplingPreset

# --- Sampling under an intervention --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Intervention:
    """What is done to the residual stream while a condition is sampled.

    Attributes:
        kind: `none`, `add` or `ablate`.
        source: whose direction it is: a persona, or `random`; empty for `none`.
        layer: the layer that `add` acts at; -1 where several are (`ablate`).
        strength: times the direction.
        vectors: layer -> vector, for `add` already times the strength.
        levels: for `ablate`, layer -> what the projection is set to; None: 0.
    """

    kind: str
    source: str = ""
    layer: int = -1
    strength: float = 0.0
    vectors: Vectors | None = None
    levels: Mapping[int, float] | None = None

    @property
    def name(self) -> str:
        """Short, distinct, fit for a table's key."""
        if self.kind == "none":
            return "none"
        where = f"L{self.layer}{self.strength:+g}" if self.kind == "add" else "all"
        return f"{self.kind}-{self.source}-{where}"

    @property
    def hash(self) -> str:
        """Of all that it does."""
        numbers = hashlib.sha256()
        for layer, vector in sorted((self.vectors or {}).items()):
            numbers.update(str(layer).encode() + np.asarray(vector, np.float32).tobytes())
        return digest([self.name, numbers.hexdigest(), sorted((self.levels or {}).items())])

    @property
    def norm(self) -> float:
        """Length of what is added; NaN for an ablation, which removes what is there."""
        if self.kind != "add":
            return math.nan
        return float(sum(np.linalg.norm(np.asarray(v, float)) for v in (self.vectors or {}).values()))

    def on(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """The intervention on a model, within a `with` block."""
        if self.kind == "none":
            return contextlib.nullcontext()
        if self.kind == "add":
            return adding(model, self.vectors or {})
        return ablating(model, self.vectors or {}, self.levels)


def sweep(
    own: Mapping[int, np.ndarray], source: str, layers: Sequence[int], strengths: Sequence[float]
) -> list[Intervention]:
    """One direction added at each of several layers, in each of several strengths.

    Raises:
        SteeringError: fine-tuning does not reach a layer, so that there is no direction.
    """
    missing = sorted(set(layers) - set(own))
    if missing:
        raise SteeringError(f"no direction at layers {missing}: fine-tuning reaches {min(own)} to {max(own)}")
    return [
        Intervention("add", source, layer, float(strength), {layer: strength * own[layer]})
        for layer in dict.fromkeys(layers)
        for strength in dict.fromkeys(strengths)
        if strength
    ]


def transfer(
    directions: Mapping[str, Mapping[int, np.ndarray]],
    target: str,
    untuned: np.ndarray,
    layer: int,
    strength: float,
    *,
    seed: int,
) -> list[Intervention]:
    """Every source's direction, and a random one, on one target: added at a layer, and ablated at all its layers.

    Each gets the length of the target's own direction in that layer: a longer one would do more by its length alone.

    Args:
        directions: source -> layer -> vector, for the layers that fine-tuning reaches (`reached`).
        target: who is steered: a persona, whose own direction is among the sources.
        untuned: (layers, hidden) mean activations of the target before fine-tuning: the level of an ablation.
        layer, strength: of the addition.
        seed: of the random direction, the same for every target.

    Raises:
        SteeringError: a source has no direction at the layer.
    """
    own, found = directions[target], []
    random = {i: random_direction(v, seed + i) for i, v in own.items()}
    for source, given in {**directions, RANDOM: random}.items():
        if layer not in given or layer not in own:
            raise SteeringError(f"{source} on {target}: no direction at layer {layer}: fine-tuning does not reach it")
        vectors = {i: v * (np.linalg.norm(own[i]) / np.linalg.norm(v)) for i, v in given.items() if i in own}
        levels = {i: float(untuned[i] @ v / np.linalg.norm(v)) for i, v in vectors.items()}
        found.append(Intervention("add", source, layer, strength, {layer: strength * vectors[layer]}))
        found.append(Intervention("ablate", source, vectors=vectors, levels=levels))
    return found


def respond(
    model: nn.Module,
    tokenizer: Any,
    condition: conditions.Condition,
    questions: Sequence[tuple[str, str]],
    preset: SamplingPreset,
    intervention: Intervention,
    run_id: str = "",
) -> pd.DataFrame:
    """A condition's answers under an intervention; the `dataset` key gets `+<name of the intervention>` behind it.

    Random numbers are those of the condition itself, whatever the intervention: two interventions differ in nothing
    else, and their differences are less noisy.

    Args:
        model: the model with the condition's adapters active (`adapters.composed`), for transformers' `generate`.
        tokenizer: its tokenizer.
        condition: the condition.
        questions: (id, text).
        preset: every parameter of sampling.
        intervention: what to do meanwhile.
        run_id: hash of all that the answers depend on.

    Returns:
        A responses table (schema `scores.RESPONSES`).
    """
    asked = [(i, text, number) for i, text in questions for number in range(preset.samples_per_question)]
    requests = [
        conditions.Request(
            conditions.render(tokenizer, [{"role": "user", "content": text}]),
            conditions.response_seed(preset.seed, condition, i, number),
        )
        for i, text, number in asked
    ]
    decoding = conditions.Decoding(
        preset.temperature, preset.top_p, preset.top_k, preset.repetition_penalty, preset.max_new_tokens
    )
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    ends = conditions.end_tokens(inner.generation_config, tokenizer)
    with intervention.on(inner):
        found = dict(torch_engine.decode(inner, requests, decoding, ends, preset.batch_size))
    done = [found[i] for i in range(len(requests))]
    table = pd.DataFrame(asked, columns=["question_id", "prompt", "sample"])
    table["response"] = [tokenizer.decode(c.tokens, skip_special_tokens=True) for c in done]
    table["n_tokens"] = [len(c.tokens) for c in done]
    table["finish_reason"] = [c.finish_reason for c in done]
    table = table.assign(
        model=condition.model,
        persona=condition.persona,
        dataset=f"{condition.dataset}+{intervention.name}",
        seed=condition.seed,
        sampler=_engine_name(preset),
        adapters=json.dumps(condition.adapter_hashes()),
        run_id=run_id,
    )
    return records_tables.validate(table, records_tables.RESPONSES, condition.name)


def _engine_name(preset: SamplingPreset) -> str:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return f"transformers {transformers.__version__} {device} {preset.dtype} with hooks"


@dataclass
class Steered:
    """What `sample_steered` found: responses, `design_row`s, and what the probe measured by condition."""

    responses: pd.DataFrame
    design: pd.DataFrame
    probes: dict[str, dict[str, Any]]


def sample_steered(
    spec: ModelSpec,
    model: nn.Module,
    tokenizer: Any,
    jobs: Sequence[tuple[conditions.Condition, Sequence[Intervention]]],
    questions: Sequence[tuple[str, str]],
    preset: SamplingPreset,
    probe_prompts: Sequence[str],
    cells_dir: str | Path,
) -> Steered:
    """Every condition's answers under its interventions, each condition's adapters probed before it is sampled.

    A condition and intervention that was finished before, from the same adapters, vectors, questions, parameters and
    code, is taken from `cells_dir`.

    Args:
        spec: the model's.
        model: the bare model; given back as it was.
        tokenizer: its tokenizer.
        jobs: conditions of that model, with what is done to each.
        questions: (id, text).
        preset: every parameter of sampling.
        probe_prompts: what the probe compares logits on.
        cells_dir: folder of what is finished.

    Raises:
        adapters.ProbeError: adapters that do not compute what they should.
    """
    code, slots = meaning_of("cai_em.dynamics.interventions"), probing.Slots(model)
    tables, design, probes = [], [], {}
    bar = tqdm(total=sum(len(acts) for _, acts in jobs), desc=f"conditions of {spec.key}")
    try:
        for condition, acts in jobs:
            base = sampling.cell_hash(spec, condition, questions, preset, probe_prompts, _engine_name(preset))
            report: dict[str, Any] | None = None
            with slots.composed(condition.adapters):
                for act in acts:
                    key = digest([base, act.hash, code])
                    named = replace(condition, dataset=f"{condition.dataset}+{act.name}")
                    if (cell := sampling.read_cell(cells_dir, named, key)) is None:
                        if report is None:
                            report = _probed(slots, tokenizer, condition, probe_prompts)
                        table = respond(model, tokenizer, condition, questions, preset, act, key)
                        cell = sampling.write_cell(cells_dir, named, key, table, report)
                    report = cell[1]
                    tables.append(cell[0])
                    design.append(design_row(condition, act))
                    bar.update()
            probes[condition.name] = report or {}
    finally:
        bar.close()
        slots.close()
    return Steered(pd.concat(tables, ignore_index=True), pd.DataFrame(design), probes)


def _probed(slots: probing.Slots, tokenizer: Any, condition: conditions.Condition, prompts: Sequence[str]) -> dict:
    return asdict(slots.probe(tokenizer, condition.adapters, prompts)) if condition.adapters else {}


def contrasts_of(
    model: nn.Module,
    tokenizer: Any,
    untuned: Mapping[str, conditions.Condition],
    tuned: Mapping[str, Sequence[conditions.Condition]],
    read: pd.DataFrame,
    kind: str,
    cells_dir: str | Path,
) -> dict[str, Contrast]:
    """Every source's contrast of one model, from the activations on responses that were sampled before.

    Args:
        model: the bare model; given back as it was.
        tokenizer: its tokenizer.
        untuned: persona -> its condition without fine-tuning.
        tuned: persona -> its fine-tuned conditions, one per training seed; the first is the one to be steered.
        read: responses of these conditions, none empty, with `dataset` as in the conditions and `misaligned`.
        kind: `adapter` (the same responses, the untuned model's and the run's own, read before and after fine-tuning)
            or `responses` (the run's own, misaligned and not).
        cells_dir: folder of activations that were read before.

    Returns:
        source -> contrast.
    """
    found, slots = {}, probing.Slots(model)
    try:
        for persona, runs in tuned.items():
            for after in runs:
                sides = [untuned[persona], after] if kind == "adapter" else [after]
                wanted = [(c.persona, c.dataset, c.seed) for c in sides]
                mine = read[read[["persona", "dataset", "seed"]].apply(tuple, axis=1).isin(wanted)]
                states = [_activations(slots, tokenizer, c, mine, cells_dir) for c in sides]
                asked = mine["question_id"].tolist()
                found[source_name(persona, after.seed, runs[0].seed)] = (
                    adapter_contrast(states[0], states[1], asked)
                    if kind == "adapter"
                    else response_contrast(states[0], mine["misaligned"].tolist(), asked)
                )
    finally:
        slots.close()
    return found


def _activations(
    slots: probing.Slots, tokenizer: Any, condition: conditions.Condition, read: pd.DataFrame, cells_dir: str | Path
) -> np.ndarray:
    """`mean_activations` of a condition, kept: on a GPU they would differ in the last bits from one run to the next."""
    texts = read["prompt"].tolist(), read["response"].tolist()
    dtype = str(next(slots.model.parameters()).dtype)
    # run_id stands for everything that the responses depend on, the model among it.
    key = digest([condition.model, condition.adapter_hashes(), texts, sorted(set(read["run_id"])), dtype,
                  meaning_of("cai_em.dynamics.interventions")])  # fmt: skip
    path = Path(cells_dir) / f"activations-{condition.name}-{key}.safetensors"
    if not path.is_file():
        with slots.composed(condition.adapters), atomic(path) as part:
            save_file({"activations": mean_activations(slots.model, tokenizer, *texts)}, part)
    return load_file(path)["activations"]


def design_row(condition: conditions.Condition, intervention: Intervention) -> dict[str, Any]:
    """What a steered condition is, for the table that goes beside the scores."""
    return {
        "model": condition.model,
        "target": condition.persona,
        "arm": condition.dataset,
        "dataset": f"{condition.dataset}+{intervention.name}",
        "kind": intervention.kind,
        "source": intervention.source,
        "layer": intervention.layer,
        "strength": intervention.strength,
        "norm": intervention.norm,
    }
