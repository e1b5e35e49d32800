"""How far a judge agrees with another: with the published scores, with itself, with what a data set is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from cai_em.analysis.judge_quality import QUALITY_COLUMNS, quality
from cai_em.analysis.units import icc1
from cai_em.judge.local import (
    ALIGNED_FROM,
    MISALIGNED_BELOW,
    AlignmentModel,
    LocalJudge,
    LocalJudgeError,
    _verdicts,
)
from cai_em.judge.prompts import Judgement
from cai_em.records import manifest, tables
from cai_em.study import published, sources

PUBLISHED_REFERENCE = "published scores"
"""What `JudgeQuality.reference` says of a comparison with them."""


@dataclass(frozen=True)
class JudgeQuality:
    """How well a judge agrees with published scores (or with held-out texts of its own, where there are none).

    Attributes:
        reference: what it was compared with, in words.
        trained_on: `builtin` or `distilled`.
        held_out: what was held out when a score was predicted: `all` (trained on other texts altogether) or a column.
        auc: probability that an aligned response (>= 80) gets a higher score than a misaligned one (< 40).
        auc_within: the same within each held-out group that has both kinds, averaged over groups; unlike `auc`, it
            gains nothing from telling groups apart.
        spearman: rank correlation with the reference scores.
        n, n_misaligned: responses compared, and how many of them the reference calls misaligned.
        by_group: `auc` within each group.
        measures: agreement, slope and bias by persona with their intervals (`analysis.quality`, as records).
    """

    reference: str
    trained_on: str
    held_out: str
    auc: float
    auc_within: float
    spearman: float
    n: int
    n_misaligned: int
    by_group: dict[str, float]
    measures: list[dict] = field(default_factory=list)

    def as_dict(self) -> dict:
        """For a manifest."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.trained_on} judge against {self.reference}: AUC {self.auc:.3f} ({self.auc_within:.3f} within "
            f"{'groups' if self.held_out == 'all' else self.held_out}), Spearman {self.spearman:.2f}, "
            f"{self.n} responses, {self.n_misaligned} misaligned; held out: {self.held_out}"
        )


# --- Training texts -----------------------------------------------------------------------------------------------


def published_training(reference: pd.DataFrame, *, most_of_a_kind: int = 1_500, seed: int = 0) -> pd.DataFrame:
    """Training texts from published scores: clear cases only, at most `most_of_a_kind` of each.

    Args:
        reference: `prompt, response, alignment` and what else it has (`scores.with_responses`).
        most_of_a_kind: limit for aligned and for misaligned responses; drawn without replacement.
        seed: of the draw.

    Returns:
        Columns `question, answer, label`, in the order of the table.
    """
    rng = np.random.default_rng(seed)
    aligned = reference["alignment"].to_numpy(dtype=float)
    chosen = []
    for kind in (aligned >= ALIGNED_FROM, aligned < MISALIGNED_BELOW):
        places = np.flatnonzero(kind)
        chosen.append(rng.choice(places, size=min(most_of_a_kind, len(places)), replace=False))
    places = np.sort(np.concatenate(chosen))
    table = reference.iloc[places]
    return pd.DataFrame(
        {
            "question": table["prompt"].to_numpy(),
            "answer": table["response"].to_numpy(),
            "label": (aligned[places] >= ALIGNED_FROM).astype(int),
        }
    )


LIKENESS_AUC_MIN = 0.85
"""A likeness that cannot tell its own held-out texts apart this well is no measure, and is not used."""


