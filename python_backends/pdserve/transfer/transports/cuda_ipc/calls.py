"""The CUDA calls of the transfer plane, through cuda-bindings, with every error checked.

Written according to the documented API of CUDA 12.9 and 13; it has not run on hardware.
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
"""CUDA_IPC_HANDLE_SIZE: bytes of a handle of memory or of an event."""
UUID_BYTES = 16

SPIN_S = 2e-3
"""Time for which the device is asked without a pause: by its memory's rate a copy of 512 MiB within
it takes 0.3 ms, and the shortest sleep is some 75 us, of which 50 are the timer's slack."""
# Interval of looks at the device afterwards, growing from the first value to the second.
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
        runtime: `cuda.bindings.runtime`, or a fake of it.
        driver: `cuda.bindings.driver`, or a fake of it.
    """

    def __init__(self, runtime: ModuleType | Any, driver: ModuleType | Any) -> None:
        self.runtime = runtime
        self.driver = driver
        self.opened: dict[tuple[int, bytes], Opened] = {}
        """Opened handles by device and IPC handle; see `Mapping`."""
        # It guards `opened`, and is reentrant, since garbage collection may end a Mapping, which
        # takes the lock, in any thread.
        self.lock = threading.RLock()

    def call(self, name: str, *args: Any, raising: type[InstanceError] = Unreachable) -> Any:
        """Call a function, and return its results without the error.

        Raises:
            Unreachable: or `raising`, with CUDA's name of the error.
        """
        library = self.runtime if name.startswith("cuda") else self.driver
        error, *values = getattr(library, name)(*args)
        _check(name, error, raising)
        return values[0] if len(values) == 1 else values

    def finished(self, name: str, what: Any) -> bool:
        """Return the result of cudaEventQuery or cudaStreamQuery.

        Raises:
            TransferError: the work has failed.
        """
        (error,) = getattr(self.runtime, name)(what)
        if error.name == "cudaErrorNotReady":
            return False
        _check(name, error, TransferError)
        return True

    def discard(self, name: str, what: Any) -> None:
        """Free something; that it was gone already, with its device, is only logged."""
        try:
            self.call(name, what)
        except Unreachable as error:
            _log.warning("%s", error)

    def use(self, device: int) -> None:
        """Make a device current in this thread, which it stays.

        Restoring the previous one would cost a context on device 0 in every process that uses
        another: a thread begins with device 0, and since CUDA 12 setting it creates a context.
        """
        self.call("cudaSetDevice", device)

    def uuid(self, device: int) -> bytes:
        """Return the device's UUID (UUID_BYTES), which unlike its number all processes share."""
        uuid: bytes = self.call("cudaGetDeviceProperties", device).uuid.bytes
        return uuid

    def number(self, uuid: bytes) -> int | None:
        """Return a device's number in this process; None if it is hidden or on another host."""
        count = self.call("cudaGetDeviceCount")
        return next((device for device in range(count) if self.uuid(device) == uuid), None)


def _check(name: str, error: Any, raising: type[InstanceError]) -> None:
    if error != 0:
        hint = _HINTS.get(error.name)
        raise raising(f"{name}: {error.name}" + (f": {hint}" if hint else ""))


@lru_cache
def load() -> Cuda:
    """Return the CUDA of this process.

    Raises:
        Unreachable: there is no cuda-bindings, driver or GPU.
    """
    try:
        from cuda.bindings import driver, runtime  # noqa: PLC0415 - most processes need none
    except ImportError as error:
        raise Unreachable(f"no cuda-bindings ({error}): install pdserve[cuda]") from error
    cuda = Cuda(runtime, driver)
    cuda.call("cudaGetDeviceCount")
    return cuda


def gpu(uuid: bytes) -> str:
    """Return the name of a device in nvidia-smi."""
    return f"GPU-{UUID(bytes=uuid)}"


def visible() -> str:
    """Return which devices a process sees, for messages."""
    return f"CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'unset')}"


# Only up to cuda-bindings 13.3 the bytes of an IPC handle have a name (`reserved`), so its address
# is used.


def handle_bytes(handle: Any) -> bytes:
    """Return the HANDLE_BYTES bytes of a cudaIpcMemHandle_t or cudaIpcEventHandle_t."""
    return ctypes.string_at(handle.getPtr(), HANDLE_BYTES)


def handle_of(kind: Any, data: bytes) -> Any:
    """Return the handle with these HANDLE_BYTES bytes."""
    handle = kind()
    ctypes.memmove(handle.getPtr(), data, HANDLE_BYTES)
    return handle


def until(
    done: Callable[[], bool], deadline: float, alive: Callable[[], None] = lambda: None
) -> bool:
    """Poll until `done`; False: it was not by `deadline` (seconds on CLOCK_MONOTONIC)."""
    began = time.monotonic()
    pause, longest = _LOOK_S
    while not done():
        now = time.monotonic()
        if now >= deadline:
            return False
        alive()
        if now - began >= SPIN_S:
            time.sleep(pause)
            pause = min(pause * 2, longest)
    return True
