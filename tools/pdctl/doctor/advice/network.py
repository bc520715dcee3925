"""Findings about the devices that `transfer.network` names, and those of this host."""

from __future__ import annotations

from collections.abc import Iterator

from pdctl.doctor.advice.finding import Finding, State
from pdctl.doctor.advice.needs import Needs
from pdctl.doctor.advice.ways import V2, v2
from pdctl.doctor.inventory import Inventory
from pdserve.config import Network


def network(inventory: Inventory, needs: Needs, named: Network) -> Iterator[Finding]:
    state: State = "problem" if needs.far else "note"
    ports = {f"{port.device}:{port.port}": port for port in inventory.rdma}
    interfaces = {
        name.partition("/")[2] for name in (inventory.ucx.transports if inventory.ucx else ())
    }
    for device in named.devices:
        if device not in ports and device not in interfaces:
            yield Finding(
                about="transfer.network",
                state=state,
                found=f"{device} is no device of this host",
                unused="what UCX is kept to",
                mend=f"transfer.network.devices: {', '.join(ports) or 'none: no RDMA here'}",
            )
    wanted = named.gid_index
    for name, port in ports.items():
        if wanted is None or (named.devices and name not in named.devices):
            continue
        if not any(gid.index == wanted for gid in v2(port)) and port.link_layer != "InfiniBand":
            kinds = {gid.index: gid.kind for gid in port.gids}
            fit = ", ".join(str(gid.index) for gid in v2(port))
            yield Finding(
                about="transfer.network",
                state=state,
                found=f"GID {wanted} of {name} is {kinds.get(wanted, 'empty')}, not {V2}",
                unused=f"nixl over RDMA by {name}",
                mend=f"transfer.network.gid_index: {fit or 'none until the port has one'}",
            )
