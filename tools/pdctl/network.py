"""A deployment's network as UCX, NIXL and TensorRT-LLM take it: variables of the environment."""

from __future__ import annotations

from pdserve.config import Network


def variables(network: Network) -> dict[str, str]:
    """Those that the deployment says something about; whatever else is set stays as it is."""
    given = {
        "UCX_NET_DEVICES": ",".join(network.devices) or None,
        "UCX_IB_GID_INDEX": network.gid_index,
        "UCX_IB_TRAFFIC_CLASS": network.traffic_class,
        "UCX_MAX_RNDV_RAILS": network.rails,
        "TRTLLM_UCX_INTERFACE": network.interface,
        "TRTLLM_NIXL_INTERFACE": network.interface,
    }
    return {name: str(value) for name, value in given.items() if value is not None}
