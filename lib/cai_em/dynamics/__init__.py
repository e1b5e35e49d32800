"""H3 and H4: when misalignment arises in training, and whether its direction transfers between personas.

Runs with checkpoints and their curves and transitions (H3); directions in the residual stream, interventions along
them and their effects (H4). Whole tables in, whole tables with a `model` column out.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "curves": ["course", "curve_table", "em_indicator"],
        "h3": [
            "generality",
            "h3_gates",
            "h3_table",
            "h3_verdicts",
            "judge_gates",
            "preset_differences",
        ],
        "h4": ["effects", "h4_gates", "h4_table", "h4_verdicts", "transfer_tests"],
        "runs": [
            "measure_losses",
            "plan_runs",
            "run_geometries",
            "sample_snapshots",
            "snapshots",
            "train_runs",
            "with_steps",
        ],
        "steering": ["before_and_after", "find_directions", "plan_interventions", "steer"],
        "timing": ["transition_comparisons", "transitions"],
    },
)
