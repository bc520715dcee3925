"""Standard output that may become unwritable: a reader that has left, a full disk."""

from __future__ import annotations

import errno
import io
import os
import signal
from typing import Any, TextIO


class Output:
    """A stream that discards output once it cannot be written, so that the command continues."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.lost: OSError | None = None
        """Why it cannot be written."""
        if isinstance(stream, io.TextIOWrapper):
            # an answer must not fail because of the terminal's encoding
            stream.reconfigure(errors="replace")

    @property
    def status(self) -> int:
        """Return the exit status for it: that of SIGPIPE for a closed pipe; 0: nothing is lost."""
        if self.lost is None:
            return 0
        return 128 + signal.SIGPIPE if self.lost.errno == errno.EPIPE else 1

    def write(self, text: str) -> int:
        if self.lost is None:
            try:
                self._stream.write(text)
            except OSError as error:
                self._lose(error)
        return len(text)

    def flush(self) -> None:
        if self.lost is None:
            try:
                self._stream.flush()
            except OSError as error:
                self._lose(error)

    def _lose(self, error: OSError) -> None:
        self.lost = error
        # Buffered output is written again when the interpreter ends, which would print an error.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
