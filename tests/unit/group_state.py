"""What a group of a gateway is and knows, to be compared with another one's."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pdserve.gateway.groups import Group


def known(group: Group) -> set[str]:
    """Return the instances that the directory believes to have prefixes."""
    made = group._scheduler
    return {
        name
        for stage in (made._prefill_stage, made._decode_stage)
        for holders in stage._prefixes._holders.values()
        for name, life in holders.items()
        if life == stage._prefixes._lives.get(name, 0)
    }


def state(group: Group) -> object:
    """Return all state that a group built at once would have, too."""
    made = group._scheduler
    rooms = made._decode_stage._rooms
    return (
        {one.name for one in made.prefills.instances},
        {one.name for one in made.decodes.instances},
        {one.name for one in rooms._members},
        set(made._kv_links.table._refused.known),
        rooms._at_once,
        set(made._kv_links.table._links.known),
        made._kv_links.table.avoided,
        set(made._prefill_stage._members.values()) == set(made.prefills.instances),
        [
            (len(line), len(line._watching), len(list(line.candidates.busy)))
            for line in (made.prefills, made.decodes)
        ],
        [
            (one.load.open, one.load.offers, one.load.tokens, one.load.computed)
            for one in made.prefills.instances
        ],
        [(one.load.open, one.room.slots, one.room.blocks) for one in made.decodes.instances],
    )
