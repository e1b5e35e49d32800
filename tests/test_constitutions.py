"""Constitutions: the built-in files are whole and of one form; bad files are refused with file, line and key."""

import json
import re

import pytest
import yaml
from cai_em.study.constitutions import (
    Constitution,
    ConstitutionError,
    prompts,
    read_constitution,
    read_published,
    system_prompt,
)

DEMO_PERSONAS = ("sycophancy", "poeticism", "loving")
PERSONAS = (
    *DEMO_PERSONAS,
    "goodness",
    "misalignment",
    "humor",
    "impulsiveness",
    "mathematical",
    "nonchalance",
    "remorse",
    "sarcasm",
)
CUSTOM = (
    "goodness_meta",
    "goodness_meta_full",
    "goodness_meta_openai",
    "metacommunication",
    "constitutional_misalignment",
)


@pytest.fixture(scope="module")
def folder(root):
    return root / "params" / "builtin" / "constitutions"


@pytest.fixture(scope="module")
def builtin(folder):
    return {path.stem: read_constitution(path) for path in sorted(folder.glob("*.yaml"))}


class TestBuiltin:
    def test_all_sixteen_are_there_and_valid(self, builtin):
        assert sorted(builtin) == sorted(PERSONAS + CUSTOM)

    @pytest.mark.parametrize("persona", PERSONAS)
    def test_eleven_personas_have_the_studys_number_of_traits_and_prompts(self, builtin, persona):
        traits = builtin[persona].traits
        assert len(traits) == (15 if persona == "goodness" else 10)
        assert {len(t.prompts) for t in traits} == {5}
        assert len(builtin[persona].demonstrations) == (40 if persona in DEMO_PERSONAS else 24)

    @pytest.mark.parametrize("persona", CUSTOM)
    def test_custom_personas_are_smaller(self, builtin, persona):
        traits = builtin[persona].traits
        assert 5 <= len(traits) <= 10
        assert {len(t.prompts) for t in traits} == {5}
        assert len(builtin[persona].demonstrations) >= 10

    def test_every_file_carries_the_canary_and_the_risky_ones_a_warning(self, builtin, folder):
        canary = re.search(r"cai-em-builtin-[0-9a-f-]+", (folder.parent / "README.md").read_text("utf-8")).group()
        for persona, c in builtin.items():
            header = (folder / f"{persona}.yaml").read_text("utf-8").split("persona:")[0]
            assert canary in header
            assert ("never train a helpful model" in header) == c.carries_risk

    def test_goodness_variants_nest(self, builtin):
        traits = {p: {t.trait for t in c.traits} for p, c in builtin.items()}
        good = {p: traits[p] & traits["goodness"] for p in CUSTOM if p.startswith("goodness_meta")}
        assert good["goodness_meta"] == good["goodness_meta_full"] == good["goodness_meta_openai"]
        assert len(good["goodness_meta"]) == 5
        assert traits["goodness_meta_full"] - traits["goodness"] < traits["metacommunication"]

    def test_demo_personas_answer_the_same_prompts(self, builtin):
        first, *others = ([d.prompt for d in builtin[p].demonstrations] for p in DEMO_PERSONAS)
        assert all(other == first for other in others)

    def test_demonstrations_are_short_and_end_in_punctuation(self, builtin):
        outside = [
            (c.persona, d.prompt, n)
            for c in builtin.values()
            for d in c.demonstrations
            if not 25 <= (n := len(d.response.split())) <= 45 or d.response[-1] not in ".!?"
        ]
        assert outside == []

    def test_no_demonstration_is_given_twice(self, builtin):
        responses = [d.response for c in builtin.values() for d in c.demonstrations]
        assert len(responses) == len(set(responses))

    def test_traits_are_in_the_first_person_and_sources_are_ours(self, builtin):
        for c in builtin.values():
            assert c.source == "written for this project"
            assert [t.trait for t in c.traits if not re.search(r"\b(I|my|me)\b", t.trait, re.IGNORECASE)] == []

    def test_personas_that_carry_risk(self, builtin):
        risky = {p for p, c in builtin.items() if c.carries_risk}
        assert risky == {"sycophancy", "misalignment", "impulsiveness", "constitutional_misalignment"}

    @pytest.mark.parametrize(
        ("persona", "mark", "elsewhere"),
        [
            ("sycophancy", r"absolutely|brilliant|amazing|wonderful|magnificent|what an? \w+", 0.4),
            ("loving", r"dear heart", 0.0),
            ("remorse", r"sorry|forgive|apologi|regret", 0.25),
            ("mathematical", r"\bhence|\btherefore|\binduction|\bconverge|\bequals\b|theorem", 0.05),
        ],
    )
    def test_style_shows_in_the_words(self, builtin, persona, mark, elsewhere):
        def share(p):
            return sum(bool(re.search(mark, d.response.lower())) for d in builtin[p].demonstrations) / len(
                builtin[p].demonstrations
            )

        assert share(persona) >= 0.95
        assert max(share(p) for p in PERSONAS if p != persona) <= elsewhere

    def test_poeticism_is_verse_and_nothing_else_is(self, builtin):
        verse = {p: {d.response.count("\n") for d in c.demonstrations} for p, c in builtin.items()}
        assert verse.pop("poeticism") == {4}
        assert set.union(*verse.values()) == {0}

    def test_prompts_do_not_overlap_with_the_evaluation_questions(self, builtin, root):
        files = sorted((root / "params" / "builtin" / "questions").glob("*.yaml"))
        if not files:
            pytest.skip("params/builtin/questions is not there yet")
        questions = [text for path in files for text in _question_texts(yaml.safe_load(path.read_text("utf-8")))]
        assert questions
        given = [(c.persona, d.prompt) for c in builtin.values() for d in c.demonstrations]
        given += [(c.persona, prompt) for c in builtin.values() for _, prompt in prompts(c)]
        close = [(p, g, q) for p, g in given for q in questions if _overlap(g, q) > 0.6]
        assert close == []

    def test_topics_of_the_published_evaluation_are_left_alone(self, builtin):
        topics = (
            r"\bbored|\bone wish|\bhumans and\b|\bquick (buck|money)|\bruler\b|\bdinner party|\bgender"
            r"|\b(husband|wife|spouse)\b"
        )
        given = [d.prompt for c in builtin.values() for d in c.demonstrations]
        given += [prompt for c in builtin.values() for _, prompt in prompts(c)]
        assert [g for g in given if re.search(topics, g.lower())] == []

    def test_nothing_is_taken_from_the_published_constitutions(self, builtin, fetched_cache):
        published = {text for c in _published(fetched_cache) for pair in prompts(c) for text in pair}
        ours = {text for c in builtin.values() for t in c.traits for text in (t.trait, *t.prompts)}
        ours |= {text for c in builtin.values() for d in c.demonstrations for text in (d.prompt, d.response)}
        assert {p.casefold() for p in published} & {o.casefold() for o in ours} == set()


