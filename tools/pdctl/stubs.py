"""The processes of a running server: ``tritonserver``, and a stub for each of its models."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable

import psutil

from pdctl import footprint
from pdserve.node import epoch
from pdserve.node.health import Life
from pdserve.node.watchdog import SERVER

_MODEL = re.compile(r"/([^/]+)/\d+/model\.py$")


class Stubs:
    """The processes of one start, by name: SERVER, or a model's name.

    A stub that has died stays a zombie; what replaces it is another process.
    """

    def __init__(self, token: str, models: Iterable[str]) -> None:
        self._token = token
        self._things = (SERVER, *models)
        self._found: dict[str, psutil.Process] = {}
        self._epochs: dict[str, bytes] = {}
        self._missing: set[str] = set()

    def look(self) -> dict[str, Life]:
        """Return the state of each process. All processes are searched only if one has ended."""
        lives = self._lives()
        gone = {thing for thing, life in lives.items() if life is Life.GONE}
        if gone - self._missing:
            self._find()
            lives = self._lives()
            gone = {thing for thing, life in lives.items() if life is Life.GONE}
        self._missing = gone
        return lives

    def life(self, thing: str) -> Life:
        """Return the state of one process."""
        life = _life(self._found.get(thing))
        return self.look()[thing] if life is Life.GONE else life

    def kill(self, model: str) -> None:
        """End the process of a model, if it has one."""
        process = self._found.get(model)
        if process is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def epoch(self, model: str) -> bytes | None:
        """Return the epoch of a model's latest process, even a dead one; None: none was seen."""
        return self._epochs.get(model)

    def renewed(self, model: str) -> None:
        """Note that a model has been loaded again, so that its process is another one."""
        self._found.pop(model, None)
        self._epochs.pop(model, None)
        self._missing.discard(model)

    def _lives(self) -> dict[str, Life]:
        return {thing: _life(self._found.get(thing)) for thing in self._things}

    def _find(self) -> None:
        newest_first = sorted(footprint.processes([self._token]), key=_age)
        self._found.clear()
        for process in newest_first:
            try:
                name, words = process.name(), process.cmdline()
            except psutil.Error:
                continue
            model = next(filter(None, map(_MODEL.search, words)), None)
            if model is not None:
                if self._found.setdefault(model[1], process) is process:
                    with contextlib.suppress(OSError):
                        self._epochs[model[1]] = epoch.of(process.pid)
            elif name == "tritonserver":
                # the oldest, since a stub that is starting looks like the server at first
                self._found[SERVER] = process


def _age(process: psutil.Process) -> float:
    return -process.create_time()


def _life(process: psutil.Process | None) -> Life:
    if process is None or footprint.is_dead(process):
        return Life.GONE
    try:
        return Life.STOPPED if process.status() == psutil.STATUS_STOPPED else Life.RUNS
    except psutil.NoSuchProcess:
        return Life.GONE
