"""What a watchdog tells the gateways: the process of an instance is gone, wait for it no longer.

Sealed with the deployment's key, and good once: whoever reaches a gateway's port could otherwise
break all that an instance is doing, as often as it likes.
"""

from __future__ import annotations

import base64
import binascii

from msgspec import Struct

from pdserve.errors import HandleError, InvalidRequest
from pdserve.kvcache.handle import seal, unseal

FRESH_S = 60.0
"""As much may the clocks of two hosts differ."""


class Lost(Struct, frozen=True, array_like=True):
    """Of one instance."""

    instance: str
    at: float
    """Seconds since the epoch."""


def told(lost: Lost, key: bytes) -> str:
    """As a request parameter."""
    return base64.b64encode(seal(lost, key)).decode()


class Losses:
    """Those that a gateway has heard of."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._latest: dict[str, float] = {}

    def heard(self, text: str, now: float) -> str:
        """The instance that is lost.

        Args:
            now: seconds since the epoch.

        Raises:
            InvalidRequest: this is not of the deployment's own, is old, or was heard before.
        """
        try:
            lost = unseal(base64.b64decode(text, validate=True), Lost, self._key)
        except (binascii.Error, ValueError, HandleError) as error:
            raise InvalidRequest(
                f"lost: only a watchdog of this deployment may say so: {error}"
            ) from error
        if not abs(now - lost.at) < FRESH_S or lost.at <= self._latest.get(lost.instance, 0.0):
            raise InvalidRequest(
                f"lost: {lost.instance}: said {now - lost.at:.1f} s ago, or before"
            )
        self._latest[lost.instance] = lost.at
        return lost.instance
