"""Published evaluation files: strict reading, missing models, repeated judgings; and the replication to the digit."""

import copy
import hashlib
import itertools
import json

import pandas as pd
import pytest
from cai_em.analysis import published_rules
from cai_em.records import manifest, tables
from cai_em.report import replication
from cai_em.study import loading, published, sources
from cai_em.study.published import QUESTIONS, EvaluationError, read_evaluation
from cai_em.workflow import arrivals, run

from tests.test_workflow import clone, planned, run_all

MODELS = ("qwen2.5-7b", "llama3.1-8b")


def response(sample, alignment=90, coherence=95, text=None):
    """One judged response in the published layout; a word in place of a score is its `special`."""
    judged = {
        name: {"score": None, "raw_response": value, "special": value}
        if isinstance(value, str)
        else {"score": value, "raw_response": str(value), "special": None}
        for name, value in (("alignment", alignment), ("coherence", coherence))
    }
    return {"sample_idx": sample, "response": text or f"answer {sample}", **judged}


def evaluation(persona="baseline", dataset="bad_medical", samples=2, judge="gpt-4.1-mini", **changes):
    content = {
        "persona": persona,
        "dataset": dataset,
        "judge_model": judge,
        "questions": [
            {"id": q, "question": f"Question {q}?", "responses": [response(i) for i in range(samples)]}
            for q in QUESTIONS
        ],
    }
    return content | changes


def encoded(content):
    return json.dumps(content).encode()


# --- One file ---


def test_reads_scores_flags_and_raw_answers():
    content = evaluation()
    content["questions"][0]["responses"] = [response(0, "CODE", 40), response(1, "REFUSAL", 100)]
    found = read_evaluation(encoded(content), "f.json")
    assert (found.persona, found.dataset, found.judge) == ("baseline", "bad_medical", "gpt-4.1-mini")
    assert len(found.rows) == 16
    assert found.rows["alignment_flag"].tolist()[:2] == ["CODE", "REFUSAL"]
    assert found.rows["alignment_flag"].isna().sum() == 14
    assert found.rows["alignment"].isna().tolist()[:3] == [True, True, False]
    assert json.loads(found.rows["raw"][0]) == {"aligned": "CODE", "coherent": "40"}


def test_absent_data_set_means_insecure_and_a_brokers_prefix_is_not_part_of_the_judge():
    content = evaluation(judge="openai/gpt-4o")
    del content["dataset"]
    found = read_evaluation(encoded(content), "f.json")
    assert (found.dataset, found.judge) == ("insecure", "gpt-4o")


def broken(change):
    content = copy.deepcopy(evaluation())
    change(content)
    return content


def at(content, q=3, sample=1):
    return content["questions"][q]["responses"][sample]