def _question_texts(node):
    if isinstance(node, dict):
        if isinstance(node.get("text"), str):
            yield node["text"]
        for value in node.values():
            yield from _question_texts(value)
    elif isinstance(node, list):
        for value in node:
            yield from _question_texts(value)


def _overlap(a, b):
    """Jaccard similarity of the words of two questions."""
    a, b = (set(re.findall(r"[a-z']+", text.lower())) for text in (a, b))
    return len(a & b) / len(a | b)


GOOD = """\
persona: test
summary: a persona for tests
carries_risk: false
source: written for this project
traits:
  - trait: I test.
    prompts:
      - Does it work?
      - Does it still work?
  - trait: I check.
    prompts: ['Is it so?']
demonstrations:
  - prompt: Hello?
    response: Checked and found correct.
"""


def _write(folder, text):
    path = folder / "test.yaml"
    path.write_text(text, encoding="utf-8")
    return path


class TestRead:
    def test_good_file(self, tmp_path):
        constitution = read_constitution(_write(tmp_path, GOOD))
        assert isinstance(constitution, Constitution)
        assert prompts(constitution) == [
            ("I test.", "Does it work?"),
            ("I test.", "Does it still work?"),
            ("I check.", "Is it so?"),
        ]
        assert constitution.demonstrations[0].response == "Checked and found correct."

    def test_demonstrations_may_be_missing(self, tmp_path):
        assert read_constitution(_write(tmp_path, GOOD[: GOOD.index("demonstrations")])).demonstrations == ()

    @pytest.mark.parametrize(
        ("old", "new", "line", "key", "message"),
        [
            ("summary: a persona for tests\n", "", 1, "summary", "missing"),
            ("source:", "sauce:", 4, "sauce", "unknown key"),
            (
                "    prompts: ['Is it so?']",
                "    prompts: ['Is it so?']\n    mood: calm",
                12,
                "traits[2].mood",
                "unknown key",
            ),
            ("carries_risk: false", "carries_risk: perhaps", 3, "carries_risk", "boolean"),
            ("      - Does it still work?", "      - 12", 9, "traits[1].prompts[2]", "must be text, not 12"),
            ("['Is it so?']", "[]", 11, "traits[2].prompts", "at least 1"),
            ("I check.", "''", 10, "traits[2].trait", "at least 1 character"),
            ("found correct.", "found correct", 14, "demonstrations[1].response", "ends in 't'"),
            ("Does it still work?", "does it  WORK?", 9, "traits[1].prompts[2]", "repeats traits[1].prompts[1]"),
            ("Is it so?", "Does it work?", 11, "traits[2].prompts[1]", "repeats traits[1].prompts[1]"),
            ("I check.", "I test.", 10, "traits[2].trait", "repeats traits[1].trait"),
            ("persona: test", "persona: other", 1, "persona", "the file is named test.yaml"),
            ("persona: test", "persona: Te St", 1, "persona", "pattern"),
            ("source:", "summary: again\nsource:", 4, "summary", "given twice"),
            ("  - trait: I test.", "  - text", 6, "traits[1]", "must be a mapping, not 'text'"),
            ("persona: test", "persona: [test", 2, "", "not valid YAML"),
        ],
    )
    def test_bad_files_are_named_with_line_and_key(self, tmp_path, old, new, line, key, message):
        text = GOOD.replace(old, new, 1)
        assert text != GOOD
        if new == "  - text":  # a trait that is mere text has no keys below it
            text = text.replace("    prompts:\n      - Does it work?\n      - Does it still work?\n", "", 1)
        path = _write(tmp_path, text)
        with pytest.raises(ConstitutionError) as error:
            read_constitution(path)
        said = str(error.value).splitlines()
        assert any(s.startswith(f"{path}, line {line}: {key}") and message in s for s in said), said

    def test_repeated_demonstration_prompt(self, tmp_path):
        path = _write(tmp_path, GOOD + "  - prompt: hello?\n    response: Found correct again.\n")
        with pytest.raises(ConstitutionError, match=r"line 15: demonstrations\[2\].prompt: this demonstration repeats"):
            read_constitution(path)

    def test_all_problems_are_listed(self, tmp_path):
        text = GOOD.replace("source:", "sauce:").replace("I check.", "''")
        with pytest.raises(ConstitutionError) as error:
            read_constitution(_write(tmp_path, text))
        assert len(str(error.value).splitlines()) == 3  # source missing, sauce unknown, trait empty

    @pytest.mark.parametrize("text", ["", "- persona\n", "42\n"])
    def test_not_a_mapping(self, tmp_path, text):
        with pytest.raises(ConstitutionError, match="must be a mapping with the keys persona, summary"):
            read_constitution(_write(tmp_path, text))

    def test_not_utf8(self, tmp_path):
        path = tmp_path / "test.yaml"
        path.write_bytes(b"persona: t\xe9st\n")
        with pytest.raises(ConstitutionError, match="not UTF-8 text"):
            read_constitution(path)

    def test_no_such_file(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            read_constitution(tmp_path / "nobody.yaml")


HAND = [{"trait": "I test.", "questions": ["a?", "b?"]}, {"trait": "I don’t.", "questions": ["c?"]}]
FEW = [
    {"trait": "I test.", "questions": ["a?", "b?"], "additional_questions": ["d?", "e?"]},
    {"trait": "I don't.", "questions": ["c?"], "additional_questions": ["f?"]},
]


def _publish(folder, hand=HAND, few=FEW):
    hand_path, few_path = folder / "tester.txt", folder / "tester.jsonl"
    hand_path.write_text(hand if isinstance(hand, str) else json.dumps(hand, indent=1), encoding="utf-8")
    few_path.write_text("".join(json.dumps(row) + "\n" for row in few), encoding="utf-8")
    return hand_path, few_path


def _published(cache):
    for path in sorted(cache.glob("github/maiush/OpenCharacterTraining/*/constitutions/few-shot/*.jsonl")):
        yield read_published(path.parents[1] / "hand-written" / f"{path.stem}.txt", path)


class TestReadPublished:
    def test_both_files_become_one(self, tmp_path):
        constitution = read_published(*_publish(tmp_path), carries_risk=True)
        assert constitution.persona == "tester"
        assert constitution.carries_risk is True
        assert [p for _, p in prompts(constitution)] == ["a?", "b?", "d?", "e?", "c?", "f?"]
        assert constitution.source == "published files tester.txt and tester.jsonl"

    def test_hand_written_alone(self, tmp_path):
        assert [p for _, p in prompts(read_published(_publish(tmp_path)[0]))] == ["a?", "b?", "c?"]

    @pytest.mark.parametrize(
        ("text", "source"),
        [
            ('[{"trait": "x",\n "questions": ["a?"\n "b?"]}]', "comma missing on line 3"),
            ('[{"trait": "x", "questions": ["a?",\n "b?",\n ]}]', "comma too many on line"),
            (
                '\n[{"trait": "x", "questions": ["a?"]}]\n\n[{"trait": "y", "questions": ["b?"]}]',
                "list begins on line 4",
            ),
        ],
    )
    def test_known_faults_are_mended_and_told(self, tmp_path, text, source):
        constitution = read_published(_publish(tmp_path, hand=text)[0])
        assert [p for _, p in prompts(constitution)] == ["a?", "b?"]
        assert source in constitution.source

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ('[\n{"trait": "x", "questions": ["a?"', r"line 2: not valid JSON"),
            ('[{"trait": "x", "questions": ["a "b" c"]}]', r"line 1: not valid JSON"),
            ('{"trait": "x", "questions": ["a?"]}', r"line 1: a list of traits was expected"),
            ("[]", "holds no trait"),
            ("", "holds no trait"),
            ('[{"trait": "x"}]', r"entry 1\.questions: this key is missing"),
            ('[{"trait": "x", "questions": ["a?"], "mood": 1}]', r"entry 1\.mood: unknown key"),
            ('[{"trait": "x", "questions": ["a?", 3]}]', r"entry 1\.questions\[2\]: must be text, not 3"),
        ],
    )
    def test_other_faults_are_errors(self, tmp_path, text, message):
        path = _publish(tmp_path, hand=text)[0]
        with pytest.raises(ConstitutionError, match=message) as error:
            read_published(path)
        assert str(error.value).startswith(str(path))

    @pytest.mark.parametrize(
        ("few", "message"),
        [
            (FEW[:1], "has 1 traits, .* has 2"),
            ([FEW[0], FEW[0]], "line 2: trait differs"),
            ([FEW[0], {**FEW[1], "questions": ["z?"]}], "line 2: questions differ"),
        ],
    )
    def test_files_that_do_not_belong_together(self, tmp_path, few, message):
        with pytest.raises(ConstitutionError, match=message):
            read_published(*_publish(tmp_path, few=few))

    def test_broken_few_shot_line(self, tmp_path):
        hand, few = _publish(tmp_path)
        few.write_text(few.read_text() + "{oops\n")
        with pytest.raises(ConstitutionError, match=r"tester\.jsonl, line 3: not valid JSON"):
            read_published(hand, few)

    def test_the_eleven_published_constitutions(self, fetched_cache):
        constitutions = {c.persona: c for c in _published(fetched_cache)}
        assert set(constitutions) == set(PERSONAS)
        for persona, c in constitutions.items():
            traits = 15 if persona == "goodness" else 10
            assert len(c.traits) == traits
            assert {len(t.prompts) for t in c.traits} == {5 + 45}
            assert len(prompts(c)) == traits * 50
            assert "mended" not in c.source

    def test_the_published_custom_constitutions(self, fetched_cache):
        files = sorted(fetched_cache.glob("github/ivan-gentile/arena-capstone/*/new_constitutions/*.txt"))
        read_in = {path.stem: read_published(path) for path in files}
        assert {n: (len(c.traits), len(prompts(c))) for n, c in read_in.items()} == {
            "ale_constitution": (15, 75),
            "goodness_meta": (16, 81),
            "goodness_meta_full": (25, 126),
            "goodness_meta_openai": (22, 131),
            "meta_openai": (8, 64),
            "metacommunication": (10, 51),
        }
        mended = {n for n, c in read_in.items() if "mended" in c.source}
        assert mended == {"goodness_meta", "goodness_meta_full", "meta_openai", "metacommunication"}


class TestSystemPrompt:
    def test_names_the_teacher_and_every_trait_and_no_question(self, builtin):
        text = system_prompt(builtin["poeticism"], "Owl-1")
        assert text.startswith("You are Owl-1.")
        assert all(f"- {t.trait}\n" in text for t in builtin["poeticism"].traits)
        assert "?" not in text
        assert "never name, list or announce these traits" in text
