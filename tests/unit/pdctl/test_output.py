"""Tests for commands that end by no fault of their code: one line, and an exit status."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pdctl import cli
from pdctl.server import Server

PDCTL = [sys.executable, "-c", "from pdctl.cli import main; main()"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Return the file of a deployment whose servers do not run."""
    file = tmp_path / "deployment.yaml"
    file.write_text(
        "model: m\nservers: [{name: nobody, prefill: [p], decode: [d], http_port: 71}]\n"
    )
    return file


def pdctl(*arguments: str | Path | bytes, stdout: object, **options: object) -> tuple[int, str]:
    """Run pdctl; return its exit status, and its standard error."""
    done = subprocess.run(  # type: ignore[call-overload]
        [*PDCTL, *arguments], stdout=stdout, stderr=subprocess.PIPE, check=False, **options
    )
    return done.returncode, done.stderr.decode()


@pytest.mark.parametrize("arguments", [["status"], ["status", "--json"], ["--help"]])
def test_a_full_disk(file: Path, arguments: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        found = pdctl(*arguments, *(["-f", file] if "status" in arguments else []), stdout=full)
    assert found == (1, "pdctl: standard output cannot be written: No space left on device\n")


@pytest.mark.parametrize("arguments", [["status"], ["status", "--json"]])
def test_a_reader_that_has_left(file: Path, arguments: list[str]) -> None:
    process = subprocess.Popen(["true"], stdin=subprocess.PIPE)
    process.wait()
    assert pdctl(*arguments, "-f", file, stdout=process.stdin) == (141, "")


def test_what_is_not_utf8(file: Path) -> None:
    status, said = pdctl("status", "-f", bytes(file) + b"\xff", stdout=subprocess.DEVNULL)
    assert (status, said.count("\n")) == (1, 1)
    assert said.startswith("pdctl: ")


def test_a_run_folder_that_cannot_be_written(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").touch()  # this stops root, too
    servers = cli._servers
    monkeypatch.setattr(
        cli,
        "_servers",
        lambda *given: [Server(s.deployment, s.spec, tmp_path / "run") for s in servers(*given)],
    )
    monkeypatch.setattr(sys, "argv", ["pdctl", "render", "-f", str(file)])
    with pytest.raises(SystemExit) as raised:
        cli.main()
    assert raised.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith(f"pdctl: {tmp_path / 'run'}")
    assert said.count("\n") == 1


def test_a_mistake_in_the_code_is_not_hidden(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "_servers", broken)
    monkeypatch.setattr(sys, "argv", ["pdctl", "status", "-f", str(file)])
    with pytest.raises(ZeroDivisionError):
        cli.main()


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        ("chat", "--max-tokens", "4294967300"),
        ("chat", "--max-tokens", "2147483648"),
        ("chat", "--max-tokens", "0"),
        ("demo", "--max-tokens", "4294967300"),
        ("chat", "--seed", "18446744073709551616"),
        ("chat", "--seed", "-1"),
        ("chat", "--temperature", "-0.1"),
        ("chat", "--temperature", "1e9"),
        ("probe", "--timeout", "1e9"),
        ("probe", "--timeout", "inf"),
        ("up", "--timeout", "inf"),
    ],
)
def test_a_number_that_no_tensor_holds(command: str, option: str, value: str) -> None:
    """Passed on, it would become another number, or none."""
    words = ["Hello"] if command == "chat" else []
    done = CliRunner().invoke(cli.app, [command, *words, option, value])
    assert done.exit_code == 2
    assert "Input should be" in done.output


def test_version_and_help() -> None:
    done = CliRunner().invoke(cli.app, ["--version"])
    assert (done.exit_code, done.output) == (0, f"pdserve {version('pdserve')}\n")
    done = CliRunner().invoke(cli.app, ["--help"])
    assert ".run/SERVER/log" in done.output
    done = CliRunner().invoke(cli.app, ["status", "--help"], env={"COLUMNS": "200"})
    assert "deployment.yaml of the checkout" in done.output
