"""Why a group's ratio is left as it is, whatever the load."""

from __future__ import annotations

from pdserve.control.cluster import Cluster, Group, Member
from pdserve.control.memory import GroupMemory
from pdserve.control.window import WINDOW_S

COOLDOWN_S = WINDOW_S
"""Time after a change in which the ratio stays: the window has then seen nothing of before."""
COVERED = 0.75
"""Part of its time that a window has to cover."""
STALE_S = WINDOW_S / 4
"""Age at which the last sample tells nothing of now."""


def disturbed(group: Group, members: list[Member]) -> tuple[str, str] | None:
    """Return why a group is not to be touched at all."""
    if group.share == 0:
        return "out", "the group is out"
    if group.rollout or len({one.desired.assignment.key for one in members if one.desired}) > 1:
        return "rollout", "a rollout is under way"
    missing = [one.name for one in members if not one.serving]
    if missing:
        return "failed", f"{', '.join(missing[:8])} does not serve"
    if not {"prefill", "decode"} <= {one.role for one in members}:
        return "empty", "a role is empty"
    return None


def unready(cluster: Cluster, memory: GroupMemory) -> tuple[str, str] | None:
    """Return why what was observed does not suffice."""
    window = memory.window
    if memory.changed_at is not None and cluster.now - memory.changed_at < COOLDOWN_S:
        return "cooldown", f"it was changed less than {COOLDOWN_S:g} s ago"
    if window.last is None or cluster.now - window.last.at > STALE_S:
        return "unknown", "there is no recent sample"
    if window.unknown:
        return "unknown", f"{', '.join(window.unknown[:8])} did not answer, or stands still"
    if window.seconds < COVERED * WINDOW_S:
        return "window", f"its window covers less than {COVERED * WINDOW_S:g} s"
    return None
