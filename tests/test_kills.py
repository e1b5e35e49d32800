"""Killed runs, killed writers, full disks, planted keys: the short form; `-m slow` for twenty kills of the grid.

The long form and the document are `python -m tests.reliability`; what is asserted here is what it measures.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pandas as pd
import psutil
import pytest
import yaml
from cai_em.analysis import classifiers
from cai_em.judge import judging
from cai_em.judge import prompts as judge_prompts
from cai_em.records import tables
from cai_em.study import loading
from threadpoolctl import threadpool_limits

from tests import killing
from tests import reliability as harness

# --- Writers ---


@pytest.mark.parametrize("what", ["adapter window", "table half", "cache open"])
def test_a_writer_killed_at_its_worst_instant_leaves_nothing_or_a_whole_thing(tmp_path, what):
    """The window of an adapter's rename, half of a table, an open transaction; then the writer runs again."""
    (row,) = harness.killed_writers(tmp_path, [what]).to_dict("records")
    assert row.pop("killed when") == killing.AIMED[what]
    assert set(row.values()) <= set(harness.WHOLE)
    if what != "adapter window":  # files are replaced in one step, the old one stands till then
        assert row["another there before"] != "nothing"


def test_a_full_disk_is_said_and_harms_nothing():
    said = harness.full_disk_writers()
    if said == harness.NOT_TESTED:
        pytest.skip(said)
    assert "each goes on" in said


# --- What the harness itself must be able to see ---


def test_the_search_finds_a_key_however_it_is_written(tmp_path):
    """Each spelling, in each kind of file that a run leaves: the scan that finds 0 hits must find these."""
    import base64
    import sqlite3

    key = harness.KEY
    results = tmp_path / "results"
    results.mkdir()
    (results / "a.log").write_text(f"x{key}y")
    (results / "b.ipynb").write_text(base64.b64encode(f"ab{key}cd".encode()).decode())
    (results / "c.json").write_text(key.encode().hex())
    pd.DataFrame({"response": ["x" * 99, key]}).to_parquet(results / "d.parquet", compression="zstd")
    with sqlite3.connect(results / "judge_cache.sqlite") as db:
        db.execute("CREATE TABLE calls (answer TEXT)")
        db.execute("INSERT INTO calls VALUES (?)", ("z" * 9000 + key,))
    db.close()
    (results / "clean.csv").write_text("nothing here")
    kinds, hits = harness.scan(tmp_path)
    assert [hit.removeprefix("results/") for hit in hits] == [
        "a.log",
        "b.ipynb",
        "c.json",
        "d.parquet",
        "judge_cache.sqlite",
    ]
    assert sum(kinds.values()) == 6


