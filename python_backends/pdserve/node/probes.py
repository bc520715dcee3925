"""Probes that tell whether instances answer and compute, by the messages that serve requests."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import uuid
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from pdserve.config import Deployment
from pdserve.errors import Drained, InstanceError
from pdserve.node.assignments import Assignments
from pdserve.rpc.client import Channel, Replies
from pdserve.rpc.messages import (
    Accepted,
    Busy,
    Connect,
    Connected,
    DecodeRequest,
    Describe,
    Described,
    Failed,
    NotConnected,
    Prefilled,
    PrefillRequest,
    Reassigned,
    Release,
    Released,
    Reply,
    Request,
    Tokens,
    Transferred,
)
from pdserve.sampling import Sampling

PROMPT = (1).to_bytes(4, "little")
"""One token that every vocabulary has."""
TENANT = "probe"

R = TypeVar("R", bound=Reply)


@dataclass(frozen=True)
class Limits:
    """Time limits, in seconds."""

    reply_s: float
    """Time until the next reply."""
    first_token_s: float
    """Time until a prefill has computed one token, including what it has to compute before."""
    idle_s: float
    """Time within which a busy instance makes a step."""

    @classmethod
    def of(cls, deployment: Deployment) -> Limits:
        """Return limits above the times of a fully loaded engine, below those of a useless one."""
        gateway = deployment.gateway
        ttft_limits = [scenario.ttft_limit_ms or 0 for scenario in deployment.served]
        first_token_s = max(gateway.ttft_limit_ms, *ttft_limits) / 1e3
        held_s = max(deployment.prefill.kept_s, deployment.transfer.timeout_s)
        return cls(gateway.stall_s, first_token_s, 2 * max(first_token_s, held_s))


class Probes:
    """Probes of instances, which hold nothing for them afterwards.

    Args:
        channel: returns the channel to an instance.
        assignments: says which prefills there are; an instance that has another assignment is noted
            there, and has not failed.
        steps: returns how many forwards or steps of its model an instance has made so far.
        limits: time limits of replies and steps.
    """

    def __init__(
        self,
        channel: Callable[[str], Channel],
        assignments: Assignments,
        steps: Callable[[str], Awaitable[float]],
        limits: Limits,
    ) -> None:
        self._channel = channel
        self._assignments = assignments
        self._steps = steps
        self._limits = limits
        self._busy: dict[str, tuple[float, float]] = {}
        """Number of steps of an instance that was busy in each probe, and since when it is the
        same."""
        self._stream = uuid.uuid4().hex
        self._ids = itertools.count()
        self._turns = itertools.count()

    async def alive(self, instance: str) -> bool:
        """Check that an instance takes messages and answers them.

        Raises InstanceError if it does not.
        """
        await self._ask(instance, Release(self._id()), Released)
        return False

    async def computes(self, instance: str) -> bool:
        """Check that an instance does what its role is.

        False: it could not be seen, since it is busy, has no role or another one than was known, or
        no prefill has anything to decode.

        Raises:
            InstanceError: it has failed.
        """
        assignment = self._assignments.of(instance)
        role = "none" if assignment is None else assignment.role
        try:
            if role == "prefill":
                return await self._prefill(instance)
            return role == "decode" and await self._decode(instance)
        except Drained:
            self._busy.pop(instance, None)
            return False

    async def _prefill(self, instance: str) -> bool:
        """Compute one token; False: the prefill is busy."""
        request = self._prompt(only=True)
        with self._asked(instance, request) as replies:
            computed = await self._computed(instance, replies)
        return await self._computes(instance, computed is not None)

    async def _decode(self, instance: str) -> bool:
        """Decode one token after a prefill's.

        False: the decode is busy, or no prefill has one to give.
        """
        prefills = self._assignments.prefills(instance)
        if not prefills:
            return False
        prefill = prefills[next(self._turns) % len(prefills)]
        request = self._prompt(only=False)
        with self._asked(prefill, request) as replies:
            try:
                computed = await self._computed(prefill, replies)
            except InstanceError:
                return False  # the prefill's own probe reports it
            if computed is None:
                return False
            goes_on = await self._goes_on(instance, prefill, computed)
            if goes_on and computed.unseen:
                await self._ask(prefill, Transferred(request.id), Released)
            return goes_on

    async def _computed(self, instance: str, replies: Replies) -> Prefilled | None:
        limit = self._limits.first_token_s
        try:
            reply = await asyncio.wait_for(self._end(instance, replies), limit)
        except asyncio.TimeoutError as error:  # it has only reported its acceptance
            raise InstanceError(f"{instance} computed no token within {limit:g} s") from error
        if isinstance(reply, Prefilled | Busy):
            return None if isinstance(reply, Busy) else reply
        raise InstanceError(f"{instance} answered {reply} to a prompt")

    async def _computes(self, instance: str, shown: bool) -> bool:
        """Note whether an instance has shown that it computes, and return that.

        Raises:
            InstanceError: it has not, being busy, and has made no step for too long.
        """
        if shown:
            self._busy.pop(instance, None)
            return True
        now, steps = asyncio.get_running_loop().time(), await self._steps(instance)
        before, since = self._busy.get(instance, (-1.0, now))
        if steps != before:
            self._busy[instance] = steps, now
        elif now - since > self._limits.idle_s:
            raise InstanceError(f"{instance} is busy, and has made no step for {now - since:.0f} s")
        return False

    async def _goes_on(self, decode: str, prefill: str, computed: Prefilled) -> bool:
        request = DecodeRequest(
            id=self._id(),
            prompt=PROMPT,
            first_token=computed.token,
            handle=computed.handle,
            sampling=Sampling(),
            salt=TENANT,
            max_tokens=2,
            ignore_eos=True,
            min_interval_ms=0,
        )
        with self._asked(decode, request) as replies:
            reply = await self._end(decode, replies)
        if isinstance(reply, NotConnected):
            # The next probe will tell; a pair that cannot be connected has not failed.
            with contextlib.suppress(InstanceError):
                described = await self._ask(prefill, Describe(self._id()), Described)
                await self._ask(decode, Connect(self._id(), described.endpoint), Connected)
            return False
        if isinstance(reply, Tokens | Busy):
            return await self._computes(decode, isinstance(reply, Tokens))
        raise InstanceError(f"{decode} answered {reply} to a KV cache of {prefill}")

    async def _end(self, instance: str, replies: Replies) -> Reply:
        """Return the first reply that is neither an acceptance nor tokens with more to come.

        Raises Drained: the instance has another assignment, or serves no more.
        """
        while True:
            reply = await replies.get(self._limits.reply_s)
            if isinstance(reply, Reassigned):
                self._assignments.take(instance, reply.assignment)
            if isinstance(reply, Reassigned) or _drained(reply):
                raise Drained(f"{instance} serves no more under this assignment")
            unfinished = isinstance(reply, Tokens) and not reply.finish_reason
            if not isinstance(reply, Accepted) and not unfinished:
                return reply

    async def _ask(self, instance: str, request: Request, wanted: type[R]) -> R:
        channel = self._channel(instance)
        replies = channel.open(request.id, request)
        try:
            reply = await replies.get(self._limits.reply_s)
        finally:
            channel.forget(request.id)
        if not isinstance(reply, wanted):
            raise InstanceError(f"{instance} answered {reply} to {request}")
        return reply

    @contextlib.contextmanager
    def _asked(self, instance: str, request: Request) -> Iterator[Replies]:
        """Send a request and give its replies; the instance holds nothing for it afterwards."""
        channel = self._channel(instance)
        try:
            yield channel.open(request.id, request)
        finally:
            channel.forget(request.id)
            release = self._id()
            channel.open(release, Release(request.id))
            channel.forget(release)

    def _prompt(self, only: bool) -> PrefillRequest:
        return PrefillRequest(
            id=self._id(),
            prompt=PROMPT,
            sampling=Sampling(),
            salt=TENANT,
            deadline_ms=self._limits.first_token_s * 1e3,
            only=only,
        )

    def _id(self) -> str:
        return f"{self._stream}-{next(self._ids)}"


def _drained(reply: Reply) -> bool:
    return isinstance(reply, Failed) and reply.code == Drained.code
