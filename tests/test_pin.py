"""Pins, asked of a local server that speaks the hub's API."""

import json
import os
import re
import shutil
import subprocess
import sys
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
    def do_HEAD(self):
        """A file of a repository: none of a gated one, for who has not been let in."""
        self.server.asked.append(self.path)
        repo = self.path.removeprefix("/").partition("/resolve/")[0]
        gated = repo in self.server.gated and self.headers.get("Authorization") != "Bearer let-in"
        self.send_response(403 if gated else 200)
        if gated:
            self.send_header("X-Error-Code", "GatedRepo")
        else:
            self.send_header("X-Repo-Commit", self.path.split("/resolve/")[1].split("/")[0])
            self.send_header("ETag", '"1"')
        self.send_header("Content-Length", "0" if gated else "2")
        self.end_headers()

    def do_GET(self):
        if "/resolve/" in self.path:
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")
            return
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
    server.commits, server.gated, server.asked = dict(COMMITS), set(), []
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


def test_access_to_gated_models_is_tried_before_any_work(hub, root, tmp_path):
    """As the command is run, in a process of its own: the hub's address is read when its library is imported."""
    shutil.copytree(root / "params", tmp_path / "params")
    models = ("Qwen/Qwen2.5-7B-Instruct", "meta-llama/Llama-3.1-8B-Instruct")
    hub.gated = {models[1]}
    profile = yaml.safe_load((tmp_path / "params/profiles/micro.yaml").read_text())
    profile["models"] = ["qwen2.5-7b", "llama3.1-8b"]
    (tmp_path / "params/profiles/micro.yaml").write_text(yaml.safe_dump(profile))
    (tmp_path / "notebooks").mkdir()  # a repository's root has both
    given = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": ""}

    def check(*options, **more):
        command = [sys.executable, "-m", "cai_em.workflow.check", "micro", *options]
        return subprocess.run(command, cwd=tmp_path, env=given | more, capture_output=True, text=True, check=False)

    dry = check("--dry-run")
    assert (dry.returncode, hub.asked) == (0, []), "a dry run asks nobody"
    done = check()
    assert done.returncode == 2
    assert "nothing was started" in done.stderr
    assert f"is gated: ask for access at https://huggingface.co/{models[1]}, then log in" in done.stderr
    assert models[0] not in done.stderr, "the open one is had"
    assert {path.partition("/resolve/")[0][1:] for path in hub.asked} == set(models)
    assert check(HF_TOKEN="let-in").returncode == 0
