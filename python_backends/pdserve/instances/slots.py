"""The slots of an instance, as metrics: the same for every kind of engine and for both roles."""

from __future__ import annotations

from pdserve.instances.slot_watches import SlotWatches
from pdserve.observability import catalogue
from pdserve.observability.metrics import Registry


def show(metrics: Registry, name: str, used: int, slots: int, watches: SlotWatches) -> None:
    """Set the metrics of used and free slots, and of the gateways that wait."""
    metrics.set(catalogue.SLOTS, used, instance=name, state="used")
    metrics.set(catalogue.SLOTS, slots - used, instance=name, state="free")
    metrics.set(catalogue.SLOT_WATCHES, len(watches), instance=name)
