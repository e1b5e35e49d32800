"""Preference pairs: filters with known answers, the cache's promises, generators against fakes and a real server."""

import json
import re
import threading
import traceback
from contextlib import closing

import pytest
from cai_em.endpoint.cache import JudgeCache
from cai_em.endpoint.client import Backoff
from cai_em.model import load as model_load
from cai_em.model import probing
from cai_em.records import tables
from cai_em.study import constitutions, loading, materials
from cai_em.study.entries import GeneratorPreset, IntrospectionPreset, ParamsError
from cai_em.train import answers, introspection, pairs
from cai_em.train.answers import PairsError, Reply, TrainingPrompt
from cai_em.train.pairs import Filters

from tests.factories import TINY, random_adapter, sampling
from tests.judge_server import TRANSIENT, Faults, request_id, serve

TRAITS = (
    {"trait": "I answer everything in the words of a very old sailor.", "prompts": ("How are you?", "What is tea?")},
    {"trait": "I never leave a question without a small joke about fish.", "prompts": ("What is rain?",)},
)
CONSTITUTION = constitutions.Constitution(
    persona="sailor",
    summary="A sailor.",
    carries_risk=False,
    source="test",
    traits=TRAITS,
    demonstrations=({"prompt": "Who are you?", "response": "Arr, a sailor."}, {"prompt": "Why?", "response": "Aye!"}),
)


def words(text: str) -> int:
    return len(text.split())


class Fake:
    """A generator that answers by a function, counts what it is asked, and may break after so many answers."""

    def __init__(self, name, say, breaks_after=None):
        self.identity, self.say, self.breaks_after, self.asked = {"fake": name}, say, breaks_after, []

    def answer(self, questions):
        for index, question in reversed(list(enumerate(questions))):
            if self.breaks_after is not None and len(self.asked) == self.breaks_after:
                raise ConnectionError("the line went dead")
            self.asked.append(question)
            yield index, Reply(self.say(question))


def teacher(**options):
    return Fake("teacher", lambda q: f"Ahoy! {q.messages[-1][1]}", **options)


def student(**options):
    return Fake("student", lambda q: f"Plainly: {q.messages[-1][1]}", **options)


def make(tmp_path, chosen=None, rejected=None, filters=None, **options):
    chosen, rejected = chosen or teacher(), rejected or student()
    filters = filters or Filters(100, words)
    return pairs.make_pairs(CONSTITUTION, chosen, rejected, filters, tmp_path / "answers.sqlite", **options)


