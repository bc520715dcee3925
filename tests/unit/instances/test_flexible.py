"""Tests for an instance that changes roles: what it serves, and what it holds meanwhile."""

from __future__ import annotations

import asyncio
import gc
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np
import pytest

from pdserve import config
from pdserve.control.records import Phase
from pdserve.engines.emulated import EmulatedModel
from pdserve.node.role_switch import NotSwitched, Step
from pdserve.rpc.messages import Reassigned
from tests.unit.inprocess import real
from tests.unit.instances.flexible_site import (
    NAME,
    NEW,
    FlexibleSite,
    deployment,
    held,
    peak,
    reset_peak,
    shared,
)

if TYPE_CHECKING:
    from collections.abc import Callable

MIB = 1 << 20
SIZE_MIB = 64
"""MiB of the arena, and of the pool."""
PROMPT = np.arange(5, 45, dtype="<i4").tobytes()
LONG = np.arange(5, 205, dtype="<i4").tobytes()
SWITCHES = 50


class Case(NamedTuple):
    deployment: config.Deployment
    expected: list[int]


def emulated(folder: Path) -> Case:
    (folder / "config.json").write_text(json.dumps({"vocab_size": 997, "eos_token_id": 2}))
    profile = folder / "profile.yaml"
    shape = {"layers": 4, "kv_heads": 8, "head_dim": 64}
    times = {"prefill": {"base_ms": 1.0, "per_token_ms": 2.0}, "decode": {"base_ms": 1.0}}
    profile.write_bytes(msgspec.yaml.encode({**shape, **times}))
    model = EmulatedModel(str(folder), str(profile))
    prompt = np.frombuffer(PROMPT, "<i4")
    return Case(
        sized(folder, folder, config.Engine(kind="emulated", profile=str(profile)), 1 << 14),
        [model.next(prompt, 0, new) for new in range(NEW)],
    )


def pytorch(folder: Path) -> Case:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    shape: dict[str, Any] = {"num_hidden_layers": 3, "num_attention_heads": 4}
    small = LlamaConfig(
        vocab_size=331, hidden_size=64, intermediate_size=96, num_key_value_heads=2,
        max_position_embeddings=256, initializer_range=0.3, eos_token_id=2, **shape,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(small, dtype=torch.float32).eval()
    model.save_pretrained(folder)
    ids = torch.from_numpy(np.frombuffer(PROMPT, "<i4").astype(np.int64))[None]
    answer = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, min_new_tokens=NEW,
        do_sample=False,
    )  # fmt: skip
    return Case(
        sized(folder, folder, config.Engine(kind="torch", threads=1), 3 * 2 * 2 * 16 * 4),
        answer[0, ids.shape[1] :].tolist(),
    )


