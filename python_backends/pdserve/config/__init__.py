"""The configuration of a deployment: its file as types, read and checked."""

from pdserve.config.backend_models import TritonModel
from pdserve.config.control import Bounds, Control, Etcd, GroupBounds
from pdserve.config.deployment import (
    EXTERNAL_LEASE_S,
    Decode,
    Deployment,
    Engine,
    Gateway,
    Group,
    Network,
    Prefill,
    Rule,
    SamplingDefaults,
    Scenario,
    Server,
    Transfer,
    TransportName,
)
from pdserve.config.loading import load
from pdserve.config.names import GATEWAY_MODELS, ROLES, Role

__all__ = [
    "EXTERNAL_LEASE_S",
    "GATEWAY_MODELS",
    "ROLES",
    "Bounds",
    "Control",
    "Decode",
    "Deployment",
    "Engine",
    "Etcd",
    "Gateway",
    "Group",
    "GroupBounds",
    "Network",
    "Prefill",
    "Role",
    "Rule",
    "SamplingDefaults",
    "Scenario",
    "Server",
    "Transfer",
    "TransportName",
    "TritonModel",
    "load",
]
