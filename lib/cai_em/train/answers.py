"""Who answers the prompts of preference pairs: a teacher, the student, or whoever wrote the demonstrations."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock
from tqdm.auto import tqdm

from cai_em.endpoint import asking, client
from cai_em.endpoint import cache as endpoint_cache
from cai_em.endpoint import calls as endpoint_calls
from cai_em.endpoint.cache import JudgeCache, JudgeError
from cai_em.model.load import base_name, load_tokenizer
from cai_em.records.files import valid_unicode
from cai_em.sample.conditions import Condition, Decoding, Engine, Job, Request, end_tokens, render
from cai_em.sample.sampling import backend_of, engine_name, open_engine
from cai_em.sample.torch_engine import decode
from cai_em.study.entries import GeneratorPreset, ModelSpec, SamplingPreset


class PairsError(RuntimeError):
    """Pairs cannot be made. The message says what to do."""


# --- Who answers --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingPrompt:
    """A conversation to be answered, and the seed of the answer."""

    messages: tuple[tuple[str, str], ...]
    seed: int

    @property
    def as_dicts(self) -> list[dict[str, str]]:
        """The conversation as chat APIs want it."""
        return [{"role": role, "content": content} for role, content in self.messages]


@dataclass(frozen=True)
class Reply:
    """An answer's text, and whether the token budget cut it off; or, without a text, why there is none (`refused`)."""

    text: str
    cut: bool = False
    refused: str | None = None


class Generator(Protocol):
    """Who answers questions: the teacher or the student.

    `identity` is what the answers depend on (model, parameters); with the question it is the key of the cache.
    """

    identity: Mapping[str, Any]

    def answer(self, questions: Sequence[TrainingPrompt]) -> Iterator[tuple[int, Reply]]:
        """Answer each question; yields (its index, the answer) as answers become known, in any order."""
        ...


class LocalGenerator:
    """A model in this process, in batches. Each answer is drawn with random numbers of its own (`sample.decode`).

    Args:
        load: gives a transformers causal language model and its tokenizer; called when the first answer is needed, so
            that a run whose answers are all known loads no model.
        name: what identifies the weights, for the cache.
        preset: temperature, nucleus and number of new tokens.
        batch_size: rows per batch.
    """

    def __init__(
        self, load: Callable[[], Sequence[Any]], name: str, preset: GeneratorPreset, batch_size: int = 32
    ) -> None:
        self._load, self.batch_size = load, batch_size
        self._loaded: Sequence[Any] | None = None
        # No longer than what the filters keep: a budget above that is a teacher's, for its thinking.
        longest = min(preset.max_new_tokens, preset.max_tokens)
        self.decoding = Decoding(preset.temperature, preset.top_p, 0, 1.0, longest)
        self.identity = {"local": name, **vars(self.decoding)}

    def close(self) -> None:
        """The model is the caller's, and stays."""

    def answer(self, questions: Sequence[TrainingPrompt]) -> Iterator[tuple[int, Reply]]:
        """Answer each question; yields (its index, the answer) batch by batch."""
        if self._loaded is None:
            self._loaded = self._load()
        model, tokenizer = self._loaded
        requests = [Request(render(tokenizer, q.as_dicts), q.seed) for q in questions]
        ends = end_tokens(model.generation_config, tokenizer)
        for index, found in decode(model, requests, self.decoding, ends, self.batch_size):
            text = tokenizer.decode(found.tokens, skip_special_tokens=True)
            yield index, Reply(text, cut=found.finish_reason == "length")


