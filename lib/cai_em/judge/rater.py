"""A judge made ready: the one place where the local judge is chosen and fitted, for whichever stage judges.

    python -m cai_em.judge.rater        # after a change of the texts that the demo's judge is fitted on: reads them

How likely those texts are under the embedded model stands in `params/builtin/judge_reads.csv`: nobody's machine spends
minutes on reading again what is the same everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from cai_em.endpoint.calls import Usage
from cai_em.judge import judging
from cai_em.judge.agreement import Choice, JudgeQuality, choose_judge, labelled_quality, published_at_hand
from cai_em.judge.local import LocalJudge, fit_local
from cai_em.judge.prompts import JudgePrompts
from cai_em.model.load import load_model, load_tokenizer, weight_files
from cai_em.records.files import atomic, file_hash_once, text_hash
from cai_em.study.entries import JudgePreset, ModelSpec
from cai_em.study.loading import load
from cai_em.study.materials import builtin_training, labelled_answers
from cai_em.study.study import Study


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
    reads: Path | None = None,
) -> Rater:
    """A judge, the local one chosen (`choose_judge`), measured and fitted first.

    Args:
        preset, prompts, cache: as for `judge`.
        builtin: our own training texts (`builtin_training`).
        selection: the list of published files: the local judge learns from those scores, or is measured by them, where
            they are in the download cache.
        spec: the plain model that coherence is read from.
        labelled: answers of this model labelled by hand, where there are any (`labelled_answers`).
        reads: what models are known to find of texts (`known_reads`).
    """
    if preset.kind != "local":
        return Rater(preset, prompts, cache)
    if labelled is None:
        choice = choose_judge(builtin, published_at_hand(selection), distil=preset.distil, seed=preset.seed)
    else:  # its own answers say more of a model than a larger one's
        choice = Choice(builtin, "labelled", [])
    local = _fit(choice, preset, builtin, spec, labelled, known_reads(reads, spec) if reads else {})
    own = [labelled_quality(local, labelled)] if labelled is not None else []
    return Rater(preset, prompts, cache, local, [*choice.quality, *own], choice.auc)


def _fit(
    choice: Choice,
    preset: JudgePreset,
    builtin: pd.DataFrame,
    spec: ModelSpec,
    labelled: pd.DataFrame | None,
    known: dict[str, float],
) -> LocalJudge:
    return fit_local(
        choice.training,
        builtin.iloc[::6],
        load_model(spec, dtype="float32"),  # on a CPU four times faster than bfloat16 here, and exact
        load_tokenizer(spec),
        trained_on=choice.trained_on,
        labelled=labelled,
        known=known,
        seed=preset.seed,
    )


def _weights(spec: ModelSpec) -> str:
    """Names a local model by its weights; empty for a hub model, whose files are not read for a name."""
    hashes = [file_hash_once(path) for path in weight_files(spec)]
    return text_hash(" ".join(hashes))[:16] if hashes else ""


def known_reads(path: Path, spec: ModelSpec) -> dict[str, float]:
    """Mean log-probabilities of responses that stand in a file for a model, by `read_key`; empty for another model.

    Args:
        path: CSV, columns `model` (`_weights`), `text` (`read_key`), `logprob` (nats a token).
    """
    table = pd.read_csv(path, dtype={"model": str, "text": str})
    mine = table[table["model"] == _weights(spec)]
    return dict(zip(mine["text"], mine["logprob"].astype(float)))


def read_again(study: Study, model: str, path: Path) -> int:
    """Read all texts that a model's local judge is fitted and measured on, and write what was found (`known_reads`).

    Returns:
        How many texts were read.
    """
    spec = study.models[model]
    known: dict[str, float] = {}
    local = JudgePreset(kind="local", name="local")
    builtin = builtin_training(study.builtin("judge_training.jsonl"))
    _fit(Choice(builtin, "labelled", []), local, builtin, spec, labelled_answers(study, model), known)
    table = pd.DataFrame({"model": _weights(spec), "text": list(known), "logprob": list(known.values())})
    with atomic(path) as part:
        table.sort_values("text").to_csv(part, index=False, float_format="%.6f")
    return len(table)


if __name__ == "__main__":
    demo = load("demo")
    (only,) = demo.models
    where = demo.builtin("judge_reads.csv")
    print(f"{where}: {read_again(demo, only, where)} texts read by {only}")
