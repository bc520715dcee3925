"""Builds the engine that a deployment configures.

Libraries that it does not need are not imported.
"""
# ruff: noqa: PLC0415 - torch and transformers take seconds to import

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from pdserve import config
from pdserve.engines import checkpoint
from pdserve.engines.emulated import EmulatedDecode, EmulatedModel, EmulatedPrefill
from pdserve.engines.protocol import DecodeEngine, PrefillEngine
from pdserve.errors import DeploymentError

if TYPE_CHECKING:
    from pdserve.engines.external import ExternalEngine
    from pdserve.engines.pytorch.model import TorchModel


def model(deployment: config.Deployment) -> EmulatedModel | TorchModel:
    """Load the model once for this process.

    Raises:
        DeploymentError: it cannot be loaded or served.
    """
    engine = deployment.engine
    if engine.kind == "emulated":
        return EmulatedModel(deployment.model, engine.profile)
    # Threads that wait by spinning would take the cores from other instances. OpenMP reads this
    # when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from pdserve.engines.pytorch.model import TorchModel

    return TorchModel(deployment.model, engine.device, engine.dtype, engine.threads)


def prefill(model: EmulatedModel | TorchModel) -> PrefillEngine:
    """Make a prefill engine for the model."""
    if isinstance(model, EmulatedModel):
        return EmulatedPrefill(model)
    from pdserve.engines.pytorch.threads import ThreadedPrefill

    return ThreadedPrefill(model)


def decode(model: EmulatedModel | TorchModel, limits: config.Decode) -> DecodeEngine:
    """Make a decode engine for the model, with a pool of ``limits.blocks`` blocks."""
    if isinstance(model, EmulatedModel):
        return EmulatedDecode(model, limits.blocks, limits.block_size)
    from pdserve.engines.pytorch.threads import ThreadedDecode

    return ThreadedDecode(model, limits.blocks, limits.block_size)


def external(name: str, role: config.Role, deployment: config.Deployment) -> ExternalEngine:
    """Make an engine that transfers KV caches itself, for one instance.

    It is that of the package with the name of its kind.

    Raises:
        DeploymentError: it is not available, or not with these options.
    """
    module = importlib.import_module(f"pdserve.engines.{deployment.engine.kind}.engine")
    made: ExternalEngine = module.new(name, role, deployment, context_length(deployment))
    return made


def longest(deployment: config.Deployment) -> int:
    """Return the maximum tokens of prompt and answer of all decodes, without loading the model."""
    length = context_length(deployment)
    if deployment.engine.external:
        options = deployment.engine.tensorrt_llm
        asked = options.prefill.max_seq_len, options.decode.max_seq_len
        return min([length, *filter(None, asked)])
    return min(length, deployment.decode.blocks * deployment.decode.block_size)


def context_length(deployment: config.Deployment) -> int:
    """Return the context length of the model in tokens, without loading it."""
    if deployment.engine.kind == "emulated":
        return EmulatedModel(deployment.model, deployment.engine.profile).context_length
    path = Path(deployment.model)
    if path.is_file():
        from transformers import AutoConfig

        names = AutoConfig.from_pretrained(path.parent, gguf_file=path.name).to_dict()
    else:
        names = json.loads((path / "config.json").read_bytes())
    names = names.get("text_config") or names
    if not deployment.engine.external:
        checkpoint.check_attention(path, names)
    for name in ("max_position_embeddings", "n_positions"):
        if name in names:
            return int(names[name])
    raise DeploymentError(f"{path}: its configuration names no context length")
