"""Tests for reading which transport UCX has picked, and for a missing `nixl` library."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from pdserve.transfer.protocol import Memory, Unreachable
from pdserve.transfer.transports.nixl import agent as nixl_agent
from pdserve.transfer.transports.nixl import ucx
from pdserve.transfer.transports.nixl.transport import NixlTransport


def table(owner: str, title: str, *rows: str) -> str:
    """Return a table as UCX prints it."""
    lines = [
        "+---+---+",
        f"| {owner} |",
        f"| {title} |",
        "+---+---+",
        "| Range | Description | Config |",
    ]
    lines += ["+---+---+", *(f"| {row} |" for row in rows), "+---+---+"]
    return "".join(f"[1795521713.094923] [host:9142 :0]   {line}\n" for line in lines)


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ("cma/memory", "cma"),
        ("tcp/eth0", "tcp/eth0"),
        ("rc_mlx5/mlx5_0:1/path0", "rc_mlx5/mlx5_0:1/path0"),
        (
            "50% on rc_mlx5/mlx5_0:1 and 50% on rc_mlx5/mlx5_1:1",
            "rc_mlx5/mlx5_0:1+rc_mlx5/mlx5_1:1",
        ),
        ("cuda_ipc/cuda", "cuda_ipc/cuda"),
    ],
)
def test_the_last_row_of_the_last_table_tells(config: str, found: str) -> None:
    read = "remote memory read by ucp_get*(multi) into host memory from host"
    log = "".join(
        [
            table("me self cfg#0", read, "0..inf | zero-copy | self/memory"),
            table(
                "me inter-node cfg#1", read, "0..64 | short | ud/x:1", f"65..inf | zero | {config}"
            ),
            "[1795521713.7] [host:9142 :0]  select.c:67   UCX  ERROR No such | thing | tcp/x |\n",
            table("me inter-node cfg#1", read.replace("get", "put"), "0..inf | zero | tcp/put"),
            table("another inter-node cfg#1", read, "0..inf | zero | tcp/another"),
        ]
    )
    assert ucx.lanes(log, "me", "get") == found
    assert ucx.lanes(log, "me", "put") == "tcp/put"
    assert ucx.lanes(log, "nobody", "get") == ""
    assert ucx.lanes("", "me", "get") == ""


def test_without_the_library_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    nixl_agent._library.cache_clear()
    for name in ("nixl_cu12", "nixl_cu13"):
        monkeypatch.setitem(sys.modules, f"{name}._api", None)
    memory = Memory.of(np.zeros(4096, np.uint8))
    with pytest.raises(Unreachable, match=r"cannot be imported .*nixl_cu12.*nixl_cu13"):
        NixlTransport().offer(memory, memory)
