"""H4: directions of emergent misalignment in the residual stream: from adapters, from responses, at random."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats as sps

from cai_em.model.layers import SteeringError, layer_number
from cai_em.study.labels import Labels

# --- Directions ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contrast:
    """Activations with labels.

    Attributes:
        activations: (n, layers, hidden).
        label: (n,) True: misaligned, or after fine-tuning; False: the rest.
        question: (n,) which question each answers.
        stratum: (n,) rows among which labels could be exchanged: the question, or, where each response was read by
            both models, the response.
    """

    activations: np.ndarray
    label: np.ndarray
    question: np.ndarray
    stratum: np.ndarray

    def __post_init__(self) -> None:
        sizes = {len(x) for x in (self.activations, self.label, self.question, self.stratum)}
        if len(sizes) > 1 or self.activations.ndim != 3:
            raise SteeringError(f"a contrast needs (n, layers, hidden) activations and n of the rest; found {sizes}")

    def layer(self, layer: int) -> Contrast:
        """The same at one layer."""
        number = layer_number(layer, self.activations.shape[1])
        return Contrast(self.activations[:, [number]], self.label, self.question, self.stratum)


def adapter_contrast(before: np.ndarray, after: np.ndarray, question: Sequence[str]) -> Contrast:
    """The same responses read before and after fine-tuning, (n, layers, hidden) each."""
    n = len(question)
    rows = np.arange(n)
    return Contrast(
        np.concatenate([before, after]),
        np.repeat([False, True], n),
        np.tile(np.asarray(question, object), 2),
        np.tile(rows, 2),
    )


def response_contrast(activations: np.ndarray, misaligned: Sequence[bool], question: Sequence[str]) -> Contrast:
    """Responses of one model, misaligned or not."""
    asked = np.asarray(question, object)
    return Contrast(activations, np.asarray(misaligned, bool), asked, asked)


def _weights(label: np.ndarray, question: np.ndarray) -> tuple[np.ndarray, int]:
    """The mean difference as weights on rows (n,), and of how many questions."""
    weights, used = np.zeros(len(label)), 0
    for q in dict.fromkeys(question):
        here = question == q
        yes, no = here & label, here & ~label
        if yes.any() and no.any():
            weights[yes], weights[no] = 1 / yes.sum(), -1 / no.sum()
            used += 1
    if not used:
        raise SteeringError(
            f"no question has responses of both labels ({int(label.sum())} of {len(label)} have the first): there is "
            "no difference to take"
        )
    return weights / used, used


def direction(contrast: Contrast) -> np.ndarray:
    """The mean difference, (layers, hidden): over questions that have both labels, each with equal weight.

    Raises:
        SteeringError: no question has both.
    """
    weights, _ = _weights(contrast.label, contrast.question)
    return np.einsum("n,nld->ld", weights, contrast.activations)


def before(contrast: Contrast) -> np.ndarray:
    """Mean activations of the rows with the second label (before fine-tuning, or not misaligned), (layers, hidden)."""
    return contrast.activations[~contrast.label].mean(axis=0)


def reached(contrast: Contrast) -> dict[int, np.ndarray]:
    """The mean difference at the layers where there is one: fine-tuning changes nothing before the first it adapts."""
    found, length = direction(contrast), np.linalg.norm(contrast.activations, axis=2).mean(axis=0)
    return {i: v for i, v in enumerate(found) if np.linalg.norm(v) > 1e-6 * length[i]}


def questions_used(contrast: Contrast) -> int:
    """How many questions the mean difference rests on."""
    return _weights(contrast.label, contrast.question)[1]


def shuffled_directions(contrast: Contrast, draws: int, seed: int) -> np.ndarray:
    """Mean differences after labels were exchanged at random within strata, (draws, layers, hidden).

    Each label's mean within its question is taken out first. Else, where labels are far apart, most shuffles would
    keep some of the difference itself, in either sign, and two directions' shuffles would agree because the directions
    do. What is left is spread alone; with one response per label and question nothing is, and the result is 0.
    """
    rng = np.random.default_rng(seed)
    x = contrast.activations.astype(float)
    for q in dict.fromkeys(contrast.question):
        for label in (False, True):
            rows = (contrast.question == q) & (contrast.label == label)
            if rows.any():
                x[rows] -= x[rows].mean(axis=0)
    strata = [np.flatnonzero(contrast.stratum == s) for s in dict.fromkeys(contrast.stratum)]
    weights = np.empty((draws, len(contrast.label)))
    for draw in range(draws):
        shuffled = contrast.label.copy()
        for stratum in strata:
            shuffled[stratum] = rng.permutation(shuffled[stratum])
        weights[draw] = _weights(shuffled, contrast.question)[0]
    return np.einsum("bn,nld->bld", weights, x, optimize=True)


def random_direction(like: np.ndarray, seed: int) -> np.ndarray:
    """A vector of random direction and the same length, (hidden,)."""
    drawn = np.random.default_rng(seed).normal(size=like.shape)
    return drawn * (np.linalg.norm(like) / np.linalg.norm(drawn))


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine along the last axis; NaN where a vector has length 0."""
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(lengths > 0, np.sum(a * b, axis=-1) / lengths, np.nan)


