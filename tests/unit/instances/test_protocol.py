"""What an instance is asked by each message."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from unittest.mock import Mock, call

import pytest

from pdserve.errors import InstanceError
from pdserve.instances.external.decode import ExternalDecode
from pdserve.instances.external.prefill import ExternalPrefill
from pdserve.instances.protocol import dispatch
from pdserve.rpc.messages import (
    Connect,
    DecodeRequest,
    Describe,
    PrefillRequest,
    Release,
    Request,
    Transferred,
    Watch,
)
from pdserve.sampling import Sampling
from tests.unit.inprocess import Site, virtual

if TYPE_CHECKING:
    from pathlib import Path

RELEASE, WATCH = Release("a"), Watch("w", "gateway")
PREFILL = PrefillRequest("a", bytes(4), Sampling(), "", 0.0)
DECODE = DecodeRequest("a", bytes(4), 7, b"", Sampling(), "", 4, False, 0.0)
DESCRIBE, TRANSFERRED, CONNECT = Describe("a"), Transferred("a"), Connect("a", b"")


def send(*_: object) -> None:
    pass


def asked(kind: Any, request: Request) -> Any:
    """The one call of the instance, from a connection named stream."""
    instance = Mock(spec=kind, role=kind.role)
    dispatch(instance, request, "stream", send)
    [made] = instance.method_calls
    return made


def test_each_message_has_its_call() -> None:
    for kind in (ExternalPrefill, ExternalDecode):
        assert asked(kind, RELEASE) == call.release("a", send)
        assert asked(kind, WATCH) == call.watch(WATCH, "stream", send)
    assert asked(ExternalPrefill, PREFILL) == call.submit(PREFILL, send)
    assert asked(ExternalPrefill, DESCRIBE) == call.describe(send)
    assert asked(ExternalPrefill, TRANSFERRED) == call.transferred("a", send)
    assert asked(ExternalDecode, DECODE) == call.submit(DECODE, send)
    assert asked(ExternalDecode, CONNECT) == call.connect(CONNECT, send)


@virtual
async def test_what_is_for_the_other_role_is_refused(tmp_path: Path) -> None:
    async with Site(tmp_path) as site:
        for instance, requests in (
            (site.p[0], (DECODE, CONNECT, TRANSFERRED)),
            (site.d[0], (PREFILL, DESCRIBE, TRANSFERRED)),
        ):
            for request in requests:
                said = f"a {type(request).__name__} came to a {type(instance).__name__}"
                with pytest.raises(InstanceError, match=said):
                    dispatch(instance, request, "stream", send)
