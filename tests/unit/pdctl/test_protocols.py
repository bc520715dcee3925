"""Tests for the restriction of protocols: which ones need a key, and which key."""

from __future__ import annotations

from pathlib import Path

import pytest

from pdctl import protocols, triton
from pdctl.errors import ServerError
from pdserve.config import Server

HELP = """Usage: tritonserver [options]
HTTP:
  --http-thread-count <integer>
\tNumber of threads handling HTTP requests.
  --http-restricted-api <<string>:<string>=<string>>
\tSpecify restricted HTTP api setting. Allowed APIs: health,
\tinference, shared-memory, telepathy

GRPC:
  --grpc-restricted-protocol <<string>:<string>=<string>>
\tSpecify restricted GRPC protocol setting. Allowed protocols:
\thealth, logging
Shared Memory:
  --allow-client-shm <boolean>
\tAllow clients to register regions. Default is false.
"""
KEYS = triton.Keys("admin", "shared")


def lines(server: Server, text: str = HELP) -> list[str]:
    found = triton.Triton(Path("/bin/tritonserver"), (), {})
    known = triton.parse_help(text)
    return triton.command(found, known, server, Path("/m"), "token", KEYS, 1 << 20)


def test_what_is_not_listed_as_open_is_restricted() -> None:
    """A protocol that only a newer Triton has is restricted, too."""
    groups = protocols.restrictions(
        ["health", "telepathy", "shared-memory", "logging", "inference"], "admin", "shared"
    )

    assert groups == [
        "telepathy,logging:pdctl-key=admin",
        "shared-memory:pdctl-shared-memory-key=shared",
    ]


def test_protocols_are_those_that_the_server_itself_names() -> None:
    known = triton.parse_help(HELP)

    assert known.http_protocols == ("health", "inference", "shared-memory", "telepathy")
    assert known.grpc_protocols == ("health", "logging")
    assert known.names == {
        *("http-thread-count", "http-restricted-api", "grpc-restricted-protocol"),
        "allow-client-shm",
    }


@pytest.mark.parametrize("missing", ["Allowed APIs", "--grpc-restricted-protocol"])
def test_a_server_that_cannot_restrict_is_not_started(missing: str) -> None:
    with pytest.raises(ServerError, match="names no protocols"):
        triton.parse_help(HELP.replace(missing, "gone"))


def test_the_command_line_restricts_both_endpoints() -> None:
    restricted = [line for line in lines(Server("local")) if "restricted" in line]

    assert restricted == [
        "--http-restricted-api=shared-memory:pdctl-shared-memory-key=shared",
        "--http-restricted-api=telepathy:pdctl-key=admin",
        "--grpc-restricted-protocol=logging:pdctl-key=admin",
    ]


@pytest.mark.parametrize(("allowed", "flag"), [("off", "false"), ("key", "true")])
def test_newer_servers_own_switch(allowed: str, flag: str) -> None:
    server = Server("local", client_shared_memory=allowed)  # type: ignore[arg-type]

    assert f"--allow-client-shm={flag}" in lines(server)
    without = HELP.partition("Shared Memory:")[0]
    assert not [line for line in lines(server, without) if "client-shm" in line]


def test_newer_servers_own_limit_of_bodies() -> None:
    """The limit has room for the longest prompt, in whatever encoding, and no more than that."""
    option = "  --http-max-input-size <integer>\n\tMaximum allowed HTTP request input size.\n"

    assert f"--http-max-input-size={10 << 20}" in lines(Server("local"), HELP + option)
    assert not [line for line in lines(Server("local")) if "max-input-size" in line]


def test_a_key_that_is_off_cannot_be_sent_and_is_told_nobody(tmp_path: Path) -> None:
    server = Server("local")
    (tmp_path / protocols.SHARED_MEMORY_KEY_FILE).write_text("of a deployment before")

    keys = {protocols.shared_memory_key(server, tmp_path, again=False) for _ in range(2)}

    assert len(keys) == 2
    assert all(key.endswith("\n") for key in keys)
    assert not list(tmp_path.iterdir())


def test_a_repair_changes_no_file(tmp_path: Path) -> None:
    """The file system may be read-only, and then even a missing file cannot be removed."""
    file = tmp_path / protocols.SHARED_MEMORY_KEY_FILE
    file.write_text("of a deployment before")

    protocols.shared_memory_key(Server("local"), tmp_path, again=True)

    assert file.read_text() == "of a deployment before"


def test_a_key_outlives_repairs_and_not_the_next_start(tmp_path: Path) -> None:
    server = Server("local", client_shared_memory="key")

    first = protocols.shared_memory_key(server, tmp_path, again=False)
    repaired = protocols.shared_memory_key(server, tmp_path, again=True)
    second = protocols.shared_memory_key(server, tmp_path, again=False)

    file = tmp_path / protocols.SHARED_MEMORY_KEY_FILE
    assert first == repaired != second == file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600
