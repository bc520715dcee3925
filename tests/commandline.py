"""Runs ``pdctl`` like its users, in separate processes, with its state in a folder of the test."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec

from pdctl.server import Server
from pdserve import config
from tests.servers import Running, on_free_ports

TIMEOUT_S = 300
_DRIVER = """
import sys
from pathlib import Path
from pdctl import paths
paths.RUN = Path(sys.argv.pop(1))
from pdctl import cli
cli.main()
"""


class Pdctl:
    """The command line for one deployment.

    Args:
        folder: gets ``deployment.yaml`` and ``run``.
        umask: of its processes; -1: as here.
        environment: of its processes; None: as here.
    """

    def __init__(
        self,
        deployment: config.Deployment,
        folder: Path,
        umask: int = -1,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._file = folder / "deployment.yaml"
        self._file.write_bytes(msgspec.yaml.encode(on_free_ports(deployment)))
        self._run = folder / "run"
        self._umask = umask
        self._environment = dict(os.environ if environment is None else environment)
        read = config.load(self._file)
        self.servers = [Server(read, spec, self._run) for spec in read.servers]

    def __call__(self, command: str, *options: str) -> str:
        """Return what it prints; fail unless it ends with 0."""
        done = subprocess.run(
            [sys.executable, "-c", _DRIVER, self._run, command, *options, "--file", self._file],
            capture_output=True,
            text=True,
            check=False,
            env=self._environment,
            umask=self._umask,
            timeout=TIMEOUT_S,
        )
        assert done.returncode == 0, f"pdctl {command}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    @contextmanager
    def up(self, *options: str) -> Iterator[Running]:
        """Run ``pdctl up``, and ``pdctl down`` at the end."""
        try:
            self("up", *options)
            front = self.servers[0]
            yield Running(front.http, front.grpc, front.metrics, front.deployment, self.servers)
        finally:
            self("down")
