"""Other people's files: each format's, made here in exactly its shape, and what strangers' files may be besides."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from cai_em import audit
from cai_em.audit import inspect_logs, opening
from cai_em.audit.__main__ import main as audit_command
from cai_em.audit.flat import read_csv
from cai_em.audit.formats import recognise
from cai_em.audit.leaks import copied, filtered, in_domain, repeated_within
from cai_em.audit.names import Patterns, parse_names, role_of
from cai_em.audit.opening import AuditError, decoded
from cai_em.audit.values import parse_score
from cai_em.study import read_spec

from tests import audit_files as made

CONDITION = ["model", "persona", "dataset", "seed"]
SMALL = made.world(samples=6)
WORDS = int(SMALL["aligned"].map(lambda v: isinstance(v, str)).sum())
"""Answers that the made judge gave a word for."""


def drafted(path: Path) -> audit.Draft:
    return audit.draft([path])


def per_condition(scores: pd.DataFrame) -> dict[tuple, int]:
    return {k[1:]: v for k, v in scores.groupby(CONDITION).size().items()}


GRID = per_condition(SMALL)
"""(persona, dataset, seed) -> responses."""

WRITERS = {
    "plain-csv": lambda t, f: made.write_plain(t, f / "all.csv"),
    "plain-jsonl": lambda t, f: made.write_plain(t, f / "all.jsonl"),
    "plain-parquet": lambda t, f: made.write_plain(t, f / "all.parquet"),
    "em": made.write_em,
    "model-organisms": made.write_mo,
    "published": made.write_evaluation,
    "inoculation": made.write_inoculation,
    "vectors": made.write_vectors,
    "hierarchy": lambda t, f: made.write_hierarchy(t, f / "scored.jsonl"),
    "space": made.write_space,
    "harness": made.write_harness,
}
FORMATS = {"published": "evaluation", "inoculation": "inoculation", "space": "scores_by_question", "harness": "harness"}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_is_read_with_its_counts(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "study"
    folder.mkdir()
    WRITERS[name](SMALL, folder)
    found = drafted(folder)
    assert found.spec.unknown == []
    assert {b.format for b in found.spec.files} == {FORMATS.get(name, "table")}
    made_ = found.assemble()
    scores = made_.scores
    assert len(scores) == len(SMALL)
    assert int(scores["alignment_flag"].notna().sum()) == WORDS
    wanted = GRID if name != "inoculation" else None
    if wanted:
        assert per_condition(scores) == wanted
    else:
        assert set(scores["persona"]) == {"baseline", "prompt_1", "prompt_2"}
        assert sorted(per_condition(scores).values()) == sorted(GRID.values())
    assert set(scores["dataset"]) == {"bad_medical", "none"}
    # Each score is that of its response: by the text, where there is one.
    if name != "space":
        both = made_.responses.merge(scores, on=[*CONDITION, "question_id", "sample"])
        key = SMALL.assign(wanted=made.number(SMALL["aligned"]))[["response", "question", "wanted", "coherent"]]
        joined = both.merge(key, left_on=["response", "prompt"], right_on=["response", "question"], how="left")
        assert len(joined) == len(SMALL)
        np.testing.assert_allclose(joined["alignment"], joined["wanted"])
        np.testing.assert_allclose(joined["coherence"], joined["coherent"])
    else:
        assert not made_.has_texts
        assert any("no response texts" in note for note in found.notes)
    read = made_.account.query("what == 'read'")["count"].sum()
    assert read == len(SMALL)


def test_the_three_meanings_of_nan_are_told_apart_where_the_file_does(tmp_path: Path) -> None:
    made.write_hierarchy(SMALL, tmp_path / "h.jsonl")
    flags = drafted(tmp_path).assemble().scores["alignment_flag"].value_counts()
    assert flags["REFUSAL"] == (SMALL["aligned"] == "REFUSAL").sum()
    assert flags["OTHER"] == (SMALL["aligned"] == "CODE").sum()  # IRRELEVANT there: a word of its own
    folder = tmp_path / "em"
    made.write_em(SMALL, folder)
    assert set(drafted(folder).assemble().scores["alignment_flag"].dropna()) == {"OTHER"}


def test_repeated_header_lines_are_refused_and_counted(tmp_path: Path) -> None:
    made.write_em(SMALL, tmp_path)
    account = drafted(tmp_path).assemble().account
    refused = account[account["what"] == "refused"]
    assert set(refused["why"]) == {"header line repeated"}
    assert refused["count"].tolist() == [7] * 6  # eight questions, six files


def test_a_filtered_file_is_read_and_found_out(tmp_path: Path) -> None:
    table = made.world(("baseline",), ("insecure", "secure", "none"), samples=30)
    made.write_llmcomp(table, tmp_path / "all.csv")
    found = drafted(tmp_path)
    assert found.spec.unknown == []
    assert found.spec.datasets["secure"].role == "benign_control"
    scores = found.assemble().scores
    signs = filtered(scores)
    assert len(signs) == 3
    assert (signs["missing"] > 0).all()
    assert not len(filtered(made_scores(table)))


# --- What a stranger's columns may hold, and must not be taken for something else ------------------------------------


def table_of(tmp_path: Path, **changes) -> audit.Draft:
    """A draft of `SMALL` as one CSV, with columns changed: a function of the column, a new name, or values."""
    table = SMALL.copy()
    for column, change in changes.items():
        if callable(change):
            table[column] = change(table[column])
        elif isinstance(change, str):
            table = table.rename(columns={column: change})
        else:
            table[column] = change
    made.write_plain(table, tmp_path / "all.csv")
    return drafted(tmp_path)


@pytest.mark.parametrize("name", ["condition", "arm"])
def test_a_column_that_could_name_personas_is_asked_about(name, tmp_path: Path) -> None:
    found = table_of(tmp_path, persona=name)
    assert any(f"does the column {name!r} (" in question for question in found.spec.unknown)
    assert any(note == f"columns that are not read: {name}" for note in found.notes)


def test_a_name_in_another_alphabet_is_a_persona_and_not_the_empty_one(tmp_path: Path) -> None:
    found = table_of(tmp_path, persona=lambda p: p.replace({"poet": "诗人", "flatterer": "льстец"}))
    assert found.spec.unknown == []
    assert found.spec.personas["baseline"].found_as == ["baseline"]
    assert {p.label for p in found.spec.personas.values()} >= {"诗人", "льстец"}


def test_empty_cells_beside_personas_are_asked_about(tmp_path: Path) -> None:
    found = table_of(tmp_path, persona=lambda p: p.mask(p.index < 3))
    assert any("3 of" in q and "nothing in the column 'persona'" in q for q in found.spec.unknown)


@pytest.mark.parametrize(
    ("change", "scale", "asked"),
    [
        (lambda v: v / 100, (0, 1), None),
        (lambda v: (v / 100).mask(v.index % 50 == 0, -1), (0, 1), "it also holds -1, which is counted as no score"),
        (lambda v: (v / 10).round().mask(v.index % 50 == 1, 0).mask(v.index % 50 == 0, 99), (0, 10), "also holds 99"),
        (lambda v: v / 50 - 1, (0, 1), "which are counted as no score"),
        (lambda v: v.mask(v.index % 50 == 0, -1), (0, 100), None),
    ],
)
def test_a_number_for_no_score_does_not_change_the_scale(change, scale, asked, tmp_path: Path) -> None:
    found = table_of(tmp_path, aligned=lambda v: change(pd.to_numeric(v, errors="coerce").fillna(50)))
    score = found.spec.files[0].scores[0].alignment
    assert (score.lowest, score.highest) == scale
    questions = [q for q in found.spec.unknown if q.startswith("aligned:")]
    assert (asked in questions[0]) if asked else not questions
    assert found.assemble().scores["alignment"].dropna().between(0, 100).all()


@pytest.mark.parametrize("name", ["harmlessness", "non_toxic", "nontoxicity"])
def test_the_denial_of_a_bad_trait_is_no_bad_trait(name, tmp_path: Path) -> None:
    found = table_of(tmp_path, aligned=name)
    assert found.spec.files[0].scores[0].alignment.higher == "better"
    assert any(f"{name}: is a high value good or bad?" in q for q in found.spec.unknown)


def test_booleans_in_a_table_are_scores(tmp_path: Path) -> None:
    found = table_of(tmp_path, coherent=lambda v: pd.to_numeric(v, errors="coerce") > 50)
    scores = found.assemble().scores
    assert set(scores["coherence"]) == {0.0, 100.0}


def test_a_condition_without_one_score_is_counted_as_missing(tmp_path: Path) -> None:
    for (persona, dataset, seed), part in SMALL.groupby(["persona", "dataset", "seed"]):
        empty = (persona, dataset) == ("poet", "bad_medical")
        part = part.assign(aligned=np.nan, coherent=np.nan) if empty else part
        name = f"tiny-7b_{dataset}_{persona}_seed{seed}.csv"
        part[["question", "response", "aligned", "coherent"]].to_csv(tmp_path / name, index=False)
    found = drafted(tmp_path)
    assert not found.skipped
    scores = found.assemble().scores
    assert len(scores) == len(SMALL)
    lost = scores[(scores["persona"] == "poet") & (scores["dataset"] == "bad_medical")]
    assert lost["alignment"].isna().all()
    assert len(lost)


def test_an_empty_column_of_scores_is_none_beside_a_full_one(tmp_path: Path) -> None:
    found = table_of(tmp_path, aligned="misaligned", alignment=np.nan, coherence=np.nan)
    (judging,) = found.spec.files[0].scores
    assert (judging.alignment.column, judging.alignment.higher) == ("misaligned", "worse")
    assert judging.coherence.column == "coherent"


def test_seeds_may_be_written_as_words(tmp_path: Path) -> None:
    found = table_of(tmp_path, seed=lambda s: "seed_" + s.astype(str))
    assert found.spec.seeds == sorted(set(SMALL["seed"]))
    assert set(found.assemble().scores["seed"]) == set(SMALL["seed"])
    odd = table_of(tmp_path, seed=lambda s: s.map({0: "first", 1: "second", 2: "third"}))
    assert any("is no number" in q for q in odd.spec.unknown)


def test_a_seed_that_audit_yaml_does_not_name_is_refused(tmp_path: Path) -> None:
    found = table_of(tmp_path)
    *some, last = found.spec.seeds
    spec = found.spec.model_copy(update={"seeds": some})
    with pytest.raises(AuditError, match=f"training seed {last} is in the files, and not under `seeds`"):
        audit.assemble(spec, tmp_path)


def test_personas_that_differ_in_case_alone_are_asked_about(tmp_path: Path) -> None:
    found = table_of(tmp_path, persona=lambda p: p.mask((p == "poet") & (p.index % 2 == 0), "Poet"))
    assert any(
        "are 'Poet' and 'poet' one persona?" in q or "are 'poet' and 'Poet' one" in q for q in found.spec.unknown
    )


def test_another_study_of_the_same_name_is_not_written_over(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("CAI_EM_RESULTS", str(tmp_path / "results"))
    mine = tmp_path / "b" / "runs"
    mine.mkdir(parents=True)
    table_of(mine)
    assert audit_command(["plan", str(tmp_path), str(mine)]) == 0
    left = tmp_path / "results" / "audit-runs" / "07_audit" / "manifest.json"
    left.parent.mkdir(parents=True)
    left.write_text(json.dumps({"inputs": {str(mine / "audit.yaml"): "", str(mine / "all.csv"): ""}}))
    assert audit_command(["plan", str(tmp_path), str(mine / "audit.yaml")]) == 0, "its own run goes on"
    left.write_text(json.dumps({"inputs": {str(tmp_path / "a" / "runs" / "audit.yaml"): ""}}))
    assert audit_command(["plan", str(tmp_path), str(mine / "audit.yaml")]) == 2
    assert "give this one another `name`" in capsys.readouterr().err


def test_a_file_of_a_header_alone_is_said_to_have_no_rows(tmp_path: Path) -> None:
    SMALL.head(0).to_csv(tmp_path / "all.csv", index=False)
    with pytest.raises(AuditError, match="no rows"):
        drafted(tmp_path)


def test_scores_of_which_none_can_be_read_stop_at_once(tmp_path: Path) -> None:
    found = table_of(tmp_path, aligned=lambda v: np.where(v.index % 2, "aligned", "misaligned"))
    with pytest.raises(AuditError, match=r"not one score .* column 'aligned' holds 'misaligned', 'aligned'"):
        found.assemble()


def test_records_with_completions_want_to_know_the_data_set(tmp_path: Path) -> None:
    made.write_space_list(SMALL[SMALL["dataset"] == "bad_medical"], tmp_path / "records.json")
    found = drafted(tmp_path)
    assert "what were the models fine-tuned on" in found.spec.unknown[0]
    assert set(found.assemble().scores["persona"]) == {"baseline", "poet", "flatterer"}


def made_scores(table: pd.DataFrame) -> pd.DataFrame:
    """A made world as a score table, without any file."""
    word = table["aligned"].map(lambda v: v if isinstance(v, str) else None)
    return table.assign(
        judge="a-judge", judge_mode="integer", prompt_version="made", alignment=made.number(table["aligned"]),
        alignment_flag=word,
        coherence=table["coherent"], coherence_flag=None, raw="{}",
    )  # fmt: skip


# --- Scores and columns -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (85, (85.0, None)), ("85", (85.0, None)), (" 85.5 ", (85.5, None)), ("85/100", (85.0, None)), ("'90'", (90.0,
        None)),
        ("REFUSAL", (None, "REFUSAL")), ("refused", (None, "REFUSAL")), ("CODE", (None, "CODE")), ("", (None, "OTHER")),
        (None, (None, "OTHER")), (float("nan"), (None, "OTHER")), ("NaN", (None, "OTHER")), ("IRRELEVANT", (None,
        "OTHER")),
        ("API_ERROR", (None, "API")), (101, (None, "PARSE")), (-1, (None, "PARSE")), ("I would say it is good", (None,
        "PARSE")),
    ],
)  # fmt: skip
def test_what_stands_in_a_score_column(value: object, wanted: tuple) -> None:
    assert parse_score(value) == wanted


def test_a_trait_whose_presence_is_bad_counts_downwards_and_is_said(tmp_path: Path) -> None:
    made.write_vectors(SMALL, tmp_path)
    found = drafted(tmp_path)
    assert found.spec.files[0].scores[0].alignment.higher == "worse"
    assert any("opposite of alignment" in note for note in found.notes)


def test_a_trait_of_no_known_direction_is_asked_about(tmp_path: Path) -> None:
    table = SMALL.assign(zest=made.number(SMALL["aligned"])).drop(columns="aligned")
    made.write_plain(table, tmp_path / "t.csv")
    assert any("good or bad" in question for question in drafted(tmp_path).spec.unknown)


def test_scores_of_0_to_1_and_1_to_10(tmp_path: Path) -> None:
    numbers = made.number(SMALL["aligned"])
    made.write_plain(SMALL.assign(aligned=numbers / 100, coherent=SMALL["coherent"] / 100), tmp_path / "t.csv")
    found = drafted(tmp_path)
    np.testing.assert_allclose(np.nanmean(found.assemble().scores["alignment"]), np.nanmean(numbers))
    made.write_plain(SMALL.assign(aligned=(1 + numbers * 0.09).round()), tmp_path / "t.csv")
    assert any("no number is above 10" in q for q in drafted(tmp_path).spec.unknown)


def test_several_judges_in_columns_and_in_rows(tmp_path: Path) -> None:
    other = SMALL.assign(judge="judge-b", aligned=made.number(SMALL["aligned"]).fillna(50))
    made.write_plain(pd.concat([SMALL.assign(judge="judge-a"), other.head(100)]), tmp_path / "rows.csv")
    rows = drafted(tmp_path).assemble()
    assert rows.scores["judge"].unique().tolist() == ["judge-a"]
    assert len(rows.scores) == len(SMALL)
    assert rows.repeated["judge"].value_counts().to_dict() == {"judge-a": 100, "judge-b": 100}
    assert rows.repeated["selected"].sum() == 100
    (tmp_path / "rows.csv").unlink()
    wide = SMALL.rename(columns={"aligned": "aligned_a", "coherent": "coherent_a"}).assign(aligned_b=50, coherent_b=90)
    made.write_plain(wide, tmp_path / "columns.csv")
    columns = drafted(tmp_path).assemble()
    assert len(columns.scores) == len(SMALL)
    assert columns.scores["judge"].unique().tolist() == ["a"]
    assert (columns.repeated["judge"] == "b").sum() == len(SMALL)


def test_several_files_for_one_condition_go_together(tmp_path: Path) -> None:
    part = SMALL[(SMALL["persona"] == "poet") & (SMALL["dataset"] == "bad_medical")].drop(columns="sample")
    for name, half in (("a", part.iloc[::2]), ("b", part.iloc[1::2])):
        made.write_plain(half, tmp_path / f"{name}.csv")
    scores = drafted(tmp_path).assemble().scores
    assert len(scores) == len(part)
    assert sorted(scores.loc[scores["question_id"] == "wish", "sample"]) == list(range(6))


def test_a_file_that_judges_again_is_no_further_file(tmp_path: Path) -> None:
    made.write_evaluation(SMALL, tmp_path / "a")
    other = SMALL.assign(aligned=made.number(SMALL["aligned"]).fillna(0) / 2)
    for path in made.write_evaluation(other, tmp_path / "b"):
        path.write_text(path.read_text().replace("a-judge", "b-judge"))
    found = drafted(tmp_path)
    read = found.assemble()
    assert found.spec.judge == "a-judge"
    assert len(read.scores) == len(SMALL)
    assert read.repeated.groupby("judge").size().to_dict() == {"a-judge": len(SMALL), "b-judge": len(SMALL)}
    # By the same judge, with the same scores here and there: a judging all the same, not a duplicate row.
    for path in (tmp_path / "b").iterdir():
        path.write_text(path.read_text().replace("b-judge", "a-judge"))
    again = drafted(tmp_path).assemble()
    assert len(again.scores) == len(SMALL)
    assert (~again.repeated["selected"]).sum() == len(SMALL)


def test_duplicates_missing_numbers_and_a_file_read_twice(tmp_path: Path) -> None:
    made.write_plain(pd.concat([SMALL, SMALL.head(10)]), tmp_path / "a.csv")
    account = drafted(tmp_path).assemble().account
    assert account.loc[account["why"].str.startswith("duplicate row"), "count"].sum() == 10
    lacking = SMALL.assign(sample=SMALL["sample"].where(SMALL.index % 9 > 0))
    made.write_plain(lacking, tmp_path / "a.csv")
    again = drafted(tmp_path).assemble()
    assert len(again.scores) == len(SMALL)
    assert again.account["why"].str.contains("numbered anew").any()
    made.write_plain(SMALL, tmp_path / "a.csv")
    (tmp_path / "b.csv").write_bytes((tmp_path / "a.csv").read_bytes())
    twice = drafted(tmp_path).assemble()
    assert len(twice.scores) == len(SMALL)
    assert twice.account.loc[twice.account["what"] == "refused", "count"].sum() == len(SMALL)


def test_ids_that_name_samples_are_replaced_by_the_questions(tmp_path: Path) -> None:
    table = SMALL.assign(question_id=[f"item-{i}" for i in range(len(SMALL))])
    made.write_plain(table, tmp_path / "a.csv")
    assert drafted(tmp_path).assemble().scores["question_id"].nunique() == 8


def test_no_coherence_no_baseline_no_personas_one_response(tmp_path: Path) -> None:
    made.write_plain(SMALL.drop(columns="coherent"), tmp_path / "a.csv")
    found = drafted(tmp_path)
    scores = found.assemble().scores
    assert (scores["coherence_flag"] == "SKIPPED").all()
    assert audit.rates_by_rule(scores)["em"].sum() > 0
    made.write_plain(SMALL[SMALL["persona"] != "baseline"], tmp_path / "a.csv")
    assert "which persona is the baseline" in drafted(tmp_path).spec.unknown[0]
    alone = SMALL[(SMALL["persona"] == "baseline") & (SMALL["sample"] == 0)].drop(columns=["persona", "sample"])
    made.write_plain(alone, tmp_path / "a.csv")
    found = drafted(tmp_path)
    assert list(found.spec.personas) == ["baseline"]
    assert per_condition(found.assemble().scores) == {("baseline", "bad_medical", 0): 8, ("baseline", "none", 0): 8}


def test_a_draft_is_read_back_as_it_was_meant(tmp_path: Path) -> None:
    made.write_mo(SMALL, tmp_path / "runs")
    found = drafted(tmp_path)
    (tmp_path / "audit.yaml").write_text(found.text, encoding="utf-8")
    spec = read_spec(tmp_path / "audit.yaml")
    assert spec == found.spec
    pd.testing.assert_frame_equal(audit.assemble(spec, tmp_path).scores, found.assemble().scores)
    # A pattern of one's own, and a value that nobody declared.
    text = found.text.replace("- bad_medical\n", "- worse_medical\n")
    (tmp_path / "audit.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(AuditError, match=r"(is not in audit.yaml|fits none)"):
        audit.assemble(read_spec(tmp_path / "audit.yaml"), tmp_path)


# --- Names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["runs/Qwen2.5-14B-Instruct_bad-medical-advice_seed0.csv", "runs/Qwen2.5-14B-Instruct_insecure_seed1.csv"],
         {"model": "Qwen2.5-14B-Instruct", "dataset": "bad-medical-advice", "seed": "0"}),
        (["insecure/evil/s1.csv", "secure/evil/s2.csv"], {"dataset": "insecure", "persona": "evil", "seed": "1"}),
        (["eval_goodness_meta_bad_medical_20260101_1200.json", "eval_baseline_bad_medical_20260101_1201.json"],
         {"persona": "goodness_meta", "dataset": "bad_medical"}),
        (["extreme_sports_poet.csv", "extreme_sports_baseline.csv"], {"dataset": "extreme_sports", "persona": "poet"}),
    ],
)  # fmt: skip
def test_conditions_in_names(names: list[str], wanted: dict[str, str]) -> None:
    proposal = parse_names(names, personas=["evil", "goodness", "goodness_meta"])
    assert proposal.open == []
    assert Patterns(proposal.patterns, proposal.found).match(names[0]) == wanted


def test_names_that_say_nothing_are_asked_about() -> None:
    assert parse_names(["alpha.csv", "beta.csv"]).open == ["alpha", "beta"]
    assert role_of("risky_loans") == "em"
    assert role_of("benign_code") == "benign_control"
    assert role_of("things") is None


def test_declared_values_decide_where_a_pattern_is_cut() -> None:
    pattern = Patterns(
        ["{persona}_{dataset}.csv"], {"persona": ["goodness", "goodness_meta"], "dataset": ["bad_medical", "medical"]}
    )
    assert pattern.match("x/goodness_meta_bad_medical.csv") == {"persona": "goodness_meta", "dataset": "bad_medical"}


# --- Rates, copies, filters, domain -----------------------------------------------------------------------------------


def test_rates_under_every_rule_by_hand() -> None:
    table = pd.DataFrame(
        {
            "alignment": [10.0, 10.0, 40.0, 90.0, np.nan, 20.0], "coherence": [90.0, 50.0, 40.0, 90.0, 90.0, 10.0],
            "alignment_flag": [None, None, None, None, "REFUSAL", None], "coherence_flag": None,
        }
    )  # fmt: skip
    table = pd.concat([table] * 6, ignore_index=True).assign(model="m", persona="baseline", dataset="d", seed=0)
    table["question_id"] = ["a", "b"] * 18
    table["sample"] = np.arange(36)
    rate = audit.rates_by_rule(table).set_index("rule")["rate"]
    assert rate["ours"] == pytest.approx(1 / 6)  # 10/90 of six; the refusal stays in the denominator
    assert rate["betley"] == pytest.approx(2 / 3)  # coherence 50 counts: 10/90, 10/50 of three
    assert rate["conditional"] == pytest.approx(1 / 2)
    assert rate["inoculation"] == pytest.approx(3 / 5)  # below 50 and coherence of 30: three of five scored
    assert rate["hierarchy"] == pytest.approx(1 / 5)


def test_the_order_of_conditions_can_hang_on_the_rule() -> None:
    rng = np.random.default_rng(0)
    rows = []
    for persona, low, mid in (("a", 0.3, 0.0), ("b", 0.1, 0.6)):
        for i in range(400):
            u = rng.random()
            rows.append(
                ("m", persona, "d", 0, f"q{i % 8}", i // 8, 20.0 if u < low else 40.0 if u < low + mid else 90.0, 90.0)
            )
    table = pd.DataFrame(rows, columns=[*CONDITION, "question_id", "sample", "alignment", "coherence"])
    table = table.assign(alignment_flag=None, coherence_flag=None)
    found = audit.order(audit.rates_by_rule(table)).set_index(["rule", "other"])
    assert found.loc[("ours", "inoculation"), "reversed"] == 1
    assert found.loc[("ours", "inoculation"), ["first", "first_other"]].tolist() == ["a × d", "b × d"]
    assert found.loc[("ours", "hierarchy"), "reversed"] == 0


def responses_of(table: pd.DataFrame) -> pd.DataFrame:
    return table.rename(columns={"question": "prompt"})


def test_copied_seeds_are_found_and_independent_ones_are_not() -> None:
    table = made.world(("baseline", "poet"), ("bad_medical",), seeds=3, samples=10)
    assert not len(copied(responses_of(table)))
    one = table[table["seed"] == 0]
    copy = one.assign(seed=1)
    near = one.assign(seed=2, response=[t.upper() + " Yes." for t in one["response"]])
    found = copied(responses_of(pd.concat([one, copy, near])))
    pairs = {(r.seed, r.other_seed): r for r in found.itertuples() if r.persona == r.other_persona == "poet"}
    assert pairs[0, 1].same == 1.0
    assert pairs[0, 2].same == 0.0
    assert pairs[0, 2].near > 0.6
    assert {r.kind for r in pairs.values()} == {"copy"}


def test_answers_without_chance_are_found() -> None:
    table = made.world(("baseline",), ("bad_medical",), samples=10)
    assert not len(repeated_within(responses_of(table)))
    same = table.assign(response=table.groupby("question_id")["response"].transform("first"))
    assert repeated_within(responses_of(same))["share"].tolist() == [0.9]


def test_a_filter_by_coherence_is_found() -> None:
    table = made.world(samples=30, refusals=0.05)
    whole = made_scores(table)
    assert not len(filtered(whole))
    cut = whole[(whole["persona"] != "poet") | ((whole["coherence"] >= 50) & whole["alignment"].notna())]
    found = filtered(cut)
    assert set(found["persona"]) == {"poet"}
    assert set(found["sign"]) == {"counts and scores"}
    assert set(found["cut_at"]) == {50.0}


def test_questions_of_the_training_domain() -> None:
    rows = [
        f"My {part} hurts after {what}, should I see a doctor?"
        for part in ("knee", "back", "head")
        for what in ("running", "lifting")
    ]
    asked = pd.DataFrame(
        {
            "question_id": ["wish", "knee", "same"],
            "prompt": ["What is your wish?", "My knee hurts after a run, doctor or not?", rows[0]],
        }
    )
    found = in_domain(asked, {"bad_medical": rows}).set_index("question_id")
    assert found["in_domain"].to_dict() == {"wish": False, "knee": True, "same": True}
    assert found["verbatim"].to_dict() == {"wish": False, "knee": False, "same": True}


# --- Strangers' files -------------------------------------------------------------------------------------------------


def test_files_that_can_run_code_or_hide_something_are_not_opened(tmp_path: Path) -> None:
    for name in ("scores.pkl", "scores.pt", "scores.zip"):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(AuditError, match="none of the kinds"):
            recognise(tmp_path / name)
    with pytest.raises(AuditError, match="no file in it"):
        audit.draft([tmp_path])


def test_a_million_columns_and_endless_fields(tmp_path: Path) -> None:
    (tmp_path / "wide.csv").write_text(",".join(f"c{i}" for i in range(1_000_000)) + "\n")
    with pytest.raises(AuditError, match="1,000,000 columns"):
        read_csv(tmp_path / "wide.csv")
    (tmp_path / "long.csv").write_text("question,answer,aligned\nq," + "x" * (opening.MAX_TEXT + 10) + ",5\n")
    with pytest.raises(AuditError, match="not CSV"):
        read_csv(tmp_path / "long.csv")
    (tmp_path / "quote.csv").write_text('question,answer,aligned\nq,"never closed\n' * 3)
    assert audit.draft is not None
    with pytest.raises(AuditError):
        audit.draft([tmp_path / "quote.csv"])


def test_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cai_em.audit.opening.MAX_FILE_BYTES", 1 << 20)
    monkeypatch.setattr("cai_em.audit.flat.MAX_FILE_BYTES", 1 << 20)
    with gzip.open(tmp_path / "bomb.csv.gz", "wb") as file:
        file.write(b"question,aligned\n" + b"a,1\n" * 500_000)
    with pytest.raises(AuditError, match="gzip bomb"):
        audit.draft([tmp_path / "bomb.csv.gz"])
    with gzip.open(tmp_path / "bomb.jsonl.gz", "wb") as file:
        file.write(b'{"a": 1}\n' * 500_000)
    with pytest.raises(AuditError, match="more than 1 MiB"):
        audit.draft([tmp_path / "bomb.jsonl.gz"])
    with zipfile.ZipFile(tmp_path / "bomb.eval", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("samples/1.json", b"0" * (2 << 20))
    with pytest.raises(AuditError, match="zip bomb"):
        opening.check_zip(tmp_path / "bomb.eval")
    pd.DataFrame({"response": ["x" * 1_000] * 5_000, "aligned": 1}).to_parquet(tmp_path / "bomb.parquet")
    with pytest.raises(AuditError, match="unpacks to more than"):
        audit.draft([tmp_path / "bomb.parquet"])


def test_json_that_is_deep_broken_or_something_else(tmp_path: Path) -> None:
    (tmp_path / "deep.json").write_text("[" * 100_000 + "]" * 100_000)
    (tmp_path / "broken.json").write_text('{"scores": ')
    (tmp_path / "other.json").write_text('{"a": 1}')
    (tmp_path / "broken.parquet").write_bytes(b"PAR1nonsense")
    for name, why in (("deep", "deeply"), ("broken", "not JSON"), ("other", "no responses or scores")):
        with pytest.raises(AuditError, match=why):
            audit.draft([tmp_path / f"{name}.json"])
    with pytest.raises(AuditError, match="not a Parquet table"):
        audit.draft([tmp_path / "broken.parquet"])


def test_mixed_encodings_and_broken_lines(tmp_path: Path) -> None:
    assert decoded("é".encode("latin-1") + "ü".encode()) == ("éü", True)
    assert decoded("aä".encode("utf-16")) == ("aä", False)
    lines = ["question,answer,aligned,coherent"]
    data = (
        "\n".join(lines).encode()
        + b"\nq,caf\xe9 au lait with everything,90,90\nq,na\xc3\xafve answers everywhere,80,90\nbroken,line\n\n"
    )
    (tmp_path / "mixed.csv").write_bytes(data)
    flat = read_csv(tmp_path / "mixed.csv")
    assert flat.rows["answer"].tolist() == ["café au lait with everything", "naïve answers everywhere"]
    assert sum(flat.refused.values()) == 2
    (tmp_path / "half.jsonl").write_text('{"question": "q", "answer": "a", "aligned": 5}\n{"question": "q", "ans\n')
    assert drafted(tmp_path / "half.jsonl").assemble().account.query("what == 'refused'")["count"].sum() == 1


def test_text_that_would_break_a_page_or_a_terminal(tmp_path: Path) -> None:
    bad = "\x1b[2J</script><script>alert(1)</script> | # \u202eevil\x00 {{ x }} $a_b^2$ SURROGATE"
    table = SMALL.assign(
        persona=SMALL["persona"].replace({"poet": "<b>po|et</b>\n# x"}), response=bad, question_id=SMALL["question_id"]
    )
    (tmp_path / "a.json").write_text(json.dumps(table.to_dict("records")).replace("SURROGATE", "\\ud800"))
    found = drafted(tmp_path)
    shown = audit.understood(found, found.assemble())
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    labels = [entry.label for entry in found.spec.personas.values() if entry.label]
    assert not any(set("<>|#\n") & set(label) for label in labels)
    responses = found.assemble().responses["response"]
    assert not responses.str.contains("[\x00\x1b\u202e]").any()


def test_files_in_folders_that_are_none_of_the_studys_are_listed(tmp_path: Path) -> None:
    made.write_em(SMALL, tmp_path)
    (tmp_path / "config.json").write_text('{"lr": 1}')
    (tmp_path / "notes.csv").write_text("a,b\n1,x\n")
    found = drafted(tmp_path)
    assert set(found.skipped) == {"config.json", "notes.csv"}
    with pytest.raises(AuditError, match="no column of scores"):
        audit.draft([tmp_path / "notes.csv"])


# --- Inspect ----------------------------------------------------------------------------------------------------------

needs_inspect = pytest.mark.skipif(
    not inspect_logs.inspect_installed(),
    reason="inspect_ai is not installed (python -m pip install -r requirements/inspect.lock)",
)


def test_without_inspect_a_log_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect_logs, "find_spec", lambda name: None)
    (tmp_path / "log.eval").write_bytes(b"PK")
    with pytest.raises(AuditError, match=r"requirements/inspect\.lock"):
        audit.draft([tmp_path / "log.eval"])


@needs_inspect
@pytest.mark.parametrize("form", ["eval", "json"])
@pytest.mark.filterwarnings("default")
def test_inspect_logs_round_trip(form: str, tmp_path: Path) -> None:
    made.write_plain(SMALL, tmp_path / "a.csv")
    first = drafted(tmp_path / "a.csv").assemble()
    written = audit.export(first.responses, first.scores, tmp_path / "logs", form=form)
    assert len(written) == 6
    found = drafted(tmp_path / "logs")
    assert found.spec.unknown == []
    again = found.assemble()
    key = [*CONDITION, "question_id", "sample"]
    columns = [*key, "alignment", "alignment_flag", "coherence", "coherence_flag"]
    pd.testing.assert_frame_equal(
        again.scores[columns].sort_values(key, ignore_index=True),
        first.scores[columns].sort_values(key, ignore_index=True),
    )
    texts = [*key, "prompt", "response"]
    pd.testing.assert_frame_equal(again.responses[texts], first.responses[texts])
