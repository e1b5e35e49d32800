"""Measure a judge on answers that have reference scores, and keep what was found beside its preset.

    ./run_all.sh calibrate-judge KEY                       asks the judge the published items; says the cost before
    ./run_all.sh calibrate-judge KEY --labelled FILE.csv   a labelled set of one's own, in place of the published items
    ./run_all.sh calibrate-judge KEY --dry-run             the cost alone

A labelled set has the columns `persona, question_id, prompt, response, reference` (0 to 100). What is measured,
agreement, slope and bias by persona, lies in `params/judge_quality/KEY.json` with the date and the model's name as the
server gave it; the validity stage reads it there (`measured_quality`).
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cai_em.analysis.judge_quality import quality
from cai_em.endpoint.calls import Usage
from cai_em.judge import judging
from cai_em.judge.agreement import published_at_hand, quality_file
from cai_em.judge.prompts import load_prompts
from cai_em.records import files
from cai_em.study.loading import judge_presets

LABELLED = ("persona", "question_id", "prompt", "response", "reference")
"""Columns of a labelled set."""

ITEMS = 1_200
"""Published items asked by default: half of them with a reference below 80 where there are as many."""


class CalibrationError(ValueError):
    """The judge cannot be calibrated; the message says why."""


def choose_items(reference: pd.DataFrame, n: int = ITEMS, seed: int = 0) -> pd.DataFrame:
    """Answers to ask, as many of each persona as can be, half of them not aligned: a slope needs both ends of the
    scale.

    Args:
        reference: published responses with scores (`published_at_hand`).

    Returns:
        `LABELLED`, at most n rows.
    """
    table = reference.rename(columns={"alignment": "reference"})
    table = table[table["reference"].notna()]
    rng = np.random.default_rng(seed)
    table = table.iloc[rng.permutation(len(table))]
    bad = table["reference"] < 80
    turn = table.groupby(["persona", bad]).cumcount()
    chosen = []
    for kind in (bad, ~bad):
        part = table[kind].iloc[np.argsort(turn[kind].to_numpy(), kind="stable")]
        chosen.append(part.head(n // 2))
    return pd.concat(chosen, ignore_index=True)[list(LABELLED)]


def read_labelled(path: Path) -> pd.DataFrame:
    """A labelled set from CSV or Parquet.

    Raises:
        CalibrationError: a column is missing, or a reference is not in 0 to 100.
    """
    table = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    lacking = [c for c in LABELLED if c not in table]
    if lacking:
        raise CalibrationError(f"{path}: columns {lacking} are missing; a labelled set has {list(LABELLED)}")
    wrong = table[~table["reference"].between(0, 100)]
    if len(wrong):
        raise CalibrationError(f"{path}: reference must be 0 to 100, found {wrong['reference'].iloc[0]!r}")
    return table[list(LABELLED)]


def as_responses(items: pd.DataFrame) -> pd.DataFrame:
    """The items as a responses table, one after the other."""
    return pd.DataFrame(
        {
            "model": "labelled",
            "persona": items["persona"].astype(str),
            "dataset": "none",
            "seed": 0,
            "question_id": items["question_id"].astype(str),
            "sample": range(len(items)),
            "prompt": items["prompt"].astype(str),
            "response": items["response"].astype(str),
            "n_tokens": pd.array([pd.NA] * len(items), dtype="Int64"),
            "finish_reason": None,
            "sampler": "labelled",
            "adapters": "[]",
            "run_id": "",
        }
    )


def calibrate(items: pd.DataFrame, preset: Any, folder: Path, cache: Path, source: str) -> dict[str, Any]:
    """Ask the judge, measure it, and write what was found beside its preset.

    Returns:
        What was written: `judge, model` (as configured), `served` (as the server named it), `date, source, items,
        unscored, measures`.
    """
    usage = Usage()
    prompts = load_prompts(folder / preset.prompts_file)
    scored = judging.judge(as_responses(items), preset, prompts, cache, usage=usage)
    pairs = items[["persona", "question_id", "reference"]].assign(score=scored["alignment"].to_numpy())
    found = {
        "judge": preset.name,
        "model": preset.model,
        "served": sorted(usage.models),
        "date": datetime.now(UTC).date().isoformat(),
        "source": source,
        "items": len(items),
        "unscored": int(pairs["score"].isna().sum()),
        "measures": quality(pairs).astype(object).where(lambda t: t.notna(), None).to_dict("records"),
    }
    path = quality_file(folder, preset.name)
    path.parent.mkdir(exist_ok=True)
    files.write_text(path, json.dumps(found, ensure_ascii=False, indent=1) + "\n")
    return found


def main(arguments: list[str]) -> int:
    """The command line; 2 where the judge cannot be calibrated."""
    parser = argparse.ArgumentParser(prog="run_all.sh calibrate-judge", description=__doc__.splitlines()[0])
    parser.add_argument("judge", help="a key of params/judges.yaml")
    parser.add_argument("--labelled", type=Path, help="a labelled set of your own (CSV or Parquet)")
    parser.add_argument("--items", type=int, default=ITEMS, help="published items to ask")
    parser.add_argument("--dry-run", action="store_true", help="say the cost, ask nothing")
    asked = parser.parse_args(arguments)
    folder = files.root() / "params"
    try:
        known = judge_presets(folder)
        if asked.judge not in known:
            raise CalibrationError(f"params/judges.yaml has no {asked.judge!r} (it has: {', '.join(known)})")
        preset = known[asked.judge]
        if preset.kind == "local":
            raise CalibrationError("the local judge is measured by itself, whenever it is fitted")
        if asked.labelled:
            items, source = read_labelled(asked.labelled), str(asked.labelled)
        else:
            reference = published_at_hand(folder / "published_selection.csv")
            if reference is None:
                raise CalibrationError(
                    "the published items are not in the download cache: run `./run_all.sh published` first, or give "
                    "a labelled set (--labelled)"
                )
            items, source = choose_items(reference, asked.items), "published scores"
    except CalibrationError as error:
        print(error, file=sys.stderr)
        return 2
    cache = files.root() / "results" / "judge_cache.sqlite"
    prompts = load_prompts(folder / preset.prompts_file)
    print(judging.estimate(as_responses(items), preset, prompts, cache))
    if asked.dry_run:
        return 0
    found = calibrate(items, preset, folder, cache, source)
    print(pd.DataFrame(found["measures"]).to_string(index=False))
    print(f"kept in {quality_file(folder, preset.name)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
