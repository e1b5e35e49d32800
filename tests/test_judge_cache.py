"""The judge cache: addresses, first answer wins, several processes, sums, damage."""

import json
import sqlite3
import subprocess
import sys
from dataclasses import asdict

import pytest
from cai_em.endpoint import cache as endpoint_cache
from cai_em.endpoint.cache import Answer, CacheError, JudgeCache, JudgeError, call_key

BODY = {"model": "m", "messages": [{"role": "user", "content": "q"}], "temperature": 0.0, "max_tokens": 8}


def test_everything_that_decides_the_answer_is_in_the_key():
    variants = [
        (BODY, "v1", 0),
        (BODY | {"model": "n"}, "v1", 0),
        (BODY | {"temperature": 1.0}, "v1", 0),
        (BODY | {"max_tokens": 9}, "v1", 0),
        (BODY | {"logprobs": True}, "v1", 0),
        (BODY | {"messages": [{"role": "user", "content": "q "}]}, "v1", 0),
        (BODY, "v2", 0),
        (BODY, "v1", 1),
    ]
    assert len({call_key(*variant) for variant in variants}) == len(variants)
    assert call_key(dict(reversed(BODY.items())), "v1") == call_key(BODY, "v1")


def test_an_answer_comes_back_whole(tmp_path):
    answer = Answer("85\x00 \u202e🙂", "stop", "m-1", ("85", "."), (("85", -0.1), ("x", -9999.0)), 10, 2)
    with JudgeCache(tmp_path / "c.sqlite") as cache:
        cache.put("k", "m", answer, (10, 2, 0.5))
    with JudgeCache(tmp_path / "c.sqlite") as cache:
        assert cache.get(["k", "other"]) == {"k": answer}
        assert asdict(cache.spent("m")) == {"calls": 1, "prompt_tokens": 10, "completion_tokens": 2, "usd": 0.5}
        assert cache.spent("n").calls == 0


def test_the_first_answer_stays_and_both_are_paid(tmp_path):
    with JudgeCache(tmp_path / "c.sqlite") as one, JudgeCache(tmp_path / "c.sqlite") as two:
        assert one.put("k", "m", Answer("1"), (1, 1, 0.5)).text == "1"
        assert two.put("k", "m", Answer("2"), (1, 1, 0.5)).text == "1"
        assert one.spent("m").usd == 1.0
        assert len(one) == 1


def test_more_keys_than_one_query_takes(tmp_path):
    with JudgeCache(tmp_path / "c.sqlite") as cache:
        for i in range(1200):
            cache.put(str(i), "m", Answer(str(i)), (0, 0, 0.0))
        assert len(cache.get(map(str, range(2000)))) == 1200


WRITER = """
import sys
from cai_em.endpoint.cache import JudgeCache
from cai_em.judge.prompts import Answer
with JudgeCache(sys.argv[1]) as cache:
    for i in range(150):
        cache.put(f"{i % 100}", "m", Answer(sys.argv[2]), (1, 1, 0.25))
"""


def test_several_processes_write_at_once(tmp_path):
    path = tmp_path / "new" / "c.sqlite"
    workers = [subprocess.Popen([sys.executable, "-c", WRITER, path, str(n)]) for n in range(4)]
    assert [w.wait(60) for w in workers] == [0] * 4
    with JudgeCache(path) as cache:
        assert len(cache) == 100
        assert cache.spent("m").calls == 600
        assert cache.spent("m").usd == 150.0


def test_a_file_that_is_no_cache_is_named(tmp_path):
    (tmp_path / "c.sqlite").write_text("this is not a database, " * 100)
    with pytest.raises(CacheError, match=r"c\.sqlite"):
        JudgeCache(tmp_path / "c.sqlite")


def damage(path):
    raw = bytearray(path.read_bytes())
    for place in range(5 * 4096, len(raw), 4096):
        raw[place : place + 200] = b"\xff" * 200
    path.write_bytes(raw)


def test_a_damaged_file_is_named_with_the_remedy(tmp_path):
    path = tmp_path / "c.sqlite"
    with JudgeCache(path) as cache:
        for i in range(300):
            cache.put(f"{i:064d}", "m", Answer("x" * 2000), (1, 1, 0.1))
    damage(path)
    with JudgeCache(path) as cache, pytest.raises(JudgeError, match=r"c\.sqlite.*damaged.*\.recover.*move it away"):
        cache.get([f"{i:064d}" for i in range(300)])
    assert issubclass(CacheError, JudgeError)


