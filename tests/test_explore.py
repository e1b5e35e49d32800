"""The explorer: selection, escaping, jumping from a cell to its responses; in a browser where there is one."""

import html
import re

import numpy as np
import pandas as pd
import pytest
from cai_em.records import tables as records_tables
from cai_em.report import explore

from tests.test_figures import LOOK

NASTY = [
    "<script>alert(1)</script>",
    "![x](http://x) *bold* `code` {{< include /etc/passwd >}} $\\alpha$",
    "مرحبا emoji 🙂 \x00 NUL",
    "x" * 10_000,
    "",
]


def tables() -> tuple[pd.DataFrame, pd.DataFrame]:
    rows = []
    for persona in ("baseline", "good"):
        for dataset in ("harm", "help"):
            for question in ("q0", "q1"):
                for sample, text in enumerate(NASTY):
                    rows.append((persona, dataset, question, sample, text))
    key = pd.DataFrame(rows, columns=["persona", "dataset", "question_id", "sample", "response"])
    key["model"], key["seed"] = "m1", 0
    judged = key.drop(columns="response").assign(judge="j", judge_mode="integer", prompt_version="1", raw="{}")
    judged["alignment"] = np.where(
        judged["sample"] == 4, np.nan, judged["sample"] * 20.0 + (judged["persona"] == "good")
    )
    judged["alignment_flag"] = np.where(judged["sample"] == 4, "REFUSAL", None)
    judged["coherence"], judged["coherence_flag"] = 60.0, None
    texts = key.assign(prompt="What <now>?", n_tokens=3, finish_reason="stop", sampler="s", adapters="[]", run_id="r")
    return judged[list(records_tables.SCORES.columns)], texts[records_tables.required(records_tables.RESPONSES)]


@pytest.fixture(scope="module")
def explorer():
    return explore.Explorer(*tables(), LOOK)


def test_worst_first_and_unscored_last():
    table = records_tables.with_responses(*tables())
    rows = explore.select(table, persona="good", dataset="harm")
    assert rows["alignment"].dropna().is_monotonic_increasing
    assert rows["alignment_flag"].tolist()[-2:] == ["REFUSAL", "REFUSAL"]
    assert len(rows) == 10


def test_of_equally_misaligned_answers_the_coherent_come_first():
    table = records_tables.with_responses(*tables())
    table = table[table["sample"] == 0].assign(coherence=range(8))
    rows = explore.select(table, persona="good", order="worst first")
    assert rows["alignment"].nunique() == 1
    assert rows["coherence"].is_monotonic_decreasing


def test_filters():
    table = records_tables.with_responses(*tables())
    assert set(explore.select(table, show="flagged")["alignment_flag"]) == {"REFUSAL"}
    em = explore.select(table, show="em")
    assert em["alignment"].max() < 30
    assert len(em) == 16
    assert set(explore.select(table, text="SCRIPT>")["sample"]) == {0}
    assert explore.select(table, text="(.*)").empty, "a search is no regular expression"
    assert explore.select(table, question="q1")["question_id"].unique().tolist() == ["q1"]


def test_judged_text_is_shown_as_text():
    table = records_tables.with_responses(*tables())
    page = explore.cards(explore.select(table, order="as sampled"), LOOK, 40)
    assert "<script" not in page
    assert "What &lt;now&gt;?" in page
    assert "6,000 characters more" in page
    assert "\\x00" in page
    assert "\x00" not in page
    page.encode("utf-8")
    assert "$" not in re.sub(r"&#36;", "", page), "no front end takes it for mathematics"
    assert explore.shown("a\ud800b") == "a?b", "a lone surrogate cannot be sent to a browser"
    # What a browser shows is what the model wrote.
    assert html.unescape(explore.shown("<b>&amp; \"'")) == "<b>&amp; \"'"


def test_the_table_widget_escapes_and_needs_no_network():
    table = records_tables.with_responses(*tables())
    page = explore.table_html(explore.overview(table, LOOK))
    assert "<script>alert" not in page
    assert "alert(1)" in page
    assert not re.search(r"(src|from|import)\s*[=(]?\s*[\"']https?:", page)


def test_a_press_on_a_cell_opens_its_responses(explorer):
    explorer.search.value = "zzz"
    assert "No response matches" in explorer.left.value
    explorer.cells["good", "help"].click()
    assert (explorer.persona.value, explorer.dataset.value, explorer.search.value) == ("good", "help", "")
    assert "Good_one on help: 10 responses, 8 scored, mean alignment 31.0" in explorer.left.value
    assert "Baseline on help: 10 responses, 8 scored, mean alignment 30.0" in explorer.right.value


def test_the_heat_map_has_a_button_for_every_condition(explorer):
    assert set(explorer.cells) == {(p, d) for p in ("baseline", "good") for d in ("harm", "help")}
    assert explorer.cells["good", "harm"].description == "31.0"


def test_two_personas_on_one_question(explorer):
    explorer.open("good", "harm")
    explorer.question.value = "q1"
    assert explorer.selected()["question_id"].unique().tolist() == ["q1"]
    assert "5 responses" in explorer.left.value
    assert "5 responses" in explorer.right.value
    explorer.other.value = explore.NOBODY
    assert explorer.right.value == ""
    explorer.other.value = "baseline"
    explorer.question.value = explore.ALL


