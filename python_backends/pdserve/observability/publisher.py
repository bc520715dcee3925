"""Publishes the counts of a registry by Triton's metric API."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from pdserve import supervision
from pdserve.observability.metrics import Change, Labels, Registry

PUBLISH_S = 0.25

_log = logging.getLogger(__name__)


class Publisher:
    """Publishes a registry's changes every PUBLISH_S seconds.

    A change that Triton does not accept stops no other: it is logged once, and tried again with the
    next ones until Triton accepts it.

    Args:
        family: Triton's ``MetricFamily``.
    """

    def __init__(self, registry: Registry, family: Any) -> None:
        self._registry = registry
        self._family = family
        self._families: dict[str, Any] = {}
        self._metrics: dict[tuple[str, Labels], Any] = {}
        self._owed: dict[tuple[str, Labels], Change] = {}
        """Changes that Triton has not accepted."""

    async def run(self) -> None:
        """Publish until cancelled, in another thread: each call waits for the server."""
        await supervision.repeat("publishing metrics", self._turn)

    async def _turn(self) -> float:
        changes = list(self._registry.drain())
        if changes or self._owed:
            await asyncio.get_running_loop().run_in_executor(None, self._publish, changes)
        return PUBLISH_S

    def _publish(self, changes: list[Change]) -> None:
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
        metric = self._metrics.get(change.key)
        if metric is None:
            metric = self._metrics[change.key] = self._metric(change)
        if change.kind == "counter":
            metric.increment(change.value)
        else:
            metric.set(change.value)

    def _metric(self, change: Change) -> Any:
        family = self._families.get(change.name)
        if family is None:
            family = self._families[change.name] = self._family(
                name=change.name,
                description=change.help_text,
                kind=getattr(self._family, change.kind.upper()),
            )
        return family.Metric(labels=dict(change.labels))