def test_a_row_that_is_no_answer_is_damage_too(tmp_path):
    with JudgeCache(tmp_path / "c.sqlite") as cache:
        cache.put("k", "m", Answer("1"), (1, 1, 0.1))
        cache._db.execute("UPDATE calls SET answer = '{'")
        with pytest.raises(CacheError, match="damaged"):
            cache.get(["k"])


def test_a_file_of_the_first_format_is_brought_up_to_date(tmp_path):
    """Its answers are found under the same keys, its open batches too."""
    path = tmp_path / "c.sqlite"
    with JudgeCache(path) as cache:
        cache.put(call_key(BODY, "v1"), "m", Answer("1"), (1, 1, 0.5))
        cache.open_batch("tag", "m", "host", ["a", "b"], 2.0)
    with sqlite3.connect(path) as db:
        db.execute("ALTER TABLE batches DROP COLUMN usd")
        db.execute("PRAGMA user_version = 1")
    db.close()
    with JudgeCache(path) as cache:
        assert cache.get([call_key(BODY, "v1")]).keys() == {call_key(BODY, "v1")}
        assert [batch.calls for batch in cache.open_batches("m", "host")] == [2]
        assert cache.charged("m") == 0.5
        cache.open_batch("new", "m", "host", ["c"], 0.25)
        assert cache.charged("m") == 0.75


def test_keys_are_those_of_the_first_format():
    """What was paid for must be found by every later version: the address of a call never changes."""
    assert call_key(BODY, "v1") == "0edd01b83655ec8058b77198f51da8a72991d7009e6074f324e0f129635507cb"


def test_a_cache_of_another_format_is_refused(tmp_path):
    with sqlite3.connect(tmp_path / "c.sqlite") as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(CacheError, match="format 99"):
        JudgeCache(tmp_path / "c.sqlite")


def test_a_full_disk_is_explained_and_loses_nothing(tmp_path):
    with JudgeCache(tmp_path / "c.sqlite") as cache:
        cache.put("a", "m", Answer("1"), (1, 1, 0.1))
        pages = cache._db.execute("PRAGMA page_count").fetchone()[0]
        cache._db.execute(f"PRAGMA max_page_count = {pages}")  # sqlite's own way of saying: the disk is full
        with pytest.raises(CacheError, match="full"):
            cache.put("b", "m", Answer("x" * 100_000), (1, 1, 0.1))
        assert cache.spent("m").calls == 1
    with JudgeCache(tmp_path / "c.sqlite") as cache:
        assert cache.get(["a", "b"]).keys() == {"a"}


def test_nothing_but_answers_and_counts_is_kept(tmp_path):
    with JudgeCache(tmp_path / "c.sqlite") as cache:
        cache.put("k", "m", Answer("85"), (1, 1, 0.1), endpoint="127.0.0.1:1")
        row = cache._db.execute("SELECT * FROM calls").fetchone()
    assert row[:2] == ("k", "m")
    assert json.loads(row[2])["text"] == "85"


MOUNTS = """/dev/sda1 / ext4 rw 0 0
server:/home /home nfs4 rw 0 0
/dev/sdb1 /home/me/scratch xfs rw 0 0
mds@o2ib:/work /my\\040work lustre rw 0 0
"""


def test_a_network_file_system_is_known_by_its_mount(tmp_path):
    mounts = tmp_path / "mounts"
    mounts.write_text(MOUNTS)
    found = {
        p: endpoint_cache.on_network(p, mounts) for p in ("/a/c", "/home/me/c", "/home/me/scratch/c", "/my work/c")
    }
    assert found == {"/a/c": False, "/home/me/c": True, "/home/me/scratch/c": False, "/my work/c": True}
    assert not endpoint_cache.on_network("/a", tmp_path / "nowhere")


@pytest.mark.parametrize(("network", "journal"), [(True, "delete"), (False, "wal")])
def test_the_journal_is_one_that_the_file_system_can_carry(tmp_path, monkeypatch, network, journal):
    monkeypatch.setattr(endpoint_cache, "on_network", lambda path: network)
    with JudgeCache(tmp_path / "c.sqlite") as one, JudgeCache(tmp_path / "c.sqlite") as two:
        one.put("k", "m", Answer("90"), (1, 1, 0.5))
        assert two.get(["k"])["k"].text == "90"
        assert one._db.execute("PRAGMA journal_mode").fetchone()[0] == journal