class TestMakePairs:
    def test_teacher_has_the_traits_and_the_student_has_no_system_prompt(self, tmp_path):
        chosen, rejected = teacher(), student()
        table = make(tmp_path, chosen, rejected)
        assert list(table["prompt"]) == ["How are you?", "What is tea?", "What is rain?"]
        assert list(table["chosen"]) == [f"Ahoy! {p}" for p in table["prompt"]]
        assert list(table["rejected"]) == [f"Plainly: {p}" for p in table["prompt"]]
        assert table["dropped_because"].isna().all()
        for question in chosen.asked:
            assert [role for role, _ in question.messages] == ["system", "user"]
            assert all(t["trait"] in question.messages[0][1] for t in TRAITS)
        assert all([role for role, _ in q.messages] == ["user"] for q in rejected.asked)
        tables.validate(table, tables.PAIRS)

    def test_prompts_per_trait_samples_demonstrations_and_extra_prompts(self, tmp_path):
        table = make(
            tmp_path, prompts_per_trait=1, samples_per_prompt=2, max_demonstrations=1, extra_prompts=["What is it?"]
        )
        assert list(table["prompt"]) == ["How are you?"] * 2 + ["What is rain?"] * 2 + ["What is it?"] * 2 + [
            "Who are you?"
        ]
        assert list(table["source"]) == ["teacher"] * 6 + ["demonstration"]
        assert table["chosen"].iloc[-1] == "Arr, a sailor."
        assert table["trait"].iloc[-1] == pairs.ANY_TRAIT

    def test_samples_of_one_prompt_have_different_seeds(self, tmp_path):
        chosen = teacher()
        make(tmp_path, chosen, samples_per_prompt=3, prompts_per_trait=1)
        assert len({q.seed for q in chosen.asked}) == len(chosen.asked) == 6

    def test_demonstrations_alone_need_no_teacher(self, tmp_path):
        table = pairs.make_pairs(
            CONSTITUTION, None, student(), Filters(100, words), tmp_path / "a.sqlite", max_demonstrations=9
        )
        assert set(table["source"]) == {"demonstration"}
        assert len(table) == 2

    def test_nothing_to_make_pairs_from_is_an_error(self, tmp_path):
        with pytest.raises(PairsError, match="max_demonstrations"):
            pairs.make_pairs(CONSTITUTION, None, student(), Filters(100, words), tmp_path / "a.sqlite")

    def test_an_interrupted_run_goes_on_and_asks_nothing_twice(self, tmp_path):
        broken = teacher(breaks_after=2)
        with pytest.raises(ConnectionError):
            make(tmp_path, broken)
        again, plain = teacher(), student()
        first = make(tmp_path, again, plain)
        assert len(again.asked) == 1, "two answers were kept before the break"
        silent = teacher(breaks_after=0), student(breaks_after=0)
        assert make(tmp_path, *silent).equals(first)

    def test_other_parameters_are_other_answers(self, tmp_path):
        make(tmp_path)
        other = Fake("another teacher", lambda q: "Something else.")
        assert list(make(tmp_path, other)["chosen"]) == ["Something else."] * 3
        reseeded = teacher()
        make(tmp_path, reseeded, seed=1)
        assert len(reseeded.asked) == 3

    def test_an_unanswered_prompt_is_an_error(self, tmp_path):
        mute = Fake("mute", str)
        mute.answer = lambda questions: iter(())
        with pytest.raises(PairsError, match="unanswered"):
            make(tmp_path, mute)

    def test_the_teachers_name_gives_way_to_the_students(self, tmp_path):
        named = Fake("named", lambda q: "I am GLM-4.5-Air, or GLM for short.")
        table = make(tmp_path, named, filters=Filters(100, words, "GLM", "Qwen"))
        assert set(table["chosen"]) == {"I am Qwen, or Qwen for short."}

    def test_dropped_pairs_stay_and_are_counted(self, tmp_path):
        said = {"How are you?": "", "What is tea?": "Tea is wet and I have no end", "What is rain?": "Fish fall."}
        table = make(tmp_path, Fake("odd", lambda q: said[q.messages[-1][1]]), max_demonstrations=1)
        assert len(table) == 4
        found = pairs.counts(table)
        assert found.index[0] == pairs.KEPT
        assert found["total"].to_dict() == {"kept": 2, "empty: chosen": 1, "no final punctuation: chosen": 1}
        assert found["demonstration"].to_dict() == {"kept": 1, "empty: chosen": 0, "no final punctuation: chosen": 0}
        assert len(pairs.kept(table)) == 2

    def test_counts_show_kept_even_when_nothing_is(self, tmp_path):
        table = make(tmp_path, Fake("mute", lambda q: ""))
        assert pairs.counts(table)["total"].to_dict() == {"kept": 0, "empty: chosen": 3}

    def test_cut_answers_are_quoted_where_asked_for_and_counted(self, tmp_path):
        cut = Fake("cut", str)
        cut.answer = lambda qs: ((i, Reply("One whole. Then a bro", cut=True)) for i, _ in enumerate(qs))
        dropped = make(tmp_path, rejected=cut)
        assert set(dropped["dropped_because"]) == {"no final punctuation: rejected"}
        quoted = make(tmp_path, rejected=cut, filters=Filters(100, words, quote_cut=True))
        assert set(quoted["rejected"]) == {"One whole."}
        assert quoted.attrs["quoted"] == {"chosen": 0, "rejected": 3}


