"""Transport `nixl`: NIXL over UCX, which picks RDMA, CUDA IPC, CMA (one host) or TCP.

Where the network can read (all but TCP), the receiver does everything by itself; where it cannot,
it asks the holder to write (`nixl/asks.py`), and depends on the holder's `progress`.

NIXL never reports a peer that is stopped, and only the end of an agent prevents later writes of a
transfer that was given up (`nixl/agent.py`). So every wait has a deadline, each link has its own
agent, and any failure ends both. Memory is registered again for every link.

Anyone who reaches the port of a UCX process over TCP can read that process's memory: UCX serves
reads without checking keys. The network between prefills and decodes has to be trusted.

It has run over CMA and TCP; not over RDMA, nor with GPU memory.
"""

from __future__ import annotations

import secrets
import time
import weakref
from typing import ClassVar

import msgspec

from pdserve.transfer.protocol import Link, Memory, TransferError, Unreachable
from pdserve.transfer.transports.cuda_ipc.calls import load
from pdserve.transfer.transports.nixl.agent import Agent
from pdserve.transfer.transports.nixl.asking import AskingLink
from pdserve.transfer.transports.nixl.link import NixlLink, Way
from pdserve.transfer.transports.nixl.reading import ReadingLink
from pdserve.transfer.transports.nixl.server import Server

OPEN_S = 2.0
"""Seconds to connect and to read the first lease slot."""
_SECRET_BYTES = 16


class NixlTransport:
    """Implements `Transport`. The library is loaded by the first `offer` or `open`."""

    name: ClassVar[str] = "nixl"

    def __init__(self) -> None:
        self._memories: list[Memory] = []
        self._links: weakref.WeakSet[NixlLink] = weakref.WeakSet()
        self._holder: Agent | None = None
        self._device: int | None = None
        self._server: Server | None = None

    def register(self, memory: Memory) -> None:
        """Register memory into which links that are opened from now on may pull."""
        self._memories.append(memory)

    def offer(self, table: Memory, data: Memory) -> bytes:
        agent = Agent()
        try:
            for memory in (table, data):
                agent.register(memory)
            secret = secrets.token_bytes(_SECRET_BYTES)
            self._server = Server(agent, table, data, secret)
            way = Way(
                metadata=agent.metadata(),
                table=(table.address, table.nbytes),
                data=(data.address, data.nbytes, data.device),
                secret=secret,
            )
        except TransferError as error:
            agent.close()
            raise Unreachable(f"{table} and {data} cannot be registered: {error}") from error
        self._holder, self._device = agent, data.device
        return msgspec.msgpack.encode(way)

    def open(self, way: bytes) -> Link:
        try:
            wanted = msgspec.msgpack.decode(way, type=Way)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise Unreachable(f"nixl: {error}") from error
        agent = Agent()
        try:
            for memory in self._memories:
                agent.register(memory)
            link = self._connect(agent, wanted, time.monotonic() + OPEN_S)
        except TransferError as error:
            agent.close()
            raise Unreachable(f"nixl: {error}") from error
        link.describe()
        self._links.add(link)
        return link

    def _connect(self, agent: Agent, way: Way, deadline: float) -> ReadingLink | AskingLink:
        peer = agent.connect(way.metadata)
        reading = ReadingLink(agent, peer, way, self._memories)
        if reading.works(deadline):
            return reading
        asking = AskingLink(agent, peer, way, self._memories)
        asking.hello(deadline)
        return asking

    def written(self) -> None:
        """Wait for the GPU: a network card reads its memory without regard to its streams."""
        if self._device is not None:
            cuda = load()
            cuda.use(self._device)
            cuda.call("cudaDeviceSynchronize", raising=TransferError)

    def progress(self) -> None:
        server = self._server
        if server is not None:
            server.serve()

    def close(self) -> None:
        for link in list(self._links):
            link.close()
        self._memories.clear()
        self._server = None
        if self._holder is not None:
            self._holder.close()
