"""Tests that the tokens are the same over every transport, strategy and sharding."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import msgspec
import pytest

from pdserve.config import Decode, Prefill, Server, Transfer
from tests.clients import ask, connected, wait_idle
from tests.corpus import corpus
from tests.servers import default_deployment, emulated_deployment, running

if TYPE_CHECKING:
    from pathlib import Path

    from tests.clients import Answer
    from tests.reference import Reference
    from tests.servers import Running

pytestmark = pytest.mark.triton

PROMPTS, LONGEST, TOKENS = 8, 400, 8
WAYS = [
    # transport, strategy, ranks of prefill and decode
    pytest.param("shm", "layered", 1, 1),
    pytest.param("nixl", "whole", 3, 1),
    pytest.param("nixl", "direct", 1, 3),
    pytest.param("nixl", "layered", 3, 3),
    pytest.param("shm", "whole", 3, 6, marks=pytest.mark.full),
    pytest.param("nixl", "auto", 1, 1, marks=pytest.mark.full),
    pytest.param("nixl", "whole", 1, 1, marks=pytest.mark.full),
    pytest.param("nixl", "direct", 3, 1, marks=pytest.mark.full),
    pytest.param("nixl", "layered", 1, 3, marks=pytest.mark.full),
]


@pytest.mark.parametrize(("transport", "strategy", "n", "m"), WAYS)
def test_tokens_are_transformers_own(
    reference: Reference, tmp_path: Path, transport: str, strategy: str, n: int, m: int
) -> None:
    deployment = msgspec.structs.replace(
        default_deployment("torch"),
        servers=(Server(name="local", prefill=("prefill_0",), decode=("decode_0",)),),
        prefill=Prefill(arena_mib=128, tensor_parallel=n),
        decode=Decode(tensor_parallel=m),
        transfer=with_key(tmp_path, transport, strategy),
    )
    prompts = corpus(reference.encode, PROMPTS, LONGEST)
    for prompt in prompts:
        reference.generate(prompt.ids, TOKENS)

    with running(deployment, tmp_path) as server:
        answers = asyncio.run(ask_all(server, [list(prompt.ids) for prompt in prompts], TOKENS))
        wait_idle(server, 2)

    for prompt, answer in zip(prompts, answers, strict=True):
        for tie in reference.ties(prompt.ids, answer.ids, TOKENS):
            print(f"{prompt.name}: {tie}")
        assert answer.stats["kv"]["transport"] == transport
        assert answer.stats["ms"]["exposed"] <= answer.stats["ms"]["transfer"]
    used = {answer.stats["kv"]["strategy"] for answer in answers}
    # A short prompt may be computed before the decode has looked for the first time.
    optional = {"whole", "direct"} if strategy in ("auto", "layered") else set()
    assert used - optional == {strategy} - {"auto"}


@pytest.mark.parametrize(
    ("transport", "strategy"),
    [
        ("shm", "whole"),
        ("nixl", "direct"),
        ("nixl", "layered"),
        pytest.param("shm", "layered", marks=pytest.mark.full),
        pytest.param("nixl", "whole", marks=pytest.mark.full),
    ],
)
def test_every_byte_is_where_it_belongs(tmp_path: Path, transport: str, strategy: str) -> None:
    """The emulated engine checks all bytes; prompts of 40 MiB, many at a time, some reused."""
    profile = {
        "layers": 30,
        "kv_heads": 4,
        "head_dim": 64,
        "prefill": {"per_token_ms": 0.02},
        "decode": {"base_ms": 1},
    }
    deployment = msgspec.structs.replace(
        emulated_deployment(
            tmp_path,
            profile,
            2,
            prefill=Prefill(arena_mib=256, tensor_parallel=2),
            decode=Decode(blocks=400, tensor_parallel=4),
        ),
        transfer=with_key(tmp_path, transport, strategy),
    )
    shared = list(range(100, 500))
    prompts = [
        [*(shared if n % 3 else []), *range(1000 + n, 1000 + n + 17 * n)] for n in range(1, 25)
    ]
    with running(deployment, tmp_path) as server:
        answers = asyncio.run(ask_all(server, prompts, 4, in_flight=6))
        wait_idle(server, 2)

    assert {answer.stats["kv"]["transport"] for answer in answers} == {transport}
    sizes = [answer.stats["kv"]["bytes"] for answer in answers]
    whole = [30 * 2 * 4 * 64 * 4 * len(prompt) for prompt in prompts]
    assert all(size <= most for size, most in zip(sizes, whole, strict=True))
    assert any(size < most for size, most in zip(sizes, whole, strict=True)), "no tail was pulled"


def with_key(folder: Path, transport: str, strategy: str) -> Transfer:
    return Transfer(
        transports=(transport,),  # type: ignore[arg-type]
        strategy=strategy,  # type: ignore[arg-type]
        key_file=str(folder / "kv.key"),
    )


async def ask_all(
    server: Running, prompts: list[list[int]], tokens: int, in_flight: int = 2
) -> list[Answer]:
    places = asyncio.Semaphore(in_flight)
    async with connected(server) as client:

        async def one(ids: list[int]) -> Answer:
            async with places:
                return await ask(
                    client,
                    "scheduler",
                    input_ids=ids,
                    max_tokens=tokens,
                    ttft_limit_ms=300_000,
                    timeout=300.0,
                )

        return await asyncio.gather(*map(one, prompts))
