"""Finds the installed versions, without importing the packages."""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata
from pathlib import Path

from pdctl import triton
from pdctl.doctor.inventory import Software
from pdctl.doctor.versions import NIXL, PACKAGES, PYTRITON
from pdctl.errors import ServerError

_CUDA = re.compile(r"^cuda\b.*= '([\d.]+)'", re.MULTILINE)


def software() -> Software:
    found = {name: _version(name) for name in PACKAGES}
    libc = os.confstr("CS_GNU_LIBC_VERSION") or ""
    server, embedded = _triton()
    return Software(
        python=platform.python_version(),
        glibc=libc.removeprefix("glibc "),
        triton=server,
        embedded=embedded,
        packages={name: version for name, version in found.items() if version},
        torch_cuda=_torch_cuda(),
    )


def nixl_library() -> str | None:
    """Return the libucp of the installed nixl; None: there is no nixl."""
    for name in NIXL:
        if _version(name):
            for file in metadata.files(name) or ():
                if file.name.startswith("libucp") and ".so" in file.name:
                    return str(file.locate())
            return "libucp.so.0"
    return None


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _triton() -> tuple[str, bool]:
    """Return Triton's version, and whether it is the one in the wheel.

    Only a running server tells its version; NVIDIA's images have it in a file and in a variable.
    """
    try:
        located = triton.locate()
    except ServerError:
        return "", False
    file = located.binary.resolve().parents[1] / "TRITON_VERSION"
    embedded = bool(located.flags)
    if file.exists():
        return file.read_text().strip(), embedded
    if embedded:
        return PYTRITON.get(_version("nvidia-pytriton"), "not known"), True
    return os.environ.get("TRITON_SERVER_VERSION", "not known"), False


def _torch_cuda() -> str:
    """Read it from the file that the build leaves, as importing torch takes seconds."""
    for file in metadata.files("torch") or () if _version("torch") else ():
        if str(file) == "torch/version.py":
            found = _CUDA.search(Path(str(file.locate())).read_text())
            return found[1] if found else ""
    return ""
