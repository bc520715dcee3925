"""Tests for on-demand forwarding: a free slot is used at once, without polling."""

from __future__ import annotations

import asyncio
import random
from unittest import mock

import pytest

from pdserve.rpc import messages
from pdserve.rpc.client import Replies
from pdserve.rpc.messages import Busy, Freed, PrefillRequest, Watch
from pdserve.scheduling.candidates import Rank
from pdserve.scheduling.forwarding import WATCH_S
from pdserve.scheduling.instance import Instance
from pdserve.scheduling.request import PRIORITY_S
from tests.unit import inprocess
from tests.unit.fake_instances import LATENCY_S, FakeInstance, Gateway, rejections
from tests.unit.inprocess import virtual

# From a free slot to an accepted offer: notification, offer, answer.
AT_ONCE_S = 6 * LATENCY_S


def now() -> float:
    return asyncio.get_running_loop().time()


def full(*slots: int) -> list[FakeInstance]:
    fakes = [FakeInstance(number) for number in slots]
    for fake in fakes:
        fake.fill()
    return fakes


def offers(*fakes: FakeInstance) -> int:
    return sum(fake.messages[PrefillRequest] for fake in fakes)


async def nothing_held(gateway: Gateway, *fakes: FakeInstance) -> None:
    """Check that no request waits, and that nothing is held or watched any more."""
    await asyncio.sleep(0.05)
    assert not len(gateway.forwarding)
    assert [instance.load.open for instance in gateway.instances] == [0] * len(fakes)
    assert not any(fake._watches or fake.held for fake in fakes)
    assert not gateway.forwarding._watching


# ----------------------------------------------------------------------- no free slot is overlooked


@virtual
async def test_a_slot_that_is_freed_between_busy_and_watch() -> None:
    """The watch finds the slot free, and reports it."""
    [fake] = full(1)
    gateway = Gateway([fake])
    task = gateway.start(gateway.request())
    fake.heard = lambda request: fake.free() if isinstance(request, Watch) and fake.held else None
    await asyncio.sleep(3 * LATENCY_S + AT_ONCE_S)
    assert len(gateway.served) == 1
    assert await task
    assert offers(fake) == 2
    await nothing_held(gateway, fake)


@virtual
async def test_a_watch_that_was_sent_before_the_refusal_is_sent_again() -> None:
    """It states more room than there is: a decode with as much would not answer it."""
    before, refused = messages.Room(1, 3), messages.Room(0, 1)
    fake = FakeInstance()
    watches: list[messages.Room | None] = []
    fake.heard = lambda one: watches.append(one.room) if isinstance(one, Watch) else None
    gateway = Gateway([fake])
    [instance], forwarding = gateway.instances, gateway.forwarding
    fake.fill()
    instance.heard(Freed(before))

    async def offer(*_: object) -> None:
        await asyncio.sleep(2 * LATENCY_S)
        instance.heard(Busy("slots", refused))

    looking = asyncio.create_task(forwarding.look((False, 0.0), 1.0, lambda: None))
    await forwarding.once(Rank(lambda _: 0.0), offer)
    await asyncio.sleep(2 * LATENCY_S)
    assert watches == [before, refused]
    looking.cancel()
    await asyncio.gather(looking, return_exceptions=True)
    await asyncio.sleep(2 * LATENCY_S)
    assert not forwarding._watching


@virtual
async def test_instances_that_leave_together_are_let_go_in_their_order() -> None:
    """Otherwise the same events would have another history each time."""
    fakes = full(*[1] * 8)
    gateway, released = Gateway(fakes), list[str]()
    instances = gateway.instances

    def tell(instance: Instance, message: object) -> None:
        released.append(instance.name)

    task = gateway.start(gateway.request())
    await asyncio.sleep(0.1)
    with mock.patch.object(Instance, "tell", autospec=True, side_effect=tell):
        gateway.forwarding.update(instances[:1])
        await asyncio.sleep(2 * LATENCY_S)
    assert released == [one.name for one in instances[1:]]
    for fake in fakes:
        fake.free()
    assert await task


