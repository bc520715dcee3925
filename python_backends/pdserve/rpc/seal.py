"""Messages to an instance with a MAC: only senders with the deployment's key are accepted.

A sealed message is 16 bytes of MAC (keyed BLAKE2b), 8 bytes of a number, little-endian, and the
message. The number is that of the assignment under which the sender knows the instance
(``pdserve.control.assignment``). The MAC covers both; its key is derived from the deployment's key
and the instance's name, so that a message to one instance is not valid for another.
"""

from __future__ import annotations

import hashlib
import time
from hmac import compare_digest

from pdserve.errors import PDServeError

MAC_BYTES = 16
NUMBER_BYTES = 8
_PERSON = b"pdserve message"

LOG_EVERY_S = 10.0
"""Interval of the log lines, since anyone who reaches the port can send anything, at any rate."""


class Unsealed(PDServeError):
    """A message was not sealed with this deployment's key.

    The text is constant, so that it reveals nothing.
    """

    def __init__(self) -> None:
        super().__init__(
            "the message is not sealed with the key of this deployment "
            "(transfer.key_file has to be the same file on all hosts)"
        )


class Seal:
    """Seals and opens the messages to one instance, under the deployment's key."""

    def __init__(self, key: bytes, instance: str) -> None:
        own = hashlib.blake2b(instance.encode(), key=key, person=_PERSON).digest()
        self._keyed = hashlib.blake2b(digest_size=MAC_BYTES, key=own, person=_PERSON)

    def close(self, message: bytes, number: int) -> bytes:
        """Return the message, preceded by its MAC and the number of an assignment, or ANY."""
        body = number.to_bytes(NUMBER_BYTES, "little") + message
        return self._mac(body) + body

    def open(self, data: memoryview, most: int) -> tuple[int, memoryview]:
        """Return the number and the message, after their MAC has been verified.

        Args:
            most: maximum bytes of a message; of a longer one not even the MAC is computed.

        Raises:
            Unsealed: the message is cut short, altered, too long, for another instance or under
                another key.
        """
        mac, body = bytes(data[:MAC_BYTES]), data[MAC_BYTES:]
        if not NUMBER_BYTES <= len(body) <= NUMBER_BYTES + most:
            raise Unsealed
        if not compare_digest(mac, self._mac(body)):
            raise Unsealed
        return int.from_bytes(body[:NUMBER_BYTES], "little"), body[NUMBER_BYTES:]

    def _mac(self, body: bytes | memoryview) -> bytes:
        keyed = self._keyed.copy()
        keyed.update(body)
        return keyed.digest()


class Refusals:
    """Counts refused messages, and reports them from time to time."""

    def __init__(self) -> None:
        self._count = 0
        self._next = 0.0

    def refused(self, instance: str) -> str | None:
        """Count a refused message.

        Return a line to log, at most once every ``LOG_EVERY_S`` seconds.
        """
        self._count += 1
        now = time.monotonic()
        if now < self._next:
            return None
        self._next = now + LOG_EVERY_S
        count, self._count = self._count, 0
        return (
            f"{instance}: {count} messages were not sealed with this deployment's key: "
            f"a stranger's, or those of a host whose transfer.key_file is another"
        )
