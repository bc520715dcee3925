"""Opens the files of the deployment's model like the engine, without loading them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from pdserve.config import Deployment
from pdserve.engines import checkpoint
from pdserve.engines.emulated import EmulatedModel
from pdserve.errors import DeploymentError
from pdserve.kvcache.sharding import sharding_for

TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)


def model(deployment: Deployment) -> str:
    """Return why it cannot be served, with the file or the field; empty: it can."""
    path, ranks = Path(deployment.model), _ranks(deployment)
    try:
        if not path.exists():
            return f"{path} is not there"
        if deployment.engine.kind == "emulated":
            heads = EmulatedModel(deployment.model, deployment.engine.profile).layout.kv_heads
        else:
            heads = _heads(path, deployment) or max(ranks)
        if any(server.gateway for server in deployment.servers):
            _check_tokenizer(path)
        if not deployment.engine.external:
            sharding_for(*ranks, heads)
    except OSError as error:
        return f"{error.filename or path}: {error.strerror or error}"
    except (DeploymentError, SafetensorError, ValueError) as error:
        return str(error)
    return ""


def _ranks(deployment: Deployment) -> tuple[int, int]:
    return deployment.prefill.tensor_parallel, deployment.decode.tensor_parallel


def _heads(path: Path, deployment: Deployment) -> int | None:
    """Return the number of KV heads by its configuration; None: it does not say.

    Raises:
        OSError, ValueError, SafetensorError: a file is missing, unreadable or not what it should
            be; the message names it.
    """
    if path.is_file():
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError(f"{path} is a file, but no GGUF: name the model's directory")
        return None
    configuration = _json(path / "config.json")
    text = configuration.get("text_config") or configuration
    if deployment.engine.kind == "torch":
        checkpoint.check_attention(path, text)
        _check_weights(path)
    names = ("num_key_value_heads", "num_attention_heads", "n_head")
    return next((text[name] for name in names if isinstance(text.get(name), int)), None)


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} is no configuration: it holds no object")
    return found


def _check_weights(path: Path) -> None:
    """Open every file of weights."""
    shards = checkpoint.shards(path)
    for shard in shards:
        with shard.open("rb"):  # safe_open does not include the system's reason
            pass
        try:
            with safe_open(shard, "np"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{shard} holds no whole safetensors: {error}") from error
    others = [] if shards else sorted(path.glob("pytorch_model*.bin"))
    for other in others:
        with other.open("rb"):
            pass
    if not shards and not others:
        raise ValueError(f"{path} has no weights: neither model.safetensors nor an index of shards")


def _check_tokenizer(path: Path) -> None:
    found = [path / name for name in TOKENIZERS if (path / name).exists()]
    if path.is_dir() and not found:
        raise ValueError(f"{path} has no tokenizer; looked for: {', '.join(TOKENIZERS)}")
    for file in found:
        with file.open("rb"):
            pass
