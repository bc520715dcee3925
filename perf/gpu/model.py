"""A Llama-shaped model with random weights and a tokenizer of single bytes, made on the spot.

The folder has Hugging Face's form, so that it is loaded as any other model is.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from msgspec import Struct
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from pdctl.paths import ROOT

FOLDER = ROOT / ".cache" / "models"
COMPLETE = ".complete"
END = "<|end|>"
SPREAD = 4.0
"""Standard deviation of the logits: large enough that two largest ones are seldom equal."""


class Shape(Struct, frozen=True):
    """The sizes of a Llama model."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int

    @property
    def weights(self) -> int:
        """Return the number of weights that a step reads: all but the embedding of tokens."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        layer = attention + 3 * self.hidden * self.inner
        return self.layers * layer + self.hidden * self.vocabulary


SHAPES = {
    "8b": Shape(32, 4096, 14336, 32, 8, 128, 128_256, 40_960),
    "1b": Shape(16, 2048, 8192, 32, 8, 64, 32_000, 8192),
    "tiny": Shape(2, 64, 128, 4, 2, 16, 512, 2048),
}


def made(name: str, dtype: str, device: str) -> Path:
    """Return the folder of a model, which is made if it is not complete.

    Args:
        name: of SHAPES.
        device: where the weights are drawn; a GPU draws those of 8B in seconds.
    """
    folder = FOLDER / f"random-{name}-{dtype}"
    if (folder / COMPLETE).is_file():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _configuration(SHAPES[name], dtype, folder)
    _tokenizer(folder)
    _weights(SHAPES[name], getattr(torch, dtype), device, folder)
    (folder / COMPLETE).touch()
    return folder


def _configuration(shape: Shape, dtype: str, folder: Path) -> None:
    configuration: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": dtype,
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": shape.context,
        "rope_theta": 500_000.0,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "eos_token_id": 256,
        "bos_token_id": None,
    }
    (folder / "config.json").write_text(json.dumps(configuration))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 256}))


def _tokenizer(folder: Path) -> None:
    """Write a tokenizer whose tokens are bytes: a text of n ASCII characters has n tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={one: n for n, one in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([END])
    made.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))


def _weights(shape: Shape, dtype: torch.dtype, device: str, folder: Path) -> None:
    torch.manual_seed(0)
    index: dict[str, str] = {}
    parts = itertools.chain([_ends(shape, dtype, device)], _layers(shape, dtype, device))
    for number, tensors in enumerate(parts, 1):
        name = f"model-{number:05d}-of-{shape.layers + 1:05d}.safetensors"
        save_file({key: one.cpu() for key, one in tensors.items()}, folder / name, {"format": "pt"})
        index |= dict.fromkeys(tensors, name)
    about = {"metadata": {}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(about))


def _layers(shape: Shape, dtype: torch.dtype, device: str) -> Iterator[dict[str, Tensor]]:
    """Yield the weights of each layer, drawn so that its outputs are as large as its inputs."""
    query, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sizes = {
        "self_attn.q_proj": (query, shape.hidden),
        "self_attn.k_proj": (keys, shape.hidden),
        "self_attn.v_proj": (keys, shape.hidden),
        "self_attn.o_proj": (shape.hidden, query),
        "mlp.gate_proj": (shape.inner, shape.hidden),
        "mlp.up_proj": (shape.inner, shape.hidden),
        "mlp.down_proj": (shape.hidden, shape.inner),
    }
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        tensors = {
            f"{prefix}{name}.weight": _drawn(size, dtype, device) for name, size in sizes.items()
        }
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = torch.ones(shape.hidden, dtype=dtype)
        yield tensors


def _ends(shape: Shape, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Return what comes before and after the layers."""
    size = shape.vocabulary, shape.hidden
    return {
        "model.embed_tokens.weight": _drawn(size, dtype, device) * math.sqrt(shape.hidden),
        "model.norm.weight": torch.ones(shape.hidden, dtype=dtype),
        "lm_head.weight": _drawn(size, dtype, device) * SPREAD,
    }


def _drawn(size: tuple[int, int], dtype: torch.dtype, device: str) -> Tensor:
    """Return normal numbers with the variance 1 / columns."""
    return torch.randn(size, dtype=dtype, device=device) / math.sqrt(size[1])
