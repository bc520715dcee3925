"""Tests for the resource limits that servers start with."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

from pdctl import limits

ANY = resource.RLIM_INFINITY
MIB = 1 << 20


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ((8 * MIB, ANY), (256 * MIB, ANY)),
        ((8 * MIB, 64 * MIB), (64 * MIB, 64 * MIB)),
        ((8 * MIB, 1024 * MIB), (256 * MIB, 1024 * MIB)),
        ((512 * MIB, ANY), (512 * MIB, ANY)),
        ((ANY, ANY), (256 * MIB, ANY)),  # a stack limit of which glibc would make 2 MiB
    ],
)
def test_stacks_as_far_as_the_hard_limit_allows(given: limits.Limit, wanted: limits.Limit) -> None:
    assert limits.stack_limit(given, room=True) == wanted


def test_stacks_stay_where_address_space_is_counted() -> None:
    assert limits.stack_limit((8 * MIB, ANY), room=False) == (8 * MIB, ANY)


def test_only_what_is_started_meanwhile_has_them() -> None:
    program = (
        "import resource as r; print(r.getrlimit(r.RLIMIT_NOFILE), r.getrlimit(r.RLIMIT_STACK))"
    )
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    stack = resource.getrlimit(resource.RLIMIT_STACK)
    soft = min(256, before[1])
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, before[1]))
    try:
        with limits.raised():
            said = subprocess.check_output([sys.executable, "-c", program], text=True)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (soft, before[1])
        assert resource.getrlimit(resource.RLIMIT_STACK) == stack
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)

    assert said.strip() == f"{(before[1], before[1])} {limits.stack_limit(stack, room=True)}"
