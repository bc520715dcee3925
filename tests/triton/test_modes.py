"""Tests for the modes of a server's files and regions, whatever the umask at its start."""

from __future__ import annotations

import contextlib
import stat
from pathlib import Path

import msgspec
import pytest

from pdctl import footprint
from tests.clients import generate, stub, wait_until
from tests.commandline import Pdctl
from tests.servers import Running, emulated_deployment

pytestmark = pytest.mark.triton


def pdctl(folder: Path, umask: int, *, gateway: bool = True) -> Pdctl:
    """Run a server, with or without a gateway."""
    deployment = emulated_deployment(folder, {})
    (spec,) = deployment.servers
    spec = msgspec.structs.replace(spec, gateway=gateway, client_shared_memory="key")
    return Pdctl(msgspec.structs.replace(deployment, servers=(spec,)), folder, umask)


def modes(paths: list[Path]) -> dict[str, int]:
    """Return the permissions of each file by name; symbolic links have none."""
    found = {}
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            mode = path.lstat().st_mode
            if not stat.S_ISLNK(mode):
                found[str(path)] = stat.S_IMODE(mode)
    return found


def wrong(server: Running, folder: Path) -> dict[str, str]:
    """Return the files and regions of a server that other users can access in any way."""
    (one,) = server.servers
    files = [folder / "run", *(folder / "run").rglob("*"), folder / "kv.key"]
    found = modes([*files, *footprint.regions(one.token or "")])
    assert len(found) > 20
    return {path: f"{mode:o}" for path, mode in found.items() if mode & 0o077}


@pytest.mark.parametrize(
    "umask", [0o022, pytest.param(0o077, marks=pytest.mark.full)], ids="{:03o}".format
)
def test_nothing_of_a_worker_is_anybody_elses(tmp_path: Path, umask: int) -> None:
    with pdctl(tmp_path, umask, gateway=False).up("--no-watch") as server:
        assert wrong(server, tmp_path) == {}


def test_nothing_of_a_server_is_anybody_elses_without_a_umask(tmp_path: Path) -> None:
    """This holds after requests, and after a repair, in which Triton makes a region again."""
    with pdctl(tmp_path, 0o000).up() as server:
        assert wrong(server, tmp_path) == {}
        (one,) = server.servers
        regions = footprint.regions(one.token or "")
        made_by_triton = [region for region in regions if "-triton-" in region.name]
        assert len(made_by_triton) == 6  # one for each model

        generate(server, text_input="The sky is", max_tokens=2, ignore_eos=True)
        killed = stub(server, "decode_0")
        killed.kill()
        wait_until(lambda: not one.ready("decode_0"), 10)
        wait_until(lambda: one.ready("decode_0"), 60)

        assert stub(server, "decode_0").pid != killed.pid
        assert set(footprint.regions(one.token or "")) - set(regions)
        assert wrong(server, tmp_path) == {}
