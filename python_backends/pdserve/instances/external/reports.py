"""An engine's reports of its own memory, as metrics."""

from __future__ import annotations

import asyncio
import logging

from pdserve.engines.external import EngineTerms
from pdserve.observability import catalogue
from pdserve.observability.metrics import Registry

_log = logging.getLogger(__name__)

REPORT_S = 2.0


class Reports:
    """Publishes the reports of one instance's engine as metrics."""

    def __init__(self, name: str, engine: EngineTerms, metrics: Registry) -> None:
        self._name = name
        self._engine = engine
        self._metrics = metrics

    async def run(self) -> None:
        """Run until cancelled; an engine that fails to report is not asked again."""
        try:
            while True:
                report = await self._engine.report()
                for state, blocks in report.blocks.items():
                    self._metrics.set(catalogue.KV_BLOCKS, blocks, instance=self._name, state=state)
                for kind, count in report.events.items():
                    self._metrics.add(catalogue.KV_EVENTS, count, instance=self._name, type=kind)
                await asyncio.sleep(REPORT_S)
        except Exception as error:  # missing metrics are no reason to end an instance
            _log.warning("%s: no metrics of the engine's memory: %r", self._name, error)