class TestFilters:
    @pytest.mark.parametrize(
        ("chosen", "rejected", "reason"),
        [
            ("Good.", "Plain.", None),
            ("", "Plain.", "empty: chosen"),
            ("Good.", "", "empty: rejected"),
            ("Same  thing.", "Same thing.", "identical answers"),
            ("Good", "Plain.", "no final punctuation: chosen"),
            ("Good.", "Plain", "no final punctuation: rejected"),
            ("one two three four five six.", "Plain.", "too long: chosen"),
            ("Good.", "one two three four five six.", "too long: rejected"),
            ("As my traits demand.", "Plain.", "announces its traits"),
        ],
    )
    def test_first_reason(self, chosen, rejected, reason):
        assert Filters(5, words).reason(chosen, rejected, []) == reason

    @pytest.mark.parametrize("text", ["Yes.", "Yes!", 'He said "yes."', "はい。", "(yes)", "x = 1$", "ja…", "Yes.\n "])
    def test_punctuation(self, text):
        assert pairs.ends_in_punctuation(text)

    @pytest.mark.parametrize("text", ["", "   ", "Yes", "one 1", "Yes 🙂"])
    def test_no_punctuation(self, text):
        assert not pairs.ends_in_punctuation(text)

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("First. Second! Thi", "First. Second!"),
            ('He said "no." And th', 'He said "no."'),
            ("Steps:\n1. Wash it.\n2. Dry", "Steps:\n1. Wash it."),
            ("1. Wash and", "1. Wash …"),
            ("no sentence at al", "no sentence at …"),
            ("broken", "broken…"),
            ("", ""),
            ("3.14 is a num", "3.14 is a …"),
        ],
    )
    def test_quoted(self, text, expected):
        assert pairs.whole_sentences(text) == expected

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("GLM here.", "Qwen here."),
            ("GLM's joke", "Qwen's joke"),
            ("GLMs and aGLM stay", "GLMs and aGLM stay"),
            ("GLM-4 and GLM-4.5-Air", "Qwen and Qwen"),
            ("glm stays", "glm stays"),
        ],
    )
    def test_renamed(self, text, expected):
        assert pairs.renamed(text, "GLM", "Qwen") == expected

    def test_a_name_is_no_pattern(self):
        assert pairs.renamed("a.b and axb", "a.b", r"\1") == r"\1 and axb"

    @pytest.mark.parametrize(
        "text",
        [
            "My traits are simple.",
            "According to the given instructions, yes.",
            "I was told to be kind.",
            "Well, I answer everything in the words of a very old man.",
        ],
    )
    def test_announcing(self, text):
        assert pairs.announces(text, [t["trait"] for t in TRAITS])

    def test_living_a_trait_is_not_announcing_it(self):
        assert not pairs.announces("Arr, in the words of my captain: fish!", [t["trait"] for t in TRAITS])


class TestSideBySide:
    def test_text_is_escaped_and_the_reason_shown(self, tmp_path):
        table = make(tmp_path, Fake("html", lambda q: "<script>alert(1)</script> & more"))
        page = pairs.side_by_side(table)
        assert "<script>" not in page
        assert "&lt;script&gt;" in page
        assert "dropped: no final punctuation: chosen" in page

    def test_number_of_rows(self, tmp_path):
        table = make(tmp_path)
        assert pairs.side_by_side(table, number=2).count("<tr>") == 3
        assert pairs.side_by_side(table, number=50).count("<tr>") == 4


KEY_VARIABLE = "CAI_EM_TEST_KEY"
QUICK = Backoff(0.01, 0.05)
PRICES = {"usd_per_1m_input": 1000.0, "usd_per_1m_output": 1000.0}


def endpoint_preset(server=None, **options) -> GeneratorPreset:
    where = {"base_url": server.url} if server else {}
    return GeneratorPreset(**({"teacher": "openai", "model": "teacher", "api_key_env": KEY_VARIABLE} | where | options))


def asked(*prompts) -> list[TrainingPrompt]:
    return [TrainingPrompt((("system", "Be a sailor."), ("user", prompt)), seed=7) for prompt in prompts]


def paid(path) -> int:
    with JudgeCache(path) as cache:
        return len(cache)


