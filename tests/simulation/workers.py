"""The workers of a world, each with a prefill or a decode, from one life to the next."""

from __future__ import annotations

import tempfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from pdserve.control import first_state
from pdserve.instances.decode import DecodeInstance
from pdserve.instances.kv_exports import MAX_QUARANTINED
from pdserve.instances.prefill import PrefillInstance
from pdserve.kvcache.sharding import Sharding
from pdserve.observability.metrics import Registry
from pdserve.transfer.consumer.probe import Probe
from pdserve.transfer.consumer.receiver import Receiver
from pdserve.transfer.endpoint import Terms
from pdserve.transfer.producer.holder import Holder, region_name
from pdserve.transfer.transports.shm import ShmTransport
from tests.simulation.channels import Life, Worker
from tests.simulation.loop import Loop, Process
from tests.simulation.memory import Network, Transport, VirtualStaging
from tests.unit.inprocess import EOS, Decode, Model, Prefill, assigned, model

if TYPE_CHECKING:
    from collections.abc import Callable

    from pdserve.control.assignment import Assignment
    from tests.simulation.plan import Plan

STAGING = 8, 2048
"""The number of buffers, and the bytes of each: few enough that pulls wait for one another."""
PULLS = 4
PROBED = ((1, 1, 1), (1, 4, 2)), 1, 1024
"""The probe is small: the plan says what a link can do, and measuring takes time and memory."""


class Workers:
    """The workers of a world, by name; none has begun.

    Args:
        begun: called with each life before it does anything.
    """

    def __init__(self, plan: Plan, loop: Loop, begun: Callable[[Life], None]) -> None:
        self._begun = begun
        self.model = _model(msgspec.json.encode(plan.profile))
        first = first_state.assignments(plan.deployment())
        prefills, decodes = plan.names.by_role["prefill"], plan.names.by_role["decode"]
        self.prefills = [Worker(name, first[name]) for name in prefills]
        self.decodes = [Worker(name, first[name]) for name in decodes]
        self._plan = plan
        self._loop = loop
        self._by_name = {worker.name: worker for worker in self}
        self._parted: dict[tuple[str, str], float] = {}
        self._holders: dict[str, tuple[str, Process]] = {}
        """The name and the process of the holder of each region, by the region's name."""

    def __iter__(self) -> Any:
        return iter((*self.prefills, *self.decodes))

    def get(self, name: str) -> Worker | None:
        return self._by_name.get(name)

    @property
    def lives(self) -> list[Life]:
        return [worker.life for worker in self if worker.life is not None]

    def start(self, worker: Worker) -> None:
        """Begin a new life of a worker."""
        process = Process(self._loop, worker.name)
        made = self._prefill if worker in self.prefills else self._decode
        instance, memory = process.run(made, worker.name, process)

        def keep(assignment: Assignment) -> None:
            worker.assignment = assignment

        one = assigned(worker.name, instance, worker.assignment, keep)
        worker.life = Life(process, instance, memory, one)
        worker.unplugged = False
        self._begun(worker.life)
        process.run(one.start)

    async def kill(self, worker: Worker, silently: bool) -> Life | None:
        """End a worker's life, and return it; None: there was none."""
        life, worker.life, worker.unplugged = worker.life, None, silently
        if life is not None:
            await life.process.end()
            life.memory.close()
        return life

    def part(self, prefill: str, decode: str, seconds: float) -> None:
        """Keep a decode from reaching a prefill's memory for some seconds."""
        self._parted[prefill, decode] = self._loop.time() + seconds

    def _prefill(self, name: str, process: Process) -> tuple[PrefillInstance, Holder]:
        plan = self._plan
        slots = plan.prefill.slots + MAX_QUARANTINED
        region, ways = region_name(name), [ShmTransport()]
        holder = Holder(name, region, plan.arena_bytes, slots, self._terms, ways)
        self._holders[region] = name, process
        engine = Prefill(self.model)
        instance = PrefillInstance(name, self.model, engine, plan.prefill, holder, Registry())
        return instance, holder

    def _decode(self, name: str, process: Process) -> tuple[DecodeInstance, Receiver]:
        plan, loop = self._plan, self._loop

        def cut(region: str) -> bool:
            return loop.time() < self._parted.get((self._holders[region][0], name), 0.0)

        def alive(region: str) -> bool:
            return self._holders[region][1].alive

        network = Network(loop.clock, plan.latency_s, plan.bytes_per_s, cut, alive)
        engine = Decode(self.model, plan.decode.blocks, plan.decode.block_size)
        staging = VirtualStaging(np.ones(STAGING, np.uint8), loop.clock)
        receiver = Receiver(
            self._terms,
            [Transport(process, network)],
            engine.pool,
            staging,
            strategy=plan.strategy,
            timeout_s=plan.timeout_s,
            clock=loop.clock,
            probe=Probe(staging, loop.clock, *PROBED),
        )
        instance = DecodeInstance(
            name,
            self.model,
            engine,
            plan.decode,
            receiver,
            PULLS,
            plan.prefill.batch_tokens,
            Registry(),
            # Calls run in threads of virtual time, so the threads of the pools are not needed.
            ThreadPoolExecutor,
        )
        return instance, receiver

    @property
    def _terms(self) -> Terms:
        return Terms(self.model.fingerprint, self.model.layout, b"k" * 32, Sharding())


@lru_cache(None)
def _model(profile: bytes) -> Model:
    """Make the model. Some of its answers end by themselves."""
    with tempfile.TemporaryDirectory() as folder:
        made = model(Path(folder), **msgspec.json.decode(profile))

    def script(prompt: Any, position: int) -> int | None:
        return EOS if position == zlib.crc32(prompt.tobytes()) % 64 else None

    made.script = script
    return made
