"""Words and figures: the results document, the paper, the explorer; the only palette.

Documents are written over stored tables, figures draw them. A changed sentence or colour concerns this floor alone:
no stage that trains, samples or judges depends on it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "audited": ["audit_account", "audit_findings", "audit_judge", "audit_rates"],
        "explore": ["CSS", "Explorer", "cards", "heading", "select"],
        "figures.all": ["draw_all"],
        "figures.distributions": ["specification_curve"],
        "figures.dynamics": [
            "draw_cosines",
            "draw_generality",
            "draw_geometry",
            "draw_losses",
            "draw_outcomes",
            "draw_sweep",
            "draw_transfer",
            "draw_transitions",
        ],
        "figures.parts": ["read_records", "record_figure", "write_records"],
        "markdown": ["escape"],
        "paper": ["generate"],
        "render": ["check_paper", "generated_of"],
        "replication": ["as_published", "compare_printed", "printed_differences", "read_golden", "replication_check"],
        "results": [
            "gated_verdicts",
            "judge_sentence",
            "lacking_sections",
            "limits_section",
            "model_sections",
            "pairs_section",
            "quotes_section",
            "write_results",
        ],
        "sections": [
            "audit",
            "claims_sections",
            "final_row",
            "gate_sections",
            "h3_section",
            "outcome_sections",
            "pooled_section",
            "power_section",
            "reliability_sections",
            "seeds_sentence",
            "verdict_section",
            "verdict_sentence",
        ],
        "sections_h4": ["h4_section"],
        "style": ["Look", "figure_size", "save_figure", "style_context"],
    },
)
