"""Makes the inventory of this host."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TypeVar

import msgspec

import bootstrap
from pdctl import network, paths
from pdctl.doctor.inventory import GPU, Direct, Inventory, Process, System, Topology
from pdctl.doctor.probe import tensorrt_llm
from pdctl.doctor.probe.cma import cma
from pdctl.doctor.probe.command import Unknown
from pdctl.doctor.probe.gpus import direct, gpus, topology
from pdctl.doctor.probe.model import model
from pdctl.doctor.probe.rdma import ports
from pdctl.doctor.probe.servers import servers
from pdctl.doctor.probe.software import software
from pdctl.doctor.probe.system import process, system
from pdctl.doctor.probe.ucx import ucx
from pdserve.config import Deployment

T = TypeVar("T")


def essentials(deployment: Deployment, names: Collection[str], root: Path = Path("/")) -> Inventory:
    """Return only what decides whether servers of this host can start; this is quick.

    Args:
        names: names of the servers that are to be started.
        root: folder of proc, sys and dev.
    """
    unknown: dict[str, str] = {}
    asked = tuple(
        msgspec.structs.replace(server, here=server.here and server.name in names)
        for server in servers(deployment)
    )
    computing = deployment.engine.gpu is not None or deployment.engine.kind == "tensorrt_llm"
    return Inventory(
        software=software(),
        system=_known("system", lambda: system(root), System(), unknown),
        process=_known("process", lambda: process(root, os.environ), Process(), unknown),
        gpus=_known("GPUs", lambda: gpus(root), (), unknown) if computing else (),
        topology=Topology(),
        direct=Direct(),
        rdma=(),
        ucx=None,
        cma="not tried",
        checkout=bootstrap.unfit(paths.ROOT),
        model=model(deployment),
        servers=asked,
        unknown=unknown,
    )


def _known(what: str, found: Callable[[], T], otherwise: T, unknown: dict[str, str]) -> T:
    """Return what is found; if it cannot be found out, add the reason to ``unknown``."""
    try:
        return found()
    except (Unknown, OSError, ValueError, LookupError) as error:
        unknown[what] = str(error)
        return otherwise


def probe(deployment: Deployment, root: Path = Path("/")) -> Inventory:
    """Return the whole inventory, in about a second; each probe ends after `command.TIMEOUT_S`.

    Where the engine is TensorRT-LLM it is imported, too, which takes `tensorrt_llm.TIMEOUT_S` at
    most.

    Args:
        root: folder of proc, sys and dev.
    """
    unknown: dict[str, str] = {}
    # What its servers will find there.
    environment = os.environ | network.variables(deployment)

    def known(what: str, found: Callable[[], T], otherwise: T) -> T:
        return _known(what, found, otherwise, unknown)

    devices: tuple[GPU, ...] = known("GPUs", lambda: gpus(root), ())
    installed = software()
    if deployment.engine.kind == "tensorrt_llm" and "tensorrt_llm" in installed.packages:
        why = known("tensorrt_llm", lambda: tensorrt_llm.fault(environment), "")
        installed = msgspec.structs.replace(installed, tensorrt_llm=why)
    return Inventory(
        software=installed,
        system=known("system", lambda: system(root), System()),
        process=known("process", lambda: process(root, environment), Process()),
        gpus=devices,
        topology=known("GPU topology", lambda: topology(devices), Topology()),
        direct=known("kernel modules", lambda: direct(root), Direct()),
        rdma=known("RDMA", lambda: ports(root), ()),
        ucx=known("UCX", lambda: ucx(environment), None),
        cma=known("CMA", cma, "not tried"),
        checkout=bootstrap.unfit(paths.ROOT),
        model=model(deployment),
        servers=servers(deployment),
        unknown=unknown,
    )
