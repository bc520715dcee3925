"""A NIXL agent: a UCX worker with its sockets and queue pairs, and the memory that it may access.

Facts of NIXL 1.5.1 with UCX 1.23 that shape this module, measured or read in the source:
- What is released, and even a peer that is removed, still writes: after `release_xfer_handle` and
  `remove_remote_agent`, a stopped peer that went on delivered the other 225 of 256 MiB. Nothing is
  written once the agent is gone (10 ms, with a transfer under way), so an agent is made for each
  link (20 ms; the first of a process 0.5 s) and ended with it.
- The progress thread takes a whole core. Without it, UCX moves only inside our calls.
- `check_xfer_state` and `transfer`, which is where CMA copies, release the GIL;
  `release_xfer_handle` and `remove_remote_agent` do not, and with NIXL's own locks would keep all
  of Python waiting for another thread's copy. Hence one lock here, waited for without the GIL.
"""

from __future__ import annotations

import importlib
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from pdserve.transfer.protocol import Memory, TransferError, Unreachable
from pdserve.transfer.transports.nixl import ucx

T = TypeVar("T")

# UCX emulates what a network cannot do, such as reading over TCP, by messages that the other side
# answers; if we die before the last of the answers, UCX ends the process on the other side ("Fatal:
# unexpected error"). `nixl/ucx.py` reads PROTO_INFO. TCP_SYN_CNT: connecting to a host that does
# not answer otherwise blocks for 135 s, with 1 for 3 s; other links and other threads go on
# meanwhile. CMA_SEG_SIZE: the bytes that CMA copies in one system call, by default 512 KiB: a
# contiguous pull takes 6 % less time.
_ENGINE = "PROTO_EMULATION_ENABLE=n,PROTO_INFO=remote memory*,TCP_SYN_CNT=1,CMA_SEG_SIZE=64m"

MOVED_S = 20e-6
"""A poll that takes longer has moved bytes, or waited for one that has: poll again at once. One
over TCP that finds nothing takes 3 us, and 8 us after a sleep."""
# Otherwise a wait sleeps for 1/50 of its duration so far, so that at most 2 % is lost. Below 20 us
# there is only the timer's slack (50 us); at 500 us, a wait takes 7 % of a core.
_NAP = 1 / 50
_NAPS_S = (20e-6, 500e-6)


@lru_cache(maxsize=1)
def _library() -> ModuleType:
    # Every error that NIXL reports becomes an exception here.
    os.environ.setdefault("NIXL_LOG_LEVEL", "FATAL")
    reasons = []
    for name in ("nixl_cu12", "nixl_cu13"):
        try:
            return importlib.import_module(f"{name}._api")
        except ImportError as error:
            reasons.append(str(error))
    raise Unreachable(
        f"NIXL cannot be imported ({'; '.join(reasons)}); install the extra nixl or nixl-cu13"
    )


@dataclass(frozen=True, slots=True)
class Ranges:
    """One side of a transfer: int64 [n] each, in one kind of memory."""

    addresses: NDArray[np.int64]
    sizes: NDArray[np.int64]
    device: int | None = None

    def descriptors(self) -> tuple[NDArray[np.uint64], str]:
        """Return NIXL's form: uint64 [n, 3] with the device's number, and the kind of memory."""
        made = np.empty((len(self.sizes), 3), np.uint64)
        made[:, 0] = self.addresses
        made[:, 1] = self.sizes
        made[:, 2] = self.device or 0
        return made, "DRAM" if self.device is None else "VRAM"


