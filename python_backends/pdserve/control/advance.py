"""A transaction's next state: each of its moves goes on as far as what it waits for has come."""

from __future__ import annotations

from dataclasses import dataclass

from msgspec import Struct
from msgspec.structs import replace

from pdserve.control.cluster import Cluster, Group
from pdserve.control.loss import loss
from pdserve.control.moves import Around, following
from pdserve.control.policy import Policy
from pdserve.control.records import (
    DESIRED_GROUPS,
    DESIRED_INSTANCES,
    LENT,
    DesiredGroup,
    DesiredInstance,
    Lent,
)
from pdserve.control.transaction import Kind, Move, Step, Transaction

Writes = dict[str, Struct | None]
"""Records by key; None: the key is deleted."""


@dataclass(frozen=True, slots=True)
class Advanced:
    """A transaction after the steps that were due."""

    transaction: Transaction
    writes: Writes
    """Desired states, loans and shares that belong to its steps; the transaction itself apart."""
    stepped: tuple[tuple[Move, Move], ...]
    """Each move that went on, as it was and as it is."""


def advance(transaction: Transaction, cluster: Cluster, policy: Policy, room: int) -> Advanced:
    """Return the transaction after all steps that are due.

    Args:
        room: writes that it may need at most; moves that need more go on in the next tick.
    """
    group = cluster.groups.get(transaction.group)
    around = Around(
        now=cluster.now,
        policy=policy,
        hidden=_hidden(group),
        recall=_recall(transaction, cluster, policy),
    )
    writes: Writes = {}
    moves: list[Move] = []
    stepped: list[tuple[Move, Move]] = []
    for move in transaction.moves:
        then = (
            None if move.step.over else following(move, cluster.members.get(move.instance), around)
        )
        if then is None or len(writes) + MOVE_WRITES > room:
            # By the clock of another controller the step may lie ahead; its time begins now.
            moves.append(replace(move, since=min(move.since, cluster.now)))
            continue
        seconds = max(0.0, cluster.now - move.since)
        after = replace(
            move,
            step=then.step,
            since=cluster.now,
            took=move.took | {move.step.value: round(seconds, 3)},
            reason=then.reason[:512] or move.reason,
        )
        if then.desired is not None:
            writes[DESIRED_INSTANCES + move.instance] = then.desired
        if then.step is Step.DONE:
            writes.update(_done(transaction, move))
        moves.append(after)
        stepped.append((move, after))
    changed = replace(transaction, moves=tuple(moves))
    if changed.over:
        writes.update(_ended(changed, cluster))
    return Advanced(changed, writes, tuple(stepped))


MOVE_WRITES = 2
"""Writes that one step of a move can need: the instance's desired state, and its loan."""


def _hidden(group: Group | None) -> bool:
    """Tell whether nothing waits for a group; what is unknown may wait."""
    if group is None:
        return True
    if group.load is None:
        return False
    lines = group.load.gateways.values()
    return all(line is not None and line.waiting == line.waiting_decode == 0 for line in lines)


def _recall(transaction: Transaction, cluster: Cluster, policy: Policy) -> str:
    """Return why members that drain for another ratio should serve again.

    When a member is lost meanwhile, the ratio was decided upon for another group.
    """
    if transaction.kind not in (Kind.RATIO, Kind.PIN):
        return ""
    for member in cluster.of(transaction.group):
        lost = loss(member, cluster.now, policy)
        if lost is not None and lost.declared >= transaction.began:
            return f"{member.name} is lost"
    return ""


def _done(transaction: Transaction, move: Move) -> Writes:
    """Return what is written of a loan when an instance has gone, or has come back."""
    if transaction.kind is Kind.IN:
        return {LENT + move.instance: None}
    role = move.was.assignment.role
    if transaction.kind is not Kind.OUT or role == "none":
        return {}
    share = transaction.share if transaction.whole else 0.0
    return {LENT + move.instance: Lent(transaction.group, transaction.pool, role, share)}


def _ended(transaction: Transaction, cluster: Cluster) -> Writes:
    """Return what is written when all moves are over."""
    done = [move for move in transaction.moves if move.step is Step.DONE]
    group = cluster.groups.get(transaction.group)
    writes: Writes = {}
    if transaction.kind is Kind.SUBSTITUTE and done:
        lost = cluster.members.get(transaction.lost)
        if lost is not None and lost.desired is not None:
            writes[DESIRED_INSTANCES + lost.name] = _spare(lost.number + 1, done[0], lost.desired)
    if (
        transaction.whole
        and group is not None
        and (done if transaction.kind is Kind.IN else not done)
    ):
        # A group that has come back is published; so is one of which nothing has left.
        record = DesiredGroup(group.scenario, transaction.share)
        writes[DESIRED_GROUPS + group.name] = record
    return writes


def _spare(number: int, move: Move, lost: DesiredInstance) -> DesiredInstance:
    """Return what is desired of a member that was replaced: it becomes what the spare was.

    So the deployment has as many loaded instances as before.
    """
    assignment = replace(move.was.assignment, number=number, key=lost.assignment.key)
    return replace(move.was, assignment=assignment)
