"""The receiving process, perhaps on another host: every strategy for one KV cache into one pool.

    python -m perf.transfer.measuring ADDRESS PORT SPEC

SPEC is a `Spec` as JSON; every `Point` is printed as a line of JSON when it has been measured.
"""

from __future__ import annotations

import itertools
import random
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import msgspec
import numpy as np
from msgspec import Struct

from pdserve.transfer import plane
from pdserve.transfer.arrays import aligned
from pdserve.transfer.consumer import probe
from pdserve.transfer.consumer.cost_model import Strategy
from pdserve.transfer.consumer.peers import Peer
from pdserve.transfer.consumer.receiver import Receiver
from pdserve.transfer.consumer.staging import Staging
from pdserve.transfer.consumer.strategies import Move, Part
from pdserve.transfer.protocol import Memory
from pdserve.transfer.scatter import Runs, scatter
from perf.baselines import blockwise
from perf.transfer.holding import ANSWER_S, DESCRIBE, GRANT, RAW, READY, Control, terms, transport
from perf.transfer.layouts import LAYOUTS, pattern
from perf.transfer.raw import RawReader

STAGING_BUFFERS = 4
# Up to this many bytes a stray millisecond matters, so there are more turns.
SMALL, MORE = 64 << 20, 2


class Spec(Struct):
    """The measurements of one layout over one link."""

    link: str
    transport: str
    layout: str
    sizes_mib: list[int]
    blocks: list[int]
    handshakes: int
    """Largest number of blocks for which a handshake before each is measured."""
    repeats: int


class Point(Struct):
    """One KV cache into a pool whose blocks are in random order; medians in milliseconds."""

    link: str
    detail: str
    """Transport that UCX has picked."""
    layout: str
    mib: float
    tokens: int
    block: int
    segments: int
    memcpy: float
    """The same bytes, from one range of this process to another."""
    pull: float | None
    """One contiguous pull by our transport; None: the memory is mapped."""
    raw: float | None
    """One contiguous read by NIXL alone."""
    raw_again: float | None
    """The same a second time: the difference between the two is noise of the machine."""
    scatter: float
    """Scatter from a contiguous range to the pool, by itself."""
    one_run: float
    """The transfer with consecutive blocks, as an empty pool gives them, by *whole*."""
    ways: dict[str, float]
    """The transfer as a decode does it, with its lease: whole, direct."""
    chosen: str
    """Choice of a cost model that has seen only the probes on connecting."""
    expected: float
    per_block: float | None
    """Transfer with a handshake for each block of one layer's K or V; None: there are too many."""
    spanning: float
    """Transfer with a handshake for each block that spans all layers."""


