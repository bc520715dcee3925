"""Tests for the resource limits of a server's processes: stacks and open files."""

from __future__ import annotations

import itertools
import os
import resource
import subprocess
import sys
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from pdctl import limits
from tests.clients import connect, stub
from tests.servers import Running

pytestmark = pytest.mark.triton

GUARDS = 4 * resource.getpagesize()
"""Guard pages between the stacks that glibc maps for threads."""


def test_threads_of_the_server_have_more_stack_and_those_of_the_models_do_not(
    emulated_server: Running,
) -> None:
    """Threads of the server have what the hard limit allows, those of models the usual size."""
    (one,) = emulated_server.servers
    given = resource.getrlimit(resource.RLIMIT_STACK)
    wanted, _ = limits.stack_limit(given, room=True)

    assert resource.prlimit(one.pid, resource.RLIMIT_STACK)[0] == wanted
    assert largest_stack(one.pid) == pytest.approx(wanted, abs=GUARDS)
    for model in ("pdserve", "scheduler", "tokenizer", "detokenizer", "prefill_0", "decode_0"):
        process = stub(emulated_server, model)
        assert resource.prlimit(process.pid, resource.RLIMIT_STACK) == given, model


def test_a_model_starts_its_threads_with_usual_stacks(tmp_path: Path) -> None:
    """Like a stub, it starts with a server's limits, and puts them back."""
    program = (
        "import sys, threading;"
        "from pdserve.triton import stub; stub.prepare();"
        "done = threading.Event(); thread = threading.Thread(target=done.wait); thread.start();"
        "print('ready', flush=True); sys.stdin.read(); done.set()"
    )
    given, _ = resource.getrlimit(resource.RLIMIT_STACK)
    with limits.raised() as variables, ExitStack() as stack:
        process = subprocess.Popen(
            [sys.executable, "-c", program],
            env={**os.environ, **variables},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        stack.callback(process.wait)
        assert process.stdin is not None
        assert process.stdout is not None
        stack.callback(process.stdin.close)
        assert process.stdout.readline() == b"ready\n"
        assert resource.prlimit(process.pid, resource.RLIMIT_STACK)[0] == given
        assert largest_stack(process.pid) == pytest.approx(given, abs=GUARDS)


def test_a_body_with_some_depth_is_parsed(emulated_server: Running) -> None:
    """A depth that every Triton parses is answered, and the server stays alive."""
    depth = 200
    body = f'{{"text_input": "a", "max_tokens": 1, "extra": {"[" * depth}{"]" * depth}}}'
    with closing(connect(emulated_server)) as connection:
        connection.request("POST", "/v2/models/pdserve/generate", body)
        assert connection.getresponse().status in (200, 400)

    assert emulated_server.servers[0].ready()


def largest_stack(pid: int) -> int:
    """Return the bytes of a thread's largest stack, which glibc maps with a guard below."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    found = [0]
    for guard, above in itertools.pairwise(lines):
        (low, high), (start, end) = (
            [int(part, 16) for part in line.split()[0].split("-")] for line in (guard, above)
        )
        is_guard = guard.split()[1] == "---p" and high - low == resource.getpagesize()
        if is_guard and high == start and above.split()[1] == "rw-p":
            found.append(end - low)
    return max(found)
