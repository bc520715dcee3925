"""Which requests may be the cause when instances end, and how that is found out.

An instance that ends takes many requests with it, and at most one of them is the cause. A request
that has had a token from it since it was accepted there is not; any other is a *suspect*, until it
has a token from an instance of that role. An instance takes one suspect at a time, and reports its
acceptance before it computes anything for it. So when an instance ends, at most one suspect has
been accepted: that one is not retried, and all others are. Two ends by other causes, the second
between a suspect's acceptance and its first token, look the same.
"""

from __future__ import annotations

from typing import Protocol

from pdserve import errors
from pdserve.config import Role
from pdserve.scheduling.request import Request

ENDS = 2
"""Number of instances that may end with a request, if the last one had accepted it."""
UNANSWERED = 4
"""The same number if the last one had not accepted it, and may have ended before the request
came."""


class Suspectable(Protocol):
    """The part of an instance that concerns suspects."""

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
        """True if the instance has answered the request."""
        self.suspect = bool(request.ends[role])
        """True if the request is a suspect; other suspects may wait for its progress."""
        if self.suspect:
            instance.suspect = request

    def progress(self) -> None:
        """Note that the instance has computed a token for the request."""
        self._progress = True
        self._request.ends[self._role].clear()
        self.over()

    def ended(self) -> None:
        """Note that the instance has ended.

        Raises:
            Suspected: too many instances have ended with the request.
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
        """Note that the request has left; calling it again is no error."""
        if self._instance.suspect is self._request:
            self._instance.suspect = None


def admits(instance: Suspectable, request: Request, role: Role, now: float) -> bool:
    """Tell whether a request may be offered to an instance, as far as suspects are concerned."""
    if not request.ends[role]:
        return True
    return instance.suspect in (None, request) and now >= instance.suspects_from
