"""Which requests may be what ends the instances that they are on, and how that is found out.

An instance that ends takes many requests with it, and at most one of them is the cause. One that
has had a token of it since it was accepted there is not; any other one is a *suspect*, until it has
a token of an instance of that role. An instance takes one suspect at a time, and says so as soon as
it has, before it computes anything for it. So an end finds one suspect that has been accepted: that
one is not tried again, and everybody else is. Two ends by other causes, the second in the moment
between a suspect's acceptance and its first token, look the same.
"""

from __future__ import annotations

from typing import Protocol

from pdserve import errors
from pdserve.config import Role
from pdserve.scheduling.request import Request

ENDS = 2
"""Instances whose end a request may share, if the last one had accepted it."""
UNANSWERED = 4
"""The same if it had not, and may have ended before the request came."""


class Suspectable(Protocol):
    """An instance, as far as what may end it is concerned."""

    name: str
    suspect: Request | None
    suspects_from: float


class Stay:
    """A request on an instance, from its offer until it makes progress there or leaves."""

    def __init__(self, request: Request, instance: Suspectable, role: Role) -> None:
        self._request = request
        self._instance = instance
        self._role: Role = role
        self._progress = False
        self.answered = False
        """The instance has said something to it."""
        self.suspect = bool(request.ends[role])
        """Others that are may wait for its progress."""
        if self.suspect:
            instance.suspect = request

    def progress(self) -> None:
        """The instance has computed a token for it."""
        self._progress = True
        self._request.ends[self._role].clear()
        self.over()

    def ended(self) -> None:
        """The instance has ended.

        Raises:
            Suspected: so have too many.
        """
        if self._progress:
            return
        ends = self._request.ends[self._role]
        ends.append(self._instance.name)
        if (self.answered and len(ends) >= ENDS) or len(ends) >= UNANSWERED:
            raise errors.Suspected(
                f"request {self._request.id} was open on {' and '.join(ends)} when they ended, and "
                "is not tried again"
            )

    def over(self) -> None:
        """It has left; again is no error."""
        if self._instance.suspect is self._request:
            self._instance.suspect = None


def admits(instance: Suspectable, request: Request, role: Role, now: float) -> bool:
    """Whether a request may be offered to an instance, as far as its own past is concerned."""
    if not request.ends[role]:
        return True
    return instance.suspect in (None, request) and now >= instance.suspects_from
