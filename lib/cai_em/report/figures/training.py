"""Parts of the figures of H3: curves along training steps, and what outcomes and losses are called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from cai_em.dynamics.curves import OUTCOMES
from cai_em.report.figures.parts import View


def band(ax: Axes, table: pd.DataFrame, look: dict[str, Any]) -> None:
    """A curve with its interval."""
    ax.plot(table["step"], table["mean"], **look)
    ax.fill_between(table["step"], table["low"], table["high"], color=look["color"], alpha=0.15, lw=0)


def step_axis(ax: Axes, steps: Sequence[int], apart: float = 0.13) -> None:
    """Steps on a scale that is linear up to the first checkpoint and logarithmic from there: dense early.

    Every checkpoint has a tick; from the last on, those are named that lie `apart` (share of the axis) from the next.
    """
    ax.set_xscale("symlog", linthresh=max(1, min(s for s in steps if s > 0)))
    places = ax.xaxis.get_transform().transform(np.asarray(steps, float))
    places = places / places.max()
    named: list[tuple[float, int]] = []
    for place, step in sorted(zip(places, steps), reverse=True):
        if not named or named[-1][0] - place >= apart:
            named.append((place, step))
    ax.set_xticks(list(steps), [str(s) if (p, s) in named else "" for p, s in zip(places, steps)])
    ax.minorticks_off()
    ax.set_xlabel("training step")


def loss_name(view: View, rows: str) -> str:
    """What rows are called on which a loss was measured: those held out of training, or a data set's."""
    if rows == "held out":
        return f"{view.look.dataset(view.trained)}, held out" if view.trained else rows
    return f"{view.look.dataset(rows)} ({view.look.role(rows)})"


def outcome_name(view: View, outcome: str) -> str:
    """What an outcome of a checkpoint is called, losses included."""
    return OUTCOMES.get(outcome) or f"loss, {loss_name(view, outcome)}"
