"""Device memory of another process, mapped into this one. It has not run on hardware."""

from __future__ import annotations

import weakref

from pdserve.transfer.transports.cuda_ipc.calls import Cuda, Opened, handle_of


class Mapping:
    """The allocation behind an IPC handle, opened once per device however many Mappings it has.

    Opening it twice fails with older drivers. It stays mapped until the last Mapping is gone, so a
    reader keeps one. On another device than its own, peer access is enabled.

    Raises:
        Unreachable: it cannot be opened from here.
    """

    def __init__(self, cuda: Cuda, device: int, handle: bytes) -> None:
        key = device, handle
        with cuda.lock:
            try:
                opened = cuda.opened[key]
                opened.uses += 1
            except KeyError:
                cuda.use(device)
                address = cuda.call(
                    "cudaIpcOpenMemHandle",
                    handle_of(cuda.runtime.cudaIpcMemHandle_t, handle),
                    cuda.runtime.cudaIpcMemLazyEnablePeerAccess,
                )
                opened = cuda.opened[key] = Opened(int(address))
        self.address = opened.address
        self._end = weakref.finalize(self, _release, cuda, key)
        # At exit CUDA may be gone already; mappings end with the process.
        self._end.atexit = False

    def close(self) -> None:
        """Drop the mapping now; calling it again is no error."""
        self._end()

    def keep(self) -> None:
        """Leave it mapped until the process ends: a copy may still read from it."""
        self._end.detach()


def _release(cuda: Cuda, key: tuple[int, bytes]) -> None:
    with cuda.lock:
        opened = cuda.opened[key]
        opened.uses -= 1
        if not opened.uses:
            del cuda.opened[key]
            cuda.discard("cudaSetDevice", key[0])
            cuda.discard("cudaIpcCloseMemHandle", opened.address)
