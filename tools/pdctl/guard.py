"""Ends a server when the ``pdctl`` that holds it in the foreground is gone, however it went.

``python -m pdctl.guard TOKEN`` reads its standard input, a pipe that nobody writes to: its
end is the end of the process that holds the other end.
"""

from __future__ import annotations

import signal
import subprocess
import sys

from pdctl.footprint import erase


class Guard:
    """The other end of the pipe."""

    def __init__(self, token: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pdctl.guard", token],
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
    erase(sys.argv[1:])


if __name__ == "__main__":
    main()
