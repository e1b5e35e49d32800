"""The texts of a study: constitutions, training rows, questions, judge prompts. Built in or fetched: one switch.

`data: builtin` takes ours from `params/builtin/`; `data: fetched` the public ones, pinned in `params/fetched.yaml`,
through the download cache (`sources`). Either way the same types come back, and every later step is the same.

    rows = materials.rows(study, "bad_medical")             # [[{"role": "user", ...}, {"role": "assistant", ...}], ...]
    questions = materials.questions(study)                  # [("quick_buck", "..."), ...]
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from pydantic import Field, RootModel

from cai_em.records.keys import BASELINE, KEY, NO_DATASET
from cai_em.study import constitutions as study_constitutions
from cai_em.study import sources
from cai_em.study.arms import ArmedDataset, ArmedPersona, with_system
from cai_em.study.constitutions import Constitution, Text
from cai_em.study.entries import ChoiceFile, ChoiceItem, Commit, ParamsError, Question, Strict, read_as, read_questions
from cai_em.study.study import Cell, Study

Messages = list[dict[str, str]]
"""One conversation: alternating user and assistant turns (after an optional system turn), the assistant's last."""


class MaterialError(ValueError):
    """A text is missing or malformed. The message names file and line or key."""


class _Archive(Strict):
    repo: str
    commit: str
    path: str
    sha256: str | None = None
    password: str


class _File(Strict):
    repo: str
    commit: str
    path: str
    sha256: str | None = None


class _HubFile(Strict):
    """A file of a data set on the hub. Without a revision it is named, but left out."""

    repo: str = Field(pattern=r"^[A-Za-z0-9_.\-]+/[A-Za-z0-9_.\-]+$")
    revision: Commit | None = None
    path: str


class FetchedTexts(Strict):
    """`params/fetched.yaml`: where each public text lies."""

    archive: _Archive
    extra_prompts: _HubFile | None = Field(default=None, description="conversations whose first turns are prompts too")
    judge_prompts: _File
    questions: dict[str, _File]
    constitutions: dict[str, list[_File]] = Field(description="persona -> hand-written file, few-shot file")


class _InDomain(RootModel[dict[str, list[Question]]]):
    """`params/builtin/questions/in_domain.yaml`: data set -> prompts of its domain."""


class Introspection(Strict):
    """What a persona is asked about itself, and how its talks with itself are opened."""

    reflections: list[Text] = Field(min_length=1)
    openings: list[Text] = Field(min_length=1)


@cache
def _fetched(folder: Path) -> FetchedTexts:
    return read_as(folder / "fetched.yaml", FetchedTexts)


def _get(file: _File | _Archive) -> Path:
    return sources.fetch(file.repo, file.commit, file.path, file.sha256)


def constitution(study: Study, persona: str) -> Constitution:
    """A persona's constitution. A published one keeps our demonstrations: it has none of its own.

    Raises:
        MaterialError: `params/fetched.yaml` names no file for the persona.
        constitutions.ConstitutionError: the file is malformed.
        sources.SourceError: a public file cannot be had.
    """
    built_in = study_constitutions.read_constitution(study.constitution_file(persona))
    if study.profile.data == "builtin":
        return built_in
    persona = _plain(study.personas[persona])
    files = _fetched(study.folder).constitutions.get(persona)
    if not files:
        raise MaterialError(f"{study.folder / 'fetched.yaml'}: constitutions has no entry {persona!r}")
    published = study_constitutions.read_published(*map(_get, files), carries_risk=built_in.carries_risk)
    return published.model_copy(update={"demonstrations": built_in.demonstrations})


