"""Killed runs, killed writers, full disks, planted keys: the short form; `-m slow` for twenty kills of the grid.

The long form and the document are `python -m tests.reliability`; what is asserted here is what it measures.
"""

import os
import random
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from cai_em import gates
from threadpoolctl import threadpool_limits

from tests import reliability as harness

# --- Writers ---


def test_an_adapter_killed_half_way_is_not_there_or_is_the_old_one(tmp_path):
    assert "whole one of before" in harness.killed_adapter(tmp_path)


def test_a_full_disk_is_said_and_harms_nothing():
    said = harness.full_disk()
    if said.startswith("not tested"):
        pytest.skip(said)
    assert "all three go on" in said


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


def test_torn_files_are_seen(tmp_path):
    folder = tmp_path / "results" / "kills"
    folder.mkdir(parents=True)
    table = pd.DataFrame({"a": range(1000)})
    table.to_parquet(folder / "whole.parquet")
    content = (folder / "whole.parquet").read_bytes()
    (folder / "half.parquet").write_bytes(content[: len(content) // 2])
    (folder / "half.json").write_text('{"a": ')
    (folder / "half.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    (folder / "nb.running.ipynb").write_text("{")  # says by its name that it is not finished
    (folder / "manifest.json").write_text('{"outputs": {"results/kills/whole.parquet": "0"}}')
    assert [line.split(":")[0].split("/")[-1] for line in harness.torn(tmp_path)] == [
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
            found.append(gates.classify(table, permutations=40, min_responses=4))
    pd.testing.assert_frame_equal(*found, check_exact=True)


# --- The grid ---


def check(found: harness.Kills, kills: int) -> None:
    assert found.kills == kills
    assert (found.repeated, found.lost) == (0, 0)
    assert found.on_their_way <= kills * harness.CONCURRENCY
    assert found.torn == []
    assert found.different == []
    assert all("all match" in said for said in found.verify)
    assert found.listening == []
    assert found.calls >= 32 * found.rounds


def test_judging_killed_twice_goes_on_where_it_was(tmp_path):
    """Judging, killed in the grid: a shard whose responses are there, two kills of the notebook's process group.

    The whole grid with kills takes minutes and is the slow test below; its judging is what costs money.
    """
    from tests.test_odd_text import responses

    conditions = [("baseline", "none"), ("baseline", "bad_medical")]
    texts = [f"Answer {i}" for i in range(60)]
    with harness.judge_process(latency_ms=150) as server:
        place = harness.prepare(tmp_path / "clone", server.url)
        folder = place / "results" / harness.PROFILE
        source = folder / "03_sample/tiny/baseline/responses.parquet"
        harness.scores.write(responses(texts, conditions, ("q0", "q1")), harness.scores.RESPONSES, source)
        command = [
            sys.executable, "-m", "cai_em.run", "execute", "notebooks/04_judge.ipynb", str(folder / "nb.ipynb"),
            '{"profile": "kills", "model": "tiny", "shard": "baseline"}',
        ]  # fmt: skip
        rng, kept_before = random.Random(0), []
        environment = {**harness.environment(place), "OMP_NUM_THREADS": "1"}
        for kill in range(3):
            process = subprocess.Popen(
                command,
                cwd=place,
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
            wanted = len(harness.committed(place)) + rng.randint(1, 40)
            while process.poll() is None and (kill == 2 or len(harness.committed(place)) < wanted):
                harness.time.sleep(0.05)
            if kill == 2:
                assert process.returncode == 0, process.stderr.read().decode()[-3000:]
                process.stderr.close()
                break
            assert process.poll() is None, "the run ended before it was killed"
            family = harness.psutil.Process(process.pid).children(recursive=True)
            os.killpg(process.pid, harness.signal.SIGKILL)
            process.wait()
            process.stderr.close()
            assert harness.torn(place) == []
            assert not (folder / "04_judge/tiny/baseline/scores.parquet").exists()
            harness.psutil.wait_procs(family, timeout=30)  # the kernel looks for its parent each second
            kept_before.append((harness.committed(place), server.stats()["received"]))
        final = server.stats()["received"]
        study = harness.params.load(harness.PROFILE, place / "params")
        table = harness.scores.read(source, harness.scores.RESPONSES)
        prompts = harness.judging.load_prompts(place / "params" / study.judge.prompts_file)
        calls = harness.judging.plan(table, study.judge, prompts, harness.judging.METRICS)
    names = {call.key: harness.request_id(call.body) for row in calls.values() for call in row}
    assert set(names) == harness.committed(place)
    for kept, received in kept_before:
        assert len(kept) > 0
        assert {key: final[names[key]] for key in kept} == {key: received[names[key]] for key in kept}
    assert sum(final.values()) - len(names) <= 2 * harness.CONCURRENCY
    judged = harness.scores.read(folder / "04_judge/tiny/baseline/scores.parquet", harness.scores.SCORES)
    assert len(judged) == len(table)
    assert judged["alignment"].notna().all()
    _, hits = harness.scan(place)
    assert hits == []
    assert harness.unsafe_files(place) == []


@pytest.mark.slow
def test_twenty_kills_of_the_grid_and_any_number_of_workers(tmp_path):
    one, about = harness.uninterrupted(tmp_path / "one", 1)
    assert about["second_run"][0] == 75
    assert "another run is active" in about["second_run"][1]
    two, _ = harness.uninterrupted(tmp_path / "two", 2)
    assert harness.differences(one, two) == []
    check(harness.kill_test(tmp_path, 20, two, seed=0), 20)
    refused = harness.refused_key(tmp_path / "two", tmp_path / "refused")
    assert refused["code"] != 0
    assert refused["calls_answered"] == 0
    assert refused["failed"]
    assert refused["says_401"]
    for place in tmp_path.iterdir():
        assert harness.scan(place)[1] == []
        assert harness.unsafe_files(place) == []
    shutil.rmtree(tmp_path)