@virtual
async def test_a_slot_that_is_freed_while_others_are_asked() -> None:
    """It was busy when it was asked, and is free before the last of the others has refused."""
    fakes = full(1, 1, 1)
    gateway = Gateway(fakes)
    gateway.instances[0].load.add(-1)  # so that it is asked first
    task = gateway.start(gateway.request())

    def third(request: object) -> None:
        if isinstance(request, PrefillRequest) and fakes[0].held:
            fakes[0].free()
            gateway.forwarding.freed(gateway.instances[0])

    fakes[2].heard = third
    await asyncio.sleep(8 * LATENCY_S + AT_ONCE_S)
    assert len(gateway.served) == 1
    assert await task


@pytest.mark.parametrize("steps", range(12))
@virtual
async def test_a_waiter_who_is_cancelled_just_when_a_slot_is_free(steps: int) -> None:
    """vllm#29906: whenever its wake-up is interrupted, the next request goes at once."""
    [fake] = full(1)
    gateway = Gateway([fake])
    first, second = gateway.start(gateway.request()), gateway.start(gateway.request())
    await asyncio.sleep(0.1)
    fake.free()
    freed = now()
    for _ in range(steps):
        await asyncio.sleep(LATENCY_S / 3)
    first.cancel()
    await asyncio.wait([first])
    assert await second
    served = gateway.served[-1].forwarded
    assert served - freed < steps * LATENCY_S + 2 * AT_ONCE_S or first.cancelled()
    assert now() - freed < 2 * gateway.hold_s
    await nothing_held(gateway, fake)


@virtual
async def test_many_who_wait_and_one_free_slot() -> None:
    """One of them is notified and uses the slot; the others are not woken."""
    [fake] = full(4)
    gateway = Gateway([fake], hold_s=60.0)
    tasks = [gateway.start(gateway.request()) for _ in range(300)]
    await asyncio.sleep(0.2)
    before = offers(fake)
    for count in range(1, 4):
        fake.free()
        await asyncio.sleep(AT_ONCE_S)
        assert len(gateway.served) == count
    assert offers(fake) - before <= 9, "one offer is accepted, two are refused"
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


@virtual
async def test_a_newcomer_is_not_kept_back_by_those_who_wait_for_something_else() -> None:
    fakes = [*full(1), FakeInstance(1)]
    gateway = Gateway(fakes)
    particular = [gateway.start(gateway.request(), usable=[0]) for _ in range(3)]
    await asyncio.sleep(0.1)
    other = gateway.start(gateway.request())
    await asyncio.sleep(AT_ONCE_S)
    assert len(gateway.served) == 1
    assert await other
    fakes[0].free()
    assert all(await asyncio.gather(*particular))
    await nothing_held(gateway, *fakes)


@virtual
async def test_nobody_is_kept_back_by_one_who_cannot_use_what_is_free() -> None:
    """A pair that cannot hand over blocks its own request, and not those behind it."""
    fakes = full(1, 1)
    gateway = Gateway(fakes)
    particular = gateway.start(gateway.request(), usable=[0])
    other = gateway.start(gateway.request())
    await asyncio.sleep(0.1)
    fakes[1].free()
    await asyncio.sleep(AT_ONCE_S)
    assert len(gateway.served) == 1
    assert await other
    fakes[0].free()
    assert await particular
    await nothing_held(gateway, *fakes)


@virtual
async def test_a_lost_message_costs_a_bounded_wait() -> None:
    """dynamo#13088: a lost message, of each kind in turn, costs no more than a bounded time."""
    for kind in (Freed, Watch, Busy):
        [fake] = full(1)
        gateway = Gateway([fake])
        lost: list[object] = []

        def lose_one(message: object, kind: type = kind, lost: list[object] = lost) -> bool:
            if lost or not isinstance(message, kind):
                return False
            lost.append(message)
            return True

        fake.lose = lose_one
        task = gateway.start(gateway.request())
        await asyncio.sleep(0.1)
        fake.free()
        freed = now()
        assert await task
        bound = 2.5 if kind is Busy else WATCH_S[1]  # a lost answer is waited for, ANSWER_S
        assert gateway.served[0].forwarded - freed < bound + AT_ONCE_S
        assert lost
        await nothing_held(gateway, fake)