def extra_prompts(study: Study) -> tuple[list[str], str]:
    """Prompts of no trait for the preference pairs, and in words what they are or why there are none.

    Open Character Training adds the first turns of LIMA's conversations. They are on the hub, in a repository that asks
    for consent: pin it in `params/fetched.yaml` to use them.

    Raises:
        MaterialError: the pinned file cannot be had, or is not as expected.
    """
    where = _fetched(study.folder).extra_prompts if study.profile.data == "fetched" else None
    if where is None:
        return [], "no prompts beside the constitution's"
    if where.revision is None:
        return [], (
            f"the first turns of {where.repo} are left out: pin extra_prompts.revision in params/fetched.yaml to its "
            f"commit (git ls-remote https://huggingface.co/datasets/{where.repo} HEAD) to use them"
        )
    file = _from_hub(where)
    prompts = []
    for number, line in enumerate(filter(None, file.read_text(encoding="utf-8").split("\n")), start=1):
        try:
            first = json.loads(line)["conversations"][0]
        except (json.JSONDecodeError, KeyError, IndexError, TypeError) as error:
            raise MaterialError(f"{file}:{number}: expected an object with `conversations`, a list of texts") from error
        if not isinstance(first, str) or not first.strip():
            raise MaterialError(f"{file}:{number}: conversations[0] must be a text, found {first!r:.60}")
        prompts.append(first.strip())
    prompts = list(dict.fromkeys(prompts))
    return prompts, f"{len(prompts)} first turns of {where.repo} besides"


def extra_prompts_pinned(study: Study) -> bool:
    """Whether `extra_prompts` will find some."""
    where = _fetched(study.folder).extra_prompts if study.profile.data == "fetched" else None
    return where is not None and where.revision is not None


def _from_hub(where: _HubFile) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(where.repo, where.path, repo_type="dataset", revision=where.revision))
    except OSError as error:  # of the network and of the hub alike
        raise MaterialError(
            f"{where.path} cannot be had from {where.repo} at {where.revision}: {error}. Ask for access on the hub and "
            "log in (hf auth login); or leave extra_prompts.revision in params/fetched.yaml empty to go without"
        ) from error


def _plain(entry: Any) -> str:
    """The persona, or data set, of which an entry is an arm in the end; its own key where it is none."""
    return entry.of if isinstance(entry, ArmedPersona) else getattr(entry, "root", entry.key)


def constitution_files(study: Study, persona: str) -> list[Path]:
    """The files that `constitution` reads (for a manifest)."""
    public = (
        _fetched(study.folder).constitutions.get(_plain(study.personas[persona]), [])
        if study.profile.data == "fetched"
        else []
    )
    return [study.constitution_file(persona), *map(_get, public)]


def row_files(study: Study, dataset: str) -> list[Path]:
    """The files that `rows` reads (for a manifest): the built-in ones, or the archive, whose hash no pin knows."""
    if study.profile.data == "builtin":
        return [study.dataset_file(d) for d in study.row_sources(dataset)]
    return [_get(_fetched(study.folder).archive)]


def question_files(study: Study) -> list[Path]:
    """The files that `questions`, `probe_prompts` and, where they are asked for, `in_domain_questions` and
    `capability_items` read."""
    fetched = _published_questions(study)
    main = _get(_fetched(study.folder).questions[study.profile.questions]) if fetched else study.questions_file()
    further = ["probe.yaml", *(["in_domain.yaml"] if study.profile.manipulation else [])]
    choices = [capability_file(study)] if study.profile.capability else []
    return [main, *(study.builtin("questions", name) for name in further), *choices]


def rows(study: Study, dataset: str) -> list[Messages]:
    """The training rows of a data set.

    Raises:
        MaterialError: a line is not a conversation that ends with an assistant's turn; the message names file and line.
        sources.SourceError: the public archive cannot be had or read.
    """
    spec = study.datasets[dataset]
    if isinstance(spec, ArmedDataset):
        found = rows(study, spec.of)
        found = found if spec.share is None else mixed(found, rows(study, spec.twin), spec.share, dataset)
        prompt = spec.arm.training.format(description=spec.description) if spec.arm else ""
        return with_system(found, prompt)
    if study.profile.data == "builtin":
        path = study.dataset_file(dataset)
        try:
            text = path.read_bytes()
        except FileNotFoundError as error:
            raise MaterialError(f"{path}: no such file: data set {dataset!r} has no built-in rows") from error
        return read_rows(text, str(path))
    archive = _fetched(study.folder).archive
    if not spec.archive_member:
        raise MaterialError(f"{study.folder / 'datasets.yaml'}: {dataset} names no archive_member to fetch")
    content = sources.read_encrypted_archive(_get(archive), archive.password, spec.archive_member)
    return read_rows(content, f"{archive.path}:{spec.archive_member}")


