"""Test for `make demo`: the default model ends its answer itself, with a whole sentence."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pdctl.cli import DEMO_PROMPT, DEMO_TOKENS
from tests.clients import generate

if TYPE_CHECKING:
    from tests.servers import Running

pytestmark = pytest.mark.triton


def test_the_answer_ends_at_a_sentence(torch_server: Running) -> None:
    answer = generate(torch_server, text_input=DEMO_PROMPT, chat=True, max_tokens=DEMO_TOKENS)
    assert answer.finish_reason == "stop"
    assert answer.text.endswith(".")
    assert answer.text.count(".") == 1
