"""The engine that a deployment asks for. What it does not ask for is not imported."""
# ruff: noqa: PLC0415 - torch and transformers take seconds to import

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from pdserve import config
from pdserve.engines.emulated import EmulatedDecode, EmulatedModel, EmulatedPrefill
from pdserve.engines.protocol import DecodeEngine, PrefillEngine
from pdserve.errors import DeploymentError

if TYPE_CHECKING:
    from pdserve.engines.torch_model import TorchModel


def model(deployment: config.Deployment) -> EmulatedModel | TorchModel:
    """Load the model once for this process.

    Raises:
        DeploymentError: it cannot be loaded or served.
    """
    engine = deployment.engine
    if engine.kind == "emulated":
        return EmulatedModel(deployment.model, engine.profile)
    # Threads that wait by spinning would take the cores from the other instances; read by
    # OpenMP when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from pdserve.engines.torch_model import TorchModel

    return TorchModel(deployment.model, engine.device, engine.dtype, engine.threads)


def prefill(model: EmulatedModel | TorchModel) -> PrefillEngine:
    """A prefill engine over the model."""
    if isinstance(model, EmulatedModel):
        return EmulatedPrefill(model)
    from pdserve.engines.torch import ThreadedPrefill

    return ThreadedPrefill(model)


def decode(model: EmulatedModel | TorchModel, limits: config.Decode) -> DecodeEngine:
    """A decode engine over the model, with a pool of ``limits.blocks`` blocks."""
    if isinstance(model, EmulatedModel):
        return EmulatedDecode(model, limits.blocks, limits.block_size)
    from pdserve.engines.torch import ThreadedDecode

    return ThreadedDecode(model, limits.blocks, limits.block_size)


def context_length(deployment: config.Deployment) -> int:
    """Tokens of prompt and answer together, at most; without loading the model."""
    if deployment.engine.kind == "emulated":
        return EmulatedModel(deployment.model, deployment.engine.profile).context_length
    path = Path(deployment.model)
    if path.is_file():
        from transformers import AutoConfig

        names = AutoConfig.from_pretrained(path.parent, gguf_file=path.name).to_dict()
    else:
        names = json.loads((path / "config.json").read_bytes())
    for name in ("max_position_embeddings", "n_positions"):
        if name in names:
            return int(names[name])
    raise DeploymentError(f"{path}: its configuration names no context length")
