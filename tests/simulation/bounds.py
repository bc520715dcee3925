"""Bounds of the time within which something has to happen in a world."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pdserve.instances.prefill import LOOK_S, TICK_S
from pdserve.instances.slot_watches import RESERVED_S
from pdserve.scheduling.decode_stage import LINK_WAIT_S
from pdserve.scheduling.forwarding import WATCH_S
from pdserve.scheduling.offering import ANSWER_S
from pdserve.scheduling.request import RECOVER_S
from pdserve.transfer.producer.lease_manager import QUIET_S
from tests.simulation.channels import ORPHAN_LOOK_S, Weather

if TYPE_CHECKING:
    from tests.simulation.plan import Plan

EPS_S = 2e-4
"""Code takes no virtual time, but a message arrives a little later than the one before it."""
PAUSE_S = 0.01
"""The time between two checks of what is not checked at every instant."""


class Bounds:
    """The bounds of one plan, in seconds."""

    def __init__(self, plan: Plan) -> None:
        calm, layers = plan.calm, plan.profile["layers"]
        prefill, decode = plan.profile["prefill"], plan.profile["decode"]
        longest = max(len(asked.prompt) // 4 + asked.max_tokens for asked in plan.requests)
        tokens = longest * plan.prefill.slots
        self.message = plan.delay_s * (Weather.TAIL if plan.tail else 1) + EPS_S
        """The longest time that a message takes."""
        self.forward = (prefill["base_ms"] + prefill["per_token_ms"] * tokens) / 1e3 + EPS_S
        self.pull = longest * 128 * layers / plan.bytes_per_s + 20 * plan.latency_s
        # A prompt that a decode computes waits for up to a turn of others, with steps in between.
        turn = prefill["per_token_ms"] * (plan.prefill.batch_tokens + longest)
        turns = (turn + plan.decode.slots * (prefill["base_ms"] + decode["base_ms"])) / 1e3
        self.local = turns if plan.gateway.local != "off" else 0.0
        """The longest time that a decode takes to compute a first token from the prompt."""
        step = decode["base_ms"] / 1e3 + self.local
        answer = max(asked.max_tokens for asked in plan.requests) * step
        self.stall = 0.0 if calm else plan.gateway.stall_s
        """A call that is not answered is given up after this time."""
        # Each decode may leave one offer unanswered, connect to the prefill, and leave another one
        # unanswered.
        self.asking = (2 * ANSWER_S + LINK_WAIT_S) * plan.decodes
        """The longest time in which all decodes are asked once."""
        # A gateway that is told of an idle instance has to ask, perhaps each instance, and other
        # gateways may be told before it.
        self.idle = LOOK_S + (2 * plan.prefills + 2) * self.message
        self.idle += (plan.contenders - 1) * RESERVED_S + (0.0 if calm else WATCH_S[1])
        """The longest time for which an instance may be idle while a request waits for it."""
        self.orphan = 2 * self.message + self.forward + self.pull + 2 * step + TICK_S
        if not calm:
            self.orphan += plan.prefill.kept_s + QUIET_S + plan.timeout_s + ORPHAN_LOOK_S + answer
        """The longest time for which an instance may hold something for nobody."""
        self.settles = self.orphan + QUIET_S + RECOVER_S
        """The longest time until nothing is held any more, once nobody asks."""
