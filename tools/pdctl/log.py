"""Reads from a server's log what happened at its start, and follows that of its watchdog."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

_LOADED = re.compile(r"successfully loaded '([^']+)'")
_FAILED = re.compile(r"failed to load '([^']+)' version \d+: (.*)\"$", re.MULTILINE)
_ERROR = re.compile(r"^(?:E\d{4} \S+ \d+ \S+ |error: )(.*)$", re.MULTILINE)
_STARVED = re.compile(
    r"Stub process '[^']+' is not healthy|Failed to obtain the health mutex"
    r"|boost::interprocess::lock_exception"
)
_REFUSED = re.compile(
    r"(?:failed to load '[^']+' version \d+|Failed to initialize Python stub): "
    r"[^\n]*\bDeploymentError: "
)
_NOISE = ("CudaDriverHelper", "unable to create stream for ensemble")
LINES = 15


def loaded(text: str) -> set[str]:
    """Return the models that are loaded."""
    return set(_LOADED.findall(text))


def starved(text: str) -> bool:
    """Tell whether the server ended because a loading process gave no sign of life in time.

    A model that refuses its deployment would do so at the next start, too, whatever else is said.
    """
    return _STARVED.search(text) is not None and _REFUSED.search(text) is None


def relevant(text: str) -> list[str]:
    """Return the lines that tell why it did not start: failed models, else errors, else the end."""
    failed = dict(_FAILED.findall(text))
    if failed:
        lines = []
        for model, reason in failed.items():
            first, *rest = reason.replace("\\n", "\n").strip().splitlines()
            lines += [f"model {model}: {first}", *(line for line in rest if line.strip())]
        return lines
    errors = [line for line in _ERROR.findall(text) if not any(word in line for word in _NOISE)]
    return (errors or text.rstrip().splitlines())[-LINES:]


class Following:
    """What is added to a file from now on."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._at = file.stat().st_size if file.exists() else 0

    def new(self) -> str:
        """Return what has been added since the last call; nothing if it cannot be read."""
        with contextlib.suppress(OSError), self._file.open("rb") as opened:
            opened.seek(self._at)
            data = opened.read()
            self._at += len(data)
            return data.decode(errors="replace")
        return ""
