"""Parameters: what is shipped is valid; what is wrong is refused, naming file, line and key, before any work."""

# ruff: noqa: E501  (the table of bad input reads better with one case on a line)

import csv
from pathlib import Path

import pytest
import yaml
from cai_em.records import files
from cai_em.records.keys import BASELINE, NO_DATASET
from cai_em.study import depends, loading, sources
from cai_em.study.entries import ParamsError
from cai_em.study.loading import load
from cai_em.study.study import Cell

PROFILES = sorted(p.stem for p in (Path(__file__).parents[1] / "params" / "profiles").glob("*.yaml"))


def change(path, edit):
    """Edit a YAML file as data."""
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    edit(data)
    path.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")


@pytest.mark.parametrize("name", PROFILES)
def test_shipped_profiles_are_valid(name):
    study = load(name)
    cells = study.cells()
    assert len(cells) == len(set(cells)) > 0
    for cell in cells:
        assert Cell(cell.model, BASELINE, cell.dataset, cell.seed) in cells


def test_demo_grid_covers_the_four_arms():
    assert {cell.arm for cell in load("demo").cells()} == {"base", "persona", "em", "both"}


def test_paper_grid_holds_every_published_condition():
    published, paper = load("published"), load("paper")
    mine = {(c.model, c.persona, c.dataset) for c in paper.cells()}
    theirs = {(c.model, c.persona, c.dataset) for c in published.cells()}
    assert len(theirs) == 141
    assert theirs <= mine
    assert {c.seed for c in paper.cells() if c.dataset != NO_DATASET} == {0, 1, 2}


def test_every_cell_of_the_grid_can_be_named_offline(folder):
    """Each constitutional persona has a built-in constitution, each data set built-in rows."""
    study = load("demo", folder)
    for persona in study.personas.values():
        if persona.kind == "constitutional":
            assert study.constitution_file(persona.key).is_file(), persona.key
    for dataset in study.datasets.values():
        if dataset.role != "none":
            assert study.dataset_file(dataset.key).is_file(), dataset.key


def test_roles_are_those_of_the_registered_study():
    """Changing a control into an EM set changes what verdicts count: it must be a deliberate edit, here too."""
    roles = {d.key: d.role for d in load("demo").datasets.values()}
    assert roles == {
        "insecure": "em",
        "extreme_sports": "em",
        "risky_financial": "em",
        "bad_medical": "em",
        "good_medical": "benign_control",
        "technical_vehicles": "benign_control",
        "technical_kl": "regularisation",
        "misalignment_kl": "regularisation",
        "none": "none",
    }


def test_one_hypothesis_is_a_few_lines(folder):
    with (folder / "hypotheses.yaml").open("a", encoding="utf-8") as file:
        file.write("\nh5:\n  label: H5\n  title: Poets stay kind\n  personas: [poeticism]\n  direction: higher\n")
    change(folder / "profiles" / "demo.yaml", lambda p: p["hypotheses"].append("h5"))
    hypothesis = load("demo", folder).hypotheses[-1]
    assert (hypothesis.label, hypothesis.published_persona) == ("H5", "poeticism")


def test_personas_adapters_come_persona_first():
    study = load("demo")
    cell = Cell("smollm2-135m", "sycophancy", "bad_medical", 0)
    assert [name for name, _ in study.adapters(cell)] == ["persona", "em"]
    assert study.adapters(Cell("smollm2-135m", BASELINE, NO_DATASET, 0)) == []


def test_published_scores_that_arrive_are_another_local_judge(tmp_path, monkeypatch):
    """Half of a study judged without them and half with them would compare two judges."""
    monkeypatch.setenv("CAI_EM_CACHE", str(tmp_path))
    settings = lambda profile: depends.settings(load(profile), "04_judge", model="smollm2-135m", shard="baseline")  # noqa: E731
    before = settings("demo")
    with (files.root() / "params" / "published_selection.csv").open(newline="") as file:
        paths = [row["path"] for row in csv.DictReader(file) if row["model"] in sources.REFERENCE_MODELS]
    for path in paths:
        place = sources.cached(sources.Pinned(sources.REPO, sources.COMMIT, path))
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()
    assert settings("demo") != before
    place.unlink()
    assert settings("demo") == before, "all of them, or none"


