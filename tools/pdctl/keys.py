"""Finds the key of a server that is to start: the one that the rest of its deployment has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pdserve.errors import DeploymentError
from pdserve.transfer import key


def copy(folder: Path) -> Path:
    """Return the path of a server's copy, from the server's folder."""
    return folder / "kv.key"


def find(file: Path, running: Mapping[str, Path]) -> bytes:
    """Return the deployment's key, made if there is none and no server of it runs here.

    If others run already, their key is returned: with another one the new server could reach none.

    Args:
        file: path of the deployment's key.
        running: folders of the servers that run with that file's key, by name.

    Raises:
        DeploymentError: the key's file cannot be used, or differs from the others' key.
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