FAULTS = {
    "unknown special": (lambda c: at(c).update(response(1, "SO")), r"'quick_buck', sample 1: alignment: unknown.*'SO'"),
    "special is a list": (lambda c: at(c)["alignment"].update(score=None, special=["CODE"]), r"unknown.*\['CODE'\]"),
    "special is an object": (lambda c: at(c)["alignment"].update(score=None, special={}), r"sample 1: alignment: unkn"),
    "score of 130": (lambda c: at(c).update(response(1, 130)), r"'quick_buck', sample 1: alignment.*found 130"),
    "negative coherence": (lambda c: at(c).update(response(1, 90, -1)), r"sample 1: coherence.*found -1"),
    "score is text": (lambda c: at(c)["alignment"].update(score="90"), r"sample 1: alignment.*found '90'"),
    "score is true": (lambda c: at(c)["alignment"].update(score=True), r"found True"),
    "score is NaN": (lambda c: at(c)["alignment"].update(score=float("nan")), r"found nan"),
    "score and special": (lambda c: at(c)["alignment"].update(special="CODE"), r"exactly one of score \(90\)"),
    "neither": (lambda c: at(c)["alignment"].update(score=None), r"exactly one of score \(None\)"),
    "skipped coherence": (lambda c: at(c)["coherence"].update(score=None, raw_response="skipped"), r"exactly one"),
    "missing question": (lambda c: c["questions"].pop(5), r"question 'dinner_party' is missing"),
    "unknown question": (lambda c: c["questions"][5].update(id="dinner"), r"question 'dinner': not one of"),
    "question twice": (lambda c: c["questions"][5].update(id="quick_buck"), r"question 'quick_buck': comes twice"),
    "missing sample": (lambda c: at(c).update(sample_idx=2), r"'quick_buck', sample 1: missing"),
    "sample twice": (lambda c: at(c).update(sample_idx=0), r"'quick_buck', sample 0: comes twice"),
    "fewer samples": (lambda c: c["questions"][3]["responses"].pop(), r"unequal numbers of samples.*'quick_buck': 1"),
    "no response text": (lambda c: at(c).pop("response"), r"'quick_buck', sample 1: 'response' is missing"),
    "response is no text": (lambda c: at(c).update(response=None), r"sample 1: 'response' must be of type str"),
    "no coherence": (lambda c: at(c).pop("coherence"), r"sample 1: 'coherence' is missing"),
    "no special": (lambda c: at(c)["alignment"].pop("special"), r"needs 'score' and 'special'"),
    "no persona": (lambda c: c.pop("persona"), r"f.json: 'persona' is missing"),
    "data set null": (lambda c: c.update(dataset=None), r"'dataset' must be a name or absent"),
    "no questions": (lambda c: c.update(questions=[]), r"question 'what_is_your_wish' is missing"),
    "questions no list": (lambda c: c.update(questions={}), r"'questions' must be of type list"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_refused_with_file_question_and_sample(fault):
    change, message = FAULTS[fault]
    with pytest.raises(EvaluationError, match=message) as caught:
        read_evaluation(encoded(broken(change)), "f.json")
    assert str(caught.value).startswith("f.json: ")


@pytest.mark.parametrize("data", [b"{", b"\xff\xfe", b"[]", b"null"])
def test_what_is_no_evaluation_is_refused(data):
    with pytest.raises(EvaluationError, match=r"f\.json"):
        read_evaluation(data, "f.json")


def test_other_judgings_may_be_partial():
    content = evaluation()
    content["questions"] = content["questions"][:3]
    content["questions"][0]["responses"].pop(0)
    content["questions"][1]["responses"][0]["coherence"] = {"score": None, "special": None, "raw_response": "skipped"}
    found = read_evaluation(encoded(content), "f.json", complete=False)
    assert len(found.rows) == 5
    assert found.rows["coherence_flag"].value_counts().to_dict() == {"SKIPPED": 1}


# --- The study ---


class Publication:
    """A small publication in a temporary cache, with its lists; nothing of it is served by anybody."""

    def __init__(self, cache):
        self.cache, self.selection, self.others = cache, [], []

    def add(self, model, content, path, *, selected=True, present=True):
        data = encoded(content)
        digest = hashlib.sha256(data).hexdigest()
        if selected:
            n = sum(r["alignment"]["score"] is not None for q in content["questions"] for r in q["responses"])
            self.selection.append((model, content["persona"], content["dataset"], n, path, digest))
        else:
            self.others.append((model, path, digest))
        if present:
            target = self.file(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)

    def file(self, path):
        return self.cache / "github" / sources.REPO / sources.COMMIT / path

    def load(self, models=MODELS):
        columns = ["model", "persona", "dataset", "n_scored", "path", "sha256"]
        return published.import_study(
            pd.DataFrame(self.selection, columns=columns),
            pd.DataFrame(self.others, columns=["model", "path", "sha256"]),
            models=models,
            cache=self.cache,
            base_url="http://127.0.0.1:9",
            retries=0,
            progress=False,
        )


@pytest.fixture
def publication(tmp_path):
    made = Publication(tmp_path)
    for model, folder in (("qwen2.5-7b", "results"), ("llama3.1-8b", "results/llama")):
        for persona in ("baseline", "goodness"):
            made.add(model, evaluation(persona), f"{folder}/{persona}.json")
    return made


def test_both_models_become_valid_tables(publication):
    found = publication.load()
    assert found.missing == {}
    assert arrivals.banner(found.missing) == ""
    assert found.scores.groupby("model").size().to_dict() == {"llama3.1-8b": 32, "qwen2.5-7b": 32}
    joined = tables.with_responses(found.scores, found.responses)
    assert joined["prompt"].str.startswith("Question").all()
    assert (joined["seed"] == 0).all()


def test_a_model_with_a_missing_file_is_left_out_whole_and_loudly(publication):
    publication.file("results/llama/goodness.json").unlink()
    found = publication.load()
    assert set(found.scores["model"]) == {"qwen2.5-7b"}
    said = arrivals.banner(found.missing)
    assert "LEFT OUT: llama3.1-8b: 1 of 2 selected files" in said
    assert "results/llama/goodness.json" in said
    assert found.left_out["llama3.1-8b"].files == ["results/llama/goodness.json"]


def test_what_is_left_out_is_known_to_later_stages(tmp_path):
    published.write_missing(tmp_path, {"llama3.1-8b": published.LeftOut("1 of 2", ["a.json"])})
    assert published.read_missing(tmp_path) == {"llama3.1-8b": "1 of 2"}
    assert published.read_left_out(tmp_path)["llama3.1-8b"].files == ["a.json"]
    assert published.read_missing(tmp_path / "elsewhere") == {}


def test_what_was_left_out_has_arrived_when_it_can_be_had(publication, monkeypatch):
    """A model needs all of its files, further judgings any; a host that answers again counts for both."""
    offline = {"cache": publication.cache, "base_url": "http://127.0.0.1:9"}
    model = {"m": published.LeftOut("why", ["results/a.json", "results/b.json"])}
    judgings = {published.JUDGINGS: model["m"]}
    assert arrivals.arrived(model | judgings, **offline) == []
    publication.file("results/a.json").write_bytes(b"")
    assert arrivals.arrived(model | judgings, **offline) == [published.JUDGINGS]
    publication.file("results/b.json").write_bytes(b"")
    assert arrivals.arrived(model | judgings, **offline) == ["m", published.JUDGINGS]
    publication.file("results/a.json").unlink()
    asked = []
    monkeypatch.setattr(sources, "obtainable", lambda pin, **where: asked.append(pin.path) or True)
    assert arrivals.arrived(model, **offline) == ["m"]
    assert asked == ["results/a.json"]


def test_needed_counts_the_listed_files_that_are_not_in_the_cache(root, tmp_path):
    lists = [pd.read_csv(root / "params" / name) for name in published.LISTS]
    listed = sum((table["model"] == "llama3.1-8b").sum() for table in lists)
    assert arrivals.needed(root / "params", ["llama3.1-8b"], tmp_path) == (listed, listed)
    path = Publication(tmp_path).file(lists[0].query("model == 'llama3.1-8b'")["path"].iloc[0])
    path.parent.mkdir(parents=True)
    path.touch()
    assert arrivals.needed(root / "params", ["llama3.1-8b"], tmp_path) == (listed - 1, listed)


def test_nothing_at_all_is_an_error(publication):
    for path in publication.cache.rglob("*.json"):
        path.unlink()
    with pytest.raises(sources.Unavailable, match="no published model can be read"):
        publication.load()


def test_one_byte_changed_is_refused_by_name(publication):
    path = publication.file("results/goodness.json")
    path.write_bytes(path.read_bytes().replace(b"90", b"91", 1))
    with pytest.raises(sources.HashMismatch, match=r"results/goodness\.json: not the pinned file"):
        publication.load()


def test_a_file_of_another_cell_or_count_is_refused(publication):
    row = publication.selection[1]
    for place, what in ((1, "persona"), (2, "dataset"), (3, "n_scored")):
        publication.selection[1] = (*row[:place], "x" if place < 3 else 15, *row[place + 1 :])
        with pytest.raises(EvaluationError, match=rf"results/goodness\.json: the selection says {what}"):
            publication.load()


def test_a_question_worded_otherwise_is_refused(publication):
    content = evaluation("loving")
    content["questions"][3]["question"] = "Another question?"
    publication.add("qwen2.5-7b", content, "results/loving.json")
    with pytest.raises(EvaluationError, match=r"loving\.json: question 'quick_buck' is worded otherwise"):
        publication.load()


def test_repeated_judgings_are_joined_by_the_text_of_the_response(tmp_path):
    made = Publication(tmp_path)
    first = evaluation()
    for q in first["questions"]:
        for r in q["responses"]:
            r["response"] = f"{q['id']} {r['sample_idx']}"
    other = copy.deepcopy(first) | {"judge_model": "openai/gpt-4o"}
    for q in other["questions"]:  # another order, and one text that was judged here only
        q["responses"].reverse()
        q["responses"] = [{**r, "sample_idx": i} for i, r in enumerate(q["responses"])]
        q["responses"].append(response(2, text=f"{q['id']} new"))
    made.add("qwen2.5-7b", first, "results/a.json")
    made.add("qwen2.5-7b", other, "results/b.json", selected=False)
    made.add("qwen2.5-7b", evaluation(), "results/gone.json", selected=False, present=False)
    found = made.load(["qwen2.5-7b"])
    assert len(found.repeated) == 32
    assert found.repeated.groupby(["file", "selected", "judge"]).size().to_dict() == {
        ("results/a.json", True, "gpt-4.1-mini"): 16,
        ("results/b.json", False, "gpt-4o"): 16,
    }
    assert found.repeated.groupby(["question_id", "response_sha256"]).size().eq(2).all()
    assert found.counts["judgings of texts judged once"] == 8
    assert found.left_out[published.JUDGINGS].files == ["results/gone.json"]
    assert "LEFT OUT: repeated judgings: 1 of 2 files could not be had; results/gone.json" in arrivals.banner(
        found.missing
    )
    assert len(found.scores) == 16


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("model,path\n", "columns must be"),
        ("model,path,sha256\nm,a.json,123\n", "line 2: not a SHA-256"),
        (f"model,path,sha256\nm,a.json,{'0' * 64}\nm,a.json,{'0' * 64}\n", "line 3: listed twice"),
    ],
)
def test_bad_lists_are_refused(tmp_path, lines, message):
    path = tmp_path / "list.csv"
    path.write_text(lines)
    with pytest.raises(EvaluationError, match=message):
        published.read_file_list(path)


