"""What a gateway knows of the KV links of a group, and which of them it plans."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence

from pdserve.rpc.messages import Connected
from pdserve.scheduling.link_plan import PEERS, Ring
from pdserve.scheduling.pairs import Pair, Pairs


class LinkTable:
    """The links between the prefills and the decodes of a group, by the names of the two.

    Each planned link is *made* or *refused* sooner or later; the refusal of a decode that is asked
    again, and can connect now, is forgotten.
    """

    def __init__(self, prefills: Sequence[str], decodes: Sequence[str]) -> None:
        self._links = Pairs[tuple[bytes, Connected]]()
        """The links that have been made, each with the endpoint that it leads to."""
        self._refused = Pairs[str]()
        self._joining: set[str] = set()
        self.avoided: frozenset[str] = frozenset()
        """Instances that are offered nothing: prefills that no decode could connect to, and those
        whose planned links are not settled yet since they have joined; none where that would leave
        no other of the role."""
        self._place(prefills, decodes)

    def __len__(self) -> int:
        """Return the number of links that have been made."""
        return len(self._links)

    # --------------------------------------------------------------- membership

    def update(self, prefills: Sequence[str], decodes: Sequence[str], new: Iterable[str]) -> None:
        """Replace the instances; what is known of those that have left is kept.

        Args:
            new: those that have joined, whose links are to be settled before they are used.
        """
        self._joining.update(new)
        self._joining.intersection_update((*prefills, *decodes))
        self._place(prefills, decodes)

    def _place(self, prefills: Sequence[str], decodes: Sequence[str]) -> None:
        self._prefills, self._decodes = dict.fromkeys(prefills), dict.fromkeys(decodes)
        self._ring = Ring(decodes)
        ring = Ring(prefills)
        self._chosen = defaultdict[str, list[str]](list)
        """For each prefill, the decodes that have chosen it."""
        for decode in decodes:
            for name in itertools.islice(ring.after(decode), PEERS):
                self._chosen[name].append(decode)
        self.dense = len(prefills) <= PEERS and len(decodes) <= PEERS
        """True if all pairs are planned to be linked."""
        self._planned = {name: self._plan(name) for name in prefills}
        self._unreached = {name for name in prefills if self._is_unreached(name)}
        self._find_avoided()

    def joined(self, name: str) -> None:
        """Use an instance that has joined, whether or not its links are settled."""
        self._joining.discard(name)
        self._find_avoided()

    def drop(self, name: str) -> None:
        """Forget all that is known of an instance."""
        self._links.drop(name)
        self._refused.drop(name)

    # --------------------------------------------------------------------- plan

    def _plan(self, prefill: str) -> dict[str, None]:
        """Return the decodes to link to a prefill: those that chose it, and PEERS that reach it."""
        planned = dict.fromkeys(self._chosen[prefill])
        reach = 0
        for name in self._ring.after(prefill):
            planned[name] = None
            reach += (prefill, name) not in self._refused.known
            if reach == PEERS:
                break
        return planned

    def planned(self, prefill: str) -> Collection[str]:
        """Return the decodes that are to be linked to a prefill."""
        return self._planned.get(prefill, ())

    def pairs(self) -> Iterator[Pair]:
        """Yield the pairs that are planned to be linked."""
        return ((one, other) for one, others in self._planned.items() for other in others)

    def settled(self, pair: Pair) -> bool:
        """Tell whether the link of a pair has been made or refused."""
        return pair in self._links.known or pair in self._refused.known

    def counts(self) -> dict[str, int]:
        """Return the number of planned pairs that are connected, refused, or neither."""
        connected = sum(pair in self._links.known for pair in self.pairs())
        refused = sum(pair in self._refused.known for pair in self.pairs())
        unknown = sum(map(len, self._planned.values())) - connected - refused
        return {"connected": connected, "refused": refused, "unknown": unknown}

    # ------------------------------------------------------------ what is learned

    def made(self, pair: Pair, endpoint: bytes, connected: Connected) -> None:
        """Note that a pair is linked."""
        self._links[pair] = endpoint, connected
        if self._refused.pop(pair):
            self._reach_changed(pair[0])
        self._settle(pair)

    def refuse(self, pair: Pair, reason: str) -> bool:
        """Note that a decode cannot connect to a prefill; return whether the reason is new."""
        new = self._refused.known.get(pair) != reason
        self._refused[pair] = reason
        self._reach_changed(pair[0])
        self._settle(pair)
        return new

    def lost(self, pair: Pair) -> None:
        """Note that a link must be made again."""
        self._links.pop(pair)

    def lost_all(self, name: str) -> None:
        """Note that all links of an instance must be made again."""
        self._links.drop(name)

    def _reach_changed(self, prefill: str) -> None:
        if prefill in self._prefills:
            self._planned[prefill] = self._plan(prefill)
            unreached = self._is_unreached(prefill)
            (self._unreached.add if unreached else self._unreached.discard)(prefill)
            self._find_avoided()

    def _is_unreached(self, prefill: str) -> bool:
        refused = self._refused.others(prefill)
        return len(refused) >= len(self._decodes) and all(map(refused.__contains__, self._decodes))

    def _settle(self, pair: Pair) -> None:
        for name in self._joining.intersection(pair):
            if all(map(self.settled, (other for other in self.pairs() if name in other))):
                self.joined(name)

    def _find_avoided(self) -> None:
        self.avoided = _avoided(self._prefills, self._unreached, self._joining) | _avoided(
            self._decodes, set(), self._joining
        )

    # -------------------------------------------------------------------- answers

    def endpoint(self, pair: Pair) -> bytes | None:
        """Return the endpoint that a pair's link leads to; None: it has no link."""
        found = self._links.known.get(pair)
        return None if found is None else found[0]

    def others(self, name: str) -> Collection[str]:
        """Return the instances that are linked to this one."""
        return self._links.others(name)

    def refusal(self, prefill: str, decode: str) -> str | None:
        """Return why the decode could not connect to the prefill last.

        None: it could, or never tried.
        """
        return self._refused.known.get((prefill, decode))

    def unreachable(self, prefill: str) -> dict[str, str]:
        """Return for each decode why it could not connect to the prefill.

        Empty: one could, or has not tried.
        """
        if not self._is_unreached(prefill):
            return {}
        return {name: self.refusal(prefill, name) or "" for name in self._decodes}

    def transfer_s(self, prefill: str, decode: str, tokens: int) -> float:
        """Return the estimated seconds of a transfer of ``tokens`` tokens.

        0: the pair has no link yet.
        """
        if (found := self._links.known.get((prefill, decode))) is None:
            return 0.0
        _, connected = found
        link = connected.link
        return link.latency_s + tokens * connected.bytes_per_token / link.bytes_per_s


def _avoided(every: Collection[str], useless: set[str], joining: set[str]) -> frozenset[str]:
    """Return those of one role that are useless or join, as long as that leaves others."""
    if len(useless) == len(every):
        useless = set()
    unready = useless.union(name for name in joining if name in every)
    return frozenset(useless if len(unready) == len(every) else unready)
