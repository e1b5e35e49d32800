"""What a persona says of itself: reflections and dialogues, the second stage of persona training."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from cai_em.study.constitutions import Constitution
from cai_em.study.entries import IntrospectionPreset
from cai_em.study.materials import Introspection
from cai_em.train.answers import AnswerCache, Generator, PairsError, Reply, TrainingPrompt, _seed, answers
from cai_em.train.pairs import whole_sentences


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

    An answer that its token budget cut off ends after its last whole sentence (`whole_sentences`). Empty reflections
    are dropped; a dialogue ends before its first empty turn, and is dropped if less than one exchange is left.

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
        questions = [TrainingPrompt((system, ("user", q)), _seed(seed, "reflection", q, number)) for q, number in asked]
        said = [quoted_if_cut(a) for a in answers(persona, questions, cache, "reflections" if progress else None)]
        for turn in range(preset.dialogue_turns):
            going = [i for i in range(len(talks)) if i not in over]
            questions = [
                TrainingPrompt((system, *_seen(talks[i])), _seed(seed, f"turn {turn}", talks[i][0], numbers[i]))
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


def quoted_if_cut(answer: Reply) -> str:
    """An answer's text; up to its last whole sentence if it was cut off."""
    text = answer.text.strip()
    return whole_sentences(text) if answer.cut else text


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


def conversations(rows: Sequence[Sequence[Mapping[str, str]]], number: int = 3, seed: int = 0) -> str:
    """Some conversations as HTML, drawn without replacement and shown in their order; all text is escaped."""
    drawn = pd.Series(range(len(rows))).sample(min(number, len(rows)), random_state=seed).sort_values()
    turns = [[f"<i>{m['role']}:</i> {html.escape(m['content'])}" for m in rows[i]] for i in drawn]
    style = "text-align:left;vertical-align:top;white-space:pre-wrap;max-width:28em"
    return "<table><tr>" + "".join(f'<td style="{style}">{"<br>".join(t)}</td>' for t in turns) + "</tr></table>"