def test_settings_change_only_for_the_stages_that_depend_on_them(folder):
    """A judge's temperature reruns judging, not training."""

    def settings():
        loading._registries.cache_clear()
        study = load("demo", folder)
        cell = {"model": "smollm2-135m", "persona": "sycophancy"}
        return {
            "01_personas": depends.settings(study, "01_personas", **cell),
            "02_finetune": depends.settings(study, "02_finetune", **cell, dataset="bad_medical", seed=0),
            "03_sample": depends.settings(study, "03_sample", model="smollm2-135m", shard="sycophancy"),
            "04_judge": depends.settings(study, "04_judge", model="smollm2-135m", shard="sycophancy"),
        }

    def changed(before):
        return {stage for stage, value in settings().items() if value != before[stage]}

    before = settings()
    assert changed(before) == set()
    change(folder / "judges.yaml", lambda d: d["local"].update(max_retries=3))
    assert changed(before) == {"04_judge"}
    before = settings()
    change(folder / "sampling.yaml", lambda d: d["demo"].update(temperature=0.8))
    assert changed(before) == {"03_sample"}
    before = settings()
    with (folder / "builtin" / "datasets" / "bad_medical.jsonl").open("a") as file:
        file.write("\n")
    assert changed(before) == {"02_finetune"}
    before = settings()
    change(folder / "profiles" / "demo.yaml", lambda d: d["grid"][0]["personas"].append("loving"))
    assert changed(before) == set(), "a new persona runs only its own cells"


@pytest.mark.parametrize("name", PROFILES)
def test_stages_of_one_job_have_settings_in_every_profile(name):
    """The Snakefile asks for them all, also for stages that a profile does not have."""
    study = load(name)
    for stage in ("05_validity", "06_results", "08_claims", "09_trajectories", "10_steering", "11_report"):
        assert len(depends.settings(study, stage)) == 16


DYNAMICS = {
    "main preset": ("training.yaml", lambda d: d["demo_trajectory"].update(learning_rate=9e-4), {"09_trajectories"}),
    "preset beside": ("training.yaml", lambda d: d["demo_narrow"]["kl"].update(weight=6), {"09_trajectories"}),
    "rows": ("builtin/datasets/bad_medical.jsonl", None, {"09_trajectories"}),
    "rows outside the domain": ("builtin/datasets/risky_financial.jsonl", None, {"09_trajectories"}),
    "rows of the KL term": ("builtin/datasets/technical_kl.jsonl", None, {"09_trajectories"}),
    "rows of nobody": ("builtin/datasets/insecure.jsonl", None, set()),
    "questions to find directions on": ("builtin/questions/general.yaml", None, {"10_steering"}),
    "sampling": ("sampling.yaml", lambda d: d["demo"].update(temperature=0.2), {"09_trajectories", "10_steering"}),
    "questions": ("builtin/questions/eval.yaml", None, {"09_trajectories", "10_steering"}),
    "probe": ("builtin/questions/probe.yaml", None, {"09_trajectories", "10_steering"}),
    "judge": ("judges.yaml", lambda d: d["local"].update(distil=False), {"09_trajectories", "10_steering"}),
    "judge's prompts": ("builtin/judge_prompts.yaml", None, {"09_trajectories", "10_steering"}),
    "judge's training": ("builtin/judge_training.jsonl", None, {"09_trajectories", "10_steering"}),
}


@pytest.mark.parametrize("case", DYNAMICS)
def test_what_h3_and_h4_depend_on_reruns_them(folder, case):
    """An edit of a text counts by its bytes: a line break at the end is enough."""
    name, edit, expected = DYNAMICS[case]

    def settings():
        loading._registries.cache_clear()
        study = load("dynamics", folder)
        return {stage: depends.settings(study, stage) for stage in ("09_trajectories", "10_steering", "05_validity")}

    before = settings()
    if edit:
        change(folder / name, edit)
    else:
        (folder / name).write_text((folder / name).read_text(encoding="utf-8") + "\n", encoding="utf-8")
    after = settings()
    assert {stage for stage, value in after.items() if value != before[stage]} == expected


# --- Bad input: (file, how it is spoiled, what the message must name) ---