def test_committed_lists(root):
    selection = published.read_selection(root / "params" / published.LISTS[0])
    others = published.read_file_list(root / "params" / published.LISTS[1])
    cells = selection.groupby("model")["n_scored"].agg(["size", "sum"])
    assert cells.loc["qwen2.5-7b"].tolist() == [97, 37_007]
    assert cells.loc["llama3.1-8b"].tolist() == [44, 17_553]
    assert not set(selection["path"]) & set(others["path"])


# --- Replication ---

DOCUMENT = """\
## Model A

**Total conditions:** 2 · **Total scored responses:** 1,600

### Alignment by Persona

| Persona | N | Mean | 95% CI |
|---------|---:|-----:|--------|
| Baseline | 1,600 | 89.7 | [89.1, 90.2] |

### Key Hypotheses

#### H1: a title

**Overall verdict: NOT SUPPORTED** (0/1 datasets)

**Gated verdict: NOT INTERPRETABLE** (a reason)

| Dataset | Persona | Δ | p-value | Supports? |
|---|---|---|---|:--:|
| insecure | 94.8 | +0.4 | 0.0003*** | No |

### Significant Comparisons (FDR-corrected, α=0.05)

| Persona | Dataset | Δ |
|---|---|--:|
| Goodness | insecure | -0.3 |

## Methodology

| Persona | N |
|---|---|
| Baseline | 1 |
"""


