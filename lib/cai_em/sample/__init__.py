"""Responses of conditions: every condition of a model answers every question from one load of it.

Every random number comes from the response's own seed, whatever the batch, the order or the engine's load; finished
conditions are kept as they come.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "capability": ["choices"],
        "conditions": ["Condition", "Decoding", "Job", "Request", "condition_of", "render"],
        "sampling": ["beside", "engine_name", "lengths", "open_engine", "probe_table", "sample", "sample_all", "Asked"],
        "torch_engine": ["TransformersEngine"],
    },
)
