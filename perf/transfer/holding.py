"""The other process, perhaps on another host: a prefill's memory, full of `layouts.pattern`.

    python -m perf.transfer.holding ADDRESS TRANSPORT[,TRANSPORT] BYTES LAYOUT

With `cuda_ipc` the memory is on the first GPU.

It prints the port that it listens on, serves one connection and ends with it. A question is a byte,
then perhaps a number; the answer to GRANT is a sealed handle of a KV cache of that many tokens.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Client, Connection, Listener

import numpy as np

from pdserve.kvcache.sharding import Sharding
from pdserve.transfer import arrays
from pdserve.transfer.arrays import Array
from pdserve.transfer.endpoint import Terms
from pdserve.transfer.lease.table import LeaseTable
from pdserve.transfer.producer.holder import Holder
from pdserve.transfer.protocol import Transport
from pdserve.transfer.transports.shm import ShmTransport
from perf.transfer.layouts import LAYOUTS, pattern
from perf.transfer.raw import RawHolder

ANSWER_S = 120.0
END_S = 5.0
KEY = b"0" * 32
DESCRIBE, GRANT, READY, RAW = b"d", b"g", b"r", b"w"


def terms(layout: str) -> Terms:
    return Terms("perf", LAYOUTS[layout], KEY, Sharding())


def transport(name: str) -> Transport:
    if name == "shm":
        return ShmTransport()
    if name == "cuda_ipc":
        from pdserve.transfer.transports.cuda_ipc.transport import CudaIpcTransport  # noqa: PLC0415 - see below

        return CudaIpcTransport()
    from pdserve.transfer.transports.nixl.transport import NixlTransport  # noqa: PLC0415 - shm needs no NIXL

    return NixlTransport()


class Holding:
    """The process, as seen by the one that started it."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        address: str,
        transport: str,
        nbytes: int,
        layout: str,
    ) -> None:
        """Start the process.

        `command` is the beginning of its command line, to run it on another host; `transport` may
        be several, separated by commas.

        Raises:
            ChildProcessError: it has ended before it listened.
        """
        module = [sys.executable, "-m", __name__, address, transport, str(nbytes), layout]
        self._process = subprocess.Popen(
            [*command, *module], env=environment, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        port = self._process.stdout.readline()
        if not port:
            raise ChildProcessError(f"the holder has ended with {self._process.wait(END_S)}")
        self.port = int(port)

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        """End it at once, as a crash would."""
        self._process.kill()
        self._process.wait(END_S)

    def close(self) -> None:
        """Wait until it ends, which it does when nothing is connected any more, and removes its
        memory."""
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            self._process.wait(END_S)


class Control:
    """A connection to the process, with one round trip for each question."""

    def __init__(self, address: str, port: int) -> None:
        self._pipe = Client((address, port))

    def ask(self, question: bytes) -> bytes:
        """Ask a question, and return the answer.

        Raises TimeoutError without one within ANSWER_S.
        """
        self._pipe.send_bytes(question)
        if not self._pipe.poll(ANSWER_S):
            raise TimeoutError(f"the holder has not answered within {ANSWER_S:g} s")
        return self._pipe.recv_bytes()

    def close(self) -> None:
        self._pipe.close()


def _serve(pipe: Connection, holder: Holder, raw: RawHolder | None) -> None:
    leases: LeaseTable = holder.leases
    slot = None
    while True:
        # Nothing else drives raw NIXL.
        while raw is not None and raw.busy and not pipe.poll(0):
            raw.progress()
        question = pipe.recv_bytes()
        if question == READY:  # asks whether a block is ready: all are
            pipe.send_bytes(READY)
        elif question == DESCRIBE:
            pipe.send_bytes(holder.endpoint)
        elif question[:1] == RAW:
            assert raw is not None
            raw.busy = question == RAW + b"1"
            pipe.send_bytes(raw.way)
        elif question[:1] == GRANT:
            if slot is not None:
                leases.free(slot)
            expires = time.monotonic() + ANSWER_S
            slot, nonce = leases.grant(expires)
            leases.fill(slot, LAYOUTS[sys.argv[4]].planes, 0)
            pipe.send_bytes(holder.handle(0, int(question[1:]), slot, nonce, expires))


def _on_device(nbytes: int) -> Array:
    """Return memory of the first GPU that other processes can map."""
    # The package's own tensors, as in `plane.holder`; a holder in host memory needs neither.
    from pdserve.transfer.transports.cuda_ipc.calls import load  # noqa: PLC0415
    from pdserve.transfer.transports.cuda_ipc.memory import DeviceMemory  # noqa: PLC0415

    return arrays.seen(DeviceMemory(load(), nbytes).memory)


def _fill(data: Array) -> None:
    if isinstance(data, np.ndarray):
        data[:] = pattern(len(data))
        return
    import torch  # noqa: PLC0415 - see above

    data.copy_(torch.from_numpy(pattern(len(data))))
    torch.cuda.synchronize()


def main() -> None:
    address, names, size, layout = sys.argv[1:]
    used, nbytes = names.split(","), int(size)
    data = _on_device(nbytes) if "cuda_ipc" in used else None
    transports = [transport(name) for name in used]
    region = f"pdserve-perf-{os.getpid()}"
    holder = Holder("perf", region, nbytes, 4, terms(layout), transports, data)
    try:
        _fill(holder.data)
        raw = RawHolder(arrays.memory(holder.data)) if "nixl" in used else None
        with Listener((address, 0)) as listener:
            print(listener.address[1], flush=True)
            with listener.accept() as pipe:
                _serve(pipe, holder, raw)
    except EOFError:
        pass
    finally:
        holder.close()


if __name__ == "__main__":
    main()
