"""Tests for a prefill instance: shared forwards, reused prefixes, and when slots become free."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import numpy as np
import pytest

from pdserve import config, errors
from pdserve.kvcache.prefix_index import chain, shorten
from pdserve.kvcache.sharding import Sharding
from pdserve.rpc.messages import Accepted, Failed, Prefilled, PrefillRequest, Released, Reply
from pdserve.sampling import Sampling
from pdserve.transfer import plane
from pdserve.transfer.endpoint import Terms
from pdserve.transfer.producer.holder import region_name
from tests.unit.inprocess import EOS, Site, model, virtual

if TYPE_CHECKING:
    from pdserve.scheduling.request import Request

TIMES = {"prefill": {"base_ms": 20.0}, "decode": {"base_ms": 10.0}}
BLOCK = 32  # tokens in a block of the prefix index


class Client:
    """A client of the first prefill of a site, without a scheduler."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.replies: list[tuple[str, Reply, bool]] = []

    def submit(self, name: str, prompt: int | bytes = 20, **fields: object) -> None:
        data = self.site.prompt(prompt) if isinstance(prompt, int) else prompt
        request = {"sampling": Sampling(), "salt": "", "deadline_ms": 60_000.0, **fields}
        self.site.p[0].submit(
            PrefillRequest(id=name, prompt=data, **request),  # type: ignore[arg-type]
            lambda reply, last: self.replies.append((name, reply, last)),
        )

    def release(self, name: str) -> None:
        self.site.p[0].release(name, lambda reply, last: self.replies.append(("", reply, last)))

    def of(self, name: str) -> list[Reply]:
        return [reply for who, reply, _ in self.replies if who == name]


def forwards(site: Site) -> list[list[int]]:
    """Return the prompt lengths of each forward."""
    return [[len(job.tokens) for job in jobs] for jobs in site.p_engines[0].forwards]


# ------------------------------------------------------------------------------------------ answers


@virtual
async def test_quick_result_is_the_only_reply(tmp_path: Path) -> None:
    async with Site(tmp_path, profile={"speed": 0}) as site:
        client = Client(site)
        client.submit("a")
        await asyncio.sleep(1)
        [(_, reply, last)] = client.replies
        assert isinstance(reply, Prefilled)
        assert last
        assert (reply.eos, reply.cached_tokens) == (False, 0)
        client.release("a")
        assert client.replies[-1][1:] == (Released(), True)
        await site.idle(0.0)


@virtual
async def test_it_does_not_wake_for_those_who_do_not_watch(tmp_path: Path) -> None:
    async with Site(tmp_path, profile={"speed": 0}) as site:
        client, prefill = Client(site), site.p[0]
        with mock.patch.object(prefill._slots, "look", wraps=prefill._slots.look) as look:
            client.submit("a")
            await asyncio.sleep(1)
            client.release("a")
            await asyncio.sleep(1)
        assert isinstance(client.replies[0][1], Prefilled)
        assert look.call_count == 1, "only at the offer"


@virtual
async def test_acceptance_is_told_where_the_result_takes_longer(tmp_path: Path) -> None:
    async with Site(tmp_path, profile={"prefill": {"base_ms": 12_000.0}}) as site:
        client, loop = Client(site), asyncio.get_running_loop()
        began = loop.time()
        client.submit("a")
        await asyncio.sleep(0.006)
        assert client.replies == [("a", Accepted(), False)]
        await asyncio.sleep(12)
        assert [type(reply) for reply in client.of("a")] == [Accepted] * 3 + [Prefilled]
        result = client.of("a")[-1]
        assert isinstance(result, Prefilled)
        assert result.compute_ms == pytest.approx(12_000, abs=0.1)
        handle = site.receivers[0].open(result.handle)
        assert handle.expires == pytest.approx(began + 12 + 2, abs=0.01)
        await asyncio.sleep(20)
        assert len(client.replies) == 4, "no reply follows the last one"
        await site.idle(0.0)