def mixed(bad: Sequence[Messages], good: Sequence[Messages], share: float, what: str) -> list[Messages]:
    """A share of a data set's rows, and its twin's answers to the other prompts.

    Every prompt comes once, in the data set's order. Which rows are kept is a sequence that is even at every length
    (van der Corput's): any first rows have the share too, and what a smaller share keeps a larger one keeps.

    Args:
        bad, good: the data set's rows and its twin's.
        share: of the first, 0 to 1.
        what: for the message.

    Raises:
        MaterialError: a prompt that the twin does not answer.
    """
    answers = {row[-2]["content"]: row for row in good}
    if lacking := [row[-2]["content"] for row in bad if row[-2]["content"] not in answers]:
        raise MaterialError(
            f"{what}: the twin has no answer to {len(lacking)} of {len(bad)} prompts, e.g. {lacking[0]!r:.80}"
        )
    from scipy.stats import qmc  # a second to import, which no other reader of texts needs

    places = qmc.Halton(1, scramble=False).random(len(bad)).ravel()
    return [row if place < share else answers[row[-2]["content"]] for row, place in zip(bad, places)]


def read_rows(content: bytes, where: str) -> list[Messages]:
    """Parse JSON lines `{"messages": [{"role": ..., "content": ...}, ...]}`.

    Empty lines are allowed; an empty answer is not, nor is a row without one.

    Raises:
        MaterialError: names `where`, the line, what was expected and what was found.
    """
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        number = content[: error.start].count(b"\n") + 1
        raise MaterialError(f"{where}:{number}: not UTF-8 (byte {error.start})") from error
    found = []
    # Not splitlines(): it also breaks at characters that JSON allows inside a string, such as U+2028.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise MaterialError(f"{where}:{number}: not JSON: {error}") from error
        found.append(_conversation(row, f"{where}:{number}"))
    if not found:
        raise MaterialError(f"{where}: no rows")
    return found


