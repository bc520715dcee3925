"""Where bytes are moved from and to: numpy arrays in host memory, torch tensors on a device.

Both are uint8 and sliced alike. Here is what they do not do alike; torch is not imported unless
there is a tensor. What is special to a CUDA tensor has not run on hardware.
"""

from __future__ import annotations

import math
import mmap
import time
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

# Of a scatter, which takes milliseconds.
SCATTER_S = 5.0


def address(array: Array) -> int:
    """Address of its first byte."""
    return array.ctypes.data if isinstance(array, np.ndarray) else array.data_ptr()


def strides(array: Array) -> tuple[int, ...]:
    """Bytes from one index to the next."""
    return array.strides if isinstance(array, np.ndarray) else tuple(array.stride())


def memory(array: Array) -> Memory:
    """The memory of a contiguous array."""
    if isinstance(array, np.ndarray):
        return Memory.of(array)
    device = array.device.index if array.is_cuda else None
    return Memory(array.data_ptr(), array.nbytes, array, device)


def seen(data: NDArray[np.uint8] | Memory) -> Array:
    """Memory as an array: `Link.data`, say. It is kept alive by what this returns."""
    if isinstance(data, np.ndarray):
        return data
    import torch  # noqa: PLC0415 - see above

    return torch.as_tensor(DeviceArray(data), device=f"cuda:{data.device}")


def aligned(shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Host memory that begins with a page, zeros, every page written to.

    numpy's own begins 16 bytes behind one, and to copy to there takes twice as long (glibc's memcpy
    on an AMD EPYC, in pieces of 8 KiB to 1 MiB: those of a scatter). A page that was never written
    to makes a first arrival 20 times slower. numpy asks for huge pages, torch does not: a scatter
    of 44 MiB into torch's memory takes 15 % longer.
    """
    nbytes = math.prod(shape)
    room = np.full(nbytes + mmap.PAGESIZE, 0, np.uint8)  # np.zeros writes nothing
    start = -room.ctypes.data % mmap.PAGESIZE
    return room[start : start + nbytes].reshape(shape)


def like(array: Array, shape: tuple[int, ...]) -> Array:
    """Memory where `array` is."""
    return aligned(shape) if isinstance(array, np.ndarray) else array.new_empty(shape)


def copy_rows(pool: Array, source: int, target: int, rows: int) -> None:
    """Within [planes, rows, row_bytes]: rows from `source` on to those from `target` on."""
    into, out_of = slice(target, target + rows), slice(source, source + rows)
    if isinstance(pool, np.ndarray):
        pool[:, into] = pool[:, out_of]
    else:
        pool[:, into].copy_(pool[:, out_of])


def scatter(source: Array, pool: Array, runs: Runs) -> None:
    """Copy uint8 [planes, tokens, row_bytes] into runs of pool [planes, rows, row_bytes].

    Complete when it returns: the source may be overwritten, the pool read by any stream. Both are
    of one kind. On a device it is one launch for all planes and runs.

    Raises:
        ValueError: the runs do not match the source, or are not inside the pool.
        Stuck: the device has not done it within SCATTER_S.
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

    # Its own stream: it is not to queue up behind the decode's steps.
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
    """With as wide elements as all of them allow: 16 bytes is what one thread moves best."""
    import torch  # noqa: PLC0415 - see above

    # Complex, because it is copied as it is, and torch has no integer as wide.
    wide = {16: torch.complex128, 8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
    multiples = [m for t in tensors for m in (t.data_ptr(), t.storage_offset(), t.shape[-1])]
    multiples += [stride for tensor in tensors for stride in tensor.stride()[:-1]]
    width = math.gcd(16, *multiples)
    return [tensor.view(wide[width]) for tensor in tensors]


@lru_cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    import torch  # noqa: PLC0415 - see above

    return torch.cuda.Stream(device)
