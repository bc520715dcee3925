"""The controller of a deployment with a clock that runs faster: a minute of its window is seconds.

    python -m perf.control.hurried FOLDER SCALE ORIGIN

It is ``python -m pdctl.controller FOLDER`` in an event loop whose time runs SCALE times as fast:
every pause and time limit of the controller is as much shorter. Servers, agents and gateways keep
the real time. ORIGIN is the time of day at which both clocks agree, in seconds since 1970.
"""

from __future__ import annotations

import asyncio
import os
import selectors
import sys
import time
from functools import partial
from pathlib import Path
from unittest import mock

from pdctl import controller, private
from pdserve.control.controller import Controller


class _Selector(selectors.DefaultSelector):
    """Waits a part of what it is asked to wait."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self._scale = scale

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        return super().select(timeout and timeout / self._scale)


class Loop(asyncio.SelectorEventLoop):
    """An event loop in which `scale` seconds pass in one second."""

    def __init__(self, scale: float) -> None:
        self._scale = scale
        super().__init__(_Selector(scale))

    def time(self) -> float:
        return super().time() * self._scale


class Clock:
    """The time of day, in seconds since 1970, of a day that passes `scale` times as fast.

    Args:
        origin: when it agrees with the real one.
    """

    def __init__(self, scale: float, origin: float) -> None:
        self._scale = scale
        self._origin = origin

    def __call__(self) -> float:
        return self._origin + (time.time() - self._origin) * self._scale

    def real(self, at: float) -> float:
        """Return the real time of day at which this clock shows `at`."""
        return self._origin + (at - self._origin) / self._scale


class _Policy(asyncio.DefaultEventLoopPolicy):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self._scale = scale

    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        return Loop(self._scale)


def main() -> None:
    folder, scale, origin = Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
    os.umask(private.UMASK)
    asyncio.set_event_loop_policy(_Policy(scale))
    # The controller of production has no option for another clock.
    hurried = partial(Controller, clock=Clock(scale, origin))
    with mock.patch.object(controller, "Controller", hurried):
        controller.run(folder)


if __name__ == "__main__":
    main()
