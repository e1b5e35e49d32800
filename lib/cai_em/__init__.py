"""Constitutional AI x Emergent Misalignment: a verdict that can be trusted."""

__version__ = "0.1.0"
