"""A context engine of the fake TensorRT-LLM in a separate process.

    python -m tests.fakes.context_engine MODEL CPP|PYTHON

The version is that of FAKE_TENSORRT_LLM_VERSION. Each line of input is a prompt: token ids, and the
request's global id, or null. The answer is a line with the link's fields as JSON, bytes in base64.
An empty line is answered with the number of KV caches that are held. The process ends with its
input.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import msgspec

sys.path.insert(0, str(Path(__file__).resolve().parent))


def main(model: str, runtime: str) -> None:
    from tensorrt_llm import LLM, DisaggregatedParams, SamplingParams
    from tensorrt_llm.version import SINCE_1_3

    config: dict[str, Any] = {"backend": "UCX" if runtime == "CPP" else "NIXL"}
    if SINCE_1_3:
        config["transceiver_runtime"] = runtime
    llm = LLM(
        model=model,
        skip_tokenizer_init=True,
        disable_overlap_scheduler=True,
        cache_transceiver_config=config,
    )
    for line in sys.stdin:
        if not line.strip():
            print(llm._engine.held if llm._engine else 0, flush=True)
            continue
        prompt, id_ = json.loads(line)
        params = DisaggregatedParams(request_type="context_only")
        if SINCE_1_3:
            params.disagg_request_id = id_
        result = llm.generate_async(prompt, SamplingParams(end_id=2), disaggregated_params=params)
        link = result.result().disaggregated_params
        assert link is not None
        print(msgspec.json.encode(dataclasses.asdict(link)).decode(), flush=True)
    llm.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