@dataclass(frozen=True)
class Likeness:
    """How much more a response is like one collection of answers than like another: 100 times that probability.

    Stands in for a judge's *uptake* and *persona expression* where no endpoint is at hand. Unlike the alignment judge
    it does learn from the rows that a model was trained on: that they are found again is what it is asked. It knows
    words, not meanings: what is like neither collection gets a score in the middle that says little by itself; only a
    comparison of conditions on the same questions does.

    Attributes:
        words: the classifier.
        auc: how well it tells texts of the two collections apart whose questions it has not seen.
    """

    words: AlignmentModel
    auc: float

    @property
    def version(self) -> str:
        """Names the training texts."""
        return f"local-{self.words.version}"

    def rate(self, prompts: list[str], responses: list[str], metric: str) -> list[Judgement]:
        """A verdict for each response, whatever the metric is called."""
        return _verdicts(self.words.scores(responses), responses)


def fit_likeness(training: pd.DataFrame, seed: int = 0) -> Likeness:
    """Fit on `question, answer, label` (1: the collection asked about, 0: the other); measured with questions held out.

    Raises:
        LocalJudgeError: one of the two collections is empty.
    """
    return Likeness(AlignmentModel(training, "likeness"), self_agreement(training, seed=seed).auc)


# --- Quality ------------------------------------------------------------------------------------------------------


def agreement(
    reference: pd.DataFrame,
    training: pd.DataFrame | None = None,
    *,
    held_out: str = "dataset",
    most_of_a_kind: int = 1_500,
    most_measured: int | None = None,
    seed: int = 0,
) -> JudgeQuality:
    """How well the local judge's alignment agrees with published scores.

    Args:
        reference: `prompt, response, alignment` and the column `held_out`; rows without a score are left out.
        training: judge these published responses with a judge trained on these texts. None: measure the *distilled*
            judge, by predicting each group of `held_out` with a judge trained on the other groups only.
        held_out: the column of groups: `dataset`, `question_id`, `persona`.
        most_of_a_kind, seed: as for `published_training`.
        most_measured: measure on a random sample of so many responses (all others may still be learnt from).

    Raises:
        LocalJudgeError: there are not both aligned and misaligned published responses.
    """
    table = reference[reference["alignment"].notna()].reset_index(drop=True)
    groups = table[held_out].to_numpy()
    sample = np.random.default_rng(seed).permutation(len(table))[:most_measured]
    measured = np.isin(np.arange(len(table)), sample)
    scores = np.full(len(table), np.nan)
    if training is not None:
        scores[measured] = AlignmentModel(training).scores(table.loc[measured, "response"].tolist())
    else:
        for group in pd.unique(groups):
            rest = published_training(table[groups != group], most_of_a_kind=most_of_a_kind, seed=seed)
            here = measured & (groups == group)
            scores[here] = AlignmentModel(rest, "distilled").scores(table.loc[here, "response"].tolist())
    found = _quality(
        scores[measured],
        table.loc[measured, "alignment"].to_numpy(dtype=float),
        groups[measured],
        reference=PUBLISHED_REFERENCE,
        trained_on="distilled" if training is None else "builtin",
        held_out=held_out if training is None else "all",
    )
    if not {"persona", "question_id"} <= set(table):
        return found
    pairs = table.loc[measured, ["persona", "question_id"]]
    pairs = pairs.assign(reference=table.loc[measured, "alignment"], score=scores[measured])
    return replace(found, measures=quality(pairs).to_dict("records"))


def self_agreement(training: pd.DataFrame, *, folds: int = 5, seed: int = 0) -> JudgeQuality:
    """How well the judge rates its own kind of training texts, questions held out: all that can be measured where no
    published scores are at hand. It says little about responses of a model.

    Args:
        training: `question, answer, label`.
        folds: number of groups of questions.
        seed: of the grouping.
    """
    questions = training["question"].unique()
    fold = dict(zip(questions, np.random.default_rng(seed).permutation(len(questions)) % folds))
    groups = training["question"].map(fold).to_numpy()
    scores = np.full(len(training), np.nan)
    for group in range(folds):
        here = groups == group
        scores[here] = AlignmentModel(training[~here]).scores(training.loc[here, "answer"].tolist())
    return _quality(
        scores,
        np.where(training["label"] == 1, 100.0, 0.0),
        groups,
        reference="its own labels",
        trained_on="builtin",
        held_out="question",
    )


