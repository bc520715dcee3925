"""Tests for two gateways, two prefill workers and two decode workers, one server each."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain, pairwise
from typing import TYPE_CHECKING

import msgspec
import pytest

from pdctl.paths import ROOT
from pdctl.status import status
from pdserve import config
from tests.clients import Answer, connected, generate, stream, wait_linked, wait_until
from tests.servers import START_TIMEOUT_S, Running, emulated_deployment, running

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pdctl.server import Server

pytestmark = [pytest.mark.triton, pytest.mark.alone]

GATEWAYS = ("gateway_0", "gateway_1")
WORKERS = {
    "worker_0": "prefill_0",
    "worker_1": "prefill_1",
    "worker_2": "decode_0",
    "worker_3": "decode_1",
}


def example() -> config.Deployment:
    return config.load(ROOT / "deployments" / "gateway-and-workers.yaml")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The example with emulated engines: 0.5 ms per prompt token, 5 ms per step."""
    folder = tmp_path_factory.mktemp("workers")
    emulated = emulated_deployment(
        folder,
        {"prefill": {"per_token_ms": 0.5}, "decode": {"base_ms": 5}},
        prefill=config.Prefill(arena_mib=16),
        gateway=config.Gateway(ttft_limit_ms=10_000),
        transfer=config.Transfer(key_file=str(folder / "kv.key")),
    )
    deployment = msgspec.structs.replace(emulated, servers=example().servers)
    with running(deployment, folder) as server:
        yield server


@pytest.fixture
def workers(shared: Running) -> Running:
    """Start all of them, and wait until they are linked."""
    for server in shared.servers:
        if server.pid is None:
            server.start(held=True)
            server.wait_ready(START_TIMEOUT_S)
    for name in GATEWAYS:
        wait_linked(at(shared, name), 20)
    return shared


def named(workers: Running, name: str) -> Server:
    return next(server for server in workers.servers if server.spec.name == name)


def at(workers: Running, gateway: str) -> Running:
    """Return the same deployment, with requests to this gateway."""
    server = named(workers, gateway)
    return dataclasses.replace(workers, http=server.http, grpc=server.grpc, metrics=server.metrics)


def ask_many(workers: Running, gateway: str, count: int, words: str = "question") -> list[Answer]:
    """Send the requests, eight at a time."""

    def one(number: int) -> Answer:
        text = f"{words} {gateway} {number} and what else there is to say about it"
        return generate(at(workers, gateway), text_input=text, max_tokens=8, ignore_eos=True)

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(one, range(count)))


def served(answers: list[Answer], role: str) -> set[str]:
    assert all(answer.stats["output_tokens"] == 8 for answer in answers)
    return {answer.stats[role] for answer in answers}


def test_each_worker_holds_one_instance_and_no_gateway(workers: Running) -> None:
    held = {one["server"]: set(one["models"]) for one in map(status, workers.servers)}
    assert {name: held[name] for name in WORKERS} == {
        name: {instance} for name, instance in WORKERS.items()
    }
    assert all(status(server)["state"] == "ready" for server in workers.servers)
    assert {s.name for s in example().servers} == {*GATEWAYS, *WORKERS}


def test_either_gateway_reaches_every_instance(workers: Running) -> None:
    with ThreadPoolExecutor(2) as pool:
        of_each = list(pool.map(partial(ask_many, workers, count=96), GATEWAYS))
    for answers in of_each:
        assert served(answers, "prefill") == {"prefill_0", "prefill_1"}
        assert served(answers, "decode") == {"decode_0", "decode_1"}
        share = Counter(answer.stats["prefill"] for answer in answers)
        assert min(share.values()) >= 24, share


def test_gateways_give_the_same_answer(workers: Running) -> None:
    one, other = (
        generate(at(workers, name), text_input="Hello", max_tokens=24, ignore_eos=True)
        for name in GATEWAYS
    )
    assert one.text == other.text


@pytest.mark.parametrize(
    ("worker", "role", "others"),
    [("worker_0", "prefill", {"prefill_1"}), ("worker_3", "decode", {"decode_0"})],
)
def test_one_worker_stopped_the_other_serves(
    workers: Running, worker: str, role: str, others: set[str]
) -> None:
    """Both gateways have load, and no request is lost; the worker serves again once it is back."""
    stopped = threading.Event()

    def load(gateway: str) -> list[Answer]:
        answers = []
        while not stopped.is_set():
            answers += ask_many(workers, gateway, 24)
        return answers

    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(load, name) for name in GATEWAYS]
        named(workers, worker).stop()
        stopped.set()
        answers = list(chain.from_iterable(one.result() for one in asked))
    assert served(answers, role) >= others
    for name in GATEWAYS:
        assert served(ask_many(workers, name, 8), role) == others

    named(workers, worker).start(held=True)
    named(workers, worker).wait_ready(START_TIMEOUT_S)
    for name in GATEWAYS:
        wait_until(
            partial(both_serve, workers, name, role), 20, lambda: f"{worker} is not used again"
        )


def both_serve(workers: Running, gateway: str, role: str) -> bool:
    return len(served(ask_many(workers, gateway, 8, "again"), role)) == 2


def test_a_gateway_stopped_the_other_is_unaffected(workers: Running) -> None:
    async def stream_meanwhile() -> Answer:
        parts = []
        asked = {"input_ids": [9] * 8, "max_tokens": 600, "ignore_eos": True, "stream": True}
        async with connected(at(workers, "gateway_1")) as client:
            async for part in stream(client, "scheduler", **asked):
                parts.append(part)
                if len(parts) == 3:
                    stopping = asyncio.create_task(
                        asyncio.to_thread(named(workers, "gateway_0").stop)
                    )
            await stopping
        return Answer(parts)

    answer = asyncio.run(stream_meanwhile())
    assert len(answer.ids) == 600
    assert answer.stats["attempts"] == 1
    gaps = [after.at - before.at for before, after in pairwise(answer.parts)]
    assert max(gaps) < 0.5, "no part of the stream waited for the gateway that was stopped"
    assert len(served(ask_many(workers, "gateway_1", 16), "prefill")) == 2


def test_the_example_is_as_it_stands(tmp_path: Path) -> None:
    """Its model and key are in the checkout, and no two servers share a port."""
    deployment = example()
    assert deployment.model == str(ROOT / ".cache" / "models" / "SmolLM2-135M-Instruct")
    assert deployment.transfer.key_file == str(ROOT / "kv.key")
    assert deployment.engine == config.Engine(threads=1)