def test_missing_conditions_have_no_button():
    judged, texts = tables()
    keep = ~((judged["persona"] == "good") & (judged["dataset"] == "help"))
    found = explore.Explorer(judged[keep], texts[keep.to_numpy()], LOOK)
    assert ("good", "help") not in found.cells
    found.model.value = "m1"
    found.persona.value, found.dataset.value = "good", "help"
    assert "0 responses" in found.left.value


def test_scores_without_responses_are_refused():
    judged, texts = tables()
    with pytest.raises(records_tables.TableError, match="without a response"):
        explore.Explorer(judged, texts.head(3), LOOK)


def test_view_holds_everything(explorer):
    view = explorer.view()
    assert explorer.heat in view.children
    assert len(view.children) == 6


def two_models() -> tuple[pd.DataFrame, pd.DataFrame]:
    """A second model that has `harm` alone, and the worst coherent answer of all."""
    judged, texts = tables()
    keep = judged["dataset"] == "harm"
    again = judged[keep].assign(model="m2", alignment=lambda t: t["alignment"].where(t["sample"] != 1, 3.14159))
    both = pd.concat([judged, again], ignore_index=True)
    return both, pd.concat([texts, texts[keep.to_numpy()].assign(model="m2")], ignore_index=True)


def test_the_worst_answers_anywhere_are_of_all_models_personas_and_data_sets():
    judged, texts = two_models()
    found = explore.Explorer(judged, texts, LOOK)
    found.question.value = "q1"
    found.worst.click()
    assert {found.model.value, found.persona.value, found.dataset.value, found.question.value} == {explore.ALL}
    rows = found.selected()
    expected = judged[(judged["alignment"] < 30) & (judged["coherence"] > 50)]
    assert len(rows) == len(expected)
    assert set(rows["model"]) == {"m1", "m2"}
    assert rows["alignment"].iloc[0] == expected["alignment"].min()
    assert f"All personas on all data sets: {len(rows)} responses" in found.left.value
    assert "alignment 3.1<" in explore.cards(rows[rows["alignment"] == 3.14159], LOOK), "one decimal"
    found.search.value = "SCRIPT"
    assert set(found.selected()["sample"]) == {0}, "a search everywhere"


def test_another_model_keeps_the_condition_or_finds_one_that_it_has():
    found = explore.Explorer(*two_models(), LOOK)
    found.open("good", "harm")
    found.model.value = "m2"
    assert (found.persona.value, found.dataset.value) == ("good", "harm"), "it has that one"
    found.model.value = "m1"
    found.open("good", "help")
    found.model.value = "m2"
    assert (found.persona.value, found.dataset.value) == ("good", "harm"), "it lacks `help`"
    assert "10 responses" in found.left.value
    assert set(found.cells) == {("baseline", "harm"), ("good", "harm")}


def test_the_chosen_cell_is_marked_and_no_other(explorer):
    explorer.open("good", "harm")
    marked = {key for key, button in explorer.cells.items() if button.layout.border_top}
    assert marked == {("good", "harm")}
    explorer.open("baseline", "help")
    marked = {key for key, button in explorer.cells.items() if button.layout.border_top}
    assert marked == {("baseline", "help")}


def test_a_baseline_cell_shows_one_column(explorer):
    explorer.open("baseline", "harm")
    assert explorer.right.value == ""
    assert (explorer.left.layout.width, explorer.right.layout.display) == ("100%", "none")
    explorer.open("good", "harm")
    assert (explorer.left.layout.width, explorer.right.layout.display) == ("50%", None)


def test_every_response_can_be_paged_to(explorer):
    explorer.open("good", "harm")
    explorer.number.value = 4
    assert explorer.page.max == 3
    seen = []
    for page in (1, 2, 3):
        explorer.page.value = page
        seen.append(explorer.left.value.count('class="cai-card"'))
    assert seen == [4, 4, 2]
    explorer.search.value = "script"
    assert (explorer.page.value, explorer.page.max) == (1, 1), "another selection begins at its first page"
    explorer.search.value, explorer.number.value = "", 5


def test_questions_are_named_by_their_text(explorer):
    assert explorer.question.options[1] == ("q0: What <now>?", "q0")
    assert explore.shortened("a " * 100, 20) == "a a a a a a a a a a…"


def test_means_are_those_of_the_paper():
    """The same rounding: stored with two decimals, printed with one."""
    judged, texts = tables()
    judged["alignment"] = judged["alignment"].where(judged["alignment"].isna(), 89.6497)
    found = explore.Explorer(judged, texts, LOOK)
    assert found.cells["good", "harm"].description == "89.7"
    assert "mean alignment 89.7" in found.left.value


def test_a_judge_that_is_not_trusted_is_said_on_its_badges():
    judged, texts = two_models()
    rows = [("m1", "absent", "AUC 0.6 <")] * 2 + [("m2", "present", "fine")]
    gates = pd.DataFrame(rows, columns=["model", "judge_gate", "judge_reason"])
    doubts = explore.judge_doubts(gates)
    assert doubts == {"m1": "AUC 0.6 <"}
    found = explore.Explorer(judged, texts, LOOK, doubts=doubts)
    assert 'title="the judge is not trusted here: AUC 0.6 &lt;"' in found.left.value
    assert "⚠ alignment" in found.left.value
    assert "⚠" in found.view().children[0].value
    found.model.value = "m2"
    assert "⚠" not in found.left.value
