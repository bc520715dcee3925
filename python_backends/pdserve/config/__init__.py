"""The configuration of a deployment: its file as types, read and checked."""

from pdserve.config.backend_models import TritonModel
from pdserve.config.control import Control, Etcd, GroupBounds, Hours, Tide
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
    "Control",
    "Decode",
    "Deployment",
    "Engine",
    "Etcd",
    "Gateway",
    "Group",
    "GroupBounds",
    "Hours",
    "Network",
    "Prefill",
    "Role",
    "Rule",
    "SamplingDefaults",
    "Scenario",
    "Server",
    "Tide",
    "Transfer",
    "TransportName",
    "TritonModel",
    "load",
]