SPOILED = {
    "unknown key in a profile": ("profiles/demo.yaml", lambda d: d.update(sede=[0]), ["demo.yaml:", "sede"]),
    "unknown key in a registry": ("models.yaml", lambda d: d["tiny"].update(siez=1), ["models.yaml:", "tiny.siez"]),
    "unknown persona": ("profiles/demo.yaml", lambda d: d["grid"][0]["personas"].append("anger"), ["anger", "personas.yaml"]),
    "unknown dataset": ("profiles/demo.yaml", lambda d: d["grid"][0]["datasets"].append("x"), ["'x'", "datasets.yaml"]),
    "unknown model": ("profiles/demo.yaml", lambda d: d.update(models=["gpt-2"]), ["gpt-2", "models.yaml"]),
    "unknown judge": ("profiles/demo.yaml", lambda d: d.update(judge="me"), ["'me'", "judges.yaml"]),
    "unknown hypothesis": ("profiles/demo.yaml", lambda d: d.update(hypotheses=["h9"]), ["h9", "hypotheses.yaml"]),
    "unknown preset": ("profiles/demo.yaml", lambda d: d.update(sampling="hot"), ["hot", "sampling.yaml"]),
    "unknown thresholds": ("profiles/demo.yaml", lambda d: d.update(thresholds="lax"), ["lax", "thresholds.yaml"]),
    "preset of the wrong kind": ("profiles/demo.yaml", lambda d: d.update(em_training="demo_dpo"), ["em_training", "sft"]),
    "no grid": ("profiles/demo.yaml", lambda d: d.update(grid=[]), ["demo.yaml", "grid"]),
    "no judge": ("profiles/demo.yaml", lambda d: d.pop("judge"), ["demo.yaml", "judge"]),
    "grid in a published profile": (
        "profiles/published.yaml",
        lambda d: d.update(grid=[{"personas": ["baseline"], "datasets": ["none"]}]),
        ["published.yaml", "grid"],
    ),
    "no baseline to compare with": (
        "profiles/demo.yaml",
        lambda d: d["grid"].append({"personas": ["sycophancy"], "datasets": ["insecure"]}),
        ["sycophancy x insecure", "baseline"],
    ),
    "random control without its persona": (
        "profiles/micro.yaml",
        lambda d: d["grid"][0].update(personas=["baseline", "random_sycophancy"]),
        ["random_sycophancy", "sycophancy"],
    ),
    "seed twice": ("profiles/demo.yaml", lambda d: d.update(seeds=[0, 0]), ["demo.yaml", "seeds", "twice"]),
    "negative seed": ("profiles/demo.yaml", lambda d: d.update(seeds=[-1]), ["demo.yaml:", "seeds.0", "-1"]),
    "seed of 20 digits": (
        "profiles/demo.yaml", lambda d: d.update(seeds=[12345678901234567890]), ["demo.yaml:", "seeds.0", "4294967295"]
    ),
    "bootstrap seed below 0": (
        "thresholds.yaml", lambda d: d["default"].update(bootstrap_seed=-1), ["thresholds.yaml:", "bootstrap_seed"]
    ),
    "seed as text": ("profiles/demo.yaml", lambda d: d.update(seeds=["one"]), ["demo.yaml:", "seeds.0", "one"]),
    "source misspelt": ("profiles/demo.yaml", lambda d: d.update(source="train"), ["demo.yaml:", "source", "train"]),
    "empty title missing": ("profiles/demo.yaml", lambda d: d.pop("title"), ["demo.yaml", "title", "required"]),
    "no models": ("profiles/demo.yaml", lambda d: d.update(models=[]), ["demo.yaml:", "models"]),
    "zero samples": ("sampling.yaml", lambda d: d["demo"].update(samples_per_question=0), ["sampling.yaml:", "demo.samples_per_question"]),
    "top_p of 0": ("sampling.yaml", lambda d: d["demo"].update(top_p=0), ["sampling.yaml:", "demo.top_p"]),
    "top_p of 2": ("sampling.yaml", lambda d: d["demo"].update(top_p=2), ["sampling.yaml:", "demo.top_p"]),
    "negative temperature": ("sampling.yaml", lambda d: d["demo"].update(temperature=-1), ["sampling.yaml:", "demo.temperature"]),
    "NaN temperature": ("sampling.yaml", lambda d: d["demo"].update(temperature=float("nan")), ["sampling.yaml:", "temperature"]),
    "learning rate of 0": ("training.yaml", lambda d: d["demo_em"].update(learning_rate=0), ["training.yaml:", "demo_em"]),
    "kind misspelt": ("training.yaml", lambda d: d["demo_em"].update(kind="ppo"), ["training.yaml:", "demo_em", "ppo"]),
    "lora without r": ("training.yaml", lambda d: d["mo"]["lora"].pop("r"), ["training.yaml:", "mo", "lora.r"]),
    "unknown loss": ("training.yaml", lambda d: d["mo"].update(loss_on="prompt"), ["training.yaml:", "loss_on", "prompt"]),
    "kl without corpus": ("training.yaml", lambda d: d["narrow"]["kl"].pop("corpus"), ["training.yaml:", "corpus"]),
    "hub model not pinned": ("models.yaml", lambda d: d["qwen2.5-7b"].pop("revision"), ["models.yaml:", "qwen2.5-7b", "revision"]),
    "path model without path": ("models.yaml", lambda d: d.update(m={"label": "m", "source": "path"}), ["models.yaml:", "m", "path"]),
    "model key with a slash": ("models.yaml", lambda d: d.update({"a/b": {"label": "m", "source": "tiny"}}), ["models.yaml:", "a/b"]),
    "model not a mapping": ("models.yaml", lambda d: d.update(m=3), ["models.yaml:", "m", "mapping"]),
    "colour by name": ("personas.yaml", lambda d: d["humor"].update(colour="red"), ["personas.yaml:", "humor.colour", "red"]),
    "persona without constitution": ("personas.yaml", lambda d: d["humor"].pop("constitution"), ["personas.yaml:", "humor", "constitution"]),
    "second baseline": ("personas.yaml", lambda d: d["humor"].update(kind="baseline"), ["personas.yaml:", "humor", "baseline"]),
    "norm_of on a trained persona": ("personas.yaml", lambda d: d["humor"].update(norm_of="sarcasm"), ["personas.yaml:", "humor", "norm_of"]),
    "role misspelt": ("datasets.yaml", lambda d: d["insecure"].update(role="EM"), ["datasets.yaml:", "insecure.role", "EM"]),
    "role none on a data set": ("datasets.yaml", lambda d: d["insecure"].update(role="none"), ["datasets.yaml:", "insecure", "none"]),
    "direction misspelt": ("hypotheses.yaml", lambda d: d["h1"].update(direction="down"), ["hypotheses.yaml:", "h1.direction", "down"]),
    "tested persona not named": ("hypotheses.yaml", lambda d: d["h2"].update(tested="humor"), ["hypotheses.yaml:", "h2", "humor"]),
    "hypothesis of nobody": ("hypotheses.yaml", lambda d: d["h1"].update(personas=[]), ["hypotheses.yaml:", "h1.personas"]),
    "judge without kind": ("judges.yaml", lambda d: d["local"].pop("kind"), ["judges.yaml:", "local", "kind"]),
    "judge with a key in it": ("judges.yaml", lambda d: d["local"].update(api_key="sk-1"), ["judges.yaml:", "local.api_key"]),
    "too many log-probabilities": ("judges.yaml", lambda d: d["local"].update(top_logprobs=50), ["judges.yaml:", "top_logprobs"]),
    "cost cap of 0": ("judges.yaml", lambda d: d["gpt-4.1-mini"].update(cost_cap_usd=0), ["judges.yaml:", "cost_cap_usd"]),
    "threshold above 1": ("thresholds.yaml", lambda d: d["default"].update(alpha=5), ["thresholds.yaml:", "default.alpha"]),
    "margin of 0": ("thresholds.yaml", lambda d: d["default"].update(equivalence_margin=0), ["thresholds.yaml:", "equivalence_margin"]),
    "unknown gate": ("thresholds.yaml", lambda d: d["default"]["gates"].update(auc=1), ["thresholds.yaml:", "gates.auc"]),
    "revision by branch": ("models.yaml", lambda d: d["qwen2.5-7b"].update(revision="main"), ["models.yaml:", "qwen2.5-7b.revision", "40 hex", "HfApi"]),
    "adapters' revision by tag": ("models.yaml", lambda d: d["qwen2.5-7b"]["persona_adapters"][0].update(revision="v1"), ["models.yaml:", "persona_adapters.0.revision", "40 hex"]),
    "personas from an unpinned hub": ("profiles/paper.yaml", lambda d: d.update(personas_from="hub"), ["maius/qwen-2.5-7b-it-personas", "models.yaml", "./run_all.sh pin paper"]),
    "twin of nobody": ("datasets.yaml", lambda d: d["bad_medical"].update(twin="x"), ["datasets.yaml:", "bad_medical.twin", "'x'"]),
    "norm of nobody": ("personas.yaml", lambda d: d["random_sycophancy"].update(norm_of="x"), ["personas.yaml:", "random_sycophancy.norm_of", "'x'"]),
    "hypothesis about a stranger": ("hypotheses.yaml", lambda d: d["h1"].update(personas=["x"]), ["hypotheses.yaml:", "h1.personas", "'x'"]),
    "constitution elsewhere": ("personas.yaml", lambda d: d["humor"].update(constitution="../../x"), ["personas.yaml:", "humor.constitution"]),
    "rows elsewhere": ("datasets.yaml", lambda d: d["insecure"].update(builtin="../x"), ["datasets.yaml:", "insecure.builtin"]),
    "questions elsewhere": ("profiles/demo.yaml", lambda d: d.update(questions="../x"), ["demo.yaml:", "questions"]),
    "alpha of 0": ("thresholds.yaml", lambda d: d["default"].update(alpha=0), ["thresholds.yaml:", "default.alpha", "greater than 0"]),
    "confidence of 1": ("thresholds.yaml", lambda d: d["default"].update(confidence=1), ["thresholds.yaml:", "default.confidence", "less than 1"]),
    "endless margin": ("thresholds.yaml", lambda d: d["default"].update(equivalence_margin=float("inf")), ["thresholds.yaml:", "equivalence_margin", "finite"]),
    "seed that is no number": ("profiles/demo.yaml", lambda d: d.update(seeds=[True]), ["demo.yaml:", "seeds.0"]),
    "no seed": ("profiles/demo.yaml", lambda d: d.update(seeds=[]), ["demo.yaml:", "seeds"]),
    "endpoint judge without model": ("judges.yaml", lambda d: d["gpt-4.1-mini"].pop("model"), ["judges.yaml:", "gpt-4.1-mini", "name its model"]),
    "endpoint teacher without model": ("generators.yaml", lambda d: d["oct"].pop("model"), ["generators.yaml:", "oct", "name its model"]),
    "endpoint by ftp": ("judges.yaml", lambda d: d["loopback"].update(base_url="ftp://x"), ["judges.yaml:", "loopback.base_url", "http"]),
    "endpoint without scheme": ("generators.yaml", lambda d: d["oct"].update(base_url="host:80/v1"), ["generators.yaml:", "oct.base_url", "http"]),
    "trajectory of a stranger": (
        "profiles/paper.yaml", lambda d: d["trajectory"].update(personas=["anger"]), ["trajectory", "anger"]
    ),
    **{
        f"{part} {name}": ("profiles/dynamics.yaml", lambda d, part=part, change=change: d[part].update(change), [part, *words])
        for part, name, change, words in [
            ("trajectory", "preset unknown", {"preset": "fast"}, ["preset", "fast"]),
            ("trajectory", "beside unknown", {"beside": ["fast"]}, ["beside", "fast"]),
            ("trajectory", "beside by preference", {"beside": ["demo_dpo"]}, ["beside", "demo_dpo", "sft"]),
            ("trajectory", "preset by preference", {"preset": "demo_dpo"}, ["preset", "demo_dpo", "sft"]),
            ("trajectory", "beside the same", {"beside": ["demo_trajectory"]}, ["beside", "demo_trajectory"]),
            ("trajectory", "nothing held out", {"preset": "demo_em"}, ["demo_em", "held_out"]),
            ("trajectory", "out of domain unknown", {"out_of_domain": ["x"]}, ["out_of_domain", "'x'"]),
            ("trajectory", "out of domain within it", {"out_of_domain": ["bad_medical"]}, ["out_of_domain", "bad_medical"]),
            ("trajectory", "nobody", {"personas": []}, ["personas"]),
            ("trajectory", "no seed", {"seeds": []}, ["seeds"]),
            ("trajectory", "seed twice", {"seeds": [1, 1]}, ["seeds", "twice"]),
            ("trajectory", "without baseline", {"personas": ["poeticism"]}, ["personas", "baseline"]),
            ("trajectory", "on nothing", {"dataset": "none"}, ["dataset", "none"]),
            ("steering", "nobody", {"personas": []}, ["personas"]),
            ("steering", "outside the grid", {"dataset": "insecure"}, ["dataset", "insecure", "grid"]),
            ("steering", "no layer", {"layers": []}, ["layers"]),
            ("steering", "no strength", {"strengths": [0]}, ["strengths"]),
        ]
    },
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILED)
def test_bad_parameters_are_refused_by_name(folder, case):
    name, spoil, words = SPOILED[case]
    change(folder / name, spoil)
    profile = Path(name).stem if name.startswith("profiles") else "demo"
    with pytest.raises(ParamsError) as caught:
        load(profile, folder)
    message = str(caught.value)
    assert all(word in message for word in words), message