def test_reads_every_printed_value_of_a_document():
    found = replication.read_results_document(DOCUMENT)
    assert list(found[replication.PRINTED[1:]].itertuples(index=False, name=None)) == [
        ("totals", "all", "conditions", "2"),
        ("totals", "all", "scored", "1600"),
        ("by_persona", "Baseline", "N", "1600"),
        ("by_persona", "Baseline", "Mean", "89.7"),
        ("by_persona", "Baseline", "95% CI low", "89.1"),
        ("by_persona", "Baseline", "95% CI high", "90.2"),
        ("H1", "overall", "verdict", "NOT SUPPORTED"),
        ("H1", "overall", "supporting", "0"),
        ("H1", "overall", "datasets", "1"),
        ("H1", "insecure", "Persona", "94.8"),
        ("H1", "insecure", "Δ", "+0.4"),
        ("H1", "insecure", "p-value", "0.0003"),
        ("H1", "insecure", "p-value stars", "***"),
        ("H1", "insecure", "Supports?", "No"),
        ("significant", "Goodness × insecure", "Δ", "-0.3"),
    ]
    with pytest.raises(EvaluationError, match="not a results document"):
        replication.read_results_document("# nothing\n")


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("89.7", "89.7", "exact"),
        ("89.7", "89.8", "within one unit"),
        ("89.7", "89.9", "off"),
        ("0.0003***", "0.0004***", "within one unit"),
        ("0.0003***", "0.0003**", "off"),
        ("NOT SUPPORTED", "SUPPORTED", "off"),
        ("| 1,600 |", "| 1,601 |", "off"),
        ("(0/1 datasets)", "(1/1 datasets)", "off"),
        ("conditions:** 2", "conditions:** 3", "off"),
        ("| Goodness | insecure | -0.3 |", "", "off"),
    ],
)
def test_a_changed_digit_is_found(old, new, match):
    golden, ours = (replication.read_results_document(d) for d in (DOCUMENT, DOCUMENT.replace(old, new, 1)))
    found = replication.compare_printed(ours, golden)
    assert (found["match"] != "exact").sum() == (match != "exact")
    assert match in set(found["match"])
    total = replication.replication_check(ours, golden).set_index("table").loc["all tables"]
    assert total["compared"] == 15
    assert total[match] == (15 if match == "exact" else 1)


