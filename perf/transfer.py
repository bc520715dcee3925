"""Handing a KV cache from one process to another, against a copy of the same bytes.

    python -m perf.transfer [--quick]

A holder process keeps KV caches in its region of shared memory. This process takes them over into
its paged pool, and the ways take turns:

    copy        the same bytes from one range to another (memcpy): what cannot be beaten
    whole       as the decode does it: one handle, validated; one range, scattered into the blocks
    per block   a handshake with the holder for every block of one layer's K or V, then its copy:
                the shape of a transfer between two paged pools that have a block table per layer

The pool's blocks come as an empty pool gives them (one run) and in random order (every block for
itself). What arrives is compared with what was sent, outside the measured time.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import secrets
import statistics
import time
from multiprocessing.connection import Connection
from typing import Annotated

import msgspec
import numpy as np
import typer
from msgspec import Struct
from rich.console import Console
from rich.table import Table

from pdserve.kvcache.handle import EPOCH_BYTES, KVHandle
from pdserve.kvcache.layout import KVLayout
from pdserve.transfer.shm import Leases, SharedRegion, ShmReceiver, scatter
from perf import budgets
from perf.budgets import Budget
from perf.record import Record

LAYOUTS = {
    "SmolLM2-135M": KVLayout(30, 3, 64, "float32"),
    "Llama-3-8B": KVLayout(32, 8, 128, "bfloat16"),
    "70B, 1 of 8 ranks": KVLayout(80, 1, 128, "bfloat16"),
}
SIZES_MIB = (1, 16, 64, 256)
BLOCKS = (16, 32)
FINGERPRINT = "perf"
ANSWER_S = 60.0
GRANT, READY = b"grant", b"ready"
console = Console()


class Timed(Struct):
    """One KV cache, moved in every way; milliseconds, medians."""

    layout: str
    mib: float
    tokens: int
    block: int
    scattered: bool
    """Every block for itself; else one run."""
    copy_ms: float
    whole_ms: float
    per_block_ms: float
    handshakes: int

    @property
    def over_copy(self) -> float:
        """Whole, against 1.25 copies and a millisecond: 1 is just within."""
        return self.whole_ms / (1.25 * self.copy_ms + 1)

    @property
    def saved(self) -> float:
        """Part of the time of a handshake per block that the whole range does not take."""
        return 1 - self.whole_ms / self.per_block_ms


class Holder:
    """The other process, with one KV cache of random bytes in its region."""

    def __init__(self, layout: KVLayout, tokens: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_hold, args=(theirs, layout, tokens), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, question: bytes) -> bytes:
        """One round trip.

        Raises:
            TimeoutError: no answer within ANSWER_S.
        """
        self._pipe.send_bytes(question)
        if not self._pipe.poll(ANSWER_S):
            raise TimeoutError(f"the holder has not answered within {ANSWER_S:g} s")
        return self._pipe.recv_bytes()

    def grant(self) -> KVHandle:
        """A handle, good for one pull."""
        return msgspec.msgpack.decode(self.ask(GRANT), type=KVHandle)

    def close(self) -> None:
        self._pipe.close()
        self._process.join(ANSWER_S)


def _hold(pipe: Connection, layout: KVLayout, tokens: int) -> None:
    epoch = secrets.token_bytes(EPOCH_BYTES)
    nbytes = layout.nbytes(tokens)
    region = SharedRegion.create(f"pdserve-perf-{os.getpid()}", nbytes, 1, epoch)
    rng = np.random.default_rng(tokens)
    region.data[:] = np.frombuffer(rng.bytes(nbytes), np.uint8)
    leases, slot = Leases(region), None
    try:
        while True:
            question = pipe.recv_bytes()
            if question == READY:  # whether a block is: all are
                pipe.send_bytes(question)
                continue
            if slot is not None:
                leases.free(slot)
            expires = time.monotonic() + ANSWER_S
            slot, nonce = leases.grant(expires)
            handle = KVHandle(
                fingerprint=FINGERPRINT,
                layout=layout,
                tokens=tokens,
                region=region.name,
                offset=0,
                lease=slot,
                nonce=nonce,
                epoch=epoch,
                expires=expires,
            )
            pipe.send_bytes(msgspec.msgpack.encode(handle))
    except EOFError:
        region.unlink()


class Case:
    """One KV cache of the holder, and the blocks of this process's pool that it goes to."""

    def __init__(self, holder: Holder, receiver: ShmReceiver, block: int, scattered: bool) -> None:
        self._holder = holder
        self._receiver = receiver
        handle = holder.grant()
        with receiver.pull(handle, time.monotonic()) as source:
            self._sent = source.copy()
        self.tokens, self._block = handle.tokens, block
        self._pool = np.zeros_like(self._sent)
        self.firsts = list(range(0, handle.tokens, block))
        if scattered:
            random.Random(0).shuffle(self.firsts)
        self._runs = [(n, block) for n in self.firsts] if scattered else [(0, handle.tokens)]

    @property
    def handshakes(self) -> int:
        return len(self._pool) * len(self.firsts)

    def copy(self) -> float:
        """Each way: milliseconds."""
        with self._receiver.pull(self._holder.grant(), time.monotonic()) as source:
            began = time.perf_counter()
            np.copyto(self._pool, source)
            return (time.perf_counter() - began) * 1e3

    def whole(self) -> float:
        handle = self._holder.grant()
        began = time.perf_counter()
        with self._receiver.pull(handle, time.monotonic()) as source:
            scatter(source, self._pool, self._runs)
        return self._arrived(began)

    def per_block(self) -> float:
        handle = self._holder.grant()
        began = time.perf_counter()
        with self._receiver.pull(handle, time.monotonic()) as source:
            for plane, blocks in zip(self._pool, source, strict=True):
                for n, first in enumerate(self.firsts):
                    self._holder.ask(READY)
                    rows = blocks[n * self._block : (n + 1) * self._block]
                    plane[first : first + self._block] = rows
        return self._arrived(began)

    def _arrived(self, began: float) -> float:
        taken = (time.perf_counter() - began) * 1e3
        for n, first in enumerate(self.firsts):
            sent = self._sent[:, n * self._block : (n + 1) * self._block]
            if not np.array_equal(self._pool[:, first : first + self._block], sent):
                raise RuntimeError(f"block {n} is not what was sent")
        self._pool[:] = 0
        return taken


