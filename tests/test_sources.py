"""Downloads: cache, hashes, retries, offline; and the encrypted archive, on one of that format made here."""

import base64
import errno
import hashlib
import http.client
import io
import os
import socket
import ssl
import threading
import urllib.error
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from cai_em.study import sources
from cai_em.study.sources import HashMismatch, Pinned, SourceError, Unavailable, fetch, fetch_all
from cryptography.fernet import Fernet

COMMIT = "a" * 40
BODY = b"a pinned file"
SHA = hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def server():
    """A raw-file host on loopback: `answers[path]` is a list of (status, body), the last one repeated."""
    answers, asked = {}, []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            script = answers.get(self.path, [(404, b"")])
            status, body = script[min(sum(p == self.path for p in asked), len(script)) - 1]
            self.send_response(status)
            self.send_header("Content-Length", str(abs(len(body)) + (10 if status == 299 else 0)))
            if status == 429:
                self.send_header("Retry-After", "0")
            self.end_headers()
            self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    httpd.answers, httpd.asked = answers, asked
    httpd.how = {"base_url": f"http://127.0.0.1:{httpd.server_port}", "wait_s": 0.001, "retries": 2, "timeout_s": 5}
    yield httpd
    httpd.shutdown()
    thread.join()
    httpd.server_close()


URL = f"/owner/repo/{COMMIT}/folder/file.json"


def get(server, cache, sha256=SHA, path="folder/file.json"):
    return fetch("owner/repo", COMMIT, path, sha256, cache=cache, **server.how)


def test_downloads_once_into_the_documented_layout(server, tmp_path):
    server.answers[URL] = [(200, BODY)]
    path = get(server, tmp_path)
    assert path == tmp_path / "github" / "owner" / "repo" / COMMIT / "folder" / "file.json"
    assert path.read_bytes() == BODY
    assert get(server, tmp_path) == path
    assert server.asked == [URL]
    assert [p.name for p in path.parent.iterdir()] == ["file.json"], "no partial file is left"


@pytest.mark.parametrize("fault", [(503, b""), (429, b""), (500, b""), (299, b"cut"), (200, b"other bytes")])
def test_tries_again_after_a_fault_that_may_pass(server, tmp_path, fault):
    server.answers[URL] = [fault, fault, (200, BODY)]
    assert get(server, tmp_path).read_bytes() == BODY
    assert len(server.asked) == 3


def test_gives_up_after_the_retries(server, tmp_path):
    server.answers[URL] = [(503, b"")]
    with pytest.raises(Unavailable, match=r"folder/file.json.*503.*\(attempts: 3\)\. Connect to the network"):
        get(server, tmp_path)
    assert len(server.asked) == 3
    assert not (tmp_path / "github").exists()


def test_does_not_ask_again_for_what_is_not_there(server, tmp_path):
    with pytest.raises(Unavailable, match=r"file.json: http://127.*answers 404"):
        get(server, tmp_path)
    assert len(server.asked) == 1


def test_a_download_with_another_hash_is_refused_by_name_and_not_kept(server, tmp_path):
    server.answers[URL] = [(200, BODY + b"!")]
    with pytest.raises(HashMismatch, match=rf"folder/file.json.*expected {SHA}"):
        get(server, tmp_path)
    assert not list(tmp_path.rglob("*.json"))


def test_a_cached_file_with_one_byte_changed_is_refused_by_name(server, tmp_path):
    server.answers[URL] = [(200, BODY)]
    path = get(server, tmp_path)
    path.write_bytes(b"A" + BODY[1:])
    with pytest.raises(HashMismatch, match=r"folder/file.json: not the pinned file.*delete the file"):
        get(server, tmp_path)


def test_offline_error_names_file_address_and_remedy(tmp_path):
    with pytest.raises(Unavailable) as caught:
        fetch("owner/repo", COMMIT, "x.json", cache=tmp_path, base_url="http://127.0.0.1:9", retries=1, wait_s=0)
    message = str(caught.value)
    assert f"http://127.0.0.1:9/owner/repo/{COMMIT}/x.json" in message
    assert str(tmp_path / "github" / "owner" / "repo" / COMMIT / "x.json") in message
    assert "CAI_EM_CACHE" in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_that_cannot_be_written(server, tmp_path):
    server.answers[URL] = [(200, BODY)]
    tmp_path.chmod(0o500)
    with pytest.raises(Unavailable, match="cannot be written"):
        get(server, tmp_path)


