"""Calls of the package's functions, recorded in the order in which they are made.

A *call* is one call of a function of ``pdserve``, in any thread. A coroutine or a generator counts
once, when it begins, and not again when it resumes; a comprehension is part of the function that
contains it. A *package* is the first name under ``pdserve``: that of
``pdserve.transfer.consumer.receiver`` is ``transfer``, and a module outside a folder is its own
package. A *crossing* is a step from one call to the next that leads into another package. A
*return* is a crossing into a package that has been visited before.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

from msgspec import Struct

if TYPE_CHECKING:
    from typing_extensions import Self

ROOT = "pdserve."
_RESUMED = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
_INLINE = {"<listcomp>", "<dictcomp>", "<setcomp>", "<genexpr>"}


class Call(NamedTuple):
    """A function that has been called."""

    module: str
    """Name under ``pdserve``, such as ``scheduling.scheduler``."""
    function: str

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]


class Recorder:
    """Records the calls of this process on request.

    As a context manager, it watches the current thread and all threads that are started meanwhile,
    so it must be entered before the threads whose calls are recorded.
    """

    def __init__(self) -> None:
        self._calls: list[Call] | None = None
        self._begun: dict[int, FrameType] = {}
        """Frames of coroutines and generators; kept, so that no other frame gets the same id."""

    def __enter__(self) -> Self:
        self._former = sys.getprofile()
        threading.setprofile(self._event)
        sys.setprofile(self._event)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(self._former)
        threading.setprofile(self._former)

    @contextmanager
    def recording(self) -> Iterator[list[Call]]:
        """Give the list of the calls within the ``with`` block, which grows as they are made."""
        calls = list[Call]()
        self._calls = calls
        try:
            yield calls
        finally:
            self._calls = None
            self._begun.clear()

    def _event(self, frame: FrameType, event: str, _argument: Any) -> None:
        calls = self._calls
        if event != "call" or calls is None:
            return
        module = frame.f_globals.get("__name__", "")
        code = frame.f_code
        if not module.startswith(ROOT) or code.co_name in _INLINE:
            return
        if code.co_flags & _RESUMED:
            if id(frame) in self._begun:
                return
            self._begun[id(frame)] = frame
        calls.append(Call(module.removeprefix(ROOT), code.co_name))


class Stretch(Struct):
    """A part of a trace within one package."""

    package: str
    calls: dict[str, int]
    """Number of calls by module, in the order in which they are reached."""


class Way(Struct):
    """The calls from one point to another."""

    name: str
    modules: int
    calls: int
    crossings: int
    returns: int
    stretches: list[Stretch]


def way(name: str, calls: Sequence[Call]) -> Way:
    """Count one or more calls."""
    stretches = [
        Stretch(package, dict(Counter(call.module for call in those)))
        for package, those in groupby(calls, lambda call: call.package)
    ]
    return Way(
        name=name,
        modules=len({call.module for call in calls}),
        calls=len(calls),
        crossings=len(stretches) - 1,
        returns=len(stretches) - len({stretch.package for stretch in stretches}),
        stretches=stretches,
    )
