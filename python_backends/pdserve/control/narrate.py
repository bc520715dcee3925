"""Events of decisions, with the numbers that they were made from."""

from __future__ import annotations

import math

from pdserve.control.advance import Advanced
from pdserve.control.cluster import Group, Member
from pdserve.control.events import Event, What
from pdserve.control.loss import Loss
from pdserve.control.rebalance import Verdict
from pdserve.control.transaction import Kind, Step, Transaction
from pdserve.control.upkeep import Mark
from pdserve.control.volume import Volume


def begun(now: float, transaction: Transaction, numbers: dict[str, float]) -> Event:
    """Tell that a transaction begins."""
    names = tuple(move.instance for move in transaction.moves)
    text = f"{transaction.kind.value}: {transaction.reason}"
    return Event(now, "begin", transaction.group, text[:1024], names, numbers)


def steps(now: float, found: Advanced) -> list[Event]:
    """Tell each step that a transaction made, and its end."""
    transaction = found.transaction
    events = [
        Event(
            at=now,
            what="step",
            group=transaction.group,
            text=f"{before.step.value} to {after.step.value}"
            + (f": {after.reason}" if after.reason and not after.step.forward else ""),
            instances=(after.instance,),
            numbers={f"{before.step.value}_s": after.took[before.step.value]},
        )
        for before, after in found.stepped
    ]
    if transaction.over:
        events.append(_end(now, transaction))
    return events


def marked(now: float, mark: Mark) -> Event:
    """Tell that a member was taken out of service, or serves again."""
    name, group = (mark.member.name,), mark.member.group
    if mark.lost is not None:
        detect_s = now - mark.lost.since
        return Event(now, "lost", group, mark.lost.reason, name, {"detect_s": detect_s})
    if mark.desired.state == "draining":
        return Event(now, "drain", group, "an operator drains it", name)
    return Event(now, "found", group, "it serves again", name)


def short(now: float, member: Member, why: Loss) -> Event:
    """Tell that a lost member is not replaced."""
    text = f"no spare can take its place as {member.role}; {why.reason}"
    return Event(now, "short", member.group, text[:1024], (member.name,))


def needed(now: float, group: Group, found: Volume, back: bool) -> Event:
    """Tell that equation (2) wants a group out, or back."""
    numbers = {"arrivals": found.arrivals, "capacity": found.capacity, "load": found.load}
    text = f"the other groups of {group.scenario} {'do not suffice' if back else 'suffice'}"
    return Event(now, "volume", group.name, text, (), _finite(numbers))


def held(now: float, group: str, verdict: Verdict) -> Event:
    """Tell why a group's ratio stays, or what it should be."""
    what: What = "advice" if verdict.hold == "advise" else "hold"
    text = verdict.reason
    if verdict.advice is not None and what == "advice":
        text = f"{verdict.advice.prefills}:{verdict.advice.decodes}: {text}"
    return Event(now, what, group, text[:1024], (), inputs(verdict))


def inputs(verdict: Verdict) -> dict[str, float]:
    """Return what a verdict was made from."""
    seen, advice = verdict.seen, verdict.advice
    if seen is None or advice is None:
        return {}
    prefill_rate, decode_rate = advice.rates or (math.nan, math.nan)
    return _finite(
        {
            "prefills": seen.prefills,
            "decodes": seen.decodes,
            "target_prefills": advice.prefills,
            "prefill_rate": prefill_rate,
            "decode_rate": decode_rate,
            "gain": advice.gain,
            "noise": seen.noise,
            "prefill_completed": seen.prefill_work.completed,
            "decode_completed": seen.decode_work.completed,
            "waiting": seen.waiting,
            "leased": seen.leased,
            "oldest_s": seen.oldest_s,
            "limit_s": seen.limit_s,
        }
    )


def _end(now: float, transaction: Transaction) -> Event:
    """Tell how a transaction ended; of a substitution, how long each stage took."""
    ends = [move.step for move in transaction.moves]
    numbers = {
        "done": float(ends.count(Step.DONE)),
        "back": float(ends.count(Step.BACK)),
        "abandoned": float(ends.count(Step.ABANDONED)),
        "seconds": max(0.0, now - transaction.began),
    }
    if transaction.kind is Kind.SUBSTITUTE:
        took = transaction.moves[0].took
        numbers |= {
            "detect_s": transaction.declared - transaction.failed,
            "decide_s": transaction.began - transaction.declared,
            "start_s": took.get("start", 0.0),
            "join_s": took.get("change", 0.0) + took.get("drain", 0.0),
        }
    text = f"{transaction.kind.value}: {numbers['done']:.0f} of {len(ends)} done"
    names = tuple(move.instance for move in transaction.moves)
    return Event(now, "end", transaction.group, text, names, numbers)


def _finite(numbers: dict[str, float]) -> dict[str, float]:
    """Leave out what JSON cannot express."""
    return {name: round(value, 6) for name, value in numbers.items() if math.isfinite(value)}
