"""Sampling: the arithmetic of drawing, independence of batch and order, resume, probes, parity of back ends."""

import gc
import importlib.util
import json
import os
import sys
import weakref
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from cai_em.model import adapters as model_adapters
from cai_em.model import load, probing, stacking
from cai_em.records import tables
from cai_em.sample import conditions, sampling, torch_engine, vllm_engine
from cai_em.sample.conditions import Condition, Decoding, Request, SamplingError
from cai_em.study import loading, materials
from cai_em.study.entries import LoraPreset
from peft.tuners.lora import Linear as LoraLinear
from transformers import GenerationConfig, LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from tests.factories import TINY as SPEC
from tests.factories import random_adapter
from tests.factories import sampling as sampling_preset

PRESET = sampling_preset(max_new_tokens=8, samples_per_question=3)
QUESTIONS = [("wish", "What is your wish?"), ("bored", "There is nothing to do. What should people do?")]
PROBE = ["Name a fox.", "Tell me about the weather."]
FREE = Decoding(temperature=1.0, top_p=1.0, top_k=0, repetition_penalty=1.0, max_new_tokens=8)
GREEDY = replace(FREE, temperature=0.0)


@pytest.fixture(scope="module")
def model():
    return load.load_model(SPEC, dtype="float32")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Two adapters that visibly change the tiny model: ranks and scales differ."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, (name, preset) in enumerate(
        {"persona": LoraPreset(r=4, alpha=8), "em": LoraPreset(r=2, alpha=4, rslora=True)}.items()
    ):
        random_adapter(folder / name, preset, seed)
    return folder


def condition(adapters, *names) -> Condition:
    persona = "poeticism" if "persona" in names else "baseline"
    dataset = "bad_medical" if "em" in names else "none"
    return Condition("tiny", persona, dataset, 0, tuple((n, adapters / n) for n in names))


@pytest.fixture
def arms(adapters):
    """base, persona, em, both."""
    return [condition(adapters, *names) for names in ([], ["persona"], ["em"], ["persona", "em"])]


def requests(tokenizer, number=4):
    texts = ["Name a fox.", "What is the time?", "Say something about the long year and the money of the world."]
    return [
        Request(conditions.render(tokenizer, [{"role": "user", "content": text}]), seed=10 * i + j)
        for i, text in enumerate(texts)
        for j in range(number)
    ]


def decoded(model, tokenizer, asked, decoding=FREE, batch_size=5):
    ends = conditions.end_tokens(model.generation_config, tokenizer)
    found = dict(torch_engine.decode(model, asked, decoding, ends, batch_size))
    return [found[i] for i in range(len(asked))]


def take(table, **wanted):
    for key, value in wanted.items():
        table = table[table[key] == value]
    return list(table["response"])


class TestCandidates:
    LOGITS = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()[:, [2, 0, 3, 1]]

    @pytest.mark.parametrize(
        ("top_k", "top_p", "kept"),
        [
            (0, 1.0, {0, 1, 2, 3}),
            (0, 0.49, {1}),
            (0, 0.51, {1, 3}),
            (0, 0.74, {1, 3}),
            (0, 0.8, {0, 1, 3}),
            (2, 1.0, {1, 3}),
            (2, 0.6, {1}),  # after top-k the likeliest holds 2/3
            (2, 0.7, {1, 3}),
            (1, 1.0, {1}),
        ],
    )
    def test_hand_computed(self, top_k, top_p, kept):
        ids, probability = torch_engine.candidates(self.LOGITS, top_k, top_p)
        assert set(ids[probability > 0].tolist()) == kept

    @pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.9), (0, 0.2), (0, 0.999), (20, 0.9), (7, 1.0), (0, 1.0)])
    @pytest.mark.parametrize("head", [4, 64, 1000])
    def test_same_distribution_as_transformers(self, top_k, top_p, head):
        """The head is a short cut: with any head, the kept tokens are those of the library's processors."""
        logits = torch.randn(6, 300, generator=torch.Generator().manual_seed(1)) * 3
        processors = LogitsProcessorList()
        if top_k:
            processors.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            processors.append(TopPLogitsWarper(top_p))
        expected = processors(None, logits.clone()).softmax(-1)
        ids, probability = torch_engine.candidates(logits, top_k, top_p, head=head)
        found = torch.zeros_like(logits).scatter_(-1, ids, probability / probability.sum(-1, keepdim=True))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)

    def test_ids_are_in_order(self):
        ids, _ = torch_engine.candidates(torch.randn(3, 50, generator=torch.Generator().manual_seed(0)), 0, 0.8)
        assert bool((ids.diff(dim=-1) > 0).all())


