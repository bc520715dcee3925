"""How a server was started: ``started`` in its folder, for later commands.

The deployment's file may have been edited since, and another deployment may have a server of the
same name.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import msgspec
from msgspec import Struct

from pdctl import private
from pdserve.config import Deployment, Server


class Started(Struct, frozen=True):
    """The deployment, and the server of it, that the latest start was for."""

    file: str
    """The deployment's file, resolved; empty: it was not read from one."""
    model: str
    key_file: str
    spec: Server
    watched: bool = True
    """True if it is meant to have a watchdog."""
    boot: str = ""
    """Names the time since the machine was started, in which it was; see `pdserve.node.epoch`."""

    def other(self, deployment: Deployment, spec: Server, file: str) -> str:
        """Describe how this is of another deployment; empty: it is of the same.

        It is the same file, whatever has been edited in it, or the same model at one of the same
        ports, wherever the file is now: two that share a port cannot both run.
        """
        if self.file and self.file == file:
            return ""
        if self.model == deployment.model and _addresses(self.spec) & _addresses(spec):
            return ""
        return (
            f"{self.file or 'another deployment'} (HTTP {self.spec.host}:{self.spec.http_port}, "
            f"model {self.model}), and not of {file or 'this one'} "
            f"(HTTP {spec.host}:{spec.http_port}, model {deployment.model})"
        )


def note(folder: Path, started: Started) -> None:
    """Write it. Raises: OSError."""
    new = folder / "started.new"
    private.write(new, msgspec.json.encode(started))
    new.replace(folder / "started")


def noted(folder: Path) -> Started | None:
    """Return what was written; None: it was not started, or by another version."""
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        return msgspec.json.decode((folder / "started").read_bytes(), type=Started)
    return None


def _addresses(spec: Server) -> set[tuple[str, int]]:
    return {(spec.host, port) for port in spec.ports}