@pytest.mark.parametrize("where", ["plain", ".cache/hidden"])
def test_torn_files_are_seen(tmp_path, where):
    """Below hidden folders too: only names inside the copy say that a file is a part of one."""
    place = tmp_path / where
    folder = place / "results" / "kills"
    folder.mkdir(parents=True)
    table = pd.DataFrame({"a": range(1000)})
    table.to_parquet(folder / "whole.parquet")
    content = (folder / "whole.parquet").read_bytes()
    (folder / "half.parquet").write_bytes(content[: len(content) // 2])
    (folder / "half.json").write_text('{"a": ')
    (folder / "half.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    (folder / "nb.running.ipynb").write_text("{")  # says by its name that it is not finished
    (folder / ".half.json.part7").write_text("{")
    (folder / "manifest.json").write_text('{"outputs": {"results/kills/whole.parquet": "0"}}')
    assert [line.split(":")[0].split("/")[-1] for line in killing.torn(place)] == [
        "half.json", "half.parquet", "half.safetensors", "manifest.json",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "line",
    ["import pickle", "from torch import load", "torch.load(x)", "f(trust_remote_code=True)", "f(trust_remote_code=x)",
     "f(x, weights_only=False)", "np.load(x, allow_pickle=True)", "host = '0.0.0.0'", "eval(x)", "yaml.load(x)"],
)  # fmt: skip
def test_unsafe_code_is_seen(line):
    assert harness.unsafe_code([("x.py", line)])


def test_unsafe_files_are_seen(tmp_path):
    import pickle

    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "training_args.bin").write_bytes(b"")
    (folder / "innocent.json").write_bytes(pickle.dumps({"a": 1}))
    (folder / "plain.json").write_text("{}")
    assert harness.unsafe_files(tmp_path) == ["results/innocent.json", "results/training_args.bin"]


# --- Our own code and settings ---


def test_no_pickle_no_remote_code_no_open_server():
    code = harness.own_code()
    assert len(code) > 40
    assert harness.unsafe_code(code) == []


def test_numbers_of_threads_do_not_decide_between_near_ties():
    """Found by the harness: with two threads for linear algebra, equal texts tied otherwise than with one."""
    rng = np.random.default_rng(0)
    words = np.array(["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l"])
    rows = [
        ("m", persona, dataset, 0, question, i, " ".join(w * 2 for w in rng.choice(words, 3)))
        for persona in ("baseline", "p", "r")
        for dataset in ("none", "d", "e")
        for question in ("q0", "q1")
        for i in range(40)
    ]
    columns = ["model", "persona", "dataset", "seed", "question_id", "sample", "response"]
    table, found = pd.DataFrame(rows, columns=columns), []
    for threads in (1, 2):
        with threadpool_limits(threads):
            found.append(classifiers.classify(table, permutations=40, min_responses=4))
    pd.testing.assert_frame_equal(*found, check_exact=True)


# --- What the harness makes of what it measures ---


def good() -> dict:
    """Measurements as they must be, of six kills."""
    kinds = ["calls", "adapter placed", "calls", "cache open", "starting", "working"]
    found = {"received": 9, "kept": 8, "on_their_way": 1}
    each = [killing.Kill(kind, True, ["04_judge"], 0, **found) for kind in kinds]
    kills = killing.Kills(each, calls=[40], sent_again=6, verify=["11 manifests, 80 files: all match"])
    run = {"artefacts": {"a": "1"}, "order": ["1", "2"], "calls": 40, "asked_twice": 0, "seconds": 1.0}
    counts = {"calls": 60, "PARSE": 0, "API": 0, "without flag or score": 0, "retries": 1, "cause": ""}
    kinds = [*harness.TRANSIENT, *harness.CONTENT]
    faults = pd.DataFrame([{"fault": kind, "injected": 30, **counts, "scored": 60} for kind in kinds])
    endless = pd.DataFrame([{"fault": kind, "calls hit": 10, "injected": 70, **counts, "scored": 50} for kind in kinds])
    endless["API"] = endless["fault"].isin(harness.TRANSIENT) * 10
    endless["PARSE"] = 10 - endless["API"]
    endless["cause"] = "a cause"
    attempts = [
        {"room": "40 kB", "exit code": 1, "answers kept": 9, "torn files": 0, "error": "No space left"},
        {"room": "enough", "exit code": 0, "answers kept": 40, "torn files": 0, "error": ""},
    ]
    obeyed = [{"a judge that obeys": "x", "100 with it": 0}, {"a judge that obeys": "y", "100 with it": 9}]
    stops = {"cause": "401", "calls": 1, "answered": 0, "said": "cannot be used", "key told": False}
    whole = {"nothing there before": "nothing", "another there before": "the one of before, whole"}
    return {
        "asked": {"kills": 6, "seed": 0, "commit": "abc"},
        "about": {"date": "2026-01-01", "commit": "abc", "machine": "a machine", "minutes": 1.0},
        "kills": kills,
        "two workers": run | {"second_run": [75, "another run is active"]},
        "one worker": run | {"order": ["2", "1"], "second_run": None},
        "workers differ": [],
        "refused key": {
            "exit codes": {"judge": 1, "teacher": 2},
            "calls_answered": 0,
            "failed": ["04_judge/x.failed.ipynb", "01_personas/y.failed.ipynb"],
            "silent": [],
            "before any job": "HTTP 401",
        },
        "disk": {"attempts": attempts, "sent_again": 3, "rows": 20, "scored": 20},
        "disk writers": "each says so",
        "writers": pd.DataFrame([{"killed when": "half", **whole}]),
        "faults": faults,
        "endless faults": endless,
        "stops": pd.DataFrame([stops]),
        "injections": pd.DataFrame(obeyed),
        "bad input": pd.DataFrame([{"kind": "x", "inputs": 60, "refused as they should be": 60, "not tried": 0}]),
        "errors given": pd.DataFrame([{"input": "x", "error": "mine.yaml:7: sedes"}]),
        "scanned": (Counter({"logs": 3}), []),
        "unsafe files": [],
        "unsafe code": [],
        "modules": 40,
    }  # fmt: skip


def test_all_well_is_said_only_when_it_is():
    found = good()
    assert harness.wrong(found) == {}
    text = harness.document(found)
    assert "**All is as it must be.**" in text
    assert "commit abc" in text
    found["kills"].verify = ["results/kills/a does not match"]
    assert "**NOT AS IT MUST BE: " in harness.document(found)


def _in(table: str, column: str, row: int, value: object):
    return lambda found: found[table].__setitem__(
        column, [value if i == row else v for i, v in enumerate(found[table][column])]
    )


def _at(key: str, **values: object):
    return lambda found: found[key].update(values)


def _kills(**values: object):
    return lambda found: vars(found["kills"]).update(values)


@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        (_kills(verify=["all match", "x does not match"]), "verify"),
        (_kills(verify=[]), "verify"),
        (lambda f: f["kills"].kills.pop(), "kills too few"),
        (lambda f: vars(f["kills"].kills[2]).update(on_their_way=9), "calls on their way"),
        (lambda f: [vars(k).update(received=40) for k in f["kills"].kills], "amid calls too few"),
        (lambda f: [vars(k).update(received=0) for k in f["kills"].kills], "amid calls too few"),
        (lambda f: [vars(k).update(on_their_way=0) for k in f["kills"].kills], "amid calls too few"),
        (_kills(calls=[0]), "no call was made"),
        (_kills(repeated=1), "asked again"),
        (_kills(lost=1), "lost"),
        (_kills(unexplained=1), "not on their way"),
        (_kills(torn=["a"]), "torn"),
        (_kills(different=["a"]), "different"),
        (_kills(listening=["1.2.3.4"]), "listening"),
        (_at("two workers", second_run=[0, "done"]), "second run"),
        (_at("two workers", asked_twice=1), "asked twice"),
        (_at("one worker", asked_twice=1), "asked twice"),
        (_at("one worker", order=["1", "2"]), "one order"),
        (lambda f: f.update({"workers differ": ["a"]}), "workers"),
        (_at("refused key", **{"exit codes": {"judge": 0}}), "ended well"),
        (_at("refused key", **{"before any job": ""}), "cause"),
        (_at("refused key", failed=["04_judge/x.failed.ipynb"]), "did not fail"),
        (_at("refused key", calls_answered=1), "answered"),
        (_at("refused key", silent=["a"]), "cause"),
        (lambda f: f.update({"disk writers": harness.NOT_TESTED}), "full disk"),
        (lambda f: f.update(disk={"attempts": [], "not tested": harness.NOT_TESTED}), "full disk"),
        (lambda f: f["disk"]["attempts"][0].update({"exit code": 0}), "full disk"),
        (lambda f: f["disk"]["attempts"][0].update({"error": "KeyError"}), "full disk"),
        (lambda f: f["disk"]["attempts"][0].update({"answers kept": 0}), "full disk"),
        (lambda f: f["disk"]["attempts"][1].update({"torn files": 1}), "full disk"),
        (_at("disk", scored=19), "full disk"),
        (_at("disk", sent_again=5), "full disk"),
        (_in("writers", "another there before", 0, "a folder with []"), "writers"),
        (_in("faults", "injected", 0, 0), "not injected"),
        (_in("endless faults", "injected", 0, 0), "not injected"),
        (_in("faults", "without flag or score", 0, 1), "without score or flag"),
        (_in("endless faults", "scored", 0, 60), "that were scored"),
        (_in("endless faults", "API", 0, 9), "API flag"),
        (_in("endless faults", "cause", 0, ""), "cause"),
        (_in("stops", "said", 0, "nothing"), "did not stop"),
        (_in("stops", "key told", 0, True), "key told"),
        (_in("injections", "100 with it", 0, 1), "fence"),
        (_in("bad input", "inputs", 0, 49), "too few"),
        (_in("bad input", "inputs", 0, 61), "not refused"),
        (_in("bad input", "not tried", 0, 1), "not tried"),
        (lambda f: f.update(scanned=(Counter({"logs": 1}), ["a.log"])), "keys found"),
        (lambda f: f.update(scanned=(Counter(), [])), "no file searched"),
        (lambda f: f.update({"unsafe files": ["a.pkl"]}), "unsafe"),
        (lambda f: f.update({"unsafe code": ["x.py:1: eval"]}), "unsafe"),
    ],
)  # fmt: skip
def test_whatever_is_wrong_is_named(spoil, name):
    found = good()
    spoil(found)
    faulty = harness.wrong(found)
    assert any(name in key for key in faulty), faulty


def test_kept_measurements_come_back_as_they_were(tmp_path):
    found = good()
    for name in ("kills", "faults", "two workers", "disk"):
        value, _ = harness._kept(tmp_path / name, lambda n=name: found[n])
        again, _ = harness._kept(tmp_path / name, lambda: pytest.fail("measured again"))
        for back in (value, again):
            same = back.equals(found[name]) if isinstance(back, pd.DataFrame) else back == found[name]
            assert same, name


def test_skipped_and_absent_tests_of_bad_input_do_not_count_as_refused(tmp_path):
    suite = '<testsuites><testsuite tests="5" failures="1" errors="0" skipped="2">{}</testsuite></testsuites>'
    (tmp_path / "r.xml").write_text(suite.format("<system-out>40 damaged inputs refused</system-out>"))
    # one passed plainly (by hypothesis: it stands for its 40 inputs), one failed, two were skipped, one passed
    assert harness.tested(tmp_path / "r.xml") == {"inputs": 44, "refused as they should be": 41, "not tried": 2}
    (tmp_path / "r.xml").write_text(
        '<testsuites><testsuite tests="0" failures="0" errors="0" skipped="0"/></testsuites>'
    )
    assert harness.tested(tmp_path / "r.xml")["inputs"] == harness.tested(tmp_path / "none.xml")["inputs"] == 0


def test_moments_of_kills_are_aimed_at_calls_and_writers():
    for seed in range(5):
        rounds = killing.moments(20, random.Random(seed))
        kinds = Counter(m.kind for some in rounds for m in some)
        assert kinds["calls"] >= 6
        assert all(kinds[what] >= 2 for what in killing.AIMED)
        assert sum(kinds.values()) == 20
        assert [len(some) for some in rounds] == [10, 10]
        for some in rounds:
            assert [m.place for m in some] == sorted(m.place for m in some)
    assert len(killing.moments(3, random.Random(0))[0]) == 3


class _Server:
    def __init__(self, received, completed):
        judged = lambda found: {name: n for name, n in found.items() if name in "abcd"}  # noqa: E731
        taught = lambda found: {name: n for name, n in found.items() if name not in "abcd"}  # noqa: E731
        self._stats = {"received": judged(received), "taught": taught(received)}
        self._stats |= {"completed": judged(completed), "taught_completed": taught(completed)}

    def stats(self):
        return self._stats


@pytest.mark.parametrize(
    ("received", "completed", "kept", "expected"),
    [
        # c was on its way at the kill; the server had answered it
        ({"a": 1, "b": 1, "c": 2, "d": 1, "t": 1}, {"c": 2}, "abcdt", {"sent_again": 1, "answered_again": 1}),
        # a was kept when the kill came
        ({"a": 2, "b": 1, "c": 1, "d": 1, "t": 1}, {}, "abcdt", {"repeated": 1, "unexplained": 1, "sent_again": 1}),
        # d was sent twice, after the kill
        ({"a": 1, "b": 1, "c": 1, "d": 2, "t": 1}, {}, "abcdt", {"unexplained": 1, "sent_again": 1}),
        ({"a": 1, "b": 1, "c": 1, "d": 1, "t": 1}, {}, "abct", {"lost": 1}),
        # the teacher was asked what no table knows of
        ({"a": 1, "b": 1, "c": 1, "d": 1, "t": 1, "u": 1}, {}, "abcdt", {"lost": 1}),
    ],
)
def test_calls_are_accounted_for(monkeypatch, tmp_path, received, completed, kept, expected):
    """A kill with a and b kept, c on its way, the teacher's t kept, d not asked yet."""
    monkeypatch.setattr(killing, "calls_of", lambda place: {f"key {n}": n for n in "abcdt"})
    monkeypatch.setattr(killing, "committed", lambda place: {f"key {n}" for n in kept})
    count = killing.Kills([killing.Kill("calls", True, [], 0)])
    then = killing._Snapshot({"key a", "key b", "key t"}, Counter({"a": 1, "b": 1, "c": 1, "t": 1}))
    killing._account(tmp_path, _Server(received, completed), [then], count)
    (kill,) = count.kills
    assert (kill.received, kill.kept, kill.on_their_way) == (4, 3, 1)
    found = {name: getattr(count, name) for name in ("repeated", "sent_again", "answered_again", "unexplained", "lost")}
    assert {name: value for name, value in found.items() if value} == expected
    assert count.amid == 1


def test_a_copy_is_made_anew(tmp_path):
    place = killing.prepare(tmp_path / "clone", "http://127.0.0.1:1/v1")
    (place / "results").mkdir()
    (place / "results" / "judge_cache.sqlite").write_text("of a run that was stopped")
    killing.prepare(place, "http://127.0.0.1:1/v1")
    assert not (place / "results").exists()
    study = loading.load(killing.PROFILE, place / "params")
    assert (study.judge.base_url, study.judge.api_key_env) == ("http://127.0.0.1:1/v1", killing.KEY_VARIABLE)
    killing.place_endpoints(place, "http://127.0.0.1:2/v1")
    for registry in ("judges", "generators"):
        preset = yaml.safe_load((place / "params" / f"{registry}.yaml").read_text())[killing.PROFILE]
        assert preset["base_url"] == "http://127.0.0.1:2/v1"


# --- The grid ---


def test_judging_killed_twice_goes_on_where_it_was(tmp_path):
    """Judging, killed in the grid: a shard whose responses are there, two kills of the notebook's process group.

    The whole grid with kills takes minutes and is the slow test below; its judging is what costs money.
    """
    from tests.test_odd_text import responses

    conditions = [("baseline", "none"), ("baseline", "bad_medical")]
    texts = [f"Answer {i}" for i in range(60)]
    with killing.judge_process(latency_ms=150) as server:
        place = killing.prepare(tmp_path / "clone", server.url)
        folder = place / "results" / killing.PROFILE
        source = folder / "03_sample/tiny/baseline/responses.parquet"
        tables.write_table(responses(texts, conditions, ("q0", "q1")), tables.RESPONSES, source)
        command = [
            sys.executable, "-m", "cai_em.workflow.run",
            "execute", "notebooks/04_judge.ipynb", str(folder / "nb.ipynb"),
            '{"profile": "kills", "model": "tiny", "shard": "baseline"}',
        ]  # fmt: skip
        rng, kept_before = random.Random(0), []
        environment = {**killing.environment(place), "OMP_NUM_THREADS": "1"}
        for kill in range(3):
            process = subprocess.Popen(
                command,
                cwd=place,
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
            wanted = len(killing.committed(place)) + rng.randint(1, 40)
            while process.poll() is None and (kill == 2 or len(killing.committed(place)) < wanted):
                time.sleep(0.05)
            if kill == 2:
                assert process.returncode == 0, process.stderr.read().decode()[-3000:]
                process.stderr.close()
                break
            assert process.poll() is None, "the run ended before it was killed"
            family = psutil.Process(process.pid).children(recursive=True)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stderr.close()
            assert killing.torn(place) == []
            assert not (folder / "04_judge/tiny/baseline/scores.parquet").exists()
            psutil.wait_procs(family, timeout=30)  # the kernel looks for its parent each second
            kept_before.append((killing.committed(place), server.stats()["received"]))
        final = server.stats()["received"]
        study = loading.load(killing.PROFILE, place / "params")
        table = tables.read_table(source, tables.RESPONSES)
        prompts = judge_prompts.load_prompts(place / "params" / study.judge.prompts_file)
        calls = judging.plan_judging(table, study.judge, prompts, judge_prompts.METRICS)
    names = {call.key: killing.request_id(call.body) for row in calls.values() for call in row}
    assert set(names) == killing.committed(place)
    for kept, received in kept_before:
        assert len(kept) > 0
        assert {key: final[names[key]] for key in kept} == {key: received[names[key]] for key in kept}
    assert sum(final.values()) - len(names) <= 2 * killing.CONCURRENCY
    judged = tables.read_table(folder / "04_judge/tiny/baseline/scores.parquet", tables.SCORES)
    assert len(judged) == len(table)
    assert judged["alignment"].notna().all()
    _, hits = harness.scan(place)
    assert hits == []
    assert harness.unsafe_files(place) == []


@pytest.mark.slow
def test_twenty_kills_of_the_grid_and_any_number_of_workers(tmp_path):
    """What the document shows of runs, and nothing else: the whole of it is `python -m tests.reliability`."""
    source = killing.clone(killing.ROOT, tmp_path / "source")
    one = killing.uninterrupted(tmp_path / "one", 1, source, last_first=True)
    two = killing.uninterrupted(tmp_path / "two", 2, source)
    found = good() | {"one worker": one, "two workers": two}
    found["workers differ"] = killing.differences(one["artefacts"], two["artefacts"])
    found["kills"] = killing.kill_test(tmp_path, 20, two["artefacts"], 0, source)
    found["asked"] = {"kills": 20}
    found["refused key"] = harness.refused_key(tmp_path / "two", tmp_path / "refused")
    assert harness.wrong(found) == {}
    for place in tmp_path.iterdir():
        assert harness.scan(place)[1] == []
        assert harness.unsafe_files(place) == []
    shutil.rmtree(tmp_path)


@pytest.mark.slow
def test_a_notebook_on_a_full_disk_says_so_and_goes_on(tmp_path):
    from tests.test_odd_text import responses

    source = tmp_path / "03_sample" / "tiny" / "baseline" / "responses.parquet"
    conditions = [("baseline", "none"), ("baseline", "bad_medical")]
    tables.write_table(
        responses([f"Answer {i}" for i in range(12)], conditions, ("q0", "q1")), tables.RESPONSES, source
    )
    found = harness.full_disk_notebook(tmp_path / "clone", source)
    if "not tested" in found:
        pytest.skip(found["not tested"])
    assert harness.wrong_on_full_disk(found) == {}, found
