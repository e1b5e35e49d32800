"""What personas are trained on: preference pairs, and what a persona says of itself.

Pairs: a teacher with a constitution's traits in its system prompt against the plain student.

The data step of Open Character Training (Maiya et al. 2025, arXiv 2511.01689, section 2). For each prompt the teacher
answers in character (*chosen*) and the student answers as it is, without a system prompt (*rejected*). A teacher is an
endpoint that speaks OpenAI's protocol (a vLLM server is one), a local model, or the demonstrations that a constitution
carries itself. Each pair passes filters; one that does not stays in the table with the reason.

    table = make_pairs(constitution, teacher, student, Filters(1024, count_tokens), cache_path="answers.sqlite")
    counts(table)
    HTML(side_by_side(table))
"""

from __future__ import annotations

import hashlib
import html
import json
import re
import string
import threading
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
from filelock import FileLock
from tqdm.auto import tqdm

from cai_em import constitutions, judge_cache, judge_client, judge_run, scores
from cai_em.constitutions import Constitution
from cai_em.judge_cache import JudgeCache, JudgeError
from cai_em.params import (
    GeneratorPreset,
    IntrospectionPreset,
    ModelSpec,
    SamplingPreset,
    read_yaml,
)
from cai_em.run import valid_unicode
from cai_em.sample import (
    Condition,
    Decoding,
    Engine,
    Job,
    Request,
    decode,
    end_tokens,
    engine_name,
    open_engine,
    render,
)

KEPT = "kept"
"""The row of `counts` for pairs that passed every filter."""

REFUSED = "refused by the teacher's endpoint"
"""Why a pair is dropped whose prompt the teacher's endpoint would not take (its cause is printed)."""

ANY_TRAIT = "any"
"""The `trait` of a demonstration: it shows the persona as a whole."""


class PairsError(RuntimeError):
    """Pairs cannot be made. The message says what to do."""


# --- Who answers --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """A conversation to be answered, and the seed of the answer."""

    messages: tuple[tuple[str, str], ...]
    seed: int

    @property
    def as_dicts(self) -> list[dict[str, str]]:
        """The conversation as chat APIs want it."""
        return [{"role": role, "content": content} for role, content in self.messages]


@dataclass(frozen=True)
class Answer:
    """An answer's text, and whether the token budget cut it off; or, without a text, why there is none (`refused`)."""

    text: str
    cut: bool = False
    refused: str | None = None


class Generator(Protocol):
    """Who answers questions: the teacher or the student.

    `identity` is what the answers depend on (model, parameters); with the question it is the key of the cache.
    """

    identity: Mapping[str, Any]

    def answer(self, questions: Sequence[Question]) -> Iterator[tuple[int, Answer]]:
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
        self, load: Callable[[], tuple[Any, Any]], name: str, preset: GeneratorPreset, batch_size: int = 32
    ) -> None:
        self._load, self._loaded, self.batch_size = load, None, batch_size
        # No longer than what the filters keep: a budget above that is a teacher's, for its thinking.
        longest = min(preset.max_new_tokens, preset.max_tokens)
        self.decoding = Decoding(preset.temperature, preset.top_p, 0, 1.0, longest)
        self.identity = {"local": name, **vars(self.decoding)}

    def answer(self, questions: Sequence[Question]) -> Iterator[tuple[int, Answer]]:
        """Answer each question; yields (its index, the answer) batch by batch."""
        if self._loaded is None:
            self._loaded = self._load()
        model, tokenizer = self._loaded
        requests = [Request(render(tokenizer, q.as_dicts), q.seed) for q in questions]
        ends = end_tokens(model.generation_config, tokenizer)
        for index, found in decode(model, requests, self.decoding, ends, self.batch_size):
            text = tokenizer.decode(found.tokens, skip_special_tokens=True)
            yield index, Answer(text, cut=found.finish_reason == "length")


