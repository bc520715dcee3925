"""Which of Triton's protocols are open to every client of a server, and which need a key.

A protocol that is not in ``OPEN`` is restricted, even one that only a newer Triton has: the list
names the open ones, never the restricted ones.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection
from pathlib import Path

from pdctl import private
from pdserve.config import Server

OPEN = {
    "health": "balancers and watchdogs ask it; it tells nothing but ready or not",
    "metadata": "clients read the names and types of inputs and outputs from it",
    "inference": "what the server is there for",
    "model-config": "perf_analyzer and genai-perf read it; it says what is in config.pbtxt",
    "statistics": "perf_analyzer and genai-perf read it; it counts requests, and has no content",
}
"""Protocols, with the reason why each is open to anyone who reaches the port."""

SHARED_MEMORY = "shared-memory"
ADMIN_HEADER = "pdctl-key"
SHARED_MEMORY_HEADER = "pdctl-shared-memory-key"
# Over gRPC, Triton expects the metadata key with this prefix.
GRPC_PREFIX = "triton-grpc-protocol-"

SHARED_MEMORY_KEY_FILE = "shared-memory.key"
"""The file is in the server's folder if ``client_shared_memory`` is ``key``."""


def restrictions(protocols: Collection[str], admin: str, shared_memory: str) -> list[str]:
    """Return groups of restricted protocols for Triton's options, ``protocols:header=key``.

    Args:
        protocols: all protocols of this Triton.
        admin: the key of everything that is neither open nor shared memory.
        shared_memory: the key of shared memory that clients bring.
    """
    keys = {SHARED_MEMORY: (SHARED_MEMORY_HEADER, shared_memory)}
    closed = [name for name in protocols if name not in OPEN]
    groups: dict[tuple[str, str], list[str]] = {}
    for name in closed:
        groups.setdefault(keys.get(name, (ADMIN_HEADER, admin)), []).append(name)
    return [f"{','.join(names)}:{header}={key}" for (header, key), names in groups.items()]


def shared_memory_key(server: Server, folder: Path, *, again: bool) -> str:
    """Return the key of clients' shared memory, in a file if the deployment allows it.

    Args:
        folder: the server's folder.
        again: the server is started again after a failure, so its clients keep their key.
    """
    file = folder / SHARED_MEMORY_KEY_FILE
    if server.client_shared_memory == "off":
        if not again:
            file.unlink(missing_ok=True)
        # Users of this machine can read command lines, but no header of HTTP carries a line feed.
        return f"{secrets.token_hex(32)}\n"
    if not (again and file.exists()):
        private.write(file, secrets.token_hex(16).encode())
    return file.read_text()
