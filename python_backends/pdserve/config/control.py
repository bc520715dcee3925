"""The section ``control`` of a deployment: its store, and the bounds of what is decided by itself.

A deployment without the section is static: what its file says is what there is.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from msgspec import Meta, Struct

from pdserve.config import addresses
from pdserve.config.names import Role

Count = Annotated[int, Meta(ge=1, le=(1 << 31) - 1)]
Seconds = Annotated[float, Meta(gt=0, le=1e7)]
Name = Annotated[str, Meta(pattern=r"^[a-z][a-z0-9_]{0,63}\Z")]
Clock = Annotated[str, Meta(pattern=r"^([01][0-9]|2[0-3]):[0-5][0-9]\Z")]
Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
DAYS: tuple[Day, ...] = get_args(Day)
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


class GroupBounds(Struct, frozen=True, forbid_unknown_fields=True):
    """How many instances a group has."""

    least_prefill: Count | None = None
    """None: 2, or as many as the group has at first, if that is fewer."""
    least_decode: Count | None = None
    most: Count | None = None
    """Instances of both roles together; None: as many as there are."""

    def least(self, role: Role, first: int) -> int:
        """Return the least number of a role in a group that has ``first`` of it at first."""
        given = self.least_prefill if role == "prefill" else self.least_decode
        return min(LEAST, first) if given is None else given


class Hours(Struct, frozen=True, forbid_unknown_fields=True):
    """A part of the day, in UTC. One that passes midnight belongs to the day on which it begins."""

    start: Clock
    end: Clock
    days: Annotated[tuple[Day, ...], Meta(min_length=1)] = DAYS

    def __post_init__(self) -> None:
        if self.start == self.end:
            raise ValueError(f"start and end are both {self.start}; they differ")


class Tide(Struct, frozen=True, forbid_unknown_fields=True):
    """Instances of a group that are elsewhere for a part of the day, or while nobody needs them."""

    group: Name
    to: Name
    """The pool they go to: a group, which they serve then, or any other name, such as training; in
    a pool that is no group they are not loaded."""
    hours: tuple[Hours, ...] = ()
    """When they are out."""
    prefill: Annotated[int, Meta(ge=0)] | None = None
    """How many prefills go; with neither this nor ``decode`` the whole group goes."""
    decode: Annotated[int, Meta(ge=0)] | None = None
    volume: bool = False
    """The whole group is out whenever the other groups of its scenario suffice, by their load."""

    def __post_init__(self) -> None:
        if self.volume == bool(self.hours):
            raise ValueError("one of hours and volume is given, and not both")
        if self.volume and (self.prefill is not None or self.decode is not None):
            raise ValueError("with volume the whole group goes: prefill and decode are not given")
        if (self.prefill, self.decode) != (None, None) and not (self.prefill or self.decode):
            raise ValueError("prefill and decode are both 0: nothing would go")

    @property
    def whole(self) -> bool:
        """Tell whether the whole group goes."""
        return self.prefill is None and self.decode is None


class Control(Struct, frozen=True, forbid_unknown_fields=True):
    """The bounds of the control plane, and the place of its state."""

    id: Name
    """Identifies the deployment in its store; no other one may have it there."""
    etcd: Etcd | None = None
    """None: a file of this host, ``control-ID`` in the folder of the servers' folders."""
    ratio: Literal["never", "advise", "act"] = "advise"
    """``advise``: what would be done is an event, and is not done."""
    groups: dict[Name, GroupBounds] = {}
    budget: Count | None = None
    """Instances that are loaded at once in the whole deployment; None: any number."""
    spares: tuple[Name, ...] = ()
    """Instances that are loaded and in no group at first; they replace lost ones."""
    tides: tuple[Tide, ...] = ()
    drain_s: Seconds | None = None
    """Seconds after which requests that a leaving instance still has go on elsewhere. None: what
    ``pdserve.config.Deployment.drain_s`` says."""
    metrics_port: Annotated[int, Meta(ge=1, le=65535)] = 8009
    """Port of the controller's own metrics, on loopback."""