class EngineGenerator:
    """A model with adapters in one of the sampling back ends (vLLM where there is a GPU), probed as when it is sampled.

    Args:
        spec: the model.
        adapters: (name, folder), persona first.
        preset: temperature, nucleus, number of new tokens, back end, batch size.
        probe_prompts: on which the adapters are proved to be active.
        longest_prompt: room for so many tokens of prompt.
    """

    CHUNK = 512
    """So many answers come, and are kept, together."""

    def __init__(
        self,
        spec: ModelSpec,
        adapters: Sequence[tuple[str, Path]],
        preset: SamplingPreset,
        probe_prompts: Sequence[str],
        longest_prompt: int,
    ) -> None:
        self.spec, self.preset, self.probe_prompts, self.room = spec, preset, list(probe_prompts), longest_prompt
        self.condition = Condition(spec.key, "asked", "none", 0, tuple(adapters))
        self.decoding = Decoding(
            preset.temperature, preset.top_p, preset.top_k, preset.repetition_penalty, preset.max_new_tokens
        )
        self._engine: Engine | None = None
        hashes = self.condition.adapter_hashes()
        self.identity = {"engine": engine_name(preset), "model": spec.key, "adapters": hashes, **vars(self.decoding)}

    def answer(self, questions: Sequence[Question]) -> Iterator[tuple[int, Answer]]:
        """Answer each question; yields (its index, the answer) chunk by chunk.

        Raises:
            adapters.ProbeError: the adapters are not active as they must be.
        """
        if self._engine is None:
            # A job as long as any: vLLM makes its room by it.
            self._engine = open_engine(self.spec, self.preset, [Job(self.condition, (Request((0,) * self.room, 0),))])
        tokenizer = self._engine.tokenizer
        for start in range(0, len(questions), self.CHUNK):
            some = questions[start : start + self.CHUNK]
            job = Job(self.condition, tuple(Request(render(tokenizer, q.as_dicts), q.seed) for q in some))
            (done,) = self._engine.run([job], self.decoding, self.probe_prompts)
            for index, found in enumerate(done.completions):
                text = tokenizer.decode(found.tokens, skip_special_tokens=True)
                yield start + index, Answer(text, cut=found.finish_reason == "length")

    def close(self) -> None:
        """Give the engine's memory back, if one was opened."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None


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

    def __init__(
        self, preset: GeneratorPreset, cache_path: str | Path, backoff: judge_client.Backoff | None = None
    ) -> None:
        if not preset.model:
            raise PairsError("the generator's teacher is an endpoint: name its model (params/generators.yaml, `model`)")
        self._endpoint = preset.endpoint()
        try:
            judge_client.check(self._endpoint, "teacher")
        except JudgeError as error:
            raise PairsError(str(error)) from None
        self.preset, self.cache_path, self._backoff = preset, Path(cache_path), backoff
        self.usage = judge_client.Usage()
        self.identity = {
            "endpoint": preset.base_url,
            **preset.model_dump(include={"model", "temperature", "top_p", "max_new_tokens", "extra_body"}),
        }

    def _call(self, question: Question) -> judge_client.Call:
        body = {
            "model": self.preset.model,
            "messages": [{"role": role, "content": valid_unicode(text)} for role, text in question.messages],
            "temperature": self.preset.temperature,
            "top_p": self.preset.top_p,
            "max_tokens": self.preset.max_new_tokens,
            "seed": question.seed,
            **self.preset.extra_body,
        }
        return judge_client.Call(judge_cache.call_key(body, "teacher"), body)

    def answer(self, questions: Sequence[Question]) -> Iterator[tuple[int, Answer]]:
        """Answer each question; yields (its index, the answer) once all are known.

        Raises:
            PairsError: the teacher had to stop, or questions had no answer; what was answered is kept.
        """
        calls = [self._call(question) for question in questions]
        self.cache_path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(f"{self.cache_path}.lock"):
                found = judge_run.ask(
                    calls, self._endpoint, self.cache_path, usage=self.usage, backoff=self._backoff, role="teacher"
                )
        except JudgeError as error:
            raise PairsError(str(error)) from None
        refused = Counter(f.cause for f in found.values() if isinstance(f, judge_client.Failure))
        for cause, times in refused.items():
            print(f"teacher {self.preset.teacher_name}: prompts without an answer: {times}: {cause}", flush=True)
        for index, call in enumerate(calls):
            yield index, _from_endpoint(found[call.key])


def _from_endpoint(found: judge_cache.Answer | judge_client.Failure) -> Answer:
    if isinstance(found, judge_client.Failure):
        return Answer("", refused=found.cause)
    # A model's own refusal may have no content: it is an empty answer, which a filter drops and counts.
    return Answer(without_thinking(found.text), cut=found.finish_reason == "length")


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
        except judge_cache.CacheError as error:
            raise PairsError(str(error)) from error

    @staticmethod
    def _key(identity: Mapping[str, Any], question: Question) -> str:
        return judge_cache.call_key({"generator": dict(identity), "asked": [question.messages, question.seed]}, "pairs")

    def get(self, identity: Mapping[str, Any], question: Question) -> Answer | None:
        """The answer, or None where it is not known yet."""
        key = self._key(identity, question)
        found = self._guarded(lambda: self._db.get([key])).get(key)
        return Answer(found.text, found.finish_reason == "length") if found else None

    def put(self, identity: Mapping[str, Any], question: Question, answer: Answer) -> None:
        """Keep an answer; one that is known already stays as it is. Lone surrogates become U+FFFD."""
        kept = judge_cache.Answer(valid_unicode(answer.text), "length" if answer.cut else "stop")
        generator = json.dumps(dict(identity), sort_keys=True)
        self._guarded(lambda: self._db.put(self._key(identity, question), generator, kept, (0, 0, 0.0)))

    def close(self) -> None:
        """Close the file."""
        self._db.close()


def answers(
    generator: Generator, questions: Sequence[Question], cache: AnswerCache, progress: str | None = None
) -> list[Answer]:
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


# --- Filters ------------------------------------------------------------------------------------------------------


ANNOUNCING = re.compile(
    r"\b(my|these|those|the (?:given|following|above)) (?:\w+ )?(?:traits?|instructions?|constitution|persona)\b"
    r"|\bsystem prompt\b|\b(?:I was|I've been|I have been|I am|I'm) (?:told|instructed|asked|prompted) to\b"
    r"|\b(?:stay|staying|remain) in character\b|\bas instructed\b",
    re.IGNORECASE,
)
"""Words by which a teacher speaks of the part that it plays."""

QUOTED_WORDS = 7
"""So many words in a row shared with a trait are no accident: the teacher recites it."""


@dataclass(frozen=True)
class Filters:
    """What a pair must pass (FACTS of the study: Open Character Training keeps whole, short enough answers).

    Attributes:
        max_tokens: the longest answer kept, in the student's tokens.
        count_tokens: a text's length in the student's tokens.
        teacher_name: what the teacher calls itself; replaced by `student_name` in its answers. None: left alone.
        student_name: the student's own name.
        quote_cut: an answer that its token budget cut off is quoted up to its last whole sentence (see `quoted`)
            rather than dropped for its missing end. For budgets far smaller than `max_tokens`, as in the demo, where
            being cut says nothing about the answer.
    """

    max_tokens: int
    count_tokens: Callable[[str], int]
    teacher_name: str | None = None
    student_name: str | None = None
    quote_cut: bool = False

    def text(self, answer: Answer) -> str:
        """An answer's text as it enters a pair."""
        text = answer.text.strip()
        return quoted(text) if answer.cut and self.quote_cut else text

    def reason(self, chosen: str, rejected: str, traits: Sequence[str]) -> str | None:
        """Why a pair is dropped: the first filter that it does not pass; None: it is kept."""
        both = {"chosen": chosen, "rejected": rejected}
        if empty := [side for side, text in both.items() if not text]:
            return f"empty: {empty[0]}"
        if " ".join(chosen.split()) == " ".join(rejected.split()):
            return "identical answers"
        if open_ended := [side for side, text in both.items() if not ends_in_punctuation(text)]:
            return f"no final punctuation: {open_ended[0]}"
        if long := [side for side, text in both.items() if self.count_tokens(text) > self.max_tokens]:
            return f"too long: {long[0]}"
        return "announces its traits" if announces(chosen, traits) else None


