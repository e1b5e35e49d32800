"""Other people's studies: their files, read into this project's tables, with all that can be said of the files themselves.

`draft` says what files seem to mean, `read_spec` reads what a person made of that (`audit.yaml`), `assemble` brings the
files into the tables that every other stage reads. `rates` gives each condition's EM rate under each rule that a study
has used, `copies` and `leaks` look for responses that are no observations of their own. Strangers' files are data.
"""

from cai_em.audit.assemble import Assembled, assemble, files_of, training_prompts
from cai_em.audit.draft import Draft, draft, understood
from cai_em.audit.findings import findings, independent
from cai_em.audit.inspect_logs import export
from cai_em.audit.leaks import copied, filtered, in_domain, repeated_within
from cai_em.audit.opening import AuditError
from cai_em.audit.rates import RULES, order, rates
from cai_em.audited import AuditSpec, read_spec

__all__ = [
    "RULES",
    "Assembled",
    "AuditError",
    "AuditSpec",
    "Draft",
    "assemble",
    "copied",
    "draft",
    "export",
    "files_of",
    "filtered",
    "findings",
    "in_domain",
    "independent",
    "order",
    "rates",
    "read_spec",
    "repeated_within",
    "training_prompts",
    "understood",
]
