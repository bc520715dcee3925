"""The controller and the store of a deployment, as the commands start, ask and stop them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from pdctl import controllers, paths
from pdctl.console import out
from pdctl.errors import ServerError
from pdserve import config
from pdserve.config import Deployment
from pdserve.control import stores
from pdserve.control.store.errors import StoreError
from pdserve.control.store.protocol import Store
from pdserve.errors import DeploymentError
from pdserve.transfer import key


def check(deployment: Deployment) -> None:
    """Make sure that the store is this deployment's; without a section ``control`` there is none.

    A store that cannot be reached now is claimed later, by the controller.

    Raises:
        DeploymentError: it is another one's; the message names both.
    """
    section, file = deployment.control, Path(deployment.transfer.key_file)
    if section is None or not file.exists():
        return
    secret = key.load(file)

    async def work() -> None:
        store = await stores.opened(section, paths.RUN)
        try:
            await stores.claim(store, stores.identity(section, secret))
        finally:
            await store.close()

    try:
        asyncio.run(work())
    except StoreError as error:
        out.print(f"the control plane waits for its store: {error}", markup=False)


def begin(deployment: Deployment, *, held: bool) -> None:
    """Start the controller of this host, if the deployment has one.

    Raises:
        DeploymentError, ServerError: as `check` and `controllers.start`.
    """
    if deployment.control is not None:
        check(deployment)
        controllers.start(deployment, held=held)


def give(deployment: Deployment) -> None:
    """Give another deployment to the controller of this host, if there is one. Raises OSError."""
    if deployment.control is not None and controllers.folder(deployment).exists():
        controllers.give(deployment)


def end(deployment: Deployment) -> None:
    """End the controller of this host, if there is one. Raises ServerError: it does not end."""
    if deployment.control is not None and controllers.end(controllers.folder(deployment)):
        out.print("controller stopped")


def deployment_of(file: Path) -> Deployment:
    """Return a deployment with a section ``control``. Raises DeploymentError: it has none."""
    deployment = config.load(file)
    if deployment.control is None:
        raise DeploymentError(f"{file}: it has no section control, so there is no control plane")
    return deployment


def run(file: Path, work: Callable[[Deployment, Store], Any]) -> Any:
    """Do something with the store of a deployment; return what it returns.

    Raises:
        DeploymentError: the store is another one's, or has never been written.
        ServerError: it does not answer.
    """
    deployment = deployment_of(file)

    async def opened() -> Any:
        async with _opened(deployment) as store:
            return await work(deployment, store)

    try:
        return asyncio.run(opened())
    except StoreError as error:
        raise ServerError(str(error)) from error


@asynccontextmanager
async def _opened(deployment: Deployment) -> AsyncIterator[Store]:
    section = deployment.control
    assert section is not None
    if section.etcd is None and not stores.folder(section, paths.RUN).exists():
        raise DeploymentError(
            f"deployment {section.id} has no store on this host yet: `pdctl up` makes it"
        )
    store = await stores.opened(section, paths.RUN)
    try:
        secret = key.load(Path(deployment.transfer.key_file))
        await stores.claim(store, stores.identity(section, secret))
        yield store
    finally:
        with contextlib.suppress(StoreError):
            await store.close()
