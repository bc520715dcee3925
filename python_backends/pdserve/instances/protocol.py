"""The interface of instances: what a gateway may ask of any, and of one in each role."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal, Protocol

from pdserve import errors
from pdserve.rpc.messages import (
    Connect,
    DecodeRequest,
    Describe,
    Failed,
    PrefillRequest,
    Release,
    Reply,
    Request,
    Transferred,
    Unlink,
    Watch,
)

Send = Callable[[Reply, bool], None]
"""Sends a reply; the flag is True with the last one."""


Sent = Callable[[Callable[[], None]], None]
"""Calls a function in the event loop, once the server has all replies that were sent before."""


RELEASED = Failed(errors.Cancelled.code, "released")
"""The last reply to a request that its gateway has released."""


def sent_at_once(then: Callable[[], None]) -> None:
    """Implement ``Sent`` where a reply has arrived as soon as it is sent."""
    then()


class Instance(Protocol):
    """One engine in one role; used in its event loop, but for its making."""

    @property
    def context_length(self) -> int:
        """Return the maximum tokens of prompt and answer together."""

    def start(self, sent: Sent = sent_at_once) -> None:
        """Begin to work; called once in the running loop."""

    async def close(self) -> None:
        """End all requests and watches, and close the engine and its memory."""

    def release(self, request_id: str, send: Send) -> None:
        """Give up a request, or end a watch; it is no error if there is none of that id."""

    def watch(self, request: Watch, stream: str, send: Send) -> None:
        """Report once when there may be room for this gateway.

        Args:
            stream: the gateway's connection.
        """

    @property
    def used(self) -> int:
        """Return the number of slots that requests hold."""

    @property
    def leases(self) -> int:
        """Return the number of KV caches that a decode may still read, quarantined ones included.

        Each of them that no decode has begun to read holds a slot, too.
        """

    @property
    def memory(self) -> bytes:
        """Return the epoch of the memory that decodes link to; empty: there is none."""

    def assign(self, number: int) -> None:
        """Name this assignment in handles and in the endpoint from now on; it holds nothing."""

    def end_watches(self, reply: Reply) -> None:
        """End all watches with this reply."""

    def end_all(self, failed: Failed) -> None:
        """Give up all requests, soon; those that are not answered yet get this reply."""


class PrefillRole(Instance, Protocol):
    """An instance that computes the KV caches and first tokens of prompts."""

    role: ClassVar[Literal["prefill"]]

    def submit(self, request: PrefillRequest, send: Send) -> None:
        """Accept or reject at once; ``send`` gets the rejection or, later, the result."""

    def describe(self, send: Send) -> None:
        """Send how its KV caches are reached."""

    def transferred(self, request_id: str, send: Send) -> None:
        """Note that a decode has the KV cache.

        Raises:
            InstanceError: this prefill sees that by itself. Only one whose ``Prefilled`` says that
                the transfer is ``unseen`` is told.
        """


class DecodeRole(Instance, Protocol):
    """An instance that generates the tokens after the first one."""

    role: ClassVar[Literal["decode"]]

    def submit(self, request: DecodeRequest, send: Send) -> None:
        """Accept or reject at once; ``send`` gets the rejection or, later, the tokens."""

    def connect(self, request: Connect, send: Send) -> None:
        """Connect to a prefill; ``send`` gets how it is reached, or the error."""

    def unlink(self, request: Unlink, send: Send) -> None:
        """Close the link to a prefill; ``send`` gets ``Unlinked`` once nothing uses it."""


def dispatch(instance: PrefillRole | DecodeRole, request: Request, stream: str, send: Send) -> None:
    """Hand a request to an instance.

    Args:
        stream: the connection that the request came over.

    Raises:
        InstanceError: it is not for an instance of this role.
    """
    match request:
        case Release():
            instance.release(request.id, send)
        case Watch():
            instance.watch(request, stream, send)
        case PrefillRequest() if instance.role == "prefill":
            instance.submit(request, send)
        case DecodeRequest() if instance.role == "decode":
            instance.submit(request, send)
        case Describe() if instance.role == "prefill":
            instance.describe(send)
        case Transferred() if instance.role == "prefill":
            instance.transferred(request.id, send)
        case Connect() if instance.role == "decode":
            instance.connect(request, send)
        case Unlink() if instance.role == "decode":
            instance.unlink(request, send)
        case _:
            kind = type(instance).__name__
            raise errors.InstanceError(f"a {type(request).__name__} came to a {kind}")
