"""Turn a GGUF file into a folder that transformers loads: ``convert.py SOURCE TARGET``.

Weights become float32 safetensors. The result is loaded back and checked before
this ends with 0: finite tensors, the tokenizer's round trip, and the end of a turn.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

SAMPLES = (
    "The capital of France is",
    "  def f(x):\n\treturn x  ** 2\n",
    "2,048 tokens in   1999",
    "\u65e5\u672c\u8a9e \U0001f600 e\u0301",
)


def convert(source: Path, target: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # Of how text is split before BPE, GGUF says only "smollm": digit by digit, then like GPT-2.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.save_pretrained(target)
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32
    )
    # The weights are float32 now; only the marks of their origin prevent saving them.
    model.hf_quantizer = None  # type: ignore[assignment]
    del model.config.quantization_config
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(target)


@torch.inference_mode()
def check(target: Path) -> None:
    """Load the result like the engine.

    Raises:
        AssertionError: it is not the expected model.
    """
    tokenizer = AutoTokenizer.from_pretrained(target)
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    for name, tensor in model.state_dict().items():
        assert tensor.isfinite().all(), f"{name} is not finite"
    for text in SAMPLES:
        assert tokenizer.decode(tokenizer(text).input_ids) == text, f"no round trip: {text!r}"
    assert tokenizer.convert_ids_to_tokens(model.generation_config.eos_token_id) == "<|im_end|>"
    assert tokenizer.chat_template, "no chat template"
    ids = torch.tensor([tokenizer(SAMPLES[0]).input_ids])
    assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris", "cannot predict"


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
    check(Path(sys.argv[2]))
