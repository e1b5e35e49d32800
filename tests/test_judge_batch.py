"""The Batch API: submit, poll, collect, resume after being killed anywhere, never pay twice."""

import json
from collections import Counter

import pytest
from cai_em.endpoint import batch as endpoint_batch
from cai_em.endpoint.asking import Unanswered
from cai_em.endpoint.batch import BatchPending
from cai_em.endpoint.cache import JudgeCache, JudgeError
from cai_em.endpoint.calls import Call, CostCapReached, Usage
from cai_em.judge.judging import estimate, judge

from tests.judge_server import Faults, serve
from tests.test_judge import PRICES, PROMPTS, expected, preset, table

TEXTS = [f"Answer {i}" for i in range(12)]


def run(server, tmp_path, texts=TEXTS, wait_s=10.0, **changes):
    usage = Usage()
    result = judge(
        table(texts),
        preset(server, batch_api=True, **changes),
        PROMPTS,
        tmp_path / "c.sqlite",
        usage=usage,
        progress=False,
        batch_wait_s=wait_s,
        batch_poll_s=0.05,
    )
    return result, usage


def open_batches(server, tmp_path):
    with JudgeCache(tmp_path / "c.sqlite") as cache:
        return cache.open_batches("test-judge", server.url.split("/")[2])


def test_answers_arrive_in_their_rows_whatever_their_order_in_the_file(tmp_path):
    with serve(batch_delay_s=0.2) as server:
        result, usage = run(server, tmp_path)
        assert len(server.batches) == 1
        assert open_batches(server, tmp_path) == []
    assert result["alignment"].tolist() == expected(TEXTS)
    assert (usage.answered, usage.failed) == (24, 0)


def test_batch_and_single_calls_share_the_cache(tmp_path):
    with serve() as server:
        first, _ = run(server, tmp_path)
        second = judge(table(TEXTS), preset(server), PROMPTS, tmp_path / "c.sqlite", progress=False)
        assert set(server.received.values()) == {1}
    assert first.equals(second)


def test_a_run_that_will_not_wait_goes_on_later(tmp_path):
    with serve(batch_delay_s=3600) as server:
        with pytest.raises(BatchPending, match="in_progress, 0 of 24"):
            run(server, tmp_path, wait_s=0.1)
        with pytest.raises(BatchPending):
            run(server, tmp_path, wait_s=0.1)
        assert len(server.batches) == 1
        server.batch_delay_s = 0  # days later
        result, _ = run(server, tmp_path, wait_s=0.1)
        assert len(server.batches) == 1
        assert set(server.received.values()) == {1}
    assert result["alignment"].tolist() == expected(TEXTS)


def test_only_what_is_new_is_submitted_while_a_batch_is_under_way(tmp_path):
    with serve(batches_together=2) as server:  # the first is under way until the second is there
        with pytest.raises(BatchPending):
            run(server, tmp_path, wait_s=0)
        result, _ = run(server, tmp_path, [*TEXTS, "one more"])
        assert len(server.batches) == 2
        assert set(server.received.values()) == {1}
    assert result["alignment"].tolist() == expected([*TEXTS, "one more"])