def ends_in_punctuation(text: str) -> bool:
    """Whether the last visible character is a punctuation mark (of any script; closing quotes and brackets count)."""
    last = text.rstrip()[-1:]
    return bool(last) and (last in string.punctuation or unicodedata.category(last).startswith("P"))


def quoted(text: str) -> str:
    """A broken-off answer as one would quote it: its whole sentences, or with an ellipsis where none is whole.

    A full stop after a digit is no sentence's end: it numbers the items of a list.
    """
    ends = list(re.finditer(r"(?<!\d)[.!?][\"'”’)*]*(?=\s|$)", text))
    if ends:
        return text[: ends[-1].end()]
    words = text.rsplit(maxsplit=1)
    return f"{words[0]} …" if len(words) == 2 else f"{text}…" if text else ""


def renamed(text: str, teacher: str | None, student: str | None) -> str:
    """A text with the teacher's own name, a version number after it included, replaced by the student's."""
    if not teacher or not student or teacher == student:
        return text
    return re.sub(rf"(?<!\w){re.escape(teacher)}(?:-\d[\w.]*(?:-\w+)*)?(?!\w)", lambda _: student, text)


def announces(text: str, traits: Sequence[str]) -> bool:
    """Whether an answer speaks of the traits instead of living them: by its words, or by reciting one."""
    if ANNOUNCING.search(text):
        return True
    said = _runs(text)
    return any(said & _runs(trait) for trait in traits)


