"""What an instance is for: its role, its group, and a number that only grows."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

Role = Literal["prefill", "decode", "none"]
"""``none``: it has loaded its model, and has neither arena nor pool."""
Number = Annotated[int, Meta(ge=1, le=(1 << 63) - 1)]

FIRST = 1
"""The number of the first assignment, which deployment.yaml gives."""
ANY = 0
"""Stands for the number of a message to an instance whatever its assignment. Messages that can
begin something are not accepted under it."""


class Assignment(Struct, frozen=True, forbid_unknown_fields=True):
    """The assignment of one instance.

    The number stands in desired state, in what the instance tells of itself, in handles, and in
    every request; an instance refuses a request with another number. Who has a lower number than
    another is out of date, whatever it knows otherwise.
    """

    number: Number
    role: Role
    group: Annotated[str, Meta(pattern=r"^([a-z][a-z0-9_]{0,63})?\Z")] = ""
    """Empty: none, it is a spare; or several, in a deployment whose groups share it."""
    key: Annotated[str, Meta(pattern=r"^[!-~]{0,128}\Z")] = ""
    """Fingerprint of the model whose KV caches it exchanges; empty: that of its deployment."""
