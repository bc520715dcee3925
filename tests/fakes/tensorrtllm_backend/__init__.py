"""A fake of the `tensorrtllm` backend: the two models of NVIDIA's disaggregated serving example.

`context` and `generation` are Python models here, with the tensors, the request parameter and the
behaviour that are documented of the C++ backend's. `tests.fakes.repository.fill` writes them into a
model repository; their engine is that of the fake `tensorrt_llm`, with the C++ transceiver's link.

Of the C++ backend they keep:

- ``request_type`` is a request parameter; one that is not known is logged, and taken for
  ``context_and_generation``.
- ``context_only`` has one response, with ``context_phase_params``, whatever is asked for; but room
  for ``request_output_len`` tokens is held until the KV cache is taken: to ask for 1 is up to the
  caller.
- what is held is held for ever: there is no time limit.
- what ``generation_only`` answers begins with the first token of the context.
- nothing ends an answer but ``request_output_len``, and ``end_id`` and ``stop_words_list`` where
  they are given; the end id is no part of the output, stop words are.
- without ``runtime_top_k`` and ``runtime_top_p`` tokens are chosen greedily; without ``seed`` it
  is 0.
- ``output_ids`` are the new ones of a streamed response; else all, the prompt before them if it is
  not excluded.
- ``stop`` with a request's id ends that request; so does its client, within
  ``cancellation_check_period_ms``.

What they refuse: beams, several sequences, log probabilities, logits, bad words, minimum lengths,
and every other input that ``config.pbtxt`` does not have.
"""
