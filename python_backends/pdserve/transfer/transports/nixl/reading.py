"""A link over NIXL where the network reads: RDMA, CUDA IPC, CMA."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pdserve.transfer.lease.words import RECEIVER_WORD, SLOT_BYTES, pack_word
from pdserve.transfer.protocol import Memory, Pending, Spans, TransferError
from pdserve.transfer.transports.nixl.agent import Agent, Ranges, Transfer, until
from pdserve.transfer.transports.nixl.link import Alive, NixlLink, NixlPull, Way

# A read over RDMA takes microseconds, 16 MiB 1 ms: shorter than any sleep.
SPIN_S = 2e-3
# Maximum number of small reads and writes of a link in progress at the same time.
_WORDS = 64


class ReadingLink(NixlLink):
    """Implements `Link` where the network reads from the holder."""

    operation = "get"

    def __init__(self, agent: Agent, peer: str, way: Way, memories: list[Memory]) -> None:
        super().__init__(agent, peer, way, memories)
        self._words = np.zeros((_WORDS, SLOT_BYTES), np.uint8)
        agent.register(Memory.of(self._words))
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for number in range(_WORDS):
            self._free.put(number)

    def works(self, deadline: float) -> bool:
        """Tell whether the network can read from the holder, by a read of the first slot.

        Raises:
            TransferError: it can, but nothing came in time.
        """
        with self._word(deadline) as word:
            try:
                transfer = self._begin("READ", word, 0)
            except TransferError:
                return False
            self._finish(transfer, deadline)
            return True

    def peek(self, slot: int, deadline: float) -> bytes:
        start = self._slot(slot)
        with self._or_close(), self._word(deadline) as word:
            self._finish(self._begin("READ", word, start), deadline)
            return word.tobytes()

    def mark(self, slot: int, word: int, deadline: float) -> None:
        start = self._slot(slot) + RECEIVER_WORD
        packed = np.frombuffer(pack_word(word), np.uint8)
        with self._or_close(), self._word(deadline) as mine:
            mine[: len(packed)] = packed
            self._finish(self._begin("WRITE", mine[: len(packed)], start), deadline)

    def pull(self, spans: Spans, deadline: float) -> Pending:
        """Begin a pull. Over CMA all bytes are copied in this call.

        The link does nothing else meanwhile.
        """
        local = Ranges(spans[:, 1], spans[:, 2], self._arrival(spans).device)
        address, _, device = self._way.data
        remote = Ranges(spans[:, 0] + address, spans[:, 2], device)
        with self._or_close():
            transfer = self._agent.begin("READ", self._peer, local, remote)
        return NixlPull(self, lambda alive: self._finish(transfer, deadline, alive))

    @contextmanager
    def _word(self, deadline: float) -> Iterator[NDArray[np.uint8]]:
        """Reserve a few registered bytes."""
        try:
            number = self._free.get(timeout=max(deadline - time.monotonic(), 0.0))
        except queue.Empty:
            raise TransferError(f"{_WORDS} words are under way, none was done in time") from None
        try:
            yield self._words[number]
        finally:
            self._free.put(number)

    def _begin(
        self, operation: Literal["READ", "WRITE"], word: NDArray[np.uint8], start: int
    ) -> Transfer:
        addresses = np.array([word.ctypes.data, self._way.table[0] + start])
        size = np.array([word.nbytes])
        local, remote = Ranges(addresses[:1], size), Ranges(addresses[1:], size)
        return self._agent.begin(operation, self._peer, local, remote)

    def _finish(self, transfer: Transfer, deadline: float, alive: Alive = lambda: None) -> None:
        until(lambda: self._agent.poll(transfer) or None, deadline, SPIN_S, alive)