def measure(name: str, layout: KVLayout, mib: int, repeats: int) -> list[Timed]:
    """One payload at every block size, the blocks in one run and apart."""
    tokens = max((mib << 20) // layout.bytes_per_token // max(BLOCKS), 1) * max(BLOCKS)
    holder = Holder(layout, tokens)
    receiver = ShmReceiver(FINGERPRINT, layout)
    rows = []
    try:
        for block, scattered in itertools.product(BLOCKS, (False, True)):
            case = Case(holder, receiver, block, scattered)
            turns = [(case.copy(), case.whole(), case.per_block()) for _ in range(repeats + 1)]
            medians = [round(statistics.median(times), 3) for times in zip(*turns[1:], strict=True)]
            size = round(layout.nbytes(tokens) / 2**20, 2)
            rows.append(Timed(name, size, tokens, block, scattered, *medians, case.handshakes))
    finally:
        receiver.close()
        holder.close()
    return rows


def show(rows: list[Timed]) -> list[Budget]:
    """Print the table; the worst of each promise."""
    table = Table("layout", "MiB", "block", "copy", "whole", "per block", "handshakes", "saved")
    for row in rows:
        blocks = f"{row.block}{', apart' if row.scattered else ''}"
        times = (f"{ms:.2f}" for ms in (row.copy_ms, row.whole_ms, row.per_block_ms))
        table.add_row(
            row.layout, f"{row.mib:g}", blocks, *times, f"{row.handshakes}", f"{row.saved:.0%}"
        )
    console.print(table)
    over, saved = max(row.over_copy for row in rows), min(row.saved for row in rows)
    limits = [
        Budget("whole, of 1.25 copies + 1 ms, worst", round(over, 3), "x", "at most", 1.0),
        Budget("less time than a handshake per block", round(saved * 100, 1), "%", "at least", 46),
    ]
    console.print(budgets.table(limits))
    return limits


def main(
    quick: Annotated[bool, typer.Option("--quick", help="small payloads, few turns")] = False,
) -> None:
    """Handing a KV cache over in shared memory, against a copy of the same bytes."""
    record = Record("transfer-quick" if quick else "transfer")
    rows = []
    sizes, repeats = (SIZES_MIB[:2], 2) if quick else (SIZES_MIB, 5)
    for (name, layout), mib in itertools.product(LAYOUTS.items(), sizes):
        with console.status(f"{name}, {mib} MiB"):
            rows += measure(name, layout, mib, repeats)
    limits = show(rows)
    console.print(record.write({"budgets": limits, "transfers": rows}))


if __name__ == "__main__":
    typer.run(main)
