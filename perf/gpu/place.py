"""Memory and time of the device that a part measures: a GPU, or the CPU in place of one."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from pdserve.transfer.arrays import Array, aligned
from perf.gpu.scale import Scale

# Calls between two events, so that the time until the first one is enqueued counts little.
IN_A_ROW = 5


class Place:
    """The device of a scale; torch is imported only for a GPU."""

    def __init__(self, scale: Scale) -> None:
        self.gpu = scale.gpu
        self._torch: Any = None
        if self.gpu is not None:
            import torch  # noqa: PLC0415 - a CPU needs none

            self._torch = torch
            torch.cuda.set_device(self.gpu)

    def empty(self, *shape: int) -> Array:
        """Return uint8 memory that has been written to."""
        if self._torch is None:
            return aligned(shape)
        made: Array = self._torch.zeros(shape, dtype=self._torch.uint8, device=f"cuda:{self.gpu}")
        return made

    def load(self, array: np.ndarray[Any, np.dtype[np.uint8]]) -> Array:
        """Return a copy of a host array on the device; on a CPU, the array itself."""
        if self._torch is None:
            return array
        made: Array = self._torch.from_numpy(array).to(f"cuda:{self.gpu}")
        return made

    def same(self, one: Array, other: Array) -> bool:
        """Tell whether two arrays of one shape hold the same bytes."""
        if self._torch is None:
            return np.array_equal(one, other)
        return bool(self._torch.equal(one, other))

    def copy(self, target: Array, source: Array) -> None:
        """Copy; on a GPU this only enqueues the copy."""
        if self._torch is None:
            np.copyto(target, source)  # type: ignore[arg-type]
        else:
            target.copy_(source)  # type: ignore[union-attr, arg-type]

    def sync(self) -> None:
        """Wait until all work of this process is complete."""
        if self._torch is not None:
            self._torch.cuda.synchronize()

    def free_bytes(self) -> int:
        """Return the bytes of memory that no process uses; those that this one only keeps count."""
        if self._torch is not None:
            gc.collect()
            self._torch.cuda.empty_cache()
            return int(self._torch.cuda.mem_get_info(self.gpu)[0])
        import psutil  # noqa: PLC0415 - see above

        return int(psutil.virtual_memory().available)

    def ms(self, work: Callable[[], object], repeats: int) -> float:
        """Return the median milliseconds of calls, by the host's clock, after one to warm up."""
        taken = []
        for _ in range(repeats + 1):
            self.sync()
            began = time.perf_counter()
            work()
            self.sync()
            taken.append((time.perf_counter() - began) * 1e3)
        return statistics.median(taken[1:])

    def device_ms(self, work: Callable[[], object], repeats: int) -> float:
        """Return the median milliseconds that the device takes, without those of the calls."""
        if self._torch is None:
            return self.ms(work, repeats)
        work()
        taken: list[float] = []
        for _ in range(repeats):
            begin, end = (self._torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(IN_A_ROW):
                work()
            end.record()
            end.synchronize()
            taken.append(begin.elapsed_time(end) / IN_A_ROW)
        return statistics.median(taken)