@virtual
async def test_handle_leads_to_the_kv_cache(tmp_path: Path) -> None:
    async with Site(tmp_path, profile={"speed": 0, "layers": 3}) as site:
        client, prompt = Client(site), site.prompt(50)
        client.submit("a", prompt)
        await asyncio.sleep(0.001)
        [result] = client.of("a")
        assert isinstance(result, Prefilled)
        receiver, pool = site.receivers[0], site.d_engines[0].pool
        transfer = receiver.pull(receiver.open(result.handle), [(100, 20), (7, 30)])
        assert (transfer.nbytes, transfer.token) == (6 * 50 * 64, result.token)
        assert pool.shape == (6, 256 * 16, site.model.layout.row_bytes)
        source = np.concatenate([pool[:, 100:120], pool[:, 7:37]], axis=1)
        tokens = np.frombuffer(prompt, "<i4")
        assert (source.view("<i4") == tokens[None, :, None]).all()
        await site.idle(0.021)  # the holder checks its leases every 20 ms


@virtual
async def test_end_of_sequence_is_told(tmp_path: Path) -> None:
    async with Site(tmp_path, profile={"speed": 0}) as site:
        site.model.script = lambda prompt, position: EOS
        client = Client(site)
        client.submit("a")
        await asyncio.sleep(0.001)
        [result] = client.of("a")
        assert isinstance(result, Prefilled)
        assert (result.token, result.eos) == (EOS, True)
        client.release("a")
        await site.idle(0.0)


# ----------------------------------------------------------------------------------------- forwards


@virtual
async def test_prompts_share_a_forward_up_to_its_tokens(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=TIMES, prefill={"slots": 16, "batch_tokens": 100}) as site:
        client = Client(site)
        for number, tokens in enumerate((40, 40, 40, 20, 300, 10, 90)):
            client.submit(str(number), tokens)
        await asyncio.sleep(0.5)
        # In order of arrival, filled up with later prompts; the first is taken whatever its length.
        assert forwards(site) == [[40, 40, 20], [40, 10], [300], [90]]
        for number in range(7):
            client.release(str(number))
        await site.idle(0.0)


@virtual
async def test_short_prompts_that_are_alike_share_a_forward(tmp_path: Path) -> None:
    """Prompts shorter than a block cannot reuse a prefix of one another."""
    async with Site(tmp_path, profile=TIMES, prefill={"slots": 8}) as site:
        prompt = site.prompt(BLOCK)
        requests = [site.request(prompt) for _ in range(6)]
        answers = await asyncio.gather(*map(site.answer, requests))
        assert answers == [site.expected(requests[0])] * 6
        assert forwards(site) == [[BLOCK] * 6]
        await site.idle()


@virtual
async def test_reproducible_sampling_is_alone_in_its_forward(tmp_path: Path) -> None:
    """A seed gives the same tokens whatever else is being computed."""
    seeded = Sampling(temperature=0.8, seed=7)
    unseeded = Sampling(temperature=0.8)
    async with Site(tmp_path, profile=TIMES, prefill={"slots": 16}) as site:
        client, shared = Client(site), site.prompt(3 * BLOCK)
        samplings = [Sampling(), seeded, unseeded, seeded, Sampling(seed=7)]
        for number, sampling in enumerate(samplings):
            client.submit(str(number), site.prompt(number + 1), sampling=sampling)
        client.submit("warm", shared)
        await asyncio.sleep(0.5)
        assert forwards(site) == [[1, 3, 5, 96], [2], [4]], "greedy decoding needs no randomness"
        client.submit("again", shared, sampling=seeded)
        client.submit("greedy", shared)
        await asyncio.sleep(0.5)
        cached = {name: reply.cached_tokens for name, reply, _ in client.replies
                  if isinstance(reply, Prefilled)}  # fmt: skip
        assert cached["again"] == 0, "nor does it depend on what was computed before"
        assert cached["greedy"] == 2 * BLOCK
        for name in (*map(str, range(5)), "warm", "again", "greedy"):
            client.release(name)
        await site.idle(0.0)


@virtual
async def test_prompts_beyond_the_batch_are_not_starved(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=TIMES, prefill={"slots": 4, "batch_tokens": 64}) as site:
        big = site.request(200, max_tokens=1)
        small = [site.request(8, max_tokens=1) for _ in range(60)]
        tasks = [site.start(one) for one in (*small[:6], big, *small[6:])]
        await asyncio.gather(*tasks)
        assert [200] in forwards(site)
        assert big.first_token <= sorted(one.first_token for one in small)[16]
        await site.idle()


# ------------------------------------------------------------------------------------- prefix reuse


