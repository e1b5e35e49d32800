"""Published files that could not be had: said loudly, and noticed when they arrive.

python -m cai_em.workflow.arrivals needed PROFILE LOG    # how many files a run will download, where there are any
python -m cai_em.workflow.arrivals arrived PROFILE       # can be had now what the last run went without?
python -m cai_em.workflow.arrivals left-out PROFILE      # what the last run went without, said so that all see it
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cai_em.study import loading, sources
from cai_em.study.published import (
    JUDGINGS,
    LISTS,
    REMEDY,
    LeftOut,
    read_file_list,
    read_left_out,
    read_missing,
    read_selection,
)
from cai_em.study.sources import COMMIT, REPO, Pinned


def banner(missing: Mapping[str, str]) -> str:
    """What is left out (name -> why), in words nobody overlooks; empty where nothing is."""
    lines = [f"LEFT OUT: {what}: {why}" for what, why in missing.items()]
    rule = "!" * min(max(map(len, lines), default=0), 100)
    return "\n".join([rule, *lines, REMEDY, rule]) if lines else ""


def arrived(left_out: Mapping[str, LeftOut], **where: Any) -> list[str]:
    """What was left out and could be had now: its files are cached by now, or its host answers again.

    A model needs all of its files (the host is asked for the first that is not cached), further judgings any.

    Args:
        left_out: from `read_left_out`.
        **where: `cache, base_url, timeout_s` of `sources.obtainable`.
    """
    found = []
    for what, entry in left_out.items():
        pins = [Pinned(REPO, COMMIT, path) for path in entry.files]
        absent = [pin for pin in pins if not sources.cached(pin, where.get("cache")).is_file()]
        some = what == JUDGINGS and len(absent) < len(pins)
        if some or not absent or sources.obtainable(absent[0], **where):
            found.append(what)
    return found


def needed(folder: str | Path, models: Sequence[str], cache: str | Path | None = None) -> tuple[int, int]:
    """How many of the listed files of some models are not in the cache, and how many are listed.

    Args:
        folder: the `params/` folder with the lists.
        models: which models.
        cache: the cache's root.
    """
    lists = [read(Path(folder) / name) for read, name in zip((read_selection, read_file_list), LISTS)]
    paths = [path for table in lists for path in table.loc[table["model"].isin(list(models)), "path"]]
    absent = sum(not sources.cached(Pinned(REPO, COMMIT, path), cache).is_file() for path in paths)
    return absent, len(paths)


# --- Command line -------------------------------------------------------------------------------------------------


def main(arguments: list[str]) -> int:
    """`needed PROFILE LOG`, `arrived PROFILE` (exit status 0: yes, 1: no) or `left-out PROFILE`."""
    match arguments:
        case ["needed", profile, log]:
            study = loading.load(profile)
            absent, listed = needed(study.folder, list(study.models))
            if absent:
                print(f"downloading {absent} of {listed} published files; log: {log}")
        case ["arrived", profile]:
            found = arrived(read_left_out(loading.load(profile).stage_dir("07_published")))
            if found:
                print(f"can be had now, and was left out: {', '.join(found)}: importing again")
            return 0 if found else 1
        case ["left-out", profile]:
            if text := banner(read_missing(loading.load(profile).stage_dir("07_published"))):
                print(text)
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
