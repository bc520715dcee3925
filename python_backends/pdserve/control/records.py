"""The values of the control plane's keys in the store, as JSON.

Desired state is written by the leading controller alone, in fenced transactions; observed state by
the node agent of each host, under its lease.
"""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from pdserve.control.assignment import Assignment

CONTROL = "control/"
IDENTITY = f"{CONTROL}identity"
DESIRED = "desired/"
DESIRED_INSTANCES = "desired/instances/"
DESIRED_GROUPS = "desired/groups/"
OBSERVED_INSTANCES = "observed/instances/"
OBSERVED_AGENTS = "observed/agents/"
TRANSACTIONS = "transactions/"
"""One at most for each group."""
PINS = "pins/"
DRAINS = "drains/"
"""By instance; an operator drains it as long as there is one."""
LENT = "lent/"
"""By instance."""
EVENTS = "events/"

Label = Annotated[str, Meta(max_length=128)]
Text = Annotated[str, Meta(max_length=1024)]
Count = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]
T = TypeVar("T", bound=Struct)


class Identity(Struct, frozen=True, forbid_unknown_fields=True):
    """Whose store it is."""

    id: Label
    """``control.id`` of its deployment."""
    key: Label
    """Fingerprint of the deployment's key."""


class Phase(Enum):
    """The phase of an instance: what it does with requests (``pdserve.instances.assigned``).

    ::

                   Assign               Drain              nothing held
        UNASSIGNED ──────► SERVING ────────────► DRAINING ──────────────► DRAINED
             ▲              ▲   ▲      Resume       │                      │   │
             │              │   └───────────────────┴──────────────────────┘   │
             └──────────────┴──────────────── Assign ──────────────────────────┘
    """

    UNASSIGNED = "unassigned"
    """Its role is ``none``."""
    SERVING = "serving"
    DRAINING = "draining"
    """It accepts no request, and still holds slots or leases."""
    DRAINED = "drained"
    """It accepts no request and holds nothing."""


class DesiredInstance(Struct, frozen=True, forbid_unknown_fields=True):
    """The desired state of an instance."""

    assignment: Assignment
    state: Literal["serving", "draining", "absent"] = "serving"
    """``draining``: drained, but loaded. ``absent``: drained, unloaded, and not in the repository
    of its server."""


class DesiredGroup(Struct, frozen=True, forbid_unknown_fields=True):
    """A group of a scenario; its members are the instances that are assigned to it."""

    scenario: Label
    share: Annotated[float, Meta(ge=0)] = 1.0


class Pin(Struct, frozen=True, forbid_unknown_fields=True):
    """The ratio that an operator has set for a group."""

    prefills: Count
    decodes: Count


class DrainOrder(Struct, frozen=True, forbid_unknown_fields=True):
    """An operator's order to drain an instance, and to keep it so."""

    since: Annotated[float, Meta(ge=0)]
    """Seconds since 1970."""


class Lent(Struct, frozen=True, forbid_unknown_fields=True):
    """An instance that has gone to a pool with the tide, and comes back."""

    home: Label
    """Its group."""
    to: Label
    """The pool: another group, or a name outside the deployment."""
    role: Literal["prefill", "decode"]
    """Its desired state at home."""
    share: Annotated[float, Meta(ge=0)] = 0.0
    """If its whole group has gone: the group's share when it serves; else 0."""


class ObservedInstance(Struct, frozen=True, forbid_unknown_fields=True):
    """The report of an agent on an instance: what the instance itself answered last."""

    host: Label
    """The agent's name."""
    server: Label
    address: Label
    """Host and gRPC port of its server."""
    kind: Literal["prefill", "decode", "flexible"]
    """Its fixed role, or that it can have either."""
    state: Literal["absent", "loading", "ready", "failed"]
    """``failed``: its repairs did not help."""
    epoch: Label = ""
    """Hexadecimal name of its process; empty: it has not answered yet."""
    assignment: Assignment | None = None
    phase: Phase = Phase.UNASSIGNED
    used: Count = 0
    """Slots that requests hold."""
    leases: Count = 0
    """KV caches that a decode may still read, those in quarantine included."""
    reason: Text = ""


class ObservedAgent(Struct, frozen=True, forbid_unknown_fields=True):
    """An agent that is alive."""

    pid: Count
    servers: tuple[Label, ...]


def encode(record: Struct) -> bytes:
    return msgspec.json.encode(record)


def decode(data: bytes, kind: type[T]) -> T:
    """Return the record. Raises msgspec.MsgspecError: it is none of this kind."""
    return msgspec.json.decode(data, type=kind)
