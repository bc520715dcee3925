"""Starts `holder` processes, and says in which store."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tests.unit.control.store import holder


class Process:
    """A `holder` process."""

    def __init__(self, kind: str, place: str, what: str) -> None:
        command = [sys.executable, holder.__file__, kind, place, what]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def says(self) -> str:
        """Return its next line."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def write(self, value: str) -> str:
        """Have it write a value as the leader; returns the outcome."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{value}\n")
        return self.says()


@contextmanager
def running(kind: str, place: str, what: str) -> Iterator[Process]:
    """Run one until the block ends."""
    one = Process(kind, place, what)
    try:
        yield one
    finally:
        one.process.kill()
        one.process.communicate()