class Bench:
    """The measurement of one layout over one link."""

    def __init__(self, control: Control, spec: Spec) -> None:
        self.spec, self._control = spec, control
        self._layout = LAYOUTS[spec.layout]
        tokens = max(self.tokens(max(spec.sizes_mib), block) for block in spec.blocks)
        self._pool = aligned(self._layout.shape(tokens))
        self._sent = aligned((self._layout.nbytes(tokens),))
        self._sent[:] = pattern(self._sent.size)
        self._cache = aligned((probe.COLD,))
        self._receiver = Receiver(
            terms(spec.layout),
            [transport(spec.transport)],
            self._pool,
            Staging(aligned((STAGING_BUFFERS, plane.PIECE))),
            timeout_s=ANSWER_S,
        )
        _, link = self._receiver.connect(control.ask(DESCRIBE))
        self._detail = link.detail
        self._raw = None
        if spec.transport == "nixl":
            # Registered separately: raw NIXL shares nothing with ours.
            self._raw_pool = aligned((self._pool.size,))
            self._raw = RawReader(control.ask(RAW + b"1"), Memory.of(self._raw_pool))
            control.ask(RAW + b"0")

    def tokens(self, mib: int, block: int) -> int:
        """Return the tokens of a KV cache of ``mib`` MiB: whole blocks, at least one."""
        return max((mib << 20) // self._layout.bytes_per_token // block, 1) * block

    def point(self, mib: int, block: int) -> Point:
        spec, layout, tokens = self.spec, self._layout, self.tokens(mib, block)
        firsts = list(range(0, tokens, block))
        random.Random(tokens).shuffle(firsts)
        runs = [(first, block) for first in firsts]
        handle = self._receiver.open(self._grant(tokens))
        peer = self._receiver.peers.find(handle.epoch)
        pool = self._pool[:, :tokens]
        move = Move(
            link=peer.link,
            parts=(Part(0, layout.row_bytes, 0),),
            length=tokens,
            tokens=range(tokens),
            planes=range(layout.planes),
            pool=pool,
            runs=runs,
            deadline=time.monotonic() + 10 * ANSWER_S,
        )
        names: list[Strategy] = ["whole"] if peer.cost_model is None else ["whole", "direct"]
        for name in names:
            self._check(tokens, runs, name)
        works = self._copies(move)
        works |= {name: partial(self._handed_over, tokens, runs, name) for name in names}
        works["one run"] = partial(self._handed_over, tokens, [(0, tokens)], "whole")
        taken = self._by_turns(works, move.nbytes)
        chosen, expected = self._choice(peer, move)
        return Point(
            link=spec.link,
            detail=self._detail,
            layout=spec.layout,
            mib=round(move.nbytes / 2**20, 2),
            tokens=tokens,
            block=block,
            segments=move.segments,
            memcpy=taken["memcpy"],
            pull=taken.get("pull"),
            raw=taken.get("raw"),
            raw_again=taken.get("raw again"),
            scatter=taken["scatter"],
            one_run=taken["one run"],
            ways={name: taken[name] for name in names},
            chosen=chosen,
            expected=expected,
            per_block=self._per_block(move) if move.segments <= spec.handshakes else None,
            spanning=self._spanning(move, block),
        )

    def _copies(self, move: Move) -> dict[str, Callable[[], float]]:
        """Return the parts of a transfer, each as a function that returns milliseconds."""
        nbytes, raw = move.nbytes, self._raw
        pool = self._pool[:, : move.pool.shape[1]]
        source, target = self._sent[:nbytes], self._pool.reshape(-1)[:nbytes]
        cache = source.reshape(len(move.pool), move.length, -1)
        works = {
            "memcpy": lambda: _ms(lambda: np.copyto(target, source)),
            "scatter": lambda: _ms(lambda: scatter(cache, pool, move.runs)),
        }
        if raw is not None:
            span = np.array([[0, target.ctypes.data, nbytes]], np.int64)

            def read() -> float:
                self._control.ask(RAW + b"1")
                taken = _ms(lambda: raw.read(nbytes))
                self._control.ask(RAW + b"0")
                return taken

            works["pull"] = lambda: _ms(lambda: move.link.pull(span, move.deadline).wait())
            works |= {"raw": read, "raw again": read}
        return works

    def _by_turns(self, works: dict[str, Callable[[], float]], nbytes: int) -> dict[str, float]:
        """Return the medians, without a first turn that warms up."""
        repeats = self.spec.repeats * (MORE if nbytes <= SMALL else 1)
        draw, names = random.Random(nbytes), list(works)
        taken = {name: list[float]() for name in names}
        for _ in range(repeats + 1):
            # Each part is a little faster after some than after others.
            draw.shuffle(names)
            for name in names:
                taken[name].append(self._cold(works[name]))
        return {name: round(statistics.median(times[1:]), 3) for name, times in taken.items()}

    def _cold(self, work: Callable[[], float]) -> float:
        """Run after clearing the cache, which the previous part has filled with the same bytes."""
        self._cache[:] = 1
        # A decode that takes over a KV cache has just got a message; raw NIXL asks its holder, too.
        self._handshake()
        return work()

    def _choice(self, peer: Peer, move: Move) -> tuple[str, float]:
        if peer.cost_model is None:
            return "whole", 0.0
        free = STAGING_BUFFERS * plane.PIECE
        choice = peer.cost_model.probed(move.segments, move.nbytes, free)
        return choice.strategy, round(choice.seconds * 1e3, 3)

    def _handed_over(self, tokens: int, runs: Runs, name: Strategy) -> float:
        """Transfer as a decode does; return milliseconds."""
        self._receiver.strategy = name
        handle = self._grant(tokens)
        return _ms(lambda: self._receiver.pull(self._receiver.open(handle), runs))

    def _check(self, tokens: int, runs: Runs, name: Strategy) -> None:
        self._pool[:, :tokens] = 0
        self._handed_over(tokens, runs, name)
        self._verify(tokens, runs)

    def _per_block(self, move: Move) -> float:
        self._pool[:, : move.length] = 0
        taken = _ms(lambda: blockwise.per_plane(move, self._handshake))
        self._verify(move.length, move.runs)
        return round(taken, 3)

    def _spanning(self, move: Move, block: int) -> float:
        return round(_ms(lambda: blockwise.spanning(move, block, self._handshake)), 3)

    def _verify(self, tokens: int, runs: Runs) -> None:
        sent = self._sent[: self._layout.nbytes(tokens)].reshape(self._layout.shape(tokens))
        start = 0
        for first, rows in runs:
            arrived = self._pool[:, first : first + rows]
            if not np.array_equal(arrived, sent[:, start : start + rows]):
                raise RuntimeError(f"rows {first} to {first + rows} are not what was sent")
            start += rows

    def _grant(self, tokens: int) -> bytes:
        return self._control.ask(GRANT + str(tokens).encode())

    def _handshake(self) -> bytes:
        return self._control.ask(READY)

    def close(self) -> None:
        self._receiver.close()


def _ms(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return (time.perf_counter() - began) * 1e3


def main() -> None:
    address, port, text = sys.argv[1:]
    control = Control(address, int(port))
    bench = Bench(control, msgspec.json.decode(text, type=Spec))
    try:
        for mib, block in itertools.product(bench.spec.sizes_mib, bench.spec.blocks):
            print(msgspec.json.encode(bench.point(mib, block)).decode(), flush=True)
    finally:
        bench.close()
        control.close()


if __name__ == "__main__":
    main()
