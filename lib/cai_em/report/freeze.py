"""What a study will test, fixed before its data: `prereg/<profile>-<date>.json`, and what has changed since.

    ./run_all.sh freeze paper

The file holds the hypotheses, thresholds and design as they are, hashes of parameters and of the analysis's code by
meaning, and in words what will be tested and what would count as support. `frozen` says of a run whether such a file
was there before its data, and names every amendment.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cai_em.analysis.units import MIN_SEEDS
from cai_em.analysis.verdicts import gates_needed
from cai_em.records.code import code_hash
from cai_em.records.files import MissingFile, digest, file_hash, root, write_text
from cai_em.report.style import Look
from cai_em.report.words import Words
from cai_em.study.depends import settings
from cai_em.study.entries import ParamsError
from cai_em.study.loading import load
from cai_em.study.study import Study

ANALYSED_BY = ("05_validity", "06_results", "08_claims")
"""Stages whose code and settings decide what a verdict is."""
DATA = ("03_sample", "04_judge")


class FreezeError(RuntimeError):
    """Nothing can be frozen. The message says why."""


@dataclass(frozen=True)
class Frozen:
    """How a run stands to what was frozen.

    Attributes:
        on: when it was frozen; empty where nothing was.
        file: the file, from the repository's top.
        data: when the run's first responses were written; empty while there are none.
        before: frozen before the data.
        amendments: what differs now, each with its old and new value.
    """

    on: str = ""
    file: str = ""
    data: str = ""
    before: bool = False
    amendments: tuple[str, ...] = ()


def folder_of(study: Study) -> Path:
    """Where frozen studies lie: in the repository, to be committed."""
    return study.folder.parent / "prereg"


def frozen_files(study: Study) -> list[Path]:
    """A study's frozen files, the oldest first."""
    return sorted(folder_of(study).glob(f"{study.name}-[0-9][0-9][0-9][0-9]-*.json"))


def fixed_parts(study: Study) -> dict[str, Any]:
    """What is fixed: values where a reader can judge them, hashes of the rest."""
    p = study.profile
    design = {
        "models": {m: spec.model_dump(mode="json", include={"hub_id", "revision"}) for m, spec in study.models.items()},
        "conditions": [f"{c.model} {c.persona} {c.dataset} {c.seed}" for c in study.cells()],
        "seeds": p.seeds,
        "questions": file_hash(study.questions_file()) if p.source == "trained" else None,
        "questions_limit": p.questions_limit,
        "sampling": study.sampling.model_dump(mode="json") if study.sampling else None,
        "judge": study.judge.model_dump(mode="json", exclude={"concurrency", "base_url"}) if study.judge else None,
        "training": digest([study.persona_training, study.introspection, study.em_training, study.generator]),
        "roles": {d.key: d.role for d in study.used_datasets()},
    }
    return {
        "hypotheses": {h.key: h.model_dump(mode="json", exclude={"key", "order"}) for h in study.hypotheses},
        "thresholds": study.thresholds.model_dump(mode="json"),
        "known faults": digest(study.known_faults),
        "design": design,
        "parameters": {stage: settings(study, stage) for stage in ANALYSED_BY},
        "code": {stage: code_hash(root() / "notebooks" / f"{stage}.ipynb") for stage in ANALYSED_BY},
    }


def in_words(study: Study) -> list[str]:
    """What will be tested, and what would count as support: a paragraph for each hypothesis."""
    look = Look(study.used_personas(), study.used_datasets(), list(study.models.values()))
    macro = Words(look).macro("frozen.md.j2", "hypothesis")
    em = [d.key for d in study.used_datasets() if d.role == "em"]
    family = [h.label for h in study.hypotheses] + [key.upper() for key in study.also_claimed()]
    few = len(study.profile.seeds) < MIN_SEEDS
    said = []
    for h in study.hypotheses:
        needed = [g for g in gates_needed(h.estimand, h.direction) if g != "capability" or study.profile.capability]
        said.append(macro(h, em, needed, study.thresholds, family, few))
    # Plain text: what Markdown would take for markup is not escaped.
    return [re.sub(r"\\(\W)", r"\1", " ".join(text.split())) for text in said]


