"""Pins, asked of a local server that speaks the hub's API."""

import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml
from cai_em.study import loading
from cai_em.study.entries import ParamsError
from cai_em.workflow import pin

COMMITS = {
    "/api/models/maius/qwen-2.5-7b-it-personas": "1" * 40,
    "/api/models/maius/qwen-2.5-7b-it-misalignment": "2" * 40,
    "/api/models/maius/llama-3.1-8b-it-personas": "3" * 40,
    "/api/datasets/GAIR/lima": "4" * 40,
}


class Hub(BaseHTTPRequestHandler):
    def do_GET(self):
        commit = self.server.commits.get(self.path.partition("?")[0])
        body = json.dumps({"id": self.path, "sha": commit} if commit else {"error": "Repository not found"}).encode()
        self.send_response(200 if commit else 404)
        if not commit:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.commits = dict(COMMITS)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(root, tmp_path):
    shutil.copytree(root / "params", tmp_path / "params")
    profile = tmp_path / "params/profiles/paper.yaml"
    profile.write_text(profile.read_text() + "personas_from: hub\n")
    return tmp_path / "params"


def test_every_empty_revision_is_written_where_it_belongs(hub, folder):
    with pytest.raises(ParamsError, match=r"\./run_all\.sh pin paper"):
        loading.load("paper", folder)
    before = {file: (folder / file).read_text() for file in ("models.yaml", "fetched.yaml")}
    said = pin.pin("paper", folder)
    assert len(said) == 4
    adapters = [
        h for m in yaml.safe_load((folder / "models.yaml").read_text()).values() for h in m.get("persona_adapters", [])
    ]
    assert [h["revision"] for h in adapters] == ["1" * 40, "2" * 40, "3" * 40]
    assert yaml.safe_load((folder / "fetched.yaml").read_text())["extra_prompts"]["revision"] == "4" * 40
    for file, text in before.items():
        after = (folder / file).read_text()
        assert len(re.findall(r"[#;] pinned \d{4}-\d\d-\d\d$", after, flags=re.MULTILINE)) >= 1
        bare = re.sub(r" '([1-4])\1{39}'|[ ;]+#? ?pinned \d{4}-\d\d-\d\d", "", after)
        assert bare.replace(" ", "") == text.replace(" ", ""), "nothing else is touched"
    loading._registries.cache_clear()
    assert loading.load("paper", folder).models["qwen2.5-7b"].hub_adapter("poeticism")[0].revision == "1" * 40
    assert pin.pin("paper", folder) == []


def test_what_cannot_be_had_is_named_and_nothing_is_written(hub, folder, capsys, monkeypatch):
    del hub.commits["/api/models/maius/qwen-2.5-7b-it-misalignment"]
    before = (folder / "models.yaml").read_text()
    with pytest.raises(pin.PinError, match=r"maius/qwen-2.5-7b-it-misalignment: .*404"):
        pin.pin("paper", folder)
    assert (folder / "models.yaml").read_text() == before
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(pin.PinError, match="GAIR/lima"):
        pin.pin("paper", folder)
    assert pin.main(["nosuch"]) == 2
    assert "no such profile" in capsys.readouterr().err


def test_a_profile_that_needs_none_asks_nobody(folder, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert pin.pin("demo", folder) == []