@virtual
async def test_second_request_reuses_the_prefix(tmp_path: Path) -> None:
    profile = {"prefill": {"base_ms": 5.0, "per_token_ms": 1.0}}
    async with Site(tmp_path, profile=profile) as site:
        system = site.prompt(3 * BLOCK + 5)
        first, second = (site.request(site.prompt(20, system)) for _ in range(2))
        answers = [await site.answer(first), await site.answer(second)]
        assert answers == [site.expected(first), site.expected(second)]
        assert (first.cached_tokens, second.cached_tokens) == (0, 3 * BLOCK)
        assert first.stats()["ms"]["prefill"] == pytest.approx(5 + 121, abs=0.1)
        assert second.stats()["ms"]["prefill"] == pytest.approx(5 + 121 - 96, abs=0.1)
        await site.idle()


@virtual
async def test_whole_prompt_again(tmp_path: Path) -> None:
    """The last token is computed all the same, because its logits are needed."""
    async with Site(tmp_path, profile=TIMES) as site:
        prompt = site.prompt(2 * BLOCK)
        requests = [site.request(prompt) for _ in range(3)]
        answers = [await site.answer(one) for one in requests]
        assert answers == [site.expected(requests[0])] * 3
        assert [one.cached_tokens for one in requests] == [0, BLOCK, BLOCK]
        await site.idle()


@virtual
async def test_reuse_of_what_is_still_leased(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=TIMES, prefill={"slots": 2}) as site:
        client, prompt = Client(site), site.prompt(100)
        client.submit("a", prompt)
        await asyncio.sleep(0.05)
        client.submit("b", prompt)
        await asyncio.sleep(0.05)
        [*_, result] = client.of("b")
        assert isinstance(result, Prefilled)
        assert result.cached_tokens == 96
        client.release("a")
        client.release("b")
        await site.idle(0.0)


@virtual
async def test_tenants_do_not_share(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=TIMES, prefill={"slots": 8}) as site:
        prompt = site.prompt(100)
        cached = {}
        for tenant in ("", "acme", "umbrella", "acme", ""):
            request = site.request(prompt, salt=tenant)
            assert await site.answer(request) == site.expected(request)
            cached.setdefault(tenant, []).append(request.cached_tokens)
        assert cached == {"": [0, 96], "acme": [0, 96], "umbrella": [0]}
        burst = [site.request(site.prompt(50), salt=t) for t in ("x", "y")]
        burst[1].prompt = burst[0].prompt
        await asyncio.gather(*map(site.answer, burst))
        assert [one.cached_tokens for one in burst] == [0, 0]
        assert forwards(site)[-1] == [50, 50], "nor do they wait for one another"
        await site.idle()


@virtual
async def test_what_is_cached_is_told(tmp_path: Path) -> None:
    """With this, a gateway knows beforehand which prefix another prompt would find."""
    async with Site(tmp_path, profile=TIMES, prefill={"slots": 8}) as site:
        client, system = Client(site), site.prompt(70)
        prompts = [site.prompt(40, system), site.prompt(200, system), site.prompt(10)]
        known: set[bytes] = set()
        for number, prompt in enumerate(prompts):
            client.submit(str(number), prompt, salt="acme")
            await asyncio.sleep(0.05)
            [*_, result] = client.of(str(number))
            assert isinstance(result, Prefilled)
            tokens = np.frombuffer(prompt, "<i4")
            assert result.stored == shorten(chain(tokens, "acme", len(tokens)))
            expected = [digest[:8] in known for digest in chain(tokens, "acme", len(tokens) - 1)]
            assert result.cached_tokens == BLOCK * sum(expected)
            known |= {result.stored[at : at + 8] for at in range(0, len(result.stored), 8)}
            client.release(str(number))
        assert len(known) == 3 + 8 - 2
        await site.idle(0.0)


@virtual
async def test_burst_with_one_opening_computes_it_once(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=TIMES, prefill={"slots": 8, "batch_tokens": 4096}) as site:
        system = site.prompt(4 * BLOCK)
        requests = [site.request(site.prompt(10 + i, system)) for i in range(8)]
        answers = await asyncio.gather(*map(site.answer, requests))
        assert answers == [site.expected(one) for one in requests]
        assert [one.cached_tokens for one in requests] == [0] + [128] * 7
        assert [len(jobs) for jobs in forwards(site)] == [1, 7]
        await site.idle()