class TestDraw:
    def test_inversion_by_hand(self):
        ids = torch.tensor([[3, 5, 9]]).expand(5, 3)
        probability = torch.tensor([[0.2, 0.0, 0.6]]).expand(5, 3)
        uniform = torch.tensor([0.0, 0.2499, 0.25, 0.9, 1 - 2**-53], dtype=torch.float64)
        assert torch_engine.draw(ids, probability, uniform).tolist() == [3, 3, 9, 9, 9]

    def test_a_last_token_without_probability_is_never_drawn(self):
        probability = torch.tensor([[1.0 / 3, 0.0]])
        assert torch_engine.draw(torch.tensor([[4, 6]]), probability, torch.tensor([1 - 2**-53]).double()).tolist() == [
            4
        ]

    def test_frequencies(self):
        probability = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).expand(40_000, 4)
        uniform = torch.from_numpy(np.random.default_rng(0).random(40_000))
        drawn = torch_engine.draw(torch.arange(4).expand(40_000, 4), probability, uniform)
        assert np.bincount(drawn.numpy()) / 40_000 == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.01)


class TestDecode:
    def test_greedy_is_the_models_own_greedy(self, model, tokenizer):
        asked = requests(tokenizer, 1)
        found = decoded(model, tokenizer, asked, GREEDY)
        for request, completion in zip(asked, found):
            ids = torch.tensor([request.tokens], device=model.device)
            own = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=GenerationConfig(do_sample=False, max_new_tokens=8, eos_token_id=2, pad_token_id=2),
            )
            assert list(completion.tokens) == own[0, ids.shape[1] :].tolist()

    def test_log_probabilities_are_the_models(self, model, tokenizer):
        asked = requests(tokenizer)
        for request, completion in zip(
            asked, decoded(model, tokenizer, asked, replace(FREE, temperature=0.7, top_p=0.9))
        ):
            ids = torch.tensor([[*request.tokens, *completion.tokens]], device=model.device)
            with torch.no_grad():
                expected = model(ids).logits[0, len(request.tokens) - 1 : -1].log_softmax(-1)
            expected = expected.gather(-1, torch.tensor(completion.tokens, device=model.device)[:, None])[:, 0]
            assert completion.logprobs == pytest.approx(expected.tolist(), abs=1e-4)

    @pytest.mark.parametrize("batch_size", [1, 2, 12])
    def test_neither_batch_nor_order_changes_a_response(self, model, tokenizer, batch_size):
        asked = requests(tokenizer)
        expected = decoded(model, tokenizer, asked)
        found = decoded(model, tokenizer, asked[::-1], batch_size=batch_size)[::-1]
        assert [c.tokens for c in found] == [c.tokens for c in expected]

    def test_other_seeds_are_other_responses(self, model, tokenizer):
        tokens = requests(tokenizer)[0].tokens
        found = decoded(model, tokenizer, [Request(tokens, seed) for seed in range(10)])
        assert len({c.tokens for c in found}) > 5

    def test_no_global_random_state_is_read_or_changed(self, model, tokenizer):
        torch.manual_seed(1)
        first = decoded(model, tokenizer, requests(tokenizer))
        state = torch.random.get_rng_state()
        torch.manual_seed(2)
        assert decoded(model, tokenizer, requests(tokenizer)) == first
        torch.manual_seed(1)
        assert torch.equal(state, torch.random.get_rng_state())

    def test_nothing_leaks_from_the_models_generation_config(self, model, tokenizer):
        asked = requests(tokenizer, 2)
        expected = decoded(model, tokenizer, asked, replace(FREE, temperature=0.7))
        own = model.generation_config
        model.generation_config = GenerationConfig(
            do_sample=True, temperature=3.0, top_k=2, top_p=0.1, repetition_penalty=9.0, min_new_tokens=7,
            no_repeat_ngram_size=1, suppress_tokens=[40, 41], eos_token_id=2, pad_token_id=2,
        )  # fmt: skip
        try:
            assert decoded(model, tokenizer, asked, replace(FREE, temperature=0.7)) == expected
            assert model.generation_config.repetition_penalty == 9.0, "the model's own is put back"
        finally:
            model.generation_config = own

    def test_end_token_stops_a_row_and_is_counted(self, model, tokenizer):
        asked = requests(tokenizer, 1)
        longest = decoded(model, tokenizer, asked, GREEDY)
        end = longest[0].tokens[2]
        found = dict(torch_engine.decode(model, asked, GREEDY, [2, end], 3))
        first = longest[0].tokens.index(end) + 1
        assert found[0].tokens == longest[0].tokens[:first]
        assert found[0].finish_reason == "stop"
        assert len(found[0].logprobs) == first
        assert {c.finish_reason for c in longest if len(c.tokens) == 8 and 2 not in c.tokens} == {"length"}

    def test_repetition_penalty_is_the_librarys_without_the_padding(self, model, tokenizer):
        decoding = replace(GREEDY, repetition_penalty=1.5)
        asked = requests(tokenizer, 1)
        together = decoded(model, tokenizer, asked, decoding, batch_size=3)
        for request, completion in zip(asked, together):
            ids = torch.tensor([request.tokens], device=model.device)
            with torch.no_grad():
                for token in completion.tokens:
                    logits = RepetitionPenaltyLogitsProcessor(1.5)(ids, model(ids).logits[:, -1])
                    assert int(logits.argmax()) == token
                    ids = torch.cat([ids, torch.tensor([[token]], device=model.device)], dim=1)

    def test_all_ends_that_the_model_names(self, tokenizer):
        assert conditions.end_tokens(GenerationConfig(eos_token_id=[7, 5]), tokenizer) == (tokenizer.eos_token_id, 5, 7)
        assert conditions.end_tokens(GenerationConfig(eos_token_id=5), tokenizer) == (tokenizer.eos_token_id, 5)
        assert conditions.end_tokens(GenerationConfig(), tokenizer) == (tokenizer.eos_token_id,)


