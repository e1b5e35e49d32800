"""What is written down: files, tables, manifests, numbers, and the meaning of code.

Files are written whole or not at all; tables have one schema, checked on every write and read; a manifest names what
a stage read and wrote by hash; numbers have one format each. Nothing here knows what a study is.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "code": ["code_hash"],
        "files": ["atomic", "root", "write_text"],
        "keys": ["BASELINE", "COMPARISON", "CONDITION", "FLAGS", "KEY", "NO_DATASET", "SKIPPED"],
        "manifest": ["MANIFEST", "read_manifest", "tree", "write_manifest"],
        "tables": [
            "CAPABILITY",
            "PAIRS",
            "RESPONSES",
            "SCORES",
            "one_judge",
            "read_all",
            "read_table",
            "read_tables",
            "with_responses",
            "write_table",
            "write_tables",
        ],
    },
)