class EngineGenerator:
    """A model with adapters in one of the sampling back ends (vLLM where there is a GPU), probed as when it is sampled.

    Args:
        spec: the model.
        adapters: (name, folder), persona first.
        preset: temperature, nucleus, number of new tokens, back end, batch size.
        probe_prompts: on which the adapters are proved to be active.
        longest_prompt: room for so many tokens of prompt; None: for the longest that is asked.
    """

    CHUNK = 4096
    """So many answers come, and are kept, together: a minute's work on a GPU. An engine proves adapters once."""

    def __init__(
        self,
        spec: ModelSpec,
        adapters: Sequence[tuple[str, Path]],
        preset: SamplingPreset,
        probe_prompts: Sequence[str],
        longest_prompt: int | None = None,
    ) -> None:
        self.spec, self.preset, self.probe_prompts, self.room = spec, preset, list(probe_prompts), longest_prompt
        self.condition = Condition(spec.key, "asked", "none", 0, tuple(adapters))
        self.decoding = Decoding(
            preset.temperature, preset.top_p, preset.top_k, preset.repetition_penalty, preset.max_new_tokens
        )
        self._engine: Engine | None = None
        hashes = self.condition.adapter_hashes()
        self.identity = {"engine": engine_name(preset), "model": spec.key, "adapters": hashes, **vars(self.decoding)}

    def answer(self, questions: Sequence[TrainingPrompt]) -> Iterator[tuple[int, Reply]]:
        """Answer each question; yields (its index, the answer) chunk by chunk.

        Raises:
            adapters.ProbeError: the adapters are not active as they must be.
        """
        tokenizer = load_tokenizer(self.spec)
        asked = [Request(render(tokenizer, q.as_dicts), q.seed) for q in questions]
        longest = max(len(request.tokens) for request in asked)
        if self._engine is not None and longest > (self.room or 0):
            self.close()
        if self._engine is None:
            self.room = max(longest, self.room or 0)
            # A job as long as any: vLLM makes its room by it.
            self._engine = open_engine(self.spec, self.preset, [Job(self.condition, (Request((0,) * self.room, 0),))])
        for start in range(0, len(questions), self.CHUNK):
            job = Job(self.condition, tuple(asked[start : start + self.CHUNK]))
            (done,) = self._engine.run([job], self.decoding, self.probe_prompts)
            for index, found in enumerate(done.completions):
                text = tokenizer.decode(found.tokens, skip_special_tokens=True)
                yield start + index, Reply(text, cut=found.finish_reason == "length")

    def close(self) -> None:
        """Give the engine's memory back, if one was opened."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None


def student_of(
    spec: ModelSpec, sampling: SamplingPreset, generator: GeneratorPreset, load: Callable[[], Sequence[Any]]
) -> LocalGenerator | EngineGenerator:
    """Who answers plainly, and, where the teacher is `local`, in character too: the model, in the study's back end.

    Args:
        spec: the model.
        sampling: back end and precision of the study.
        generator: temperature, nucleus and lengths.
        load: gives model and tokenizer, where the back end is transformers; called when the first answer is needed.
    """
    if backend_of(sampling) == "transformers":
        weights = f"{base_name(spec)}@{spec.revision or 'built in'} {sampling.dtype}"
        return LocalGenerator(load, weights, generator)
    how = {"temperature": generator.temperature, "top_p": generator.top_p, "top_k": 0, "repetition_penalty": 1.0}
    how["max_new_tokens"] = min(generator.max_new_tokens, generator.max_tokens)
    return EngineGenerator(spec, [], sampling.model_copy(update=how), [])


class EndpointGenerator:
    """Any endpoint that speaks OpenAI's chat protocol: OpenAI, OpenRouter, a vLLM server.

    It is asked as the judge is (`judge_run`): one call alone first, then `preset.concurrency` at a time, with limits,
    retries, a check of the answering model's name, and a cost cap. Each answer is kept in a file of its own as soon as
    it has arrived and been paid for, and is never asked for again. Several jobs may share the file (the teacher's
    answers are the same for every student): while one asks, the others wait, and then find its answers.

    Args:
        preset: model, base_url, api_key_env, sampling parameters, limits and prices.
        cache_path: where what was paid for is kept, outside of what `clean` removes.
        backoff: waits between attempts.

    Attributes:
        usage: what was done and spent.

    Raises:
        PairsError: no model is named, or the key is not in the environment (a server on this machine needs none).
    """

    def __init__(self, preset: GeneratorPreset, cache_path: str | Path, backoff: client.Backoff | None = None) -> None:
        if not preset.model:
            raise PairsError("the generator's teacher is an endpoint: name its model (params/generators.yaml, `model`)")
        self._endpoint = preset.endpoint()
        try:
            endpoint_calls.check_endpoint(self._endpoint, "teacher")
        except JudgeError as error:
            raise PairsError(str(error)) from None
        self.preset, self.cache_path, self._backoff = preset, Path(cache_path), backoff
        self.usage = endpoint_calls.Usage()
        self.identity: Mapping[str, Any] = {
            "endpoint": preset.base_url,
            **preset.model_dump(include={"model", "temperature", "top_p", "max_new_tokens", "extra_body"}),
        }

    def _call(self, question: TrainingPrompt) -> endpoint_calls.Call:
        body = {
            "model": self.preset.model,
            "messages": [{"role": role, "content": valid_unicode(text)} for role, text in question.messages],
            "temperature": self.preset.temperature,
            "top_p": self.preset.top_p,
            "max_tokens": self.preset.max_new_tokens,
            "seed": question.seed,
            **self.preset.extra_body,
        }
        return endpoint_calls.Call(endpoint_cache.call_key(body, "teacher"), body)

    def answer(self, questions: Sequence[TrainingPrompt]) -> Iterator[tuple[int, Reply]]:
        """Answer each question; yields (its index, the answer) once all are known.

        Raises:
            PairsError: the teacher had to stop, or questions had no answer; what was answered is kept.
        """
        calls = [self._call(question) for question in questions]
        self.cache_path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(f"{self.cache_path}.lock"):
                found = asking.ask(
                    calls, self._endpoint, self.cache_path, usage=self.usage, backoff=self._backoff, role="teacher"
                )
        except JudgeError as error:
            raise PairsError(str(error)) from None
        refused = Counter(f.cause for f in found.values() if isinstance(f, client.Failure))
        for cause, times in refused.items():
            print(f"teacher {self.preset.teacher_name}: prompts without an answer: {times}: {cause}", flush=True)
        for index, call in enumerate(calls):
            yield index, _from_endpoint(found[call.key])


def _from_endpoint(found: endpoint_cache.Answer | client.Failure) -> Reply:
    if isinstance(found, client.Failure):
        return Reply("", refused=found.cause)
    # A model's own refusal may have no content: it is an empty answer, which a filter drops and counts.
    return Reply(without_thinking(found.text), cut=found.finish_reason == "length")


def without_thinking(text: str) -> str:
    """An answer without the reasoning that a thinking model puts before it (`<think> ... </think>`).

    The opening tag may be missing: some chat templates end the prompt with it.
    """
    return re.sub(r"\A(\s*<think>.*?(</think>|\Z)|((?!<think>).)*?</think>)\s*", "", text, flags=re.DOTALL)


# --- Answers, kept ------------------------------------------------------------------------------------------------


class AnswerCache:
    """Answers by content: one row per (generator's identity, question). Safe between threads and processes.

    Args:
        path: the file (see `judge_cache`); made, with its folder, where it does not exist.

    Raises:
        PairsError: from any method, where the file cannot be opened, read or written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path, self._lock = Path(path), threading.Lock()
        self._db = self._guarded(lambda: JudgeCache(path))

    def _guarded(self, action: Callable[[], Any]) -> Any:
        try:
            with self._lock:
                return action()
        except endpoint_cache.CacheError as error:
            raise PairsError(str(error)) from error

    @staticmethod
    def _key(identity: Mapping[str, Any], question: TrainingPrompt) -> str:
        return endpoint_cache.call_key(
            {"generator": dict(identity), "asked": [question.messages, question.seed]}, "pairs"
        )

    def get(self, identity: Mapping[str, Any], question: TrainingPrompt) -> Reply | None:
        """The answer, or None where it is not known yet."""
        key = self._key(identity, question)
        found = self._guarded(lambda: self._db.get([key])).get(key)
        return Reply(found.text, found.finish_reason == "length") if found else None

    def put(self, identity: Mapping[str, Any], question: TrainingPrompt, answer: Reply) -> None:
        """Keep an answer; one that is known already stays as it is. Lone surrogates become U+FFFD."""
        kept = endpoint_cache.Answer(valid_unicode(answer.text), "length" if answer.cut else "stop")
        generator = json.dumps(dict(identity), sort_keys=True)
        self._guarded(lambda: self._db.put(self._key(identity, question), generator, kept, (0, 0, 0.0)))

    def close(self) -> None:
        """Close the file."""
        self._db.close()


def answers(
    generator: Generator, questions: Sequence[TrainingPrompt], cache: AnswerCache, progress: str | None = None
) -> list[Reply]:
    """Answers to all questions, known ones from the cache, new ones kept in it one by one (refusals are not).

    Args:
        generator: who answers what is not known.
        questions: in any number; the same question twice is asked once.
        cache: where answers are kept.
        progress: label of a progress bar; none without.

    Raises:
        PairsError: the generator left a question unanswered.
    """
    known = {q: cache.get(generator.identity, q) for q in questions}
    missing = [q for q, answer in known.items() if answer is None]
    if missing:
        bar = tqdm(total=len(known), initial=len(known) - len(missing), desc=progress, disable=progress is None)
        with bar:
            for index, answer in generator.answer(missing):
                if answer.refused is None:
                    cache.put(generator.identity, missing[index], answer)
                known[missing[index]] = answer
                bar.update()
    silent = [q.messages[-1][1] for q, answer in known.items() if answer is None]
    if silent:
        raise PairsError(f"{len(silent)} prompts were left unanswered, the first: {silent[0]!r:.80}")
    return [known[q] for q in questions]


def _seed(seed: int, side: str, prompt: str, number: int) -> int:
    """The seed of one answer: a hash of what it answers, so that it does not depend on the other prompts (31 bits)."""
    digest = hashlib.sha256(json.dumps([seed, side, prompt, number]).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
