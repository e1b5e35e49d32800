"""Other people's studies: their files, read into this project's tables, with all that can be said of the files
themselves.

`draft` says what files seem to mean, `read_spec` reads what a person made of that (`audit.yaml`), `assemble` brings the
files into the tables that every other stage reads. `rates` gives each condition's EM rate under each rule that a study
has used, `copies` and `leaks` look for responses that are no observations of their own. Strangers' files are data.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "assemble": ["Assembled", "assemble", "files_of", "training_prompts"],
        "draft": ["Draft", "draft", "understood"],
        "findings": ["findings", "independent"],
        "inspect_logs": ["export"],
        "leaks": ["by_words", "copied", "filtered", "in_domain", "repeated_within"],
        "opening": ["AuditError"],
        "rates": ["EM_RULES", "order", "rates_by_rule"],
    },
)
