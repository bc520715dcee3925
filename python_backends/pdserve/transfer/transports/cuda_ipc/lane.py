"""Copies between memories that one device reaches, each ordered after another process's writes.

It has not run on hardware.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from pdserve.transfer.protocol import Stuck, TransferError
from pdserve.transfer.transports.cuda_ipc.calls import Cuda, until

# Time for a copy that is in progress at its deadline. At 1 GB/s this would be 5 GB.
SETTLE_S = 5.0

Copies = Sequence[tuple[int, int, int]]
"""Tuples of source, destination and bytes."""


class Lane:
    """Two streams on `device`, ordered after an event that another process records. Thread-safe.

    Waits for the event are on one stream; a copy goes to the other, once its wait is known to be
    over. So a holder that dies before its kernels end does not delay other copies, and a copy that
    is given up is not queued behind a wait that may end later: it has not been enqueued at all.

    Args:
        written: the event; destroyed with the lane.
        failed: called when a copy has not completed; closes the lane.

    Raises:
        Unreachable: the device provides no streams.
    """

    def __init__(self, cuda: Cuda, device: int, written: Any, failed: Callable[[], None]) -> None:
        self._cuda = cuda
        self._device = device
        self._written = written
        self.failed = failed
        self._lock = threading.RLock()
        self._closed = False
        self._stuck = False
        self._gated: deque[Copy] = deque()
        self._events = {written}
        self._streams: list[Any] = []
        try:
            cuda.use(device)
            for _ in range(2):
                flags = cuda.runtime.cudaStreamNonBlocking
                self._streams.append(cuda.call("cudaStreamCreateWithFlags", flags))
        except BaseException:
            self._destroy()
            raise

    def begin(self, copies: Copies, deadline: float) -> Copy:
        """Begin copies of what has been written by now, and nothing older.

        They wait for the event's newest record, and so for all that the holder has enqueued by now.

        Raises:
            TransferError: the lane is closed, or a call failed.
        """
        gates, _ = self._streams
        with self._lock:
            self._check()
            self._do("cudaSetDevice", self._device)
            flags = self._cuda.runtime.cudaEventDisableTiming
            copy = Copy(self, self._do("cudaEventCreateWithFlags", flags), copies, deadline)
            self._events.add(copy.event)
            self._do("cudaStreamWaitEvent", gates, self._written, 0)
            self._do("cudaEventRecord", copy.event, gates)
            self._gated.append(copy)
            self._enqueue()
        return copy

    def done(self, copy: Copy) -> bool:
        """Tell whether a copy is complete; lets the others make progress, too.

        Raises:
            TransferError: the lane is closed, or a call failed.
        """
        with self._lock:
            self._check()
            self._enqueue()
            if copy in self._gated or not self._cuda.finished("cudaEventQuery", copy.event):
                return False
            self._events.remove(copy.event)
            self._cuda.discard("cudaEventDestroy", copy.event)
            return True

    def _enqueue(self) -> None:
        """Enqueue the copies whose waits are over; these complete in order."""
        _, stream = self._streams
        default = self._cuda.runtime.cudaMemcpyKind.cudaMemcpyDefault
        while self._gated and self._cuda.finished("cudaEventQuery", self._gated[0].event):
            copy = self._gated.popleft()
            self._do("cudaSetDevice", self._device)
            for source, destination, nbytes in copy.copies:
                self._do("cudaMemcpyAsync", destination, source, nbytes, default, stream)
            self._do("cudaEventRecord", copy.event, stream)

    def close(self) -> None:
        """Fail incomplete copies, and return when none is in progress.

        Calling it again is no error.

        Raises:
            Stuck: a copy was still in progress after SETTLE_S.
        """
        # Under the lock: a second caller, too, may reuse its memory when this returns.
        with self._lock:
            if not self._closed:
                self._closed = True
                self._stuck = not until(self._settled, time.monotonic() + SETTLE_S)
                if not self._stuck:
                    self._destroy()
            if self._stuck:
                raise Stuck(f"device {self._device} has not ended a copy within {SETTLE_S} s")

    def _settled(self) -> bool:
        try:
            return self._cuda.finished("cudaStreamQuery", self._streams[1])
        except TransferError:  # a failed device does not write any more
            return True

    def _destroy(self) -> None:
        for event in self._events:
            self._cuda.discard("cudaEventDestroy", event)
        # The stream of the waits may have work: it ends when the device reaches it, and touches no
        # memory.
        for stream in self._streams:
            self._cuda.discard("cudaStreamDestroy", stream)

    def _check(self) -> None:
        if self._closed:
            raise TransferError("the link is closed")

    def _do(self, name: str, *args: Any) -> Any:
        return self._cuda.call(name, *args, raising=TransferError)


class Copy:
    """Implements `Pending`."""

    def __init__(self, lane: Lane, event: Any, copies: Copies, deadline: float) -> None:
        self._lane = lane
        self._deadline = deadline
        self.copies = copies
        self.event = event
        """Event that marks first the end of the wait for the source, then the end of the copies."""

    def wait(self, alive: Callable[[], None] = lambda: None) -> None:
        try:
            if not until(lambda: self._lane.done(self), self._deadline, alive):
                raise TransferError("not by the deadline: the holder's device, or a copy, is slow")
        except BaseException:
            # Nothing may arrive any more after this has raised.
            self._lane.failed()
            raise
