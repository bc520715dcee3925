"""Tests with a soft limit of 256 open files, like a shell's, and more idle connections."""

from __future__ import annotations

import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from pdctl import watchers
from tests.clients import generate
from tests.faults.serving import all_in_one, repairs, watched
from tests.servers import Running

pytestmark = [pytest.mark.triton, pytest.mark.alone]

SOFT = 256
IDLE = 300


@contextmanager
def few_files() -> Iterator[None]:
    """Set the limit for whatever this process starts meanwhile."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert before[1] > 4 * IDLE, "the hard limit of this machine is too low"
    resource.setrlimit(resource.RLIMIT_NOFILE, (SOFT, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with a watchdog, started with a low soft limit."""
    folder = tmp_path_factory.mktemp("few_files")
    with ExitStack() as stack:
        with few_files():
            server = stack.enter_context(watched(all_in_one(folder), folder))
        yield server


@pytest.mark.parametrize("times", [1, pytest.param(20, marks=pytest.mark.full)])
def test_idle_connections_stop_nothing(limited: Running, times: int) -> None:
    """They are accepted, requests beside them are answered, and nothing has to be repaired."""
    (one,) = limited.servers
    for _ in range(times):
        with ExitStack() as stack:
            for number in range(IDLE):
                port = (one.spec.http_port, one.spec.grpc_port)[number % 2]
                address = (one.spec.host, port)
                stack.enter_context(socket.create_connection(address, timeout=10))
            for _ in range(5):
                answer = generate(limited, text_input="The sky is", max_tokens=4, ignore_eos=True)
                assert answer.finish_reason == "length"
            assert one.ready()

    assert watchers.reported(one.folder) is not None
    assert repairs(one) == 0
