"""An engine's reports: statistics of its turns, and events of its KV cache."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pdserve.kvcache.prefix_index import chain

if TYPE_CHECKING:
    from pdserve.engines.protocol import Tokens
    from pdserve.kvcache.block_pool import BlockPool


class Reports:
    """Reports, which are made only if they have a reader.

    Args:
        iteration: takes a turn's statistics as JSON.
        event: takes an event as JSON. A block is stored while a request holds it, since nothing
            is reused.
    """

    def __init__(
        self,
        tokens_per_block: int,
        iteration: Callable[[str], None] | None,
        event: Callable[[str], None] | None,
    ) -> None:
        self._tokens_per_block = tokens_per_block
        self._iteration = iteration
        self._event = event
        self._turns = itertools.count()
        self._events = itertools.count()
        self._stored: Counter[int] = Counter()

    def iteration(
        self, *, waiting: int, active: int, prompts: int, running: int, blocks: BlockPool
    ) -> None:
        if self._iteration is None:
            return
        stats = {
            "iter": next(self._turns),
            "numActiveRequests": active,
            "numQueuedRequests": waiting,
            "kvCacheStats": {
                "maxNumBlocks": blocks.blocks,
                "freeNumBlocks": blocks.free_blocks,
                "usedNumBlocks": blocks.used_blocks,
                "tokensPerBlock": blocks.block_size,
            },
            "inflightBatchingStats": {
                "numScheduledRequests": prompts + running,
                "numContextRequests": prompts,
                "numGenRequests": running,
            },
        }
        self._iteration(json.dumps(stats))

    def created(self, blocks: int) -> None:
        self._tell({"type": "created", "num_blocks_per_cache_level": [blocks, 0]})

    def stored(self, prompt: Tokens) -> None:
        if self._event is None:
            return
        parent, new = None, []
        for at, hash_ in enumerate(self._hashes(prompt)):
            self._stored[hash_] += 1
            if self._stored[hash_] > 1:
                parent = hash_
                continue
            size = self._tokens_per_block
            tokens = [
                {"type": "unique_token", "token_id": int(id_), "token_extra_id": 0}
                for id_ in prompt[at * size : (at + 1) * size]
            ]
            new.append({"type": "stored_block", "block_hash": hash_, "tokens": tokens})
        if new:
            self._tell({"type": "stored", "parent_hash": parent, "blocks": new})

    def removed(self, prompt: Tokens) -> None:
        if self._event is None:
            return
        gone = []
        for hash_ in self._hashes(prompt):
            if hash_ in self._stored:
                self._stored[hash_] -= 1
                if not self._stored[hash_]:
                    del self._stored[hash_]
                    gone.append(hash_)
        if gone:
            self._tell({"type": "removed", "block_hashes": gone})

    def _hashes(self, prompt: Tokens) -> list[int]:
        digests = chain(prompt, "", len(prompt), self._tokens_per_block)
        return [int.from_bytes(digest[:8], "little") for digest in digests]

    def _tell(self, data: dict[str, Any]) -> None:
        if self._event is not None:
            self._event(json.dumps({"event_id": next(self._events), "data": data}))
