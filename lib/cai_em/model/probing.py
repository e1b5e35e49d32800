"""Composition of adapters for sampling, and the proof on the logits that it is what it claims to be."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cai_em.model.adapters import (
    AdapterError,
    AdapterFiles,
    Adapters,
    _plain,
    _targets,
    check_fits,
    concatenate,
    file_hashes,
    read_adapter,
    weights_hash,
)
from cai_em.model.stacking import COMPOSED, _activate, _evaluating, _exchange, _insert, _lora_layers, _places

RELATIVE_TOLERANCE = 1e-4
"""How far two logits may lie apart in float32, as a share of the largest: rounding gives about a thirtieth of it."""
PROBE_TOKENS = 4
"""How many of a prompt's last tokens a probe reads: those with which the template begins an answer. Every module takes
part in each. Differences are up to 40 % smaller than over 37 tokens, and twenty times the tolerance (docs/LOG.md)."""
KEPT_LOGITS = 16
"""How many adapters' logits are kept from one probe to the next (of a 7B model, some 4 MB each)."""


class ProbeError(AdapterError):
    """A composed model does not compute what its adapters together compute, or an adapter makes no difference."""


def compose(model: nn.Module, adapters: Adapters, name: str = COMPOSED) -> PeftModel:
    """Load the sum of several adapters into a model as one adapter, active and frozen.

    Args:
        model: the base model, or a `PeftModel` on it.
        adapters: (name, folder), persona first.
        name: of the sum.

    Raises:
        AdapterError: adapters that are not whole or belong to another model.
    """
    total = concatenate([folder for _, folder in adapters])
    check_fits(total, model)
    found = _insert(model, name, total.config, total.modules)
    found.set_adapter(name, inference_mode=True)
    return found.eval()


