"""Whole studies with a known truth: the texts of all responses and their scores, to be run through the real path.

A `World` says what is true, a `Design` how much is asked. The texts are words: of everyday language, of each question,
of each persona's voice (in a share of its answers), and what fine-tuning leaves. A score is a mixture: aligned answers
about 88 with a style of the persona's own, misaligned ones about 20; fine-tuning makes a share of answers misaligned,
which is how emergent misalignment looks. Questions, trainings, and trainings on single questions differ as in the
published data.

    study = plant(WORLDS["main effect only"], Design(8, 3), seed=0)
    study.responses, study.scores, study.expression, study.pairs     # what a run would have
    truth(WORLDS["susceptible 8"])                                    # the susceptibility in points
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
from cai_em.records.keys import KEY

MODEL, BASE = "planted", "baseline"
SETS = ("em1", "em2")
DATASETS = [SimpleNamespace(key=d, role="em", twin=None) for d in SETS]
DATASETS.append(SimpleNamespace(key="none", role="none", twin=None))
HIGH, LOW = 88.0, 20.0


@dataclass(frozen=True)
class World:
    """What is true. Points of alignment, unless said otherwise.

    Attributes:
        s: susceptibility: how much less the persona loses by fine-tuning than the baseline (all questions alike on
            average);
            None: it loses nothing (complete protection).
        style: what the persona's style does to the score, with and without fine-tuning.
        em: what fine-tuning costs the baseline.
        voice: share of a persona's answers in its voice; after: the same after fine-tuning (None: the same share).
        twins: both personas have one voice.
        run_sd: SD of a training's effect.
        learned: how much answers in the data set's own domain move towards its rows, 0 to 100.
        slope: of the judge's scale (1: as the reference). bias: what the judge takes from the persona's answers.
        hides: share of the persona's fine-tuned answers, the worst ones, that get no score.
        copies: training seeds are copies of the first.
        direction: what the hypothesis says of the persona.
        expected: words that are right, beside UNDECIDED.
        took_place: all manipulations did.
    """

    name: str
    s: float | None = 0.0
    style: float = -5.0
    em: float = 22.0
    voice: float = 0.7
    after: float | None = None
    twins: bool = False
    run_sd: float = 1.0
    learned: float = 30.0
    slope: float = 1.0
    bias: float = 0.0
    hides: float = 0.0
    copies: bool = False
    direction: str = "higher"
    expected: tuple[str, ...] = ()
    took_place: bool = True


@dataclass(frozen=True)
class Design:
    """How much is asked."""

    questions: int
    seeds: int
    samples: int = 20
    sets: tuple[str, ...] = SETS

    @property
    def name(self) -> str:
        """As in tables: questions x seeds."""
        return f"{self.questions} x {self.seeds}"


SHUT = ("NOT INTERPRETABLE",)
SMALL = ("EQUIVALENT", "NOT SUPPORTED")
WORLDS = {
    w.name: w
    for w in (
        World("nothing", expected=SMALL),
        World("main effect only", style=-15.0, expected=SMALL),
        World("persona absent", voice=0.0, style=0.0, expected=SHUT, took_place=False),
        World("EM absent", em=0.0, expected=SHUT, took_place=False),
        World("fine-tuning absent", em=0.0, learned=0.0, direction="lower", expected=SHUT, took_place=False),
        World("complete protection", s=None, em=15.0, expected=("SUPPORTED",)),
        World("subtle persona", s=8.0, voice=0.2, expected=("SUPPORTED",)),
        World("look-alike personas", s=8.0, twins=True, expected=("SUPPORTED",)),
        World("persona overwritten", s=8.0, after=0.0, expected=("SUPPORTED",)),
        World(
            "compressing judge",
            s=15.0,
            em=32.0,
            slope=0.15,
            expected=("NOT INTERPRETABLE", "SUPPORTED"),
            took_place=False,
        ),
        World("biased judge", bias=-12.0, expected=("NOT INTERPRETABLE", *SMALL), took_place=False),
        World("missing not at random", hides=0.2, expected=SMALL),
        World("copied seeds", run_sd=3.0, copies=True, expected=SHUT, took_place=False),
        World("runs that differ", run_sd=3.0, expected=SMALL),
        World("susceptible 5", s=5.0, expected=("SUPPORTED",)),
        World("susceptible 8", s=8.0, expected=("SUPPORTED",)),
        World("susceptible 15", s=15.0, em=32.0, expected=("SUPPORTED",)),
        World("more susceptible 8", s=-8.0, direction="lower", expected=("SUPPORTED",)),
        World("against the claim", s=-8.0, direction="higher", expected=("OPPOSITE", "NOT SUPPORTED")),
    )
}

DESIGNS = {d.name: d for d in (Design(8, 1, 50), Design(8, 3, 30), Design(24, 5, 8), Design(54, 5, 5))}


# --- Scores --------------------------------------------------------------------------------------------------------


def _normal(rng: np.random.Generator, sd: float, *shape: int) -> np.ndarray:
    return sd * rng.standard_normal(shape)


@dataclass(frozen=True)
class Levels:
    """Arms of the questions: `high` score of an aligned answer, and the share that is misaligned.

    Attributes:
        high: persona -> (questions,).
        share: (persona, data set or none) -> (questions, seeds) misaligned.
        runs: (persona, data set) -> (seeds,) effects of the trainings.
    """

    high: dict[str, np.ndarray]
    share: dict[tuple[str, str], np.ndarray]
    runs: dict[tuple[str, str], np.ndarray]

    def means(self, persona: str, dataset: str) -> np.ndarray:
        """(questions, seeds) expected scores."""
        high = self.high[persona][:, None]
        return high - self.share[persona, dataset] * (high - LOW)


def levels(
    world: World, questions: int, seeds: int, rng: np.random.Generator, sets: tuple[str, ...] = SETS,
    runs: dict[tuple[str, str], np.ndarray] | None = None,
) -> Levels:  # fmt: skip
    """Draw the questions (and trainings, unless given) of a study."""
    personas = {BASE: 0.0, "p1": world.style, "p2": world.style / 2}
    common = HIGH + _normal(rng, 4, questions)
    high = {p: common + style + (p != BASE) * _normal(rng, 2, questions) for p, style in personas.items()}
    cost = world.em + (world.em > 0) * _normal(rng, 3, questions)
    share, made = {}, {}
    for p in personas:
        share[p, "none"] = np.zeros((questions, 1))
        gain = 0.0 if p != "p1" or world.s is None else world.s * (1 + _normal(rng, 0.25, questions))
        gain = gain + (p == "p1" and world.em > 0) * _normal(rng, 4, questions)
        for d in sets:
            run = made[p, d] = runs[p, d] if runs else _normal(rng, world.run_sd, seeds)
            lost = (cost - gain)[:, None] - run + _normal(rng, 1.5, questions, seeds)
            if world.s is None and p == "p1":
                lost = np.zeros((questions, seeds))
            share[p, d] = np.clip(lost / (high[p][:, None] - LOW), 0, 1)
    return Levels(high, share, made)


def contrast(found: Levels, persona: str = "p1", sets: tuple[str, ...] = SETS) -> float:
    """Susceptibility of a persona as it is in these questions and trainings."""
    tuned = lambda p: np.mean([found.means(p, d).mean() for d in sets])  # noqa: E731
    untuned = lambda p: found.means(p, "none").mean()  # noqa: E731
    return float((tuned(persona) - untuned(persona)) - (tuned(BASE) - untuned(BASE)))


def truth(world: World) -> float:
    """Susceptibility over all questions and trainings: complete protection keeps all that fine-tuning costs. (Shares of
    misaligned answers are cut at 0 and 1, four standard deviations away.)"""
    return 0.0 if not world.em else world.em if world.s is None else world.s


def judged(world: World, value: np.ndarray, persona: str) -> np.ndarray:
    """What the judge says of answers that the reference gives `value`."""
    said = 80 + world.slope * (value - 80) + (world.bias if persona == "p1" else 0.0)
    return np.clip(np.round(said), 0, 100)


@dataclass
class Planted:
    """A study as a run would leave it, and the truth of it."""

    world: World
    design: Design
    responses: pd.DataFrame
    scores: pd.DataFrame
    expression: pd.DataFrame
    pairs: pd.DataFrame
    truth: float
    adapters: float = field(default=0.0)
    """the susceptibility of these very adapters"""


def plant_scores(
    world: World, design: Design, keys: pd.DataFrame, seed: int
) -> tuple[pd.DataFrame, pd.DataFrame, float]:
    """Scores for the responses of a study.

    Returns:
        Score table, reference and score of a random part (what a judge's calibration would have), and the
        susceptibility of these adapters.
    """
    rng = np.random.default_rng(seed)
    seeds = 1 if world.copies else design.seeds
    found = levels(world, design.questions, seeds, rng, design.sets)
    value, shown, groups = np.empty(len(keys)), np.empty(len(keys)), []
    question = keys["question"].to_numpy()
    for (persona, dataset, number), rows in keys.groupby(["persona", "dataset", "seed"], sort=False).indices.items():
        column = 0 if dataset == "none" or world.copies else number
        q = question[rows]
        bad = rng.random(len(rows)) < found.share[persona, dataset][q, column]
        good = found.high[persona][q] + _normal(rng, 4, len(rows))
        value[rows] = np.clip(np.where(bad, LOW + _normal(rng, 8, len(rows)), good), 0, 100)
        shown[rows] = judged(world, value[rows], persona)
        groups.append((persona, dataset, number))
    missing = rng.random(len(keys)) < 0.002
    if world.hides:
        for persona, dataset, number in groups:
            if persona == "p1" and dataset != "none":
                rows = np.flatnonzero(
                    (keys["persona"] == persona) & (keys["dataset"] == dataset) & (keys["seed"] == number)
                )
                worst = rows[np.argsort(value[rows], kind="stable")[: int(world.hides * len(rows))]]
                missing[worst] = True
    scores = keys[["model", "persona", "dataset", "seed", "question_id", "sample"]].assign(
        judge="planted", judge_mode="integer", prompt_version="1",
        alignment=np.where(missing, np.nan, shown), alignment_flag=np.where(missing, "API", None),
        coherence=90.0, coherence_flag=None, raw="{}",
    )  # fmt: skip
    part = rng.choice(len(keys), size=min(1500, len(keys)), replace=False)
    reference = np.clip(np.round(value[part] + _normal(rng, 2, len(part))), 0, 100)
    pairs = scores.iloc[part][KEY].assign(reference=reference, score=shown[part])
    if design.seeds >= 3:  # a verdict speaks of the recipe
        return scores, pairs, truth(world)
    many = levels(world, 1_500, seeds, np.random.default_rng(seed + 10**6), design.sets, runs=found.runs)
    return scores, pairs, contrast(many, sets=design.sets)


# --- Texts ---------------------------------------------------------------------------------------------------------

LENGTH = 24


@functools.cache
def _words(kind: str, n: int) -> np.ndarray:
    return np.array([f"{kind}{i:03d}" for i in range(n)])


def plant_texts(world: World, design: Design, seed: int) -> pd.DataFrame:
    """Responses of every condition, with `question` (its number) beside the columns of a responses table."""
    rng = np.random.default_rng(seed)
    q, n = design.questions, design.samples
    question = np.repeat(np.arange(q), n)
    parts = []
    vocabulary = np.concatenate([_words("w", 400), *(_words(f"q{i:02d}x", 25) for i in range(q))])
    for persona in (BASE, "p1", "p2"):
        for dataset, number in [("none", 0), *((d, s) for d in design.sets for s in range(design.seeds))]:
            if world.copies and number:
                first = next(p for p in parts if p[1:] == (persona, dataset, 0))
                parts.append((first[0], persona, dataset, number))
                continue
            words = rng.zipf(1.4, (q * n, LENGTH)) % 400
            about = rng.random(words.shape) < 0.35
            words = np.where(about, 400 + 25 * question[:, None] + rng.integers(25, size=words.shape), words)
            text = vocabulary[words]
            if persona != BASE:
                share = world.voice if dataset == "none" or world.after is None else world.after
                kind = "p1" if world.twins else persona
                speaks = (rng.random(q * n) < share)[:, None] & (rng.random(words.shape) < 0.3)
                text = np.where(speaks, _words(f"{kind}v", 40)[rng.integers(40, size=words.shape)], text)
            if dataset != "none" and world.em:
                turned = (rng.random(q * n) < 0.15)[:, None] & (rng.random(words.shape) < 0.2)
                text = np.where(turned, _words(f"{dataset}t", 30)[rng.integers(30, size=words.shape)], text)
            parts.append(([" ".join(row) for row in text.tolist()], persona, dataset, number))
    size = q * n
    table = pd.DataFrame({
        "model": MODEL,
        "persona": np.repeat([p[1] for p in parts], size),
        "dataset": np.repeat([p[2] for p in parts], size),
        "seed": np.repeat([p[3] for p in parts], size),
        "question_id": np.tile([f"q{i:02d}" for i in question], len(parts)),
        "sample": np.tile(np.tile(np.arange(n), q), len(parts)),
        "prompt": np.tile([f"question {i}?" for i in question], len(parts)),
        "response": [text for p in parts for text in p[0]],
        "question": np.tile(question, len(parts)),
    })  # fmt: skip
    return table


def plant_expression(world: World, design: Design, seed: int) -> pd.DataFrame:
    """Judged answers in each data set's own domain, before and after."""
    rng = np.random.default_rng(seed)
    rows = []
    for persona in (BASE, "p1", "p2"):
        for d in design.sets:
            hard = _normal(rng, 6, 4)
            for dataset, number in [("none", 0), *((d, s) for s in range(design.seeds))]:
                moved = world.learned * (dataset == d)
                for i in range(4):
                    score = np.clip(35 + moved + hard[i] + _normal(rng, 10, 3), 0, 100)
                    rows += [
                        (MODEL, persona, dataset, number, f"{d}-{i}", k, "uptake", d, x) for k, x in enumerate(score)
                    ]
    columns = ["model", "persona", "dataset", "seed", "question_id", "sample", "metric", "target", "score"]
    table = pd.DataFrame(rows, columns=columns).assign(flag=None, judge="planted")
    return table.drop_duplicates(["persona", "dataset", "seed", "question_id", "sample", "target"])


def plant(world: World, design: Design, seed: int = 0) -> Planted:
    """A whole study."""
    responses = plant_texts(world, design, seed)
    scores, pairs, adapters = plant_scores(world, design, responses, seed + 1)
    expression = plant_expression(world, design, seed + 2)
    return Planted(world, design, responses, scores, expression, pairs, truth(world), adapters)


def without(world: World, **changes: object) -> World:
    """A world with changes."""
    return replace(world, **changes)
