"""All consequences of an inventory for a deployment."""

from __future__ import annotations

from collections.abc import Iterator

from msgspec import Struct

from pdctl.doctor.advice.channel import channel
from pdctl.doctor.advice.finding import Finding
from pdctl.doctor.advice.gpus import gpus
from pdctl.doctor.advice.memory import memory
from pdctl.doctor.advice.needs import needs
from pdctl.doctor.advice.network import network
from pdctl.doctor.advice.rdma import rdma
from pdctl.doctor.advice.servers import gateways, model, servers
from pdctl.doctor.advice.software import engines, software
from pdctl.doctor.advice.tensorrt_llm import tensorrt_llm
from pdctl.doctor.advice.transports import transports
from pdctl.doctor.advice.ways import WayName, ways
from pdctl.doctor.inventory import Inventory
from pdserve.config import Deployment

_BY_HAND = {
    "GPUs": "nvidia-smi (in a container: NVIDIA_DRIVER_CAPABILITIES=compute,utility)",
    "GPU topology": "nvidia-smi topo -m",
    "tensorrt_llm": "python3 -c 'import tensorrt_llm.llmapi'",
    "UCX": "pip install --force-reinstall --no-deps nixl-cu12, if nixl is wanted",
}
_COUNTED = {"tensorrt_llm": "nothing: it counts as one that can be used"}


class Conclusion(Struct, frozen=True, kw_only=True):
    """The summary of the findings."""

    engine: str
    """The engine of the deployment."""
    engines: dict[str, str]
    """Reasons why this host cannot run each engine; empty: it can."""
    transports: dict[WayName, str]
    """The same for the ways to move KV caches."""
    served: bool
    """True if the deployment can be served here."""


def advice(inventory: Inventory, deployment: Deployment) -> list[Finding]:
    """Return all findings, from the hardware upwards."""
    wanted = needs(deployment, inventory.servers)
    return [
        *_platform(inventory),
        *software(inventory, wanted),
        *tensorrt_llm(inventory, wanted, deployment),
        *gpus(inventory, wanted),
        *rdma(inventory, wanted),
        *network(inventory, wanted, deployment.transfer.network),
        *memory(inventory, wanted),
        *transports(inventory, wanted),
        *servers(inventory, deployment),
        *gateways(deployment),
        *channel(inventory, deployment),
        *model(inventory, deployment),
        *_unknown(inventory),
    ]


def hindrances(inventory: Inventory, deployment: Deployment) -> list[Finding]:
    """Return the problems that an inventory of essentials shows, and the notes before a start.

    The start itself checks the ports, at a moment when no other command can take them.
    """
    wanted = needs(deployment, inventory.servers)
    judged = [
        *_platform(inventory),
        *software(inventory, wanted),
        *gpus(inventory, wanted),
        *memory(inventory, wanted),
        *model(inventory, deployment),
    ]
    problems = [finding for finding in judged if finding.state == "problem"]
    return [*problems, *gateways(deployment), *channel(inventory, deployment)]


def conclusion(inventory: Inventory, deployment: Deployment, findings: list[Finding]) -> Conclusion:
    wanted = needs(deployment, inventory.servers)
    return Conclusion(
        engine=f"{wanted.engine} {wanted.device}",
        engines=engines(inventory),
        transports=ways(inventory),
        served=all(finding.state != "problem" for finding in findings),
    )


def _platform(inventory: Inventory) -> Iterator[Finding]:
    machine = inventory.system.machine
    if machine not in ("x86_64", ""):
        yield Finding(
            about="machine",
            state="problem",
            found=f"{machine}; the lease table is made for the memory order of x86_64",
            mend="an x86_64 host",
        )
    if inventory.checkout:
        yield Finding(
            about="checkout",
            state="problem",
            found=inventory.checkout,
            mend="move it, and make setup there",
        )


def _unknown(inventory: Inventory) -> Iterator[Finding]:
    for what, why in inventory.unknown.items():
        yield Finding(
            about=what,
            state="note",
            found=f"not known: {why}",
            unused=_COUNTED.get(what, "it counts as if there were none"),
            mend=_BY_HAND.get(what, "see what this user may read of /proc and /sys"),
        )
