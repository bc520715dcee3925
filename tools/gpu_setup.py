#!/usr/bin/env python3
"""Set up .venv for the GPU suite: from the archives of gpu_wheels.py where there is no index.

    python3 tools/gpu_setup.py

On a machine with a complete .venv, or without archives, this is the ordinary set-up. Otherwise the
archives of .cache/gpu-wheels are unpacked into a new .venv that takes torch, and all else, from the
Python that runs this. Only the standard library is used here, and in what is imported.
"""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import sysconfig
import tarfile
import time
import venv
from pathlib import Path

import bootstrap
from bootstrap import CACHE, ROOT, VENV, SetupError

ARCHIVES = CACHE / "gpu-wheels"
EMBEDDED = "libpython"
NEEDED = (
    *("google.protobuf", "msgspec", "numpy", "psutil", "rich", "safetensors", "tokenizers"),
    *("torch", "transformers", "tritonclient.grpc.aio", "uvloop", "yaml"),
)
TRY_S = 300


def unpack(archive: Path, target: Path) -> None:
    with tarfile.open(archive, "r:xz") as opened:
        opened.extractall(target, filter="data")


def make() -> None:
    """Make the environment anew."""
    shutil.rmtree(VENV, ignore_errors=True)
    venv.EnvBuilder(symlinks=True).create(VENV)
    packages = bootstrap.site_packages()
    for archive in sorted(ARCHIVES.glob("*.tar.xz")):
        if not archive.name.startswith(f"{EMBEDDED}-"):
            unpack(archive, packages)
    paths = [ROOT / "python_backends", ROOT / "tools", *machine()]
    # These come after the archives' own: a package of both is taken from the archive.
    (packages / "_pdserve.pth").write_text("".join(f"{path}\n" for path in paths))
    if not bootstrap.has_libpython():
        embed(packages)


def machine() -> list[str]:
    """Return the folders of packages of the Python that runs this."""
    return [
        path
        for path in (*site.getsitepackages(), site.getusersitepackages())
        if Path(path).is_dir()
    ]


def embed(packages: Path) -> None:
    """Put the carried library of Python where Triton's stub looks for it.

    Raises:
        SetupError: none is carried.
    """
    found = list(ARCHIVES.glob(f"{EMBEDDED}-*.tar.xz"))
    if not found:
        raise SetupError(
            f"there is no libpython{bootstrap.VERSION}.so.1.0 here, and none is carried: give "
            f"`make gpu-wheels` a Python {bootstrap.VERSION} that has one (ARGS=--python=PATH)"
        )
    libraries = packages / "nvidia_pytriton.libs"
    unpack(found[0], libraries)
    with (packages / "_pdserve.pth").open("a") as file:
        file.write(f"{libraries / 'lib-dynload'}\n")


def check() -> None:
    """Raises SetupError: what the suite needs cannot be imported, or its servers not be started."""
    python = VENV / "bin" / "python"
    commands: dict[str, list[str | Path]] = {
        "a package": [python, "-c", f"import {', '.join(NEEDED)}"],
        "tritonserver": [_triton() / "bin" / "tritonserver", "--help"],
    }
    for name, command in commands.items():
        done = subprocess.run(command, capture_output=True, text=True, timeout=TRY_S, check=False)
        # The help of tritonserver ends with an exit status of its own.
        if done.returncode and "--model-repository" not in done.stdout + done.stderr:
            raise SetupError(f"{name} does not work here: {done.stderr[-2000:]}")
    stub = CACHE / "triton" / "backends" / "python" / "triton_python_backend_stub"
    if missing := unresolved(stub.resolve()):
        raise SetupError(f"{stub.name} cannot be loaded: {missing}")


def _triton() -> Path:
    return bootstrap.site_packages() / "pytriton" / "tritonserver"


def unresolved(program: Path) -> str:
    """Return the lines of the loader about libraries that it does not find."""
    library = sysconfig.get_config_var("LIBDIR") or ""
    path = ":".join(filter(None, (library, os.environ.get("LD_LIBRARY_PATH"))))
    environment = {**os.environ, "LD_TRACE_LOADED_OBJECTS": "1", "LD_LIBRARY_PATH": path}
    done = subprocess.run(
        [program], env=environment, capture_output=True, text=True, timeout=TRY_S, check=False
    )
    lines = (done.stdout + done.stderr).splitlines()
    return "; ".join(line.strip() for line in lines if "not found" in line)


def from_archives() -> None:
    """Make what is missing. Raises SetupError: this machine is not one for which they are made."""
    if bootstrap.VERSION != "3.12":
        raise SetupError(
            f"the archives of {ARCHIVES} are for Python 3.12; this is {sys.version.split()[0]} "
            "(make PYTHON=python3.12 ...)"
        )
    archives = [f"{one.name} {one.stat().st_size}" for one in sorted(ARCHIVES.glob("*.tar.xz"))]
    inputs = [Path(__file__).read_text(), str(ROOT), sys.prefix, *archives]
    begin = time.monotonic()
    bootstrap.run_steps(
        [
            bootstrap.Step("environment from archives", VENV, inputs, make),
            bootstrap.Step("triton backend", CACHE / "triton", inputs, bootstrap.make_backend),
            bootstrap.Step("check", CACHE / "triton", inputs, check),
        ]
    )
    print(f"set up from {len(archives)} archives; {time.monotonic() - begin:.0f} s")


def main() -> int:
    if all(step.complete for step in bootstrap.steps()) or not ARCHIVES.is_dir():
        return bootstrap.main()
    try:
        with bootstrap.exclusive(CACHE / "setup.lock"):
            from_archives()
    except SetupError as error:
        print(f"set-up: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
