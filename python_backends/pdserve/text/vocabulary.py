"""The vocabulary of a model: conversion of token ids to text.

If tokenizer.json is complete, the bare ``tokenizers`` library reads it. Importing transformers
takes half of the CPU time of a stub's start, and a gateway starts four at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.decoders import ByteLevel

from pdserve.errors import DeploymentError, brief


class Vocabulary:
    """The tokens of a model, as text; safe to share between threads."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._special = {
            token_id: token.content
            for token_id, token in backend.get_added_tokens_decoder().items()
            if token.special
        }
        self.byte_level = isinstance(backend.decoder, ByteLevel)
        """True if tokens stand for bytes (GPT-2 and most since), not for pieces of text
        (SentencePiece)."""

    @property
    def size(self) -> int:
        """Return the number of token ids, added tokens included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def decode(self, ids: list[int]) -> str:
        """Return the text of a whole answer.

        Special and unknown ids are skipped, bad bytes are U+FFFD.
        """
        return self._backend.decode(ids)

    def special(self, token_id: int) -> str | None:
        """Return the text of a special token, which no answer shows.

        None: it is no special token.
        """
        return self._special.get(token_id)

    def token(self, token_id: int) -> str | None:
        """Return a token as the vocabulary writes it.

        None: it has no text (special, or unknown).
        """
        return None if token_id in self._special else self._backend.id_to_token(token_id)


def read(path: Path) -> Vocabulary:
    """Read the vocabulary of a model directory (``tokenizer.json``, ...) or GGUF file.

    Raises like ``fast``.
    """
    try:
        backend = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
        complete = _named(path).items() <= _added(backend).items()
    except Exception:  # transformers reports what is wrong, if anything is
        complete = False
    return Vocabulary(backend if complete else fast(path).backend_tokenizer)


def fast(path: Path) -> Any:
    """Return a transformers.PreTrainedTokenizerFast, which reads every file that may define tokens.

    It converts the tokenizer of a GGUF file, for which it imports torch.

    Raises:
        DeploymentError: there is no tokenizer at ``path``.
    """
    if not (path.is_file() or (path / "tokenizer.json").is_file()):
        raise DeploymentError(f"{path}: neither a GGUF file nor a folder with tokenizer.json")
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415 - see above

    where, gguf_file = (path, None) if path.is_dir() else (path.parent, path.name)
    try:
        return PreTrainedTokenizerFast.from_pretrained(
            where, gguf_file=gguf_file, local_files_only=True
        )
    except Exception as error:  # transformers and its readers share no narrower base
        raise DeploymentError(f"{path}: no readable tokenizer: {brief(error)}") from error


def _added(backend: tokenizers.Tokenizer) -> dict[str, bool]:
    """Return the tokens beside the model's own, and whether they are special."""
    return {token.content: token.special for token in backend.get_added_tokens_decoder().values()}


def _named(folder: Path) -> dict[str, bool]:
    """Return the same tokens, as transformers reads them from the files beside tokenizer.json."""
    named: dict[str, bool] = {}
    for name in ("added_tokens.json", "special_tokens_map.json", "tokenizer_config.json"):
        if not (folder / name).exists():
            continue
        for key, value in json.loads((folder / name).read_bytes()).items():
            if name == "added_tokens.json":
                named.setdefault(key, False)
            elif key == "added_tokens_decoder":
                named |= {token["content"]: token["special"] for token in value.values()}
            elif key.endswith(("_token", "_tokens")):
                named |= dict.fromkeys(_contents(value), True)
    return named


def _contents(value: Any) -> Iterator[str]:
    """Yield the text of a special token, or of several, in every notation."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict) and "content" in value:
        yield value["content"]
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _contents(one)
