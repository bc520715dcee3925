"""Ends a server when the ``pdctl`` that holds it in the foreground is gone, however it went.

``python -m pdctl.guard FOLDER`` reads its standard input, a pipe that nobody writes to: its
end is the end of the process that holds the other end. Then the server that runs by what lies in
the folder ends, and its watchdog, which may have started it anew, before it.
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

    def __init__(self, folder: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pdctl.guard", str(folder)],
            stdin=subprocess.PIPE,
            start_new_session=True,  # a signal to pdctl's whole group spares it
        )

    def dismiss(self) -> None:
        """Let it make sure that nothing is left, and end."""
        self._process.communicate()


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.read()
    folder = Path(sys.argv[1])
    with contextlib.suppress(ServerError):  # one that cannot be killed keeps no server alive
        watchers.end(folder)
    token = footprint.token(folder)
    if token is not None:
        footprint.erase([token])


if __name__ == "__main__":
    main()
