"""The versions that the project works with."""

from __future__ import annotations

import re

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from pdserve.engines.tensorrt_llm.api import VERSIONS

SUPPORTED = {
    name: SpecifierSet(versions, prereleases=True)
    for name, versions in {
        "Python": ">=3.10,<3.13",
        "glibc": ">=2.35",
        "Triton": ">=2.51",
        "numpy": ">=1.26,<2",
        "tritonclient": ">=2.50",
        "torch": ">=2.13,<3",
        "nixl-cu12": ">=1.5.1,<2",
        "nixl-cu13": ">=1.5.1,<2",
        "cuda-bindings": ">=12.9,<14",
        "tensorrt_llm": ">=1.0",
    }.items()
}
READ = {"tensorrt_llm": VERSIONS}
"""Versions whose source was read, where later ones are taken as long as they have every name that
is used."""
PACKAGES = tuple(name for name in SUPPORTED if name not in ("Python", "glibc", "Triton"))
NIXL = ("nixl-cu12", "nixl-cu13")
"""The packages, in the order in which they are tried."""
NUMPY_1 = SpecifierSet("==2.51.*")
"""The Triton servers (24.10) whose stubs corrupt tensors under numpy 2."""
BLS = SpecifierSet(">=2.71", prereleases=True)
"""The Triton servers (26.07 and later) without the deadlock of decoupled BLS, and its use of memory
that is freed already (python_backend#439)."""
STATISTICS = SpecifierSet(">=1.3.dev0", prereleases=True)
"""Versions of tensorrt_llm that send statistics of use unless told otherwise."""
OPENAI = "openai>=1.108.1,<2"
"""The first openai with ``PartReasoningText``, which tensorrt_llm 1.2 imports, and those of its
major version."""
DRIVERS = {12: 525, 13: 580}
"""The first driver for each CUDA version."""
PYTRITON = {"0.7.0": "2.51.0"}
"""The Triton server in each nvidia-pytriton, for when no other file tells."""


def within(version: str, versions: SpecifierSet) -> bool:
    """Tell whether a version is in a range; an empty or invalid one is not."""
    try:
        return Version(version) in versions
    except InvalidVersion:
        return False


def major(version: str) -> int:
    """Return the number it begins with; 0: there is none."""
    found = re.match(r"\d+", version)
    return int(found[0]) if found else 0
