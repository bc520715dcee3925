"""What an agent knows of the assignments of all instances of its deployment."""

from __future__ import annotations

from collections.abc import Mapping

from pdserve.control.assignment import Assignment


class Assignments:
    """The assignment of each instance with the highest number that was heard of.

    Args:
        first: those to begin with.
    """

    def __init__(self, first: Mapping[str, Assignment]) -> None:
        self._known = dict(first)

    def take(self, name: str, assignment: Assignment) -> None:
        """Take notice of an assignment; one with a lower number is of the past."""
        known = self._known.get(name)
        if known is None or known.number < assignment.number:
            self._known[name] = assignment

    def forget(self, name: str) -> None:
        """Take notice that an instance does not serve, or is not to."""
        self._known.pop(name, None)

    def of(self, name: str) -> Assignment | None:
        return self._known.get(name)

    def prefills(self, decode: str) -> list[str]:
        """Return the prefills that a decode takes KV caches of: those of its group."""
        own = self._known.get(decode)
        group = own.group if own is not None else ""
        return [
            name
            for name, one in self._known.items()
            if one.role == "prefill" and group in ("", one.group)
        ]
