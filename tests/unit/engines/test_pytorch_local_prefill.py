"""Tests for the torch engine in its instances: local prefill gives the tokens of a prefill."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pytest

from pdserve import config
from pdserve.engines.pytorch.model import TorchModel
from pdserve.engines.pytorch.threads import ThreadedDecode, ThreadedPrefill
from pdserve.instances.decode import DecodeInstance
from pdserve.instances.kv_exports import MAX_QUARANTINED
from pdserve.instances.prefill import PrefillInstance
from pdserve.kvcache.sharding import sharding_for
from pdserve.observability.metrics import Registry
from pdserve.rpc.messages import DecodeRequest, Prefilled, PrefillRequest, Reply, Tokens
from pdserve.sampling import Sampling
from pdserve.transfer.consumer.receiver import Receiver
from pdserve.transfer.consumer.staging import Staging
from pdserve.transfer.endpoint import Terms
from pdserve.transfer.producer.holder import Holder, region_name
from tests.unit.engines.test_pytorch import CONFIGS, GREEDY, SEEDED, prompt, save
from tests.unit.inprocess import real
from tests.unit.transfers import transport

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

TURN = 32
SAMPLINGS = {
    "greedy": GREEDY,
    "seeded": SEEDED,
    "greedy, penalties": Sampling(repetition_penalty=1.5, frequency_penalty=0.5),
    "seeded, penalties": Sampling(temperature=0.9, seed=11, presence_penalty=1.0),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TorchModel:
    path = tmp_path_factory.mktemp("model")
    save(CONFIGS["llama, grouped"], path)
    return TorchModel(str(path), "cpu", "float32", 1)


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    cached: int = 0


class InstancePair:
    """A prefill and a decode instance."""

    def __init__(self, model: TorchModel) -> None:
        terms = Terms(model.fingerprint, model.layout, b"k" * 32, sharding_for(1, 1, 2))
        self.holder = Holder(
            "p", region_name("p"), 4 << 20, 4 + MAX_QUARANTINED, terms, [transport("shm")]
        )
        limits, metrics = config.Decode(blocks=100, response_cost_ms=0.0), Registry()
        engine = ThreadedDecode(model, limits.blocks, limits.block_size)
        staging = Staging(np.ones((2, 1 << 16), np.uint8))
        self.receiver = Receiver(terms, [transport("shm")], engine.pool, staging)
        self.p = PrefillInstance(
            "p",
            model,
            ThreadedPrefill(model),
            config.Prefill(arena_mib=4),
            self.holder,
            metrics,
        )
        self.d = DecodeInstance("d", model, engine, limits, self.receiver, 1, TURN, metrics)
        self._ids = 0

    async def answer(
        self,
        ids: Iterable[int],
        sampling: Sampling,
        *,
        local: bool,
        new: int = 12,
        resumed_tokens: int = 0,
    ) -> Answer:
        self._ids += 1
        loop, name = asyncio.get_running_loop(), str(self._ids)
        data, answer = np.array(ids, "<i4").tobytes(), Answer()
        handle, first = b"", None
        if not local:
            self.receiver.connect(self.holder.endpoint)
            handed: asyncio.Future[Reply] = loop.create_future()
            self.p.submit(
                PrefillRequest(name, data, sampling, "", 60_000.0, resumed_tokens),
                lambda reply, last: handed.set_result(reply) if last else None,
            )
            prefilled = await handed
            assert isinstance(prefilled, Prefilled)
            handle, first = prefilled.handle, prefilled.token
            answer.tokens.append(first)
        ended: asyncio.Future[Reply] = loop.create_future()

        def send(reply: Reply, last: bool) -> None:
            if isinstance(reply, Tokens):
                assert reply.start == len(answer.tokens)
                answer.tokens += np.frombuffer(reply.ids, "<i4").tolist()
                if reply.transfer is not None:
                    answer.cached = reply.transfer.cached
            if last:
                ended.set_result(reply)

        self.d.submit(
            DecodeRequest(name, data, first, handle, sampling, "", new, True, 0.0, resumed_tokens),
            send,
        )
        assert isinstance(await ended, Tokens)
        return answer


@asynccontextmanager
async def pair(model: TorchModel) -> AsyncIterator[InstancePair]:
    made = InstancePair(model)
    made.p.start()
    made.d.start()
    yield made
    await made.d.close()
    await made.p.close()


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("tokens", [1, 16, 32, 33, 64, 100])
def test_answers_are_those_of_a_prefill(model: TorchModel, tokens: int, sampling: Sampling) -> None:
    @real
    async def run() -> None:
        async with pair(model) as made:
            handed = await made.answer(prompt(tokens), sampling, local=False)
        async with pair(model) as made:
            for _ in range(2):
                local = await made.answer(prompt(tokens), sampling, local=True)
                assert local.tokens == handed.tokens
            # The first prompt is the prefix of the second.
            cached = 0 if sampling.reproducible else (tokens - 1) // 32 * 32
            assert local.cached == cached

    run()


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_answers_in_company(model: TorchModel, sampling: Sampling) -> None:
    """Prompts are computed while others run: long ones between steps, some with a cached prefix."""

    @real
    async def run() -> None:
        async with pair(model) as made:
            prefix = prompt(64)
            ids = [np.append(prefix, prompt(5 + i, i)) for i in range(6)]
            alone = [(await made.answer(each, sampling, local=False)).tokens for each in ids]
        async with pair(model) as made:
            long = asyncio.gather(
                *(made.answer(prompt(9, i), SEEDED, local=False, new=60) for i in range(3))
            )
            for each, expected in zip(ids, alone, strict=True):
                answer = await made.answer(each, sampling, local=True)
                assert answer.tokens == expected
            assert answer.cached == (0 if sampling.reproducible else 64)
            together = await long
        async with pair(model) as made:
            for i, answer in enumerate(together):
                again = await made.answer(prompt(9, i), SEEDED, local=True, new=60)
                assert again.tokens == answer.tokens

    run()


@pytest.mark.parametrize("name", ["greedy", "greedy, penalties", "seeded, penalties"])
def test_answer_that_another_pair_began_goes_on(model: TorchModel, name: str) -> None:
    @real
    async def run() -> None:
        sampling = SAMPLINGS[name]
        async with pair(model) as made:
            whole = (await made.answer(prompt(40), sampling, local=False, new=20)).tokens
        async with pair(model) as made:
            for done in (1, 7, 19):
                begun = np.append(prompt(40), whole[:done])
                rest = await made.answer(
                    begun, sampling, local=True, new=20 - done, resumed_tokens=done
                )
                assert rest.tokens == whole[done:]

    run()
