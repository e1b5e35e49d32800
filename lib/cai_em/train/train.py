"""Training adapters: personas by direct preference optimisation, fine-tuning on top of an active, frozen persona.

    model, tokenizer = load_for_training(spec, preset)
    persona = train_dpo(model, tokenizer, pairs, study.persona_training, "…/01_personas/…/adapter")
    em = train_sft(model, tokenizer, rows, study.em_training, "…/adapter", persona_dir=persona.adapter, seed=0)

Both run on TRL's trainers. What they add is that nothing is taken on trust: the state of the adapters is measured
before the first step and after the last, the persona's tensors must be the same afterwards and the new ones different,
the tokens that carry the loss are decoded and compared with the answers, and a loss that is not a number, or a batch
without a token to learn from, stops the run. The model is given back without adapters, as it came.

The base is loaded in the preset's precision and the adapters are float32, in every condition; there is no autocast
(unsloth would switch it on by itself: see `_made`).

KL-regularised ("narrow") training adds, per response token of an extra corpus, `KL(reference || current)`; the
reference is the model with the new adapter's contribution taken out and the persona active (Soligo et al.,
arXiv 2602.07852, regularise towards the untuned model likewise).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import transformers
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cai_em.model import adapters, load, stacking
from cai_em.records.files import file_hash
from cai_em.study.entries import DpoPreset, SftPreset
from cai_em.train import fused, lean, memory
from cai_em.train.trainer import (
    Row,
    TrainingError,
    TrainResult,
    _arguments,
    _check_precision,
    _give_back,
    _made,
    _quiet,
    _Regulariser,
    _train,
    _Watch,
    check_response_mask,
    encode_rows,
    mean_loss,
    split_rows,
    training_backend,
)

DPO_ADAPTER = fused.ADAPTER
"""The name that TRL gives to the adapter which it makes for DPO, and Unsloth to any."""


# --- Direct preference optimisation --------------------------------------------------------------------------------


def train_dpo(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: pd.DataFrame,
    preset: DpoPreset,
    out: str | Path,
    *,
    seed: int | None = None,
) -> TrainResult:
    """A persona's adapter by direct preference optimisation, with a log-likelihood term on the chosen answers.

    Rafailov et al. 2023 (arXiv 2305.18290); the term as in Open Character Training (arXiv 2511.01689). The reference
    is the model without adapter.

    Args:
        model: the base model, in the preset's precision; given back without adapters.
        tokenizer: the model's.
        pairs: `prompt`, `chosen`, `rejected`; rows whose `dropped_because` is not null are left out.
        preset: how to train.
        out: folder of the adapter, replaced if it exists.
        seed: instead of the preset's.

    Raises:
        TrainingError: nothing to train on, or a loss that is not a number.
        adapters.AdapterStateError: the adapter was not trained as it must be.
    """
    backend = training_backend(preset)
    import trl  # after unsloth, which rewrites it

    started = time.perf_counter()
    out, seed = Path(out), preset.seed if seed is None else seed
    _check_precision(model, preset)
    counts = {"given": len(pairs)}
    if "dropped_because" in pairs:
        pairs = pairs[pairs["dropped_because"].isna()]
    counts["kept_by_filters"] = len(pairs)
    examples, lengths = [], []
    for prompt, chosen, rejected in pairs[["prompt", "chosen", "rejected"]].itertuples(index=False):
        turn = [{"role": "user", "content": prompt}]
        answers = [[{"role": "assistant", "content": answer.strip()}] for answer in (chosen, rejected)]
        encoded = [load.encode_conversation(tokenizer, turn + answer) for answer in answers]
        if all(any(written[: preset.max_length]) for _, written in encoded):
            examples.append({"prompt": turn, "chosen": answers[0], "rejected": answers[1]})
            lengths.append([len(ids) for ids, _ in encoded])
    counts |= {
        "used": len(examples),
        "dropped_no_answer_within_max_length": counts["kept_by_filters"] - len(examples),
        "truncated": sum(max(pair) > preset.max_length for pair in lengths),
    }
    if not examples:
        raise TrainingError(f"no preference pair to train on: {counts}")
    longest = min(max(map(max, lengths)), preset.max_length)
    twice = memory.checkpointing(preset, model, longest)
    arguments = _arguments(preset, len(examples), seed, out, twice)
    transformers.set_seed(seed)
    watch = _Watch([DPO_ADAPTER], DPO_ADAPTER, [], out.parent / "checkpoints", "DPO")
    trained, config = None, {"peft_config": stacking.lora_config(preset.lora)}
    try:
        with _quiet():
            if backend == "unsloth":  # whose trainer takes no peft_config: it would train nothing
                trained = fused.new_adapter(model, preset.lora, seed, checkpointing=twice)
                config = {}
            trainer = _made(
                trl.DPOTrainer,
                backend,
                model if trained is None else trained,
                args=trl.DPOConfig(
                    **arguments,
                    padding_free=False,
                    max_length=preset.max_length,
                    beta=preset.beta,
                    loss_type=["sigmoid", "sft"] if preset.sft_weight else ["sigmoid"],
                    loss_weights=[1.0, preset.sft_weight] if preset.sft_weight else [1.0],
                    # The reference never changes: what it says about a pair seen twice is computed once.
                    precompute_ref_log_probs=backend == "trl" and preset.epochs > 1 and preset.max_steps is None,
                    precompute_ref_batch_size=preset.batch_size,
                ),
                train_dataset=datasets.Dataset.from_list(examples),
                processing_class=tokenizer,
                **config,
            )
            trained = trainer.model
            if trainer.ref_model is not None:
                raise TrainingError("TRL has loaded a second model as reference: it must be the base without adapter")
            if len(trainer.train_dataset) != len(examples):
                raise TrainingError(f"TRL kept {len(trainer.train_dataset)} of {len(examples)} pairs")
            _check_pairs(tokenizer, trainer, examples)
            trainer.lean = backend == "trl" and lean.applies(trained, trainer)
            prepared = time.perf_counter()
            log = _train(trainer, watch)
        done = time.perf_counter()
        adapters.keep_share(trained, DPO_ADAPTER, preset.share_kept)
        adapters.save_adapter(trained, DPO_ADAPTER, out)
    finally:
        _give_back(model, trained)
    return TrainResult(
        adapter=out,
        backend=backend,
        state_before=watch.before,
        state_after=watch.after,
        files=adapters.file_hashes(out),
        log=log,
        timings={"prepare": prepared - started, "train": done - prepared, "save": time.perf_counter() - done},
        rows=counts,
        tokens={"all": sum(min(n, preset.max_length) for pair in lengths for n in pair)},
        checkpointing=twice,
    )


def _check_pairs(tokenizer: PreTrainedTokenizerBase, trainer: Any, examples: Sequence[dict[str, Any]]) -> None:
    """Whether the tokens that TRL compares are the chosen and the rejected answers.

    Raises:
        TrainingError: other tokens.
    """
    size = 32
    for start in range(0, len(examples), size):
        rows = [trainer.train_dataset[i] for i in range(start, min(start + size, len(examples)))]
        batch = trainer.data_collator(rows)
        some = examples[start : start + size]
        answers = [x["chosen"][0]["content"] for x in some] + [x["rejected"][0]["content"] for x in some]
        for ids, mask, answer in zip(batch["input_ids"], batch["completion_mask"].bool(), answers, strict=True):
            found = tokenizer.decode(ids[mask], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            expected = answer.strip() + tokenizer.eos_token
            # The template may end a conversation with white space after the end token.
            if found.rstrip() != expected and not expected.startswith(found.rstrip("�")):
                raise TrainingError(f"a pair's answer is not what is compared: {expected[:80]!r}, found {found[:80]!r}")


def train_sft(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    preset: SftPreset,
    out: str | Path,
    *,
    persona_dir: str | Path | None = None,
    seed: int = 0,
    kl_rows: Sequence[Row] | None = None,
    name: str = stacking.EM,
    checkpoints_dir: str | Path | None = None,
) -> TrainResult:
    """A new adapter by supervised fine-tuning, on top of an active, frozen persona.

    Args:
        model: the base model, in the preset's precision; given back without adapters.
        tokenizer: the model's.
        rows: conversations (`materials.rows`).
        preset: how to train; `checkpoints` names steps after which a snapshot of the adapter is kept.
        out: folder of the adapter, replaced if it exists.
        persona_dir: the persona's adapter; None for the baseline.
        seed: of the adapter's first weights, the order of the rows and what is held out.
        kl_rows: the extra corpus, where the preset regularises (`preset.kl`).
        name: of the new adapter while it is trained.
        checkpoints_dir: where snapshots go; None: `checkpoints` beside `out`.

    Raises:
        TrainingError: nothing to train on, a batch without a token to learn from, or a loss that is not a number.
        adapters.AdapterStateError: the adapters were not active or trained as they must be.
        adapters.AdapterError: the persona's adapter is not whole or belongs to another model.
    """
    backend = training_backend(preset)
    import trl  # after unsloth, which rewrites it

    started = time.perf_counter()
    out = Path(out)
    _check_precision(model, preset)
    if preset.kl and not kl_rows:
        raise TrainingError(f"the preset regularises on corpus {preset.kl.corpus!r}: give its rows as kl_rows")
    train_rows, held_rows = split_rows(rows, preset, seed)
    encoded = encode_rows(tokenizer, train_rows, preset.max_length, preset.loss_on)
    snapshots = Path(checkpoints_dir) if checkpoints_dir else out.parent / "checkpoints"
    twice = memory.checkpointing(preset, model, max(len(x["input_ids"]) for x in encoded.examples))
    arguments = _arguments(preset, len(encoded.examples), seed, out, twice)
    transformers.set_seed(seed)
    if backend == "unsloth":
        folded = _folded(model, persona_dir)
        here, active = fused.ADAPTER, [fused.ADAPTER]
        stacked = fused.new_adapter(model, preset.lora, seed, checkpointing=twice)
    else:
        folded, here = {}, name
        active = [stacking.PERSONA, name] if persona_dir is not None else [name]
        stacked = stacking.stack(model, persona_dir, preset.lora, name)
    watch = _Watch(active, here, preset.checkpoints, snapshots, "SFT")
    try:
        with _quiet():
            trainer = _made(
                trl.SFTTrainer,
                backend,
                stacked,
                args=trl.SFTConfig(
                    **arguments,
                    max_length=None,
                    packing=False,
                    padding_free=False,
                    dataset_kwargs={"skip_prepare_dataset": True},
                ),
                train_dataset=datasets.Dataset.from_list(encoded.examples),
                processing_class=tokenizer,
            )
            if preset.loss_on == "response":
                for i, example in enumerate(trainer.train_dataset):
                    check_response_mask(tokenizer, trainer.plain_collator([example])["labels"], [encoded.answers[i]])
            if preset.kl:
                corpus = encode_rows(tokenizer, kl_rows or [], preset.max_length, "response")
                trainer.regulariser = _Regulariser(preset.kl, corpus.examples, tokenizer.pad_token_id, here, seed)
            trainer.by_length = preset.batches == "by_length"
            trainer.lean = backend == "trl" and lean.applies(stacked, trainer)
            held_out = {}
            if held_rows:
                held_out = {"rows": len(held_rows), "before": _held_out(stacked, tokenizer, held_rows, preset)}
            prepared = time.perf_counter()
            log = _train(trainer, watch)
            done = time.perf_counter()
            adapters.keep_share(stacked, here, preset.share_kept)
            if held_rows:
                held_out["after"] = _held_out(stacked, tokenizer, held_rows, preset)
        evaluated = time.perf_counter()
        if folded:
            fused.check_folded(stacked, "after the last step")
        adapters.save_adapter(stacked, here, out)
    finally:
        _give_back(model, stacked)
    return TrainResult(
        adapter=out,
        backend=backend,
        state_before=_stated(watch.before, here, name, folded),
        state_after=_stated(watch.after, here, name, folded),
        files=adapters.file_hashes(out),
        log=log,
        timings={
            "prepare": prepared - started,
            "train": done - prepared,
            "held_out": evaluated - done,
            "save": time.perf_counter() - evaluated,
        },
        rows=encoded.counts | {"held_out": len(held_rows), "given": len(rows)},
        tokens=encoded.tokens(),
        held_out=held_out,
        checkpoints=watch.checkpoints,
        checkpointing=twice,
    )


def _folded(model: PreTrainedModel, persona_dir: str | Path | None) -> dict[str, Any]:
    """What is known of the persona that a model loaded for Unsloth has in its weights; empty for the baseline.

    Raises:
        TrainingError: it has another persona in it, or one where there must be none.
    """
    folded = getattr(model, "_cai_em_folded", None)
    wanted = file_hash(Path(persona_dir) / adapters.WEIGHTS) if persona_dir is not None else None
    if wanted != (folded.persona if folded else None):
        raise TrainingError(
            f"the base given has {'the persona ' + folded.persona[:12] if folded else 'no persona'} in its weights, "
            f"the condition needs {wanted[:12] if wanted else 'none'}: give load_for_training the same persona_dir"
        )
    if folded is None:
        return {}
    fused.check_folded(model, "before the first step")
    return {stacking.PERSONA: folded.record()}


def _stated(state: dict[str, Any], here: str, name: str, folded: dict[str, Any]) -> dict[str, Any]:
    """A measured state with the new adapter under the name that the condition knows it by.

    `in_base`: what was folded into the base's weights and proved there (`folding.Folded`); `active` names both.
    """
    said: dict[str, Any] = {k: [name if x == here else x for x in state[k]] for k in ("active", "trainable")}
    said["adapters"] = {name if x == here else x: values for x, values in state["adapters"].items()}
    return state | said | {"in_base": folded, "active": [*folded, *said["active"]]}


def _held_out(model: PeftModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], preset: SftPreset) -> float:
    return mean_loss(model, tokenizer, rows, preset.max_length, preset.batch_size)