def test_killed_while_handing_over_the_batch_is_found_by_its_tag(tmp_path, monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt

    with serve() as server:
        with monkeypatch.context() as patch:
            patch.setattr(JudgeCache, "update_batch", killed)  # the server has it, we have not heard its id
            with pytest.raises(KeyboardInterrupt):
                run(server, tmp_path)
        assert [batch.id for batch in open_batches(server, tmp_path)] == [None]
        result, _ = run(server, tmp_path)
        assert len(server.batches) == 1
    assert result["alignment"].tolist() == expected(TEXTS)


def test_killed_before_handing_over_it_is_submitted_anew(tmp_path):
    with serve() as server:
        with JudgeCache(tmp_path / "c.sqlite") as cache:
            cache.open_batch("lost-tag", "test-judge", server.url.split("/")[2], ["some", "keys"])
        result, _ = run(server, tmp_path)
        assert open_batches(server, tmp_path) == []
    assert result["alignment"].notna().all()


def test_calls_that_fail_in_a_batch_are_flagged_with_their_cause(tmp_path):
    texts = [*TEXTS, "[[fault:http500]]", "[[fault:wrong_model]]", "[[fault:empty]]"]
    with serve() as server:
        result, usage = run(server, tmp_path, texts)
    assert result["alignment_flag"].tolist()[-3:] == ["API", "API", "PARSE"]
    causes = [json.loads(raw)["aligned"]["cause"] for raw in result["raw"].tail(3)]
    assert "HTTP 500" in causes[0]
    assert "another model" in causes[1]
    assert result["alignment"].tolist()[:-3] == expected(TEXTS)
    assert (usage.answered, usage.failed) == (26, 4)


def test_an_expired_batch_keeps_what_it_answered_and_the_rest_is_asked_again(tmp_path):
    with serve(batch_end="expired") as server:
        result, _ = run(server, tmp_path)
        assert result["alignment_flag"].isna().sum() + result["coherence_flag"].isna().sum() == 12
        assert set(result["alignment_flag"].dropna()) | set(result["coherence_flag"].dropna()) == {"API"}
        server.batch_end = "completed"
        again, _ = run(server, tmp_path)
        assert sorted(set(server.received.values())) == [1, 2]
    assert again["alignment"].tolist() == expected(TEXTS)


def test_calls_without_an_answer_are_no_table_and_the_next_run_submits_them_alone(tmp_path):
    with serve(batch_end="expired") as server:
        with pytest.raises(Unanswered, match="12 of 24 calls had no answer: 12 x batch expired"):
            run(server, tmp_path, accept_failures=0.0)
        server.batch_end = "completed"
        result, _ = run(server, tmp_path, accept_failures=0.0)
        assert len(server.batches) == 2
        assert sorted(Counter(server.received.values()).items()) == [(1, 12), (2, 12)]
    assert result["alignment"].tolist() == expected(TEXTS)


@pytest.mark.parametrize(("fault", "batches"), [("after", 1), ("before", 1), ("no", 1)])
def test_an_error_while_handing_over_never_pays_twice(tmp_path, fault, batches):
    """Behind an error of the server's own there may be a batch: the next run looks for it by its tag."""
    with serve(batch_fault=fault) as server:
        with pytest.raises(JudgeError, match="injected: no batch"):
            run(server, tmp_path)
        assert len(open_batches(server, tmp_path)) == (0 if fault == "no" else 1)
        server.batch_fault = None
        result, _ = run(server, tmp_path)
        assert len(server.batches) == batches
        assert set(server.received.values()) == {1}
        assert open_batches(server, tmp_path) == []
    assert result["alignment"].tolist() == expected(TEXTS)


def test_batches_under_way_count_against_the_cap(tmp_path):
    with serve(batch_delay_s=3600) as server:
        cost = estimate(table(TEXTS), preset(server, **PRICES), PROMPTS).usd
        cap = {"cost_cap_usd": 1.5 * cost, **PRICES}
        with pytest.raises(BatchPending):
            run(server, tmp_path, wait_s=0, **cap)
        others = [f"Other {i}" for i in range(12)]
        with pytest.raises(CostCapReached, match="held by batches under way"):
            run(server, tmp_path, others, wait_s=0, **cap)
        with pytest.raises(CostCapReached):  # nor may single calls spend it
            judge(table(others), preset(server, **cap), PROMPTS, tmp_path / "c.sqlite", progress=False)
        assert sum(server.completed.values()) < 20
        server.batch_delay_s = 0
        run(server, tmp_path, **cap)
        with JudgeCache(tmp_path / "c.sqlite") as cache:
            assert 0 < cache.charged("test-judge") == cache.spent("test-judge").usd <= cap["cost_cap_usd"]


def test_answers_of_another_model_are_counted_as_spent(tmp_path):
    with serve() as server:
        _, usage = run(server, tmp_path, ["[[fault:wrong_model]]"], **PRICES)
        assert usage.usd == pytest.approx(
            estimate(table(["[[fault:wrong_model]]"]), preset(server, **PRICES), PROMPTS).usd
        )


def test_any_character_may_stand_in_an_answer(tmp_path):
    """U+2028 ends a line for Python, not for JSON lines."""
    with serve() as server:
        plain = server._answer_batch
        server._answer_batch = lambda name, lines: _unescaped(server, plain(name, lines))
        result, _ = run(server, tmp_path, ["[[say:a\u2028b]]", "other"])
    assert json.loads(result["raw"][0])["aligned"]["text"] == "a\u2028b"


def _unescaped(server, names):
    for name in names:
        server.files[name] = server.files[name].replace(b"\\u2028", "\u2028".encode())
    return names


def test_a_refused_batch_says_why(tmp_path):
    with serve(batch_end="failed") as server:
        with pytest.raises(JudgeError, match="bad batch"):
            run(server, tmp_path)
        assert open_batches(server, tmp_path) == []


def test_a_wrong_key_is_an_error_without_the_key(tmp_path, monkeypatch):
    monkeypatch.setenv("CAI_EM_TEST_JUDGE_KEY", "sk-planted-0123456789")
    with serve(api_key="other") as server, pytest.raises(JudgeError, match="key removed") as error:
        run(server, tmp_path)
    assert "planted" not in str(error.value)
    assert server.batches == {}


def test_a_cap_below_the_estimate_submits_nothing(tmp_path):
    with serve() as server, pytest.raises(CostCapReached, match="Nothing was submitted"):
        run(server, tmp_path, cost_cap_usd=0.5, **PRICES)
    assert server.files == {}


def test_a_storm_in_a_batch(tmp_path):
    with serve(faults=Faults(0.5, seed=3)) as server:
        result, _ = run(server, tmp_path, [f"Answer {i}" for i in range(50)])
    for metric in ("alignment", "coherence"):
        assert (result[metric].isna() == result[f"{metric}_flag"].notna()).all()
    assert result["alignment_flag"].value_counts()["API"] > 5


def test_parts_keep_to_the_limits(monkeypatch):
    monkeypatch.setattr(endpoint_batch, "LARGEST_BATCH", 4)
    monkeypatch.setattr(endpoint_batch, "LARGEST_FILE", 1_000)
    calls = [Call(str(i), {"messages": [{"content": "x" * (500 if i == 5 else 10)}]}) for i in range(11)]
    parts = endpoint_batch.split(calls)
    assert [call for part in parts for call in part] == calls
    assert max(map(len, parts)) <= 4
    assert max(sum(len(endpoint_batch._line(call)) for call in part) for part in parts) <= 1_000
