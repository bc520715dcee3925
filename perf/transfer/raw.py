"""NIXL without any code of this package, with which the transport is compared."""

from __future__ import annotations

import secrets
import time
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

LIMIT_S = 120.0


def _agent() -> Any:
    from nixl_cu12._api import nixl_agent, nixl_agent_config  # noqa: PLC0415

    config = nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
    return nixl_agent(f"raw-{secrets.token_hex(8)}", config)


class RawHolder:
    """Registers `data`; its process calls `progress` while `busy`."""

    def __init__(self, data: NDArray[np.uint8]) -> None:
        self._agent = _agent()
        self._agent.register_memory([(data.ctypes.data, data.nbytes, 0, "")], "DRAM")
        self.busy = False
        metadata = self._agent.get_agent_metadata()
        self.way = msgspec.msgpack.encode((metadata, data.ctypes.data))

    def progress(self) -> None:
        self._agent.get_new_notifs()


class RawReader:
    """Reads from a `RawHolder` into `pool`, polling without a pause."""

    def __init__(self, way: bytes, pool: NDArray[np.uint8]) -> None:
        metadata, self._address = msgspec.msgpack.decode(way, type=tuple[bytes, int])
        self._agent = _agent()
        self._pool = pool
        self._agent.register_memory([(pool.ctypes.data, pool.nbytes, 0, "")], "DRAM")
        self._peer = self._agent.add_remote_agent(metadata)
        self.read(8)

    def read(self, nbytes: int) -> None:
        """Make one contiguous transfer."""
        local = self._agent.get_xfer_descs([(self._pool.ctypes.data, nbytes, 0)], "DRAM")
        remote = self._agent.get_xfer_descs([(self._address, nbytes, 0)], "DRAM")
        transfer = self._agent.initialize_xfer("READ", local, remote, self._peer)
        state, deadline = self._agent.transfer(transfer), time.monotonic() + LIMIT_S
        while state == "PROC":
            if time.monotonic() > deadline:
                raise TimeoutError(f"raw NIXL has not read {nbytes} bytes in {LIMIT_S:g} s")
            state = self._agent.check_xfer_state(transfer)
        if state != "DONE":
            raise RuntimeError(f"raw NIXL: {state}")
        self._agent.release_xfer_handle(transfer)