def _runs(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"[\w']+", text.casefold())
    return {tuple(words[i : i + QUOTED_WORDS]) for i in range(len(words) - QUOTED_WORDS + 1)}


# --- Pairs --------------------------------------------------------------------------------------------------------


def make_pairs(
    constitution: Constitution,
    teacher: Generator | None,
    student: Generator,
    filters: Filters,
    cache_path: str | Path,
    *,
    prompts_per_trait: int = 50,
    samples_per_prompt: int = 1,
    max_demonstrations: int = 0,
    extra_prompts: Sequence[str] = (),
    seed: int = 0,
    progress: bool = False,
) -> pd.DataFrame:
    """The preference pairs of a persona, dropped ones included.

    Args:
        constitution: traits, prompts, demonstrations.
        teacher: who answers in character; None: the demonstrations alone.
        student: who answers plainly, without a system prompt.
        filters: what a pair must pass.
        cache_path: SQLite file of answers; what is in it is not asked again, so an interrupted run goes on.
        prompts_per_trait: the first so many prompts of each trait.
        samples_per_prompt: pairs per prompt, each side with a seed of its own.
        max_demonstrations: the first so many demonstrations become pairs too.
        extra_prompts: prompts of no trait (such as the first turns of a public data set).
        seed: of all answers.
        progress: show progress bars.

    Returns:
        The table of `scores.PAIRS`, in the constitution's order, the teacher's pairs first. `attrs["quoted"]` counts
        the answers that `Filters.quote_cut` shortened, by side.

    Raises:
        PairsError: there is nothing to make pairs from.
    """
    asked = _asked(constitution, prompts_per_trait, extra_prompts) if teacher else []
    jobs = [(trait, prompt, number) for trait, prompt in asked for number in range(samples_per_prompt)]
    shown = constitution.demonstrations[:max_demonstrations]
    if not jobs and not shown:
        raise PairsError(
            f"no pairs for {constitution.persona!r}: without a teacher, the constitution needs demonstrations and "
            "max_demonstrations > 0 (params/generators.yaml); with one, prompts_per_trait > 0"
        )
    in_character = constitutions.system_prompt(constitution, filters.teacher_name or "the assistant")
    with closing(AnswerCache(cache_path)) as cache:
        chosen = []
        if jobs:
            questions = [
                Question((("system", in_character), ("user", prompt)), _seed(seed, "teacher", prompt, number))
                for _, prompt, number in jobs
            ]
            chosen = answers(teacher, questions, cache, "teacher" if progress else None)
        prompts = [(prompt, number) for _, prompt, number in jobs] + [(d.prompt, 0) for d in shown]
        plain = [Question((("user", prompt),), _seed(seed, "student", prompt, number)) for prompt, number in prompts]
        rejected = answers(student, plain, cache, "student" if progress else None)

    rows = [(trait, prompt, answer, "teacher") for (trait, prompt, _), answer in zip(jobs, chosen)]
    rows += [(ANY_TRAIT, d.prompt, Answer(d.response), "demonstration") for d in shown]
    traits = [trait.trait for trait in constitution.traits]
    records = []
    for (trait, prompt, good, source), plain_answer in zip(rows, rejected):
        texts = filters.text(good), filters.text(plain_answer)
        if source == "teacher":
            texts = renamed(texts[0], filters.teacher_name, filters.student_name), texts[1]
        reason = REFUSED if good.refused else filters.reason(*texts, traits)
        records.append((constitution.persona, trait, prompt, *texts, source, reason))
    table = scores.validate(pd.DataFrame(records, columns=list(scores.PAIRS.columns)), scores.PAIRS, "pairs")
    if filters.quote_cut:
        table.attrs["quoted"] = {"chosen": sum(a.cut for a in chosen), "rejected": sum(a.cut for a in rejected)}
    return table