def sized(folder: Path, model: Path, engine: config.Engine, token_bytes: int) -> Any:
    return deployment(
        folder,
        model,
        engine,
        prefill=config.Prefill(slots=4, arena_mib=SIZE_MIB),
        decode=config.Decode(slots=4, blocks=SIZE_MIB * MIB // token_bytes // 16),
    )


ENGINES = pytest.mark.parametrize("case", [emulated, pytorch])


@ENGINES
@real
async def test_every_token_is_right_in_either_role(
    case: Callable[[Path], Case], tmp_path: Path
) -> None:
    wanted, expected = case(tmp_path)
    async with FlexibleSite(wanted) as site:
        assert await site.serve("prefill_0", NAME, PROMPT) == expected
        switched = await site.switch("prefill")
        assert (switched.before.assignment.role, switched.after.assignment.number) == ("decode", 2)
        assert site.flexible.kept == [switched.after.assignment]
        assert await site.serve(NAME, "decode_0", PROMPT) == expected
        await site.switch("decode")
        assert await site.serve("prefill_0", NAME, PROMPT) == expected
        assert await site.serve("prefill_0", "decode_0", PROMPT) == expected


@ENGINES
@real
async def test_fifty_switches_leave_nothing_behind(
    case: Callable[[Path], Case], tmp_path: Path
) -> None:
    wanted, expected = case(tmp_path)
    async with FlexibleSite(wanted) as site:

        async def there_and_back() -> None:
            await site.switch("prefill")
            assert await site.serve(NAME, "decode_0", PROMPT) == expected
            assert SIZE_MIB * MIB <= shared() < (SIZE_MIB + 1) * MIB
            await site.switch("decode")
            assert shared() == 0
            assert await site.serve("prefill_0", NAME, PROMPT) == expected

        for _ in range(3):  # allocators take what they will need
            await there_and_back()
        gc.collect()
        before = held()
        for _ in range(SWITCHES // 2):
            await there_and_back()
        gc.collect()
        after = held()
    grown = {what: after[what] - before[what] for what in before}
    assert grown.pop("rss") < SIZE_MIB * MIB / 4, grown
    assert not any(grown.values()), grown
    assert after["arenas"] == 0


@ENGINES
@real
async def test_the_memory_of_both_roles_is_never_there_at_once(
    case: Callable[[Path], Case], tmp_path: Path
) -> None:
    wanted, _ = case(tmp_path)
    async with FlexibleSite(wanted) as site:

        async def round_trip() -> None:
            for role in ("prefill", "decode"):
                await site.switch(role)
                await site.serve(*(("prefill_0", NAME) if role == "decode" else (NAME, "decode_0")),
                                 PROMPT)  # fmt: skip

        await round_trip()
        with_pool = held()["rss"]
        reset_peak()
        await round_trip()
        most = peak()
        assert most - with_pool < SIZE_MIB * MIB / 2, (most - with_pool) / MIB
        # Without a role there is neither.
        await site.switch("none")
        neither = held()["rss"]
        assert with_pool - neither > SIZE_MIB * MIB * 0.9, (with_pool - neither) / MIB
        assert shared() == 0


@real
async def test_a_request_that_waits_is_served_before_its_instance_switches(tmp_path: Path) -> None:
    wanted, expected = emulated(tmp_path)
    async with FlexibleSite(wanted) as site:
        await site.switch("prefill")
        computing = asyncio.create_task(site.prefilled(NAME, LONG))
        await asyncio.sleep(0.02)
        switching = asyncio.create_task(site.switch("decode"))
        _, first = await computing
        assert site.flexible.assigned.phase is Phase.DRAINING
        assert isinstance(await site.ask(NAME, site.prompt(PROMPT)), Reassigned)
        # Its KV cache is pulled, too, before the arena goes.
        await site.connect(NAME, "decode_0")
        tokens = await site.decoded(first, LONG, "decode_0")
        assert tokens is not None
        assert len(tokens) == NEW
        done = await switching
        assert done.drain_s > 0.05
        assert await site.serve("prefill_0", NAME, PROMPT) == expected


@real
async def test_what_is_left_of_a_drain_ends_after_its_time(tmp_path: Path) -> None:
    wanted, expected = emulated(tmp_path)
    async with FlexibleSite(wanted) as site:
        await site.switch("prefill")
        await site.prefilled(NAME, PROMPT)  # which no decode ever pulls
        done = await site.switch("decode", within_s=0.2)
        assert 0.2 <= done.drain_s < 2
        assert await site.serve("prefill_0", NAME, PROMPT) == expected


@real
async def test_a_decode_that_does_not_let_go_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory is kept, and the instance serves on."""
    wanted, expected = emulated(tmp_path)
    async with FlexibleSite(wanted) as site:
        await site.switch("prefill")
        assert await site.serve(NAME, "decode_0", PROMPT) == expected
        deaf = site.all["decode_0"].assigned
        monkeypatch.setattr("pdserve.node.role_switch.UNLINK_S", 0.2)
        monkeypatch.setattr(deaf, "handle", lambda *_: None)
        with pytest.raises(NotSwitched, match=r"flexible_0 .* unlink: .* decode_0") as raised:
            await site.switch("decode")
        assert (raised.value.step, raised.value.silent) == (Step.UNLINK, ("decode_0",))
        monkeypatch.undo()
        assert site.flexible.assigned.phase is Phase.SERVING
        assert shared()
        assert await site.serve(NAME, "decode_0", PROMPT) == expected
        await site.switch("decode")
        assert shared() == 0


@real
async def test_the_gauges_of_the_former_role_end(tmp_path: Path) -> None:
    wanted, _ = emulated(tmp_path)
    async with FlexibleSite(wanted) as site:
        await site.serve("prefill_0", NAME, PROMPT)
        await asyncio.sleep(0.15)
        assert {"pdserve_kv_blocks free", "pdserve_kv_link_bytes_per_second"} <= (
            site.flexible.gauges()
        )
        await site.switch("prefill")
        await site.serve(NAME, "decode_0", PROMPT)
        changes = list(site.flexible.metrics.drain())
        gone = {change.name for change in changes if change.kind == "gone"}
        assert {"pdserve_kv_blocks", "pdserve_kv_link_bytes_per_second"} <= gone
        assert "pdserve_kv_leases" in {one.name for one in changes if one.kind == "gauge"}
        linked = [one for one in site.all["decode_0"].metrics.drain() if "kv_link" in one.name]
        assert {dict(one.labels)["prefill"] for one in linked} == {NAME}
        await site.switch("decode")
        linked = [one for one in site.all["decode_0"].metrics.drain() if "kv_link_b" in one.name]
        assert [one.kind for one in linked] == ["gone"]
