"""Faults on demand: see the docstring of `tensorrt_llm`."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

VARIABLE = "FAKE_TENSORRT_LLM_FAULTS"

Point = Literal["context", "pull", "transfer", "step"]


class Fault(Struct, frozen=True, forbid_unknown_fields=True):
    """A fault at a point."""

    at: Point
    do: Literal["fail", "stall", "die"]
    nth: int | None = None
    """None: every time."""
    seconds: float = 0.0


class InjectedFault(RuntimeError):
    """A failure that a test has asked for."""


class Faults:
    """The faults of one engine."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    async def meet(self, point: Point) -> None:
        """Cause the faults that are due. Raises: InjectedFault."""
        self._counts[point] += 1
        for fault in _wanted():
            if fault.at == point and fault.nth in (None, self._counts[point]):
                if fault.do == "die":
                    os._exit(1)
                if fault.do == "stall":
                    await asyncio.sleep(fault.seconds)
                else:
                    raise InjectedFault(f"{point} {self._counts[point]} fails, as {VARIABLE} says")


def _wanted() -> list[Fault]:
    path = os.environ.get(VARIABLE)
    if not path or not Path(path).exists():
        return []
    return msgspec.json.decode(Path(path).read_bytes(), type=list[Fault])
