"""A study as data: its parameters, cells, places, texts and labels.

`load(profile)` reads and checks everything in `params/` that a profile names. The texts (constitutions, rows,
questions, prompts) are built in or fetched at a pinned commit; published evaluations become our own tables here.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "arms": ["ArmedPersona", "arm_pairs"],
        "audited": ["AuditSpec", "read_spec"],
        "contexts": ["check_rows", "context", "made_of", "training_rows"],
        "depends": ["settings"],
        "entries": ["JudgePreset", "LoraPreset", "ModelSpec", "SamplingPreset", "read_yaml"],
        "labels": ["Labels"],
        "loading": ["load"],
        "materials": [
            "builtin_training",
            "capability_items",
            "constitution",
            "constitution_files",
            "dataset_contrast",
            "descriptions",
            "extra_prompts",
            "in_domain_plan",
            "introspection_material",
            "judge_files",
            "judge_prompts_file",
            "labelled_answers",
            "persona_targets",
            "probe_prompts",
            "question_files",
            "questions",
            "reference_scores",
            "row_files",
            "rows",
            "uptake_targets",
        ],
        "published": [
            "LISTS",
            "REPEATED",
            "import_study",
            "read_file_list",
            "read_missing",
            "read_selection",
            "write_missing",
        ],
        "sources": ["COMMIT", "REPO", "cache_root"],
        "study": ["Cell", "Study"],
    },
)
