"""CUDA's calls as the transfer plane makes them: through cuda-bindings, every error checked.

Written to the documented API of CUDA 12.9 and 13; it has not run on hardware.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any
from uuid import UUID

from pdserve.errors import InstanceError
from pdserve.transfer.protocol import TransferError, Unreachable

_log = logging.getLogger(__name__)

HANDLE_BYTES = 64
"""CUDA_IPC_HANDLE_SIZE: of memory's handles, and of events'."""
UUID_BYTES = 16

# Between two looks at the device, growing from the first to the second.
_LOOK_S = (20e-6, 500e-6)

_HINTS = {
    "cudaErrorInsufficientDriver": "there is no NVIDIA driver, or it is older than cuda-bindings",
    "cudaErrorNoDevice": "no GPU is visible; see CUDA_VISIBLE_DEVICES",
    "cudaErrorDevicesUnavailable": "another process has it for itself: compute mode DEFAULT, or "
    "MPS, lets several in",
    "cudaErrorNotSupported": "CUDA IPC needs Linux on a GPU of its own: not WSL, nor Tegra",
    "cudaErrorMapBufferObjectFailed": "containers must share their IPC and PID namespaces",
    "cudaErrorInvalidResourceHandle": "its holder has ended, or is in another container",
    "cudaErrorDeviceUninitialized": "a process cannot open what it has exported itself",
    "cudaErrorPeerAccessUnsupported": "the two GPUs cannot reach each other's memory",
}


@dataclass(slots=True)
class Opened:
    """An IPC handle that this process has open."""

    address: int
    uses: int = 1


class Cuda:
    """The runtime and the driver, as cuda-bindings has them: results are (error, values...).

    Args:
        runtime: `cuda.bindings.runtime`, or what behaves like it.
        driver: `cuda.bindings.driver`, likewise.
    """

    def __init__(self, runtime: ModuleType | Any, driver: ModuleType | Any) -> None:
        self.runtime = runtime
        self.driver = driver
        self.opened: dict[tuple[int, bytes], Opened] = {}
        """By device and IPC handle; see `Mapping`."""
        # Of `opened`. A Mapping may go, and take it, in a garbage collection in any thread.
        self.lock = threading.RLock()

    def call(self, name: str, *args: Any, raising: type[InstanceError] = Unreachable) -> Any:
        """What a function returns besides its error.

        Raises:
            Unreachable: or `raising`, with CUDA's name of the error.
        """
        library = self.runtime if name.startswith("cuda") else self.driver
        error, *values = getattr(library, name)(*args)
        _check(name, error, raising)
        return values[0] if len(values) == 1 else values

    def finished(self, name: str, what: Any) -> bool:
        """The answer of cudaEventQuery or cudaStreamQuery.

        Raises:
            TransferError: the work has failed.
        """
        (error,) = getattr(self.runtime, name)(what)
        if error.name == "cudaErrorNotReady":
            return False
        _check(name, error, TransferError)
        return True

    def discard(self, name: str, what: Any) -> None:
        """Give something back; that it was gone already, with its device, changes nothing."""
        try:
            self.call(name, what)
        except Unreachable as error:
            _log.warning("%s", error)

    def use(self, device: int) -> None:
        """Make a device current in this thread, which it stays.

        Restoring the one before would cost a context on device 0 in every process that uses
        another: that is what a thread begins with, and since CUDA 12 setting it creates one.
        """
        self.call("cudaSetDevice", device)

    def uuid(self, device: int) -> bytes:
        """The device's UUID (UUID_BYTES), which all processes share; its number they do not."""
        uuid: bytes = self.call("cudaGetDeviceProperties", device).uuid.bytes
        return uuid

    def number(self, uuid: bytes) -> int | None:
        """The device in this process; None if CUDA_VISIBLE_DEVICES hides it, or it is elsewhere."""
        count = self.call("cudaGetDeviceCount")
        return next((device for device in range(count) if self.uuid(device) == uuid), None)


def _check(name: str, error: Any, raising: type[InstanceError]) -> None:
    if error != 0:
        hint = _HINTS.get(error.name)
        raise raising(f"{name}: {error.name}" + (f": {hint}" if hint else ""))


@lru_cache
def load() -> Cuda:
    """The CUDA of this process.

    Raises:
        Unreachable: no cuda-bindings, driver or GPU.
    """
    try:
        from cuda.bindings import driver, runtime  # noqa: PLC0415 - most processes need none
    except ImportError as error:
        raise Unreachable(f"no cuda-bindings ({error}): install pdserve[cuda]") from error
    cuda = Cuda(runtime, driver)
    cuda.call("cudaGetDeviceCount")
    return cuda


def gpu(uuid: bytes) -> str:
    """A device as nvidia-smi names it."""
    return f"GPU-{UUID(bytes=uuid)}"


def visible() -> str:
    """For messages: which devices a process sees."""
    return f"CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'unset')}"


# An IPC handle's bytes have a name (`reserved`) up to cuda-bindings 13.3 only: hence its address.


def handle_bytes(handle: Any) -> bytes:
    """HANDLE_BYTES of a cudaIpcMemHandle_t or cudaIpcEventHandle_t."""
    return ctypes.string_at(handle.getPtr(), HANDLE_BYTES)


def handle_of(kind: Any, data: bytes) -> Any:
    """The handle of these HANDLE_BYTES."""
    handle = kind()
    ctypes.memmove(handle.getPtr(), data, HANDLE_BYTES)
    return handle


def until(
    done: Callable[[], bool], deadline: float, alive: Callable[[], None] = lambda: None
) -> bool:
    """Look again and again; whether it was done by `deadline` (seconds on CLOCK_MONOTONIC)."""
    pause, longest = _LOOK_S
    while not done():
        if time.monotonic() >= deadline:
            return False
        alive()
        time.sleep(pause)
        pause = min(pause * 2, longest)
    return True
