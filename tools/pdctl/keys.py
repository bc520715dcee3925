"""Which key a server that is to start gets: the one that the rest of its deployment has."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pdserve.errors import DeploymentError
from pdserve.transfer import key

if TYPE_CHECKING:
    from pdctl.server import Server


def copy(folder: Path) -> Path:
    """Where the copy of a server lies, by the server's folder."""
    return folder / "kv.key"


def find(server: Server) -> bytes:
    """The deployment's key, made if this is the first of its servers here and there is none.

    Where others run already, theirs counts: with another key the new one could meet none of them.

    Raises:
        DeploymentError: the key's file is not to be used, or is not what the others have.
    """
    file = Path(server.deployment.transfer.key_file)
    for other in server.others():
        started = other.started
        if started is None or started.key_file != str(file) or other.pid is None:
            continue
        theirs = key.load(copy(other.folder))
        if file.exists() and key.load(file) != theirs:
            raise DeploymentError(
                f"key_file {file}: not the key that server {other.spec.name} runs with; put that "
                f"back, or stop the whole deployment first"
            )
        return theirs
    return key.make(file)
