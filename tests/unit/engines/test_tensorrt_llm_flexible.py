"""Tests for instances of ``tensorrt_llm`` that change roles, over the fake of the library."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from unittest import mock

import msgspec
import pytest

from pdserve import config
from pdserve.config.llm_options import LlmArguments, LlmOptions
from pdserve.engines.tensorrt_llm.engine import TensorRTLLM
from pdserve.errors import DeploymentError
from tests.unit.engines.llm import deployment, installed
from tests.unit.inprocess import real
from tests.unit.instances.flexible_site import NAME, FlexibleSite
from tests.unit.instances.test_flexible import PROMPT

if TYPE_CHECKING:
    from pathlib import Path

NO_OVERLAP = LlmArguments(disable_overlap_scheduler=True)
SWITCHES = 6


def flexible(folder: Path) -> config.Deployment:
    server = config.Server(
        "local", prefill=("prefill_0",), decode=("decode_0", NAME), flexible=(NAME,)
    )
    return msgspec.structs.replace(
        deployment(folder, LlmOptions(prefill=NO_OVERLAP, decode=NO_OVERLAP)),
        servers=(server,),
        decode=config.Decode(slots=6),
        transfer=config.Transfer(key_file=str(folder / "kv.key")),
    )


@real
async def test_one_engine_serves_both_roles(tmp_path: Path) -> None:
    shut: list[Any] = []
    closed = TensorRTLLM.close

    async def close(engine: TensorRTLLM) -> None:
        shut.append(engine)
        await closed(engine)

    with installed("1.4.0rc1"), mock.patch.object(TensorRTLLM, "close", close):
        async with FlexibleSite(flexible(tmp_path)) as site:
            expected = await site.serve("prefill_0", "decode_0", PROMPT)
            for _ in range(SWITCHES // 2):
                assert await site.serve("prefill_0", NAME, PROMPT) == expected
                await site.switch("prefill")
                assert await site.serve(NAME, "decode_0", PROMPT) == expected
                await site.switch("decode")
            assert not shut, "its engine stays"
        assert len(shut) == 3


def test_its_engine_takes_the_larger_batch_of_the_two(tmp_path: Path) -> None:
    wanted, found = flexible(tmp_path), {}
    with installed("1.4.0rc1"):
        for name in ("prefill_0", "decode_0", NAME):
            role: config.Role = "decode" if name == "decode_0" else "prefill"
            with (
                mock.patch("tensorrt_llm.llmapi.LLM.__init__", side_effect=ValueError) as made,
                pytest.raises(DeploymentError),
            ):
                TensorRTLLM(name, role, wanted, 4096)
            found[name] = made.call_args.kwargs["max_batch_size"]
    assert found == {"prefill_0": 4, "decode_0": 6, NAME: 6}