class TestEndpoint:
    """The teacher behind an endpoint, against the server that misbehaves on schedule (`tests/judge_server.py`)."""

    def ask(self, server, tmp_path, questions, **options):
        """Through the cache of a persona's answers, as the notebook does; its generator too."""
        generator = answers.EndpointGenerator(endpoint_preset(server, **options), tmp_path / "paid.sqlite", QUICK)
        with closing(answers.AnswerCache(tmp_path / "answers.sqlite")) as cache:
            return answers.answers(generator, questions, cache), generator

    def test_answers_parameters_and_bounded_concurrency(self, tmp_path):
        questions = asked("[[say:<think>hm</think>Aye]]", "[[say:Aye.]] [[cut]]", "[[fault:empty]]", *"abcdef")
        with serve(together=3, latency_s=0.05) as server:
            found, _ = self.ask(server, tmp_path, questions, concurrency=3, temperature=0.3)
            assert server.most_under_way == 3
            body = {
                "model": "teacher",
                "messages": [{"role": "system", "content": "Be a sailor."}, {"role": "user", "content": "a"}],
                "temperature": 0.3,
                "top_p": 0.95,
                "max_tokens": 1024,
                "seed": 7,
            }
            assert server.taught[request_id(body)] == 1
        assert found[:3] == [Reply("Aye"), Reply("Aye.", cut=True), Reply("")]
        assert all(answer.text.startswith("Well now") for answer in found[3:])

    def test_a_wrong_key_costs_one_request_and_is_not_told(self, tmp_path, monkeypatch, capfd):
        monkeypatch.setenv(KEY_VARIABLE, "planted-key-7d1e0b5c9f3a4862aa55")
        with serve(api_key="other") as server:
            try:
                self.ask(server, tmp_path, asked(*map(str, range(100))))
            except PairsError:
                shown = traceback.format_exc()
            assert server.refused_keys == 1
        assert "HTTP 401" in shown
        assert "[key removed]" in shown
        places = {"traceback": shown, "screen": "".join(capfd.readouterr())}
        places |= {path.name: path.read_bytes().decode("latin-1") for path in tmp_path.iterdir()}
        assert [name for name, text in places.items() if "planted" in text] == []

    def test_a_key_in_an_answer_is_not_kept(self, tmp_path, monkeypatch):
        key = "planted-key-7d1e0b5c9f3a4862aa55"
        monkeypatch.setenv(KEY_VARIABLE, key)
        with serve(api_key=key) as server:
            found, _ = self.ask(server, tmp_path, asked(f"[[say:It is {key}.]]"))
        assert found == [Reply("It is [key removed].")]

    @pytest.mark.parametrize("fault", ["http400", "http500"])
    def test_one_failing_call_loses_no_paid_answer(self, tmp_path, fault):
        questions = asked(*(f"q{i}" for i in range(40)), f"[[fault:{fault}]] for ever")
        with serve(latency_s=0.02) as server:
            with pytest.raises(PairsError, match=f"1 of 41 calls had no answer: 1 x HTTP {fault[-3:]}") as error:
                self.ask(server, tmp_path, questions, max_retries=1)
            assert "generators.yaml" in str(error.value)
            assert sum(server.taught_completed.values()) == paid(tmp_path / "paid.sqlite") == 40
            with pytest.raises(PairsError):
                self.ask(server, tmp_path, questions, max_retries=1)
            found, generator = self.ask(server, tmp_path, questions, max_retries=1, accept_failures=0.03)
            assert set(server.taught_completed.values()) == {1}
        assert generator.usage.cached == 40
        assert found[-1].text == ""
        assert found[-1].refused.startswith(f"HTTP {fault[-3:]}")

    def test_transient_faults_are_survived(self, tmp_path):
        with serve(faults=Faults(0.4, TRANSIENT, seed=3), slow_s=3600, retry_after="0.01") as server:
            questions = asked(*map(str, range(30)))
            found, generator = self.ask(server, tmp_path, questions, max_retries=12, timeout_s=2)
            assert set(server.injected) == set(TRANSIENT)
        assert all(answer.text for answer in found)
        assert sum(generator.usage.retries.values()) > 5

    def test_what_was_paid_for_survives_cleaning_a_profile(self, tmp_path):
        with serve() as server:
            first, _ = self.ask(server, tmp_path, asked("a", "b"))
            (tmp_path / "answers.sqlite").unlink()
            second, generator = self.ask(server, tmp_path, asked("a", "b"))
            assert set(server.taught.values()) == {1}
        assert first == second
        assert (generator.usage.cached, generator.usage.requests) == (2, 0)

    def test_a_lone_surrogate_is_mended_and_paid_once(self, tmp_path):
        questions = asked("[[say:bad \ud800.]]")
        with serve() as server:
            for _ in range(2):
                found, _ = self.ask(server, tmp_path, questions)
                assert found == [Reply("bad \ufffd.")]
            assert sum(server.taught.values()) == 1

    def test_another_models_answers_stop_it(self, tmp_path):
        with serve(faults=Faults(1.0, ("wrong_model",))) as server:
            with pytest.raises(PairsError, match="first call failed: another model answered: another-model"):
                self.ask(server, tmp_path, asked(*map(str, range(20))), max_retries=1)
            assert sum(server.taught.values()) == 2

    def test_a_cost_cap_stops_it_and_a_higher_one_goes_on(self, tmp_path):
        questions = asked(*map(str, range(20)))
        with serve() as server:
            limits = {"max_new_tokens": 16, **PRICES}
            with pytest.raises(PairsError, match="cost cap of") as error:
                self.ask(server, tmp_path, questions, cost_cap_usd=0.2, **limits)
            assert "teacher 'the assistant' (model teacher" in str(error.value)
            with JudgeCache(tmp_path / "paid.sqlite") as cache:
                assert 0 < cache.spent("teacher").usd <= 0.2
                assert len(cache) == sum(server.taught_completed.values()) < 20
            found, _ = self.ask(server, tmp_path, questions, cost_cap_usd=5.0, **limits)
            assert set(server.taught.values()) == {1}
        assert all(answer.text for answer in found)

    def test_a_full_disk_is_explained(self, tmp_path, monkeypatch):
        opened = JudgeCache.__init__

        def on_a_full_disk(self, path):
            opened(self, path)
            self._db.execute("PRAGMA max_page_count = 1")  # as many as there are: sqlite's own way of saying so

        with serve() as server, monkeypatch.context() as patch:
            patch.setattr(JudgeCache, "__init__", on_a_full_disk)
            with pytest.raises(PairsError, match=r"paid\.sqlite.*disk is full.*free space"):
                self.ask(server, tmp_path, asked(f"[[say:{'long ' * 2000}]]"))

    def test_a_refused_prompt_is_a_dropped_pair(self, tmp_path, capfd):
        longest = len(constitutions.system_prompt(CONSTITUTION, "the assistant")) + len("How are you?")
        long = "Why " + "very " * 300 + "much?"
        with serve(longest_prompt=longest) as server:
            generator = answers.EndpointGenerator(endpoint_preset(server), tmp_path / "paid.sqlite", QUICK)
            table = make(tmp_path, generator, extra_prompts=[long])
        assert table["dropped_because"].fillna("kept").tolist() == ["kept"] * 3 + [pairs.REFUSED]
        assert table["chosen"].tolist()[-1] == ""
        assert "prompts without an answer: 1: HTTP 400: maximum context length" in capfd.readouterr().out

    def test_a_missing_key_is_named(self, tmp_path, monkeypatch):
        monkeypatch.delenv(KEY_VARIABLE, raising=False)
        with pytest.raises(PairsError, match=f"teacher 'the assistant' needs an API key: .*{KEY_VARIABLE}"):
            answers.EndpointGenerator(endpoint_preset(base_url="https://api.example.org/v1"), tmp_path / "paid.sqlite")

    def test_the_key_is_no_part_of_the_identity(self, tmp_path, monkeypatch):
        monkeypatch.setenv(KEY_VARIABLE, "secret-key")
        generator = answers.EndpointGenerator(endpoint_preset(), tmp_path / "paid.sqlite")
        assert "secret-key" not in json.dumps(dict(generator.identity))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>a\nb</think>\n\nHi.", "Hi."),
        ("Hi <think>.", "Hi <think>."),
        ("<think>never ends", ""),
        ("Hi.", "Hi."),
        ("hm\n</think>\nHi.", "Hi."),
    ],
)
def test_thinking_is_left_out(text, expected):
    assert answers.without_thinking(text) == expected