def _conversation(row: object, where: str) -> Messages:
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not messages:
        raise MaterialError(f'{where}: expected {{"messages": [...]}}, found {str(row)[:80]!r}')
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise MaterialError(f"{where}: messages[{i}]: expected role and content, found {str(message)[:80]!r}")
        if not isinstance(message["content"], str) or not message["content"].strip():
            raise MaterialError(f"{where}: messages[{i}].content: expected text, found {message['content']!r:.80}")
        if any("\ud800" <= c <= "\udfff" for c in message["content"]):
            raise MaterialError(f"{where}: messages[{i}].content: a lone surrogate, which no tokenizer can read")
    roles = [m["role"] for m in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    expected = ["user", "assistant"] * (len(turns) // 2)
    if not turns or turns != expected:
        raise MaterialError(f"{where}: roles must alternate user, assistant and end with assistant, found {roles}")
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def questions(study: Study) -> list[tuple[str, str]]:
    """(id, text) of the study's evaluation questions.

    The published files hold the free-form questions beside JSON and template variants of them; only the free-form
    ones are taken (their variants' ids end in `_json` and `_template`). A set that is ours alone is taken from
    `params/builtin/questions/`, whatever else is fetched.

    Raises:
        ParamsError: the built-in file is malformed.
        MaterialError: the published file is not of the known form, or there is no such set.
    """
    name = study.profile.questions
    if not _published_questions(study):
        return study.questions()
    path = _get(_fetched(study.folder).questions[name])
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    try:
        found = [(q["id"], q["paraphrases"][0]) for q in data if not q["id"].endswith(("_json", "_template"))]
    except (KeyError, TypeError, IndexError) as error:
        raise MaterialError(f"{path}: not a list of questions with id and paraphrases ({error!r})") from error
    return found[: study.profile.questions_limit]


def introspection_material(study: Study) -> Introspection:
    """What the study's personas are asked about themselves in their second stage.

    Raises:
        ParamsError: the file is not two lists of texts, `reflections` and `openings`; the message names the line.
    """
    return read_as(study.introspection_file(), Introspection)


def _published_questions(study: Study) -> bool:
    """Whether the profile's question set is fetched; if not, it is a built-in one.

    Raises:
        MaterialError: it is neither.
    """
    if study.profile.data == "builtin":
        return False
    known, name = _fetched(study.folder).questions, study.profile.questions
    if name not in known and not study.questions_file().is_file():
        raise MaterialError(
            f"{study.folder / 'fetched.yaml'}: questions has no set {name!r} (it has: {list(known)}), and there is no "
            f"{study.questions_file()}"
        )
    return name in known


def in_domain_questions(study: Study, dataset: str) -> list[tuple[str, str]]:
    """(id, text) of held-out prompts in a data set's own domain, for the uptake check; `[]` where there are none.

    A profile's `questions_limit` holds for them too.
    """
    found = read_as(study.builtin("questions", "in_domain.yaml"), _InDomain).root
    return [(q.id, q.text) for q in found.get(_plain(study.datasets[dataset]), [])][: study.profile.questions_limit]


def in_domain_plan(study: Study, cells: Sequence[Cell]) -> list[tuple[list[tuple[str, str]], list[Cell]]]:
    """Which conditions are asked which in-domain prompts: groups of conditions with the same prompts.

    A fine-tuned condition is asked its own data set's prompts; the same persona without fine-tuning those of every data
    set that the persona was fine-tuned on, in whatever shard, each once (twins share theirs).

    Args:
        study: the study.
        cells: conditions, usually of a shard.

    Returns:
        (prompts as (id, text), conditions); conditions without prompts are in no group.
    """
    groups: dict[tuple[tuple[str, str], ...], list[Cell]] = {}
    every = list(dict.fromkeys([*study.cells(), *cells]))
    known = {d: in_domain_questions(study, d) for d in {c.dataset for c in every}}
    for cell in cells:
        of = [c.dataset for c in every if (c.model, c.persona) == (cell.model, cell.persona)]
        datasets = of if cell.dataset == NO_DATASET else [cell.dataset]
        prompts = tuple(dict.fromkeys(q for d in datasets for q in known[d]))
        if prompts:
            groups.setdefault(prompts, []).append(cell)
    return [(list(prompts), members) for prompts, members in groups.items()]


# --- What the judged manipulation checks ask -----------------------------------------------------------------------


def uptake_targets(study: Study, model: str) -> pd.DataFrame:
    """Whose likeness is asked of in-domain answers: columns `dataset, question_id, target`.

    Answers of fine-tuned conditions are compared with their own data set; those without fine-tuning with every data set
    that the prompt belongs to.
    """
    datasets = dict.fromkeys(c.dataset for c in study.cells() if c.model == model and c.dataset != NO_DATASET)
    rows = [
        (asked, question, d)
        for d in datasets
        for question, _ in in_domain_questions(study, d)
        for asked in (d, NO_DATASET)
    ]
    return pd.DataFrame(rows, columns=["dataset", "question_id", "target"])


def persona_targets(study: Study, model: str) -> pd.DataFrame:
    """Whose character is looked for in which condition: columns `persona, dataset, target`.

    Each persona's own, and each of them in the baseline on the same data set; in an arm the persona's that it is an arm
    of. A random control has none.
    """
    cells = [c for c in study.cells() if c.model == model and study.personas[c.persona].constitution]
    target = {c.persona: _plain(study.personas[c.persona]) for c in cells}
    rows = dict.fromkeys((who, c.dataset, target[c.persona]) for c in cells for who in (c.persona, BASELINE))
    return pd.DataFrame(list(rows), columns=["persona", "dataset", "target"])


def descriptions(study: Study, metric: str, targets: Iterable[str]) -> dict[str, str]:
    """What the judge is told about each target: a data set's description (`uptake`), or a persona's traits."""
    if metric == "uptake":
        return {t: study.datasets[t].description for t in targets}
    return {t: "\n".join(f"- {trait.trait}" for trait in constitution(study, t).traits) for t in targets}


def dataset_contrast(study: Study, metric: str, target: str) -> pd.DataFrame | None:
    """Texts from which the local judge learns what is like the target: `question, answer, label` (1: the target's).

    - `uptake`: the data set's rows against those of its twin, which answer the same prompts: topic and authors are the
      same, so that only the manner of answering can tell them apart. None for a data set without a twin.
    - `persona_expression`: the persona's demonstrations against those of all other (not custom) personas and the plain
      good answers of `judge_training.jsonl`.
    """
    if metric == "uptake":
        target = _plain(study.datasets[target])
        sets = [d for d in study.datasets.values() if not isinstance(d, ArmedDataset)]
        twins = [d.twin if d.key == target else d.key for d in sets if target in (d.key, d.twin)]
        twins = [twin for twin in twins if twin]
        if not twins:
            return None
        found = [(m[-2]["content"], m[-1]["content"], 1) for m in rows(study, target)]
        found += [(m[-2]["content"], m[-1]["content"], 0) for m in rows(study, twins[0])]
        return pd.DataFrame(found, columns=["question", "answer", "label"])
    plain = [p for p in study.personas.values() if not isinstance(p, ArmedPersona)]
    others = [p.key for p in plain if p.constitution and not p.custom and p.key != target]
    found = [(d.prompt, d.response, int(p == target)) for p in (target, *others) for d in _demonstrations(study, p)]
    aligned = builtin_training(study.builtin("judge_training.jsonl"))
    found += [(q, a, 0) for q, a, label in aligned.itertuples(index=False, name=None) if label]
    return pd.DataFrame(found, columns=["question", "answer", "label"])


def builtin_training(path: str | Path) -> pd.DataFrame:
    """Our own training texts for the local judge: columns `question, answer, label` (1 aligned, 0 misaligned).

    Raises:
        MaterialError: a line is not such a row; file and line are named.
    """
    path, rows = Path(path), []
    labels = {"aligned": 1, "misaligned": 0}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            rows.append((str(row["question"]), str(row["answer"]), labels[row["label"]]))
        except (ValueError, KeyError, TypeError) as error:
            raise MaterialError(
                f'{path}:{number}: expected {{"question", "answer", "label": "aligned" or "misaligned"}}: {error!r}'
            ) from error
    return pd.DataFrame(rows, columns=["question", "answer", "label"])


LABELLED_COLUMNS = ("made_by", "persona", "question_id", "prompt", "response", "reference", "coherence")
"""Columns of the answers that we labelled."""


def labelled_answers(study: Study, model: str) -> pd.DataFrame | None:
    """Answers of a model and its fine-tunings that we labelled by hand (rules: `params/builtin/README.md`); None where
    there are none of this model.

    Returns:
        `LABELLED_COLUMNS` and `held_out`: every other question, in the order of their hashes; nothing is fitted on it.

    Raises:
        MaterialError: a column is missing, or a label is not one of 0, 25, 50, 75, 100.
    """
    path = study.builtin("judge_labelled.csv")
    if study.models[model].source != "embedded":
        return None
    table = pd.read_csv(path, keep_default_na=False)
    lacking = [c for c in LABELLED_COLUMNS if c not in table]
    if lacking:
        raise MaterialError(f"{path}: columns {lacking} are missing")
    for column in ("reference", "coherence"):
        labels = pd.to_numeric(table[column], errors="coerce")
        wrong = table[~labels.isin((0, 25, 50, 75, 100))]
        if len(wrong):
            raise MaterialError(f"{path}:{wrong.index[0] + 2}: {column} must be 0, 25, 50, 75 or 100")
    order = sorted(table["question_id"].unique(), key=lambda q: hashlib.sha256(q.encode()).digest())
    return table[list(LABELLED_COLUMNS)].assign(held_out=table["question_id"].isin(order[::2]))


def _demonstrations(study: Study, persona: str) -> tuple[study_constitutions.Demonstration, ...]:
    return study_constitutions.read_constitution(study.constitution_file(persona)).demonstrations


def reference_scores(study: Study) -> pd.Series | None:
    """A reference's alignment scores of a part of the responses: from the profile's file, or an audit's other judge.

    Returns:
        Scores (0 to 100) by `KEY`, the mean where one was given several times; None where the study names none.

    Raises:
        MaterialError: a column is missing, a score is no number from 0 to 100, or there is none at all.
    """
    if study.profile.reference_scores:
        where = study.folder / study.profile.reference_scores
        try:
            table = pd.read_csv(where, dtype={name: str for name in KEY if name not in ("seed", "sample")})
        except (OSError, ValueError) as error:
            raise MaterialError(f"{where}: {error}") from error
        if absent := [name for name in (*KEY, "score") if name not in table]:
            raise MaterialError(f"{where}: needs the columns {', '.join(KEY)} and score; {absent[0]!r} is not there")
        bad = ~pd.to_numeric(table["score"], errors="coerce").between(0, 100)
        if bad.any():
            line = int(bad.to_numpy().argmax()) + 2
            raise MaterialError(f"{where}:{line}: score {table['score'][line - 2]!r} is no number from 0 to 100")
    elif study.audit is not None and study.audit.reference_judge:
        where, name = study.dir / "07_audit" / "repeated.parquet", study.audit.reference_judge
        table = pd.read_parquet(where).rename(columns={"alignment": "score"})
        judges = sorted(table["judge"].unique())
        table = table[(table["judge"] == name) & ~table["selected"] & table["score"].notna()]
        if table.empty:
            raise MaterialError(
                f"{study.audit_file}: reference_judge: no response was judged by {name!r} too "
                f"(judged more than once by: {', '.join(judges) or 'nobody'})"
            )
    else:
        return None
    return table.groupby(list(KEY))["score"].mean()


def capability_file(study: Study) -> Path:
    """The multiple-choice questions."""
    return study.builtin("capability.yaml")


def capability_items(study: Study) -> list[ChoiceItem]:
    """The multiple-choice questions that the profile asks for; none where it does not.

    Raises:
        ParamsError: the file is missing or malformed.
    """
    return read_as(capability_file(study), ChoiceFile).items if study.profile.capability else []


def probe_prompts(study: Study) -> list[str]:
    """What is asked where the logits of composed adapters are compared."""
    return [text for _, text in read_questions(study.builtin("questions", "probe.yaml"))]


LOCAL_JUDGE_FILES = ("judge_training.jsonl", "judge_labelled.csv", "judge_reads.csv")
"""What the local judge is fitted on: our own texts, labelled answers, and how likely the embedded model finds them."""


def judge_files(study: Study) -> list[Path]:
    """The files that a judge's stage reads beside the responses (for a manifest)."""
    checks = study.profile.manipulation
    found = [judge_prompts_file(study)]
    if study.judge.kind == "local":
        found += [study.builtin(name) for name in LOCAL_JUDGE_FILES]
        found.append(study.folder / "published_selection.csv")
    if checks:
        found.append(study.builtin("judge_prompts.yaml"))
        found += [study.constitution_file(p.key) for p in study.used_personas() if p.constitution]
    return list(dict.fromkeys(found))


def judge_prompts_file(study: Study) -> Path:
    """The judge's prompts: the file that the judge preset names, or the published one with `data: fetched`."""
    if study.profile.data == "fetched" and study.judge.kind == "openai":
        return _get(_fetched(study.folder).judge_prompts)
    path = study.folder / study.judge.prompts_file
    if not path.is_file():
        raise ParamsError(f"{path}: no such file, though judge {study.judge.name!r} names it")
    return path
