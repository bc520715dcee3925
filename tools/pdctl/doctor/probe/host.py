"""An inventory of this host."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pdctl import network
from pdctl.doctor.inventory import GPU, Direct, Inventory, Process, System, Topology
from pdctl.doctor.probe.cma import cma
from pdctl.doctor.probe.command import Unknown
from pdctl.doctor.probe.gpus import direct, gpus, topology
from pdctl.doctor.probe.rdma import ports
from pdctl.doctor.probe.servers import servers
from pdctl.doctor.probe.software import software
from pdctl.doctor.probe.system import process, system
from pdctl.doctor.probe.ucx import ucx
from pdserve.config import Deployment

T = TypeVar("T")


def probe(deployment: Deployment, root: Path = Path("/")) -> Inventory:
    """Takes a second; whatever hangs is given up after `command.TIMEOUT_S`.

    Args:
        root: where proc, sys and dev lie.
    """
    unknown: dict[str, str] = {}
    # What its servers will find there.
    environment = os.environ | network.variables(deployment)

    def known(what: str, found: Callable[[], T], otherwise: T) -> T:
        try:
            return found()
        except (Unknown, OSError, ValueError, LookupError) as error:
            unknown[what] = str(error)
            return otherwise

    devices: tuple[GPU, ...] = known("GPUs", lambda: gpus(root), ())
    return Inventory(
        software=software(),
        system=known("system", lambda: system(root), System()),
        process=known("process", lambda: process(root, environment), Process()),
        gpus=devices,
        topology=known("GPU topology", lambda: topology(devices), Topology()),
        direct=known("kernel modules", lambda: direct(root), Direct()),
        rdma=known("RDMA", lambda: ports(root), ()),
        ucx=known("UCX", lambda: ucx(environment), None),
        cma=known("CMA", cma, "not tried"),
        model=Path(deployment.model).exists(),
        servers=servers(deployment),
        unknown=unknown,
    )
