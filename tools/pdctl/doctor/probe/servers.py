"""Finds which of the deployment's servers are of this host, and whether their ports are free."""

from __future__ import annotations

from pdctl import ports
from pdctl.doctor.inventory import Port, Server
from pdctl.server import Server as Running
from pdserve.config import Deployment

USES = ("http", "grpc", "metrics")


def servers(deployment: Deployment) -> tuple[Server, ...]:
    here = [spec for spec in deployment.servers if ports.is_here(spec)]
    pids = {spec.name: Running(deployment, spec).pid for spec in here}
    return tuple(
        Server(
            name=spec.name,
            here=spec in here,
            pid=pids.get(spec.name),
            ports=tuple(
                Port(use=use, number=number, holder=_holder(spec.host, number, pids))
                for use, number in zip(USES, spec.ports, strict=True)
            )
            if spec in here and pids[spec.name] is None
            else (),
        )
        for spec in deployment.servers
    )


def _holder(host: str, number: int, pids: dict[str, int | None]) -> str:
    """Return which process has a port, in words; empty: none."""
    reason = ports.obstacle(host, number)
    if reason is None:
        return ""
    _, who, _ = reason
    ours = (f", server {name}" for name, pid in pids.items() if f"(process {pid})" in who)
    return who + next(ours, "")
