"""A process of its own for work that changes the process it runs in.

Unsloth rewrites classes of transformers and TRL when it is imported, for good. Training with it therefore runs in a
child that ends with its work, and hands over each result as it comes:

    for done in stream(_train_all, spec, preset, tasks):
        ...
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any, TypeVar

_T = TypeVar("_T")


class ChildDied(RuntimeError):
    """The process that did the work ended without a word, for example for want of memory."""


def stream(function: Callable[..., Iterator[_T]], *given: Any, **named: Any) -> Iterator[_T]:
    """What a generator function yields, from a new process, as it comes.

    Args:
        function: at the top of a module; it, its arguments, and what it yields cross to another process and back.
        given: its arguments.
        named: its named arguments.

    Raises:
        ChildDied: the process ended without saying why.
        Exception: whatever the function raised, with the place where it did as a note.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_serve, args=(there, function, given, named), daemon=True)
    child.start()
    there.close()
    try:
        while True:
            try:
                kind, value = here.recv()
            except EOFError:
                child.join()
                raise ChildDied(
                    f"the process of {function.__name__} ended with exit code {child.exitcode} and no message: killed "
                    "from outside, or by the system for want of memory (see the log above)"
                ) from None
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        here.close()
        if child.is_alive():
            child.join(timeout=20)  # it has ended its work, and gives its memory back
        if child.is_alive():
            child.terminate()
            child.join()


def _serve(there: Connection, function: Callable[..., Iterator[Any]], given: tuple, named: dict[str, Any]) -> None:
    _die_with_parent()
    try:
        for item in function(*given, **named):
            there.send(("item", item))
        there.send(("end", None))
    except Exception as error:  # noqa: BLE001 (whatever it is, it is raised in the parent)
        error.add_note("".join(traceback.format_exception(error)))
        try:
            there.send(("error", error))
        except BrokenPipeError:
            raise error from None  # nobody is left to be told
        except Exception:  # noqa: BLE001 (an error that does not cross: its words do)
            there.send(("error", RuntimeError(f"{type(error).__name__}: {error}")))


def _die_with_parent() -> None:
    """A killed parent must not leave a child that holds a GPU (Linux alone can say so)."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
