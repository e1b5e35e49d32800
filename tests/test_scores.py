"""The tables between the stages: what a schema refuses, that nothing is dropped, one judge per study."""

import json

import pandas as pd
import pytest
from cai_em.records import files, tables
from cai_em.records.keys import KEY
from cai_em.records.tables import RESPONSES, SCORES, TableError


def responses(n=3, **changes):
    table = pd.DataFrame(
        {"model": "m", "persona": "baseline", "dataset": "bad", "seed": 0, "question_id": "q", "sample": range(n)}
        | {"prompt": "Why?", "response": [f"answer {i}" for i in range(n)], "n_tokens": 5, "finish_reason": "stop"}
        | {"sampler": "test", "adapters": "[]", "run_id": "r"}
    )
    return table.assign(**changes)


def scored(n=3, **changes):
    table = responses(n)[KEY].assign(
        **{"judge": "j", "judge_mode": "integer", "prompt_version": "v1", "alignment": 90.0, "alignment_flag": None},
        **{"coherence": 95.0, "coherence_flag": None, "raw": "{}"},
    )
    return table.assign(**changes)


def test_written_and_read_is_the_same(tmp_path):
    table = scored(3, alignment=[90, None, 10.5], alignment_flag=[None, "REFUSAL", None])
    path = tables.write_table(table.iloc[:, ::-1], SCORES, tmp_path / "deep" / "scores.parquet")
    pd.testing.assert_frame_equal(tables.read_table(path, SCORES), tables.validate(table, SCORES))
    assert [p.name for p in path.parent.iterdir()] == ["scores.parquet"], "no part of a file is left"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"alignment": 130.0}, "in_range"),
        ({"alignment": -1.0}, "in_range"),
        ({"alignment": None}, "exactly one of alignment and alignment_flag"),
        ({"alignment_flag": "REFUSAL"}, "exactly one of alignment and alignment_flag"),
        ({"alignment": None, "alignment_flag": "TIRED"}, "isin"),
        ({"judge_mode": "guess"}, "isin"),
        ({"sample": 0}, "unique"),
        ({"seed": -1}, "greater_than_or_equal_to"),
        ({"extra": 1}, r"unknown columns \['extra'\]"),
    ],
)
def test_what_a_score_table_refuses(changes, said, tmp_path):
    with pytest.raises(TableError, match=said):
        tables.write_table(scored(**changes), SCORES, tmp_path / "scores.parquet")
    assert not (tmp_path / "scores.parquet").exists()


def test_a_missing_column_and_a_missing_file_are_named(tmp_path):
    with pytest.raises(TableError, match=r"missing columns \['raw'\]"):
        tables.validate(scored().drop(columns="raw"), SCORES)
    with pytest.raises(FileNotFoundError, match=r"scores\.parquet does not exist: run the stage"):
        tables.read_table(tmp_path / "scores.parquet", SCORES)


def test_the_same_response_in_two_files_is_refused(tmp_path):
    paths = [tables.write_table(responses(), RESPONSES, tmp_path / f"{i}.parquet") for i in range(2)]
    with pytest.raises(TableError, match="2 files"):
        tables.read_all(paths, RESPONSES)
    with pytest.raises(ValueError, match="no files"):
        tables.read_all([], RESPONSES)


def test_joined_with_responses_nothing_is_lost():
    joined = tables.with_responses(scored(), responses())
    assert list(joined["response"]) == ["answer 0", "answer 1", "answer 2"]
    for more, fewer in ((scored(3), responses(2)), (scored(2), responses(3))):
        with pytest.raises(TableError, match=r"1 .* without a"):
            tables.with_responses(more, fewer)


def test_one_judge_per_study():
    assert tables.one_judge(scored()) == "j"
    other = scored(persona="poet", prompt_version="v2")
    with pytest.raises(
        TableError, match=r"scores of 2 judges in one study: .*v1 judged m baseline; .*v2 judged m poet"
    ):
        tables.one_judge(pd.concat([scored(), other]))


def test_lone_surrogates_and_raw_answers():
    assert files.valid_unicode("a\ud800b 🙂") == "a\N{REPLACEMENT CHARACTER}b 🙂"
    table = responses(1, response=pd.Series(["x\udfff"], dtype=object))
    assert tables.validate(table, RESPONSES)["response"].tolist() == ["x\N{REPLACEMENT CHARACTER}"]
    raw = json.loads(tables.raw_answers("90", {"text": "ü\ud800"}))
    assert raw == {"aligned": "90", "coherent": {"text": "ü\N{REPLACEMENT CHARACTER}"}}
