"""The model that an engine computes: that of pdserve's torch or emulated engine."""

from __future__ import annotations

import json
import os
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from pdserve.engines.emulated import EmulatedDecode, EmulatedModel

if TYPE_CHECKING:
    from typing import TypeAlias

    from pdserve.engines.protocol import DecodeEngine
    from pdserve.engines.pytorch.model import TorchModel

    Model: TypeAlias = EmulatedModel | TorchModel

PROFILE = "FAKE_TENSORRT_LLM_PROFILE"


def load(path: str, dtype: str) -> Model:
    """Read it once per process. "auto" is the dtype that its config.json names.

    Raises:
        ValueError: there is none.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{path}: no config.json; the fake reads local directories alone")
    profile = os.environ.get(PROFILE)
    beside = folder / "profile.yaml"
    if profile or beside.is_file():
        return EmulatedModel(path, profile or str(beside))
    if dtype == "auto":
        names = json.loads((folder / "config.json").read_bytes())
        dtype = names.get("dtype") or names.get("torch_dtype") or "float32"
    return _torch(path, dtype)


@lru_cache
def _torch(path: str, dtype: str) -> TorchModel:
    # OpenMP reads this when torch is imported; threads that spin take the cores from others.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from pdserve.engines.pytorch.model import TorchModel

    return TorchModel(path, "cpu", dtype, threads=1)


def engine(model: Model, blocks: int, block_size: int) -> DecodeEngine:
    """Return the engine that computes prompts and steps."""
    if isinstance(model, EmulatedModel):
        return EmulatedDecode(model, blocks, block_size)
    from pdserve.engines.pytorch.threads import ThreadedDecode

    return ThreadedDecode(model, blocks, block_size)
