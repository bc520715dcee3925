"""The version whose API this process has, by FAKE_TENSORRT_LLM_VERSION."""

from __future__ import annotations

import os

VERSIONS = ("1.0.0", "1.2.0", "1.3.0rc25")

__version__ = os.environ.get("FAKE_TENSORRT_LLM_VERSION", VERSIONS[-1])
if __version__ not in VERSIONS:
    raise ImportError(
        f"FAKE_TENSORRT_LLM_VERSION {__version__} is not known; allowed are {', '.join(VERSIONS)}"
    )

OLDEST = __version__ == VERSIONS[0]
NEWEST = __version__ == VERSIONS[-1]