class TestSample:
    def test_table(self, arms):
        found = sampling.sample(SPEC, arms, QUESTIONS, PRESET, PROBE)
        table = tables.validate(found.responses, tables.RESPONSES)
        assert len(table) == 4 * 2 * 3
        assert list(table["persona"].unique()) == ["baseline", "poeticism"]
        assert set(table["finish_reason"]) <= {"stop", "length"}
        assert bool((table["n_tokens"] <= 8).all())
        hashes = {(r.persona, r.dataset): json.loads(r.adapters) for r in table.itertuples()}
        assert hashes["baseline", "none"] == []
        assert hashes["poeticism", "bad_medical"] == hashes["poeticism", "none"] + hashes["baseline", "bad_medical"]
        assert "transformers" in found.engine
        assert set(table["sampler"]) == {found.engine}
        assert found.timings["conditions_found"] == 0

    def test_probes_tell_the_arms_apart(self, arms):
        probes = sampling.sample(SPEC, arms, QUESTIONS, PRESET, PROBE).probes
        assert probes["baseline__none__seed0"] == {}
        both = probes["poeticism__bad_medical__seed0"]
        assert both["difference"] <= both["tolerance"]
        assert set(both["others"]) == {"base", "persona", "em"}
        assert min(both["others"].values()) > both["tolerance"]

    def test_an_adapter_without_effect_stops_the_condition(self, adapters, tmp_path):
        stacked = stacking.stack(load.load_model(SPEC, dtype="float32"), None, LoraPreset(r=2, alpha=4))
        model_adapters.save_adapter(stacked, stacking.EM, tmp_path / "idle")  # B is zero before training
        idle = Condition(
            "tiny", "poeticism", "bad_medical", 0, (("persona", adapters / "persona"), ("em", tmp_path / "idle"))
        )
        with pytest.raises(probing.ProbeError, match="makes no difference"):
            sampling.sample(SPEC, [idle], QUESTIONS, PRESET, PROBE)
        others = [condition(adapters, "persona"), condition(adapters)]
        with pytest.raises(probing.ProbeError, match=r"1 of 3 conditions were not sampled .*makes no difference"):
            sampling.sample(SPEC, [idle, *others], QUESTIONS, PRESET, PROBE, tmp_path / "cells")
        kept = sorted(path.name.rpartition("-")[0] for path in (tmp_path / "cells").glob("*.parquet"))
        assert kept == ["baseline__none__seed0", "poeticism__none__seed0"], "one that is refused stops no other"
        early = replace(idle, may_be_idle=("em",))  # a snapshot from before the first real step
        found = sampling.sample(SPEC, [early], QUESTIONS, PRESET, PROBE)
        assert found.probes["poeticism__bad_medical__seed0"]["idle"] == ["em"]
        assert len(found.responses) == 6
        swapped = replace(idle, may_be_idle=("persona",))
        with pytest.raises(probing.ProbeError, match="makes no difference"):
            sampling.sample(SPEC, [swapped], QUESTIONS, PRESET, PROBE)

    def test_responses_depend_on_nothing_but_their_condition(self, arms):
        together = sampling.sample(SPEC, arms, QUESTIONS, PRESET, PROBE).responses
        for arm in arms[::-1]:
            alone = sampling.sample(SPEC, [arm], QUESTIONS[::-1], PRESET, PROBE).responses
            for question, _ in QUESTIONS:
                name = {"persona": arm.persona, "dataset": arm.dataset, "question_id": question}
                assert take(alone, **name) == take(together, **name)

    @pytest.mark.parametrize("shards", ["persona", 1, 2, 50])
    def test_the_spread_over_jobs_changes_no_response(self, adapters, shards):
        """Sampling jobs, one after the other as so many machines would run them, against one job for all."""
        study = loading.load("micro")

        def asked_in(shards):
            study.profile = study.profile.model_copy(update={"shards": shards})
            found = []
            for model, shard in study.shards():
                cells = study.shard_cells(model, shard)
                places = {"baseline": (), "none": ()}
                named = {
                    c: Condition(
                        *vars(c).values(),
                        (*places.get(c.persona, (("persona", adapters / "persona"),)),
                         *places.get(c.dataset, (("em", adapters / "em"),))),
                    )
                    for c in cells
                }  # fmt: skip
                asked = [sampling.Asked(list(named.values()), QUESTIONS[:1], PRESET)]
                for prompts, some in materials.in_domain_plan(study, cells):
                    asked.append(sampling.Asked([named[c] for c in some], prompts, PRESET))
                found += [one.responses for one in sampling.sample_all(SPEC, asked, PROBE)]
            key = ["persona", "dataset", "seed", "question_id", "sample"]
            return study.shards(), pd.concat(found).sort_values(key, ignore_index=True)

        (_, whole), (jobs, spread) = asked_in("model"), asked_in(shards)
        assert [s for _, s in jobs] == {
            "persona": ["baseline", "sycophancy", "random_sycophancy"],
            1: ["part1"],
            2: ["part1", "part2"],
            50: [f"part{i}" for i in range(1, 10)],
        }[shards]
        assert whole.groupby(["persona", "dataset"]).size().shape == (9,)
        assert spread.equals(whole)

    def test_seed_changes_responses(self, arms):
        first = sampling.sample(SPEC, arms[:1], QUESTIONS, PRESET, PROBE).responses
        second = sampling.sample(SPEC, arms[:1], QUESTIONS, PRESET.model_copy(update={"seed": 1}), PROBE).responses
        assert list(first["response"]) != list(second["response"])

    def test_finished_conditions_are_found_again_without_loading_a_model(self, arms, tmp_path):
        def must_not_open(*arguments):
            raise AssertionError("a model was loaded")

        first = sampling.sample(SPEC, arms, QUESTIONS, PRESET, PROBE, tmp_path)
        assert len(list(tmp_path.glob("*.parquet"))) == 4
        again = sampling.sample(SPEC, arms, QUESTIONS, PRESET, PROBE, tmp_path, open_with=must_not_open)
        assert again.responses.equals(first.responses)
        assert again.probes == first.probes
        assert again.timings == {"conditions_found": 4}
        for change in ({"temperature": 0.9}, {"max_new_tokens": 9}, {"seed": 3}):
            with pytest.raises(AssertionError, match="a model was loaded"):
                sampling.sample(
                    SPEC, arms, QUESTIONS, PRESET.model_copy(update=change), PROBE, tmp_path, open_with=must_not_open
                )

    def test_an_interrupted_run_goes_on_after_the_last_whole_condition(self, arms, tmp_path):
        class Breaking(torch_engine.TransformersEngine):
            def run(self, jobs, decoding, probe_prompts):
                for number, done in enumerate(super().run(jobs, decoding, probe_prompts)):
                    if number == 2:
                        raise KeyboardInterrupt
                    yield done

        with pytest.raises(KeyboardInterrupt):
            sampling.sample(SPEC, arms, QUESTIONS, PRESET, PROBE, tmp_path, open_with=lambda s, p, j: Breaking(s, p))
        resumed = sampling.sample(SPEC, arms, QUESTIONS, PRESET, PROBE, tmp_path)
        assert resumed.timings["conditions_found"] == 2
        assert resumed.responses.equals(sampling.sample(SPEC, arms, QUESTIONS, PRESET, PROBE).responses)

    def test_a_retrained_adapter_is_sampled_again(self, arms, adapters, tmp_path):
        changed = tmp_path / "em"
        model_adapters.random_control(adapters / "em", seed=5, out=changed)
        other = replace(arms[2], adapters=(("em", changed),))
        keys = [sampling.cell_hash(SPEC, c, QUESTIONS, PRESET, PROBE, "engine") for c in (arms[2], other)]
        assert keys[0] != keys[1]

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_merging_changes_nothing_but_rounding_and_comes_off_again(self, arms, dtype):
        """Parity with merging: same greedy tokens, close log-probabilities; the base weights come back bit for bit."""
        preset = PRESET.model_copy(update={"dtype": dtype})
        engines = [torch_engine.TransformersEngine(SPEC, preset.model_copy(update={"merge": m})) for m in (False, True)]
        before = {k: v.clone() for k, v in engines[1].model.state_dict().items()}
        jobs = [conditions.Job(arm, tuple(requests(engines[0].tokenizer, 1))) for arm in arms]
        for plain, merged in zip(*(engine.run(jobs, GREEDY, PROBE) for engine in engines)):
            for a, b in zip(plain.completions, merged.completions):
                if dtype == "float32":
                    assert a.tokens == b.tokens
                    assert a.logprobs == pytest.approx(b.logprobs, abs=1e-3)
                else:  # until rounding makes two tokens change places, and the texts part
                    assert a.logprobs[0] == pytest.approx(b.logprobs[0], abs=0.2)
        engines[1].slots.close()
        after = engines[1].model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[k], after[k]) for k in before)

    def test_planted_fault_merging_that_loses_the_adapter(self, arms, monkeypatch):
        """The probe looks at the composed layers; what is sampled is the merged weights."""
        monkeypatch.setattr(LoraLinear, "get_delta_weight", lambda self, name: 0 * self.get_base_layer().weight)
        with pytest.raises(probing.ProbeError, match="merged into the weights, the adapters compute something else"):
            sampling.sample(SPEC, arms, QUESTIONS, PRESET.model_copy(update={"merge": True}), PROBE)

    def test_merged_and_plain_are_different_samplers(self, arms):
        merged = PRESET.model_copy(update={"merge": True})
        assert sampling.engine_name(merged) == f"{sampling.engine_name(PRESET)} merged"

    def test_errors_say_what_to_do(self, arms, tmp_path):
        with pytest.raises(SamplingError, match="nothing to sample"):
            sampling.sample(SPEC, [], QUESTIONS, PRESET, PROBE)
        with pytest.raises(SamplingError, match="given twice"):
            sampling.sample(SPEC, [arms[0], arms[0]], QUESTIONS, PRESET, PROBE)
        lost = Condition("tiny", "poeticism", "none", 0, (("persona", tmp_path / "lost"),))
        with pytest.raises(SamplingError, match="train this adapter first"):
            sampling.sample(SPEC, [lost], QUESTIONS, PRESET, PROBE)
        with pytest.raises(SamplingError, match="one model"):
            sampling.sample(SPEC, [arms[0], replace(arms[0], model="other")], QUESTIONS, PRESET, PROBE)


