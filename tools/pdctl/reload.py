"""Gives running servers another deployment; what they cannot apply waits for their restart."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import msgspec

from pdctl import private
from pdctl.errors import ServerError
from pdctl.server import Server
from pdctl.status import scrape
from pdserve import config
from pdserve.config.reloading import changes, taken_over

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
        self.taken = changes(self.before, self._after)
        self.waiting = changes(self._after, server.deployment)
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
        missing = set(_GATEWAYS if self.server.spec.gateway and self.taken else ())
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


def plan(servers: Sequence[Server], reloads: Sequence[Reload]) -> Iterator[str]:
    """Return in lines what will change, and what will not."""
    if not any(one.taken or one.waiting for one in reloads):
        yield "nothing changes in the running servers"
    yield from _alike("taken over by", {one.name: one.taken for one in reloads})
    yield from _alike("waits for a restart of", {one.name: one.waiting for one in reloads})
    for one in reloads:
        if any(line.startswith(f"servers.{one.name}.") for line in one.taken):
            yield f"{one.name} has to be restarted, since its own ports or instances change"
    running = {one.name for one in reloads}
    for server in servers:
        if server.spec.name not in running:
            yield f"{server.spec.name} does not run on this machine"
    for name, pid in _left_behind(reloads).items():
        yield f"{name} is not in the deployment any more, and runs on (process {pid})"


def _alike(what: str, lines: Mapping[str, list[str]]) -> Iterator[str]:
    """Merge the lines of all servers that have the same."""
    servers = defaultdict(list)
    for name, own in lines.items():
        servers[tuple(own)].append(name)
    for alike, names in servers.items():
        if alike:
            yield f"{what} {', '.join(names)}:"
            yield from (f"  {line}" for line in alike)


def _left_behind(reloads: Sequence[Reload]) -> dict[str, int]:
    """Return running servers that the deployment no longer has, with their process."""
    found = {}
    for one in reloads:
        wanted = {spec.name for spec in one.server.deployment.servers}
        for spec in one.before.servers:
            left = Server(one.before, spec, one.server.folder.parent)
            left.file = one.server.file
            if spec.name not in wanted and left.pid is not None and not left.foreign:
                found[spec.name] = left.pid
    return found
