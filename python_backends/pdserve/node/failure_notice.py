"""The message by which a watchdog tells the gateways that a process of an instance is gone.

A controller asks by the same message whether an instance answers the gateway.

It is sealed with the deployment's key, since otherwise anyone who reaches a gateway's port could
break all work of an instance. Repeated, it has no effect: it names one process, and a gateway that
has had a reply from another one since ignores it. So it needs no clock and no memory.
"""

from __future__ import annotations

import base64
import binascii

from msgspec import Struct

from pdserve.errors import HandleError, InvalidRequest
from pdserve.kvcache.handle import EPOCH_BYTES, Epoch, seal, unseal


class FailureNotice(Struct, frozen=True, array_like=True):
    """Says that the process of an instance is gone."""

    instance: str
    epoch: Epoch
    """Epoch of the process that is gone; see `pdserve.node.epoch`."""


ALIVE = FailureNotice("", bytes(EPOCH_BYTES))
"""A notice of no instance: a gateway that answers it is alive."""


def question(instance: str) -> FailureNotice:
    """Return a notice of no process: a gateway says whether the instance answers it."""
    return FailureNotice(instance, bytes(EPOCH_BYTES))


def is_question(notice: FailureNotice) -> bool:
    return notice.instance != "" and notice.epoch == bytes(EPOCH_BYTES)


def encode(notice: FailureNotice, key: bytes) -> str:
    """Return the notice as a request parameter, sealed."""
    return base64.b64encode(seal(notice, key)).decode()


def decode(text: str, key: bytes) -> FailureNotice:
    """Return a watchdog's notice.

    Raises:
        InvalidRequest: the notice is not of this deployment.
    """
    try:
        return unseal(base64.b64decode(text, validate=True), FailureNotice, key)
    except (binascii.Error, ValueError, HandleError) as error:
        raise InvalidRequest(
            f"failure_notice: only a watchdog of this deployment may say so: {error}"
        ) from error
