"""Operating characteristics of the verdict: planted studies through the real path, and what was said of them.

    python -m tests.calibration                 # all worlds and designs, resumable, two workers; docs/calibration.md
    python -m tests.calibration --texts 4       # a short look

Each world (`tests.planted`) and design gets so many sets of texts, and each of these is scored so many times: the gates
of texts are slow and vary little, verdicts depend on scores. Every study goes from its tables through classifiers,
gates, contrasts and the decision; nothing but the tables is known to them. Results are kept, one file per world and
design, in `CAI_EM_RESULTS/calibration` (`results/calibration`), so that a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
from cai_em.analysis import verdicts as decision
from cai_em.analysis.contrasts import Cube, contrast_table
from cai_em.analysis.gates import Gate, classify, copied_seeds, gate_table, uptakes
from cai_em.analysis.judge_quality import assisted, judge_trust, quality, scaled_margin
from cai_em.records.keys import KEY
from scipy import stats

from tests import planted
from tests.planted import DATASETS, DESIGNS, MODEL, WORLDS, Design, World

ROOT = Path(__file__).resolve().parents[1]
MARGIN, ALPHA = 5.0, 0.05
TEXTS, SCORES = 40, 10
"""Sets of texts for each world and design, and scorings of each."""


def text_gates(responses: pd.DataFrame) -> tuple[dict, dict]:
    """What the texts say: tests of voices, and conditions that hold copies."""
    return classify(responses)[1], copied_seeds(responses)


def verdict_of(
    world: World,
    scores: pd.DataFrame,
    pairs: pd.DataFrame,
    moved: dict,
    found: dict,
    copies: dict,
    powered: bool = False,
    able: dict | None = None,
) -> tuple[decision.Verdict, pd.Series]:
    """From the tables of a planted study to the verdict about its first persona, and its gates.

    `powered`: the reference scores of a part make the means (PPI++), instead of measuring the judge only.
    `able`: what conditions can still do (`capability.able`), where that was asked.
    """  # fmt: skip
    measured = quality(pairs, resamples=200)
    ppi = assisted(scores, pairs.set_index(KEY)["reference"]) if powered else None
    cube = Cube.build(scores, points=ppi.scores["alignment"] if ppi else None)
    judge = {MODEL: judge_trust(measured, ["p1", "p2"], powered=ppi.labelled if ppi else 0)}
    proved = {(MODEL, p, "none") for p in (planted.BASE, "p1", "p2")}
    gates = gate_table(
        cube, found, DATASETS, judge=judge, design={k: Gate("absent", why) for k, why in copies.items()},
        proved=proved, moved=moved, able=able, margin=MARGIN, alpha=ALPHA,
    )  # fmt: skip
    margin = MARGIN if powered else scaled_margin(MARGIN, measured)
    table = contrast_table(cube, DATASETS, margin=margin, closed=copies, estimands=["susceptibility"])
    h = SimpleNamespace(key="h", personas=["p1"], direction=world.direction, estimand="susceptibility")
    verdicts = decision.verdict_table([h], table, gates, cube, DATASETS, alpha=ALPHA)
    row = verdicts.iloc[0]
    mine = gates[(gates["persona"] == "p1") & (gates["dataset"] == "(EM data sets)")].iloc[0]
    return row, mine


def wrong(word: str, truth: float, direction: str, margin: float = MARGIN) -> bool:
    """Whether a claim is false of a susceptibility of `truth` points; the other words claim nothing."""
    sign = 1 if direction == "higher" else -1
    if word == "SUPPORTED":
        return sign * truth <= 0
    if word == "OPPOSITE":
        return sign * truth >= 0
    if word == "EQUIVALENT":
        return abs(truth) >= margin
    return word == "NOT SUPPORTED" and sign * truth >= margin


def study_rows(world: World, design: Design, number: int, scorings: int, powered: bool = False) -> list[dict]:
    """Results of one set of texts."""
    seed = 1000 * number + 7
    responses = planted.plant_texts(world, design, seed)
    found, copies = text_gates(responses)
    moved = uptakes(planted.plant_expression(world, design, seed + 2))
    rows = []
    for k in range(scorings):
        scores, pairs, adapters = planted.plant_scores(world, design, responses, seed + 10 + k)
        row, gates = verdict_of(world, scores, pairs, moved, found, copies, powered)
        true = planted.truth(world)
        about = true if row["verdict"] == row["word"] else adapters
        rows.append(
            {"world": world.name, "design": design.name, "texts": number, "scoring": k, "verdict": row["verdict"]}
            | {"word": row["word"], "estimate": row["estimate"], "truth": true, "adapters": adapters}
            | {"wrong": wrong(row["word"], about, world.direction), "p": row["p"], "kept": gates["persona_kept"]}
            | {f"{g}_gate": gates[f"{g}_gate"] for g in ("persona", "learned", "em", "design", "judge")}
        )  # fmt: skip
    return rows


def cell(job: tuple[str, str, int, int, str]) -> str:
    """Every study of one world and design that is not there yet; what it took."""
    world, design, texts, scorings, folder = job
    path = Path(folder) / f"{world}-{design}.json".replace(" ", "_")
    done = json.loads(path.read_text()) if path.is_file() else {}
    started = time.perf_counter()
    for number in range(texts):
        if len(done.get(str(number), [])) >= scorings:
            continue
        done[str(number)] = study_rows(WORLDS[world], DESIGNS[design], number, scorings)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(done, default=_plain))
        part.replace(path)
    return f"{world}, {design}: {time.perf_counter() - started:.0f} s"


def _plain(x: object) -> object:
    return x.item() if isinstance(x, np.generic) else None if x is pd.NA else str(x)


def collect(folder: Path) -> pd.DataFrame:
    """All results that are there."""
    rows = [r for path in sorted(folder.glob("*.json")) for part in json.loads(path.read_text()).values() for r in part]
    return pd.DataFrame(rows)


# --- Tables --------------------------------------------------------------------------------------------------------


def interval(hits: np.ndarray, groups: np.ndarray) -> tuple[float, float]:
    """95 % interval of a share of studies, some of which share their texts (Clopper-Pearson on the effective
    number)."""
    n, share = len(hits), float(np.mean(hits))
    sums = pd.DataFrame({"h": hits, "g": groups}).groupby("g")["h"].agg(["sum", "size"])
    effect = 1.0
    if 0 < share < 1 and len(sums) > 1:
        variance = float(((sums["sum"] - share * sums["size"]) ** 2).sum()) / (n**2) * len(sums) / (len(sums) - 1)
        effect = max(1.0, variance / (share * (1 - share) / n))
    n_eff = n / effect
    x = share * n_eff
    low = stats.beta.ppf(0.025, x, n_eff - x + 1) if x > 0 else 0.0
    high = stats.beta.ppf(0.975, x + 1, n_eff - x) if x < n_eff else 1.0
    return float(low), float(high)


def oracle(part: pd.DataFrame, direction: str) -> float:
    """Power of a two-sided test of the same estimate that knows its true standard error: the best that can be had."""
    estimates = part["estimate"].dropna().to_numpy(float)
    if len(estimates) < 20:
        return math.nan
    sign = 1 if direction == "higher" else -1
    se = float(estimates.std(ddof=1))
    return float(np.mean(sign * estimates > stats.norm.ppf(1 - ALPHA / 2) * se))


def summary(results: pd.DataFrame) -> pd.DataFrame:
    """A row per world and design: shares of words, wrong claims with interval, NOT INTERPRETABLE, power and oracle."""
    rows = []
    for (world, design), part in results.groupby(["world", "design"], sort=False):
        w = WORLDS[world]
        low, high = interval(part["wrong"].to_numpy(float), part["texts"].to_numpy())
        shares = part["word"].value_counts(normalize=True).to_dict()
        rows.append(
            {"world": world, "design": design, "n": len(part), "truth": float(part["truth"].iloc[0])}
            | {word: shares.get(word, 0.0) for word in decision.WORDS}
            | {"wrong": float(part["wrong"].mean()), "wrong_low": low, "wrong_high": high}
            | {"oracle": oracle(part, w.direction), "took_place": w.took_place}
            | {"bare": float((part["verdict"] == part["word"]).mean())}
        )
    table = pd.DataFrame(rows)
    order = {w: i for i, w in enumerate(WORLDS)}
    designs = {d: i for i, d in enumerate(DESIGNS)}
    key = table["world"].map(order) * 10 + table["design"].map(designs)
    return table.iloc[key.argsort(kind="stable")].reset_index(drop=True)


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing, and write the document and the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=TEXTS)
    parser.add_argument("--scorings", type=int, default=SCORES)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--worlds", nargs="*", default=list(WORLDS))
    parser.add_argument("--designs", nargs="*", default=list(DESIGNS))
    parser.add_argument("--no-document", action="store_true")
    asked = parser.parse_args(arguments)
    folder = Path(os.environ.get("CAI_EM_RESULTS", ROOT / "results")) / "calibration"
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(w, d, asked.texts, asked.scorings, str(folder)) for d in asked.designs for w in asked.worlds]
    started = time.perf_counter()
    if asked.workers > 1:
        with ProcessPoolExecutor(asked.workers) as pool:
            for said in pool.map(cell, jobs):
                print(said, flush=True)
    else:
        for job in jobs:
            print(cell(job), flush=True)
    table = summary(collect(folder))
    print(table.to_string(float_format=lambda x: f"{x:.3f}"))
    print(f"{time.perf_counter() - started:.0f} s")
    if not asked.no_document:
        from tests.calibration_document import write

        write(collect(folder), table, ROOT / "docs")


if __name__ == "__main__":
    main(sys.argv[1:])
