"""A holder in a separate process, on a GPU or with the fake.

    python -m tests.fakes.cuda_holder REGION [FOLDER GPU]

It prints the way in hex while its device still writes: STEPS times all of the data; the last time,
byte i is i // CHUNK. It ends with its input.
"""

from __future__ import annotations

import sys
from pathlib import Path
from uuid import UUID

from pdserve.transfer.lease.region import SharedRegion
from pdserve.transfer.protocol import Memory
from pdserve.transfer.transports.cuda_ipc.calls import Cuda, load
from pdserve.transfer.transports.cuda_ipc.memory import DeviceMemory
from pdserve.transfer.transports.cuda_ipc.transport import CudaIpcTransport
from tests.fakes.cuda_runtime import FakeCuda

CHUNKS, CHUNK, OFFSET = 64, 1 << 16, 1 << 12
STEPS = 50


def main(region_name: str, *fake: str) -> None:
    if fake:
        process = FakeCuda(Path(fake[0]), [UUID(fake[1])])
        cuda = Cuda(process, process)
    else:
        cuda = load()
    region = SharedRegion.create(region_name, 0, 4, bytes(8))
    whole = DeviceMemory(cuda, OFFSET + CHUNKS * CHUNK)
    address = whole.address + OFFSET
    transport = CudaIpcTransport(cuda=cuda)
    try:
        table = Memory(region.table.ctypes.data, region.table.nbytes, region)
        way = transport.offer(table, Memory(address, CHUNKS * CHUNK, whole, 0))
        for step in range(STEPS):
            for chunk in range(CHUNKS):
                value = chunk if step == STEPS - 1 else 255
                cuda.call("cudaMemsetAsync", address + chunk * CHUNK, value, CHUNK, 0)
        transport.written()
        print(way.hex(), flush=True)
        cuda.call("cudaStreamSynchronize", 0)
        sys.stdin.read()
    finally:
        transport.close()
        region.unlink()
        whole.free()


if __name__ == "__main__":
    main(*sys.argv[1:])