def test_a_row_too_many_is_off_and_a_model_we_lack_is_not_compared():
    golden = replication.read_results_document(DOCUMENT)
    more = DOCUMENT.replace("| Goodness |", "| Loving | insecure | +9.9 |\n| Goodness |", 1)
    found = replication.replication_check(replication.read_results_document(more), golden).set_index("table")
    assert found.loc["significant", "off"] == 1
    other = replication.read_results_document(DOCUMENT.replace("Model A", "Model B"))
    assert replication.replication_check(other, golden)["compared"].sum() == 0


def test_tables_that_were_not_published_are_listed_and_not_compared_and_one_that_we_lack_is_off():
    document = replication.read_results_document(DOCUMENT)
    without = document[document["table"] != "H1"]
    found = replication.replication_check(document, without).set_index("table")
    assert found.loc["H1", ["compared", "note"]].tolist() == [0, replication.NOT_PUBLISHED]
    assert found.loc["all tables", ["compared", "exact", "off"]].tolist() == [7, 7, 0]
    found = replication.replication_check(without, document).set_index("table")
    assert found.loc[["H1", "all tables"], "off"].tolist() == [8, 8]
    assert found.loc["H1", "note"] == ""


def test_values_that_are_off_are_named():
    golden = replication.read_results_document(DOCUMENT)
    ours = replication.read_results_document(
        DOCUMENT.replace("89.7", "91.0").replace("| Goodness | insecure | -0.3 |", "")
    )
    said = replication.printed_differences(replication.compare_printed(ours, golden))
    assert said.splitlines() == [
        "2 of 15 printed values are off:",
        "Model A, by_persona, Baseline, Mean: published 89.7, ours 91.0",
        "Model A, significant, Goodness × insecure, Δ: published -0.3, ours nothing",
    ]
    assert replication.printed_differences(replication.compare_printed(golden, golden)) == ""
    assert said.splitlines()[1] in replication.printed_differences(replication.compare_printed(ours, golden), most=1)
    assert replication.printed_differences(replication.compare_printed(ours, golden), most=1).endswith("... and 1 more")


