"""The ends of a transfer: a holder in another process, and the ways to get its KV caches here."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial

import numpy as np
from msgspec import Struct

from pdserve.transfer import arrays, plane
from pdserve.transfer.arrays import Array
from pdserve.transfer.consumer import strategies
from pdserve.transfer.consumer.receiver import Receiver
from pdserve.transfer.consumer.staging import Staging
from pdserve.transfer.consumer.strategies import Move, Part
from pdserve.transfer.protocol import Link
from pdserve.transfer.scatter import Runs
from perf.baselines import blockwise
from perf.gpu.place import Place
from perf.gpu.transfer_contents import Contents, shuffled
from perf.transfer.holding import (
    ANSWER_S,
    DESCRIBE,
    GRANT,
    RAW,
    READY,
    Control,
    Holding,
    terms,
    transport,
)
from perf.transfer.layouts import LAYOUTS
from perf.transfer.raw import RawReader

BLOCK = 16
"""Tokens of a block of the pool."""
Work = Callable[[], object]


class Way(Struct):
    """One way to get a KV cache, and how its bytes are checked."""

    work: Work
    right: Callable[[], bool] | None
    """Tells whether the bytes are those that were sent, and clears them; None: none are."""
    slow: bool = False
    """True if one turn is enough: it takes thousands of messages."""


class Bench:
    """The receiving end for one layout.

    Args:
        name: transport that the holder offers; NIXL's memory is on the device of the place.
        most: tokens of the largest KV cache.

    Raises:
        Unreachable: the transport does not reach the other process.
    """

    def __init__(self, place: Place, name: str, layout: str, most: int) -> None:
        self._place = place
        self._name = layout
        self._layout = LAYOUTS[layout]
        nbytes = self._layout.nbytes(most)
        # Only what CUDA IPC can export is on the device.
        offered = "cuda_ipc,nixl" if name == "nixl" and place.gpu is not None else name
        self.holding = Holding([], os.environ, "127.0.0.1", offered, nbytes, layout)
        self._control = Control("127.0.0.1", self.holding.port)
        self._contents = Contents(place, self._layout, most)
        self._receivers: dict[str, Receiver] = {}
        self._rooms: dict[str, Array] = {}
        self._raw: RawReader | None = None

    def connect(self, name: str) -> float:
        """Make a receiver whose only transport is this one; return the milliseconds that it took.

        Its staging buffers have room for the largest KV cache, so that one pull can take it.
        """
        buffers = max(-(-len(self._contents.sent) // plane.PIECE), 2)
        memory = self._place.empty(buffers, plane.PIECE)
        agreed = terms(self._name)
        made = Receiver(
            agreed, [transport(name)], self._contents.pool, Staging(memory), timeout_s=ANSWER_S
        )
        began = time.perf_counter()
        made.connect(self._control.ask(DESCRIBE))
        taken = (time.perf_counter() - began) * 1e3
        self._receivers[name], self._rooms[name] = made, memory.reshape(-1)
        return taken

    def link(self, name: str) -> Link:
        """Return the link of a receiver."""
        receiver = self._receivers[name]
        return receiver.peers.find(receiver.open(self._grant(BLOCK)).epoch).link

    def ways(self, name: str, tokens: int, handshakes: int) -> dict[str, Way]:
        """Return the ways over a link that has been made, for a KV cache of `tokens` tokens."""
        link, runs = self.link(name), shuffled(tokens, BLOCK)
        move, nbytes = self._move(link, tokens, runs), self._layout.nbytes(tokens)
        arrived = partial(self._contents.in_pool, tokens, runs)
        ways = {"handed over": Way(partial(self._handed_over, name, tokens, runs), arrived)}
        if link.data is not None:
            ways["fused scatter"] = Way(partial(strategies.mapped, move), arrived)
        else:
            many = move.segments > handshakes
            direct = partial(strategies.direct, move)
            ways["a descriptor per block"] = Way(direct, arrived, slow=many)
        if link.transport != "shm":
            room = self._rooms[name]
            pull = partial(self._pull, link, room, nbytes)
            ways["pull"] = Way(pull, partial(self._contents.arrived, room, nbytes))
            both = partial(self._pull_and_scatter, link, room, tokens, runs)
            ways["pull, then scatter"] = Way(both, arrived)
        if move.segments <= handshakes:
            per_block = partial(blockwise.per_plane, move, self.handshake)
            ways["a handshake per block"] = Way(per_block, arrived, slow=True)
        spanning = partial(blockwise.spanning, move, BLOCK, self.handshake)
        whole = partial(self._contents.in_spans, tokens, BLOCK)
        ways["a handshake per block of all layers"] = Way(spanning, whole, slow=True)
        return ways

    def local(self, tokens: int) -> dict[str, Way]:
        """Return the ways within the device: their rates are what the others are compared with."""
        nbytes, runs = self._layout.nbytes(tokens), shuffled(tokens, BLOCK)
        target, source = self._contents.flat[:nbytes], self._contents.sent[:nbytes]
        scattered = partial(self._scatter, self._contents.sent, tokens, runs)
        return {
            "copy": Way(partial(self._place.copy, target, source), None),
            "scatter": Way(scattered, partial(self._contents.in_pool, tokens, runs)),
        }

    def raw(self, tokens: int) -> Way:
        """Return a read by NIXL without any code of this package."""
        nbytes = self._layout.nbytes(tokens)
        if self._raw is None:
            way = self._control.ask(RAW + b"1")
            self._raw = RawReader(way, arrays.memory(self._contents.flat))
            self._control.ask(RAW + b"0")
        reader = self._raw

        def read() -> None:
            self._control.ask(RAW + b"1")
            reader.read(nbytes)
            self._control.ask(RAW + b"0")

        return Way(read, partial(self._contents.arrived, self._contents.flat, nbytes))

    def handshake(self) -> bytes:
        """Ask the holder something, and wait for its answer."""
        return self._control.ask(READY)

    def _grant(self, tokens: int) -> bytes:
        return self._control.ask(GRANT + str(tokens).encode())

    def _move(self, link: Link, tokens: int, runs: Runs) -> Move:
        return Move(
            link=link,
            parts=(Part(0, self._layout.row_bytes, 0),),
            length=tokens,
            tokens=range(tokens),
            planes=range(self._layout.planes),
            pool=self._contents.pool,
            runs=runs,
            deadline=time.monotonic() + 10 * ANSWER_S,
        )

    def _handed_over(self, name: str, tokens: int, runs: Runs) -> None:
        """Transfer as a decode does, with a lease."""
        receiver = self._receivers[name]
        receiver.pull(receiver.open(self._grant(tokens)), runs)

    def _pull(self, link: Link, room: Array, nbytes: int) -> None:
        span = np.array([[0, arrays.address(room), nbytes]], np.int64)
        link.pull(span, time.monotonic() + ANSWER_S).wait()

    def _scatter(self, source: Array, tokens: int, runs: Runs) -> None:
        cache = source[: self._layout.nbytes(tokens)].reshape(self._layout.shape(tokens))
        arrays.scatter(cache, self._contents.pool, runs)

    def _pull_and_scatter(self, link: Link, room: Array, tokens: int, runs: Runs) -> None:
        self._pull(link, room, self._layout.nbytes(tokens))
        self._scatter(room, tokens, runs)

    def close(self) -> None:
        """Close the links; the holder ends with them."""
        for receiver in self._receivers.values():
            receiver.close()
        self._control.close()
        self.holding.close()
