"""Arrays that bytes are moved from and to: numpy arrays in host memory, torch tensors on a device.

Both are uint8 and sliced in the same way. This module holds what differs between them; torch is
imported only if there is a tensor. What is specific to CUDA tensors has not run on hardware.
"""

from __future__ import annotations

import math
import mmap
import time
from contextlib import suppress
from functools import lru_cache
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from pdserve.transfer import scatter as host
from pdserve.transfer.protocol import Memory, Stuck
from pdserve.transfer.transports.cuda_ipc.calls import until
from pdserve.transfer.transports.cuda_ipc.memory import DeviceArray

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

Array: TypeAlias = "NDArray[np.uint8] | torch.Tensor"
Runs = host.Runs

# Longest time of a scatter, which takes milliseconds.
SCATTER_S = 5.0
HUGE = 4 << 20
"""Bytes from which on memory is in huge pages, as numpy has it."""


def address(array: Array) -> int:
    """Return the address of an array's first byte."""
    return array.ctypes.data if isinstance(array, np.ndarray) else array.data_ptr()


def strides(array: Array) -> tuple[int, ...]:
    """Return the bytes from one index to the next, for each dimension."""
    return array.strides if isinstance(array, np.ndarray) else tuple(array.stride())


def memory(array: Array) -> Memory:
    """Return the memory of a contiguous array."""
    if isinstance(array, np.ndarray):
        return Memory.of(array)
    device = array.device.index if array.is_cuda else None
    return Memory(array.data_ptr(), array.nbytes, array, device)


def seen(data: NDArray[np.uint8] | Memory) -> Array:
    """Return memory, such as `Link.data`, as an array, which keeps it alive."""
    if isinstance(data, np.ndarray):
        return data
    import torch  # noqa: PLC0415 - see above

    return torch.as_tensor(DeviceArray(data), device=f"cuda:{data.device}")


def aligned(shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Return page-aligned host memory, filled with zeros, every page written to.

    It is a mapping of its own, so that it goes back to the system with its last array: the heap of
    each thread would keep up to 64 MiB of what was freed. A page that was never written to makes a
    first arrival 20 times slower. Copying into numpy's own memory, which begins 16 bytes after a
    page, takes twice as long (glibc's memcpy on an AMD EPYC, in pieces of 8 KiB to 1 MiB, those of
    a scatter); without huge pages a scatter of 44 MiB takes 15 % longer.
    """
    nbytes = math.prod(shape)
    if not nbytes:
        return np.empty(shape, np.uint8)
    room = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if nbytes >= HUGE:
        with suppress(OSError):  # the kernel may have been built without them
            room.madvise(mmap.MADV_HUGEPAGE)
    array = np.frombuffer(room, np.uint8)
    array[:] = 0
    return array.reshape(shape)


def like(array: Array, shape: tuple[int, ...]) -> Array:
    """Return memory on the device of `array`, uninitialized on a GPU."""
    return aligned(shape) if isinstance(array, np.ndarray) else array.new_empty(shape)


def copy_rows(pool: Array, source: int, target: int, rows: int) -> None:
    """Copy rows of a pool [planes, rows, row_bytes] from row `source` to row `target`."""
    into, out_of = slice(target, target + rows), slice(source, source + rows)
    if isinstance(pool, np.ndarray):
        pool[:, into] = pool[:, out_of]
    else:
        pool[:, into].copy_(pool[:, out_of])


def scatter(source: Array, pool: Array, runs: Runs) -> None:
    """Copy uint8 [planes, tokens, row_bytes] into runs of pool [planes, rows, row_bytes].

    The copy is complete on return: the source may be overwritten, and any stream may read the pool.
    Both must be of the same kind. On a device it is one launch for all planes and runs.

    Raises:
        ValueError: the runs do not match the source, or are not inside the pool.
        Stuck: the device has not completed it within SCATTER_S.
    """
    if isinstance(source, np.ndarray):
        assert isinstance(pool, np.ndarray)
        host.scatter(source, pool, runs)
        return
    assert not isinstance(pool, np.ndarray)
    runs = host.checked(runs, source.shape[1], pool.shape[1])
    if not pool.is_cuda:
        _scatter(source, pool, runs)
        return
    import torch  # noqa: PLC0415 - see above

    # It has its own stream, so that it is not queued behind the decode's steps.
    stream = _stream(pool.device)
    with torch.cuda.stream(stream):
        _scatter(source, pool, runs)
        event = torch.cuda.Event()
        event.record(stream)
    if not until(event.query, time.monotonic() + SCATTER_S):
        raise Stuck(f"{pool.device} has not ended a scatter within {SCATTER_S} s")


def _scatter(source: torch.Tensor, pool: torch.Tensor, runs: Runs) -> None:
    source, pool = _widened(source, pool)
    if len(runs) == 1:
        first, rows = runs[0]
        pool[:, first : first + rows].copy_(source)
        return
    import torch  # noqa: PLC0415 - see above

    firsts, counts = np.array(runs, np.int64).T
    index = torch.from_numpy(host.each(firsts, counts))
    pool.index_copy_(1, index.to(pool.device), source)


def _widened(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """View tensors with the widest common elements: one thread moves 16 bytes best."""
    import torch  # noqa: PLC0415 - see above

    # Complex, because it is only copied, and torch has no integer of this width.
    wide = {16: torch.complex128, 8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
    multiples = [m for t in tensors for m in (t.data_ptr(), t.storage_offset(), t.shape[-1])]
    multiples += [stride for tensor in tensors for stride in tensor.stride()[:-1]]
    width = math.gcd(16, *multiples)
    return [tensor.view(wide[width]) for tensor in tensors]


@lru_cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    import torch  # noqa: PLC0415 - see above

    return torch.cuda.Stream(device)
