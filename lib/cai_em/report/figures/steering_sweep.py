"""H4: outcomes by strength of steering."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from cai_em.dynamics.curves import OUTCOMES
from cai_em.report import style
from cai_em.report.figures.parts import Drawing, View, figure
from cai_em.report.style import line_look


@figure("steering-sweep", "Steering by layer and strength", "10_steering/sweep", order=41, section="steering")
def _draw(view: View, found: pd.DataFrame) -> Drawing:
    """Outcomes by strength, a line per layer; coherence beside them is what steering costs."""
    fig, axes = plt.subplots(1, len(OUTCOMES), figsize=style.figure_size(2.6), squeeze=False)
    shown = sorted(found["layer"].unique())
    for ax, outcome in zip(axes[0], OUTCOMES):
        here = found[found["outcome"] == outcome]
        for i, layer in enumerate(shown):
            part = here[here["layer"] == layer].sort_values("strength")
            error = np.abs(np.stack([part["delta"] - part["low"], part["high"] - part["delta"]]))
            name = f"layer {layer} of {found['layers'].iloc[0]}"
            ax.errorbar(part["strength"], part["delta"], yerr=error, lw=1.2, elinewidth=0.8, label=name, **line_look(i))
        ax.axhline(0, color=style.MUTED, lw=0.7)
        ax.set_title(OUTCOMES[outcome])
        ax.set_xlabel("strength")
    axes[0][0].set_ylabel("change")
    fig.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    main = found[found["outcome"] == "alignment"]
    strongest = main.loc[main["delta"].abs().idxmax()]
    cost = found[(found["outcome"] == "coherence") & (found["dataset"] == strongest["dataset"])]["delta"].iloc[0]
    said = (
        f"the largest change of alignment, {strongest['delta']:+.1f}, is at layer {strongest['layer']}, strength "
        f"{strongest['strength']:+g}, where coherence changes by {cost:+.1f}"
    )
    caption = (
        "The direction of the model itself, at several layers and strengths: above 0 added to the untuned model, below "
        f"0 subtracted from the tuned one. Intervals over questions. {said[0].upper()}{said[1:]}."
    )
    return Drawing(fig, caption, f"Line plots of three outcomes against strength for {len(shown)} layers; {said}.")
