"""The file in which an instance keeps its assignment, so that its next process goes on with it."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import msgspec

from pdserve.control.assignment import Assignment

ASSIGNMENTS = "assignments"
"""Name of the folder with these files, in the folder of a server."""

_log = logging.getLogger(__name__)


class AssignmentFile:
    """One instance's file, as JSON; only its user can read it.

    Args:
        folder: made if it does not exist.
    """

    def __init__(self, folder: Path, instance: str) -> None:
        self._path = folder / f"{instance}.json"

    def read(self) -> Assignment | None:
        """Return the assignment; None: there is none, or the file is broken, which is logged."""
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=Assignment)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            _log.error("%s is ignored: %s", self._path, error)
            return None

    def write(self, assignment: Assignment) -> None:
        """Replace the assignment: after a crash there is the former one or this. Raises OSError."""
        self._path.parent.mkdir(mode=0o700, exist_ok=True)
        aside = self._path.with_suffix(".new")
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(msgspec.json.encode(assignment))
            file.flush()
            os.fsync(file.fileno())
        aside.replace(self._path)
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # so that the new name is durable, too
        finally:
            os.close(folder)
