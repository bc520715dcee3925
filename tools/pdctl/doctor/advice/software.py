"""Findings about installed versions, compared with those that the project works with."""

from __future__ import annotations

from collections.abc import Iterator

from pdctl.doctor.advice.finding import Finding
from pdctl.doctor.advice.needs import Needs
from pdctl.doctor.advice.ways import too_old, visible
from pdctl.doctor.inventory import Inventory
from pdctl.doctor.versions import DRIVERS, NIXL, NUMPY_1, PACKAGES, SUPPORTED, major, within

_MENDS = {
    "Python": "make PYTHON=python3.12 setup",
    "glibc": "Ubuntu 22.04, Debian 12 or later; or NVIDIA's Triton image",
    "Triton": "make setup; or NVIDIA's Triton image",
    "tensorrt_llm": "the Dockerfile's target gpu: docker build --target gpu .",
}
_EXTRAS = {
    "nixl-cu12": "pip install 'pdserve[nixl]' (CUDA 13: 'pdserve[nixl-cu13]')",
    "nixl-cu13": "pip install 'pdserve[nixl-cu13]'",
    "cuda-bindings": "pip install 'pdserve[cuda]'",
}
"""Mends beside the embedded Triton. They also give numpy the version that its stubs need, which
would break packages of an image that were built against another one."""
_OF_THE_IMAGE = ("numpy", "torch")
"""Packages that others in an image were built against: no version is installed over them."""
_USES = {
    "torch": "engine torch",
    "nixl-cu12": "transport nixl: KV caches between hosts",
    "cuda-bindings": "transport cuda_ipc",
    "tensorrt_llm": "engine tensorrt_llm",
}


def software(inventory: Inventory, needs: Needs) -> Iterator[Finding]:
    """Return one finding for all fitting versions, and one for each other one."""
    found = _found(inventory)
    fine = {name for name, version in found.items() if _fine(name, version, found["Triton"])}
    good = [f"{name} {version}" for name, version in found.items() if name in fine]
    yield Finding(about="versions", state="ok", found=", ".join(good))
    for name, version in found.items():
        if name not in fine:
            yield _unfit(name, version, _mend(name, inventory), needed=_needed(name, needs))
    if needs.engine == "torch" and needs.gpus and not inventory.software.torch_cuda:
        yield Finding(
            about="torch",
            state="problem",
            found=f"{found['torch'] or 'not installed'}: built without CUDA",
            unused=f"engine torch {needs.device}",
            mend="torch from PyTorch's index for this CUDA; or engine.device: cpu",
        )
    if inventory.gpus:
        yield from _drivers(inventory, needs)


def _found(inventory: Inventory) -> dict[str, str]:
    software = inventory.software
    found = {
        "Python": software.python,
        "glibc": software.glibc,
        "Triton": software.triton,
        **{name: software.packages.get(name, "") for name in PACKAGES},
    }
    # One nixl is enough, and one finding if there is none.
    spare = NIXL[0] if found[NIXL[1]] and not found[NIXL[0]] else NIXL[1]
    if not found[spare]:
        del found[spare]
    return found


def _fine(name: str, version: str, triton: str) -> bool:
    # The version of a Triton that is neither in NVIDIA's image nor in the wheel is in no file.
    if name == "Triton" and version == "not known":
        return True
    if name == "numpy" and major(version) > 1:
        return not within(triton, NUMPY_1)
    return within(version, SUPPORTED[name])


def _needed(name: str, needs: Needs) -> bool:
    return {
        "torch": needs.engine == "torch",
        "nixl-cu12": needs.nixl,
        "nixl-cu13": needs.nixl,
        "cuda-bindings": bool(needs.gpus) and needs.transports[:1] == ("cuda_ipc",),
        "tensorrt_llm": needs.engine == "tensorrt_llm",
    }.get(name, True)


def _mend(name: str, inventory: Inventory) -> str:
    software = inventory.software
    if name in _MENDS:
        return _MENDS[name]
    if software.embedded and name in _EXTRAS:
        return _EXTRAS[name]
    image = "tensorrt_llm" in software.packages or not software.embedded
    if image and name in _OF_THE_IMAGE and software.packages.get(name):
        return (
            f"another image, or `make setup` beside it: packages here were built against {name} "
            f"{software.packages[name]}"
        )
    return f"pip install '{name}{SUPPORTED[name]}'"


def _unfit(name: str, version: str, mend: str, *, needed: bool) -> Finding:
    return Finding(
        about=name,
        state="problem" if needed else "note" if version else "missing",
        found=f"{version}, not {SUPPORTED[name]}" if version else "not installed",
        unused=_USES.get(name, ""),
        mend=mend,
    )


def _drivers(inventory: Inventory, needs: Needs) -> Iterator[Finding]:
    """Return findings about packages for a CUDA version that the driver does not support."""
    software = inventory.software
    packages = software.packages
    builds = {"torch": software.torch_cuda, "cuda-bindings": packages.get("cuda-bindings", "")}
    builds |= {name: name[-2:] for name in NIXL if name in packages}
    old = {name: why for name, cuda in builds.items() if (why := too_old(inventory, cuda))}
    if old:
        # tensorrt_llm computes with torch, too.
        used = any(name == "torch" or _needed(name, needs) for name in old)
        newest = max(major(builds[name]) for name in old)
        yield Finding(
            about="GPU driver",
            state="problem" if needs.gpus and used else "note",
            found=f"{next(iter(old.values()))}, which {' and '.join(old)} want for CUDA {newest}",
            unused="engines and transports on a GPU",
            mend=f"driver {DRIVERS[newest]} or later; or builds for an older CUDA",
        )


def engines(inventory: Inventory) -> dict[str, str]:
    """Return why this host cannot run an engine; empty: it can."""
    software = inventory.software
    no_gpu = "" if visible(inventory) else "no GPU"
    lacks = {
        name: ""
        if within(software.packages.get(name, ""), SUPPORTED[name])
        else f"no {name} that is supported"
        for name in ("torch", "tensorrt_llm")
    }
    lacks["tensorrt_llm"] = lacks["tensorrt_llm"] or software.tensorrt_llm
    no_cuda = "" if software.torch_cuda else "torch is built without CUDA"
    return {
        "torch on the CPU": lacks["torch"],
        "torch on a GPU": no_gpu
        or lacks["torch"]
        or no_cuda
        or too_old(inventory, software.torch_cuda),
        "tensorrt_llm": no_gpu or lacks["tensorrt_llm"],
        "emulated": "",
    }