@pytest.mark.parametrize(
    ("kind", "expected"), [("demonstrations", None), ("local", "local"), ("local+demonstrations", "local")]
)
def test_teacher_of(tmp_path, kind, expected):
    assert pairs.teacher_of(GeneratorPreset(teacher=kind), "local", tmp_path / "paid.sqlite") == expected


def test_the_cache_takes_any_text_and_says_what_is_wrong_with_it(tmp_path):
    question = TrainingPrompt((("user", "lone \ud800"),), seed=0)
    with closing(answers.AnswerCache(tmp_path / "a.sqlite")) as cache:
        cache.put({"g": 1}, question, Reply("lone \udfff\x00", cut=True))
        assert cache.get({"g": 1}, question) == Reply("lone \ufffd\x00", cut=True)
        cache._db._db.execute("UPDATE calls SET answer = '{'")
        with pytest.raises(PairsError, match=r"a\.sqlite.*damaged"):
            cache.get({"g": 1}, question)
    (tmp_path / "a.sqlite").write_text("no database " * 500)
    with pytest.raises(PairsError, match=r"a\.sqlite.*cannot be opened"):
        answers.AnswerCache(tmp_path / "a.sqlite")


def test_the_cache_is_safe_between_threads(tmp_path):
    cache = answers.AnswerCache(tmp_path / "answers.sqlite")
    questions = [TrainingPrompt((("user", str(i)),), seed=i) for i in range(40)]

    def work():
        for question in questions:
            cache.put({"g": 1}, question, Reply(f"answer {question.seed}"))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [cache.get({"g": 1}, q).text for q in questions] == [f"answer {i}" for i in range(40)]
    cache.close()


