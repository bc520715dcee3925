"""The section ``control`` of a deployment: its store, and the bounds of what is decided by itself.

A deployment without the section is static: what its file says is what there is.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from pdserve.config import addresses
from pdserve.config.names import Role

Count = Annotated[int, Meta(ge=1, le=(1 << 31) - 1)]
Seconds = Annotated[float, Meta(gt=0, le=1e7)]
Name = Annotated[str, Meta(pattern=r"^[a-z][a-z0-9_]{0,63}\Z")]
Endpoint = Annotated[str, Meta(pattern=r"^[^\s/]+:[0-9]{1,5}\Z")]

LEAST = 2
"""Default of the least number of instances of a role: with one, a failure stops the group."""
QUIET_S = 5.0
"""``pdserve.transfer.producer.lease_manager.QUIET_S``: seconds for which a decode that reads a KV
cache may be silent before its range is given back."""
MARGIN_S = 10.0
"""Seconds by which the default of ``drain_s`` is longer than it must be."""


class Etcd(Struct, frozen=True, forbid_unknown_fields=True):
    """An etcd cluster; see ``pdserve.control.store.etcd.client.EtcdAddress``."""

    endpoints: Annotated[tuple[Endpoint, ...], Meta(min_length=1)]
    ca: str | None = None
    """File of the authority, in PEM format; None: no TLS."""
    certificate: str | None = None
    key: str | None = None
    user: str = ""
    password_file: str | None = None

    def __post_init__(self) -> None:
        for endpoint in self.endpoints:
            addresses.check_endpoint(endpoint)
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key are given together, or neither")
        if bool(self.user) != bool(self.password_file):
            raise ValueError("user and password_file are given together, or neither")
        if self.ca is None and (self.certificate or self.user):
            raise ValueError("a certificate or a user needs TLS, and so a ca")


class Bounds(Struct, frozen=True, forbid_unknown_fields=True):
    """How many instances of a role a group has."""

    least: Count | None = None
    """None: 2, or as many as the group has at first, if that is fewer."""
    most: Count | None = None
    """None: as many as there are."""

    def __post_init__(self) -> None:
        if self.least is not None and self.most is not None and self.least > self.most:
            raise ValueError(f"least is {self.least} and most {self.most}; allowed: least <= most")

    def at_least(self, first: int) -> int:
        """Return the lower bound of a group that has ``first`` instances of the role at first."""
        return min(LEAST, first) if self.least is None else self.least


class GroupBounds(Struct, frozen=True, forbid_unknown_fields=True):
    """The bounds of one group."""

    prefill: Bounds = Bounds()
    decode: Bounds = Bounds()
    most: Count | None = None
    """Instances of both roles together; None: as many as there are."""

    def of(self, role: Role) -> Bounds:
        return self.prefill if role == "prefill" else self.decode


class Control(Struct, frozen=True, forbid_unknown_fields=True):
    """What the control plane may do, and where it keeps its state."""

    id: Name
    """Identifies the deployment in its store; no other one may have it there."""
    etcd: Etcd | None = None
    """None: a file of this host, ``control/ID`` in the folder of the servers' folders."""
    ratio: Literal["never", "advise", "act"] = "advise"
    """``advise``: what would be done is an event, and is not done."""
    groups: dict[Name, GroupBounds] = {}
    spares: tuple[Name, ...] = ()
    """Instances that are loaded and in no group at first; they replace lost ones."""
    drain_s: Seconds | None = None
    """Seconds after which requests that a leaving instance still has go on elsewhere. None: what
    ``pdserve.config.Deployment.drain_s`` says."""
    metrics_port: Annotated[int, Meta(ge=1, le=65535)] = 8009
    """Port of the controller's own metrics, on loopback."""
