"""Tests for slot watches: gateways are notified in turn, and a slot is kept for each briefly."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from pdserve.instances.kv_exports import MAX_QUARANTINED
from pdserve.instances.prefill import LOOK_S
from pdserve.instances.slot_watches import MAX_WATCHES, RESERVED_S, WATCHED_S
from pdserve.rpc.messages import Accepted, Busy, Failed, Freed, Prefilled, Released, Reply, Watch
from tests.unit.inprocess import Site, virtual
from tests.unit.instances.test_prefill import TIMES, Client
from tests.unit.transfers import MidPull

if TYPE_CHECKING:
    from pathlib import Path

NOTIFIED = [Freed()]
# Upper bound until a slot that a decode has emptied is announced, including one loop turn.
SOON_S = LOOK_S + 1e-4


class Gateway(Client):
    """A gateway that offers and watches under its own name; its calls have separate ids."""

    def __init__(self, site: Site, name: str) -> None:
        super().__init__(site)
        self.name = name

    def offer(self, call: str, prompt: int | bytes = 20) -> Reply | None:
        """Return the answer, if it came at once."""
        self.submit(f"{self.name} {call}", prompt, gateway=self.name)
        return self.of(call)[-1] if self.of(call) else None

    def watch(self, call: str = "watch") -> None:
        def send(reply: Reply, last: bool) -> None:
            assert last
            self.replies.append((watch.id, reply, last))

        watch = Watch(f"{self.name} {call}", self.name)
        self.site.p[0].watch(watch, self.name, send)

    def release(self, name: str) -> None:
        super().release(f"{self.name} {name}")

    def of(self, name: str) -> list[Reply]:
        return super().of(f"{self.name} {name}")


def gateways(site: Site, names: str) -> list[Gateway]:
    return [Gateway(site, name) for name in names]


async def fill(site: Site, owner: Gateway) -> None:
    """Fill every slot with a KV cache that no decode has taken yet."""
    for slot in range(site.p[0]._limits.slots):
        assert owner.offer(f"held {slot}") is None
    await asyncio.sleep(0.001)


# ------------------------------------------------------------------------------------- notification


@virtual
async def test_free_slot_is_told_at_once(tmp_path: Path) -> None:
    async with Site(tmp_path, profile={"speed": 0}, prefill={"slots": 2}) as site:
        (a,) = gateways(site, "a")
        a.watch()
        assert a.of("watch") == NOTIFIED
        assert not site.p[0]._slots.watches
        await asyncio.sleep(1)
        assert a.of("watch") == NOTIFIED, "notified once"


@virtual
async def test_slot_that_ends_by_itself_is_told_soon(tmp_path: Path) -> None:
    """No lost wake-up: the end of the lease is seen without an offer."""
    async with Site(tmp_path, profile={"speed": 0}, prefill={"slots": 1, "lease_s": 1.0}) as site:
        a, b = gateways(site, "ab")
        await fill(site, a)
        b.watch()
        await asyncio.sleep(0.99)
        assert b.of("watch") == []
        await asyncio.sleep(0.01 + SOON_S)
        assert b.of("watch") == NOTIFIED


@virtual
@pytest.mark.parametrize("how", ["release", "pull", "failure"])
async def test_every_end_of_a_slot_is_told_soon(how: str, tmp_path: Path) -> None:
    async with Site(tmp_path, profile=TIMES, prefill={"slots": 1}) as site:
        a, b = gateways(site, "ab")
        if how == "failure":
            site.p_engines[0].failures = [RuntimeError("broken kernel")]
        assert a.offer("held") is None
        b.watch()
        await asyncio.sleep(0.019)
        assert b.of("watch") == []
        await asyncio.sleep(0.001 + SOON_S)
        if how != "failure":
            result = a.of("held")[-1]
            assert isinstance(result, Prefilled)
            if how == "pull":
                receiver = site.receivers[0]
                receiver.pull(receiver.open(result.handle), [(0, 20)])
            else:
                a.release("held")
            await asyncio.sleep(SOON_S)
        assert b.of("watch") == NOTIFIED
        await site.idle(0.03)


@virtual
async def test_quarantine_that_ends_is_told_soon(tmp_path: Path) -> None:
    async with Site(tmp_path, profile={"speed": 0}, prefill={"slots": 4, "lease_s": 1.0}) as site:
        a, b = gateways(site, "ab")
        receiver, pulls = site.receivers[0], []
        for number in range(MAX_QUARANTINED):
            a.offer(str(number))
            await asyncio.sleep(0.001)
            [result] = a.of(str(number))
            assert isinstance(result, Prefilled)
            pulls.append(MidPull(receiver, receiver.open(result.handle)))
            a.release(str(number))
        assert b.offer("no") == Busy("slots")
        b.watch()
        await asyncio.sleep(0.1)
        assert b.of("watch") == []
        with pytest.raises(Exception, match="has ended"):
            pulls[0].end()
        await asyncio.sleep(SOON_S)
        assert b.of("watch") == NOTIFIED
        for pull in pulls[1:]:
            with pytest.raises(Exception, match="has ended"):
                pull.end()
        await site.idle(0.03)


@virtual
async def test_arena_without_room_is_no_reason_to_be_told_again_and_again(tmp_path: Path) -> None:
    """A slot is free, but the last prompt did not fit: the watch waits for free memory."""
    async with Site(tmp_path, profile={"speed": 0}, prefill={"arena_mib": 1, "slots": 4}) as site:
        a, b, c = gateways(site, "abc")
        a.offer("large", 5000)
        await asyncio.sleep(0.001)
        assert b.offer("large", 5000) == Busy("arena")
        b.watch()
        await asyncio.sleep(0.5)
        assert b.of("watch") == []
        assert c.offer("small", 100) is None, "there are slots, and room for this prompt"
        await asyncio.sleep(0.1)
        c.release("small")
        await asyncio.sleep(0.1)
        assert b.of("watch") == [], "there is no more room than before"
        a.release("large")
        await asyncio.sleep(SOON_S)
        assert b.of("watch") == NOTIFIED
        assert b.offer("again", 5000) is None
        await asyncio.sleep(0.001)
        b.release("again")
        await site.idle(0.03)


@virtual
async def test_a_watch_whose_release_is_lost_is_over_after_a_while(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=TIMES, prefill={"slots": 1, "lease_s": 30}) as site:
        a, b = gateways(site, "ab")
        await fill(site, a)
        b.watch()
        await asyncio.sleep(WATCHED_S / 2)
        b.watch("again")
        await asyncio.sleep(0.6 * WATCHED_S)
        assert b.of("watch") == [Released()], "the gateway has watched again"
        assert b.of("again") == []
        await asyncio.sleep(0.5 * WATCHED_S)
        assert b.of("again") == [Released()]
        assert not site.p[0]._slots.watches
        a.release("held 0")


@virtual
async def test_a_room_watch_whose_release_is_lost_is_over_after_a_while(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=TIMES) as site:
        told: list[Reply] = []
        room = site.d[0]._admission.room()
        site.d[0].watch(Watch("a watch", "a", room), "a", lambda reply, _: told.append(reply))
        await asyncio.sleep(0.9 * WATCHED_S)
        assert not told
        await asyncio.sleep(0.2 * WATCHED_S)
        assert told == [Released()]


# -------------------------------------------------------------------------------------- reservation


@virtual
async def test_slot_is_kept_for_who_was_told(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=TIMES, prefill={"slots": 1}) as site:
        a, b, c = gateways(site, "abc")
        await fill(site, a)
        await asyncio.sleep(0.05)
        b.watch()
        a.release("held 0")
        await asyncio.sleep(SOON_S)
        assert b.of("watch") == NOTIFIED
        assert c.offer("c") == Busy("slots")
        assert a.offer("a") == Busy("slots")
        await asyncio.sleep(RESERVED_S / 2)
        assert c.offer("c again") == Busy("slots")
        assert b.offer("b") is None
        assert b.offer("b again") == Busy("slots"), "one slot for one notified gateway"
        await asyncio.sleep(0.05)
        b.release("b")
        assert c.offer("c at last") is None, "no slot is kept any more"
        await asyncio.sleep(0.05)
        c.release("c at last")


@virtual
async def test_other_free_slots_are_for_everybody(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=TIMES, prefill={"slots": 3}) as site:
        a, b, c = gateways(site, "abc")
        b.watch()
        assert b.of("watch") == NOTIFIED
        assert [c.offer(str(i)) for i in range(3)] == [None, None, Busy("slots")]
        assert a.offer("a") == Busy("slots")
        assert b.offer("b") is None
        await asyncio.sleep(0.05)
        for gateway, call in ((c, "0"), (c, "1"), (b, "b")):
            gateway.release(call)


@virtual
async def test_slot_that_is_not_used_goes_to_the_next(tmp_path: Path) -> None:
    async with Site(tmp_path, profile={"speed": 0}, prefill={"slots": 1}) as site:
        a, b, c, d = gateways(site, "abcd")
        await fill(site, a)
        for gateway in (b, c, d):
            gateway.watch()
        a.release("held 0")
        await asyncio.sleep(SOON_S)
        assert [len(g.of("watch")) for g in (b, c, d)] == [1, 0, 0]
        await asyncio.sleep(RESERVED_S - SOON_S)
        assert [len(g.of("watch")) for g in (b, c, d)] == [1, 0, 0]
        await asyncio.sleep(SOON_S)
        assert [len(g.of("watch")) for g in (b, c, d)] == [1, 1, 0]
        assert b.offer("too late") == Busy("slots")
        c.release("watch")
        await asyncio.sleep(SOON_S)
        assert d.of("watch") == NOTIFIED, "it was returned"
        await asyncio.sleep(RESERVED_S + SOON_S)
        assert a.offer("at last") is None
        await asyncio.sleep(0.001)
        a.release("at last")


# -------------------------------------------------------------------------------------------- order


@virtual
async def test_first_come_first_told(tmp_path: Path) -> None:
    async with Site(tmp_path, profile={"speed": 0}, prefill={"slots": 2}) as site:
        a, *others = gateways(site, "abcdef")
        await fill(site, a)
        for gateway in others:
            assert gateway.offer("early") == Busy("slots")
            gateway.watch()
        told: list[str] = []
        for _ in range(3):
            for held in ("held 0", "held 1"):
                a.release(held)
            await asyncio.sleep(SOON_S)
            for gateway in others:
                if gateway.of("watch") and gateway.name not in told:
                    told.append(gateway.name)
                    assert gateway.offer("mine") is None
            await asyncio.sleep(0.001)
            for gateway in others:
                gateway.release("mine")
        assert told == list("bcdef")


@virtual
async def test_offer_of_who_is_first_takes_the_slot_untold(tmp_path: Path) -> None:
    """The gateway keeps waiting, but behind the others, so frequent offers give no advantage."""
    async with Site(tmp_path, profile={"speed": 0}, prefill={"slots": 1, "lease_s": 1.0}) as site:
        a, b, c = gateways(site, "abc")
        await fill(site, a)
        b.watch()
        c.watch()
        await asyncio.sleep(0.9)
        # Within one turn of the loop: the offer itself sees the release.
        a.release("held 0")
        assert c.offer("c") == Busy("slots")
        assert b.of("watch") == NOTIFIED, (
            "an offer out of turn makes the prefill notify the first in the queue"
        )
        assert b.offer("b") is None
        await asyncio.sleep(0.001)
        b.watch("second")
        c.release("watch")
        b.release("b")
        assert b.offer("b again") is None
        assert b.of("second") == []
        await asyncio.sleep(0.001)
        c.watch("third")
        b.release("b again")
        await asyncio.sleep(SOON_S)
        assert (b.of("second"), c.of("third")) == (NOTIFIED, [])


@virtual
async def test_turn_taken_untold_is_the_turn(tmp_path: Path) -> None:
    async with Site(tmp_path, profile={"speed": 0}, prefill={"slots": 1}) as site:
        a, b, c = gateways(site, "abc")
        await fill(site, a)
        b.watch()
        c.watch()
        a.release("held 0")
        assert b.offer("b") is None, "before any gateway was notified"
        await asyncio.sleep(0.001)
        b.release("b")
        await asyncio.sleep(SOON_S)
        assert (b.of("watch"), c.of("watch")) == ([], NOTIFIED), "now it is the other's turn"


@virtual
async def test_second_slot_is_told_where_an_offer_takes_the_first(tmp_path: Path) -> None:
    async with Site(tmp_path, profile={"speed": 0}, prefill={"slots": 2}) as site:
        a, b = gateways(site, "ab")
        await fill(site, a)
        b.watch()
        a.release("held 0")
        a.release("held 1")
        assert b.offer("b") is None
        assert b.of("watch") == NOTIFIED
        assert a.offer("a") == Busy("slots")
        await asyncio.sleep(0.001)
        b.release("b")


@virtual
async def test_one_watch_to_a_gateway(tmp_path: Path) -> None:
    async with Site(tmp_path, profile={"speed": 0}, prefill={"slots": 1}) as site:
        a, b, c = gateways(site, "abc")
        await fill(site, a)
        b.watch("first")
        c.watch()
        b.watch("second")
        assert b.of("first") == [Released()]
        a.release("held 0")
        await asyncio.sleep(SOON_S)
        assert b.of("second") == NOTIFIED, "instead of the first"
        assert c.of("watch") == []


# ----------------------------------------------------------------------------------- end of a watch


@virtual
async def test_released_watch_is_over(tmp_path: Path) -> None:
    """The watch of a gateway that has died ends, too, when its orphaned calls are released."""
    async with Site(tmp_path, profile={"speed": 0}, prefill={"slots": 1}) as site:
        a, b = gateways(site, "ab")
        await fill(site, a)
        b.watch()
        b.release("watch")
        assert b.of("watch") == [Released()]
        assert len(site.p[0]._slots.watches) == 0
        a.release("held 0")
        await asyncio.sleep(SOON_S)
        assert b.of("watch") == [Released()]
        assert a.offer("free for all") is None
        await asyncio.sleep(0.001)
        a.release("free for all")


@virtual
async def test_watches_end_with_the_instance(tmp_path: Path) -> None:
    async with Site(tmp_path, profile={"speed": 0}, prefill={"slots": 1}) as site:
        a, b = gateways(site, "ab")
        await fill(site, a)
        b.watch()
        await site.p[0].close()
        assert b.of("watch") == [Failed("INTERNAL", "prefill_0 is shutting down")]
        site.p[0].close = lambda: asyncio.sleep(0)  # type: ignore[method-assign]


@virtual
async def test_gauge(tmp_path: Path) -> None:
    async with Site(tmp_path, profile={"speed": 0}, prefill={"slots": 1}) as site:
        a, b, c = gateways(site, "abc")
        await fill(site, a)
        b.watch()
        c.watch()
        await asyncio.sleep(0.03)
        assert site.level("pdserve_slot_watches", instance="prefill_0") == 2
        b.release("watch")
        c.release("watch")
        await asyncio.sleep(0.03)
        assert site.level("pdserve_slot_watches", instance="prefill_0") == 0


@virtual
async def test_hurry_is_accepted_at_once(tmp_path: Path) -> None:
    async with Site(tmp_path, profile={"prefill": {"base_ms": 7000.0}}) as site:
        client = Client(site)
        client.submit("a", hurry=True)
        assert client.of("a") == [Accepted()]
        await asyncio.sleep(4.9)
        assert client.of("a") == [Accepted()]
        await asyncio.sleep(2.2)
        assert [type(reply) for reply in client.of("a")] == [Accepted, Accepted, Prefilled]
        client.release("a")
        await site.idle(0.0)


# ------------------------------------------------------------------------------------------- bounds


@virtual
async def test_a_connection_has_one_turn_whatever_names_it_gives(tmp_path: Path) -> None:
    async with Site(tmp_path, profile={"speed": 0}, prefill={"slots": 1}) as site:
        owner, other = gateways(site, "ab")
        await fill(site, owner)
        ends: list[Reply] = []
        for number in range(3000):
            watch = Watch(f"{number}", f"gateway {number}")
            site.p[0].watch(watch, "one connection", lambda reply, _last: ends.append(reply))
        assert ends == [Released()] * 2999
        assert len(site.p[0]._slots.watches) == 1
        other.watch()
        owner.release("held 0")
        await asyncio.sleep(SOON_S)
        assert ends[2999:] == NOTIFIED, "it was there first"
        assert other.of("watch") == []
        await asyncio.sleep(RESERVED_S + LOOK_S)
        assert other.of("watch") == NOTIFIED
        assert other.offer("call") is None


@virtual
async def test_watches_are_bounded(tmp_path: Path) -> None:
    async with Site(tmp_path, profile={"speed": 0}, prefill={"slots": 1}) as site:
        (owner,) = gateways(site, "a")
        await fill(site, owner)
        crowd = [Gateway(site, f"gateway {number}") for number in range(MAX_WATCHES + 1)]
        for one in crowd:
            one.watch()
        [refused] = crowd[-1].of("watch")
        assert isinstance(refused, Failed)
        assert refused.message == f"{MAX_WATCHES} gateways wait already"
        assert not any(one.of("watch") for one in crowd[:-1])
        crowd[3].watch("again")
        assert crowd[3].of("watch") == [Released()], "a gateway that has a place may watch again"
        assert crowd[3].of("again") == []


@virtual
async def test_a_gateway_that_has_no_place_waits_as_if_it_had_heard_nothing(tmp_path: Path) -> None:
    async with Site(tmp_path, profile={"speed": 0}, prefill={"slots": 1}) as site:
        (owner,) = gateways(site, "a")
        await fill(site, owner)
        for number in range(MAX_WATCHES):
            Gateway(site, f"gateway {number}").watch()
        loop = asyncio.get_running_loop()
        began = loop.time()
        [prefills, _] = site.instances
        assert not await prefills[0].watch("late", timeout=0.5)
        assert loop.time() - began == pytest.approx(0.5, abs=0.1)