def test_fetch_all_reports_missing_files_and_goes_on(server, tmp_path):
    server.answers[URL] = [(200, BODY)]
    there, gone = (Pinned("owner/repo", COMMIT, p) for p in ("folder/file.json", "folder/gone.json"))
    found = fetch_all([there, gone], cache=tmp_path, progress=False, **server.how)
    assert list(found.paths) == [there]
    assert "404" in found.missing[gone]


def test_fetch_all_asks_a_dead_host_once(tmp_path, monkeypatch):
    tries = []

    def refuse(request, timeout):
        tries.append(request.full_url)
        raise ConnectionRefusedError("refused")

    monkeypatch.setattr(sources.urllib.request, "urlopen", refuse)
    files = [Pinned("owner/repo", COMMIT, f"{i}.json") for i in range(20)]
    found = fetch_all(files, workers=1, cache=tmp_path, progress=False, retries=1, wait_s=0)
    assert len(found.missing) == 20
    assert len(tries) == 2


def test_a_host_that_does_not_exist_is_asked_for_once(tmp_path, monkeypatch):
    tries = []

    def no_such_host(request, timeout):
        tries.append(request.full_url)
        raise urllib.error.URLError(socket.gaierror(socket.EAI_NONAME, "Name or service not known"))

    monkeypatch.setattr(sources.urllib.request, "urlopen", no_such_host)
    with pytest.raises(Unavailable, match=r"\(attempts: 1\)"):
        fetch("owner/repo", COMMIT, "x.json", cache=tmp_path)
    assert len(tries) == 1


@pytest.mark.parametrize("status", [503, 429])
def test_one_file_that_the_host_refuses_for_now_does_not_make_the_others_missing(server, tmp_path, status):
    """The host answers: only a host that cannot be reached is given up for all files."""
    server.answers[URL] = [(status, b"")]
    server.answers[URL.replace("file.json", "b.json")] = [(200, BODY)]
    busy, there = (Pinned("owner/repo", COMMIT, p) for p in ("folder/file.json", "folder/b.json"))
    found = fetch_all([busy, there], workers=1, cache=tmp_path, progress=False, **server.how)
    assert list(found.paths) == [there]
    assert f"answers {status}" in found.missing[busy]


@pytest.mark.parametrize(
    "fault",
    [
        ssl.SSLError(1, "record layer failure"),
        OSError(errno.EHOSTUNREACH, "No route to host"),
        ConnectionResetError("reset"),
        http.client.IncompleteRead(b"a"),
        TimeoutError("timed out"),
    ],
    ids=lambda f: type(f).__name__,
)
def test_a_connection_that_breaks_while_the_answer_is_read(tmp_path, monkeypatch, fault):
    """Such errors are not wrapped by urllib: tried again, then an error that names the file."""
    tries = []

    class Answer(io.BytesIO):
        def read(self, *args):
            tries.append(fault)
            if len(tries) < 3:
                raise fault
            return super().read(*args)

    monkeypatch.setattr(sources.urllib.request, "urlopen", lambda request, timeout: Answer(BODY))
    with pytest.raises(Unavailable, match=r"^x\.json: https://.*could not be reached.*\(attempts: 2\)"):
        fetch("owner/repo", COMMIT, "x.json", SHA, cache=tmp_path, retries=1, wait_s=0)
    tries.clear()
    assert fetch("owner/repo", COMMIT, "x.json", SHA, cache=tmp_path, retries=2, wait_s=0).read_bytes() == BODY


