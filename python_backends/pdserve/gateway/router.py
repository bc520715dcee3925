"""The choice of a scenario for a request, and of one of the scenario's groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from pdserve import config, errors
from pdserve.observability import catalogue
from pdserve.observability.metrics import Registry


class Servable(Protocol):
    """The part of a group that the router needs."""

    @property
    def healthy(self) -> bool:
        """True if the group has a prefill and a decode that have not failed."""


G = TypeVar("G", bound=Servable)


@dataclass(slots=True, frozen=True)
class Asked:
    """The properties of a request that decide its scenario."""

    label: str
    """Label of the scenario; empty: none is given."""
    tenant: str
    model: str
    """The Triton model that was called."""
    beginning: str
    """Beginning of the prompt's text; empty for token ids."""

    def meets(self, rule: config.Rule) -> bool:
        return (
            (rule.prefix is None or self.beginning.startswith(rule.prefix))
            and rule.tenant in (None, self.tenant)
            and rule.model in (None, self.model)
        )


class Scenario(Generic[G]):
    """A scenario's settings, and its groups, chosen in turn.

    The turn is a smooth weighted round robin: with every request, each group's credit grows by its
    share, and the group with the most credit goes next and pays the sum of the shares. Shares of 2,
    1 and 1 give a b c a, not a a b c.
    """

    def __init__(self, terms: config.Scenario, groups: Mapping[str, G]) -> None:
        self.terms = terms
        self._groups = [(one.share, groups[one.name]) for one in terms.groups if one.share]
        self._credits = [0.0] * len(self._groups)

    def next_group(self) -> G:
        """Return the group whose turn it is; a failed group is skipped unless all have failed."""
        alive = [i for i, (_, group) in enumerate(self._groups) if group.healthy]
        turns = alive or range(len(self._groups))
        for i in turns:
            self._credits[i] += self._groups[i][0]
        first = max(turns, key=self._credits.__getitem__)
        self._credits[first] -= sum(self._groups[i][0] for i in turns)
        return self._groups[first][1]


class Router(Generic[G]):
    """The scenarios of a deployment.

    Args:
        groups: every group by its name.
        default: name of the scenario of requests that carry no label and match no rule.
        strict: refuse an unknown label; otherwise it means the default scenario.
    """

    def __init__(
        self,
        scenarios: Sequence[config.Scenario],
        groups: Mapping[str, G],
        default: str,
        strict: bool,
        metrics: Registry,
    ) -> None:
        self._scenarios = {terms.name: Scenario(terms, groups) for terms in scenarios}
        self._rules = [(rule, terms.name) for terms in scenarios for rule in terms.rules]
        self._strict = strict
        self._metrics = metrics
        self.default = self._scenarios[default]

    def scenario(self, asked: Asked) -> Scenario[G]:
        """Return a request's scenario: by its label, its first matching rule, or the default.

        Raises:
            NotFound: no scenario has that label, and the deployment is strict.
        """
        if asked.label:
            return self._labelled(asked.label)
        for rule, name in self._rules:
            if asked.meets(rule):
                return self._scenarios[name]
        return self.default

    def _labelled(self, label: str) -> Scenario[G]:
        scenario = self._scenarios.get(label)
        if scenario is not None:
            return scenario
        if self._strict:
            known = ", ".join(self._scenarios)
            raise errors.NotFound(f"scenario: {label!r} is unknown; there are: {known}")
        self._metrics.add(catalogue.UNKNOWN_SCENARIO_REQUESTS, 1)
        return self.default
