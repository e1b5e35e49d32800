"""The command line: running notebooks, checking a study before any work, plans, GPUs, what arrived late.

`run_all.sh` and the Snakefile call these modules with `python -m`; no notebook needs them, but for the banner of what
was left out.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "arrivals": ["banner"],
        "run": ["execute", "failures"],
    },
)