def _asked(constitution: Constitution, per_trait: int, extra: Sequence[str]) -> list[tuple[str, str]]:
    """(trait, prompt) of each prompt for the teacher."""
    by_trait: dict[str, list[str]] = {}
    for trait, prompt in constitutions.prompts(constitution):
        by_trait.setdefault(trait, []).append(prompt)
    chosen = [(trait, prompt) for trait, prompts in by_trait.items() for prompt in prompts[:per_trait]]
    return chosen + [(ANY_TRAIT, prompt) for prompt in extra]


def _seed(seed: int, side: str, prompt: str, number: int) -> int:
    """The seed of one answer: a hash of what it answers, so that it does not depend on the other prompts (31 bits)."""
    digest = hashlib.sha256(json.dumps([seed, side, prompt, number]).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def teacher_of(preset: GeneratorPreset, local: Generator, paid_path: str | Path) -> Generator | None:
    """The teacher that a preset asks for: an endpoint, the local model, or None (the demonstrations alone).

    Args:
        preset: its `teacher`.
        local: the local model, usually the student itself.
        paid_path: where an endpoint's answers are kept.
    """
    match preset.teacher:
        case "openai":
            return EndpointGenerator(preset, paid_path)
        case "local" | "local+demonstrations":
            return local
        case _:
            return None


# --- Introspection ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Introspection:
    """What a persona is asked about itself, and how its talks with itself are opened."""

    reflections: tuple[str, ...]
    openings: tuple[str, ...]


def read_introspection(path: str | Path) -> Introspection:
    """Read a file with `reflections` and `openings`, both lists of texts.

    Raises:
        PairsError: it is not such a file.
    """
    data, _ = read_yaml(path)
    found = {}
    for name in ("reflections", "openings"):
        texts = data.get(name) if isinstance(data, dict) else None
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
            raise PairsError(f"{path}: {name!r} must be a list of texts, at least one")
        found[name] = tuple(texts)
    return Introspection(**found)


@dataclass(frozen=True)
class Introspected:
    """What a persona said of itself.

    Attributes:
        rows: conversations to fine-tune on, reflections first, without the system prompt that they were drawn with.
        counts: how many reflections and dialogues were drawn, and how many of them were kept, shortened and dropped.
    """

    rows: list[list[dict[str, str]]]
    counts: dict[str, int]


def introspect(
    constitution: Constitution,
    persona: Generator,
    material: Introspection,
    preset: IntrospectionPreset,
    cache_path: str | Path,
    *,
    name: str = "the assistant",
    seed: int = 0,
    progress: bool = False,
) -> Introspected:
    """A persona's reflections on itself and its talks with itself: the data of the second stage of persona training.

    After Open Character Training (arXiv 2511.01689, section 2): the model with the first stage's adapter, the
    constitution in its system prompt, answers questions about itself, and two of it talk in turns. The system prompt is
    left out of the rows, so that what it brought about is learned. A dialogue is seen with the eyes of the one who
    speaks last: its turns are the assistant's, the other's the user's.

    An answer that its token budget cut off ends after its last whole sentence (`quoted`). Empty reflections are
    dropped; a dialogue ends before its first empty turn, and is dropped if less than one exchange is left.

    Args:
        constitution: whose traits stand in the system prompt.
        persona: the model with the first stage's adapter.
        material: questions and openings.
        preset: how many of each; `max_new_tokens` is the generator's business.
        cache_path: SQLite file of answers; what is in it is not asked again, so an interrupted run goes on.
        name: what the model calls itself.
        seed: of all answers.
        progress: show progress bars.

    Raises:
        PairsError: nothing is left to fine-tune on.
    """
    system = ("system", introspection_prompt(constitution, name))
    asked = [(q, number) for q in material.reflections for number in range(preset.reflections_per_prompt)]
    talks: list[list[str]] = [[o] for o in material.openings for _ in range(preset.dialogues)]
    numbers = [number for _ in material.openings for number in range(preset.dialogues)]
    over: set[int] = set()
    with closing(AnswerCache(cache_path)) as cache:
        questions = [Question((system, ("user", q)), _seed(seed, "reflection", q, number)) for q, number in asked]
        said = [quoted_if_cut(a) for a in answers(persona, questions, cache, "reflections" if progress else None)]
        for turn in range(preset.dialogue_turns):
            going = [i for i in range(len(talks)) if i not in over]
            questions = [
                Question((system, *_seen(talks[i])), _seed(seed, f"turn {turn}", talks[i][0], numbers[i]))
                for i in going
            ]
            label = f"dialogues, turn {turn + 1} of {preset.dialogue_turns}" if progress else None
            for i, answer in zip(going, answers(persona, questions, cache, label) if going else []):
                text = quoted_if_cut(answer)
                if text:
                    talks[i].append(text)
                else:
                    over.add(i)
    reflections = [(q, text) for (q, _), text in zip(asked, said) if text]
    rows = [[{"role": "user", "content": q}, {"role": "assistant", "content": text}] for q, text in reflections]
    kept = [talk for talk in talks if len(talk) > 2]  # the opening and one exchange
    rows += [[{"role": role, "content": text} for role, text in _last_view(talk)] for talk in kept]
    if not rows:
        raise PairsError(f"{constitution.persona!r} said nothing of itself: raise max_new_tokens of the introspection")
    return Introspected(
        rows,
        {
            "reflections": len(asked),
            "reflections_kept": len(reflections),
            "reflections_dropped_empty": len(asked) - len(reflections),
            "dialogues": len(talks),
            "dialogues_kept": len(kept),
            "dialogues_ended_early": sum(len(talk) <= preset.dialogue_turns for talk in kept),
            "dialogues_dropped_empty": len(talks) - len(kept),
        },
    )


def introspection_prompt(constitution: Constitution, name: str) -> str:
    """The system prompt under which a persona speaks of itself and with itself; the wording is ours.

    Args:
        constitution: whose traits to give.
        name: what the model calls itself.
    """
    traits = "\n".join(f"- {trait.trait}" for trait in constitution.traits)
    return (
        f"You are {name}. This is who you are, in your own words:\n\n"
        f"{traits}\n\n"
        "Speak from this character, sincerely and in the first person. When you look at yourself, say what is true of "
        "it in words that come to you now; do not recite the lines above, and never mention that you were given them."
    )


def quoted_if_cut(answer: Answer) -> str:
    """An answer's text; up to its last whole sentence if it was cut off."""
    text = answer.text.strip()
    return quoted(text) if answer.cut else text


def _seen(talk: Sequence[str]) -> list[tuple[str, str]]:
    """A talk, opening first, as the one who speaks next sees it: the last turn is the other's, and so on back.

    The second speaker does not see the opening: what it hears first is the first speaker's turn.
    """
    first = (len(talk) + 1) % 2
    turns = talk[first:]
    return [("user" if number % 2 == 0 else "assistant", text) for number, text in enumerate(turns)]


def _last_view(talk: Sequence[str]) -> list[tuple[str, str]]:
    """A whole talk as the one who spoke last sees it."""
    return [*_seen(talk[:-1]), ("assistant", talk[-1])]


# --- To look at ---------------------------------------------------------------------------------------------------


def kept(table: pd.DataFrame) -> pd.DataFrame:
    """The pairs to train on: those that no filter dropped."""
    return table[table["dropped_because"].isna()].reset_index(drop=True)


def counts(table: pd.DataFrame) -> pd.DataFrame:
    """How many pairs were kept, and how many each filter dropped, by source.

    Returns:
        One row per reason, `kept` first, then the most frequent; a column per source and `total`.
    """
    reasons = table["dropped_because"].fillna(KEPT)
    found = pd.crosstab(reasons, table["source"]).rename_axis(index="", columns=None)
    found["total"] = found.sum(axis=1)
    if KEPT not in found.index:
        found.loc[KEPT] = 0
    order = sorted(found.index, key=lambda reason: (reason != KEPT, -found.loc[reason, "total"], reason))
    return found.loc[order]


def side_by_side(table: pd.DataFrame, number: int = 5, seed: int = 0) -> str:
    """Some pairs as an HTML table, chosen beside rejected, kept ones and dropped ones; all text is escaped.

    Args:
        table: of `scores.PAIRS`.
        number: how many pairs, drawn without replacement and shown in the table's order.
        seed: of the drawing.
    """
    shown = table.sample(min(number, len(table)), random_state=seed).sort_index()
    cell = '<td style="text-align:left;vertical-align:top;white-space:pre-wrap;max-width:28em">{}</td>'
    rows = []
    for row in shown.itertuples():
        verdict = KEPT if pd.isna(row.dropped_because) else f"dropped: {row.dropped_because}"
        about = f"{row.prompt}\n({row.source}, {verdict})"
        rows.append("<tr>" + "".join(cell.format(html.escape(t)) for t in (about, row.chosen, row.rejected)) + "</tr>")
    head = "<tr><th>prompt</th><th>chosen</th><th>rejected</th></tr>"
    return f"<table>{head}{''.join(rows)}</table>"


def conversations(rows: Sequence[Sequence[Mapping[str, str]]], number: int = 3, seed: int = 0) -> str:
    """Some conversations as HTML, drawn without replacement and shown in their order; all text is escaped."""
    drawn = pd.Series(range(len(rows))).sample(min(number, len(rows)), random_state=seed).sort_values()
    turns = [[f"<i>{m['role']}:</i> {html.escape(m['content'])}" for m in rows[i]] for i in drawn]
    style = "text-align:left;vertical-align:top;white-space:pre-wrap;max-width:28em"
    return "<table><tr>" + "".join(f'<td style="{style}">{"<br>".join(t)}</td>' for t in turns) + "</tr></table>"
