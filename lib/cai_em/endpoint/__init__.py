"""An OpenAI-compatible server, whoever asks it: a judge or a teacher.

Calls are bounded in time, number and cost; every answer that was paid for is kept and never asked for again; faults
of one request and of the server are told apart; keys appear nowhere.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "calls": ["Usage"],
    },
)