SECRET = "s3cr3t5f0c3e9a7b1d2468"
LEAKS = {
    "key for the variable's name": ("judges.yaml", lambda d: d["loopback"].update(api_key_env=f"sk-{SECRET}"), "api_key_env"),
    "key as the variable's name": ("judges.yaml", lambda d: d["loopback"].update(api_key_env=SECRET), "NAME of an environment"),
    "key in the query": ("judges.yaml", lambda d: d["loopback"].update(base_url=f"https://h/v1?api_key={SECRET}"), "base_url"),
    "key as password": ("judges.yaml", lambda d: d["loopback"].update(base_url=f"https://u:{SECRET}@h/v1"), "base_url"),
    "key as user": ("generators.yaml", lambda d: d["oct"].update(base_url=f"https://{SECRET}@h/v1"), "base_url"),
    "key after a hash": ("generators.yaml", lambda d: d["oct"].update(base_url=f"https://h/v1#{SECRET}"), "base_url"),
    "teacher's key": ("generators.yaml", lambda d: d["oct"].update(api_key_env=SECRET), "api_key_env"),
    "a key of its own": ("judges.yaml", lambda d: d["loopback"].update(api_key=SECRET), "loopback.api_key"),
    "a key under another name": ("judges.yaml", lambda d: d["loopback"].update(hidden=f"sk-{SECRET}"), "loopback.hidden"),
    "beside a missing model": ("judges.yaml", lambda d: (d["loopback"].pop("model"), d["loopback"].update(seed=7, name=f"sk-{SECRET}")), "name its model"),
    "in a part": ("judges.yaml", lambda d: d["loopback"].update(model={"x": SECRET}), "loopback.model"),
    "in broken YAML": ("judges.yaml", None, "not valid YAML"),
}  # fmt: skip


