"""Findings about the transports of the deployment's KV caches, within this host and beyond."""

from __future__ import annotations

from collections.abc import Iterator

from pdctl.doctor.advice.finding import Finding
from pdctl.doctor.advice.needs import Needs
from pdctl.doctor.advice.ways import WayName, no_rdma, ways
from pdctl.doctor.inventory import Inventory

_MEND_RDMA = "RDMA, as above; or transfer.require: any"
_UNUSABLE = ("self/", "sysv/", "posix/")
"""Transports that nixl's links, which must survive a peer, cannot use."""
Candidates = list[tuple[str, str]]
"""Ways, best first, each with the reason why it is not used; empty: it is used."""


def transports(inventory: Inventory, needs: Needs) -> Iterator[Finding]:
    if inventory.ucx is not None:
        offered = [name for name in inventory.ucx.transports if not name.startswith(_UNUSABLE)]
        yield Finding(
            about="UCX",
            state="ok",
            found=f"{inventory.ucx.version}: {', '.join(sorted(offered))}",
            used="nixl" if needs.nixl else "",
            unused="" if needs.nixl else "nixl: the deployment does without",
        )
    if not needs.transports:
        yield _external(inventory, needs)
        return
    if needs.near:
        yield _chosen("KV caches here", _near(inventory, needs))
    if needs.far:
        yield _chosen("KV caches to hosts", _far(inventory, needs))
    elif needs.rdma_only:
        yield Finding(
            about="transfer.require",
            state="note",
            found="rdma, and no pair is of two hosts",
            unused="the refusal of TCP between hosts",
            mend="transfer.require: any, unless hosts are to come",
        )


def _external(inventory: Inventory, needs: Needs) -> Finding:
    """Return the finding for engines that move KV caches themselves, as their logs alone show."""
    lacks = no_rdma(inventory.rdma) if needs.far else ""
    refused = bool(lacks) and needs.rdma_only
    return Finding(
        about="KV caches",
        state="problem" if refused else "note" if lacks else "ok",
        found=f"moved by engine {needs.engine} itself",
        used="" if lacks else "RDMA, between hosts" if needs.far else "",
        unused=f"RDMA: {lacks}" if lacks else "",
        mend=(_MEND_RDMA if refused else "RDMA, as above") if lacks else "",
    )


def _near(inventory: Inventory, needs: Needs) -> Candidates:
    found = ways(inventory)
    device = bool(needs.gpus)
    near: dict[str, Candidates] = {
        "cuda_ipc": [("cuda_ipc", found["cuda_ipc"] if device else "the engine is on the CPU")],
        "shm": [("shm", "the engine is on a GPU" if device else found["shm"])],
        # UCX uses CUDA IPC between GPUs of one host, too.
        "nixl": [("nixl over cuda_ipc", found["nixl over tcp"] or found["cuda_ipc"])]
        if device
        else [("nixl over cma", found["nixl over cma"])],
    }
    near["nixl"].append(_tcp(found, needs))
    return [way for name in needs.transports for way in near[name]]


def _far(inventory: Inventory, needs: Needs) -> Candidates:
    if "nixl" not in needs.transports:
        return [("nixl", "transfer.transports is without it")]
    found = ways(inventory)
    return [("nixl over rdma", found["nixl over rdma"]), _tcp(found, needs)]


def _tcp(found: dict[WayName, str], needs: Needs) -> tuple[str, str]:
    refused = "transfer.require is rdma" if needs.rdma_only else ""
    return "nixl over tcp", refused or found["nixl over tcp"]


def _chosen(about: str, candidates: Candidates) -> Finding:
    way = next((way for way, why in candidates if not why), None)
    better = candidates[: [name for name, _ in candidates].index(way)] if way else candidates
    unused = "; ".join(f"{name}: {why}" for name, why in better)
    if way is None:
        return Finding(
            about=about,
            state="problem",
            found="no way to move them",
            unused=unused,
            mend=_mend(candidates),
        )
    slower = way == "nixl over tcp"  # which is never the first
    return Finding(
        about=about,
        state="note" if slower else "ok",
        found=way,
        unused=unused,
        mend=f"{better[0][0]}: as above; TCP takes several times as long" if slower else "",
    )


def _mend(candidates: Candidates) -> str:
    reasons = " ".join(why for _, why in candidates)
    if "require is rdma" in reasons:
        return _MEND_RDMA
    if "transfer.transports" in reasons:
        return "transfer.transports with nixl in it"
    return "what they lack, as above; or other transfer.transports"
