"""What is sampled: conditions, requests, decoding, seeds; and the engine that answers."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from transformers import GenerationConfig

from cai_em.model.adapters import weights_hash
from cai_em.records.files import text_hash
from cai_em.study import contexts
from cai_em.study.arms import NO_CONTEXT, Context
from cai_em.study.study import Cell, Study


class SamplingError(RuntimeError):
    """Sampling cannot start or its result cannot be trusted. The message names the condition and what to do."""


# --- What is asked for, and what comes back -----------------------------------------------------------------------


@dataclass(frozen=True)
class Decoding:
    """Every parameter of decoding. Temperature 0 is greedy; `top_k` 0 and `top_p` 1 are off."""

    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    max_new_tokens: int


@dataclass(frozen=True)
class Request:
    """A prompt as token ids, the seed of its answer's random numbers, its own limit of new tokens if it has one."""

    tokens: tuple[int, ...]
    seed: int
    longest: int | None = None


@dataclass(frozen=True)
class MultipleChoice:
    """A question as it is asked: what the model is told, the texts between which it chooses, which one is right."""

    item: str
    subject: str
    prompt: str
    options: tuple[str, ...]
    right: int


@dataclass(frozen=True)
class Completion:
    """An answer: token ids with the end token, if it came; `stop` or `length`; each token's log-probability.

    Log-probabilities are the model's own, before temperature, penalty and nucleus.
    """

    tokens: tuple[int, ...]
    finish_reason: str
    logprobs: tuple[float, ...]


@dataclass(frozen=True)
class Condition:
    """One condition and where its adapters lie: `(("persona", folder), ("em", folder))`, either or both left out.

    `may_be_idle` names adapters that need not make a difference yet, such as a snapshot from the first steps of
    training (under warm-up the first step's rate is 0); the probe then records it, and does not stop.

    `absent`: the persona adapter on which the fine-tuning took place, where it must not be active now; `context`: what
    surrounds each question.
    """

    model: str
    persona: str
    dataset: str
    seed: int
    adapters: tuple[tuple[str, Path], ...] = ()
    may_be_idle: tuple[str, ...] = ()
    absent: tuple[tuple[str, Path], ...] = ()
    context: Context = NO_CONTEXT

    @property
    def name(self) -> str:
        """`persona__dataset__seed0`: the condition in a file name."""
        return f"{self.persona}__{self.dataset}__seed{self.seed}"

    @property
    def paths(self) -> list[Path]:
        """The adapters' folders, persona first."""
        return [Path(path) for _, path in self.adapters]

    @property
    def trained_with(self) -> tuple[tuple[str, Path], ...]:
        """The adapters that were active together in training, where they are not those that are active now."""
        return (*self.absent, *(part for part in self.adapters if part[0] == "em")) if self.absent else ()

    def adapter_hashes(self) -> list[str]:
        """SHA-256 of each adapter's weights, persona first."""
        return [weights_hash(path) for path in self.paths]


def condition_of(study: Study, cell: Cell) -> Condition:
    """A cell of a study's grid as a condition to sample: its adapters, and what an arm changes about it."""
    made = tuple(study.adapters(cell)), (), tuple(study.absent(cell)), contexts.context(study, cell)
    return Condition(cell.model, cell.persona, cell.dataset, cell.seed, *made)


def prove_context(
    tokenizer: Any, context: Context, questions: Sequence[str], requests: Sequence[Request], what: str
) -> dict[str, Any]:
    """Prove on the tokens that a condition's context reaches the model: what is decoded from them holds all of it.

    Args:
        tokenizer: decodes them.
        context: what the condition's arm says.
        questions: what is asked.
        requests: a request of each question, as the engine will get it.
        what: the condition's name, for the message.

    Returns:
        For a manifest: the `system` prompt and `user` cue with their SHA-256, the first prompt as `rendered`, the
        number of `prompts` and the hash of their `tokens`. `{}` for a condition without a context.

    Raises:
        SamplingError: a part of it is not there.
    """
    if context == NO_CONTEXT:
        return {}
    texts = [
        tokenizer.decode(list(r.tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for r in requests
    ]
    for question, rendered in zip(questions, texts, strict=True):
        for message in context.messages(question):
            if message["content"].strip() not in rendered:
                raise SamplingError(
                    f"{what}: the {message['role']} turn is not in the prompt that the model would see: expected "
                    f"{message['content']!r:.90}, and the prompt is {rendered!r:.120}: the request was made without "
                    "it, or the model's chat template leaves it out"
                )
    said = {name: {"text": text, "sha256": text_hash(text)} for name, text in context.record().items()}
    tokens = hashlib.sha256(json.dumps([r.tokens for r in requests]).encode()).hexdigest()
    return said | {"rendered": texts[0], "prompts": len(requests), "tokens": tokens}


def response_seed(study_seed: int, condition: Condition, question_id: str, number: int) -> int:
    """The seed of one response: a hash of what names it, so that it does not depend on anything else (48 bits)."""
    name = [study_seed, condition.model, condition.persona, condition.dataset, condition.seed, question_id, number]
    return int.from_bytes(hashlib.sha256(json.dumps(name).encode()).digest()[:6], "big")


def render(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
    """A conversation as token ids by the model's chat template, ready for the assistant's turn."""
    return tuple(
        tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=True, return_dict=False)
    )


def end_tokens(config: GenerationConfig, tokenizer: Any) -> tuple[int, ...]:
    """Ids at which an answer ends: the tokenizer's, and those that the model's generation_config names.

    The one thing taken from generation_config: Llama and Qwen name more than one end there.
    """
    named = config.eos_token_id
    ids = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])}
    return tuple(sorted(i for i in ids if i is not None))


# --- Back ends ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A condition's requests, and the multiple-choice questions that it is asked besides."""

    condition: Condition
    requests: tuple[Request, ...]
    choices: tuple[MultipleChoice, ...] = ()


@dataclass(frozen=True)
class Done:
    """A job's completions, in the order of its requests, and what the probe of its adapters measured.

    `refused`: why nothing was sampled, where the probe did not pass; there are no completions then.
    `logprobs`: of each option of each of the job's choices, per token.
    """

    job: Job
    completions: tuple[Completion, ...]
    probe: dict[str, Any]
    refused: str | None = None
    logprobs: tuple[tuple[float, ...], ...] = ()


class Engine(Protocol):
    """A loaded model that answers under any condition's adapters.

    `timings` adds up seconds: `load` (the base), `switch` (composing and activating), `probe`, `decode`.
    """

    tokenizer: Any
    timings: dict[str, float]

    def run(self, jobs: Sequence[Job], decoding: Decoding, probe_prompts: Sequence[str]) -> Iterator[Done]:
        """Probe each job's adapters, answer its requests; yields jobs as they finish."""
        ...

    def close(self) -> None:
        """Give memory and processes back."""
        ...


@contextmanager
def _timed(timings: dict[str, float], phase: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        timings[phase] = timings.get(phase, 0.0) + time.perf_counter() - start
