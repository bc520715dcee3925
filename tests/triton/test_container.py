"""Tests for what the image of target cpu runs, without a container: files, command, end."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from pdctl import footprint, watchers
from pdctl.paths import ROOT
from tests.dockerfile import HOME, files, placed, read
from tests.servers import free_ports

pytestmark = pytest.mark.triton

READY_S = 50.0
END_S = 15.0


class Image:
    """The image's folder; the environment and the model are linked in, not built."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        stages = read()[1]
        self.set_up, self.stage = stages["setup"], stages["cpu"]
        self.run = folder / ".run"
        self.run.mkdir(parents=True)
        for copy in self.stage.copies:
            if copy.origin:
                self._link(Path(copy.source).relative_to(HOME))
                continue
            for file in files(copy.source):
                target = folder / placed(copy, file)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / file, target)
        exposed = self.stage.one("EXPOSE").split()
        deployment = folder / "deployment.yaml"
        text = deployment.read_text()
        for port, free in zip(exposed, free_ports(len(exposed)), strict=True):
            text = text.replace(f"port: {port}", f"port: {free}")
        # The tests are not about torch, and to load it four times takes a minute.
        deployment.write_text(f"{text}\nengine: {{kind: emulated}}\n")

    def _link(self, path: Path) -> None:
        if path == Path(".venv"):
            self._environment(self.folder / path)
            return
        (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / path).symlink_to(ROOT / path)

    def _environment(self, made: Path) -> None:
        """Link this environment's packages, and the project as it is in this folder."""
        real, packages = Path(sys.prefix), Path(sysconfig.get_path("purelib"))
        (made / "bin").mkdir(parents=True)
        shutil.copy(real / "pyvenv.cfg", made)
        for name in ("python", "python3"):
            (made / "bin" / name).symlink_to(Path(sys.executable).resolve())
        _, _, script = (real / "bin" / "pdctl").read_text().partition("\n")
        (made / "bin" / "pdctl").write_text(f"#!{made / 'bin' / 'python'}\n{script}")
        (made / "bin" / "pdctl").chmod(0o755)
        target = made / packages.relative_to(real)
        target.mkdir(parents=True)
        (removed,) = (words for words in self.set_up.commands if "uninstall" in words)
        gone = {"_pdserve.pth"}
        for name in removed[removed.index("--yes") + 1 :]:
            gone |= {file.parts[0] for file in metadata.files(name) or ()}
        for entry in packages.iterdir():
            if entry.name not in gone:
                (target / entry.name).symlink_to(entry)
        project = (self.folder / "python_backends", self.folder / "tools")
        (target / "_pdserve.pth").write_text("\n".join(map(str, project)))

    @property
    def environment(self) -> dict[str, str]:
        """Return the image's variables, and none of this process."""
        given = self.stage.environment
        path = given.pop("PATH").replace(str(HOME), str(self.folder))
        return {**given, "PATH": path.replace("${PATH}", "/usr/bin:/bin"), "HOME": str(self.run)}

    def start(self, output: Path) -> subprocess.Popen[bytes]:
        """Start ENTRYPOINT and CMD; without the init, if this machine has none."""
        command = [*self.stage.list("ENTRYPOINT"), *self.stage.list("CMD")]
        path = self.environment["PATH"]
        if shutil.which(command[0], path=path) is None:
            command = self.stage.list("CMD")
        found = shutil.which(command[0], path=path)
        assert found is not None
        with output.open("wb") as log:
            return subprocess.Popen(
                [found, *command[1:]],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def healthy(self) -> tuple[bool, str]:
        checked = subprocess.run(
            [self.folder / ".venv" / "bin" / self.stage.health[0], *self.stage.health[1:]],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        return checked.returncode == 0, checked.stdout + checked.stderr

    def written(self) -> set[Path]:
        """Return all its files, except bytecode and those that the image's user may write."""
        return {
            path
            for path in self.folder.rglob("*")
            if self.run not in (path, *path.parents) and "__pycache__" not in path.parts
        }


@pytest.fixture
def image(tmp_path: Path) -> Iterator[Image]:
    made = Image(tmp_path / "pdserve")
    yield made
    token = footprint.token(made.run / "local")
    if token is not None:
        footprint.erase([token])


def test_the_image_serves_is_healthy_and_ends(image: Image, tmp_path: Path) -> None:
    before = image.written()
    output = tmp_path / "output"
    process = image.start(output)
    try:
        deadline = time.monotonic() + READY_S
        while "local is ready" not in output.read_text():
            assert process.poll() is None, output.read_text()
            assert time.monotonic() < deadline, output.read_text()
            time.sleep(0.1)
        token = footprint.token(image.run / "local")
        assert token is not None
        told = image.healthy()
        assert told[0], told[1] + output.read_text()
        assert "local answers" in told[1]
        process.send_signal(signal.Signals[image.stage.one("STOPSIGNAL")])
        assert process.wait(END_S) == 0, output.read_text()
    finally:
        process.kill()
        process.wait()
    assert not footprint.processes([token])
    assert not footprint.regions(token)
    assert watchers.pid(image.run / "local") is None
    assert not image.healthy()[0]
    assert image.written() == before, "its user may write to .run only"
