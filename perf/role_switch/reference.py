"""Prompts, and the tokens that each is answered with, whatever instances serve it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pdserve.config import Deployment
from pdserve.engines.emulated import EmulatedModel

PROMPTS, PROMPT_TOKENS, ANSWER_TOKENS = 12, 24, 8
FIRST_TOKEN, LAST_TOKEN = 1000, 20000
MARGIN = 1e-2
"""The two best logits of every token are further apart: no batch decides between them."""

Prompt = NDArray[np.int32]


def answers(deployment: Deployment) -> list[tuple[Prompt, list[int]]]:
    """Return `PROMPTS` prompts with their answers, computed apart from the servers."""
    rng = np.random.default_rng(7)
    if deployment.engine.kind == "emulated":
        model = EmulatedModel(deployment.model, deployment.engine.profile)
        prompts = [_prompt(rng) for _ in range(PROMPTS)]
        return [
            (prompt, [model.next(prompt, 0, new) for new in range(ANSWER_TOKENS)])
            for prompt in prompts
        ]
    return _by_transformers(Path(deployment.model), rng)


def _prompt(rng: np.random.Generator) -> Prompt:
    return rng.integers(FIRST_TOKEN, LAST_TOKEN, PROMPT_TOKENS, np.int32)


def _by_transformers(model: Path, rng: np.random.Generator) -> list[tuple[Prompt, list[int]]]:
    import torch  # noqa: PLC0415 - the emulated engine does without
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    torch.set_num_threads(1)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    found: list[tuple[Prompt, list[int]]] = []
    while len(found) < PROMPTS:
        prompt = _prompt(rng)
        ids = torch.from_numpy(prompt.astype(np.int64))[None]
        output = loaded.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=ANSWER_TOKENS,
            min_new_tokens=ANSWER_TOKENS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        best = torch.stack(output.logits)[:, 0].topk(2).values
        if (best[:, 0] - best[:, 1]).min() > MARGIN:
            found.append((prompt, output.sequences[0, len(prompt) :].tolist()))
    return found
