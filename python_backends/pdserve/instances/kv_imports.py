"""KV caches on their way into a decode's pool: the links, the pulls, and the threads for both."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from concurrent.futures import Executor

from pdserve import errors, pools
from pdserve.engines.protocol import DecodeEngine, DecodeSequence
from pdserve.kvcache.block_manager import ReservedBlocks
from pdserve.kvcache.handle import KVHandle
from pdserve.observability import catalogue
from pdserve.observability.metrics import Registry
from pdserve.supervision import Background
from pdserve.transfer import arrays
from pdserve.transfer.consumer.receiver import Receiver
from pdserve.transfer.reports import LinkReport, TransferReport
from pdserve.transfer.scatter import part_of

Threads = Callable[[int, str, Callable[[], None]], Executor]
"""Makes a pool of so many threads, by a name and what each does first."""

# Nice value of the threads that pull: where cores are scarce, the step of the running batch goes
# first. Linux has a nice value for each thread.
NICENESS = 5
# Threads for layered pulls, which wait for a prefill most of the time and must not keep others
# waiting.
FOLLOWERS = 16
# Below this many bytes a copy costs less than handing it to another thread.
INLINE_PULL = 256 << 10
UNLINK_S = 5.0
"""Seconds for pulls that are in progress when their link is to be closed."""


class KVImports:
    """Pulls KV caches into the pool of one decode instance; used in its event loop.

    Args:
        receiver: pulls into the engine's pool; closed with this object.
        pulls: number of pulls that run at the same time, besides those that follow a prefill.
        threads: makes the pools of its threads.
    """

    def __init__(
        self,
        name: str,
        engine: DecodeEngine,
        receiver: Receiver,
        pulls: int,
        metrics: Registry,
        threads: Threads = pools.started,
    ) -> None:
        self._name = name
        self._engine = engine
        self._token_bytes = engine.pool[:, 0].nbytes
        self._receiver = receiver
        self._metrics = metrics
        self._puller = threads(pulls, "pull", _step_back)
        self._follower = threads(FOLLOWERS, "follow", _step_back)
        self._connector = threads(1, "connect", _step_back)
        # Not the connector's thread: connects wait for each other, some for seconds.
        self._unlinker = threads(1, "unlink", _step_back)
        self._links: dict[str, tuple[str, str, str, str]] = {}
        """Labels of the link to each prefill, for metrics."""
        self._tasks = Background()

    def __len__(self) -> int:
        """Return the number of pulls and connects in progress outside the loop."""
        return len(self._tasks)

    def open(self, data: bytes, tokens: int) -> KVHandle:
        """Return the checked handle of a KV cache of ``tokens`` tokens.

        Raises:
            HandleError, NoLink: see `Receiver.open`.
        """
        handle = self._receiver.open(data)
        if handle.tokens != tokens:
            raise errors.HandleError(
                f"KV handle is of {handle.tokens} tokens; the prompt has {tokens}"
            )
        return handle

    def connect(
        self, endpoint: bytes, done: Callable[[tuple[str, LinkReport] | errors.PDServeError], None]
    ) -> None:
        """Connect to a prefill; `done` gets its name and how it is reached, or the error."""
        self._tasks.start(self._connect(endpoint, done))

    async def _connect(
        self, endpoint: bytes, done: Callable[[tuple[str, LinkReport] | errors.PDServeError], None]
    ) -> None:
        loop = asyncio.get_running_loop()
        try:
            prefill, link = await loop.run_in_executor(
                self._connector, self._receiver.connect, endpoint
            )
        except errors.PDServeError as error:
            done(error)
        except Exception as error:  # otherwise the caller would wait in vain
            done(errors.InstanceError(f"{error!r}"))
        else:
            self._publish(prefill, link)
            done((prefill, link))

    def unlink(
        self,
        prefill: str,
        epoch: bytes,
        number: int,
        done: Callable[[errors.PDServeError | None], None],
    ) -> None:
        """Close the link to a prefill; `done` is called when nothing uses it, or gets the error."""
        self._tasks.start(self._unlink(prefill, epoch, number, done))

    async def _unlink(
        self,
        prefill: str,
        epoch: bytes,
        number: int,
        done: Callable[[errors.PDServeError | None], None],
    ) -> None:
        loop = asyncio.get_running_loop()
        unlink = self._receiver.unlink
        try:
            await loop.run_in_executor(self._unlinker, unlink, epoch, number, UNLINK_S)
        except errors.PDServeError as error:
            done(error)
        except Exception as error:  # otherwise the caller would wait in vain
            done(errors.InstanceError(f"{error!r}"))
        else:
            if not self._receiver.linked(prefill):
                self._links.pop(prefill, None)
                self._metrics.drop(prefill=prefill, decode=self._name)
            done(None)

    def pull(
        self,
        handle: KVHandle,
        reserved: ReservedBlocks,
        sequence: DecodeSequence,
        done: Callable[[TransferReport | Exception], None],
    ) -> None:
        """Pull a KV cache into its blocks; `done` is called once, perhaps before this returns."""
        small = handle.tokens * self._token_bytes <= INLINE_PULL and self._receiver.mapped(handle)
        if small and sequence.tokens:  # otherwise it is still being computed
            self._end(self._pull(handle, reserved, sequence), done)
        else:
            self._tasks.start(self._pull_aside(handle, reserved, sequence, done))

    async def _pull_aside(
        self,
        handle: KVHandle,
        reserved: ReservedBlocks,
        sequence: DecodeSequence,
        done: Callable[[TransferReport | Exception], None],
    ) -> None:
        loop = asyncio.get_running_loop()
        computed = bool(sequence.tokens)
        threads = self._puller if computed else self._follower
        transfer: TransferReport | Exception
        try:
            transfer = await loop.run_in_executor(threads, self._pull, handle, reserved, sequence)
        except Exception as error:  # it was not begun, and its request may not wait for it
            transfer = error
        self._end(transfer, done)

    def _pull(
        self, handle: KVHandle, reserved: ReservedBlocks, sequence: DecodeSequence
    ) -> TransferReport | Exception:
        tokens, held = handle.tokens, reserved.held
        try:
            for source, target, rows in reserved.copies():
                arrays.copy_rows(self._engine.pool, source, target, rows)
            tail = part_of(sequence.runs, held, tokens - held)
            transfer = self._receiver.pull(handle, tail, held)
            self._engine.joined(sequence)
        except Exception as error:  # it fails this request only; the others go on
            return error
        return transfer

    def _end(
        self,
        transfer: TransferReport | Exception,
        done: Callable[[TransferReport | Exception], None],
    ) -> None:
        if isinstance(transfer, TransferReport):
            self._metrics.observe(catalogue.KV_TRANSFER, transfer.ms / 1e3)
            self._metrics.observe(catalogue.KV_TRANSFER_EXPOSED, transfer.exposed_ms / 1e3)
            self._metrics.add(
                catalogue.KV_TRANSFER_BYTES, transfer.nbytes, transport=transfer.transport
            )
            self._metrics.add(catalogue.KV_TRANSFERS, 1, strategy=transfer.strategy)
        done(transfer)

    async def close(self) -> None:
        """Stop all pulls and connects: pulls fail as their links close."""
        await self._tasks.close()
        self._receiver.close()
        for threads in (self._puller, self._follower, self._connector, self._unlinker):
            threads.shutdown(wait=True, cancel_futures=True)

    def _publish(self, prefill: str, link: LinkReport) -> None:
        labels = prefill, self._name, link.transport, link.detail
        former = self._links.get(prefill, labels)
        self._links[prefill] = labels
        for gauge, value in (
            (catalogue.KV_LINK_RATE, link.bytes_per_s),
            (catalogue.KV_LINK_LATENCY, link.latency_s),
            (catalogue.KV_LINK_FALLBACK, float(link.fallback)),
        ):
            if former != labels:
                self._metrics.set(gauge, 0, *former)
            self._metrics.set(gauge, value, *labels)


def _step_back() -> None:
    # A thread may not ask for a lower nice value than its process has.
    niceness = max(NICENESS, os.getpriority(os.PRIO_PROCESS, 0))
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)