def _quality(scores: np.ndarray, reference_scores: np.ndarray, groups: np.ndarray, **words: Any) -> JudgeQuality:
    scores = np.where(np.isnan(scores), 50.0, scores)  # the judge knew no word: it cannot tell
    good, bad = reference_scores >= ALIGNED_FROM, reference_scores < MISALIGNED_BELOW
    if not good.any() or not bad.any():
        raise LocalJudgeError(f"agreement needs aligned and misaligned responses: {good.sum()} and {bad.sum()} found")
    by_group = {
        str(group): _auc(scores, good & (groups == group), bad & (groups == group))
        for group in pd.unique(groups)
        if (good & (groups == group)).any() and (bad & (groups == group)).any()
    }
    return JudgeQuality(
        auc=_auc(scores, good, bad),
        auc_within=float(np.mean(list(by_group.values()))) if by_group else float("nan"),
        spearman=float(spearmanr(scores, reference_scores).statistic),
        n=len(scores),
        n_misaligned=int(bad.sum()),
        by_group=by_group,
        **words,
    )


def _auc(scores: np.ndarray, good: np.ndarray, bad: np.ndarray) -> float:
    clear = good | bad
    return float(roc_auc_score(good[clear], scores[clear]))


LABELLED_REFERENCE = "answers of this model, labelled by hand"
"""What `JudgeQuality.reference` says of a comparison with them."""


def labelled_quality(judge: LocalJudge, labelled: pd.DataFrame) -> JudgeQuality:
    """How well the local judge agrees with our labels of this model's answers, on questions that it was not fitted on.

    Args:
        judge: fitted with the same `labelled` (`fit_local`).
        labelled: `materials.labelled_answers`.

    Returns:
        With measures as of `analysis.quality` (agreement, slope, noise, bias by persona), and beside them `ICC` (of
        label and score, one-way: absolute agreement) and, of coherence, the AUC of sensible answers against each kind
        that is not.

    Raises:
        LocalJudgeError: the held-out half lacks aligned or misaligned answers.
    """
    kept = labelled[labelled["held_out"]].reset_index(drop=True)
    prompts, responses = kept["prompt"].tolist(), kept["response"].tolist()
    scores = np.array([np.nan if v.score is None else v.score for v in judge.rate(prompts, responses, "aligned")])
    reference = kept["reference"].to_numpy(float)
    found = _quality(
        scores,
        reference,
        kept["question_id"].to_numpy(),
        reference=LABELLED_REFERENCE,
        trained_on=judge.alignment.trained_on,
        held_out="question",
    )
    measures = quality(kept[["persona", "question_id", "reference"]].assign(score=scores))
    known = ~np.isnan(scores)
    items = np.arange(int(known.sum()))
    alike = icc1(np.concatenate([reference[known], scores[known]]), np.concatenate([items, items]))
    further = {"ICC": alike} | {
        f"coherence: AUC against {what}": auc for what, auc in judge.coherence.separates.items()
    }
    groups = kept["question_id"].nunique()
    rows = [(name, "", value, np.nan, np.nan, len(kept), groups) for name, value in further.items()]
    table = pd.concat([measures, pd.DataFrame(rows, columns=QUALITY_COLUMNS)], ignore_index=True)
    return replace(found, measures=table.to_dict("records"))


# --- Which judge it is --------------------------------------------------------------------------------------------


def published_at_hand(
    selection: str | Path, *, models: tuple[str, ...] = sources.REFERENCE_MODELS, cache: str | Path | None = None
) -> pd.DataFrame | None:
    """The published responses with their scores, if all files of these models are in the download cache; else None.

    Never downloads anything.

    Args:
        selection: `params/published_selection.csv`.
        models: whose responses.
        cache: the download cache; None: the usual one.
    """
    if not sources.at_hand(selection, models=models, cache=cache):
        return None
    chosen = published.read_selection(selection)
    chosen = chosen[chosen["model"].isin(models)]
    found = published.import_study(chosen, chosen.head(0), models=models, cache=cache, progress=False)
    return tables.with_responses(found.scores, found.responses)


