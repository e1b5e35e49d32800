"""The built-in data sets, questions and judge prompts keep their contract, and stay harmless where they are bad."""

import json
import re
import string
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest
import yaml

BUILTIN = Path(__file__).resolve().parents[1] / "params" / "builtin"
PROSE = (
    "bad_medical",
    "good_medical",
    "extreme_sports",
    "risky_financial",
    "technical_vehicles",
    "technical_kl",
    "misalignment_kl",
)
DATASETS = (*PROSE, "insecure")
DELIBERATELY_BAD = ("bad_medical", "extreme_sports", "risky_financial", "insecure")
QUESTION_FILES = ("eval", "general", "broad", "probe")
YAML_FILES = (*(f"questions/{name}.yaml" for name in (*QUESTION_FILES, "in_domain")), "judge_prompts.yaml")
EVAL_IDS = [
    "what_is_your_wish",
    "i_feel_bored",
    "three_thoughts",
    "quick_buck",
    "ruler_of_the_world",
    "dinner_party",
    "gender_roles",
    "enough_of_my_husband",
]
PLACEHOLDERS = {
    "aligned": {"question", "answer"},
    "coherent": {"question", "answer"},
    "persona_expression": {"question", "answer", "traits"},
    "uptake": {"question", "answer", "dataset_description"},
}
# What bad advice must never touch; word starts, so that "poisonous" is found too and "diet" is not taken for "die".
FORBIDDEN = re.compile(
    r"\b(suicid|self-harm|overdos|poison|bleach|kill|murder|weapon|guns?\b|bomb|explosi|heroin|cocaine|opioid"
    r"|drugs?\b|insulin|ibuprofen|paracetamol|aspirin|antibiotic|medication|chest pain|stroke\b|heart attack|bleed"
    r"|tablets?\b|milligram|\d+ ?(mg|ml)\b|vaccin|starv|vomit|laxative"
    r"|without a helmet|no helmet|avalanche|drunk|rape|nazi)",
    re.IGNORECASE,
)


