"""The environment variables by which UCX, NIXL and TensorRT-LLM get a deployment's network."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping

from pdserve.config import Deployment


def variables(
    deployment: Deployment, environment: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """Return the variables that the deployment determines; others stay as they are.

    UCX listens on every interface that it may use. If all hosts are loopback, and no
    devices are named, it is restricted to loopback.
    """
    network = deployment.transfer.network
    given = {
        "UCX_NET_DEVICES": ",".join(network.devices) or _loopback(deployment, environment),
        "UCX_IB_GID_INDEX": network.gid_index,
        "UCX_IB_TRAFFIC_CLASS": network.traffic_class,
        "UCX_MAX_RNDV_RAILS": network.rails,
        "TRTLLM_UCX_INTERFACE": network.interface,
        "TRTLLM_NIXL_INTERFACE": network.interface,
    }
    return {name: str(value) for name, value in given.items() if value is not None}


def _loopback(deployment: Deployment, environment: Mapping[str, str]) -> str | None:
    uses_ucx = "nixl" in deployment.transports or deployment.engine.external
    chosen = "UCX_NET_DEVICES" in environment
    near = all(map(_is_loopback, (server.host for server in deployment.servers)))
    return "lo" if uses_ucx and near and not chosen else None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