class Slots:
    """LoRA layers put into a model once, whose tensors are exchanged from one condition to the next.

    peft takes about a second to put its layers into a model of 135M parameters, and again to take them out; to
    exchange their tensors takes some hundredths. Each condition's tensors keep their own rank: nothing is padded, and
    the model computes bit for bit what `compose` would make it compute. Without adapters it computes what the base
    does; after `close` it is the model that it was.

    Args:
        model: the base model; while slots are in it, use it for nothing else.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._peft: PeftModel | None = None
        self._layers: dict[str, LoraLayer] = {}
        self._shapes: dict[str, tuple[int, int]] = {}
        self._known: dict[tuple[str, ...], Tensor] = {}
        self._probed: tuple[str, ...] = ()
        self._read: dict[str, tuple[Any, AdapterFiles]] = {}

    @contextlib.contextmanager
    def composed(self, adapters: Adapters) -> Iterator[nn.Module]:
        """The model with the sum of several adapters for the length of a block; as the base if there are none.

        Raises:
            AdapterError: adapters that are not whole or belong to another model.
        """
        if not adapters:
            yield self.model
            return
        total = concatenate(self._files(adapters))
        check_fits(total, self.model)
        shapes = self._shapes | {m: (b.shape[0], a.shape[1]) for m, (a, b) in total.modules.items()}
        if shapes != self._shapes:
            self.close()  # a module without a place: all are made anew
            self._shapes = shapes
        idle = {m: (torch.zeros(1, c), torch.zeros(r, 1)) for m, (r, c) in shapes.items() if m not in total.modules}
        total.modules = dict(sorted((total.modules | idle).items()))
        total.config.target_modules = set(_targets(total.modules))
        if self._peft is None:
            self._peft = _insert(self.model, COMPOSED, total.config, total.modules).eval()
            self._layers = _places(self._peft, COMPOSED)
        else:
            _exchange(self._layers, COMPOSED, total)
        try:
            _activate(self._peft, self._layers.values(), [COMPOSED])
            yield self._peft
        finally:
            _activate(self._peft, self._layers.values(), [])

    def _files(self, adapters: Adapters) -> list[AdapterFiles]:
        """Adapters as read; what the condition before had too is the same file still, and not read again."""
        before, self._read = self._read, {}
        for folder in (str(folder) for _, folder in adapters):
            is_now = file_hashes(folder)
            was, files = before.get(folder, (None, None))
            self._read[folder] = is_now, files if files and was == is_now else read_adapter(folder)
        return [self._read[str(folder)][1] for _, folder in adapters]

    def probe(
        self,
        tokenizer: PreTrainedTokenizerBase,
        adapters: Adapters,
        prompts: Sequence[str],
        may_be_idle: Collection[str] = (),
        trained_with: Adapters = (),
    ) -> ProbeReport:
        """`probe` inside a `composed` block; what the base and single adapters compute is kept for later conditions.

        Raises:
            ProbeError, AdapterError: as `probe`.
        """
        if self._peft is None:
            raise AdapterError("nothing to probe: no adapters are composed")
        if self._probed != tuple(prompts):
            self._probed, self._known = tuple(prompts), {}
        read = {folder: files for folder, (_, files) in self._read.items()}
        return _prove(self._peft, tokenizer, adapters, prompts, self._known, may_be_idle, trained_with, read)

    def close(self) -> None:
        """Take the layers out again: the model is the bare one that it was."""
        if self._peft is None:
            return
        self._peft.unload()
        # Left behind by peft, it would make the next adapter look like a second one on top of this.
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config
        self._peft, self._layers, self._shapes, self._read = None, {}, {}, {}


@contextlib.contextmanager
def composed(model: PreTrainedModel, adapters: Adapters) -> Iterator[nn.Module]:
    """A model with the sum of several adapters for the length of a block; the bare model if there are none.

    Only the inserted layers are taken out again, so a base model loaded once serves one condition after another (many
    of them: `Slots` is faster).
    """
    slots = Slots(model)
    try:
        with slots.composed(adapters) as ready:
            yield ready
    finally:
        slots.close()


# --- The probe -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProbeReport:
    """What a probe measured, in float32.

    Attributes:
        adapters: SHA-256 of each adapter's weights, by name.
        scales: what each adapter's `B @ A` is multiplied with.
        prompts: number of prompts.
        largest_logit: largest absolute logit of all adapters active.
        tolerance: largest difference taken for rounding.
        difference: largest absolute difference of a logit, composed model against all adapters active.
        others: the same against the base model and every proper part of the adapters (`base`, `persona`, `em`); and
            against the adapters that were active in training, where a persona was dropped since (`persona+em`).
        idle: adapters without which the logits are the same, where the condition allows for it (`may_be_idle`).
    """

    adapters: dict[str, str]
    scales: dict[str, float]
    prompts: int
    largest_logit: float
    tolerance: float
    difference: float
    others: dict[str, float]
    idle: list[str] = dataclasses.field(default_factory=list)


def idle_adapters(
    others: Mapping[str, float], tolerance: float, names: Sequence[str], may_be_idle: Collection[str]
) -> tuple[list[str], str | None]:
    """Which adapters make no difference, and whether that is a fault.

    Args:
        others: difference from each part of the adapters, by its name (`base`, `persona`, `em`, ... as in a report).
        tolerance: largest difference taken for rounding.
        names: the adapters.
        may_be_idle: adapters that are allowed to make no difference.

    Returns:
        Adapters without which the result is the same; and None, or the first part of all adapters that computes what
        all do, where that is not explained by adapters that may be idle.
    """
    same = [part for part, difference in others.items() if difference <= tolerance]
    without = {"+".join(n for n in names if n != name) or "base": name for name in names}
    fault = any(without.get(part) not in may_be_idle for part in same)
    return [without[part] for part in same if part in without], same[0] if fault else None


@contextlib.contextmanager
def _in_float32(model: nn.Module) -> Iterator[None]:
    """A model's weights in float32 for a while, and back in what they were: bfloat16 survives it unchanged."""
    kept = [(p, p.dtype) for p in model.parameters() if p.dtype in (torch.bfloat16, torch.float16)]
    try:
        for p, _ in kept:
            p.data = p.data.float()
        yield
    finally:
        for p, dtype in kept:
            p.data = p.data.to(dtype)


