"""Words and figures: the results document, the paper, the explorer; the only palette.

Documents are written over stored tables, figures draw them. A changed sentence or colour concerns this floor alone:
no stage that trains, samples or judges depends on it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "audited": ["audit_account", "audit_findings", "audit_rates"],
        "explore": ["CSS", "Explorer", "cards", "heading", "select"],
        "drawing": ["draw_all", "drawings"],
        "figures.parts": ["View"],
        "markdown": ["escape"],
        "paper": ["generate"],
        "render": ["check_paper", "generated_of"],
        "replication": ["as_published", "compare_printed", "printed_differences", "read_golden", "replication_check"],
        "results": ["drawn_answers", "gated_verdicts", "judge_facts", "pair_counts", "quoted", "write_results"],
        "sections": ["stages"],
        "style": ["Look", "figure_size", "picture", "style_context"],
        "words": ["Words"],
    },
)