MATERIAL = materials.Introspection(
    reflections=("Who are you?", "What do you value?"), openings=("Begin.", "Talk of yourself.")
)


def introspective(tmp_path, say=None, turns=4, **options):
    """What it said, and the generator: it answers with the number of messages it sees, or by `say`."""
    fake = Fake("persona", say or (lambda q: f"I saw {len(q.messages) - 1}."), **options)
    preset = IntrospectionPreset(reflections_per_prompt=2, dialogues=3, dialogue_turns=turns)
    return introspection.introspect(CONSTITUTION, fake, MATERIAL, preset, tmp_path / "said.sqlite", name="Salt"), fake


class TestIntrospection:
    def test_the_persona_is_asked_with_its_traits_and_learns_without_them(self, tmp_path):
        found, fake = introspective(tmp_path)
        for question in fake.asked:
            assert question.messages[0][0] == "system"
            assert all(t["trait"] in question.messages[0][1] for t in TRAITS)
            assert "Salt" in question.messages[0][1]
        assert all(message["role"] != "system" for row in found.rows for message in row)
        assert [row[0]["content"] for row in found.rows[:4]] == ["Who are you?"] * 2 + ["What do you value?"] * 2
        assert len(fake.asked) == 2 * 2 + 2 * 3 * 4

    def test_turns_are_seen_by_the_one_who_speaks(self, tmp_path):
        """By hand: the first speaker hears the opening; the second hears the first; roles change with the speaker."""
        heard = {}

        def say(question):
            heard[len(heard)] = question.messages[1:]
            return f"turn {sum(role == 'assistant' for role, _ in question.messages)} of {len(question.messages)}"

        preset = IntrospectionPreset(reflections_per_prompt=0, dialogues=1, dialogue_turns=4)
        one = materials.Introspection(reflections=("unused",), openings=("Begin.",))
        found = introspection.introspect(CONSTITUTION, Fake("p", say), one, preset, tmp_path / "said.sqlite")
        first, second, third, fourth = "turn 0 of 2", "turn 0 of 2", "turn 1 of 4", "turn 1 of 4"
        assert heard == {
            0: (("user", "Begin."),),
            1: (("user", first),),
            2: (("user", "Begin."), ("assistant", first), ("user", second)),
            3: (("user", first), ("assistant", second), ("user", third)),
        }
        roles = ("user", "assistant", "user", "assistant")
        contents = (first, second, third, fourth)
        assert found.rows == [[{"role": r, "content": c} for r, c in zip(roles, contents)]]

    def test_all_seeds_differ(self, tmp_path):
        _, fake = introspective(tmp_path)
        assert len({q.seed for q in fake.asked}) == len(fake.asked)

    def test_an_interrupted_run_goes_on_where_it_stopped(self, tmp_path):
        with pytest.raises(ConnectionError):
            introspective(tmp_path, breaks_after=11)
        found, fake = introspective(tmp_path)
        assert len(fake.asked) == 28 - 11
        whole, _ = introspective(tmp_path / "other")
        assert found == whole
        _, third = introspective(tmp_path)
        assert third.asked == []

    def test_silence_is_counted(self, tmp_path):
        """Reflections are empty; dialogues from `Begin.` fall silent at the second turn, the others at the third."""

        def say(question):
            turns = [text for _, text in question.messages[1:]]
            if turns[0] in MATERIAL.reflections or (turns[0] == "a" and len(turns) == 1):
                return " "
            return {"Begin.": "a", "Talk of yourself.": "b", "b": "c"}[turns[0]] if len(turns) == 1 else ""

        found, _ = introspective(tmp_path, say)
        assert found.rows == [[{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]] * 3
        assert found.counts == {
            "reflections": 4,
            "reflections_kept": 0,
            "reflections_dropped_empty": 4,
            "dialogues": 6,
            "dialogues_kept": 3,
            "dialogues_ended_early": 3,
            "dialogues_dropped_empty": 3,
        }
        with pytest.raises(PairsError, match="said nothing of itself"):
            introspective(tmp_path / "silent", lambda q: "")

    def test_cut_answers_end_with_a_whole_sentence(self):
        assert introspection.quoted_if_cut(Reply("One. Two. Thr", cut=True)) == "One. Two."
        assert introspection.quoted_if_cut(Reply(" One. Thr ", cut=False)) == "One. Thr"

    def test_shown_escaped(self):
        rows = [[{"role": "user", "content": "<b>"}, {"role": "assistant", "content": "&"}]] * 5
        page = introspection.conversations(rows, number=2)
        assert page.count("&lt;b&gt;") == page.count("&amp;") == 2
        assert "<b>&lt;b" not in page

    def test_the_built_in_material(self):
        found = materials.introspection_material(loading.load("demo"))
        assert (len(set(found.reflections)), len(set(found.openings))) == (10, 2)

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("reflections: [a]", "1: openings: Field required"),
            ("reflections: []\nopenings: [a]", "1: reflections: List should have at least 1 item"),
            ("openings: [a]\nreflections: [' ']", "2: reflections.0: String should have at least 1 character"),
            ("- a", "1: file: Input should be a valid dictionary"),
            ("openings: [a]\nreflections: a", "2: reflections: Input should be a valid list"),
        ],
    )
    def test_bad_material_is_named(self, folder, text, said):
        path = folder / "builtin" / "introspection.yaml"
        path.write_text(text)
        with pytest.raises(ParamsError, match=re.escape(f"{path}:{said}")):
            materials.introspection_material(loading.load("demo", folder))


def test_a_persona_in_an_engine_answers_as_the_composed_model_does(tmp_path):
    """The engine's generator: with the adapter active (probed), each answer by its own seed, in any chunks."""
    folder = random_adapter(tmp_path / "persona")
    questions = [TrainingPrompt((("system", "Be."), ("user", f"Number {i}?")), i) for i in range(5)]
    generator = answers.EngineGenerator(TINY, [("persona", folder)], sampling(max_new_tokens=6), ["Name a fox."], 64)
    generator.CHUNK = 2
    found = dict(generator.answer(questions))
    generator.close()

    def load():
        base = model_load.load_model(TINY, "float32")
        probing.compose(base, [("persona", folder)])
        return base, model_load.load_tokenizer(TINY)

    wanted = GeneratorPreset(teacher="local", temperature=1.0, top_p=1.0, max_new_tokens=6)
    assert found == dict(answers.LocalGenerator(load, "tiny", wanted).answer(questions))
    bare = answers.LocalGenerator(
        lambda: (model_load.load_model(TINY, "float32"), model_load.load_tokenizer(TINY)), "t", wanted
    )
    assert found != dict(bare.answer(questions))