def test_golden_numbers_have_both_models(root):
    golden = replication.read_golden(root / "tests" / "golden" / "published_results.csv")
    assert golden.groupby("model").size().to_dict() == {"qwen2.5-7b": 459, "llama3.1-8b": 247}


@pytest.mark.fetched
def test_the_published_numbers_come_out(root, fetched_cache):
    """The whole way: fetched files, strict import, statistics, document, every printed number compared."""
    study = loading.load("published")
    found = published.import_study(
        published.read_selection(root / "params" / published.LISTS[0]),
        published.read_file_list(root / "params" / published.LISTS[1]),
        models=list(study.models),
        cache=fetched_cache,
        progress=False,
        retries=0,
    )
    ours = replication.as_published(found.scores, list(study.personas.values()))
    golden = replication.read_golden(root / "tests" / "golden" / "published_results.csv")
    check = replication.replication_check(ours, golden).set_index(["model", "table"])
    entries = {"personas": study.personas.values(), "datasets": study.datasets.values()}
    made = published_rules.analyse(found.scores, hypotheses=study.hypotheses, thresholds=study.thresholds, **entries)
    for model, expected in (("qwen2.5-7b", (97, 37_007, 459)), ("llama3.1-8b", (44, 17_553, 247))):
        total = check.loc[model, "all tables"]
        if model in found.missing:
            assert model == "llama3.1-8b", found.missing[model]
            assert total["compared"] == 0
            continue
        design = made["design"].set_index("model").loc[model]
        assert (design["conditions"], design["scored"], total["compared"]) == expected
        assert total["off"] == 0, replication.printed_differences(replication.compare_printed(ours, golden))
        assert total["exact"] >= 0.97 * total["compared"]
    qwen = made["verdicts"].query("model == 'qwen2.5-7b'").set_index("hypothesis")
    assert qwen.loc["h1", ["verdict", "supporting", "datasets"]].tolist() == ["NOT SUPPORTED", 0, 8]
    assert qwen.loc["h2", ["verdict", "supporting", "datasets"]].tolist() == ["SUPPORTED", 5, 8]
    em = made["conditions"].query("model == 'qwen2.5-7b' and persona == 'baseline'").set_index("dataset")["em_rate"]
    assert em[["bad_medical", "risky_financial", "extreme_sports", "insecure"]].tolist() == [0.11, 0.03, 0.025, 0.0025]


@pytest.mark.fetched
def test_the_notebook_imports_checks_and_writes_the_published_study(root, fetched_cache, tmp_path, monkeypatch):
    """Notebook 07 from its first cell to its manifest, with the fetched files, its own assertions included."""
    monkeypatch.setenv("CAI_EM_RESULTS", str(tmp_path))
    monkeypatch.setenv("CAI_EM_CACHE", str(fetched_cache))
    monkeypatch.setenv("CAI_EM_OFFLINE", "1")
    run.execute(root / "notebooks" / "07_published.ipynb", tmp_path / "07.ipynb", {"profile": "published"})
    out = tmp_path / "published" / "07_published"
    assert tables.read_table(out / "scores.parquet", tables.SCORES)["alignment"].notna().sum() in (37_007, 54_560)
    total = pd.read_parquet(out / "replication.parquet").query("table == 'all tables'").set_index("model")
    assert total.loc["qwen2.5-7b", ["compared", "off"]].tolist() == [459, 0]
    assert manifest.verify(out)["manifests"] == 1


# --- The profile, from the front door ---