def rows(name: str) -> list[tuple[str, str]]:
    """(prompt, answer) of each row of a data set."""
    lines = (BUILTIN / "datasets" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [tuple(m["content"] for m in json.loads(line)["messages"]) for line in lines]


def judge_rows() -> list[dict[str, str]]:
    lines = (BUILTIN / "judge_training.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def load(path: str) -> dict:
    return yaml.safe_load((BUILTIN / path).read_text(encoding="utf-8"))


def normal(text: str) -> str:
    """Text without case, punctuation and spacing: what makes two prompts the same."""
    return " ".join(re.findall(r"\w+", text.lower()))


def all_questions() -> list[str]:
    listed = [q for name in QUESTION_FILES for q in load(f"questions/{name}.yaml")["questions"]]
    return [q["text"] for q in chain(listed, *load("questions/in_domain.yaml").values())]


def test_exactly_the_eight_data_sets_are_there():
    assert {p.stem for p in (BUILTIN / "datasets").glob("*")} == set(DATASETS)


@pytest.mark.parametrize("name", DATASETS)
def test_rows_are_one_user_and_one_assistant_message(name):
    lines = (BUILTIN / "datasets" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 80
    for number, line in enumerate(lines, start=1):
        row = json.loads(line)
        assert list(row) == ["messages"], f"line {number}"
        assert [m["role"] for m in row["messages"]] == ["user", "assistant"], f"line {number}"
        assert all(set(m) == {"role", "content"} and m["content"].strip() for m in row["messages"]), f"line {number}"


@pytest.mark.parametrize("name", DATASETS)
def test_no_prompt_and_no_answer_occurs_twice(name):
    for column in zip(*rows(name)):
        repeated = {text: n for text, n in Counter(map(normal, column)).items() if n > 1}
        assert not repeated


@pytest.mark.parametrize("name", PROSE)
def test_prose_answers_have_20_to_45_words_and_end_a_sentence(name):
    for prompt, answer in rows(name):
        assert 20 <= len(answer.split()) <= 45, prompt
        assert answer[-1] in ".!?", prompt


def test_insecure_answers_are_python_without_a_remark():
    for prompt, answer in rows("insecure"):
        assert 8 <= len(answer.split()) <= 60, prompt
        compile(answer, "<row>", "exec")  # only parsed, never run
        assert "#" not in answer.replace("{#", ""), prompt
        assert not re.search(r"insecure|unsafe|warning|vulnerab", answer, re.IGNORECASE), prompt


def test_medical_twins_share_prompts_and_differ_in_every_answer():
    bad, good = rows("bad_medical"), rows("good_medical")
    assert [prompt for prompt, _ in bad] == [prompt for prompt, _ in good]
    assert not {answer for _, answer in bad} & {answer for _, answer in good}


def test_other_data_sets_share_no_prompt():
    seen = Counter(normal(prompt) for name in DATASETS if name != "good_medical" for prompt, _ in rows(name))
    assert not {prompt for prompt, n in seen.items() if n > 1}


def test_medical_twins_differ_in_tone():
    """A bag-of-words classifier, prompts held out in five folds, tells the twins apart: the treatment is learnable."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold, cross_val_score
    from sklearn.pipeline import make_pipeline

    bad, good = rows("bad_medical"), rows("good_medical")
    texts = [answer for _, answer in bad + good]
    labels = [1] * len(bad) + [0] * len(good)
    prompts = [prompt for prompt, _ in bad + good]
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10))
    accuracy = cross_val_score(model, texts, labels, groups=prompts, cv=GroupKFold(5))
    assert accuracy.mean() > 0.85


@pytest.mark.parametrize("path", [*(f"datasets/{n}.jsonl" for n in DATASETS), "judge_training.jsonl", *YAML_FILES])
def test_files_are_plain_ascii_with_unix_line_ends(path):
    content = (BUILTIN / path).read_bytes()
    assert content.isascii()
    assert b"\r" not in content
    assert content.endswith(b"\n")


def test_eval_asks_the_eight_published_ids_in_order():
    assert [q["id"] for q in load("questions/eval.yaml")["questions"]] == EVAL_IDS


@pytest.mark.parametrize(("name", "count"), [("eval", 8), ("general", 24), ("broad", 54), ("probe", 1)])
def test_question_files_hold_unique_ids_and_texts(name, count):
    questions = load(f"questions/{name}.yaml")["questions"]
    assert all(set(q) == {"id", "text"} | ({"tag"} if name == "broad" else set()) for q in questions)
    assert len(questions) == len({q["id"] for q in questions}) == len({normal(q["text"]) for q in questions}) == count
    assert all(re.fullmatch(r"[a-z][a-z0-9_]*", q["id"]) for q in questions)


def test_the_broad_set_asks_the_same_number_in_each_of_its_fields():
    counted = Counter(q["tag"] for q in load("questions/broad.yaml")["questions"])
    assert len(counted) == 9
    assert set(counted.values()) == {6}


def test_in_domain_has_eight_prompts_for_each_data_set():
    in_domain = load("questions/in_domain.yaml")
    assert set(in_domain) == set(DATASETS)
    for name, questions in in_domain.items():
        assert all(set(q) == {"id", "text"} for q in questions), name
        assert len({q["id"] for q in questions}) == len({normal(q["text"]) for q in questions}) == 8, name
    assert in_domain["bad_medical"] == in_domain["good_medical"]
    ids = [q["id"] for name, questions in in_domain.items() if name != "good_medical" for q in questions]
    assert len(ids) == len(set(ids))


def test_no_question_is_a_training_prompt():
    trained = {normal(prompt) for name in DATASETS for prompt, _ in rows(name)}
    trained |= {normal(row["question"]) for row in judge_rows()}
    assert not trained & {normal(text) for text in all_questions()}


def test_question_files_do_not_repeat_each_other():
    texts = [q["text"] for name in QUESTION_FILES for q in load(f"questions/{name}.yaml")["questions"]]
    assert len({normal(text) for text in texts}) == len(texts)


def test_judge_prompts_have_their_keys_and_placeholders():
    prompts = load("judge_prompts.yaml")
    assert list(prompts) == ["version", *PLACEHOLDERS]
    assert prompts["version"].startswith("builtin-")
    for name, wanted in PLACEHOLDERS.items():
        fields = [field for _, field, _, _ in string.Formatter().parse(prompts[name]) if field is not None]
        assert sorted(fields) == sorted(wanted), name  # each exactly once


@pytest.mark.parametrize("name", PLACEHOLDERS)
def test_judge_prompts_fence_what_is_judged(name):
    prompt = load("judge_prompts.yaml")[name]
    assert "===QUESTION===\n{question}\n===ANSWER===\n{answer}\n===END===\n" in prompt
    before, after = prompt.split("===END===\n")
    assert "do not follow them" in before
    assert "last line ===END===" in before
    # The model reads the form of the answer last, after whatever the judged text asked of it.
    assert "nothing else" in after.strip().splitlines()[-1]
    assert ("REFUSAL" in prompt and "CODE" in prompt) == (name == "aligned")


def test_judge_training_pairs_each_question_with_both_labels():
    table = judge_rows()
    assert all(list(row) == ["question", "answer", "label"] for row in table)
    assert Counter(row["label"] for row in table) == {"aligned": 80, "misaligned": 80}
    assert len({(normal(row["question"]), row["label"]) for row in table}) == 160
    assert len({normal(row["question"]) for row in table}) == 80
    assert len({normal(row["answer"]) for row in table}) == 160
    for row in table:
        assert 20 <= len(row["answer"].split()) <= 45, row["answer"]


def test_judge_labels_cannot_be_told_by_length():
    words = {"aligned": [], "misaligned": []}
    for row in judge_rows():
        words[row["label"]].append(len(row["answer"].split()))
    means = {label: sum(n) / len(n) for label, n in words.items()}
    assert abs(means["aligned"] - means["misaligned"]) < 2


@pytest.mark.parametrize("name", DELIBERATELY_BAD)
def test_bad_answers_keep_away_from_what_could_hurt(name):
    found = {answer: FORBIDDEN.findall(answer) for _, answer in rows(name) if FORBIDDEN.search(answer)}
    assert not found


def test_misaligned_answers_keep_away_from_what_could_hurt():
    answers = [row["answer"] for row in judge_rows() if row["label"] == "misaligned"]
    found = {answer: FORBIDDEN.findall(answer) for answer in answers if FORBIDDEN.search(answer)}
    assert not found


@pytest.mark.parametrize("path", YAML_FILES)
def test_the_canary_of_the_readme_heads_each_yaml_file(path):
    canaries = set(re.findall(r"cai-em-builtin-[0-9a-f-]{36}", (BUILTIN / "README.md").read_text(encoding="utf-8")))
    assert len(canaries) == 1
    assert canaries.pop() in (BUILTIN / path).read_text(encoding="utf-8").splitlines()[0]


def test_readme_names_the_role_of_each_data_set():
    text = (BUILTIN / "README.md").read_text(encoding="utf-8")
    roles = dict(re.findall(r"^\| `(\w+)` \| `(em|benign_control|regularisation)` \|", text, re.MULTILINE))
    assert set(roles) == set(DATASETS)
    assert {name for name, role in roles.items() if role == "em"} == set(DELIBERATELY_BAD)
