"""A real server for a measurement: the deployment, the baselines beside it, its processes."""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pdctl.paths import MODEL_REPOSITORY, ROOT
from pdctl.server import Server
from pdserve import config

HERE = Path(__file__).parent
BASELINES = HERE / "baselines"
PROFILES = HERE / "profiles"
MODEL = ROOT / ".cache" / "models" / "SmolLM2-135M-Instruct"
START_S = 120.0


def deployment(
    profile: str | None,
    *,
    channel: Literal["grpc", "bls"] = "grpc",
    each: int = 2,
    arena_mib: int = 64,
) -> config.Deployment:
    """Return the default topology: one server with a gateway, ``each`` prefills and as many
    decodes.

    There are enough slots and blocks that no measurement includes waiting for them.

    Args:
        profile: name of a timing profile in ``perf/profiles``; None: the torch engine.
    """
    http, grpc, metrics = _free_ports(3)
    server = config.Server(
        name="perf",
        http_port=http,
        grpc_port=grpc,
        metrics_port=metrics,
        prefill=tuple(f"prefill_{n}" for n in range(each)),
        decode=tuple(f"decode_{n}" for n in range(each)),
    )
    engine, decode = config.Engine(), config.Decode()
    if profile is not None:
        engine = config.Engine(kind="emulated", profile=str(PROFILES / f"{profile}.yaml"))
        decode = config.Decode(blocks=4096)
    return config.Deployment(
        model=str(MODEL),
        servers=(server,),
        engine=engine,
        prefill=config.Prefill(slots=32, batch=32, arena_mib=arena_mib),
        decode=decode,
        gateway=config.Gateway(channel=channel),
    )


class MeasuredServer(Server):
    """A server whose repository also contains baselines, with the same tensors as pdserve."""

    def __init__(
        self, deployment: config.Deployment, run: Path, baselines: tuple[str, ...]
    ) -> None:
        super().__init__(deployment, deployment.servers[0], run)
        self._baselines = baselines

    def render(self) -> None:
        super().render()
        public = (MODEL_REPOSITORY / "pdserve" / "config.pbtxt").read_text()
        for name in self._baselines:
            shutil.copytree(BASELINES / name, self.repository / name)
            text = re.sub(r'^name: ".*"', f'name: "{name}"', public, flags=re.MULTILINE)
            (self.repository / name / "config.pbtxt").write_text(text)


@contextlib.contextmanager
def serving(deployment: config.Deployment, *baselines: str) -> Iterator[MeasuredServer]:
    """Run a server; it ends, and leaves nothing behind, with the ``with`` block."""
    with tempfile.TemporaryDirectory(prefix="pdserve-perf-") as run:
        server = MeasuredServer(deployment, Path(run), baselines)
        try:
            server.start(held=True)
            server.wait_ready(START_S)
            yield server
        finally:
            server.stop()


def _free_ports(count: int) -> list[int]:
    """Return ports on which nothing listens at the moment."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
