"""The teacher of the full study: its address and thinking, checked before any job, paid once for all models; LIMA."""

import http.server
import shutil
import threading

import huggingface_hub
import pytest
import yaml
from cai_em.endpoint import client
from cai_em.study import depends, loading, materials
from cai_em.study.entries import GeneratorPreset
from cai_em.train import answers
from cai_em.workflow import check

from tests.judge_server import serve
from tests.test_params import change

OCT = loading.load("paper").generator
QUICK = client.Backoff(base_s=0.001, longest_s=0.01)


@pytest.fixture
def folder(root, tmp_path):
    """A copy of params/ whose demo asks the full study's teacher."""
    shutil.copytree(root / "params", tmp_path / "params")
    change(tmp_path / "params/profiles/demo.yaml", lambda d: d.update(generator="oct"))
    loading._registries.cache_clear()
    yield tmp_path / "params"
    loading._registries.cache_clear()


class _Says(http.server.BaseHTTPRequestHandler):
    """An endpoint that refuses every key but one, and sends another one away."""

    asked: list[tuple[str, str | None]]

    def do_GET(self):
        key = self.headers["Authorization"]
        self.asked.append((self.path, key))
        self.send_response({"Bearer right": 200, "Bearer elsewhere": 302}.get(key, 401))
        self.send_header("Location", f"http://localhost:{self.server.server_port}/stolen")
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def endpoint():
    handler = type("Says", (_Says,), {"asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1", handler.asked
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_address_comes_from_the_environment_and_is_asked_for_before_any_work(folder, monkeypatch, capsys):
    monkeypatch.delenv("TEACHER_BASE_URL", raising=False)
    monkeypatch.setenv("TEACHER_API_KEY", "right")
    study = loading.load("demo", folder)
    with pytest.raises(check.CheckError, match="set the environment variable TEACHER_BASE_URL"):
        check.check_study(study)
    assert check.check_study(study, dry_run=True)
    monkeypatch.setenv("TEACHER_BASE_URL", "https://user:word@h.example/v1")
    with pytest.raises(check.CheckError, match="credentials"):
        check.check_study(study)
    before = depends.settings(study, "01_personas", model="smollm2-135m", persona="poeticism")
    monkeypatch.setenv("TEACHER_BASE_URL", "https://h.example/v1")
    again = depends.settings(loading.load("demo", folder), "01_personas", model="smollm2-135m", persona="poeticism")
    assert again == before, "another address of the same teacher makes no persona stale"


def test_a_teacher_that_is_needed_must_answer_and_take_the_key(folder, endpoint, monkeypatch):
    url, asked = endpoint
    monkeypatch.setenv("CAI_EM_RESULTS", str(folder.parent / "results"))
    monkeypatch.setenv("TEACHER_BASE_URL", url)
    study = loading.load("demo", folder)
    for key in ("right", "elsewhere"):
        monkeypatch.setenv("TEACHER_API_KEY", key)
        check.teacher_answers(study)
    assert asked == [("/v1/models", "Bearer right"), ("/v1/models", "Bearer elsewhere")], "no redirect is followed"
    monkeypatch.setenv("TEACHER_API_KEY", "wrong-key-7d1e0b5c")
    with pytest.raises(
        check.CheckError, match=r"127\.0\.0\.1 refuses the key \(HTTP 401\): correct TEACHER_API_KEY"
    ) as e:
        check.teacher_answers(study)
    assert "7d1e0b5c" not in str(e.value)
    monkeypatch.setenv("TEACHER_BASE_URL", "http://127.0.0.1:9/v1")
    with pytest.raises(check.CheckError, match=r"nothing answers at 127\.0\.0\.1.*TEACHER_BASE_URL"):
        check.teacher_answers(study)
    for cell in study.persona_cells():
        manifest = study.persona_dir(*cell) / "manifest.json"
        manifest.parent.mkdir(parents=True)
        manifest.write_text("{}")
    check.teacher_answers(study)  # nobody asks it any more


def test_thinking_is_switched_off_has_room_and_does_not_lengthen_the_students_answers():
    assert OCT.extra_body == {"chat_template_kwargs": {"enable_thinking": False}}
    assert OCT.max_new_tokens >= 2 * OCT.max_tokens
    student = answers.LocalGenerator(lambda: None, "student", OCT)
    assert student.decoding.max_new_tokens == OCT.max_tokens == 1024


def generator(server, folder, **options):
    preset = GeneratorPreset(
        teacher="openai", model="teacher", base_url=server.url, api_key_env="TEACHER_API_KEY", **options
    )
    return answers.EndpointGenerator(preset, folder / "paid" / "poeticism.sqlite", QUICK)


def test_further_keys_go_with_every_request_and_are_part_of_what_is_kept(tmp_path):
    with serve() as server:
        one = generator(server, tmp_path, extra_body={"chat_template_kwargs": {"enable_thinking": False}})
        question = answers.TrainingPrompt((("user", "Hello?"),), 1)
        call = one._call(question)
        assert call.body["chat_template_kwargs"] == {"enable_thinking": False}
        assert next(iter(one.answer([question])))[1].text
        assert call.key != generator(server, tmp_path)._call(question).key


def test_two_models_at_once_pay_the_teacher_once(tmp_path):
    questions = [answers.TrainingPrompt((("system", "s"), ("user", f"q{i}?")), i) for i in range(8)]
    with serve(latency_s=0.05) as server:
        found = {}

        def model(name):
            found[name] = [a.text for _, a in generator(server, tmp_path, concurrency=2).answer(questions)]

        threads = [threading.Thread(target=model, args=(name,)) for name in ("qwen", "llama")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(server.taught.values()) == [1] * 8
    assert found["qwen"] == found["llama"]
    assert all(found["qwen"])


@pytest.fixture
def lima(folder, tmp_path, monkeypatch):
    """The public texts' study, and a LIMA of two conversations in the hub's cache."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    place = tmp_path / "hub" / "datasets--GAIR--lima" / "snapshots" / commit / "train.jsonl"
    place.parent.mkdir(parents=True)
    place.write_text('{"conversations": ["How? ", "So."]}\n{"conversations": ["Why?", "Because."], "source": "x"}\n')
    texts = yaml.safe_load((folder / "fetched.yaml").read_text())
    texts["extra_prompts"]["revision"] = commit
    (folder / "fetched.yaml").write_text(yaml.safe_dump(texts))
    change(folder / "profiles/demo.yaml", lambda d: d.update(data="fetched"))
    materials._fetched.cache_clear()
    return loading.load("demo", folder), place


def test_limas_first_turns_are_prompts_where_its_commit_is_pinned(lima):
    study, file = lima
    assert materials.extra_prompts(study) == (["How?", "Why?"], "2 first turns of GAIR/lima besides")
    file.write_text('{"conversations": []}\n')
    with pytest.raises(materials.MaterialError, match=r"train\.jsonl:1: expected .*conversations"):
        materials.extra_prompts(study)
    file.unlink()
    with pytest.raises(materials.MaterialError, match=r"cannot be had from GAIR/lima .*or leave .* empty"):
        materials.extra_prompts(study)


def test_without_a_pin_limas_turns_are_left_out_and_it_is_said():
    prompts, said = materials.extra_prompts(loading.load("paper"))
    assert prompts == []
    assert "GAIR/lima are left out: pin extra_prompts.revision" in said
    assert materials.extra_prompts(loading.load("demo"))[0] == []