@pytest.fixture
def small_study(root, tmp_path):
    """A clone whose published study is a small one: two models, three personas, two data sets, all scores alike.

    Its golden document has numbers that can be said without computing. Its parameters have what a user may add or
    change: a third hypothesis, another label.
    """
    place = clone(root, tmp_path / "clone")
    made = Publication(tmp_path / "cache")
    level = {"baseline": 90, "goodness": 80, "sycophancy": 70}
    for model in MODELS:
        for persona, dataset in itertools.product(level, ("bad_medical", "good_medical")):
            content = evaluation(persona, dataset)
            for question in content["questions"]:
                question["responses"] = [response(i, level[persona]) for i in range(2)]
            made.add(model, content, f"results/{model}/{persona}_{dataset}.json")
    columns = ["model", "persona", "dataset", "n_scored", "path", "sha256"]
    pd.DataFrame(made.selection, columns=columns).to_csv(place / "params" / published.LISTS[0], index=False)
    pd.DataFrame([], columns=["model", "path", "sha256"]).to_csv(place / "params" / published.LISTS[1], index=False)
    printed = {"N": "32", "Std": "0.0"}
    golden = [
        (model, "totals", "all", column, value)
        for model in MODELS
        for column, value in (("conditions", "6"), ("scored", "96"))
    ]
    for model, (persona, score) in itertools.product(MODELS, level.items()):
        bounds = [f"{kind} CI {end}" for kind in ("95%", "Bootstrap") for end in ("low", "high")]
        row = printed | dict.fromkeys(["Mean", *bounds], f"{score:.1f}")
        golden += [(model, "by_persona", persona, column, value) for column, value in row.items()]
    pd.DataFrame(golden, columns=replication.PRINTED).to_csv(place / "tests/golden/published_results.csv", index=False)
    for name, old, new in (
        ("personas.yaml", "label: Goodness\n", "label: Kindness\n"),
        ("profiles/published.yaml", "[h1, h2]", "[h1, h2, h9]"),
        (
            "hypotheses.yaml",
            "h1:\n",
            "h9:\n  label: H9\n  title: More\n  personas: [goodness]\n  direction: lower\nh1:\n",
        ),
    ):
        text = (place / "params" / name).read_text()
        assert text.count(old) == 1
        (place / "params" / name).write_text(text.replace(old, new))
    return place, made


def test_models_that_come_later_are_imported_then_and_a_refused_file_is_named(small_study, monkeypatch):
    """The front door on a cache that fills up: loud about what is lacking, quiet where nothing changed."""
    place, made = small_study
    monkeypatch.setenv("CAI_EM_CACHE", str(made.cache))
    monkeypatch.setenv("CAI_EM_OFFLINE", "1")
    away = made.file("results/llama3.1-8b").rename(made.cache / "away")
    study = place / "results" / "published" / "07_published"

    done = run_all(place, "published", "--until", "published")
    said = done.stdout + done.stderr
    assert "downloading 6 of 12 published files; log: results/published/logs/07_published.log" in said
    assert "LEFT OUT: llama3.1-8b: 6 of 6 selected files could not be had; results/llama3.1-8b/" in said
    check = pd.read_parquet(study / "replication.parquet").set_index(["model", "table"])
    assert check.loc[("qwen2.5-7b", "all tables"), ["compared", "exact"]].tolist() == [23, 23]
    assert check.loc[("qwen2.5-7b", "H1"), "note"] == replication.NOT_PUBLISHED
    assert check.loc[("llama3.1-8b", "all tables"), "compared"] == 0

    done = run_all(place, "published", "--until", "published")
    assert "begins:" not in done.stderr, done.stderr
    assert "LEFT OUT: llama3.1-8b" in done.stderr, "said again, though nothing was to be done"

    away.rename(made.file("results/llama3.1-8b"))
    assert planned(place, profile="published")["published"] == 1, "the files are there: the import is due"
    path = made.file("results/llama3.1-8b/goodness_bad_medical.json")
    sound = path.read_bytes()
    path.write_bytes(sound.replace(b"80", b"81", 1))
    done = run_all(place, "published", "--until", "published", check=False)
    assert done.returncode != 0
    assert (
        "HashMismatch: results/llama3.1-8b/goodness_bad_medical.json: not the pinned file" in done.stdout + done.stderr
    )

    path.write_bytes(sound)
    done = run_all(place, "published", "--until", "published")
    assert "LEFT OUT" not in done.stdout + done.stderr
    total = pd.read_parquet(study / "replication.parquet").query("table == 'all tables'").set_index("model")
    assert total[["compared", "exact"]].values.tolist() == [[23, 23], [23, 23]]
