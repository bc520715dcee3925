"""A finding about a host, and its consequences."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

State = Literal["ok", "note", "missing", "problem"]


class Finding(Struct, frozen=True, kw_only=True):
    """A finding with its state.

    `problem`: the deployment cannot be served here until it is mended. `missing`: not there, and
    the deployment does without. `note`: it works, at a cost.
    """

    about: str
    state: State
    found: str
    used: str = ""
    """Features that are used because of it."""
    unused: str = ""
    """Features that are not used because of it."""
    mend: str = ""
    """A command or a change that mends it."""
