"""Engines of kind ``tensorrt_llm`` over the fake of the library, for tests of several files."""

from __future__ import annotations

import json
import sys
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from pdserve import config
from pdserve.config.llm_options import CacheTransceiverConfig, LlmOptions
from pdserve.engines import build
from pdserve.engines.external import Asked
from pdserve.engines.tensorrt_llm.engine import TensorRTLLM
from pdserve.sampling import Sampling
from tests.unit.inprocess import EOS, VOCABULARY, model

if TYPE_CHECKING:
    from collections.abc import Iterator

FAKES = Path(__file__).parents[2] / "fakes"
VERSIONS = ("1.0.0", "1.2.1", "1.3.0rc29", "1.4.0rc1", "1.5.0.dev0")
SINCE_1_3 = VERSIONS[2:]
PROMPT = np.arange(10, 42, dtype=np.int32)


@contextmanager
def installed(version: str) -> Iterator[Any]:
    """Make ``import tensorrt_llm`` find the fake, in this version."""

    def forget() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "tensorrt_llm"]:
            del sys.modules[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAKE_TENSORRT_LLM_VERSION", version)
        patch.syspath_prepend(FAKES)
        forget()
        try:
            yield patch
        finally:
            forget()


def deployment(folder: Path, options: LlmOptions | None = None, **engine: Any) -> config.Deployment:
    model(folder)
    names = {"vocab_size": VOCABULARY, "eos_token_id": EOS, "max_position_embeddings": 4096}
    (folder / "config.json").write_text(json.dumps(names))
    server = config.Server("local", prefill=("prefill_0",), decode=("decode_0",))
    of = {"kind": "tensorrt_llm", "tensorrt_llm": options or LlmOptions(), **engine}
    kind = config.Engine(**of)
    return config.Deployment(
        str(folder), (server,), kind, prefill=config.Prefill(slots=4, lease_s=1.0)
    )


def runtime(name: Any) -> LlmOptions:
    return LlmOptions(CacheTransceiverConfig(transceiver_runtime=name))


def engine(role: config.Role, wanted: config.Deployment) -> TensorRTLLM:
    made = build.external(f"{role}_0", role, wanted)
    assert isinstance(made, TensorRTLLM)
    return made


def new_request(max_tokens: int = 8, prompt: Any = PROMPT, **fields: Any) -> Asked:
    return Asked(prompt, Sampling(), max_tokens, False, 0, "")._replace(**fields)


async def answer(decode: TensorRTLLM, request: Asked, first: int | None, way: bytes) -> list[int]:
    ids, reason = [], ""
    async with aclosing(decode.generate(request, first, way)) as pieces:
        async for piece in pieces:
            assert not reason
            ids += piece.ids
            reason = piece.finish_reason
    assert reason
    return ids
