"""Publishes the counts of a registry by Triton's metric API."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import Any

from pdserve import supervision
from pdserve.observability.metrics import Change, Labels, Registry

PUBLISH_S = 0.25
COUNTS_EVERY = 2
"""Counters and histograms, which change with every request, are published every so many turns."""

_log = logging.getLogger(__name__)


class Publisher:
    """Publishes a registry's gauges every PUBLISH_S seconds, the rest less often.

    A change that Triton does not accept stops no other: it is logged once, and tried again with the
    next ones until Triton accepts it.

    Args:
        family: Triton's ``MetricFamily``.
        look: called before each publication, to set gauges.
    """

    def __init__(
        self, registry: Registry, family: Any, look: Callable[[], None] = lambda: None
    ) -> None:
        self._registry = registry
        self._look = look
        self._turns = 0
        self._family = family
        self._families: dict[str, Any] = {}
        self._metrics: dict[tuple[str, Labels], Any] = {}
        self._gauges: dict[tuple[str, Labels], Change] = {}
        """The gauges that Triton shows, with their values."""
        self._owed: dict[tuple[str, Labels], Change] = {}
        """Changes that Triton has not accepted."""
        # A publication goes on in its thread when ``run`` is cancelled.
        self._lock = threading.Lock()

    async def run(self) -> None:
        """Publish until cancelled, in another thread: each call waits for the server."""
        await supervision.repeat("publishing metrics", self._turn)

    async def close(self) -> None:
        """Publish for the last time, and end all gauges, since their process ends."""
        self._registry.drop()
        await self._publish_changes(counts=True)

    async def _turn(self) -> float:
        self._look()
        await self._publish_changes(counts=self._turns % COUNTS_EVERY == 0)
        self._turns += 1
        return PUBLISH_S

    async def _publish_changes(self, *, counts: bool) -> None:
        changes = list(self._registry.drain(counts=counts))
        if changes or self._owed:
            await asyncio.get_running_loop().run_in_executor(None, self._publish, changes)

    def _publish(self, changes: list[Change]) -> None:
        with self._lock:
            self._publish_alone(changes)

    def _publish_alone(self, changes: list[Change]) -> None:
        failed_before = {change.name for change in self._owed.values()}
        for change in changes:
            owed = self._owed.get(change.key)
            before = owed.value if owed is not None and change.kind == "counter" else 0
            self._owed[change.key] = change._replace(value=before + change.value)
        failed = {}
        for key, change in list(self._owed.items()):
            try:
                self._hand_over(change)
                del self._owed[key]
            except Exception as error:  # the others are published nevertheless
                failed[change.name] = error
        for name in failed.keys() - failed_before:
            _log.error("%s cannot be published: %r", name, failed[name])

    def _hand_over(self, change: Change) -> None:
        if change.kind == "gone":
            self._end(change)
            return
        metric = self._metrics.get(change.key)
        if metric is None:
            metric = self._metrics[change.key] = self._metric(change)
        if change.kind == "counter":
            metric.increment(change.value)
        else:
            metric.set(change.value)
            self._gauges[change.key] = change

    def _end(self, gone: Change) -> None:
        """End a gauge. Triton's family keeps its series, so it is made anew with the others."""
        self._gauges.pop(gone.key, None)
        if gone.key not in self._metrics:
            return
        for key in [key for key in self._metrics if key[0] == gone.name]:
            del self._metrics[key]
        del self._families[gone.name]
        for key, change in self._gauges.items():
            if key[0] == gone.name:
                self._hand_over(change)

    def _metric(self, change: Change) -> Any:
        family = self._families.get(change.name)
        if family is None:
            family = self._families[change.name] = self._family(
                name=change.name,
                description=change.help_text,
                kind=getattr(self._family, change.kind.upper()),
            )
        return family.Metric(labels=dict(change.labels))