class Transfer:
    """A transfer of an agent. Its owner polls it until it is done, or ends it."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self.done = False


class Agent:
    """A NIXL agent. Thread-safe.

    Every method but `close` raises TransferError if the library fails.
    """

    def __init__(self) -> None:
        """Make the agent. Raises Unreachable if NIXL is not installed or does not work here."""
        library = _library()
        # UCX cuts names that are longer than 31 characters.
        self.name = f"pdserve-{secrets.token_hex(8)}"
        self._lock = threading.Lock()
        self._memories: list[tuple[Memory, Any]] = []
        self._transfers: set[Transfer] = set()
        self._nixl: Any = None
        try:
            config = library.nixl_agent_config(enable_prog_thread=False, backends=[])
            nixl = library.nixl_agent(self.name, config)
            with ucx.begun():
                nixl.create_backend("UCX", {"engine_config": _ENGINE})
        except Exception as error:
            raise Unreachable(f"NIXL does not work here: {error}") from error
        self._nixl = nixl

    @contextmanager
    def _calling(self) -> Iterator[Any]:
        with self._lock:
            if self._nixl is None:
                raise TransferError("the link is closed")
            try:
                yield self._nixl
            except TransferError:
                raise
            except Exception as error:
                raise TransferError(f"NIXL: {error}") from error

    def register(self, memory: Memory) -> None:
        with self._calling() as nixl:
            kind = "DRAM" if memory.device is None else "VRAM"
            region = (memory.address, memory.nbytes, memory.device or 0, "")
            self._memories.append((memory, nixl.register_memory([region], kind)))

    def metadata(self) -> bytes:
        """Return what peers need to connect and to reach the memory."""
        with self._calling() as nixl:
            metadata: bytes = nixl.get_agent_metadata()
            return metadata

    def connect(self, metadata: bytes) -> str:
        """Connect to a peer, and return its name."""
        with self._calling() as nixl:
            name: bytes = nixl.add_remote_agent(metadata)
            return name.decode()

    def forget(self, peer: str) -> None:
        with self._calling() as nixl:
            nixl.remove_remote_agent(peer)

    def begin(
        self,
        operation: Literal["READ", "WRITE"],
        peer: str,
        local: Ranges,
        remote: Ranges,
        note: bytes = b"",
    ) -> Transfer:
        """Begin to move bytes; after them the note is sent to the peer."""
        with self._calling() as nixl:
            mine, theirs = (nixl.get_xfer_descs(*side.descriptors()) for side in (local, remote))
            transfer = Transfer(nixl.initialize_xfer(operation, mine, theirs, peer, note))
            self._transfers.add(transfer)
            try:
                self._settle(transfer, nixl.transfer(transfer.handle, note))
            except Exception:
                self._release(transfer)
                raise
            return transfer

    def poll(self, transfer: Transfer) -> bool:
        """Let the transfer make progress, and tell whether every byte has arrived."""
        if not transfer.done:
            with self._calling() as nixl:
                if transfer.handle is None:
                    raise TransferError("the transfer was given up")
                self._settle(transfer, nixl.check_xfer_state(transfer.handle))
        return transfer.done

    def end(self, transfer: Transfer) -> None:
        """Give a transfer up; bytes on their way arrive nevertheless.

        Calling it again is no error.
        """
        with self._calling():
            self._release(transfer)

    def notes(self) -> dict[str, list[bytes]]:
        """Make progress, and return the notes of peers, by name."""
        with self._calling() as nixl:
            notes: dict[str, list[bytes]] = nixl.get_new_notifs()
            return notes

    def say(self, peer: str, note: bytes) -> None:
        with self._calling() as nixl:
            nixl.send_notif(peer, note)

    def _settle(self, transfer: Transfer, state: str) -> None:
        if state == "DONE":
            transfer.done = True
            self._release(transfer)
        elif state != "PROC":
            raise TransferError(f"NIXL: a transfer ended in state {state}")

    def _release(self, transfer: Transfer) -> None:
        handle, transfer.handle = transfer.handle, None
        if handle is None:
            return
        self._transfers.discard(transfer)
        with suppress(Exception):
            handle.release()
        # Otherwise it would release itself later, and keep the agent until then.
        handle._released, handle._agent = True, None

    def close(self) -> None:
        """End all access to the memory; calling it again is no error."""
        with self._lock:
            if self._nixl is None:
                return
            for transfer in list(self._transfers):
                self._release(transfer)
            # The agent proper ends here, even if a traceback keeps this wrapper alive.
            self._nixl.agent = None
            self._nixl = None
            self._memories.clear()


def until(
    ready: Callable[[], T | None],
    deadline: float,
    spin_s: float = 0.0,
    alive: Callable[[], None] = lambda: None,
) -> T:
    """Poll until there is an answer that is not None, and return it.

    Args:
        deadline: seconds on CLOCK_MONOTONIC.
        spin_s: seconds for which to poll without a pause.
        alive: called between two polls.

    Raises:
        TransferError: there was no answer in time.
    """
    began = now = time.monotonic()
    while True:
        asked = now
        if (answer := ready()) is not None:
            return answer
        now = time.monotonic()
        if now > deadline:
            raise TransferError(f"no answer in {now - began:.3f} s")
        if now - asked < MOVED_S and now - began >= spin_s:
            time.sleep(min(max((now - began) * _NAP, _NAPS_S[0]), _NAPS_S[1]))
        alive()
        now = time.monotonic()
