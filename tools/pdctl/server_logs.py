"""Sends what is logged in the course of watching a server to that server's log, too."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

_FORM = "%(asctime)s %(server)s: %(message)s"
_folder: ContextVar[Path | None] = ContextVar("folder", default=None)
"""Folder of the server that the current task watches; the tasks and threads that it starts, too."""


def _named(record: logging.LogRecord) -> bool:
    folder = _folder.get()
    record.server = "agent" if folder is None else folder.name
    return True


def begin() -> None:
    """Log everything to standard error, with the name of the server that is concerned."""
    _add(logging.StreamHandler())
    logging.getLogger().setLevel(logging.INFO)


@contextlib.contextmanager
def of_server(folder: Path) -> Iterator[None]:
    """Within the block, in this task, log to ``watch.log`` in the folder of a server, too."""

    def concerns(_: logging.LogRecord) -> bool:
        return _folder.get() == folder

    token = _folder.set(folder)
    handler: logging.Handler = logging.NullHandler()  # it works without a log
    with contextlib.suppress(OSError):
        handler = logging.FileHandler(folder / "watch.log")
    handler.addFilter(concerns)
    _add(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
        _folder.reset(token)


def _add(handler: logging.Handler) -> None:
    handler.addFilter(_named)
    handler.setFormatter(logging.Formatter(_FORM))
    logging.getLogger().addHandler(handler)
