"""KV caches from a context engine's process to a generation engine's, on one host.

    generation                          context
    Ask: which request, my cache  --->  is it held, are the caches alike? writes a file
    reads it                      <---  Give: the file, or why not
    taken                         --->  removes it, frees the blocks

One TCP connection of loopback each; a message is a line of JSON. If the connection ends before
`taken`, the KV cache stays held. If the generation request was aborted meanwhile, the line is
`abandoned`, and the blocks are *stranded*: neither a time-out nor another pull frees them, as
aborts in the middle of a transfer strand them in the library (ai-dynamo/dynamo#7489).
"""

from __future__ import annotations

import asyncio
import itertools
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray
from tensorrt_llm._fake.exchange import Ask, Cache, Give, Link, TransferError, line_of
from tensorrt_llm._fake.faults import Faults
from tensorrt_llm.version import COLD_CLEANUP

_numbers = itertools.count()
TAKEN, ABANDONED = b"taken\n", b"abandoned\n"


@dataclass(eq=False)
class _Held:
    read: Callable[[], NDArray[np.uint8]]
    free: Callable[[], None]
    timer: asyncio.TimerHandle | None = None
    sending: bool = False
    expired: bool = False
    stranded: bool = False


class Sender:
    """A context engine's side; all of it runs in the engine's loop."""

    def __init__(self, cache: Cache, timeout_s: float | None, faults: Faults) -> None:
        self._cache = cache
        self._timeout_s = timeout_s
        self._faults = faults
        self._held: dict[int, _Held] = {}
        self._server: asyncio.Server | None = None
        self._prefix = _prefix()

    async def open(self) -> str:
        """Begin to listen; return the address."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        host, port = self._server.sockets[0].getsockname()
        return f"tcp://{host}:{port}"

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for id_ in list(self._held):
            self._free(id_)

    def __contains__(self, id_: int) -> bool:
        return id_ in self._held

    def __len__(self) -> int:
        return len(self._held)

    def hold(
        self, id_: int, read: Callable[[], NDArray[np.uint8]], free: Callable[[], None]
    ) -> None:
        """Keep a KV cache until it is taken, or its time is over. Nothing is moved.

        Args:
            read: uint8 [planes, tokens, row_bytes], a copy.
        """
        held = self._held[id_] = _Held(read, free)
        if self._timeout_s is not None:
            loop = asyncio.get_running_loop()
            held.timer = loop.call_later(self._timeout_s, self._expire, id_)

    def _expire(self, id_: int) -> None:
        held = self._held[id_]
        held.expired = True
        if not COLD_CLEANUP:
            self._let_go(id_)

    def sweep(self) -> None:
        """Free what has expired; called when the next context request comes."""
        for id_ in list(self._held):
            self._let_go(id_)

    def strand(self, id_: int) -> None:
        """Keep a KV cache for good, if there is one, since its request was aborted."""
        if id_ in self._held:
            self._held[id_].stranded = True

    def _let_go(self, id_: int) -> None:
        held = self._held[id_]
        if held.expired and not held.sending and not held.stranded:
            self._free(id_)

    def _free(self, id_: int) -> None:
        held = self._held.pop(id_)
        if held.timer is not None:
            held.timer.cancel()
        held.free()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, msgspec.MsgspecError):
            await self._converse(reader, writer)
        writer.close()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ask = msgspec.json.decode(await reader.readline(), type=Ask)
        held = self._held.get(ask.id)
        try:
            ask.cache.check(self._cache)
            if held is None or held.sending or held.expired or held.stranded:
                raise TransferError(
                    f"request {ask.id} is not held: it was taken, has expired, or never was"
                )
        except TransferError as error:
            writer.write(line_of(Give(error=str(error))))
            await writer.drain()
            return
        held.sending = True
        file = Path(f"{self._prefix}-trtllm-{os.getpid()}-{next(_numbers)}")
        taken = b""
        try:
            await self._faults.meet("pull")
            kv = held.read()
            await asyncio.to_thread(_write, file, kv)
            writer.write(line_of(Give(file=str(file), tokens=kv.shape[1])))
            taken = await reader.readline()
        except RuntimeError as error:
            writer.write(line_of(Give(error=str(error))))
            await writer.drain()
        finally:
            _remove(file)
            self._sent(ask.id, held, taken)

    def _sent(self, id_: int, held: _Held, taken: bytes) -> None:
        held.sending = False
        if self._held.get(id_) is not held:
            return
        if taken == ABANDONED:
            held.stranded = True
        elif taken and not held.stranded:
            self._free(id_)
        elif not COLD_CLEANUP:
            self._let_go(id_)


async def pull(
    link: Link, cache: Cache, tokens: int, aborted: Callable[[], bool]
) -> NDArray[np.uint8]:
    """Return the KV cache of a prompt for a generation engine, [planes, tokens, row_bytes].

    Args:
        aborted: tells whether the request was aborted while its KV cache moved.

    Raises:
        TransferError: there is none to be had there.
    """
    if link.cache is not None:
        cache.check(link.cache)
    host, _, port = link.address.removeprefix("tcp://").rpartition(":")
    try:
        reader, writer = await asyncio.open_connection(host, int(port))
    except (OSError, ValueError) as error:
        raise TransferError(f"the context engine at {link.address!r}: {error}") from error
    try:
        writer.write(line_of(Ask(link.id, cache)))
        line = await reader.readline()
        if not line:
            raise TransferError(f"the context engine at {link.address} has gone")
        give = msgspec.json.decode(line, type=Give)
        if give.error:
            raise TransferError(f"the context engine at {link.address}: {give.error}")
        if give.tokens != tokens:
            raise TransferError(
                f"the KV cache of request {link.id} is of {give.tokens} tokens, not {tokens}"
            )
        kv = await asyncio.to_thread(np.fromfile, give.file, np.uint8)
        writer.write(ABANDONED if aborted() else TAKEN)
        await writer.drain()
        return kv.reshape(cache.layout.shape(tokens))
    except (OSError, msgspec.MsgspecError) as error:
        raise TransferError(f"the context engine at {link.address}: {error}") from error
    finally:
        writer.close()


def _prefix() -> str:
    shared = os.environ.get("PDSERVE_SHM_PREFIX")
    return f"/dev/shm/{shared}" if shared else str(Path(tempfile.gettempdir()) / "fake")


def _remove(file: Path) -> None:
    file.unlink(missing_ok=True)


def _write(file: Path, kv: NDArray[np.uint8]) -> None:
    file.touch(mode=0o600, exist_ok=False)
    kv.tofile(file)
