"""NIXL without any code of this package, with which the transport is compared."""

from __future__ import annotations

import importlib
import importlib.util
import secrets
import time
from typing import Any

import msgspec

from pdserve.transfer.protocol import Memory

LIMIT_S = 120.0
PACKAGES = ("nixl_cu12", "nixl_cu13")
"""Names of NIXL's package, which is built for one version of CUDA."""


def _agent() -> Any:
    (name, *_) = (name for name in PACKAGES if importlib.util.find_spec(name))
    library = importlib.import_module(f"{name}._api")
    config = library.nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
    return library.nixl_agent(f"raw-{secrets.token_hex(8)}", config)


def _kind(memory: Memory) -> tuple[int, str]:
    """Return the number of the memory's device for NIXL, and the kind of memory."""
    return (0, "DRAM") if memory.device is None else (memory.device, "VRAM")


def _register(agent: Any, memory: Memory) -> None:
    device, kind = _kind(memory)
    agent.register_memory([(memory.address, memory.nbytes, device, "")], kind)


class RawHolder:
    """Registers `data`; its process calls `progress` while `busy`."""

    def __init__(self, data: Memory) -> None:
        self._agent = _agent()
        _register(self._agent, data)
        self.busy = False
        metadata = self._agent.get_agent_metadata()
        self.way = msgspec.msgpack.encode((metadata, data.address, *_kind(data)))

    def progress(self) -> None:
        self._agent.get_new_notifs()


class RawReader:
    """Reads from a `RawHolder` into `pool`, polling without a pause."""

    def __init__(self, way: bytes, pool: Memory) -> None:
        told = msgspec.msgpack.decode(way, type=tuple[bytes, int, int, str])
        metadata, self._address, self._device, self._kind = told
        self._agent = _agent()
        self._pool = pool
        _register(self._agent, pool)
        self._peer = self._agent.add_remote_agent(metadata)
        self.read(8)

    def read(self, nbytes: int) -> None:
        """Make one contiguous transfer."""
        device, kind = _kind(self._pool)
        local = self._agent.get_xfer_descs([(self._pool.address, nbytes, device)], kind)
        there = self._address, nbytes, self._device
        remote = self._agent.get_xfer_descs([there], self._kind)
        transfer = self._agent.initialize_xfer("READ", local, remote, self._peer)
        state, deadline = self._agent.transfer(transfer), time.monotonic() + LIMIT_S
        while state == "PROC":
            if time.monotonic() > deadline:
                raise TimeoutError(f"raw NIXL has not read {nbytes} bytes in {LIMIT_S:g} s")
            state = self._agent.check_xfer_state(transfer)
        if state != "DONE":
            raise RuntimeError(f"raw NIXL: {state}")
        self._agent.release_xfer_handle(transfer)