@pytest.mark.parametrize("case", LEAKS)
def test_a_key_in_the_parameters_is_refused_and_not_repeated(folder, case):
    """Parameters go into manifests, so a key there is refused; the error goes to screens and logs, so it is not quoted."""
    name, spoil, word = LEAKS[case]
    if spoil:
        change(folder / name, spoil)
    else:
        with (folder / name).open("a", encoding="utf-8") as file:
            file.write(f'x: {{api_key: "{SECRET}, [\n')
    with pytest.raises(ParamsError) as caught:
        load("demo", folder)
    assert word in str(caught.value)
    assert f"{name}:" in str(caught.value)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["empty"]),
        ("a: [1", ["not valid YAML"]),
        ("a: 1\na: 2\n", [":2:", "'a'", "twice"]),
        ("a: &x 1\nb: *x\n", ["aliases"]),
        ("a: !!python/object:os.system 1\n", [":1:", "python"]),
        ("? [1, 2]\n: 3\n", [":1:", "plain word"]),
        ("title: x\nsource: trained\nmodels: tiny\n", [":3:", "models", "tiny"]),
        ("- 1\n- 2\n", ["bad.yaml", "file"]),
    ],
)
def test_broken_yaml_names_file_and_line(tmp_path, text, words):
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ParamsError) as caught:
        load(path)
    assert all(word in str(caught.value) for word in [*words, "bad.yaml"]), str(caught.value)


def test_not_utf8(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_bytes(b"title: \xff\xfe")
    with pytest.raises(ParamsError, match="not UTF-8"):
        load(path)


def test_a_profile_that_is_a_folder(tmp_path):
    (tmp_path / "bad.yaml").mkdir()
    with pytest.raises(ParamsError, match=r"bad\.yaml: cannot be read"):
        load(tmp_path / "bad.yaml")


def test_a_missing_profile_names_those_that_exist():
    with pytest.raises(ParamsError, match=r"nosuch\.yaml: no such file .*demo"):
        load("nosuch")


def test_judge_can_be_chosen_from_the_environment(monkeypatch):
    monkeypatch.setenv("CAI_EM_JUDGE", "gpt-4.1-mini")
    assert load("demo").judge.kind == "openai"
    monkeypatch.setenv("CAI_EM_JUDGE", "nosuch")
    with pytest.raises(ParamsError, match="nosuch"):
        load("demo")


def test_questions_of_the_demo():
    assert len(load("demo").questions()) == 8
    assert len(load("micro").questions()) == 2
