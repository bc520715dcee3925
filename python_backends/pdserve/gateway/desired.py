"""Follows in the store what is desired of instances and groups, as long as there is a store.

Without one a gateway goes on with what it has, and learns of other assignments from the instances
themselves (``gateway/assignments``).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from msgspec import Struct

from pdserve.config import Control
from pdserve.control import records, stores
from pdserve.control.records import DesiredGroup, DesiredInstance
from pdserve.control.store.errors import StoreError
from pdserve.control.store.view import Difference, View
from pdserve.errors import DeploymentError

RETRY_S = 1.0
"""Pause before a store that could not be opened is tried again, in seconds."""

Take = Callable[[Mapping[str, DesiredInstance], Mapping[str, DesiredGroup]], None]

_log = logging.getLogger(__name__)


class Desired:
    """The desired state in the store.

    Args:
        run: the folder with the servers' folders.
        key: the deployment's key.
        take: called with all instances and groups whenever one has changed.
    """

    def __init__(self, control: Control, run: Path, key: bytes, take: Take) -> None:
        self._control = control
        self._run = run
        self._identity = stores.identity(control, key)
        self._take = take
        self._view: View[Struct] | None = None

    async def run(self) -> None:
        """Follow the store until cancelled; its errors are logged, and change nothing."""
        said = ""
        while True:
            try:
                await self._follow()
            except (StoreError, DeploymentError) as error:
                if said != (said := str(error)):
                    _log.warning("assignments come from instances alone: %s", said)
            await asyncio.sleep(RETRY_S)

    async def _follow(self) -> None:
        store = await stores.opened(self._control, self._run)
        try:
            await stores.claim(store, self._identity)
            self._view = View(store, records.DESIRED, _decode, self._told)
            await self._view.run()
        finally:
            await store.close()

    def _told(self, _: Difference) -> None:
        view = self._view
        assert view is not None
        # No lease ends these keys: the leader has deleted what is in no deployment any more. If the
        # store was emptied, what is known of instances stays all the same, by their numbers.
        for key in list(view.deleted):
            view.forget(key)
        instances, groups = {}, {}
        for key, record in view.values.items():
            if isinstance(record, DesiredInstance):
                instances[key.removeprefix(records.DESIRED_INSTANCES)] = record
            elif isinstance(record, DesiredGroup):
                groups[key.removeprefix(records.DESIRED_GROUPS)] = record
        self._take(instances, groups)


def _decode(key: str, data: bytes) -> Struct:
    """Return a record. Raises ValueError, msgspec.MsgspecError: it is none of the desired state."""
    if key.startswith(records.DESIRED_INSTANCES):
        return records.decode(data, DesiredInstance)
    if key.startswith(records.DESIRED_GROUPS):
        return records.decode(data, DesiredGroup)
    raise ValueError("no key of the desired state")
