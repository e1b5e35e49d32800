"""Pins: the commit of every hub repository that a profile needs and whose revision is still empty.

    ./run_all.sh pin paper

What is downloaded must not change under a study, so each repository is named with its commit. Guessed ones would be
worse than none, so some are empty in `params/`; this asks the hub what they are today, and writes them, with the date,
where they belong. Nothing is downloaded, and no consent is needed to be told a commit.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from cai_em.records.files import root, write_text
from cai_em.study.entries import ParamsError


class PinError(RuntimeError):
    """A commit cannot be had. The message names each repository and why."""


@dataclass(frozen=True)
class Unpinned:
    """An empty revision.

    Attributes:
        file: where it stands.
        repo: the repository.
        kind: `model` or `dataset`, as the hub calls it.
        place: at which character the commit goes.
        line: in which line, from 0.
    """

    file: Path
    repo: str
    kind: str
    place: int
    line: int


def unpinned(profile: str, folder: Path) -> list[Unpinned]:
    """The empty revisions that a profile needs: of its models, their ready-made personas, and further prompts.

    Raises:
        ParamsError: there is no such profile, or it names a model that is not there.
    """
    path = Path(profile) if Path(profile).suffix == ".yaml" else folder / "profiles" / f"{profile}.yaml"
    try:
        wanted = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ParamsError(f"{path}: no such profile") from error
    models = _mapping(_nodes(folder / "models.yaml"))
    found: list[Unpinned] = []
    for name in wanted.get("models", []):
        if name not in models:
            raise ParamsError(f"{path}: models names {name!r}, which params/models.yaml does not have")
        entry = _mapping(models[name])
        if "hub_id" in entry:
            found += _empty(entry, folder / "models.yaml", "hub_id", "model")
        if wanted.get("personas_from") == "hub" and "persona_adapters" in entry:
            for repository in entry["persona_adapters"].value:
                found += _empty(_mapping(repository), folder / "models.yaml", "repo", "model")
    if wanted.get("data") == "fetched":
        texts = _mapping(_nodes(folder / "fetched.yaml"))
        if "extra_prompts" in texts:
            found += _empty(_mapping(texts["extra_prompts"]), folder / "fetched.yaml", "repo", "dataset")
    return found


def _nodes(file: Path) -> yaml.Node:
    return yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)


def _mapping(node: Any) -> dict[str, yaml.Node]:
    return {key.value: value for key, value in node.value}


def _empty(entry: dict[str, yaml.Node], file: Path, name: str, kind: str) -> Iterator[Unpinned]:
    revision = entry.get("revision")
    if revision is not None and not revision.value:
        yield Unpinned(file, entry[name].value, kind, revision.start_mark.index, revision.start_mark.line)


def commit_of(repo: str, kind: str) -> str:
    """A repository's commit on the hub (or on the server that `HF_ENDPOINT` names), now.

    Raises:
        PinError: it is not there, or the hub cannot be reached.
    """
    import httpx
    from huggingface_hub import HfApi

    try:
        commit = HfApi(endpoint=os.environ.get("HF_ENDPOINT")).repo_info(repo, repo_type=kind).sha
    except (OSError, httpx.HTTPError) as error:  # of the hub and of the network
        raise PinError(f"{repo}: {str(error).strip().splitlines()[0]}") from error
    if not commit:
        raise PinError(f"{repo}: the hub names no commit")
    return commit if isinstance(yaml.safe_load(commit), str) else f"'{commit}'"  # one of digits alone is a number


def pin(profile: str, folder: str | Path | None = None) -> list[str]:
    """Write the commits of all empty revisions that a profile needs: all of them, or none.

    Args:
        profile: a name, or the path of a YAML file.
        folder: the `params/` folder; the repository's by default.

    Returns:
        What was written, a line for each.

    Raises:
        ParamsError: there is no such profile.
        PinError: commits that cannot be had, each with its cause.
    """
    folder = Path(folder) if folder else root() / "params"
    empty, commits, wrong = unpinned(profile, folder), {}, []
    for one in empty:
        try:
            commits[one] = commit_of(one.repo, one.kind)
        except PinError as error:
            wrong.append(str(error))
    if wrong:
        raise PinError("\n".join(wrong))
    today = datetime.now(UTC).date().isoformat()
    for file in {one.file for one in empty}:
        text = file.read_text(encoding="utf-8")
        lines = {one.line for one in empty if one.file == file}
        for one in sorted((o for o in empty if o.file == file), key=lambda o: -o.place):
            text = f"{text[: one.place]} {commits[one]}{text[one.place :]}"
        marked = [
            f"{line}{';' if ' #' in line else ' #'} pinned {today}" if number in lines else line
            for number, line in enumerate(text.split("\n"))
        ]
        write_text(file, "\n".join(marked))
    return [f"{one.file.name}: {one.repo} at {commits[one]}" for one in empty]


def main(arguments: list[str]) -> int:
    """Command line: `python -m cai_em.workflow.pin [PROFILE]`, `paper` by default."""
    try:
        said = pin(arguments[0] if arguments else "paper")
    except (ParamsError, PinError) as error:
        print(f"nothing was pinned:\n{error}", file=sys.stderr)
        return 2
    print("\n".join(said) or "every revision that the profile needs is pinned already")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
