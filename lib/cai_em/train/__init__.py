"""Training: a persona's preference pairs and its adapter (DPO), and fine-tuning on top of it (SFT).

Adapters that should be active or frozen are measured before the first step and after the last; loss masks are
checked on the tokens; a run that is killed leaves nothing half-made.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "answers": ["EndpointGenerator", "EngineGenerator", "LocalGenerator", "student_of"],
        "grid": ["Failed", "Task", "is_finished", "keep", "raise_failed", "train_persona", "train_tasks"],
        "introspection": ["conversations", "introspect", "introspection_prompt"],
        "pairs": ["Filters", "counts", "make_pairs", "side_by_side", "teacher_of"],
        "train": ["train_dpo", "train_sft"],
        "trainer": ["TrainingError", "load_for_training", "split_rows"],
    },
)
