"""Ends a server when the ``pdctl`` that holds it in the foreground has ended in any way.

``python -m pdctl.guard FOLDER TOKEN`` reads its standard input, a pipe to which nothing is written:
it ends with the process that holds the other end. Then the server with that token ends, and
before it the watchdog of its folder, which may have started it anew. A later start in the same
folder has another token, and is left alone.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from pathlib import Path

from pdctl import footprint, watchers
from pdctl.errors import ServerError


class Guard:
    """The other end of the pipe."""

    def __init__(self, folder: Path, token: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pdctl.guard", str(folder), token],
            stdin=subprocess.PIPE,
            # so that a signal to pdctl's whole process group does not reach it
            start_new_session=True,
        )

    def dismiss(self) -> None:
        """Let it check that nothing is left, and end."""
        self._process.communicate()


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.read()
    folder, token = Path(sys.argv[1]), sys.argv[2]
    if footprint.token(folder) == token:
        # a watchdog that cannot be killed must not keep a server alive
        with contextlib.suppress(ServerError):
            watchers.end(folder)
    footprint.erase([token])


if __name__ == "__main__":
    main()
