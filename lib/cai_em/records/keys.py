"""The columns that name things in every table, and the two keys that have a meaning of their own."""

from __future__ import annotations

KEY = ["model", "persona", "dataset", "seed", "question_id", "sample"]
"""Columns that name one response."""

CONDITION = KEY[:4]
"""Columns that name one condition."""

COMPARISON = KEY[:3]
"""Columns that name one comparison of a persona with the baseline on the same model and data set."""

BASELINE = "baseline"
"""The persona that has no adapter."""

NO_DATASET = "none"
"""The data set of a condition without fine-tuning."""

FLAGS = ("REFUSAL", "CODE", "PARSE", "API", "OTHER")
"""Why a score is missing: the judge said REFUSAL or CODE, its answer could not be parsed, the call failed; OTHER:
another word of the judge's, or (in somebody else's file) no reason said."""

SKIPPED = "SKIPPED"
"""Flag of a coherence that nobody asked for: other people's judgings may be of alignment only."""