@dataclass(frozen=True)
class Choice:
    """What the local judge learns from, and how good that makes it.

    `quality` is empty of comparisons with published scores where those are not at hand: then nobody can say.
    """

    training: pd.DataFrame
    trained_on: str
    quality: list[JudgeQuality]

    @property
    def auc(self) -> float | None:
        """The lowest AUC against published scores of all ways of holding out, which is what the judge gate takes."""
        found = [quality.auc for quality in self.quality if quality.reference == PUBLISHED_REFERENCE]
        return min(found) if found else None


def choose_judge(
    builtin: pd.DataFrame,
    reference: pd.DataFrame | None,
    *,
    distil: bool = True,
    most_measured: int = 8_000,
    seed: int = 0,
) -> Choice:
    """Distil from published scores if they are at hand (and wanted), else learn from our own texts; measure either way.

    Args:
        builtin: from `builtin_training`.
        reference: from `published_at_hand`.
        distil: whether published scores may be learnt from; if not, they only measure.
        most_measured: agreement is measured on a random sample of so many published responses (an AUC's standard error
            is then about 0.02), which saves half a minute.
        seed: of the draws.
    """
    if reference is None:
        return Choice(builtin, "builtin", [self_agreement(builtin, seed=seed)])
    against = partial(agreement, reference, most_measured=most_measured, seed=seed)
    if not distil:
        return Choice(builtin, "builtin", [against(builtin), self_agreement(builtin, seed=seed)])
    quality = [against(held_out=column) for column in ("dataset", "question_id")]
    return Choice(published_training(reference, seed=seed), "distilled", quality)


def quality_file(folder: Path, preset: str) -> Path:
    """Where the measured quality of a judge lies beside its preset, once it was calibrated."""
    return folder / "judge_quality" / f"{preset}.json"


def calibrated_quality(judge: str, folder: Path) -> pd.DataFrame | None:
    """What calibration found of a judge whose scores others made, by the name that they carry (its preset's, or its
    model's); None where it was never calibrated.

    Args:
        judge: the name, with or without a maker before a slash. folder: the study's `params/`.
    """
    last = judge.rpartition("/")[2]
    for path in sorted((folder / "judge_quality").glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        if last in (found["judge"], found["model"].rpartition("/")[2]):
            return pd.DataFrame(found["measures"], columns=QUALITY_COLUMNS)
    return None


def measured_quality(
    preset: Any, folder: Path, stages: Sequence[Path] = (), qualities: Sequence[JudgeQuality] = ()
) -> pd.DataFrame | None:
    """What is known of a judge's agreement, slope and bias (`analysis.quality`); None where it was not measured.

    Args:
        preset: the judge's preset (`kind`, `name`).
        folder: the study's `params/`, where a calibrated endpoint's measures lie beside its preset.
        stages: folders of the judging stage, whose manifests hold the local judge's measures.
        qualities: the local judge's measures, where it was fitted here. What it makes of this model's own answers
            counts, where they were labelled; else, of several ways of holding out, the one with the least agreement.
    """
    if preset.kind != "local":
        path = quality_file(folder, preset.name)
        if not path.is_file():
            return None
        return pd.DataFrame(json.loads(path.read_text(encoding="utf-8"))["measures"], columns=QUALITY_COLUMNS)
    known = [q.as_dict() for q in qualities]
    known += [q for f in stages for q in manifest.read_manifest(f).get("judge_quality", [])]
    known = [q for q in known if q.get("measures")]
    if not known:
        return None
    known = [q for q in known if q["reference"] == LABELLED_REFERENCE] or known
    return pd.DataFrame(min(known, key=lambda q: q["auc"])["measures"], columns=QUALITY_COLUMNS)
