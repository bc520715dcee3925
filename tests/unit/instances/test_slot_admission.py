"""The slots of a prefill, by themselves: no engine, no memory, and times that the test gives."""

from __future__ import annotations

import random
from dataclasses import dataclass

from pdserve.instances.slot_admission import SlotAdmission
from pdserve.instances.slot_watches import RESERVED_S
from pdserve.rpc.messages import SUSPECT, Busy, Failed, Freed, PrefillRequest, Reply, Watch
from pdserve.sampling import Sampling
from tests.unit.inprocess import virtual


@dataclass(eq=False)
class Held:
    request: PrefillRequest
    computing: bool = True
    until: float = float("inf")


class Slots(SlotAdmission[Held]):
    """`slots`, of which `batch` may be computing; `memory` says whether there is any."""

    def __init__(self, slots: int, batch: int) -> None:
        super().__init__(slots, self._computable, self._over)
        self.batch = batch
        self.memory = True

    def _computable(self) -> int:
        return self.batch - sum(one.computing for one in self.held.values())

    def _over(self, now: float) -> bool:
        for one in list(self.held.values()):
            if now >= one.until:
                self.give_back(one, now)
        return self.memory

    def offer(self, request: PrefillRequest, now: float = 0.0) -> Reply | None:
        refusal = self.refusal(request, now)
        if refusal is None:
            self.take(Held(request), now)
        return refusal


def request(name: str, gateway: str = "", suspect: bool = False) -> PrefillRequest:
    return PrefillRequest(name, bytes(4), Sampling(), "", 0.0, gateway=gateway, suspect=suspect)


def test_an_id_is_used_once_at_a_time() -> None:
    slots = Slots(2, 2)
    assert slots.offer(request("a")) is None
    assert slots.offer(request("a")) == Failed("INVALID_ARG", "request id a is in use")
    del slots.held["a"]
    assert slots.offer(request("a")) is None


def test_a_place_in_the_next_forward_is_needed_besides_a_slot() -> None:
    slots = Slots(2, 1)
    assert slots.offer(request("a")) is None
    assert slots.offer(request("b")) == Busy("slots")
    slots.held["a"].computing = False
    assert slots.offer(request("b")) is None
    slots.held["b"].computing = False
    assert slots.offer(request("c")) == Busy("slots")


def test_what_is_over_is_ended_before_slots_are_counted() -> None:
    slots = Slots(1, 1)
    assert slots.offer(request("a")) is None
    slots.held["a"].until = 1.0
    assert slots.offer(request("b"), 0.5) == Busy("slots")
    assert slots.offer(request("b"), 1.0) is None


def test_one_suspect_computes_at_a_time() -> None:
    slots = Slots(3, 3)
    assert slots.offer(request("a", suspect=True)) is None
    assert slots.offer(request("b", suspect=True)) == Busy(SUSPECT)
    assert slots.offer(request("c")) is None, "others are no suspects"
    slots.held["a"].computing = False
    assert slots.offer(request("b", suspect=True)) is None


@virtual
async def test_a_slot_is_kept_for_the_gateway_that_was_told() -> None:
    slots, told = Slots(1, 1), list[Reply]()
    slots.watch(Watch("w", "first"), "s", lambda reply, _: told.append(reply), 0.0)
    assert told == [Freed()]
    assert slots.offer(request("a", "second"), 0.01) == Busy("slots")
    assert slots.offer(request("b", "first"), 0.01) is None
    del slots.held["b"]
    assert slots.offer(request("a", "second"), 0.01) is None, "its turn is over"


@virtual
async def test_a_request_that_can_never_be_served_is_a_turn() -> None:
    slots, told = Slots(1, 1), list[Reply]()
    slots.watch(Watch("w", "first"), "s", lambda *_: None, 0.0)
    slots.reject(request("a", "first"), "too long", lambda reply, _: told.append(reply))
    assert told == [Failed("INVALID_ARG", "too long")]
    assert slots.offer(request("b", "second"), 0.0) is None


@virtual
async def test_without_memory_nobody_is_told_of_a_slot() -> None:
    slots, told = Slots(1, 1), list[Reply]()
    slots.memory = False
    slots.watch(Watch("w", "first"), "s", lambda reply, _: told.append(reply), 0.0)
    assert told == []
    slots.memory = True
    slots.look(0.0)
    assert told == [Freed()]


@virtual
async def test_any_history() -> None:
    """No more is held than there are slots and places, and nobody waits beside a free slot."""
    for seed in range(200):
        rng = random.Random(seed)
        slots, now = Slots(rng.randint(1, 4), rng.randint(1, 4)), 0.0
        for number in range(60):
            now += rng.choice((0.0, rng.uniform(0, 2 * RESERVED_S)))
            gateway = rng.choice("abc")
            match rng.randrange(4):
                case 0:
                    slots.offer(request(str(number), gateway, rng.random() < 0.3), now)
                case 1:
                    slots.watch(Watch(str(number), gateway), gateway, lambda *_: None, now)
                case 2 if slots.held:
                    rng.choice(list(slots.held.values())).computing = False
                case 3 if slots.held:
                    rng.choice(list(slots.held.values())).until = now
            slots.look(now)
            computing = [one for one in slots.held.values() if one.computing]
            assert len(slots.held) <= slots._slots
            assert len(computing) <= slots.batch
            assert sum(one.request.suspect for one in computing) <= 1
            assert not slots.watches or slots.free() == len(slots.watches.kept)


def test_slot_seconds_are_counted_while_slots_are_held() -> None:
    slots = Slots(2, 2)
    slots.offer(request("a"), 10.0)
    slots.offer(request("b"), 12.0)
    assert slots.seconds.drain(13.0) == 3 + 1
    slots.give_back(slots.held["a"], 15.0)
    assert slots.seconds.drain(16.0) == 2 + 3
    slots.give_back(slots.held["b"], 16.0)
    assert slots.seconds.drain(20.0) == 0