@virtual
async def test_whatever_is_free_is_taken() -> None:
    """With random arrivals, ends and cancels, no slot is idle while any request waits."""
    rng = random.Random(4)
    fakes = [FakeInstance(2) for _ in range(4)]
    gateway = Gateway(fakes, hold_s=0.03)
    tasks: list[asyncio.Task[bool]] = []
    idle = 0.0

    async def look() -> None:
        nonlocal idle
        while True:
            await asyncio.sleep(LATENCY_S)
            free = sum(fake.slots - len(fake.held) for fake in fakes)
            idle = idle + LATENCY_S if free and len(gateway.forwarding) else 0.0
            assert idle < 2 * AT_ONCE_S

    looking = asyncio.create_task(look())
    for _ in range(1500):
        tasks.append(gateway.start(gateway.request(priority=rng.randrange(2))))
        if rng.random() < 0.3:
            asyncio.get_running_loop().call_later(rng.uniform(0, 0.05), tasks[-1].cancel)
        await asyncio.sleep(rng.expovariate(1 / 0.0035))
    await asyncio.wait(tasks)
    assert not looking.done(), looking.exception()
    looking.cancel()
    await nothing_held(gateway, *fakes)


# -------------------------------------------------------------------------------------------- order


@virtual
async def test_order_of_those_who_wait() -> None:
    """Recovering requests go first, then priority decides, then the earlier deadline."""
    [fake] = full(1)
    gateway = Gateway([fake], hold_s=0.01)
    begun = gateway.request()
    begun.add(bytes(4))
    requests = {
        "late": gateway.request(),
        "soon": gateway.request(ttft_limit_s=20.0),
        "low": gateway.request(priority=-1),
        "high": gateway.request(priority=2),
        "begun": begun,
    }
    tasks = []
    for request in requests.values():
        tasks.append(gateway.start(request))
        await asyncio.sleep(0.002)
    fake.free()
    assert all(await asyncio.gather(*tasks))
    order = [name for one in gateway.served for name, other in requests.items() if one is other]
    assert order == ["begun", "soon", "high", "late", "low"]


@virtual
async def test_nobody_starves() -> None:
    """Among endless higher priorities, one of the lowest is served after at most PRIORITY_S."""
    fake = FakeInstance(1)
    gateway = Gateway([fake], hold_s=0.1)
    tasks = []

    async def crowd() -> None:
        while True:  # more than can be served
            tasks.append(gateway.start(gateway.request(priority=1)))
            await asyncio.sleep(0.08)

    crowding = asyncio.create_task(crowd())
    await asyncio.sleep(1.0)
    assert await gateway.serve(lowest := gateway.request())
    # Requests that came less than PRIORITY_S after it went first: 1.25 of those in each 0.1 s.
    assert PRIORITY_S < lowest.forwarded - lowest.arrived < 1.25 * PRIORITY_S + 2.0
    crowding.cancel()
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


# --------------------------------------------------------------------------------------------- cost


@pytest.fixture
def _an_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inprocess, "LIMIT_S", 4000.0)


@pytest.mark.usefixtures("_an_hour")
@virtual
async def test_waiting_for_an_hour_is_no_busy_loop() -> None:
    """One watch and one offer a second to each instance guard against lost messages."""
    fakes = full(2, 2, 2)
    gateway = Gateway(fakes)
    tasks = [gateway.start(gateway.request(ttft_limit_s=3600.0)) for _ in range(20)]
    assert not any(await asyncio.gather(*tasks))
    assert now() == pytest.approx(3600.0, abs=0.01)
    for fake in fakes:
        assert 3600 < fake.messages[Watch] < 3600 / WATCH_S[0]
        assert fake.messages[PrefillRequest] < 2 * fake.messages[Watch]
        fake.held.clear()
    await nothing_held(gateway, *fakes)


