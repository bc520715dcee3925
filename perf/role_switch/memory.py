"""The memory of an instance's process: its own, without what it has mapped of others."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from msgspec import Struct

SHM = Path("/dev/shm")
EVERY_S = 0.005


class Memory(Struct, frozen=True):
    """The memory of one process around a switch, in MiB."""

    before: float
    peak: float
    after: float


@dataclass(frozen=True)
class OwnMemory:
    """Reads the memory of an instance's process: anonymous pages, and its arena in /dev/shm.

    Resident memory would include the arenas of others that a decode has mapped.

    Args:
        token: mark of its server, with which the names of its arenas begin.
    """

    token: str
    name: str
    pid: int

    def mib(self) -> float:
        """Return it at one moment: both are read again if the arena has changed meanwhile."""
        arena, before = self._arena_mib(), -1.0
        anonymous = 0.0
        while arena != before:
            status = Path(f"/proc/{self.pid}/status").read_text().splitlines()
            anonymous = next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))
            before, arena = arena, self._arena_mib()
        return anonymous / 1024 + arena

    def _arena_mib(self) -> float:
        found = 0
        for file in SHM.glob(f"{self.token}-{self.name}-*".replace("_", "-")):
            with contextlib.suppress(FileNotFoundError):
                found += file.stat().st_blocks * 512
        return found / (1 << 20)

    @contextlib.asynccontextmanager
    async def watched(self, found: list[Memory]) -> AsyncIterator[None]:
        """Read it every EVERY_S seconds while the block runs, and add what was found."""
        before = peak = self.mib()

        async def read() -> None:
            nonlocal peak
            while True:
                peak = max(peak, self.mib())
                await asyncio.sleep(EVERY_S)

        reading = asyncio.create_task(read())
        try:
            yield
        finally:
            reading.cancel()
        found.append(Memory(before, peak, self.mib()))
