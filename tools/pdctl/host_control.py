"""A run folder's part in the control plane of one deployment."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import socket
from collections.abc import Callable, Collection
from pathlib import Path

from pdserve.config import Control
from pdserve.control import stores
from pdserve.control.records import DesiredInstance, ObservedInstance
from pdserve.control.store.errors import StoreError
from pdserve.errors import DeploymentError
from pdserve.node.host_state import HostState

RETRY_S = 1.0
"""Pause before a store that could not be opened is tried again."""

_log = logging.getLogger(__name__)


def agent_name(run: Path) -> str:
    """Return the name of a run folder's agent in the store: that of its host, with a hash."""
    host = re.sub(r"[^A-Za-z0-9_-]", "-", socket.gethostname())[:64] or "host"
    return f"{host}.{hashlib.blake2b(str(run).encode(), digest_size=4).hexdigest()}"


class HostControl:
    """What is desired of the instances of a run folder in one deployment, and what is reported.

    Args:
        run: the folder of the servers' folders.
        key: key of the deployment.
    """

    def __init__(self, control: Control, run: Path, key: bytes) -> None:
        self.agent = agent_name(run)
        self._control = control
        self._run = run
        self._key = key
        self._state: HostState | None = None
        self._listeners: list[Callable[[str], None]] = []
        self._servers: dict[str, int] = {}

    async def run(self) -> None:
        """Follow the store until cancelled; while there is none, nothing is desired."""
        said = ""
        while True:
            try:
                store = await stores.opened(self._control, self._run)
                try:
                    await stores.claim(store, stores.identity(self._control, self._key))
                    self._state = HostState(store, self.agent, self._changed)
                    self._report_servers()
                    await self._state.run()
                finally:
                    await store.close()
            except (StoreError, DeploymentError) as error:
                if said != (said := str(error)):
                    _log.error("nothing is desired of this host: %s", said)
            await asyncio.sleep(RETRY_S)

    def listen(self, listener: Callable[[str], None]) -> Callable[[], None]:
        """Have it called with each instance of which something else is desired; returns the end."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def desired(self, name: str) -> DesiredInstance | None:
        return None if self._state is None else self._state.desired(name)

    def absent(self, name: str) -> bool:
        return self._state is not None and self._state.absent(name)

    def observe(self, name: str, seen: ObservedInstance) -> None:
        if self._state is not None:
            self._state.observe(name, seen)

    def watches(self, server: str, pid: int) -> None:
        """Report that the agent watches a server."""
        self._servers[server] = pid
        self._report_servers()

    def leaves(self, server: str) -> None:
        """Report that it does not any more."""
        self._servers.pop(server, None)
        self._report_servers()

    def _report_servers(self) -> None:
        if self._state is not None and self._servers:
            self._state.serve(next(iter(self._servers.values())), self._servers)

    def _changed(self, names: Collection[str]) -> None:
        for name in names:
            for listener in list(self._listeners):
                listener(name)
