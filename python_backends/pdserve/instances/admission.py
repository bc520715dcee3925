"""The checks of a request that an instance makes by itself: whether it fits the model."""

from __future__ import annotations

import numpy as np

from pdserve.engines.protocol import Tokens
from pdserve.errors import InvalidRequest
from pdserve.rpc.messages import DecodeRequest, PrefillRequest


def prompt(request: PrefillRequest | DecodeRequest, context_length: int, vocabulary: int) -> Tokens:
    """Return the prompt's token ids, int32 [n], of a request that the model can compute.

    Args:
        context_length: maximum tokens of prompt and answer together.
        vocabulary: number of token ids.

    Raises:
        InvalidRequest: ids are missing, broken or outside the vocabulary, the tokens exceed the
            context, or more of them are said to be output than there are.
    """
    size = len(request.prompt)
    if size == 0 or size % 4:
        raise InvalidRequest(f"prompt: {size} bytes; allowed: 4 for each token, and at least one")
    tokens = np.frombuffer(request.prompt, "<i4")
    answer = request.max_tokens if isinstance(request, DecodeRequest) else 1
    if len(tokens) + answer > context_length:
        raise InvalidRequest(
            f"prompt and max_tokens: {len(tokens)} and {answer}; "
            f"allowed: {context_length} tokens together"
        )
    if request.resumed_tokens >= len(tokens):
        raise InvalidRequest(
            f"resumed_tokens: {request.resumed_tokens} of a prompt of {len(tokens)} tokens; "
            f"allowed: 0 to {len(tokens) - 1}"
        )
    first = request.first_token if isinstance(request, DecodeRequest) else None
    # Viewed as unsigned, a negative id is larger than all others.
    highest = max(int(tokens.view("<u4").max()), first or 0)
    if highest >= vocabulary:
        wrong = first if first == highest else int(np.uint32(highest).view(np.int32))
        raise InvalidRequest(f"token id: {wrong}; allowed: 0 to {vocabulary - 1}")
    return tokens