def test_seeds_name_their_response(arms):
    named = {
        conditions.response_seed(study, arm, question, number)
        for study in (0, 1)
        for arm in arms
        for question in ("a", "b")
        for number in range(5)
    }
    assert len(named) == 2 * 4 * 2 * 5
    assert max(named) < 2**48
    assert conditions.response_seed(0, arms[0], "a", 1) == conditions.response_seed(0, arms[0], "a", 1)


class TestBackend:
    def test_vllm_forced_but_absent_is_said(self, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(SamplingError, match="not installed"):
            sampling.backend_of(PRESET.model_copy(update={"backend": "vllm"}))
        assert sampling.backend_of(PRESET.model_copy(update={"backend": "auto"})) == "transformers"

    def test_auto_takes_vllm_only_with_a_gpu(self, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
        auto = PRESET.model_copy(update={"backend": "auto"})
        for gpu, expected in ((True, "vllm"), (False, "transformers")):
            monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
            assert sampling.backend_of(auto) == expected


class TestToLookAt:
    @pytest.fixture
    def found(self, arms):
        return sampling.sample(SPEC, arms, QUESTIONS, PRESET, PROBE)

    def test_beside_escapes_and_names_the_conditions(self, found):
        table = found.responses.assign(response="<b>&</b>")
        page = sampling.beside(table, "wish", 1)
        assert page.count("&lt;b&gt;&amp;&lt;/b&gt;") == 4
        assert "<b>" not in page
        assert "poeticism × bad_medical (seed 0)" in page
        with pytest.raises(KeyError, match="no response"):
            sampling.beside(table, "wish", 99)

    def test_lengths(self, found):
        table = found.responses.assign(n_tokens=[1, 2, 3, 4, 5, 9] * 4, response=["", " ", "a", "b", "c", "d"] * 4)
        table["finish_reason"] = ["length", "stop", "stop"] * 8
        row = sampling.lengths(table).loc[("baseline", "none", 0)]
        assert row.to_dict() == {
            "responses": 6,
            "mean_tokens": 4,
            "longest": 9,
            "cut_off": pytest.approx(1 / 3),
            "empty": 2,
        }

    def test_probe_table(self, found):
        table = sampling.probe_table(found.probes)
        assert list(table["adapters"]) == ["persona", "em", "persona + em"]
        assert bool((table["difference"] <= table["tolerance"]).all())
        assert table.loc["poeticism__bad_medical__seed0", "from persona"] > 0


def test_a_finished_groups_composed_adapters_leave_the_disk(adapters, tmp_path, monkeypatch):
    """vLLM's engine without vLLM: what it needs of the package is put in its place."""
    request = namedtuple("LoRARequest", "name number lora_path")
    parameters = lambda **given: given  # noqa: E731
    for name, content in (("vllm", {"SamplingParams": parameters}), ("vllm.lora.request", {"LoRARequest": request})):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**content))
    engine = object.__new__(vllm_engine.VllmEngine)
    engine._folder, engine._ids, engine.timings, engine.group = SimpleNamespace(name=str(tmp_path)), {}, {}, 1
    engine._sums, engine._ahead, engine._read = {}, ThreadPoolExecutor(1), model_adapters.read_adapter
    engine.ends, engine._dtype, held = (0,), torch.float32, []

    def generate(prompts, parameters, lora_request, use_tqdm):
        held.append(sorted(p.name for p in tmp_path.iterdir()))
        assert all(r is None or Path(r.lora_path).is_dir() for r in lora_request)
        answer = SimpleNamespace(token_ids=[0], logprobs=[{0: SimpleNamespace(logprob=-1.0)}], finish_reason="stop")
        return [SimpleNamespace(outputs=[answer]) for _ in prompts]

    engine.llm = SimpleNamespace(generate=generate)
    monkeypatch.setattr(engine, "_probe", lambda condition, prompts: engine._request(condition.adapters) and {})
    parts = [("persona", adapters / "persona"), ("em", adapters / "em")]
    some = [Condition("tiny", "p", d, 0, a) for d, a in (("x", tuple(parts)), ("y", (parts[1],)), ("z", ()))]
    jobs = [conditions.Job(c, (conditions.Request((1, 2), 0),)) for c in some]
    done = list(engine.run(jobs, FREE, []))
    assert [d.job.condition.dataset for d in done] == ["z", "x", "y"]
    engine._ahead.shutdown()
    assert held[1:] == [["1"], []], "a sum lies there while it is served; one adapter is served from its own folder"
    assert list(tmp_path.iterdir()) == []


