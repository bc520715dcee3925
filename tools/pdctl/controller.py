"""``python -m pdctl.controller FOLDER``: the controller with that folder, see controllers.py.

It needs only the folder, from which it reads the deployment. Its own metrics are at
``http://127.0.0.1:PORT/metrics``, with the port of the deployment's ``control.metrics_port``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

from pdctl import controllers, private
from pdctl.reaching import Reaching
from pdctl.signals import ENDING
from pdserve.config import Deployment
from pdserve.config.reloading import DeploymentFile, taken_over
from pdserve.control import stores
from pdserve.control.controller import Controller
from pdserve.control.records import Identity
from pdserve.control.scrape import scrape
from pdserve.control.store.errors import StoreError
from pdserve.control.store.protocol import Store
from pdserve.errors import DeploymentError
from pdserve.observability.exposition import Exposition
from pdserve.observability.metrics import Registry
from pdserve.transfer import key

RETRY_S = 1.0
"""Pause before a store that cannot be reached is asked again whose it is, in seconds."""

_log = logging.getLogger(__name__)


class Followed:
    """The deployment in a controller's folder, as the last reload has left it."""

    def __init__(self, folder: Path) -> None:
        """Raises DeploymentError: it cannot be read, or has no section ``control``."""
        self._file = DeploymentFile(folder / "deployment.yaml")
        self._taken = self._file.deployment
        if self._taken.control is None:
            raise DeploymentError(f"{folder / 'deployment.yaml'}: it has no section control")

    def __call__(self) -> Deployment:
        try:
            if self._file.changed():
                self._taken = taken_over(self._taken, self._file.deployment)
                _log.info("another deployment has been taken over")
        except DeploymentError as error:
            _log.error("refused, the old one stays: %s", error)
        return self._taken


async def control(folder: Path) -> None:
    """Be a controller until cancelled.

    Raises:
        DeploymentError: the deployment cannot be read, or the store is another one's.
        StoreError: the store's file cannot be opened.
    """
    deployment = Followed(folder)
    section = deployment().control
    assert section is not None
    secret = key.make(Path(deployment().transfer.key_file))
    store = await stores.opened(section, folder.parent)
    metrics = Registry()
    name = f"{socket.gethostname()}/{os.getpid()}"
    probe = Reaching(secret)
    controller = Controller(store, name, deployment, scrape, probe, metrics)
    page = Exposition(metrics)

    def shown() -> str:
        controller.show()
        return page.page()

    server = await _serving(shown, section.metrics_port)
    try:
        await _claimed(store, stores.identity(section, secret))
        controllers.begun()
        _log.info("begins (process %d)", os.getpid())
        await controller.run()
    finally:
        if server is not None:
            server.close()
        with contextlib.suppress(StoreError):
            await store.close()  # another one can lead at once


async def _claimed(store: Store, own: Identity) -> None:
    """Return when the store is known to be this deployment's. Raises DeploymentError: it is not."""
    said = ""
    while True:
        try:
            await stores.claim(store, own)
        except StoreError as error:
            if said != (said := str(error)):
                _log.warning("%s", said)
            controllers.begun()  # it waits for its store, and whoever has started it need not
            await asyncio.sleep(RETRY_S)
        else:
            return


async def _serving(page: Callable[[], str], port: int) -> asyncio.Server | None:
    """Serve a page on loopback; None: the port is taken, and it does without."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.TimeoutError):
            await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), controllers.END_S)
            text = page().encode()
            head = (
                "HTTP/1.0 200 OK\r\nContent-Type: text/plain; version=0.0.4\r\n"
                f"Content-Length: {len(text)}\r\n\r\n"
            )
            writer.write(head.encode() + text)
            await writer.drain()
        writer.close()

    try:
        return await asyncio.start_server(answer, "127.0.0.1", port)
    except OSError as error:
        _log.warning("no metrics at port %d: %s", port, error)
        return None


async def _until_told(folder: Path) -> None:
    """Run until told to end by a signal, or until whoever holds it has ended."""
    loop = asyncio.get_running_loop()
    told = asyncio.Event()
    for number in ENDING:
        loop.add_signal_handler(number, told.set)
    if os.environ.pop(controllers.HELD, None):
        loop.add_reader(sys.stdin.fileno(), told.set)
    working = asyncio.ensure_future(control(folder))
    ending = asyncio.ensure_future(told.wait())
    await asyncio.wait({working, ending}, return_when=asyncio.FIRST_COMPLETED)
    ending.cancel()
    if not working.done():
        working.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await working


def run(folder: Path) -> None:
    """Be the controller with this folder until told to end. Raises: as `control`."""
    form = logging.Formatter("%(asctime)s controller: %(message)s")
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    with contextlib.suppress(OSError):  # it works without a log
        handlers.append(logging.FileHandler(folder / "controller.log"))
    for handler in handlers:
        handler.setFormatter(form)
        logging.getLogger().addHandler(handler)
    logging.getLogger().setLevel(logging.INFO)
    asyncio.run(_until_told(folder))


def main() -> None:
    os.umask(private.UMASK)
    try:
        run(Path(sys.argv[1]))
    except (StoreError, DeploymentError) as error:
        _log.error("%s", error)
        sys.exit(1)
    except Exception:
        _log.exception("the controller itself has failed")
        raise


if __name__ == "__main__":
    main()
