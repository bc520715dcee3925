"""Mechanisms of the gateway and the instances, each of which can be switched off.

A mechanism that no seed misses is not needed, or not checked. So the tests switch off each in turn,
and some seed has to notice.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any
from unittest import mock

from pdserve import config
from pdserve.gateway.groups import Group, Groups
from pdserve.gateway.router import Asked, Router, Scenario
from pdserve.instances.prompt_computation import PromptComputation
from pdserve.instances.slot_watches import SlotWatches
from pdserve.scheduling import scheduler
from pdserve.scheduling.circuit_breaker import CircuitBreaker, RetryBudget
from pdserve.scheduling.decode_stage import DecodeStage
from pdserve.scheduling.forwarding import Forwarding
from pdserve.scheduling.instance import Instance
from pdserve.scheduling.kv_links import KVLinks
from pdserve.scheduling.request import Request
from pdserve.scheduling.scheduler import Scheduler
from pdserve.scheduling.wait_queue import WaitQueue
from pdserve.transfer.producer.lease_manager import LeaseManager

Patches = tuple[tuple[Any, str, Any], ...]


def _nothing(*_: object) -> None:
    pass


async def _never(*_: object) -> None:
    pass


def _always(*_: object) -> bool:
    return True


def _time_goes_by(line: Any) -> None:
    line._timer = None


def _made_anew(
    groups: Groups, deployment: config.Deployment, spec: config.Group, numbers: Any
) -> Group:
    if spec.name in groups._current:
        former = groups._current.pop(spec.name)
        former.retire()
        groups._retired.append(former)
    return _GROUP(groups, deployment, spec, numbers)


def _reached_anew(
    groups: Groups, deployment: config.Deployment, role: config.Role, names: Any, numbers: Any
) -> Any:
    for key in [key for key in groups._instances if key[1] in names]:
        del groups._instances[key]
    return _REACH(groups, deployment, role, names, numbers)


_GROUP, _REACH = Groups._group, Groups._reach

MECHANISMS: dict[str, Patches] = {
    # A waiting request is woken when something becomes free.
    "wake-up": ((WaitQueue, "wake", _nothing),),
    # An instance tells the gateways that watch it when a slot is free.
    "watch": ((SlotWatches, "tell", _nothing),),
    # A gateway hears of the slots that its own requests free.
    "freed": ((Forwarding, "freed", _nothing),),
    # A gateway looks again even if no message comes.
    "second look": ((Forwarding, "_time_to_look", _time_goes_by),),
    # A lease ends when its time is over, or when its KV cache was taken.
    "lease sweep": ((LeaseManager, "over", lambda *_: False),),
    # Memory that a silent receiver was reading is given back.
    "quarantine sweep": ((LeaseManager, "sweep", _nothing),),
    # A request that fails is tried again by another pair.
    "retry": ((scheduler, "ATTEMPTS", 1),),
    # Requests are not tried again more often than the budget allows.
    "budget": ((RetryBudget, "spend", _always),),
    # An instance that has failed is left alone.
    "breaker": ((CircuitBreaker, "allows", _always),),
    # A pair that cannot hand over is left alone, though both of its instances are well.
    "breaker of pairs": ((DecodeStage, "not_handed_over", _nothing),),
    # A call that nobody wants any more is released.
    "release": ((Instance, "_release", _nothing),),
    # A new life of an instance is connected.
    "connecting": ((KVLinks, "connect_now", _never), (KVLinks, "_round", _never)),
    # A group continues with the instances that it has now.
    "update in place": ((Scheduler, "update", _nothing),),
    # A group that is in the next deployment, too, continues.
    "groups go on": ((Groups, "_group", _made_anew),),
    # An instance that is in the next deployment, too, keeps its channel.
    "one channel": ((Groups, "_reach", _reached_anew),),
    # A group that is gone connects nothing any more.
    "retirement": ((Group, "retire", _nothing),),
    # An instance that has left is closed when it serves nothing any more.
    "sweep": ((Groups, "sweep", _never),),
    # A group forgets the instances that have left it.
    "forgetting": ((Group, "forget", _nothing),),
    # A request belongs to the scenario that it names, or whose rule it meets.
    "label": ((Router, "_labelled", lambda router, _: router.default),),
    "rule": ((Asked, "meets", lambda *_: False),),
    # A scenario's groups take turns by their shares, and a group that has failed gets no turn.
    "shares": ((Scenario, "next_group", lambda scenario: scenario._groups[0][1]),),
    "group that has failed": ((Group, "healthy", property(_always)),),
    # A slot is kept for the gateway that was told of it.
    "reservation": ((SlotWatches, "admits", lambda _, gateway, free: free > 0),),
    # A request that has waited for longer goes first.
    "order": ((Request, "order", property(lambda request: (False, -request.arrived))),),
    # A prompt whose limit has passed is not computed.
    "limit in the prefill": ((PromptComputation, "_give_up_late", _nothing),),
}


def without(name: str | None) -> AbstractContextManager[Any]:
    """Switch a mechanism off until the context ends; None: all of them work."""
    if name is None:
        return nullcontext()
    patches = ExitStack()
    for owner, attribute, value in MECHANISMS[name]:
        patches.enter_context(mock.patch.object(owner, attribute, value))
    return patches
