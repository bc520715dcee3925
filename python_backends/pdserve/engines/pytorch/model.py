"""A causal language model of transformers, loaded once per process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
)

from pdserve.engines import checkpoint
from pdserve.engines.pytorch import linear
from pdserve.engines.pytorch.attention import NAME, KVMemory
from pdserve.errors import DeploymentError
from pdserve.kvcache.layout import KVLayout

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Options of an attention layer that change its result and are not supported.
REFUSED_OPTIONS = ("sliding_window", "softcap", "s_aux", "position_bias")


class TorchModel:
    """The weights, and the properties of the model that the instances need.

    Weights in safetensors files whose dtype is the engine's stay mapped on a CPU: the processes of
    a host share them.

    Args:
        path: directory or GGUF file.
        threads: CPU threads of this process; 0 leaves torch's default, every core.

    Raises:
        DeploymentError: the model cannot be loaded, or its attention does not keep the K and V of
            every token, in one shape in every layer.
    """

    def __init__(self, path: str, device: str, dtype: str, threads: int) -> None:
        if threads:
            torch.set_num_threads(threads)
        self.device = torch.device(device)
        place = Path(path)
        try:
            self._model = _load(place, getattr(torch, dtype)).to(self.device).eval()  # type: ignore[arg-type]
            self.eos_ids = _eos_ids(place, self._model.config)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise DeploymentError(f"{path} cannot be loaded: {error}") from error
        if self.device.type == "cpu":
            linear.adapt(self._model)
        config = self._model.config.get_text_config(decoder=True)
        checkpoint.check_attention(place, config.to_dict())
        self.context_length: int = config.max_position_embeddings
        self.vocabulary: int = config.vocab_size
        self.layout = self._probe(path, config, dtype)
        self.fingerprint = checkpoint.fingerprint(place, repr(self.layout))

    @torch.inference_mode()
    def forward(
        self,
        tokens: Sequence[int] | NDArray[np.integer[Any]],
        positions: Sequence[int] | NDArray[np.integer[Any]],
        last: Sequence[int] | NDArray[np.integer[Any]] | None,
        memory: KVMemory,
    ) -> Tensor:
        """Return logits [len(last), vocabulary] of concatenated sequences; None means every token.

        Args:
            tokens, positions: [n], of all the sequences.
            last: indices of the tokens whose logits are needed.
        """
        keep = 0 if last is None else torch.as_tensor(last, device=self.device)
        output = self._model(
            input_ids=torch.as_tensor(tokens, dtype=torch.long, device=self.device)[None],
            position_ids=torch.as_tensor(positions, dtype=torch.long, device=self.device)[None],
            use_cache=False,
            logits_to_keep=keep,
            kv_memory=memory,
        )
        logits: Tensor = output.logits[0]
        return logits

    def reclaim(self) -> None:
        """Give back to the device what PyTorch has kept of memory that is not used any more."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _probe(self, path: str, config: PretrainedConfig, dtype: str) -> KVLayout:
        """Determine the KV layout: run two tokens, and look at what the layers hand over."""
        probe = _Probe(self.context_length)
        try:
            self.forward([0, 0], [0, 1], None, probe)
        except (TypeError, AttributeError, RuntimeError, ValueError) as error:
            raise DeploymentError(
                f"{path}: {type(self._model).__name__} cannot be run over our KV memory: {error}"
            ) from error
        expected = list(range(config.num_hidden_layers))
        if probe.layers != expected or len(probe.shapes) != 1 or probe.refused:
            raise DeploymentError(
                f"{path}: {type(self._model).__name__} needs a KV cache that is not served: "
                f"{len(probe.layers)} of {len(expected)} layers keep K and V of every token, "
                f"in shapes {sorted(probe.shapes)}, with options {sorted(probe.refused)}; "
                "served are models with one shape in every layer and no such options"
            )
        kv_heads, head_dim, _ = probe.shapes.pop()
        return KVLayout(len(expected), kv_heads, head_dim, dtype)  # type: ignore[arg-type]


class _Probe:
    """A KV memory that stores nothing and records what it is given."""

    def __init__(self, context_length: int) -> None:
        self._context_length = context_length
        self.layers: list[int] = []
        self.shapes: set[tuple[int, int, int]] = set()
        self.refused: set[str] = set()

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, **options: Any
    ) -> Tensor:
        self.layers.append(layer)
        self.shapes.add((key.shape[0], key.shape[2], value.shape[2]))
        if key.shape[2] != value.shape[2]:
            self.refused.add("K and V of different sizes")
        for name in REFUSED_OPTIONS:
            setting = options.get(name)
            harmless = name == "sliding_window" and (setting or 0) >= self._context_length
            if setting is not None and not harmless:
                self.refused.add(name)
        return query.new_zeros(query.shape[1], query.shape[0], value.shape[2])


def _load(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": NAME}
    if path.is_file():
        return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, **options)
    shards = checkpoint.shards(path)
    config = AutoConfig.from_pretrained(path)
    if not shards or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM.from_pretrained(path, **options)
    # With a directory, from_pretrained reads private copies of the weights; tensors that already
    # have the right dtype it uses as they are: mapped.
    weights = {}
    for shard in shards:
        with safe_open(shard, "pt") as file:
            weights.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model: PreTrainedModel = model_class.from_pretrained(
        None, config=config, state_dict=weights, **options
    )
    return model


def _eos_ids(path: Path, config: PretrainedConfig) -> frozenset[int]:
    """Return the ids that end an answer: generation_config.json's, else config.json's."""
    ids = config.eos_token_id
    if (path / "generation_config.json").exists():
        ids = GenerationConfig.from_pretrained(path).eos_token_id or ids
    return frozenset([ids] if isinstance(ids, int) else ids or ())
