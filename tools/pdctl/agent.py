"""``python -m pdctl.agent RUN``: the node agent, which watches the servers of a run folder.

It takes up every server for which watchers.py asks, and lets go of those for which it does not any
more. Started by pdctl, it ends when there is none; else it stays, as a service of the host.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from pdctl import agents, private, server_logs, watchers
from pdctl.errors import ServerError
from pdctl.host_control import HostControl
from pdctl.watch import watch
from pdctl.watched_server import WatchedServer
from pdserve.errors import DeploymentError
from pdserve.node.backoff import Backoff
from pdserve.node.watchdog import Dismissed

LOOK_S = 0.1
"""Seconds between two looks at which servers are to be watched."""
THREADS = 256
"""Threads for calls that block, which are started as they are needed. A restart takes one for
minutes, and must not keep another server's from beginning."""

_log = logging.getLogger(__name__)


class Agent:
    """Watches servers, each in a task of its own; a fault of one task does not reach the others.

    Args:
        run: the folder of the servers' folders.
        stays: whether it goes on with nothing to watch.
    """

    def __init__(self, run: Path, *, stays: bool) -> None:
        self._run = run
        self._stays = stays
        self._tasks: dict[Path, asyncio.Task[None]] = {}
        self._controls: dict[str, HostControl] = {}
        self._following: list[asyncio.Task[None]] = []

    async def run(self) -> None:
        """Watch until there is nothing to watch."""
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(THREADS, "agent"))
        troubled = ""
        while True:
            try:
                self._take_up()
                troubled = ""
                if not (self._tasks or self._stays or any(watchers.wanted(self._run))):
                    return
            except OSError as error:  # no more open files, for example
                if troubled != (troubled := repr(error)):
                    _log.warning("it cannot look for servers: %s", troubled)
            await asyncio.sleep(LOOK_S)

    def _take_up(self) -> None:
        """Begin to watch the servers that are to be watched and are not yet."""
        for folder in watchers.wanted(self._run, but=self._tasks):
            task = asyncio.create_task(self._tend(folder))
            self._tasks[folder] = task
            task.add_done_callback(partial(self._left, folder))

    def _left(self, folder: Path, _: asyncio.Task[None]) -> None:
        del self._tasks[folder]

    async def _tend(self, folder: Path) -> None:
        """Watch a server as long as that is asked for."""
        backoff = Backoff()
        with server_logs.of_server(folder):
            while True:
                try:
                    await self._watched(folder)
                    return
                except (ServerError, DeploymentError) as error:
                    _log.error("%s", error)
                except Exception:
                    _log.exception("the watchdog itself has failed")
                now = asyncio.get_running_loop().time()
                backoff.ended(now)
                await asyncio.sleep(max(LOOK_S, backoff.pause(now)))
                if folder not in set(watchers.wanted(self._run)):
                    return

    async def _watched(self, folder: Path) -> None:
        """Watch a server until it is stopped, or is not to be watched any more.

        Raises:
            ServerError, DeploymentError: it cannot be watched.
        """
        watched = WatchedServer(folder)
        with watchers.held(folder) as hold:
            if hold is None:
                return  # another agent watches it, or a command has just asked who does
            watching = asyncio.create_task(watch(watched, self._control(watched)))
            try:
                while not (await asyncio.wait([watching], timeout=LOOK_S))[0]:
                    if not hold.wanted():
                        _log.info("ends: it is not to be watched any more")
                        return
                await watching
            except Dismissed as error:
                _log.info("ends: %s", error)
            finally:
                watching.cancel()
                await asyncio.gather(watching, return_exceptions=True)

    def _control(self, watched: WatchedServer) -> HostControl | None:
        """Return what is desired of a server's instances; None: its deployment is static."""
        control = watched.deployment.control
        if control is None:
            return None
        if control.id not in self._controls:
            made = self._controls[control.id] = HostControl(control, self._run, watched.key)
            self._following.append(asyncio.create_task(made.run()))
        return self._controls[control.id]


def main() -> None:
    os.umask(private.UMASK)
    run = Path(sys.argv[1]).resolve()
    server_logs.begin()
    # Children of the agent are no agents; its own environment stays visible to others.
    stays = os.environ.pop(agents.MARK, None) is None
    status = 0
    try:
        if len(sys.argv) == 2:  # else the one who has started it has locked the folder
            agents.locked(run)
        asyncio.new_event_loop().run_until_complete(Agent(run, stays=stays).run())
    except (ServerError, OSError) as error:
        _log.error("%s", error)
        status = 1
    except KeyboardInterrupt:
        status = 130
    except Exception:
        _log.exception("the agent has failed")
        status = 1
    logging.shutdown()
    os._exit(status)  # threads that still wait for a server do not keep it


if __name__ == "__main__":
    main()
