"""A fake of TensorRT-LLM's LLM API, as far as disaggregated serving on its PyTorch backend goes.

It is built from the documented API and from what was read of the source, and not from the library:
so it shows whether an adapter keeps to that, not that the adapter runs on a GPU. Where the
documents leave something open it refuses, rather than be kinder than the library.

It is importable as `tensorrt_llm` once ``tests/fakes`` is on `sys.path`, also in the stub of a
Triton model: ``tests/fakes/repository.py`` makes a model repository that sees to it.

What computes is `pdserve`'s own engine: torch over the model's directory, on one CPU thread and in
``dtype``; or the emulated one, if FAKE_TENSORRT_LLM_PROFILE names a timing profile, or the
directory has a ``profile.yaml`` (next to a ``config.json`` with ``vocab_size``).

The version whose API it has is FAKE_TENSORRT_LLM_VERSION: 1.0.0, 1.2.1, 1.3.0rc29, 1.4.0rc1 (the
default) or 1.5.0.dev0. They differ in the fields of `DisaggregatedParams`,
`CacheTransceiverConfig`, `KvCacheConfig`, in the parameters of `LLM.generate_async`, in the link,
and in these:

    1.0.0       a context request fails unless the overlap scheduler is disabled; a temperature
                alone does not sample; a transfer has no time limit
    1.2.1       a KV cache that nobody took in time is freed when the next context request comes,
                not before (NVIDIA/TensorRT-LLM#12313)
    up to 1.2   what ends with its first token is not held for a generation engine
    from 1.3    the link is the Python transceiver's, unless that is configured otherwise
    from 1.4    the Python transceiver is the default, also where it cannot be
    1.5.0.dev0  stands for a version that nobody has read: `DisaggregatedParams` has a field that
                only the library sets (``init=False``), as NVIDIA/TensorRT-LLM#16909 proposes,
                and a ``conversation_id``

An abort while a KV cache moves loses the context engine's blocks for good, as in the library; so
does the abort of a context request that has been computed.

KV caches move between processes of one host: the context engine listens on a port of loopback,
writes what it is asked for to a file in /dev/shm, and frees it when it is told that it was read.
The files' names begin with PDSERVE_SHM_PREFIX; without that they lie in the temporary directory.
The C++ transceiver's link is ``opaque_state`` and ``ctx_request_id``; the Python one's
``ctx_info_endpoint`` (that port), ``ctx_dp_rank`` and ``disagg_request_id``, without which it
refuses to work.

Faults: FAKE_TENSORRT_LLM_FAULTS names a JSON file, read again at every point, so that it may be
written while the engine runs. It is a list of

    {"at": "context" | "pull" | "transfer" | "step", "nth": 2, "do": "fail" | "stall" | "die",
     "seconds": 5}

    context     a prompt of a context request has been computed, and is to be answered
    pull        in a context engine: somebody wants a KV cache
    transfer    in a generation engine: a KV cache is about to be asked for
    step        the running batch is about to be stepped

``nth`` counts those of the kind in this engine, from 1; without it, each is meant. ``stall``
takes ``seconds``, ``die`` ends the process.

What it does not do: TensorRT engines, several GPUs, LoRA, beams, log probabilities, guided
decoding, bad words, minimum lengths (all refused); reuse of cached blocks, overlap of computing and
sending, layer-wise and pipelined transfers, generation-first scheduling, priorities, salts,
``prompt_ignore_length`` (accepted, and without effect); a bounded number of transfers at once.
"""

from tensorrt_llm.disaggregated_params import DisaggregatedParams
from tensorrt_llm.llmapi import LLM
from tensorrt_llm.sampling_params import SamplingParams
from tensorrt_llm.version import __version__

IS_FAKE = True

__all__ = ["IS_FAKE", "LLM", "DisaggregatedParams", "SamplingParams", "__version__"]
