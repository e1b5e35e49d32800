"""A judge made ready: the one place where the local judge is chosen and fitted, for whichever stage judges."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from cai_em.endpoint.calls import Usage
from cai_em.judge import judging
from cai_em.judge.agreement import Choice, JudgeQuality, choose_judge, labelled_quality, published_at_hand
from cai_em.judge.local import LocalJudge, fit_local
from cai_em.judge.prompts import JudgePrompts
from cai_em.model.load import load_model, load_tokenizer
from cai_em.study.entries import JudgePreset, ModelSpec


@dataclass(frozen=True)
class Rater:
    """A judge that is ready: what it asks, how it was fitted, and how far it can be believed.

    Attributes:
        preset, prompts: who it is, and what it asks.
        cache: answers given before.
        local: the local judge, fitted; None behind an endpoint, which needs only its prompts.
        quality: how far it agrees with others; nothing is known of a judge behind an endpoint.
        auc: its least agreement with published scores, where they are at hand.
    """

    preset: JudgePreset
    prompts: JudgePrompts
    cache: Path
    local: LocalJudge | None = None
    quality: list[JudgeQuality] = field(default_factory=list)
    auc: float | None = None

    def rate(self, responses: pd.DataFrame, usage: Usage | None = None) -> pd.DataFrame:
        """`judge` of a responses table: a score table."""
        return judging.judge(responses, self.preset, self.prompts, self.cache, local=self.local, usage=usage)

    def __str__(self) -> str:
        if self.local is None:
            return f"judge '{self.preset.name}' ({self.preset.model})"
        scale = self.local.coherence
        coherence = f"coherence: AUC {scale.auc:.3f} of sensible against shuffled, misplaced and nonsensical answers"
        kept = [f"coherence, held out: AUC {auc:.3f} against {what}" for what, auc in scale.separates.items()]
        return "\n".join([*map(str, self.quality), coherence, *kept])


def make_ready(
    preset: JudgePreset,
    prompts: JudgePrompts,
    cache: Path,
    *,
    builtin: pd.DataFrame,
    selection: Path,
    spec: ModelSpec,
    labelled: pd.DataFrame | None = None,
) -> Rater:
    """A judge, the local one chosen (`choose_judge`), measured and fitted first.

    Args:
        preset, prompts, cache: as for `judge`.
        builtin: our own training texts (`builtin_training`).
        selection: the list of published files: the local judge learns from those scores, or is measured by them, where
            they are in the download cache.
        spec: the plain model that coherence is read from.
        labelled: answers of this model labelled by hand, where there are any (`labelled_answers`).
    """
    if preset.kind != "local":
        return Rater(preset, prompts, cache)
    if labelled is None:
        choice = choose_judge(builtin, published_at_hand(selection), distil=preset.distil, seed=preset.seed)
    else:  # its own answers say more of a model than a larger one's
        choice = Choice(builtin, "labelled", [])
    local = fit_local(
        choice.training,
        builtin.iloc[::6],
        load_model(spec, dtype="float32"),  # on a CPU four times faster than bfloat16 here, and exact
        load_tokenizer(spec),
        trained_on=choice.trained_on,
        labelled=labelled,
        seed=preset.seed,
    )
    own = [labelled_quality(local, labelled)] if labelled is not None else []
    return Rater(preset, prompts, cache, local, [*choice.quality, *own], choice.auc)
