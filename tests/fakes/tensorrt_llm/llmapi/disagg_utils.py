"""Ids of disaggregated requests, unique over the fleet."""

from __future__ import annotations

import itertools
import time

from tensorrt_llm.version import SINCE_1_3

MIN_GLOBAL_ID = 1 << 40
"""Smaller ids are those of the engines."""

if SINCE_1_3:
    DISAGG_TIMESTAMP_BITS = 39
    DISAGG_NODE_ID_BITS = 8
    DISAGG_PROCESS_ID_BITS = 6
    DISAGG_COUNTER_BITS = 10

    _count = itertools.count()

    def get_global_disagg_request_id(node_id: int, process_id: int = 0) -> int:
        """Return an id made of the time, the node, the process and a counter.

        Raises:
            ValueError: node or process do not fit.
        """
        number = int(time.monotonic() * 1000) % (1 << DISAGG_TIMESTAMP_BITS)
        for name, value, bits in (
            ("node_id", node_id, DISAGG_NODE_ID_BITS),
            ("process_id", process_id, DISAGG_PROCESS_ID_BITS),
            ("counter", next(_count) % (1 << DISAGG_COUNTER_BITS), DISAGG_COUNTER_BITS),
        ):
            if not 0 <= value < 1 << bits:
                raise ValueError(f"{name} {value} is not in [0, {1 << bits})")
            number = number << bits | value
        return number % ((1 << 63) - 1 - MIN_GLOBAL_ID) + MIN_GLOBAL_ID
