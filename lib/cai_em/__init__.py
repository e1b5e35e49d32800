"""Constitutional AI x Emergent Misalignment: a verdict that can be trusted."""

import gc

__version__ = "0.1.0"

# Full collections seldom: torch, transformers and peft make half a million objects that stay, and Python would walk all
# of them eight times while they are imported: a sixth of a job's start (docs/LOG.md). What dies young is collected as
# before; where a model is given up, `gc.collect` is called, and by transformers before each training.
gc.set_threshold(*gc.get_threshold()[:2], 1000)
