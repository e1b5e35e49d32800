"""Words and figures: the results document, the paper, the explorer; the only palette.

Documents are written over stored tables, figures draw them. A changed sentence or colour concerns this floor alone:
no stage that trains, samples or judges depends on it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "explore": ["CSS", "Explorer", "cards", "heading", "judge_doubts", "select"],
        "drawing": ["draw_all", "drawings"],
        "figures.parts": ["View"],
        "freeze": ["frozen_status"],
        "markdown": ["escape"],
        "page": ["facts_of", "write_page"],
        "paper": ["generate"],
        "render": ["check_paper", "generated_of"],
        "replication": ["as_published", "compare_printed", "printed_differences", "read_golden", "replication_check"],
        "glance": ["glance", "verdicts_said"],
        "results": ["drawn_answers", "judge_facts", "pair_counts", "quoted", "write_results"],
        "sections": ["audit_account", "audit_findings", "audit_rates", "stages"],
        "style": ["Look", "figure_size", "picture", "style_context"],
        "words": ["Words"],
    },
)
