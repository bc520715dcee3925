"""The answers of transformers itself, which the torch engine is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

# Logits of SmolLM2 are around 10; float32 sums in another order differ by about 1e-5.
TIE = 1e-4


@dataclass(frozen=True)
class Tie:
    """Two tokens whose order depends on rounding, in transformers' own forward."""

    position: int
    tokens: tuple[int, int]
    gap: float


class Reference:
    """The model in float32, greedy; every answer is computed once."""

    def __init__(self, path: Path) -> None:
        # Two threads that wait for each other at every layer are seven times slower than one as
        # soon as anything else wants a core.
        torch.set_num_threads(1)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(path)
        self._model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self._answers: dict[tuple[tuple[int, ...], int], list[int]] = {}

    @property
    def eos_ids(self) -> set[int]:
        ids = self._model.generation_config.eos_token_id
        return {ids} if isinstance(ids, int) else set(ids)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text)["input_ids"]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def generate(self, prompt: Sequence[int], tokens: int) -> list[int]:
        """Return the answer, at most ``tokens`` long, the end-of-text token included."""
        key = tuple(prompt), tokens
        if key not in self._answers:
            ids = torch.tensor([list(prompt)])
            output = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                do_sample=False,
                pad_token_id=min(self.eos_ids),
            )
            self._answers[key] = output[0, len(prompt) :].tolist()
        return self._answers[key]

    def ties(self, prompt: Sequence[int], answer: list[int], tokens: int) -> list[Tie]:
        """Return where ``answer`` takes the other of two tied tokens, and is right after that.

        Raises:
            AssertionError: it differs from what transformers generates, and not by a tie.
        """
        found = []
        expected = self.generate(prompt, tokens)
        while answer != expected:
            at = next(
                (
                    n
                    for n, pair in enumerate(zip(answer, expected, strict=False))
                    if len({*pair}) > 1
                ),
                None,
            )
            assert at is not None, f"{len(answer)} tokens instead of {len(expected)}"
            gap = self._gap([*prompt, *expected[:at]], expected[at], answer[at])
            assert abs(gap) < TIE, (
                f"token {at} is {answer[at]}; transformers says {expected[at]}, "
                f"its logit being {gap:.6f} greater"
            )
            found.append(Tie(at, (expected[at], answer[at]), gap))
            forced = answer[: at + 1]
            left = 0 if forced[-1] in self.eos_ids else tokens - len(forced)
            expected = forced + (self.generate([*prompt, *forced], left) if left else [])
        return found

    @torch.inference_mode()
    def _gap(self, ids: list[int], first: int, second: int) -> float:
        logits = self._model(torch.tensor([ids]), logits_to_keep=1).logits[0, -1]
        return float(logits[first] - logits[second])
