"""An instance under its assignment, which may change: what it accepts, and from whom.

`pdserve.control.records.Phase` draws the phases. In each of them

    a request with another number           Reassigned, at no cost: nothing is held for it
    a request with the present number       SERVING: the role instance has it; else Reassigned
    Describe                                also while DRAINING: what waits may still be pulled
    Release, Transferred, Unlink            always: they only end something
    Inspect                                 always Inspected
    Drain, Resume, Assign                   Inspected if epoch and number are the present ones and
                                            the phase allows it; else Reassigned, and no change

A message that is replayed after an Assign has a number of the past, and one to another process
another epoch: neither changes anything.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable
from typing import Literal

from pdserve import errors
from pdserve.control.assignment import Assignment
from pdserve.control.records import Phase
from pdserve.instances.protocol import DecodeRole, PrefillRole, Send, Sent, dispatch, sent_at_once
from pdserve.rpc.messages import (
    Assign,
    Describe,
    Drain,
    Failed,
    Inspect,
    Inspected,
    Reassigned,
    Release,
    Released,
    Request,
    Resume,
    Transferred,
    Unlink,
    Unlinked,
)
from pdserve.supervision import Background, traced

_log = logging.getLogger(__name__)

LOOK_S = 0.02
"""Interval of the looks at what a draining instance still holds."""

RoleInstance = PrefillRole | DecodeRole
Make = Callable[[Assignment], Awaitable[RoleInstance | None]]
"""Makes the role instance of an assignment, which is started then; None: its role is ``none``."""
Keep = Callable[[Assignment], None]
"""Stores an assignment where the next process of this instance finds it. Raises OSError."""


class Assigned:
    """One instance, from the assignment that it begins with; used in its event loop.

    Args:
        kind: its fixed role, or ``flexible``.
        role: instance of the first assignment's role; None: the role is ``none``. Closed, like
            those that `make` makes, with this object.
        epoch: name of this process.
        keep: called before another assignment is taken.
        make: called for another role, once the former instance has been closed; given if and only
            if the kind is ``flexible``.
    """

    def __init__(
        self,
        name: str,
        kind: Literal["prefill", "decode", "flexible"],
        assignment: Assignment,
        role: RoleInstance | None,
        epoch: bytes,
        keep: Keep,
        make: Make | None = None,
    ) -> None:
        self.assignment = assignment
        self.role = role
        self._name = name
        self._kind = kind
        self._epoch = epoch
        self._keep = keep
        self._make = make
        self.phase = Phase.UNASSIGNED if role is None else Phase.SERVING
        self._ends_at = math.inf
        """Time (``loop.time()``) at which what is left of a drain ends."""
        self._timer: asyncio.TimerHandle | None = None
        """Timer of the next look at what is left."""
        self._changing = False
        """True while a role instance is being closed and another made."""
        self._sent: Sent = sent_at_once
        self._tasks = Background()
        if role is not None:
            role.assign(assignment.number)

    def start(self, sent: Sent = sent_at_once) -> None:
        """Begin to work; called once in the running loop."""
        self._sent = sent
        if self.role is not None:
            self.role.start(sent)

    async def close(self) -> None:
        """Close the role instance, with all that it holds."""
        self._stop_looking()
        await self._tasks.close()
        if self.role is not None:
            await self.role.close()

    def handle(self, number: int, request: Request, stream: str, send: Send) -> None:
        """Handle a request that came sealed with ``number``.

        Args:
            stream: the connection that it came over.

        Raises:
            PDServeError: see ``dispatch``.
        """
        match request:
            case Release() | Transferred() | Unlink():
                self._end(request, stream, send)
            case Inspect():
                send(self._inspected(), True)
            case Drain() | Resume() | Assign():
                self._control(request, send)
            case _ if self._accepts(number, request) and self.role is not None:
                dispatch(self.role, request, stream, send)
            case _:
                send(self._reassigned(), True)

    def release(self, request_id: str, send: Send) -> None:
        """Give up a request whose gateway is gone."""
        if self.role is not None:
            self.role.release(request_id, send)

    def _accepts(self, number: int, request: Request) -> bool:
        draining = self.phase is Phase.DRAINING and isinstance(request, Describe)
        return number == self.assignment.number and (self.phase is Phase.SERVING or draining)

    def _end(self, request: Release | Transferred | Unlink, stream: str, send: Send) -> None:
        if self.role is not None and not (
            isinstance(request, Unlink) and self.role.role == "prefill"
        ):
            dispatch(self.role, request, stream, send)
        else:
            send(Unlinked() if isinstance(request, Unlink) else Released(), True)

    # ------------------------------------------------------------ control plane

    def _control(self, request: Drain | Resume | Assign, send: Send) -> None:
        present = request.epoch == self._epoch and request.number == self.assignment.number
        if not present or self._changing:
            send(self._reassigned(), True)
            return
        match request:
            case Drain():
                self._drain(request.within_s)
            case Resume():
                self._resume()
            case Assign() if self._allows(request.assignment):
                self._assign(request.assignment, send)
                return
            case Assign():
                send(self._reassigned(), True)
                return
        send(self._inspected(), True)

    def _drain(self, within_s: float) -> None:
        loop = asyncio.get_running_loop()
        if self.phase in (Phase.SERVING, Phase.DRAINING):
            self._ends_at = min(self._ends_at, loop.time() + within_s)
        if self.phase is Phase.SERVING and self.role is not None:
            self.phase = Phase.DRAINING
            self.role.end_watches(self._reassigned())
            self._look()

    def _look(self) -> None:
        """Look again and again whether a draining instance still holds something."""
        self._settle()
        if self.phase is Phase.DRAINING:
            self._timer = asyncio.get_running_loop().call_later(LOOK_S, self._look)

    def _stop_looking(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _settle(self) -> None:
        """Note that a draining instance holds nothing any more; end what is left after its time."""
        if self.phase is not Phase.DRAINING or self.role is None:
            return
        if not (self.role.used or self.role.leases):
            self.phase = Phase.DRAINED
            self._ends_at = math.inf
        elif asyncio.get_running_loop().time() >= self._ends_at:
            self._ends_at = math.inf
            message = f"{self._name} has given it up: the time of its drain is over"
            self.role.end_all(Failed(errors.Drained.code, message))

    def _resume(self) -> None:
        if self.phase in (Phase.DRAINING, Phase.DRAINED):
            self.phase = Phase.SERVING
            self._ends_at = math.inf
            self._stop_looking()

    def _allows(self, wanted: Assignment) -> bool:
        self._settle()
        return (
            self.phase in (Phase.UNASSIGNED, Phase.DRAINED)
            and wanted.number > self.assignment.number
            and (self._make is not None or wanted.role == self._kind)
        )

    def _assign(self, wanted: Assignment, send: Send) -> None:
        """Take an assignment; ``send`` gets what the instance is then, or why it cannot."""
        try:
            self._keep(wanted)
        except OSError as error:
            message = f"{self._name}: the assignment cannot be kept: {error}"
            send(Failed(errors.InstanceError.code, message), True)
            return
        former, self.assignment = self.assignment, wanted
        if self.role is not None and wanted.role == former.role:
            self.role.assign(wanted.number)
            self.phase = Phase.SERVING
            send(self._inspected(), True)
        else:
            self._changing, self.phase = True, Phase.UNASSIGNED
            self._tasks.start(self._switch(wanted, send))

    async def _switch(self, wanted: Assignment, send: Send) -> None:
        """Close the role instance and make another; never are both there."""
        assert self._make is not None
        try:
            former, self.role = self.role, None
            if former is not None:
                await former.close()
            made = await self._make(wanted)
            if made is not None:
                made.assign(wanted.number)
                made.start(self._sent)
                self.role, self.phase = made, Phase.SERVING
            send(self._inspected(), True)
        except Exception as error:  # it stays without a role, and may get another assignment
            _log.error("%s: no %s can be made\n%s", self._name, wanted.role, traced(error))
            failed = f"{self._name} has no role: {errors.loggable(error)}"
            send(Failed(errors.InstanceError.code, failed), True)
        finally:
            self._changing = False

    # ----------------------------------------------------------------- replies

    def _reassigned(self) -> Reassigned:
        return Reassigned(self.assignment, self.phase)

    def _inspected(self) -> Inspected:
        self._settle()
        role = self.role
        return Inspected(
            self.assignment,
            self.phase,
            self._epoch,
            0 if role is None else role.used,
            0 if role is None else role.leases,
            self._kind,
            b"" if role is None else role.memory,
        )
