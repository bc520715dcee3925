"""What a controller remembers between two decisions; nothing breaks if it is forgotten."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Memory:
    """Begin with ``Memory()``."""
