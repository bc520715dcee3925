"""Tests for KV caches sharded by heads, between different tensor parallelism of the two roles."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve import config
from pdserve.errors import DeploymentError, HandleError, InvalidRequest
from pdserve.kvcache.layout import KVLayout
from pdserve.kvcache.sharding import Sharding, columns, routes, sharding_for
from pdserve.transfer import plane
from pdserve.transfer.producer.kv_range import KVRange
from tests.unit.inprocess import Site, virtual
from tests.unit.transfers import TOKENS, Puller, Sender, terms

# Ranks of the prefill, ranks of the decode, KV heads; in the last rows, ranks share heads.
PAIRS = [
    (1, 1, 8), (1, 2, 8), (2, 1, 8), (2, 4, 8), (4, 2, 8), (8, 8, 8), (1, 8, 8), (8, 1, 8),
    (4, 8, 4), (8, 4, 4), (2, 8, 4), (8, 2, 4), (1, 4, 1), (4, 1, 1),
]  # fmt: skip
pairs = st.tuples(*[st.sampled_from([1, 2, 3, 4, 6, 8, 16])] * 3)


def served(n: int, m: int, heads: int) -> bool:
    """Tell whether a prefill of n ranks and a decode of m can share out so many heads."""
    each_way = not (n % m and m % n)
    return each_way and all(not (heads % r and r % heads) for r in (n, m))


def layout_of(heads: int) -> KVLayout:
    return KVLayout(3, heads, 8, "bfloat16")


# --------------------------------------------------------------------------- sharding of a KV cache


@given(pairs)
def test_every_pair_is_cut_or_refused(pair: tuple[int, int, int]) -> None:
    n, m, heads = pair
    if served(*pair):
        sharding = sharding_for(n, m, heads)
        assert sharding.ranks == n
        assert sharding.parts == max(n, m)
    else:
        with pytest.raises(DeploymentError):
            sharding_for(n, m, heads)


@pytest.mark.parametrize(
    ("n", "m", "heads", "message"),
    [
        (2, 3, 12, "prefill tensor_parallel 2 and decode tensor_parallel 3: one must be a mult"),
        (4, 6, 12, "prefill tensor_parallel 4 and decode tensor_parallel 6: one must be a mult"),
        (3, 3, 8, "prefill tensor_parallel 3: 8 KV heads .* allowed are divisors and multiples"),
        (1, 6, 8, "decode tensor_parallel 6: 8 KV heads cannot be shared out evenly"),
        (16, 16, 12, "prefill tensor_parallel 16: 12 KV heads .* divisors and multiples of 12"),
    ],
)
def test_what_cannot_be_served_is_refused(n: int, m: int, heads: int, message: str) -> None:
    with pytest.raises(DeploymentError, match=message):
        sharding_for(n, m, heads)


def test_a_deployment_is_refused_when_its_instances_start(tmp_path: Path) -> None:
    wanted = config.Deployment(
        model="m",
        servers=(config.Server(name="local"),),
        prefill=config.Prefill(tensor_parallel=2),
        decode=config.Decode(tensor_parallel=3),
        transfer=config.Transfer(key_file=str(tmp_path / "kv.key")),
    )
    with pytest.raises(DeploymentError, match=r"prefill tensor_parallel 2 and decode .* 3"):
        plane.terms(wanted, "tiny", layout_of(6))


@pytest.mark.parametrize(("n", "m", "heads"), PAIRS)
def test_parts_have_every_head(n: int, m: int, heads: int) -> None:
    """Each head occurs once, or as often as there are ranks for it."""
    sharding, layout = sharding_for(n, m, heads), layout_of(heads)
    held = [0] * heads
    for part in range(sharding.parts):
        first, count = sharding.heads(part, heads)
        for head in range(first, first + count):
            held[head] += 1
        where = columns(sharding, layout, part)
        assert (where.stop - where.start) == sharding.row_bytes(layout) == count * 16
        assert where.start == first * 16
    assert set(held) == {max(sharding.parts // heads, 1)}
    assert sharding.nbytes(layout, 5) == layout.nbytes(5) * held[0]


@pytest.mark.parametrize(("n", "m", "heads"), PAIRS)
def test_routes_bring_each_rank_its_heads_once(n: int, m: int, heads: int) -> None:
    sharding = sharding_for(n, m, heads)
    taken = [0] * sharding.parts
    for rank in range(m):
        wanted = routes(sharding, m, heads, rank)
        brought = [head for r in wanted for head in range(r.first_head, r.first_head + r.heads)]
        count = max(heads // m, 1)
        assert brought == list(range(rank * heads // m, rank * heads // m + count))
        for route in wanted:
            assert sharding.heads(route.part, heads) == (route.first_head, route.heads)
            taken[route.part] += 1
    if m >= n:
        assert set(taken) == {1}, "replicas share the load"


@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 16])
def test_equal_parallelism_is_rank_to_rank(ranks: int) -> None:
    sharding = sharding_for(ranks, ranks, 8)
    for rank in range(ranks):
        assert [route.part for route in routes(sharding, ranks, 8, rank)] == [rank]


# -------------------------------------------------------------------------- a KV cache in its range


@pytest.mark.parametrize(("n", "m", "heads"), PAIRS)
def test_a_range_is_seen_whole(n: int, m: int, heads: int) -> None:
    layout, sharding, rng = layout_of(heads), sharding_for(n, m, heads), np.random.default_rng(0)
    data = np.zeros(sharding.nbytes(layout, TOKENS), np.uint8)
    kv = KVRange(data, layout, sharding, TOKENS)
    content = rng.integers(1, 256, layout.shape(TOKENS), np.uint8)
    assert kv.whole.shape == content.shape
    parts = data.reshape(sharding.parts, layout.planes, TOKENS, -1)
    for planes in (2, 4, 4, 6):
        kv.whole[planes - 2 : planes] = content[planes - 2 : planes]
        kv.publish(planes)
        for part in range(sharding.parts):
            where = columns(sharding, layout, part)
            assert (parts[part, :planes] == content[:planes, :, where]).all()
            assert not parts[part, planes:].any()
    prefix = np.zeros(layout.shape(TOKENS), np.uint8)
    KVRange(data, layout, sharding, TOKENS).read(30, prefix)
    assert (prefix[:, :30] == content[:, :30]).all()
    assert not prefix[:, 30:].any()
    assert np.shares_memory(kv.whole, data) == (sharding.parts == 1)


# ------------------------------------------------------------------ the transfer plane, bit for bit


@pytest.mark.parametrize("way", ["shm", "whole", "direct"])
@pytest.mark.parametrize(("n", "m", "heads"), PAIRS)
def test_a_pull_from_n_ranks_to_m(n: int, m: int, heads: int, way: str) -> None:
    agreed = terms(layout_of(heads), sharding_for(n, m, heads))
    name = "shm" if way == "shm" else "memcpy"
    strategy = None if way == "shm" else way
    sender = Sender(name, agreed)
    puller = Puller(name, agreed, ranks=m, strategy=strategy)  # type: ignore[arg-type]
    puller.connect(sender)
    for first, runs in ((0, [(60, 20), (3, 30)]), (17, [(40, 33)])):
        puller.pool[:] = 0
        offer = sender.offer()
        transfer = puller.pull(offer, runs, first)
        puller.check(offer, runs, first)
        assert transfer.nbytes == agreed.layout.nbytes(TOKENS - first), (
            "no head is transferred twice"
        )
    puller.close()
    sender.close()


def test_a_pull_layer_by_layer_from_2_ranks_to_4() -> None:
    agreed = terms(layout_of(8), sharding_for(2, 4, 8))
    sender, puller = Sender("memcpy", agreed), Puller("memcpy", agreed, ranks=4)
    puller.connect(sender)
    offer, loop = sender.begin(), asyncio.new_event_loop()

    async def follow() -> str:
        following = loop.run_in_executor(None, puller.pull, offer)
        for planes in (2, 4, 6):
            await asyncio.sleep(0.02)
            sender.compute(offer, planes)
        sender.lease_manager.complete(offer.leased, TOKENS, 6, 7, time.monotonic() + 60)
        return (await following).strategy

    assert loop.run_until_complete(follow()) == "layered"
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()
    puller.check(offer, [(0, TOKENS)])
    puller.close()
    sender.close()


def test_ends_that_were_told_different_cuts() -> None:
    sender, puller = (
        Sender(agreed=terms(layout_of(8), Sharding(2, 1))),
        Puller(agreed=terms(layout_of(8))),
    )
    puller.connect(sender)
    with pytest.raises(HandleError, match=r"has Sharding\(ranks=2.*expects Sharding\(ranks=1"):
        puller.pull(sender.offer())
    assert not puller.pool.any()
    puller.close()
    sender.close()


# -------------------------------------------------------------------- prefill, scheduler and decode


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 2), (2, 1), (2, 4), (4, 2), (4, 16)])
@virtual
async def test_answers_from_n_ranks_to_m(tmp_path: Path, n: int, m: int) -> None:
    """The emulated engines write every row, and check it on arrival."""
    async with Site(
        tmp_path,
        profile={"speed": 0, "layers": 2, "kv_heads": 8, "head_dim": 4},
        prefill={"tensor_parallel": n, "arena_mib": 8},
        decode={"tensor_parallel": m},
    ) as site:
        shared = site.prompt(100)
        requests = [site.request(site.prompt(20 + i, shared), stream=False) for i in range(4)]
        for request in requests:
            assert await site.answer(request) == site.expected(request)
            assert request.transfer is not None
            assert request.transfer.nbytes <= site.model.layout.nbytes(request.prompt_tokens)
        assert requests[-1].cached_tokens == 96, "the prefix is read from its parts"
        await site.idle()


@virtual
async def test_an_arena_counts_heads_that_are_held_twice(tmp_path: Path) -> None:
    """4 heads on 8 ranks take the space of 8."""
    async with Site(
        tmp_path,
        profile={"speed": 0, "kv_heads": 4, "head_dim": 8},
        prefill={"tensor_parallel": 8, "arena_mib": 1},
        decode={"tensor_parallel": 4, "blocks": 1000},
    ) as site:
        fits = (1 << 20) // (2 * 8 * 8 * 4)
        too_long, request = site.request(fits + 1), site.request(fits, max_tokens=2)
        with pytest.raises(
            InvalidRequest, match=f"takes {(fits + 1) * 512} bytes; prefill_0's arena"
        ):
            await site.answer(too_long)
        assert await site.answer(request) == site.expected(request)
        await site.idle()