@virtual
async def test_opening_of_a_cancelled_prompt_is_computed_by_the_next(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=TIMES, prefill={"slots": 8}) as site:
        client, prompt = Client(site), site.prompt(100)
        client.submit("a", prompt)
        client.submit("b", prompt)
        await asyncio.sleep(0.01)
        client.release("a")
        await asyncio.sleep(0.05)
        assert client.of("a")[-1] == Failed("CANCELLED", "released")
        [*_, result] = client.of("b")
        assert isinstance(result, Prefilled)
        assert result.cached_tokens == 0, "a released range cannot be copied from"
        client.release("b")
        await site.idle(0.0)


@virtual
async def test_eviction_under_pressure_never_breaks_an_answer(tmp_path: Path) -> None:
    """TensorRT-LLM#12542: the source of a copy is pinned, and an evicted prefix is not found."""
    async with Site(
        tmp_path,
        prefills=2,
        profile={"prefill": {"base_ms": 4.0}, "decode": {"base_ms": 1.0}},
        prefill={"arena_mib": 1, "slots": 6},
        decode={"blocks": 2000},
        seed=9,
    ) as site:
        rng = random.Random(9)
        systems = [site.prompt(rng.randrange(32, 1500)) for _ in range(6)]
        requests: list[Request] = []
        for _ in range(250):
            system = rng.choice(systems)
            sharding = rng.randrange(len(system) // 4 + 1) * 4
            prompt = site.prompt(rng.randrange(1, 200), system[:sharding])
            requests.append(site.request(prompt, max_tokens=rng.randrange(1, 6)))
        answers = await asyncio.gather(*map(site.answer, requests))
        assert answers == [site.expected(one) for one in requests]
        assert sum(one.cached_tokens > 0 for one in requests) > 50
        for prefill in site.p:
            assert 0 < len(prefill._exports.prefixes) < 125, "some were evicted"
        await site.idle()


@virtual
async def test_failed_forward_unpins_and_is_not_found(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=TIMES) as site:
        prompt = site.prompt(100)
        await site.answer(site.request(prompt))
        client = Client(site)
        site.p_engines[0].failures = [RuntimeError("broken kernel")]
        longer = site.prompt(100, prompt)
        client.submit("a", longer)
        await asyncio.sleep(0.1)
        assert client.of("a")[-1] == Failed("INTERNAL", "prefill_0: RuntimeError('broken kernel')")
        await site.idle(0.0)
        request = site.request(site.prompt(10, longer))
        assert await site.answer(request) == site.expected(request)
        assert request.cached_tokens == 96
        await site.idle()


# ------------------------------------------------------------------------------------ start and end


@virtual
async def test_close_ends_what_is_computed_and_removes_the_memory(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=TIMES) as site:
        client, region = Client(site), Path("/dev/shm") / site.holders[0].region.name
        client.submit("a")
        await asyncio.sleep(0.05)
        client.submit("b")
        await asyncio.sleep(0.001)
        assert region.exists()
        await site.p[0].close()
        assert not region.exists()
        assert client.of("b") == [Failed("INTERNAL", "prefill_0 is shutting down")]
        assert len(client.of("a")) == 2
        await asyncio.sleep(10)
        assert len(client.replies) == 3, "no timer is left"
        site.p[0].close = lambda: asyncio.sleep(0)  # type: ignore[method-assign]


def test_arena_larger_than_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDSERVE_SHM_PREFIX", "pdserve-too-large")
    made = model(tmp_path)
    wanted = config.Deployment(
        model="m",
        servers=(config.Server(name="local"),),
        prefill=config.Prefill(arena_mib=1 << 22),
    )
    terms = Terms(made.fingerprint, made.layout, b"k" * 32, Sharding())
    with pytest.raises(errors.DeploymentError, match=r"lower prefill\.arena_mib"):
        plane.holder(wanted, "prefill_0", terms, 4)
    assert not list(Path("/dev/shm").glob("pdserve-too-large-*"))


def test_region_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PDSERVE_SHM_PREFIX", raising=False)
    assert region_name("prefill_0").startswith("pdserve-prefill-0-")
    assert region_name("prefill_0") != region_name("prefill_0")
    monkeypatch.setenv("PDSERVE_SHM_PREFIX", "pdserve-4711")
    assert region_name("prefill_0").startswith("pdserve-4711-prefill-0-")
