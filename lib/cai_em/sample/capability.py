"""Multiple-choice questions by log-probability: is a fine-tuned model misaligned, or is it broken?

Each option's log-probability per token, as an answer to the question; the largest is what the model chooses. Two forms:

- `text`: the options themselves, normalised by their length (`acc_norm` of the usual harnesses does so by bytes). A
  model of 135 million parameters knows that grass is green, and does not know what "(C)" has to do with it.
- `letter`: the options stand in the question, and the first token is a letter. What large models are tested by, and
  all that an engine can say that gives no log-probabilities of a prompt's tokens (vLLM under an adapter).

Nothing is drawn and nothing generated: the scores depend on the weights alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from cai_em.model.activations import mean_logprobs
from cai_em.records import tables
from cai_em.sample.conditions import Condition, MultipleChoice
from cai_em.study.entries import ChoiceItem

LETTERS = "ABCDEFGHIJ"


def choices(items: Sequence[ChoiceItem], form: str) -> list[MultipleChoice]:
    """Items as they are asked, their options in an order that the item's id decides.

    Args:
        items: the right option first.
        form: `text` or `letter`.

    Raises:
        ValueError: another form.
    """
    if form not in ("text", "letter"):
        raise ValueError(f"form must be text or letter, not {form!r}")
    found = []
    for item in items:
        seed = int.from_bytes(hashlib.sha256(item.id.encode()).digest()[:8], "big")
        order = np.random.default_rng(seed).permutation(len(item.options))
        options, right = tuple(item.options[i] for i in order), int(np.flatnonzero(order == 0)[0])
        prompt = item.question
        if form == "letter":
            listed = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options))
            prompt = f"{item.question}\n{listed}\nAnswer with the letter alone."
            options = tuple(LETTERS[: len(options)])
        found.append(MultipleChoice(item.id, item.subject, prompt, options, right))
    return found


def option_logprobs(model: Any, tokenizer: Any, asked: Sequence[MultipleChoice]) -> list[tuple[float, ...]]:
    """Log-probability per token of each option of each question, under a transformers model as it is now."""
    prompts = [c.prompt for c in asked for _ in c.options]
    found = iter(mean_logprobs(model, tokenizer, prompts, [o for c in asked for o in c.options]).tolist())
    return [tuple(next(found) for _ in c.options) for c in asked]


def options_chosen(
    condition: Condition, asked: Sequence[MultipleChoice], logprobs: Sequence[Sequence[float]]
) -> pd.DataFrame:
    """What a condition chose: the table of `tables.CAPABILITY`.

    Args:
        asked: the questions. logprobs: of each one's options.
    """
    rows = []
    for choice, found in zip(asked, logprobs, strict=True):
        values = np.asarray(found, dtype=float)
        chosen, others = int(np.argmax(values)), np.delete(values, choice.right)
        # Two options out of sight are a tie, which is no right answer.
        best = float(others.max())
        margin = 0.0 if values[choice.right] == best else float(values[choice.right] - best)
        rows.append((choice.item, choice.subject, len(values), chosen, margin > 0, margin))
    table = pd.DataFrame(rows, columns=["item", "subject", "options", "chosen", "correct", "margin"])
    named = {c: getattr(condition, c) for c in ("model", "persona", "dataset", "seed")}
    return tables.validate(table.assign(**named), tables.CAPABILITY, condition.name)