def random_cosine_p(value: float, hidden: int) -> float:
    """Probability that two random directions in `hidden` dimensions have a cosine at least as large in size."""
    return float(sps.beta.sf(min(value**2, 1.0), 0.5, (hidden - 1) / 2))


def random_cosine_bound(hidden: int, confidence: float = 0.95) -> float:
    """The size of a cosine that two random directions stay below with probability `confidence`."""
    return float(math.sqrt(sps.beta.ppf(confidence, 0.5, (hidden - 1) / 2)))


def split_half(contrast: Contrast, splits: int = 50, seed: int = 0) -> float:
    """Mean cosine between directions from two halves of the questions: what two estimates of one direction reach.

    NaN with fewer than two questions that have both labels.
    """
    useful = [
        q for q in dict.fromkeys(contrast.question) if len(set(contrast.label[contrast.question == q].tolist())) == 2
    ]
    if len(useful) < 2:
        return math.nan
    per_question = np.stack(
        [_one_question(contrast, q) for q in useful]
    )  # (questions, layers * hidden): halves are means of these
    rng, found = np.random.default_rng(seed), []
    for _ in range(splits):
        order = rng.permutation(len(useful))
        halves = order[: len(order) // 2], order[len(order) // 2 :]
        found.append(float(cosine(*(per_question[h].mean(axis=0) for h in halves))))
    return float(np.mean(found))


def _one_question(contrast: Contrast, question: str) -> np.ndarray:
    here = contrast.question == question
    x, label = contrast.activations[here].reshape(int(here.sum()), -1), contrast.label[here]
    return x[label].mean(axis=0) - x[~label].mean(axis=0)


RANDOM = "random"
"""The source of a direction that nobody has."""


def source_name(persona: str, seed: int, first: int) -> str:
    """What a direction's source is called: the persona, and, for any but the first training seed, the seed."""
    return persona if seed == first else f"{persona}@seed{seed}"


def persona_of(source: str) -> str:
    """Whose direction a source is."""
    return source.partition("@")[0]


def direction_label(source: str, look: Labels) -> str:
    """A source for people: `Poeticism`, `Poeticism, seed 1`, `random direction`."""
    persona, _, run = source.partition("@seed")
    return "random direction" if source == RANDOM else look.persona(persona) + (f", seed {run}" if run else "")


def persona_pairs(sources: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs worth a comparison: different personas' of the first seed, and one persona's of different seeds."""
    return [
        (one, other)
        for i, one in enumerate(sources)
        for other in sources[i + 1 :]
        if persona_of(one) == persona_of(other) or not ("@" in one or "@" in other)
    ]


def cosine_table(contrasts: Mapping[str, Contrast], layer: int, *, draws: int = 500, seed: int = 0) -> pd.DataFrame:
    """Cosines between the directions of pairs of sources (`pairs_of`) at one layer, with their nulls.

    Args:
        contrasts: source -> contrast.
        layer: at which.
        draws: shuffles of both sides' labels.
        seed: of the shuffles.

    Returns:
        One row per pair: `one, other, cosine`, `random_bound` and `p_random` (random directions), `shuffled_bound`
        (95 % quantile of the cosine's size) and `p_shuffled`, `within_one`, `within_other` (`split_half`), `n_one`,
        `n_other` (questions used).
    """
    at = {name: c.layer(layer) for name, c in contrasts.items()}
    vectors = {name: direction(c)[0] for name, c in at.items()}
    shuffled = {name: shuffled_directions(c, draws, seed + i)[:, 0] for i, (name, c) in enumerate(at.items())}
    rows = []
    for one, other in persona_pairs(list(at)):
        value = float(cosine(vectors[one], vectors[other]))
        null = np.abs(cosine(shuffled[one], shuffled[other]))
        null = null[np.isfinite(null)]  # without spread within a question there is nothing to shuffle
        rows.append(
            {
                "one": one,
                "other": other,
                "layer": layer,
                "cosine": value,
                "random_bound": random_cosine_bound(len(vectors[one])),
                "p_random": random_cosine_p(value, len(vectors[one])),
                "shuffled_bound": float(np.quantile(null, 0.95)) if len(null) else math.nan,
                "p_shuffled": float((1 + np.sum(null >= abs(value))) / (1 + len(null))) if len(null) else math.nan,
                "within_one": split_half(at[one], seed=seed),
                "within_other": split_half(at[other], seed=seed),
                "n_one": questions_used(at[one]),
                "n_other": questions_used(at[other]),
            }
        )
    return pd.DataFrame(rows)
