"""Responses in, scores out: one interface for judges by API and the local one, and how far they agree.

A response without a score keeps its row, with the flag that says why. What a judge is asked is in `params/`; how far
it can be believed is measured here, and said beside its scores.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "agreement": ["LIKENESS_AUC_MIN", "calibrated_quality", "fit_likeness", "measured_quality"],
        "judging": ["EXPRESSION", "estimate", "estimate_likeness", "rate_likeness"],
        "prompts": ["JudgePrompts", "addresses_judge", "load_prompts"],
        "rater": ["make_ready"],
    },
)
