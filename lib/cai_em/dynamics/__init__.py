"""H3 and H4: when misalignment arises in training, and whether its direction transfers between personas.

Runs with checkpoints and their curves and transitions (H3); directions in the residual stream, interventions along
them and their effects (H4). Whole tables in, whole tables with a `model` column out.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "curves": ["CLAIMED", "behaviour_curves", "em_indicator", "loss_curves"],
        "directions": ["before", "cosine_table", "reached"],
        "h3": ["generality", "h3_table", "h3_verdict", "persona_gate", "preset_differences", "uptake_gate"],
        "h4": ["CONTRASTS", "acts", "effects", "em_present", "h4_table", "h4_verdict", "transfer_tests"],
        "interventions": ["Intervention", "contrasts_of", "sample_steered", "sweep", "transfer"],
        "runs": ["losses", "plan_runs", "run_geometry", "train_run", "with_steps"],
        "timing": ["transition_comparisons", "transitions"],
    },
)
