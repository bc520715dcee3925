"""The ways in which this host can move KV caches, and why it cannot use the others."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import takewhile
from typing import Literal

from pdctl.doctor.inventory import Gid, Inventory, RDMAPort
from pdctl.doctor.versions import DRIVERS, NIXL, SUPPORTED, major, within

WayName = Literal["cuda_ipc", "shm", "nixl over rdma", "nixl over cma", "nixl over tcp"]
_RDMA = ("rc_", "dc_", "ud_", "srd")
"""Beginnings of UCX's names for transports over RDMA devices."""
V2 = "RoCE v2"


def ways(inventory: Inventory) -> dict[WayName, str]:
    """Return for each way why this host cannot use it; empty: it can."""
    no_nixl = _no_nixl(inventory)
    return {
        "cuda_ipc": _no_cuda_ipc(inventory),
        "shm": "" if inventory.system.shm_mib or "system" in inventory.unknown else "no /dev/shm",
        "nixl over rdma": no_nixl or no_rdma(inventory.rdma) or _ucx_lacks(inventory, _RDMA),
        "nixl over cma": no_nixl or _ucx_lacks(inventory, ("cma",)) or inventory.cma,
        "nixl over tcp": no_nixl or _ucx_lacks(inventory, ("tcp",)),
    }


def visible(inventory: Inventory) -> int:
    """Return how many GPUs a process sees."""
    wanted = inventory.process.environment.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return len(inventory.gpus)
    # CUDA uses them up to the first invalid one.
    names = takewhile(lambda name: name not in ("", "-1"), wanted.split(","))
    return min(len(list(names)), len(inventory.gpus))


def too_old(inventory: Inventory, cuda: str) -> str:
    """Return which driver packages for this CUDA need; empty: the present one, or none."""
    wanted = DRIVERS.get(major(cuda), 0)
    old = [gpu.driver for gpu in inventory.gpus if major(gpu.driver) < wanted]
    return f"driver {old[0]} is older than {wanted}" if old else ""


def v2(port: RDMAPort) -> list[Gid]:
    """Return its GIDs of RoCE v2, the best first: routed addresses before link-local ones."""
    found = [gid for gid in port.gids if gid.kind == V2]
    return sorted(found, key=lambda gid: gid.gid.startswith("fe80"))


def fault(port: RDMAPort) -> str:
    """Return why a port cannot be used; empty: it can."""
    if port.state != "ACTIVE":
        return f"is {port.state}"
    if not port.accessible:
        return "may not be opened: no access to /dev/infiniband"
    if port.link_layer != "InfiniBand" and not v2(port):
        return f"has no GID of {V2}"
    return ""


def no_rdma(ports: Iterable[RDMAPort]) -> str:
    """Return why none of the ports can be used; empty: one can."""
    faults = [f"{port.device} {fault(port)}" if fault(port) else "" for port in ports]
    return "" if "" in faults else "; ".join(faults) or "no RDMA device"


def _no_cuda_ipc(inventory: Inventory) -> str:
    if not visible(inventory):
        return "no GPU"
    if "microsoft" in inventory.system.kernel.lower():
        return "WSL has no CUDA IPC"
    version = inventory.software.packages.get("cuda-bindings", "")
    if not within(version, SUPPORTED["cuda-bindings"]):
        return f"cuda-bindings {version} is not supported" if version else "no cuda-bindings"
    if all(gpu.compute_mode != "Default" for gpu in inventory.gpus):
        return f"compute mode {inventory.gpus[0].compute_mode}"
    return too_old(inventory, version)


def _no_nixl(inventory: Inventory) -> str:
    found = {name: inventory.software.packages.get(name, "") for name in NIXL}
    if any(within(version, SUPPORTED[name]) for name, version in found.items()):
        return ""
    return "; ".join(f"{name} {v} is not supported" for name, v in found.items() if v) or "no nixl"


def _ucx_lacks(inventory: Inventory, transports: tuple[str, ...]) -> str:
    if inventory.ucx is None:
        return inventory.unknown.get("UCX", "no UCX")
    if any(name.startswith(transports) for name in inventory.ucx.transports):
        return ""
    environment = inventory.process.environment
    because = [
        f"{name}={environment[name]}"
        for name in ("UCX_TLS", "UCX_NET_DEVICES")
        if name in environment
    ]
    return f"UCX offers no {transports[0].rstrip('_')}" + (
        f" ({', '.join(because)})" if because else ""
    )
