"""H4: whose direction does what to whom."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from cai_em.dynamics.directions import RANDOM, direction_label, persona_of
from cai_em.report import style
from cai_em.report.figures.parts import Drawing, View, figure


def _diverging(data: np.ndarray) -> float:
    """The limit of a scale around 0, in points: 1 at the least, or what is next to nothing would look like much."""
    return float(np.nanmax(np.abs(np.append(data, 1.0))))


def _matrix(
    ax: Axes, data: np.ndarray, rows: Sequence[str], columns: Sequence[str], text: Callable[[float], str]
) -> None:
    """A small matrix around 0, each cell with its number; a missing cell says so."""
    limit = _diverging(data)
    image = ax.imshow(np.ma.masked_invalid(data), cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
    for (i, j), v in np.ndenumerate(data):
        shade = style.lab(style.linear_rgb(tuple(image.cmap(image.norm(v))[:3])))[0] if np.isfinite(v) else 100
        ax.text(j, i, text(v) if np.isfinite(v) else "none", ha="center", va="center", fontsize=7,
                color="white" if shade < 55 else "black")  # fmt: skip
    ax.set_yticks(range(len(rows)), rows)
    ax.set_xticks(range(len(columns)), columns)
    ax.grid(visible=False)


@figure("steering-transfer", "Transfer between personas", "10_steering/transfer", order=42, section="steering")
def _draw(view: View, found: pd.DataFrame) -> Drawing:
    """Transfer matrices: whose direction (rows) does what to whom (columns), in alignment and in coherence."""
    look = view.look
    kinds = [k for k in ("add", "ablate") if (found["kind"] == k).any()]
    outcomes = ("alignment", "coherence")
    targets = look.sort_personas(found["target"])
    order = {p: i for i, p in enumerate(look.sort_personas(persona_of(s) for s in found["source"]))}
    sources = sorted(set(found["source"]), key=lambda s: (s == RANDOM, order[persona_of(s)], s))
    height = 0.9 + len(kinds) * (0.5 + 0.28 * len(sources))
    fig, axes = plt.subplots(len(kinds), len(outcomes), figsize=style.figure_size(height), squeeze=False)
    for row, kind in zip(axes, kinds):
        for ax, outcome in zip(row, outcomes):
            here = found[(found["kind"] == kind) & (found["outcome"] == outcome)]
            data = here.pivot_table(index="source", columns="target", values="delta").reindex(sources, columns=targets)
            names = [direction_label(s, look) for s in sources], [look.persona(t) for t in targets]
            _matrix(ax, data.to_numpy(), *names, lambda v: f"{round(v, 1) + 0.0:+.1f}")
            done = "added to untuned" if kind == "add" else "ablated from tuned"
            ax.set_title(f"{outcome}, {done}")
    main = found[found["outcome"] == "alignment"]
    own, whose = main["source"] == main["target"], main["source"].map(persona_of)
    parts = {
        "own": main[own],
        "own of another run": main[~own & (whose == main["target"])],
        "another's": main[(whose != main["target"]) & (main["source"] != RANDOM)],
    }
    said = ", ".join(f"{what} {part['delta'].mean():+.1f}" for what, part in parts.items() if len(part))
    caption = (
        "What a persona's direction (rows) changes in another persona (columns), in points against the same model "
        f"without intervention, all directions of one length; paired by {int(found['n_questions'].max())} questions. "
        f"Mean change of alignment: {said}."
    )
    return Drawing(
        fig, caption, f"Matrices of {len(sources)} directions by {len(targets)} personas. Alignment: {said}."
    )
