"""What a watchdog tells the gateways: a process of an instance is gone, wait for it no longer.

Sealed with the deployment's key: whoever reaches a gateway's port could otherwise break all that
an instance is doing. Said again, it does nothing: it names one process, and a gateway that has
heard of another one since ignores it. So no clock and no memory is needed.
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
    """Of the process that is gone; see `pdserve.node.epoch`."""


ALIVE = FailureNotice("", bytes(EPOCH_BYTES))
"""Of no instance: a gateway that answers it lives."""


def encode(notice: FailureNotice, key: bytes) -> str:
    """The notice as a request parameter, sealed."""
    return base64.b64encode(seal(notice, key)).decode()


def decode(text: str, key: bytes) -> FailureNotice:
    """What a watchdog has told.

    Raises:
        InvalidRequest: this is not of the deployment's own.
    """
    try:
        return unseal(base64.b64decode(text, validate=True), FailureNotice, key)
    except (binascii.Error, ValueError, HandleError) as error:
        raise InvalidRequest(
            f"failure_notice: only a watchdog of this deployment may say so: {error}"
        ) from error
