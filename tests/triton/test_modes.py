"""Modes of every file and region of a server, whatever the umask that it was started with."""

from __future__ import annotations

import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from pdctl import footprint
from pdctl.server import Server
from pdserve import config
from tests.clients import generate, stub, wait_until
from tests.servers import Running, emulated_deployment, on_free_ports

pytestmark = pytest.mark.triton

DRIVER = """
import sys
from pathlib import Path
from pdctl import cli
from pdctl.server import Server
run = Path(sys.argv.pop(1))
servers = cli._servers
cli._servers = lambda *given: [Server(s.deployment, s.spec, run) for s in servers(*given)]
cli.main()
"""
"""The command line as it is, but for where its state lies."""


@contextmanager
def up(folder: Path, umask: int, *, gateway: bool = True, watch: bool = False) -> Iterator[Running]:
    """``pdctl up`` in a shell of this umask, and ``pdctl down`` at the end."""
    deployment = on_free_ports(emulated_deployment(folder, {}))
    (spec,) = deployment.servers
    spec = msgspec.structs.replace(spec, gateway=gateway, client_shared_memory="key")
    deployment = msgspec.structs.replace(deployment, servers=(spec,))
    file = folder / "deployment.yaml"
    file.write_bytes(msgspec.yaml.encode(deployment))
    deployment = config.load(file)
    server = Server(deployment, deployment.servers[0], folder / "run")

    def pdctl(command: str, *options: str) -> None:
        done = subprocess.run(
            [sys.executable, "-c", DRIVER, folder / "run", command, *options, "--file", file],
            capture_output=True,
            text=True,
            check=False,
            umask=umask,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    try:
        pdctl("up", "--watch" if watch else "--no-watch")
        yield Running(server.http, server.grpc, server.metrics, deployment, [server])
    finally:
        pdctl("down")


def modes(paths: list[Path]) -> dict[str, int]:
    """Of each file that is there, by name: its permissions."""
    found = {}
    for path in paths:
        try:
            found[str(path)] = stat.S_IMODE(path.lstat().st_mode)
        except FileNotFoundError:
            continue
    return found


def wrong(server: Running, folder: Path) -> dict[str, str]:
    """Files and regions of a server that others than its user may touch in any way."""
    (one,) = server.servers
    files = [folder / "run", *(folder / "run").rglob("*"), folder / "kv.key"]
    found = modes([*files, *footprint.regions(one.token or "")])
    assert len(found) > 20
    return {path: f"{mode:o}" for path, mode in found.items() if mode & 0o077}


@pytest.mark.parametrize("umask", [0o022, 0o077], ids="{:03o}".format)
def test_nothing_of_a_worker_is_anybody_elses(tmp_path: Path, umask: int) -> None:
    with up(tmp_path, umask, gateway=False) as server:
        assert wrong(server, tmp_path) == {}


def test_nothing_of_a_server_is_anybody_elses_without_a_umask(tmp_path: Path) -> None:
    """After requests, and after a repair, too: a region of Triton's is made again by it."""
    with up(tmp_path, 0o000, watch=True) as server:
        assert wrong(server, tmp_path) == {}
        (one,) = server.servers
        regions = footprint.regions(one.token or "")
        assert len(regions) == 7  # one of Triton's for each of six models, one arena

        generate(server, text_input="The sky is", max_tokens=2, ignore_eos=True)
        killed = stub(server, "decode_0")
        killed.kill()
        wait_until(lambda: not one.ready("decode_0"), 10)
        wait_until(lambda: one.ready("decode_0"), 60)

        assert stub(server, "decode_0").pid != killed.pid
        assert set(footprint.regions(one.token or "")) - set(regions)
        assert wrong(server, tmp_path) == {}
