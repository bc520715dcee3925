"""Memory on a CUDA device that another process can map, and its export or the reason against it.

It has not run on hardware.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pdserve.transfer.protocol import Memory, Unreachable
from pdserve.transfer.transports.cuda_ipc.calls import Cuda, handle_bytes

_INSTEAD = "what can be is memory of cudaMalloc, as DeviceMemory is"


class DeviceMemory:
    """Memory of `nbytes` bytes from cudaMalloc, which CUDA IPC can export; not cleared.

    torch's allocator returns ranges of larger allocations, and with expandable segments or
    cudaMallocAsync none that can be exported. `torch.as_tensor(memory, device="cuda")` is a view
    that keeps this alive.

    Raises:
        Unreachable: there is no such device, or not enough memory on it.
    """

    def __init__(self, cuda: Cuda, nbytes: int, device: int = 0) -> None:
        self._cuda = cuda
        self.device = device
        cuda.use(device)
        self.address = int(cuda.call("cudaMalloc", nbytes))
        self.nbytes = nbytes

    @property
    def memory(self) -> Memory:
        return Memory(self.address, self.nbytes, self, self.device)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return array_interface(self.address, self.nbytes)

    def free(self) -> None:
        """Free it; calling it again is no error. Undefined while another process has it mapped."""
        self._cuda.discard("cudaFree", self.address)
        self.address = self.nbytes = 0


@dataclass(frozen=True, slots=True)
class DeviceArray:
    """Device memory that torch.as_tensor takes without a copy; the tensor keeps its owner alive."""

    memory: Memory

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return array_interface(self.memory.address, self.memory.nbytes)


def array_interface(address: int, nbytes: int) -> dict[str, Any]:
    """Return uint8 [nbytes] in the CUDA Array Interface, version 3."""
    # Marked writable, since torch accepts nothing else.
    return {"shape": (nbytes,), "typestr": "|u1", "data": (address, False), "version": 3}


def export(cuda: Cuda, memory: Memory) -> tuple[bytes, int]:
    """Return the IPC handle of the allocation that contains `memory`, and its offset there.

    Raises:
        Unreachable: it cannot be exported; the message says why, and what could be.
    """
    if memory.device is None:
        raise Unreachable(f"{memory} is host memory and cannot be exported; {_INSTEAD}")
    cuda.use(memory.device)
    found = cuda.call("cudaPointerGetAttributes", memory.address)
    if found.type != cuda.runtime.cudaMemoryType.cudaMemoryTypeDevice:
        raise Unreachable(f"{memory} is {found.type.name} and cannot be exported; {_INSTEAD}")
    if found.device != memory.device:
        raise Unreachable(f"{memory} is on device {found.device}")
    attribute = cuda.driver.CUpointer_attribute
    capable = attribute.CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE
    if not cuda.call("cuPointerGetAttribute", capable, memory.address):
        raise Unreachable(f"{memory} is {_origin(cuda, memory)}: it has no IPC handle; {_INSTEAD}")
    base, size = cuda.call("cuMemGetAddressRange", memory.address)
    offset = memory.address - int(base)
    if offset + memory.nbytes > size:
        raise Unreachable(f"{memory} ends {offset + memory.nbytes - size} bytes beyond its {size}")
    return handle_bytes(cuda.call("cudaIpcGetMemHandle", int(base))), offset


def _origin(cuda: Cuda, memory: Memory) -> str:
    wanted = cuda.driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE
    try:
        pool = int(cuda.call("cuPointerGetAttribute", wanted, memory.address))
    except Unreachable:  # that it belongs to no pool may be an error, too
        pool = 0
    if pool:
        return "of a pool (cudaMallocAsync; PYTORCH_CUDA_ALLOC_CONF=backend:cudaMallocAsync)"
    return "mapped page by page (PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True; cuMemCreate)"
