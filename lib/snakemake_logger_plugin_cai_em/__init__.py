"""`snakemake --logger cai-em`: Snakemake finds logger plugins by the name of a top-level package.

What is behind it: `cai_em.workflow.screen`.
"""

from cai_em.workflow.screen import Screen as LogHandler

__all__ = ["LogHandler"]
