"""Tests for single lost messages, whose content must not be guessed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pdserve import errors
from pdserve.rpc.messages import Accepted, DecodeRequest
from pdserve.scheduling.request import State
from tests.unit.inprocess import Message, Site, real, virtual

if TYPE_CHECKING:
    from pathlib import Path

TIMES = {"prefill": {"base_ms": 20.0}, "decode": {"base_ms": 10.0}}


@real
async def test_lost_handle_is_no_order_to_compute_the_prompt(tmp_path: Path) -> None:
    """Without a handle the decode would compute the prompt, and send the first token again."""
    async with Site(tmp_path, profile=TIMES, layered=True) as site:
        lost: list[Message] = []

        def lose(message: Message) -> bool:
            loses = isinstance(message, Accepted) and message.handle is not None and not lost
            if loses:
                lost.append(message)
            return loses

        site.p_links[0].lose = lose
        request = site.request()
        assert await site.answer(request) == site.expected(request)
        assert len(lost) == 1
        assert request.attempts == 2
        assert all(message.handle for message in site.d_links[0].of(DecodeRequest))
        await site.idle()


@virtual
async def test_first_token_of_a_decode_alone_that_comes_too_late(tmp_path: Path) -> None:
    """The TTFT limit holds without a prefill, too."""
    slow = {"prefill": {"base_ms": 300.0}, "decode": {"base_ms": 10.0}}
    async with Site(tmp_path, profile=slow, gateway={"local": "on"}) as site:
        request = site.request(ttft_limit_s=0.1)
        with pytest.raises(errors.Late, match="no first token within the TTFT limit"):
            await site.answer(request)
        assert request.state is State.EXPIRED
        assert not request.output
        await site.idle()