@virtual
async def test_a_timer_that_fires_early_is_nobodys_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop's clock may count milliseconds; then timers of watches and limits fire early."""
    get = Replies.get
    monkeypatch.setattr(Replies, "get", lambda replies, wait: get(replies, wait - 4e-4))
    [fake] = full(1)
    gateway = Gateway([fake])
    assert not await gateway.serve(gateway.request(ttft_limit_s=3.0))
    fake.lose_all()
    assert not await gateway.serve(gateway.request(ttft_limit_s=0.2))
    assert gateway.instances[0].breaker.closed


@virtual
async def test_burst_of_100_on_two_of_four_slots() -> None:
    """sglang#10110, agentic-pd-hybrid ef4dc81: each slot refuses once or twice, and no more."""
    fakes = [FakeInstance(4), FakeInstance(4)]
    gateway = Gateway(fakes, hold_s=0.1)
    requests = [gateway.request() for _ in range(100)]
    assert all(await asyncio.gather(*map(gateway.serve, requests)))
    assert now() < 100 / 8 * (0.1 + AT_ONCE_S) + 0.1
    assert rejections(requests) < 60
    assert abs(sum(one.offers[-1].instance == "instance_0" for one in requests) - 50) <= 4
    await nothing_held(gateway, *fakes)


@virtual
async def test_burst_with_room_for_all_of_it_is_refused_nowhere() -> None:
    """An idle prefill gets offers without waiting for its answers, so that its batch fills."""
    fakes = [FakeInstance(4), FakeInstance(4)]
    gateway = Gateway(fakes)
    requests = [gateway.request() for _ in range(8)]
    tasks = [gateway.start(one) for one in requests]
    await asyncio.sleep(2 * LATENCY_S + 1e-5)
    assert len(gateway.served) == 8
    assert rejections(requests) == 0
    await asyncio.gather(*tasks)


async def messages_per_request(count: int, seconds: float) -> float:
    """Return the messages at 125 % load over this many instances of one slot, all busy at first."""
    fakes = full(*[1] * count)
    gateway = Gateway(fakes, hold_s=1.0)
    for number, fake in enumerate(fakes):  # they become free one after the other
        asyncio.get_running_loop().call_later(0.5 + number / count, fake.free)
    tasks = []
    for _ in range(int(1.25 * count * seconds)):
        tasks.append(gateway.start(gateway.request()))
        await asyncio.sleep(0.8 / count)
    served = len(gateway.served)
    assert served >= count * (seconds - 1)
    total = sum(fake.messages.total() for fake in fakes)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    return total / served


@virtual
async def test_messages_to_200_busy_instances() -> None:
    """There are a few messages per request, its end included, not some per instance."""
    few, many = await messages_per_request(10, 20.0), await messages_per_request(200, 6.0)
    assert many < 12
    assert many < 1.5 * few


@virtual
async def test_one_that_is_stopped_holds_up_only_who_was_offered_to_it() -> None:
    """TensorRT-LLM#15363, dynamo#13088: all other requests go to the other instances."""
    fakes = [FakeInstance(1), FakeInstance(1), FakeInstance(1)]
    fakes[0].lose_all()
    gateway = Gateway(fakes, hold_s=0.05)
    requests = [gateway.request() for _ in range(40)]
    assert all(await asyncio.gather(*map(gateway.serve, requests)))
    waits = sorted(one.forwarded - one.arrived for one in requests)
    assert waits[-2] < 40 / 2 * 0.05 + 0.1
    assert waits[-1] < 2.1, "the request that found out"
    asked = [one for one in requests if any(o.instance == "instance_0" for o in one.offers)]
    assert len(asked) == 1
