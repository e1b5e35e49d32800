"""The same conditions in several models."""

from __future__ import annotations

import pandas as pd

from cai_em.report import style
from cai_em.report.figures.parts import Drawing, View, figure, grid_axes, sized_bound


@figure("cross-model", "Across models", "06_results/shared_conditions", "06_results/design", order=20, per=())
def _draw(view: View, conditions: pd.DataFrame, design: pd.DataFrame) -> Drawing | None:
    """Conditions that several models share: mean alignment of one model against the first."""
    look = view.look
    models = look.sort_models(design["model"])
    if len(models) < 2:
        return None
    first = next(iter(conditions["first"]), models[0])
    others = [m for m in models if m != first]
    fig, axes = grid_axes(len(others), 2, 3.4)
    notes = []
    for ax, other in zip(axes, others):
        shared = conditions[conditions["model"] == other]
        if shared.empty:
            ax.text(0.5, 0.5, "no shared condition", transform=ax.transAxes, ha="center")
            continue
        x, y, roles = shared["mean_first"], shared["mean"], shared["dataset"].map(look.role)
        for role in dict.fromkeys(look.role(d) for d in look.sort_datasets(shared["dataset"])):
            ax.plot(x[roles == role], y[roles == role], marker=style.ROLE_MARKER[role], color=style.ROLE_COLOUR[role],
                    ls="none", mec=style.PAPER, mew=0.4, label=style.ROLE_LABEL[role])  # fmt: skip
        low, high = sized_bound(min(x.min(), y.min()), max(x.max(), y.max()))
        ax.plot([low, high], [low, high], color=style.MUTED, lw=0.8, ls="--")
        ax.set(xlim=(low, high), ylim=(low, high), aspect="equal")
        ax.set_xlabel(f"{look.model(first)}: mean alignment")
        ax.set_ylabel(f"{look.model(other)}: mean alignment")
        ax.legend(loc="upper left")
        rank = shared["rank_correlation"].iloc[0]
        notes.append(
            f"{look.model(other)} scores {shared['difference'].mean():+.1f} points on average over {len(shared)} "
            "shared conditions" + (f" (rank correlation {rank:.2f})" if pd.notna(rank) else "")
        )
    caption = f"Mean alignment of the same conditions in {look.model(first)} and another model. {'; '.join(notes)}."
    return Drawing(fig, caption, f"Scatter plot of condition means, {len(models)} models.")
