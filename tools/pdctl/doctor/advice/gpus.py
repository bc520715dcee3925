"""Findings about GPUs: whether the engine has one, and how far CUDA IPC reaches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from pdctl.doctor.advice.finding import Finding
from pdctl.doctor.advice.needs import Needs
from pdctl.doctor.advice.ways import visible, ways
from pdctl.doctor.inventory import GPU, GPUPair, Inventory

_REFUSALS = {
    "CNS": "the chipset does not support it",
    "GNS": "the GPUs do not support it",
    "TNS": "the topology does not support it",
    "NS": "it is not supported",
}
_CROSSING = ("PHB", "NODE", "SYS")
"""Paths through the CPU, where firmware and IOMMU decide."""


def gpus(inventory: Inventory, needs: Needs) -> Iterator[Finding]:
    seen = visible(inventory)
    hidden = [gpu for gpu in needs.gpus if gpu >= seen]
    if hidden:
        yield Finding(
            about="GPUs",
            state="problem",
            found=f"a process sees {seen}; the deployment wants number {max(hidden)}",
            unused=f"engine {needs.engine} on it",
            mend="driver, CUDA_VISIBLE_DEVICES (container: --gpus all); or another engine.device"
            if needs.engine == "torch"
            else "driver, CUDA_VISIBLE_DEVICES (container: --gpus all); or other engine.gpus",
        )
    elif not inventory.gpus:
        yield Finding(
            about="GPUs",
            state="missing",
            found="none",
            unused="transport cuda_ipc, GPUDirect RDMA, engines on a GPU",
            mend="a GPU that `nvidia-smi` lists; in a container: --gpus all",
        )
    if inventory.gpus:
        yield _listed(inventory.gpus, needs)
        yield from _modes(inventory.gpus, needs)
        yield _exportable(inventory)
        yield from _peers(inventory.topology.pairs)
        yield from _allocator(inventory)


def _listed(gpus: tuple[GPU, ...], needs: Needs) -> Finding:
    kinds = Counter(f"{gpu.name}, {gpu.memory_mib / 1024:.0f} GiB" for gpu in gpus)
    listed = "; ".join(f"{count} x {kind}" for kind, count in kinds.items())
    return Finding(
        about="GPUs",
        state="ok",
        found=f"{listed}; driver {gpus[0].driver}",
        used=f"engine {needs.engine} {needs.device}" if needs.gpus else "",
        unused="" if needs.gpus else f"all: engine {needs.engine} is {needs.device}",
    )


def _modes(gpus: tuple[GPU, ...], needs: Needs) -> Iterator[Finding]:
    for gpu in gpus:
        if gpu.compute_mode != "Default":
            several = needs.instances > len(needs.gpus) or gpu.compute_mode == "Prohibited"
            yield Finding(
                about=f"GPU {gpu.index}",
                state="problem" if gpu.index in needs.gpus and several else "note",
                found=f"compute mode {gpu.compute_mode}",
                unused="the GPU by several instances at once, cuda_ipc",
                mend=f"nvidia-smi -i {gpu.index} -c DEFAULT",
            )
        if gpu.mig:
            yield Finding(
                about=f"GPU {gpu.index}",
                state="note",
                found="MIG is on: a process sees one of its instances",
                used="cuda_ipc within that one",
                unused="cuda_ipc between two of them, peer access, NVLink",
                mend=f"nvidia-smi -i {gpu.index} -mig 0, for the GPU as a whole",
            )


def _exportable(inventory: Inventory) -> Finding:
    why = ways(inventory)["cuda_ipc"]
    return Finding(
        about="CUDA IPC",
        state="note" if why else "ok",
        found=why or "memory of cudaMalloc can be exported, as arenas are",
        used="" if why else "transport cuda_ipc",
        unused="transport cuda_ipc" if why else "",
        mend="the cause, as above" if why else "",
    )


def _peers(pairs: tuple[GPUPair, ...]) -> Iterator[Finding]:
    reached = [pair for pair in pairs if pair.peer == "OK"]
    if reached:
        yield Finding(
            about="peer access",
            state="ok",
            found=_names(reached),
            used="cuda_ipc between instances on different GPUs",
        )
    refused = [pair for pair in pairs if pair.peer not in ("OK", "")]
    if refused:
        reasons = {_REFUSALS.get(pair.peer, pair.peer) for pair in refused}
        crossing = any(pair.path in _CROSSING for pair in refused)
        yield Finding(
            about="peer access",
            state="note",
            found=f"none: {_names(refused)}: {', '.join(sorted(reasons))}",
            unused="cuda_ipc between instances on these GPUs",
            mend=("ACS and IOMMU off in the firmware (iommu=pt); or " if crossing else "")
            + "prefill and decode on one GPU, or on two with NVLink",
        )


def _names(pairs: list[GPUPair]) -> str:
    paths: dict[str, list[str]] = {}
    for pair in pairs:
        paths.setdefault(pair.path, []).append(f"{pair.first}-{pair.second}")
    return "; ".join(f"{path} {', '.join(names)}" for path, names in paths.items())


def _allocator(inventory: Inventory) -> Iterator[Finding]:
    for name, value in inventory.process.environment.items():
        if name.startswith("PYTORCH") and "expandable_segments:true" in value.lower():
            yield Finding(
                about="torch's memory",
                state="note",
                found=f"{name}={value}: it has no IPC handles",
                used="cuda_ipc for arenas, which are cudaMalloc's",
                unused="cuda_ipc by UCX: nixl copies such memory at some 0.3 GB/s",
                mend=f"unset {name}",
            )