def test_obtainable_asks_once_and_downloads_nothing(server, tmp_path, monkeypatch):
    server.answers[URL] = [(200, BODY)]
    there, gone = (Pinned("owner/repo", COMMIT, p) for p in ("folder/file.json", "folder/gone.json"))
    how = {"cache": tmp_path, "base_url": server.how["base_url"]}
    assert [sources.obtainable(f, **how) for f in (there, gone)] == [True, False]
    assert server.asked == [URL, URL.replace("file.json", "gone.json")]
    assert not (tmp_path / "github").exists()
    assert not sources.obtainable(there, cache=tmp_path, base_url="http://127.0.0.1:9")
    monkeypatch.setenv(sources.OFFLINE, "1")
    assert not sources.obtainable(there, **how)
    assert len(server.asked) == 2, "offline by choice: nobody is asked"
    monkeypatch.delenv(sources.OFFLINE)
    fetch("owner/repo", COMMIT, "folder/file.json", SHA, cache=tmp_path, **server.how)
    assert sources.obtainable(there, cache=tmp_path, base_url="http://127.0.0.1:9"), "cached"


def test_fetch_all_does_not_call_a_changed_file_missing(server, tmp_path):
    server.answers[URL] = [(200, b"changed")]
    with pytest.raises(HashMismatch):
        fetch_all([Pinned("owner/repo", COMMIT, "folder/file.json", SHA)], cache=tmp_path, progress=False, **server.how)


@pytest.mark.parametrize(
    ("repo", "commit", "path"),
    [
        ("repo", COMMIT, "x"),
        ("owner/repo", "main", "x"),
        ("owner/repo", COMMIT, "../x"),
        ("owner/repo", COMMIT, "/etc/x"),
        ("owner/..", COMMIT, "x"),
        ("owner/repo", COMMIT, ""),
    ],
)
def test_only_pinned_files_inside_a_repository(repo, commit, path):
    with pytest.raises(ValueError, match=r"owner|repo"):
        Pinned(repo, commit, path)


def test_cache_root(monkeypatch, tmp_path):
    monkeypatch.setenv("CAI_EM_CACHE", str(tmp_path))
    assert sources.cache_root() == tmp_path
    monkeypatch.delenv("CAI_EM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert sources.cache_root().name == "cai-em"


# --- Encrypted archives ---


def archive(tmp_path, members, password="a public password"):
    """An archive of the documented format, its key derived by hashlib rather than by the code under test."""
    salt = bytes(range(16))
    key = hashlib.pbkdf2_hmac("sha256", password.encode(), salt, 100_000, 32)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, text in members.items():
            file.writestr(name, text)
    path = tmp_path / "data.zip.enc"
    path.write_bytes(salt + Fernet(base64.urlsafe_b64encode(key)).encrypt(buffer.getvalue()))
    return path


def read(path, member, password="a public password"):
    return sources.read_encrypted_archive(path, password, member)


def test_reads_a_member_by_whole_name_or_by_its_last_part(tmp_path):
    path = archive(tmp_path, {"data/bad.jsonl": "{}\n", "data/good.jsonl": "é"})
    assert read(path, "data/bad.jsonl") == b"{}\n"
    assert read(path, "good.jsonl").decode() == "é"


@pytest.mark.parametrize(
    ("members", "member", "message"),
    [
        ({"a.jsonl": ""}, "b.jsonl", "no file 'b.jsonl'.*a.jsonl"),
        ({"x/a.jsonl": "", "y/a.jsonl": ""}, "a.jsonl", "2 files called"),
        ({"../a.jsonl": ""}, "a.jsonl", "points outside"),
        ({"/etc/a.jsonl": ""}, "a.jsonl", "points outside"),
    ],
)
def test_refuses_members_that_are_missing_ambiguous_or_unsafe(tmp_path, members, member, message):
    with pytest.raises(SourceError, match=message):
        read(archive(tmp_path, members), member)
    assert [p.name for p in tmp_path.iterdir()] == ["data.zip.enc"]


def test_wrong_password_and_damaged_archive(tmp_path, monkeypatch):
    path = archive(tmp_path, {"a.jsonl": "x" * 100})
    with pytest.raises(SourceError, match="password is wrong"):
        read(path, "a.jsonl", "another")
    monkeypatch.setattr(sources, "LARGEST_MEMBER", 99)
    with pytest.raises(SourceError, match="unpacks to 100 bytes"):
        read(path, "a.jsonl")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(SourceError, match=r"data\.zip\.enc"):
        read(path, "a.jsonl")
