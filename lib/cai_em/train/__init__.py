"""Training: a persona's preference pairs and its adapter (DPO), and fine-tuning on top of it (SFT).

Adapters that should be active or frozen are measured before the first step and after the last; loss masks are
checked on the tokens; a run that is killed leaves nothing half-made.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "answers": ["EndpointGenerator", "EngineGenerator", "LocalGenerator"],
        "introspection": ["conversations", "introspect", "introspection_prompt", "read_introspection"],
        "pairs": ["Filters", "counts", "make_pairs", "side_by_side", "teacher_of"],
        "train": ["train_dpo", "train_sft"],
        "trainer": ["load_for_training", "split_rows"],
    },
)