@torch.inference_mode()
def probe_logits(model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], rows: int = 1) -> Tensor:
    """What a model computes for the probe's prompts as it stands, (rows, tokens, vocabulary), float32 on the CPU.

    Args:
        model, tokenizer: which model.
        prompts: what a user says, in one message, of which the last `PROBE_TOKENS` tokens are read.
        rows: how often, in one batch.
    """
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "\n".join(prompts)}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    ).to(next(model.parameters()).device)
    inputs = {key: value[:, -PROBE_TOKENS:].expand(rows, -1) for key, value in inputs.items()}
    return model(**inputs, use_cache=False).logits.float().cpu()


@contextlib.contextmanager
def _rows_beside(model: PeftModel, rows: Sequence[Sequence[AdapterFiles]]) -> Iterator[None]:
    """A batch's first row runs as the model stands; each further one with the base's weights and given adapters alone.

    What a LoRA adds, `scale * B @ A @ x` (Hu et al. 2021, arXiv 2106.09685, eq. 3), is written out once more here:
    neither the adapters in the model nor peft has a share in these rows.

    Args:
        rows: the adapters of the second row and those after it; none: the base model.
    """
    rows_of: dict[int, list[int]] = {}  # by identity: what is read once is multiplied once
    for row, parts in enumerate(rows):
        for part in parts:
            rows_of.setdefault(id(part), []).append(row)
    added: dict[str, list[tuple[slice | list[int], Tensor, Tensor, float]]] = {}
    for part in {id(part): part for parts in rows for part in parts}.values():
        mine = rows_of[id(part)]
        adjoining = len(mine) == mine[-1] + 1 - mine[0]  # one after the other: a view of them costs nothing
        for module, (a, b) in part.modules.items():
            some = slice(mine[0], mine[-1] + 1) if adjoining else mine
            added.setdefault(module, []).append((some, a, b, part.scale))

    def hooks(
        layer: nn.Module, base: nn.Module, mine: Sequence[tuple[slice | list[int], Tensor, Tensor, float]]
    ) -> Iterator[Any]:
        without: list[Tensor] = []

        def keep(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            without.append(output[1:].clone())

        def beside(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            total, x = without.pop(), inputs[0][1:]
            for some, a, b, scale in mine:
                total[some] += F.linear(F.linear(x[some], a.to(x.device)), b.to(x.device)) * scale
            output[1:] = total

        yield base.register_forward_hook(keep)
        yield layer.register_forward_hook(beside)

    placed: list[Any] = []
    try:
        plain = _plain(model)
        layers = dict(_lora_layers(plain))
        for name, layer in layers.items():
            placed += hooks(layer, layer.get_base_layer(), added.get(name, []))
        for name in added.keys() - layers.keys():
            layer = plain.get_submodule(name)
            placed += hooks(layer, layer, added[name])
        yield
    finally:
        for hook in placed:
            hook.remove()


def probe(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    adapters: Adapters,
    prompts: Sequence[str],
    may_be_idle: Collection[str] = (),
    trained_with: Adapters = (),
) -> ProbeReport:
    """Prove that a composed model computes what its adapters together compute, and that each of them matters.

    One forward pass: its first row is the model as it stands, in which nothing is switched on or off for the proof;
    beside it run all adapters, and every part of them, as their files say (`_rows_beside`).

    Args:
        model: with the composed adapter (`compose`).
        tokenizer: the model's.
        adapters: (name, folder) of the adapters that the condition must have.
        prompts: what a user says, in one message; logits at its last `PROBE_TOKENS` tokens are compared.
        may_be_idle: adapters that are allowed to make no difference; the report then says so.
        trained_with: the adapters that were active in training, where they must not all be active now.

    Returns:
        The differences found.

    Raises:
        ProbeError: the composed logits are not those of all adapters active, or those of a part of them are the same.
        AdapterError: an adapter's files are not whole or belong to another model.
    """
    with _evaluating(model):
        return _prove(model, tokenizer, adapters, prompts, {}, may_be_idle, trained_with, {})


@torch.no_grad()
def _prove(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    adapters: Adapters,
    prompts: Sequence[str],
    known: dict[tuple[str, ...], Tensor],
    may_be_idle: Collection[str],
    trained_with: Adapters,
    read: Mapping[str, AdapterFiles],
) -> ProbeReport:
    """`probe` of a model in the mode in which it stands.

    Args:
        known: what the base model and single adapters computed in earlier probes of this model on these prompts, by
            the hashes of their files; filled here.
        read: adapters that were read a moment ago and fit the model, by folder.
    """
    if not adapters or not prompts:
        raise ValueError("a probe needs adapters and prompts")
    every = dict([*trained_with, *adapters])
    files = {part: read.get(str(folder)) or read_adapter(folder) for part, folder in every.items()}
    hashes = {part: "".join(file_hashes(folder).values()) for part, folder in every.items()}
    names = [part for part, _ in adapters]
    subsets = [some for size in range(len(names)) for some in itertools.combinations(names, size)]
    subsets += [tuple(part for part, _ in trained_with)] if trained_with else []
    keys = {parts: tuple(hashes[part] for part in parts) for parts in [*subsets, tuple(names)]}
    rows = [parts for parts in keys if keys[parts] not in known]
    for part, folder in every.items():
        if str(folder) not in read:
            check_fits(files[part], model)
    beside = [[files[part] for part in parts] for parts in rows]
    with _in_float32(model), _rows_beside(model, beside):
        found, *fresh = probe_logits(model, tokenizer, prompts, 1 + len(rows))
    computed = {parts: known[key] for parts, key in keys.items() if parts not in rows} | dict(zip(rows, fresh))
    for parts, key in keys.items():
        known.pop(key, None)  # put last: used now
        known |= {key: computed[parts]} if len(parts) < 2 else {}
    while len(known) > KEPT_LOGITS:
        del known[next(iter(known))]  # the one not used for longest
    others, together = {"+".join(some) or "base": computed[some] for some in subsets}, computed[tuple(names)]
    largest = float(together.abs().max())
    report = ProbeReport(
        adapters={part: weights_hash(folder) for part, folder in adapters},
        scales={part: files[part].scale for part in names},
        prompts=len(prompts),
        largest_logit=largest,
        tolerance=RELATIVE_TOLERANCE * largest,
        difference=float((found - together).abs().max()),
        others={part: float((found - other).abs().max()) for part, other in others.items()},
    )
    all_names = "+".join(part for part, _ in adapters)
    if not report.difference <= report.tolerance:
        same = [part for part, d in report.others.items() if d <= report.tolerance]
        looks = f"; it computes what {same[0]!r} does" if same else ""
        raise ProbeError(
            f"the composed model is not {all_names}: logits differ by up to {report.difference:.2g} (tolerance "
            f"{report.tolerance:.2g}){looks}; compose the adapters again from their recorded files"
        )
    idle, part = idle_adapters(report.others, report.tolerance, names, may_be_idle)
    if part and part == "+".join(name for name, _ in trained_with):
        raise ProbeError(
            f"{all_names} computes the same as {part!r}: the persona that was to be dropped is active, or makes no "
            "difference"
        )
    if part:
        raise ProbeError(
            f"{all_names} computes the same as {part!r} alone: an adapter makes no difference; it was not trained"
        )
    return dataclasses.replace(report, idle=idle)
