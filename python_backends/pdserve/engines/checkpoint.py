"""Reads a model's files, as far as that needs no model library."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pdserve.errors import DeploymentError

SAMPLE_BYTES = 1 << 16
# Types of rotary embedding whose frequencies change with the length of the sequence, after K has
# been stored.
REFUSED_ROPES = ("dynamic", "longrope")


def fingerprint(path: Path, about: str) -> str:
    """Return a text that is equal for two processes with the same weights and the same ``about``.

    It covers the name, the size and a sample of the bytes of each file of weights.
    """
    digest = hashlib.sha256(about.encode())
    files = (
        [path]
        if path.is_file()
        else sorted([path / "config.json", *path.glob("*.safetensors"), *path.glob("*.bin")])
    )
    for name in files:
        size = name.stat().st_size
        digest.update(f"{name.name} {size} ".encode())
        with name.open("rb") as file:
            for offset in (0, size // 2, max(0, size - SAMPLE_BYTES)):
                file.seek(offset)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def known_eos_ids(path: Path) -> list[int]:
    """Return the end-of-text ids, as ``eos_ids`` does; empty if the model's files name none."""
    try:
        return eos_ids(path)
    except DeploymentError:
        return []


def vocabulary(path: Path) -> int:
    """Return the number of token ids: ``vocab_size`` of config.json, or of its ``text_config``.

    Raises:
        DeploymentError: there is no such configuration.
    """
    file = path / "config.json"
    try:
        config = json.loads(file.read_bytes())
        return int(config.get("text_config", config)["vocab_size"])
    except (OSError, ValueError, KeyError) as error:
        raise DeploymentError(f"{file}: names no vocab_size: {error!r}") from error


def shards(path: Path) -> list[Path]:
    """Return the safetensors files of a directory, by its index if there is one."""
    index = path / "model.safetensors.index.json"
    if index.exists():
        return [
            path / name
            for name in sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        ]
    single = path / "model.safetensors"
    return [single] if single.exists() else []


def eos_ids(path: Path) -> list[int]:
    """Return the ids that end an answer, in order: generation_config.json's, else config.json's.

    Raises:
        DeploymentError: there is no configuration, or it names no such id.
    """
    for name in ("generation_config.json", "config.json"):
        try:
            ids = json.loads((path / name).read_bytes()).get("eos_token_id")
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise DeploymentError(f"{path / name}: {error}") from error
        if ids is not None:
            return [ids] if isinstance(ids, int) else list(ids)
    raise DeploymentError(f"{path}: its configuration names no eos_token_id")


def check_attention(path: Path, configuration: Mapping[str, Any]) -> None:
    """Refuse a model whose positions do not allow that K is stored and read as it is.

    Its scores are biased by distance (ALiBi), or it has one of REFUSED_ROPES.

    Raises:
        DeploymentError.

    Args:
        configuration: contents of config.json, or the configuration of a GGUF file.
    """
    kind = configuration.get("model_type")
    told = configuration.get("alibi") or (configuration.get("attn_config") or {}).get("alibi")
    # Bloom always uses ALiBi, and its configuration does not say so.
    if kind == "bloom" or told:
        raise DeploymentError(
            f"{path}: a {kind} model with position biases (ALiBi), which is not served: its "
            "scores depend on how far apart two tokens are"
        )
    for rope in _ropes(configuration):
        if rope in REFUSED_ROPES:
            raise DeploymentError(f"{path}: rotary embedding of type {rope} is not served")


def _ropes(configuration: Mapping[str, Any]) -> list[Any]:
    """Return the types of rotary embedding: one, or one for each type of layer.

    transformers 5 writes ``rope_parameters``; before, the name was ``rope_scaling``, and at first
    its key was ``type``.
    """
    sections = [configuration.get(name) for name in ("rope_parameters", "rope_scaling")]
    known = [section for section in sections if isinstance(section, Mapping)]
    layers = [one for section in known for one in section.values() if isinstance(one, Mapping)]
    return [section.get("rope_type", section.get("type")) for section in (*known, *layers)]
