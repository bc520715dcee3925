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
    return Software(
        python=platform.python_version(),
        glibc=libc.removeprefix("glibc "),
        triton=_triton(),
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


def _triton() -> str:
    """Return Triton's version, which only a running server and a file in NVIDIA's images tell."""
    try:
        binary = triton.locate().binary.resolve()
    except ServerError:
        return ""
    file = binary.parents[1] / "TRITON_VERSION"
    if file.exists():
        return file.read_text().strip()
    return PYTRITON.get(_version("nvidia-pytriton"), "not known")


def _torch_cuda() -> str:
    """Read it from the file that the build leaves, as importing torch takes seconds."""
    for file in metadata.files("torch") or () if _version("torch") else ():
        if str(file) == "torch/version.py":
            found = _CUDA.search(Path(str(file.locate())).read_text())
            return found[1] if found else ""
    return ""
