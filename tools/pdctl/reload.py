"""Gives running servers another deployment; what they cannot apply waits for their restart."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import msgspec

from pdctl import fleet, private
from pdctl.errors import ServerError
from pdctl.server import Server
from pdctl.status import scrape
from pdserve import config
from pdserve.config.reloading import changes, taken_over
from pdserve.errors import DeploymentError

TIMEOUT_S = 10.0
_GATEWAYS = ("pdserve", "scheduler")


class Reload:
    """Takes one running server from its present deployment to another one.

    Raises:
        DeploymentError: the present deployment cannot be read.
    """

    def __init__(self, server: Server) -> None:
        self.server = server
        self.name = server.spec.name
        self._file = server.repository / "deployment.yaml"
        self.before = config.load(self._file)
        # What waits for a restart stays as it was, so that reloaded models agree with the others.
        self._after = taken_over(self.before, server.deployment)
        applied = changes(self.before, self._after)
        self._applies = bool(applied)
        # Gateways use the new values for this server, which keeps its own until a restart.
        self.own = [line for line in applied if line.startswith(f"servers.{self.name}.")]
        self.taken = [line for line in applied if line not in self.own]
        self.waiting = [*self.own, *changes(self._after, server.deployment)]
        self._counted: dict[str, float] = {}

    def begin(self) -> None:
        """Write it where the models look. Raises: ServerError: the server does not answer."""
        if self.server.spec.gateway:
            self._counted = self._count()
        new = self._file.with_name("deployment.new")
        private.write(new, msgspec.yaml.encode(self._after))
        new.replace(self._file)

    def wait(self) -> None:
        """Wait until every gateway of the server has applied it.

        Raises:
            ServerError: a gateway has refused it, or has not answered.
        """
        deadline = time.monotonic() + TIMEOUT_S
        missing = set(_GATEWAYS if self.server.spec.gateway and self._applies else ())
        while missing:
            time.sleep(0.2)
            for series, count in self._count().items():
                if count > self._counted.get(series, 0):
                    if 'outcome="refused"' in series:
                        raise ServerError(f"{self.name} has refused it: see {self.server.log}")
                    missing -= {name for name in missing if f'gateway="{name}"' in series}
            if missing and time.monotonic() > deadline:
                raise ServerError(
                    f"{self.name}: {', '.join(sorted(missing))} did not apply it within "
                    f"{TIMEOUT_S:g} s: see {self.server.log}"
                )

    def _count(self) -> dict[str, float]:
        try:
            series = scrape(self.server)
        except OSError as error:
            raise ServerError(f"server {self.name} does not answer: {error}") from error
        return {name: value for name, value in series.items() if "_reloads_total" in name}


def plan(servers: Sequence[Server], reloads: Sequence[Reload], *, check: bool) -> Iterator[str]:
    """Return in lines what will change, and what will not.

    Args:
        check: nothing is going to be reloaded.
    """
    if not reloads:
        yield "nothing to reload: no server runs"
    elif not any(one.taken or one.waiting for one in reloads):
        yield "nothing changes in the running servers"
    taken = "would be taken over by" if check else "taken over by"
    yield from _alike(taken, {one.name: one.taken for one in reloads})
    yield from _alike("waits for a restart of", {one.name: one.waiting for one in reloads})
    for one in reloads:
        if one.own:
            yield (
                f"{one.name} has to be restarted, since its own ports or instances change; "
                "gateways use the new ones from the reload on"
            )
    running = {one.name for one in reloads}
    for server in servers:
        if server.spec.name not in running:
            yield f"{server.spec.name} does not run on this machine"
    for left in fleet.left_behind(servers):
        name = left.spec.name
        yield (
            f"{name} is not in the deployment any more, and runs on (process {left.pid}): "
            f"`pdctl down --server {name}` stops it"
        )


def differing(server: Server) -> Iterator[str]:
    """Return in lines how a running server differs from its deployment; none: it does not."""
    try:
        one = Reload(server)
    except DeploymentError:  # it cannot be told, and it runs on as it is
        return
    lines = [*one.taken, *one.waiting]
    if lines:
        yield f"{one.name} has other values than {server.file}:"
        yield from (f"  {line}" for line in lines)
    if one.waiting:
        yield f"`pdctl down --server {one.name}` first: they take effect at its next start"
    elif lines:
        yield "`pdctl reload` applies them"


def _alike(what: str, lines: Mapping[str, list[str]]) -> Iterator[str]:
    """Merge the lines of all servers that have the same."""
    servers = defaultdict(list)
    for name, own in lines.items():
        servers[tuple(own)].append(name)
    for alike, names in servers.items():
        if alike:
            yield f"{what} {', '.join(names)}:"
            yield from (f"  {line}" for line in alike)
