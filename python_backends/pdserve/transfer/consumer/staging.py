"""The staging buffers: registered memory in which pieces wait until they are scattered."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from pdserve.transfer import arrays
from pdserve.transfer.arrays import Array
from pdserve.transfer.clock import Clock
from pdserve.transfer.protocol import Stuck, TransferError

# Well below the time within which a receiver has to show life.
NAP_S = 0.05


class Staging:
    """Buffers of `piece_bytes`, shared by all pulls of an instance. Thread-safe.

    They are small on purpose: a request that would wait for more is better decoded elsewhere, and a
    piece that has just arrived is scattered from the processor's cache.
    """

    def __init__(self, memory: Array, clock: Clock = time) -> None:
        self.memory = memory
        """Uint8 [buffers, piece_bytes], every page written to: otherwise a first arrival takes 20
        x."""
        self.piece_bytes = int(memory.shape[1])
        self._clock = clock
        self._free: queue.SimpleQueue[Array] = queue.SimpleQueue()
        for buffer in memory:
            self._free.put(buffer)

    @property
    def free(self) -> int:
        """Return the bytes that are not in use."""
        return self._free.qsize() * self.piece_bytes

    @contextmanager
    def take(
        self, wanted: int, deadline: float, alive: Callable[[], None] = lambda: None
    ) -> Iterator[list[Array]]:
        """Take at least one buffer, and up to `wanted` if they are free.

        Args:
            deadline: seconds on CLOCK_MONOTONIC.
            alive: called repeatedly while none is free.

        Raises:
            TransferError: none was free by `deadline`.
        """
        taken = [self._one(deadline, alive)]
        with suppress(queue.Empty):
            while len(taken) < wanted:
                taken.append(self._free.get_nowait())
        try:
            yield taken
        except Stuck:
            raise  # bytes may still arrive there
        except BaseException:
            self._give(taken)
            raise
        self._give(taken)

    def _one(self, deadline: float, alive: Callable[[], None]) -> Array:
        while True:
            left = deadline - self._clock.monotonic()
            try:
                return self._free.get(timeout=min(max(left, 0.0), NAP_S))
            except queue.Empty:
                if left <= 0:
                    raise TransferError("no staging buffer became free in time") from None
                alive()

    def close(self) -> None:
        """Let go of the memory: no pull takes a buffer any more."""
        with suppress(queue.Empty):
            while True:
                self._free.get_nowait()
        self.memory = arrays.like(self.memory, (0, self.piece_bytes))

    def _give(self, taken: list[Array]) -> None:
        for buffer in taken:
            self._free.put(buffer)
