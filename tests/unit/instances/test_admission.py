"""Tests for the limits that the model sets to requests, for every engine and both roles."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest

from pdserve.errors import InvalidRequest
from pdserve.instances import admission
from pdserve.rpc.messages import Busy, DecodeRequest, Failed, PrefillRequest, Reply
from pdserve.sampling import Sampling
from tests.unit.external import ExternalSite
from tests.unit.inprocess import VOCABULARY, Site, virtual

if TYPE_CHECKING:
    from pathlib import Path

CONTEXT = 64


def ids(*tokens: int) -> bytes:
    return np.array(tokens, "<i4").tobytes()


def prefill(prompt: bytes, **fields: Any) -> PrefillRequest:
    return PrefillRequest("call", prompt, Sampling(), "", 1000.0, **fields)


def decode(prompt: bytes, **fields: Any) -> DecodeRequest:
    asked = DecodeRequest("call", prompt, None, b"", Sampling(), "", 8, True, 0.0)
    return msgspec.structs.replace(asked, **fields)


BAD = [
    (prefill(b""), r"prompt: 0 bytes; allowed: 4 for each token"),
    (prefill(ids(1, 2)[:-1]), r"prompt: 7 bytes"),
    (prefill(ids(*[1] * CONTEXT)), rf"{CONTEXT} and 1; allowed: {CONTEXT} tokens together"),
    (prefill(ids(1, VOCABULARY)), rf"token id: {VOCABULARY}; allowed: 0 to {VOCABULARY - 1}"),
    (prefill(ids(-1)), r"token id: -1; allowed: 0 to"),
    (
        prefill(ids(1, 2), resumed_tokens=2),
        r"resumed_tokens: 2 of a prompt of 2 tokens; allowed: 0 to 1",
    ),
    (decode(b""), r"prompt: 0 bytes"),
    (decode(ids(*[1] * 57)), rf"57 and 8; allowed: {CONTEXT}"),
    (decode(ids(1), max_tokens=CONTEXT), rf"1 and {CONTEXT}; allowed: {CONTEXT}"),
    (decode(ids(1, 1 << 30)), rf"token id: {1 << 30}; allowed"),
    (decode(ids(1), first_token=VOCABULARY), rf"token id: {VOCABULARY}; allowed"),
    (decode(ids(1), resumed_tokens=1), r"resumed_tokens: 1 of a prompt of 1 tokens"),
]
FITS = [
    prefill(ids(*[1] * (CONTEXT - 1))),
    prefill(ids(0, VOCABULARY - 1), resumed_tokens=1),
    decode(ids(*[1] * 56)),
    decode(ids(1), max_tokens=CONTEXT - 1, first_token=VOCABULARY - 1),
]


@pytest.mark.parametrize(("request_", "says"), BAD)
def test_what_the_model_cannot_compute_is_refused(
    request_: PrefillRequest | DecodeRequest, says: str
) -> None:
    with pytest.raises(InvalidRequest, match=says):
        admission.prompt(request_, CONTEXT, VOCABULARY)


@pytest.mark.parametrize("request_", FITS)
def test_what_fits_is_taken(request_: PrefillRequest | DecodeRequest) -> None:
    tokens = admission.prompt(request_, CONTEXT, VOCABULARY)
    assert tokens.tobytes() == request_.prompt


@pytest.mark.parametrize("world", [Site, ExternalSite])
@virtual
async def test_every_instance_refuses_and_goes_on(
    tmp_path: Path, world: type[Site | ExternalSite]
) -> None:
    async with world(tmp_path, profile={"context_length": CONTEXT}) as site:
        told: list[Reply] = []
        for request, _ in BAD:
            instance: Any = site.p[0] if isinstance(request, PrefillRequest) else site.d[0]
            instance.submit(request, lambda reply, _last: told.append(reply))
            refused = told.pop()
            assert isinstance(refused, Failed)
            assert refused.code == "INVALID_ARG"
            assert refused.message.startswith(("prefill_0: ", "decode_0: "))
        request = site.request(max_tokens=8)
        assert await site.answer(request) == site.expected(request)
        assert not any(isinstance(reply, Busy) for reply in told)
        await site.idle()
