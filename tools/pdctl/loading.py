"""Ends the processes of models that Triton has given up while they loaded.

Triton asks a process that loads a model for a sign of life (24.10: every second; since then every
five). If it cannot answer in time, because the machine or its disk is very slow, Triton
treats it as unhealthy and waits for its end, while the process, once loaded, waits for work.
Nothing would end that. Once the process has ended, Triton reports that the load has failed.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable

import psutil

from pdctl import footprint
from pdserve.node import heartbeat

GIVEN_UP_S = 5.0
"""Seconds; Triton notices within milliseconds that a model has loaded."""


class GivenUp:
    """Given-up processes of one start of a server, which has ``token``."""

    def __init__(self, token: str) -> None:
        self._token = token
        self._since: dict[int, float] = {}

    def end(self, loading: Iterable[str]) -> list[str]:
        """End the process of each model that was loaded long ago, but that Triton has given up.

        This must be called often.

        Args:
            loading: the models that Triton has not loaded yet.

        Returns:
            The models whose processes have been ended.
        """
        now = time.monotonic()
        ended = []
        for model in loading:
            pid = heartbeat.loaded(heartbeat.path(self._token, model))
            if pid is None or now - self._since.setdefault(pid, now) < GIVEN_UP_S:
                continue
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                if process in footprint.processes([self._token]):
                    process.kill()
                    ended.append(model)
        return ended