def freeze(study: Study, now: datetime | None = None) -> Path:
    """Write a study's frozen file.

    Raises:
        FreezeError: there is nothing to test, or a file of today that says otherwise.
    """
    if not study.hypotheses:
        raise FreezeError(f"profile {study.name!r} names no hypothesis: there is nothing to freeze")
    now = now or datetime.now(UTC)
    path, parts = folder_of(study) / f"{study.name}-{now:%Y-%m-%d}.json", fixed_parts(study)
    if path.is_file():
        if json.loads(path.read_text(encoding="utf-8"))["fixed"] == parts:
            return path
        raise FreezeError(f"{path} says otherwise, and what is frozen stays: results name every amendment since")
    record = {
        "profile": study.name,
        "title": study.profile.title,
        "frozen": now.isoformat(timespec="seconds"),
        "words": in_words(study),
        "hash": digest(parts),
        "fixed": parts,
    }
    return write_text(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def frozen(study: Study) -> Frozen:
    """How a run stands to the oldest frozen file of its study. Scores that others made were there before any file."""
    data = _first_data(study)
    found = frozen_files(study)
    if not found:
        return Frozen(data=data)
    record = json.loads(found[0].read_text(encoding="utf-8"))
    on, parts = record["frozen"], json.loads(json.dumps(fixed_parts(study)))
    early = not data or datetime.fromisoformat(on) < datetime.fromisoformat(data)
    before = study.profile.source == "trained" and early
    name = found[0].relative_to(study.folder.parent).as_posix()
    return Frozen(on[:10], name, data[:10], before, tuple(amendments_between(record["fixed"], parts)))


def amendments_between(old: Mapping[str, Any], new: Mapping[str, Any], under: str = "") -> Iterator[str]:
    """What differs between two nested mappings: `thresholds alpha: 0.05, now 0.01`."""
    for key in dict.fromkeys([*old, *new]):
        a, b, name = old.get(key), new.get(key), f"{under} {key}".strip()
        if a == b:
            continue
        if name in ("code", "parameters"):  # hashes, by stage
            yield f"{name} of {', '.join(stage for stage in b if a.get(stage) != b[stage])} changed"
        elif isinstance(a, dict) and isinstance(b, dict):
            yield from amendments_between(a, b, name)
        elif isinstance(a, list) and isinstance(b, list):
            gone, come = ([x for x in one if x not in other] for one, other in ((a, b), (b, a)))
            yield f"{name}: {len(come)} added, {len(gone)} removed" if gone or come else f"{name}: another order"
        else:
            yield f"{name}: {_short(a)}, now {_short(b)}"


def _short(value: Any) -> str:
    text = "not there" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:59] + "…"


def _first_data(study: Study) -> str:
    """When the first responses or scores of a run were written, by its manifests; empty without any."""
    if study.profile.source != "trained":
        places = [study.imported / "manifest.json"] if study.imported else []
    else:
        places = [path for stage in DATA for path in study.stage_dir(stage).rglob("manifest.json")]
    return min((json.loads(p.read_text(encoding="utf-8"))["written"] for p in places if p.is_file()), default="")


def frozen_status(study: Study, words: Words) -> str:
    """`frozen` as the sentence that documents say."""
    return words.macro("frozen.md.j2", "status")(frozen(study), study.profile.source == "trained").strip()


def main(arguments: list[str]) -> int:
    """Command line: `python -m cai_em.report.freeze PROFILE`."""
    if len(arguments) != 1:
        print("freeze needs the name of one profile: ./run_all.sh freeze paper", file=sys.stderr)
        return 2
    try:
        study = load(arguments[0])
        path = freeze(study)
    except (ParamsError, MissingFile, FreezeError) as error:
        print(error, file=sys.stderr)
        return 2
    print(*json.loads(path.read_text(encoding="utf-8"))["words"], sep="\n\n")
    print(
        f"\nfrozen in {path.relative_to(study.folder.parent)}: commit it, and run. Results say what was amended since."
    )
    if data := _first_data(study):
        print(f"There are data of {data[:10]} already: results will say that this was not frozen before them.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
