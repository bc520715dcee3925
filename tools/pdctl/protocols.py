"""Which of Triton's protocols are open to every client of a server, and what the others ask for.

A protocol that is not in ``OPEN`` is restricted, also one that only a newer Triton has: what is
open is listed, never what is not.
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
"""Protocol to the reason why it is open to whoever reaches the port."""

SHARED_MEMORY = "shared-memory"
ADMIN_HEADER = "pdctl-key"
SHARED_MEMORY_HEADER = "pdctl-shared-memory-key"
# Over gRPC, Triton expects the metadata key with this before it.
GRPC_PREFIX = "triton-grpc-protocol-"

SHARED_MEMORY_KEY_FILE = "shared-memory.key"
"""In the server's folder, where ``client_shared_memory`` is ``key``."""


def restrictions(protocols: Collection[str], admin: str, shared_memory: str) -> list[str]:
    """Groups of restricted protocols as Triton's options take them, ``protocols:header=key``.

    Args:
        protocols: all that this Triton has.
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
    """The key of shared memory that clients bring; told in a file if the deployment allows it.

    Args:
        folder: of the server.
        again: the server is started anew after a failure: its clients go on with the key they have.
    """
    file = folder / SHARED_MEMORY_KEY_FILE
    if server.client_shared_memory == "off":
        if not again:
            file.unlink(missing_ok=True)
        # Users of this machine can read command lines. No header of HTTP carries a line feed.
        return f"{secrets.token_hex(32)}\n"
    if not (again and file.exists()):
        private.write(file, secrets.token_hex(16).encode())
    return file.read_text()
