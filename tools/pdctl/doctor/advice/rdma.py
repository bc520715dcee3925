"""Findings about RDMA: ports, what they lack, and whether they reach GPUs."""

from __future__ import annotations

import re
from collections.abc import Iterator

from pdctl.doctor.advice.finding import Finding
from pdctl.doctor.advice.needs import Needs
from pdctl.doctor.advice.ways import V2, fault, v2
from pdctl.doctor.inventory import GPUNic, Inventory, RDMAPort

_DMA_BUF = (5, 12)
"""The first kernel whose RDMA devices support dma-buf."""
_PATHS = ("PIX", "PXB", "PHB", "NODE", "SYS")
"""Paths, the shortest first."""
_UNUSED = "nixl over RDMA"


def rdma(inventory: Inventory, needs: Needs) -> Iterator[Finding]:
    ports = inventory.rdma
    if not ports:
        if "RDMA" not in inventory.unknown:
            yield Finding(
                about="RDMA",
                state="missing",
                found="no device in /sys/class/infiniband",
                unused=_UNUSED,
                mend="a NIC with RoCE or InfiniBand, and its driver (mlx5_ib)",
            )
        return
    good = [port for port in ports if not fault(port)]
    if good:
        yield Finding(
            about="RDMA",
            state="ok",
            found="; ".join(map(_described, good)),
            used="nixl over RDMA, between hosts",
        )
    for port in ports:
        if fault(port):
            yield Finding(
                about=f"RDMA {port.device}",
                state="note",
                found=f"port {port.port} ({port.link_layer}) {fault(port)}",
                unused=f"{_UNUSED} by this port",
                mend=_mend(port, inventory.process.container),
            )
    yield from _memlock(inventory, needs)
    if inventory.gpus:
        yield _direct(inventory)


def _described(port: RDMAPort) -> str:
    gids = v2(port)
    roce = f", {V2} GID {gids[0].index} ({gids[0].netdev})" if gids else ""
    return f"{port.device}:{port.port} {port.link_layer}, {port.rate}{roce}"


def _mend(port: RDMAPort, container: str) -> str:
    netdev = next((gid.netdev for gid in port.gids if gid.netdev), "its netdev")
    if port.state == "INIT":
        return "a subnet manager in the fabric: opensm"
    if port.state != "ACTIVE":
        return f"cable and switch port; ip link set {netdev} up"
    if not port.accessible:
        flags = "--device=/dev/infiniband --cap-add=IPC_LOCK --ulimit memlock=-1"
        return f"start the container with {flags}" if container else "chmod a+rw /dev/infiniband/*"
    return f"an IP address for {netdev}; cma_roce_mode -d {port.device} -p {port.port} -m 2"


def _memlock(inventory: Inventory, needs: Needs) -> Iterator[Finding]:
    limit = inventory.process.memlock_kib
    if limit is None or "IPC_LOCK" in inventory.process.capabilities:
        return
    if limit >> 10 < needs.arena_mib:
        yield Finding(
            about="memlock",
            state="problem" if needs.far and needs.rdma_only else "note",
            found=f"{limit} KiB may be locked; an arena has {needs.arena_mib} MiB",
            unused=f"{_UNUSED}: memory cannot be registered",
            mend="--ulimit memlock=-1"
            if inventory.process.container
            else "ulimit -l unlimited (limits.conf: memlock; systemd: LimitMEMLOCK=infinity)",
        )


def _direct(inventory: Inventory) -> Finding:
    nearest: dict[int, GPUNic] = {}
    for nic in sorted(inventory.topology.nics, key=lambda nic: _PATHS.index(nic.path)):
        nearest.setdefault(nic.gpu, nic)
    near = ", ".join(f"GPU {gpu} {nic.device} {nic.path}" for gpu, nic in sorted(nearest.items()))
    kernel = re.match(r"(\d+)\.(\d+)", inventory.system.kernel)
    direct = inventory.direct
    if direct.peermem:
        by = "nvidia_peermem"
    elif direct.open_module and kernel and (int(kernel[1]), int(kernel[2])) >= _DMA_BUF:
        by = "dma-buf"
    else:
        return Finding(
            about="GPUDirect RDMA",
            state="note",
            found="neither nvidia_peermem nor dma-buf (open kernel module, Linux 5.12)",
            unused="RDMA into GPUs: UCX copies through host memory",
            mend="modprobe nvidia_peermem",
        )
    return Finding(
        about="GPUDirect RDMA",
        state="ok",
        found=by + (f"; nearest: {near}" if near else ""),
        used="nixl over RDMA, from GPU to GPU",
    )
