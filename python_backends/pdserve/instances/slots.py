"""The slots of an instance, as metrics: the same for every kind of engine and for both roles."""

from __future__ import annotations

from pdserve.instances.slot_watches import SlotWatches
from pdserve.observability import catalogue
from pdserve.observability.metrics import Registry


class TimeIntegral:
    """The integral over time of a number, such as that of the slots in use."""

    def __init__(self) -> None:
        self._number = 0
        self._since = 0.0
        self._seconds = 0.0

    def change(self, number: int, now: float) -> None:
        """Note what the number is from ``now`` (``loop.time()``) on."""
        self._seconds += self._number * (now - self._since)
        self._number, self._since = number, now

    def drain(self, now: float) -> float:
        """Return the integral since the last call, in seconds."""
        self.change(self._number, now)
        seconds, self._seconds = self._seconds, 0.0
        return seconds


def show(
    metrics: Registry,
    name: str,
    used: int,
    slots: int,
    watches: SlotWatches,
    slot_s: float,
    busy_s: float = 0.0,
) -> None:
    """Set the metrics of used and free slots, and of the gateways that wait.

    Args:
        slot_s: slot-seconds since the last call.
        busy_s: seconds since the last call in which the engine had a request, where its instance
            does not count them itself.
    """
    metrics.set(catalogue.SLOTS, used, instance=name, state="used")
    metrics.set(catalogue.SLOTS, slots - used, instance=name, state="free")
    metrics.set(catalogue.SLOT_WATCHES, len(watches), instance=name)
    if slot_s:
        metrics.add(catalogue.SLOT_SECONDS, slot_s, instance=name)
    if busy_s:
        metrics.add(catalogue.BUSY_SECONDS, busy_s, instance=name)