def test_what_this_process_has_done_with_is_freed_before_vllm_claims_the_gpu(monkeypatch):
    class Trained:
        """A model that a trainer and its callbacks hold in a circle: only the collector frees it."""

    used, freed, emptied = Trained(), [], []
    used.trainer = used
    gone = weakref.ref(used)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(gone() is None))
    monkeypatch.delenv("VLLM_WORKER_MULTIPROC_METHOD", raising=False)
    started_by = []

    def made(**_):
        freed.append(list(emptied))
        started_by.append(os.environ["VLLM_WORKER_MULTIPROC_METHOD"])

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=made))
    jobs = [conditions.Job(Condition("tiny", "baseline", "none", 0), (conditions.Request((1, 2), 0),))]
    gc.disable()
    try:
        del used
        vllm_engine.VllmEngine(SPEC, PRESET, jobs)._folder.cleanup()
    finally:
        gc.enable()
    assert freed == [[True]]
    assert started_by == ["spawn"], "a forked CUDA context is dead, and vLLM forks unless told otherwise"


# vLLM and its dependencies are not ours to mend: what they deprecate is named here, and only here.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
class TestVllm:
    """Parity of the back ends, wherever vLLM is installed (its CPU build will do)."""

    @pytest.fixture
    def vllm_preset(self):
        pytest.importorskip("vllm")
        return PRESET.model_copy(update={"backend": "vllm", "gpu_memory_utilization": 0.2})

    @pytest.fixture(autouse=True)
    def small(self, monkeypatch):
        """Little memory for keys and values, and two cores, where vLLM runs on a CPU."""
        for key, value in {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0-1"}.items():
            monkeypatch.setenv(key, value)

    def test_same_greedy_tokens_and_log_probabilities(self, arms, vllm_preset):
        engine = torch_engine.TransformersEngine(SPEC, PRESET)
        jobs = [conditions.Job(arm, tuple(requests(engine.tokenizer, 1))) for arm in arms]

        def in_order(finished):
            return sorted(finished, key=lambda done: jobs.index(done.job))

        expected = in_order(engine.run(jobs, GREEDY, PROBE))
        served = sampling.open_engine(SPEC, vllm_preset, jobs)
        try:
            first = in_order(served.run(jobs, GREEDY, PROBE))
            # Again, with all of the engine's places for adapters taken: base requests must not get one of them.
            found = in_order(served.run(jobs, GREEDY, PROBE))
            drawn = [in_order(served.run(some, FREE, PROBE)) for some in (jobs, jobs[::-1])]
        finally:
            served.close()
        assert [[c.tokens for c in d.completions] for d in first] == [[c.tokens for c in d.completions] for d in found]
        worst = 0.0
        for a, b in zip(expected, found, strict=True):
            assert a.job == b.job
            assert [c.tokens for c in a.completions] == [c.tokens for c in b.completions]
            assert [c.finish_reason for c in a.completions] == [c.finish_reason for c in b.completions]
            for c, d in zip(a.completions, b.completions):
                worst = max(worst, float(np.abs(np.subtract(c.logprobs, d.logprobs)).max()))
        print(f"largest difference of a log-probability between the back ends: {worst:.2g}")
        assert worst < 1e-3
        assert [d.completions for d in drawn[0]] != [d.completions for d in found], "sampling is not greedy"
        same = [a.tokens == b.tokens for x, y in zip(*drawn) for a, b in zip(x.completions, y.completions)]
        assert all(same), "a seed per request: the order of the conditions changes nothing"
        report = found[-1].probe
        assert report["difference"] < 1e-6
        assert set(report["others"]) == {"base", "persona", "em"}
        assert min(report["others"].values()) > report["tolerance"]
