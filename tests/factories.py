"""Small made-up studies for the tests: labels, tables, tiny models, a judge that needs no server."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
from cai_em.dynamics.curves import OUTCOMES
from cai_em.report.style import Look
from cai_em.study.entries import LoraPreset, ModelSpec, SamplingPreset

TINY = ModelSpec(key="tiny", label="tiny", source="tiny", dtype="float32")
"""A two-layer model with random weights."""
COLOURS = ("#4d4d4d", "#882255", "#117733", "#332288")


def sampling(**changes) -> SamplingPreset:
    """Sampling parameters for a tiny model."""
    usual = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 4, "samples_per_question": 1}
    return SamplingPreset(**{**usual, "backend": "transformers", "dtype": "float32", **changes})


def look_of(*personas: str, datasets: Sequence = ()) -> Look:
    """Labels and colours of personas: each is called by its key, with a capital."""
    entries = [
        SimpleNamespace(key=key, label=key.title(), order=i, colour=COLOURS[i % len(COLOURS)])
        for i, key in enumerate(personas)
    ]
    return Look(entries, datasets)


def scores_of(rows: Sequence[tuple], columns: str, **same) -> pd.DataFrame:
    """A table with the columns that a test needs, named in one string; `same` for all rows."""
    return pd.DataFrame(rows, columns=columns.split()).assign(**{"model": "m", **same})


def course_of(
    curves: Mapping[tuple[str, str], np.ndarray], steps: Sequence[int], preset: str = "p", model: str = "m"
) -> pd.DataFrame:
    """The long table of `dynamics.course` from (persona, outcome) -> (units, seeds, steps)."""
    tables = []
    for (persona, outcome), y in curves.items():
        y = np.asarray(y, float)
        unit, seed, step = (i.ravel() for i in np.indices(y.shape))
        table = pd.DataFrame({"seed": seed, "step": np.asarray(steps)[step], "unit": [f"q{i}" for i in unit]})
        known = y.ravel() if outcome in OUTCOMES else np.nan
        table = table.assign(persona=persona, outcome=outcome, value=y.ravel(), least=known, most=known)
        tables.append(table.assign(model=model, preset=preset))
    return pd.concat(tables, ignore_index=True)


def responses_of(*texts: str, **same) -> pd.DataFrame:
    """Responses of one condition to one question, as far as a judge needs them."""
    usual = {"model": "m", "persona": "p", "dataset": "d", "seed": 0, "question_id": "q", "prompt": "Q"}
    return pd.DataFrame({"response": texts, "sample": range(len(texts))}).assign(**{**usual, **same})


def random_adapter(
    folder: Path, preset: LoraPreset | None = None, seed: int = 0, *, std: float = 0.15, name: str = "em", cache=None
) -> Path:
    """An adapter of the tiny model with random weights, such that it visibly changes what it says."""
    import torch
    from cai_em.model import adapters, load, stacking

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        base = load.load_model(TINY, dtype="float32", cache_dir=cache)
        stacked = stacking.stack(base, None, preset or LoraPreset(r=2, alpha=4), name)
        for key, parameter in stacked.named_parameters():
            if ".lora_B." in key:
                torch.nn.init.normal_(parameter, std=std)
    return adapters.save_adapter(stacked, name, folder)
