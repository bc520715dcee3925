"""Conversion of a client's input to token ids: checks, chat template, and tokenizer.

``transformers.PreTrainedTokenizerFast`` reads tokenizer and template from any of their files;
unlike ``AutoTokenizer`` (about 3 s), it does not import torch for a model directory.
"""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

import jinja2
import msgspec
import numpy as np
from msgspec import Meta, Struct

from pdserve.errors import InvalidRequest, Unsupported, brief, loggable
from pdserve.text.vocabulary import Vocabulary, fast

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

_log = logging.getLogger(__name__)

Conversation: TypeAlias = list[dict[str, str]]
"""Turns, the oldest first: ``{"role": "system" | "user" | "assistant", "content": str}``."""


class Tokenizer(Vocabulary):
    """The model's own tokenizer and chat template; safe to share between threads."""

    def __init__(self, path: Path) -> None:
        """Read a model directory (``tokenizer.json``, ...) or a GGUF file; raises like ``fast``."""
        self._fast = fast(path)
        super().__init__(self._fast.backend_tokenizer)
        self._backend.no_truncation()  # a tokenizer.json may set either; a prompt needs neither
        self._backend.no_padding()
        self.no_chat = self._why_no_chat()
        """Why no conversation can be rendered at all; empty: some can."""
        if self.no_chat and self._fast.chat_template:
            _log.error("%s: chat is refused: %s", path, self.no_chat)
        self._fault_logged = False

    def encode(self, text: str) -> NDArray[np.int32]:
        """Return the ids of a plain prompt, int32 ``[tokens]``, with the model's special tokens."""
        return self._ids(text, special=True)

    def encode_prompt(self, prompt: str | Conversation) -> NDArray[np.int32]:
        """Return the ids of what ``parse_prompt`` returns; raises like ``render``."""
        return self.encode(prompt) if isinstance(prompt, str) else self.encode_chat(prompt)

    def encode_chat(self, conversation: Conversation) -> NDArray[np.int32]:
        """Return the ids of a conversation, int32 ``[tokens]``; raises like ``render``."""
        return self._ids(self.render(conversation), special=False)

    def _ids(self, text: str, *, special: bool) -> NDArray[np.int32]:
        # The only call that omits the offsets, a tenth of the time; it takes lists only.
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=special)
        return np.array(encoding.ids, np.int32)

    def render(self, conversation: Conversation) -> str:
        """Render a conversation by the model's chat template, up to the beginning of the answer.

        Raises:
            Unsupported: the model has no chat template, or a faulty one.
            InvalidRequest: the template refuses the turns.
        """
        if self.no_chat:
            raise Unsupported(f"chat is true, but {self.no_chat}; allowed: false")
        try:
            return self._render(conversation)
        except Exception as error:
            if type(error) is jinja2.TemplateError:  # what the template itself raises
                raise InvalidRequest(
                    "text_input: the model's chat template refuses the conversation: "
                    f"{brief(error)}"
                ) from error
            if not self._fault_logged:
                self._fault_logged = True
                _log.error("the model's chat template is faulty: %s", loggable(error))
            raise Unsupported(
                f"the model's chat template is faulty: {type(error).__name__}: {brief(error)}"
            ) from error

    def _why_no_chat(self) -> str:
        if not self._fast.chat_template:
            return "the model has no chat template"
        try:
            self._fast.get_chat_template()
            self._render([{"role": "user", "content": "a"}])
        except jinja2.TemplateSyntaxError as error:
            return f"the model's chat template is faulty: line {error.lineno}: {brief(error)}"
        except ValueError:
            names = ", ".join(sorted(self._fast.chat_template))
            return f"the model has several chat templates and none is its default: {names}"
        except Exception:  # it may concern this conversation only
            return ""
        return ""

    def _render(self, conversation: Conversation) -> str:
        text: str = self._fast.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=True
        )
        return text


class Turn(Struct, forbid_unknown_fields=True):
    role: Literal["system", "user", "assistant"]
    content: str


_TURNS = Annotated[list[Turn], Meta(min_length=1)]
_SHAPE = 'each item is {"role": "system" | "user" | "assistant", "content": string}'


def parse_prompt(data: bytes, chat: bool) -> str | Conversation:
    """Parse ``text_input``: a plain prompt, or with ``chat`` a conversation.

    With ``chat`` a JSON list must be a conversation, and text that begins like one (``[{``) must be
    JSON; any other text, other JSON included, is one user turn.

    Raises:
        InvalidRequest: it is empty, not UTF-8, malformed JSON, or no conversation to be answered.
    """
    if not data:
        raise InvalidRequest("text_input is empty; at least 1 byte is needed")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"text_input is not valid UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}"
        ) from error
    if not chat:
        return text
    user_turn = [{"role": "user", "content": text}]
    if not re.match(r"\s*\[", text):
        return user_turn
    try:
        conversation: Conversation = msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        if re.match(r"\s*\[\s*\{", text):
            raise InvalidRequest(
                f"text_input is a bad JSON chat of {len(data)} bytes: {brief(error)}"
            ) from error
        return user_turn
    try:
        turns = msgspec.convert(conversation, _TURNS)
    except msgspec.ValidationError as error:
        raise InvalidRequest(
            f"text_input is not a conversation: {brief(error)}; {_SHAPE}"
        ) from error
    if turns[-1].role == "assistant":
        raise InvalidRequest(
            f"text_input[{len(turns) - 1}].role is 'assistant'; the last role is user or system"
        )
    return conversation


def beginning(prompt: str | Conversation) -> str:
    """Return the text that rules of scenarios match: the prompt, or a conversation's first turn."""
    return prompt if isinstance(prompt, str) else prompt[0]["content"]
