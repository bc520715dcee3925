"""The asynchronous side of the torch engine: one thread per instance computes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from pdserve import pools
from pdserve.engines.protocol import DecodeSequence, PrefillJob
from pdserve.engines.pytorch.decode import TorchDecode
from pdserve.engines.pytorch.model import TorchModel
from pdserve.engines.pytorch.prefill import TorchPrefill
from pdserve.transfer.arrays import Array


class ThreadedPrefill:
    """Implements ``PrefillEngine``."""

    def __init__(self, model: TorchModel) -> None:
        self._model = model
        self._compute = TorchPrefill(model)
        self._thread = pools.started(1, "prefill")

    async def prefill(self, jobs: Sequence[PrefillJob]) -> list[int]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._prefill, jobs)

    def _prefill(self, jobs: Sequence[PrefillJob]) -> list[int]:
        for job in jobs:
            job.copy_prefix()
        return self._compute.prefill(jobs)

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._model.reclaim()


class ThreadedDecode:
    """Implements ``DecodeEngine``."""

    def __init__(self, model: TorchModel, blocks: int, block_size: int) -> None:
        self._model = model
        self._compute = TorchDecode(model, blocks, block_size)
        self._thread = pools.started(1, "decode")

    @property
    def pool(self) -> Array:
        return self._compute.pool

    def joined(self, sequence: DecodeSequence) -> None:
        """Do nothing: a step reads the pool."""

    async def prefill(self, sequence: DecodeSequence, begin: int, end: int) -> int | None:
        loop = asyncio.get_running_loop()
        prefill = self._compute.prefill
        return await loop.run_in_executor(self._thread, prefill, sequence, begin, end)

    async def step(self, batch: Sequence[DecodeSequence]) -> list[int]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._compute.step, batch)

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._compute.close()
        self._model.reclaim()
