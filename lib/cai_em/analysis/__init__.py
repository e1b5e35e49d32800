"""From whole score tables to whole result tables: outcomes, comparisons, gates, verdicts, power, claims.

Questions and seeds are the units, responses are not. Every comparison carries its gate; the published rules stand
beside, to be recomputed. No text, no figure, no profile: a reason is data, a sentence is made in `report`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "capability": ["able", "capability", "with_capability"],
        "claims": [
            "COHERENCE",
            "CORRECTIONS",
            "ESTIMAND_CHOICES",
            "MISSING_CHOICES",
            "PERSONAS",
            "ROLES",
            "RULES",
            "TESTS",
            "Universe",
            "comparison_claims",
            "influence",
            "judgings",
            "verdict_claim",
            "verdict_specifications",
            "with_gates",
        ],
        "compare": ["compare_all"],
        "contrasts": ["POOLED", "Cube", "all_contrasts", "contrast_table", "four_arms", "question_contrasts"],
        "controls": ["controls"],
        "gates": [
            "SCOPES",
            "Made",
            "attach",
            "by_reference",
            "classify",
            "comparable",
            "constant_judge",
            "gate_table",
            "made_as_designed",
            "made_table",
            "role_changes",
            "uptakes",
        ],
        "judge_quality": ["assisted", "from_reference", "from_repeats", "judge_trust", "quality", "scaled_margin"],
        "outcome": ["outcomes", "pooled_means"],
        "power": ["claimed_groups", "components", "power_table", "typical_components"],
        "published_rules": [
            "analyse",
            "by_persona",
            "design",
            "hypothesis_table",
            "medical",
            "published_comparisons",
            "published_verdicts",
        ],
        "reliability": ["agreement_of_judgings", "judged_units", "movement", "smallest_effect"],
        "summaries": ["figure_tables"],
        "units": ["check_counts", "counted"],
        "verdicts": ["verdict_table"],
    },
)
