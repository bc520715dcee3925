"""Which key a server that is to start gets: the one that the rest of its deployment has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pdserve.errors import DeploymentError
from pdserve.transfer import key


def copy(folder: Path) -> Path:
    """Where the copy of a server lies, by the server's folder."""
    return folder / "kv.key"


def find(file: Path, running: Mapping[str, Path]) -> bytes:
    """The deployment's key, made if this is the first of its servers here and there is none.

    Where others run already, theirs counts: with another key the new one could reach none of them.

    Args:
        file: of the deployment.
        running: folders of the servers that run with that file's key, by name.

    Raises:
        DeploymentError: the key's file is not to be used, or is not what the others have.
    """
    for name, folder in running.items():
        theirs = key.load(copy(folder))
        if file.exists() and key.load(file) != theirs:
            raise DeploymentError(
                f"key_file {file}: not the key that server {name} runs with; put that "
                f"back, or stop the whole deployment first"
            )
        return theirs
    return key.make(file)
