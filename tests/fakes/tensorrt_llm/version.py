"""The version whose API this process has, by FAKE_TENSORRT_LLM_VERSION."""

from __future__ import annotations

import os

VERSIONS = ("1.0.0", "1.2.1", "1.3.0rc29", "1.4.0rc1", "1.5.0.dev0")
DEFAULT = "1.4.0rc1"

__version__ = os.environ.get("FAKE_TENSORRT_LLM_VERSION", DEFAULT)
if __version__ not in VERSIONS:
    raise ImportError(
        f"FAKE_TENSORRT_LLM_VERSION {__version__} is not known; allowed are {', '.join(VERSIONS)}"
    )

OLDEST = __version__ == "1.0.0"
COLD_CLEANUP = __version__ == "1.2.1"
"""A KV cache whose time is over is freed when the next context request comes, not before."""
SINCE_1_3 = VERSIONS.index(__version__) >= VERSIONS.index("1.3.0rc29")
SINCE_1_4 = VERSIONS.index(__version__) >= VERSIONS.index("1.4.0rc1")
UNRELEASED = __version__ == "1.5.0.dev0"
