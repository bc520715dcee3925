"""The commands of the control plane: ``control``, ``groups``, ``events``, ``pin``, ``drain``."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import typer

from pdctl import controlled, controller, controllers, orders, paths
from pdctl.console import out
from pdctl.groups import groups, tables
from pdctl.options import File, Json
from pdserve.config import Deployment
from pdserve.control import event_log
from pdserve.control.events import Event
from pdserve.control.store.election import LEADER
from pdserve.control.store.errors import StoreError
from pdserve.control.store.protocol import Delete, Listing, Put, Store
from pdserve.control.stored import Stored, read

FOLLOW_S = 0.5
"""Interval at which new events are looked for, in seconds."""

T = TypeVar("T")
Order = Callable[[Deployment, Stored], Put | Delete]
Group = Annotated[str, typer.Argument(help="Name of a group.")]


def control_command(file: File = paths.DEPLOYMENT) -> None:
    """Be a controller until Ctrl-C, beside the one that `up` starts or on another host.

    The controllers of a deployment elect one that leads.
    """
    deployment = controlled.deployment_of(file)
    place = controllers.folder(deployment)
    if controllers.pid(place) is None:
        controllers.give(deployment)
    controller.run(place)


def groups_command(file: File = paths.DEPLOYMENT, as_json: Json = False) -> None:
    """Show what each group should be, what it is, and the last decision about it."""

    async def work(deployment: Deployment, store: Store) -> dict[str, Any]:
        listing = await store.list_prefix("")
        found = groups(deployment, read(listing), time.time())
        return {"leader": _leader(listing), **found}

    found = controlled.run(file, work)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    for table in tables(found):
        out.print(table)
    leader = found["leader"]
    out.print(f"{leader} leads" if leader else "no controller leads: nothing changes by itself")


def events_command(
    file: File = paths.DEPLOYMENT,
    follow: Annotated[bool, typer.Option("--follow", help="Wait for more, until Ctrl-C.")] = False,
    last: Annotated[
        int,
        typer.Option("--last", help="Show at most so many old ones.", min=0, max=event_log.KEPT),
    ] = 50,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one event a line.")] = False,
) -> None:
    """Show the decisions of the controllers, each with its inputs; the newest is last."""

    async def work(_: Deployment, store: Store) -> None:
        seen, most = 0, last
        while True:
            with _bearing(follow):
                listing = await store.list_prefix("events/")
                stored = event_log.decoded((one.key, one.value) for one in listing.entries)
                found = [one for one in stored if one[0] > seen]
                for number, event in found[max(0, len(found) - most) :]:
                    _show(number, event, as_json)
                seen, most = max([seen, *(number for number, _ in found)]), len(found) + 1000
            if not follow:
                return
            await asyncio.sleep(FOLLOW_S)

    controlled.run(file, work)


def pin_command(
    group: Group,
    ratio: Annotated[
        str | None, typer.Argument(help="PREFILLS:DECODES, such as 7:6.", metavar="P:D")
    ] = None,
    file: File = paths.DEPLOYMENT,
    unpin: Annotated[bool, typer.Option("--unpin", help="Let its load decide again.")] = False,
) -> None:
    """Give a group a ratio of prefills and decodes, and keep it there, whatever its load."""
    if (ratio is None) != unpin:
        raise typer.BadParameter("give either a ratio, such as 7:6, or --unpin")
    if ratio is None:
        _order(file, lambda _, stored: orders.unpin(stored, group))
        out.print(f"{group} is not pinned any more: its load decides")
        return
    wanted = ratio
    _order(file, lambda deployment, stored: orders.pin(deployment, stored, group, wanted))
    out.print(f"{group} is pinned to {wanted}: `pdctl groups` shows when it is there")


def drain_command(
    instance: Annotated[str, typer.Argument(help="Name of an instance.")],
    file: File = paths.DEPLOYMENT,
    undo: Annotated[bool, typer.Option("--undo", help="Let it serve again.")] = False,
) -> None:
    """Take an instance out of service, in good order, and keep it out until this is undone."""
    if undo:
        _order(file, lambda _, stored: orders.undrain(stored, instance))
        out.print(f"{instance} serves again as soon as the controller has seen it")
    else:
        _order(file, lambda deployment, _: orders.drain(deployment, instance))
        out.print(f"{instance} will be drained: `pdctl groups` shows when it holds nothing")


def add_to(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    for name, command in (
        ("groups", groups_command),
        ("events", events_command),
        ("pin", pin_command),
        ("drain", drain_command),
        ("control", control_command),
    ):
        app.command(name)(command)


def _order(file: Path, order: Order) -> None:
    async def work(deployment: Deployment, store: Store) -> None:
        stored = read(await store.list_prefix(""))
        await store.transact((), (order(deployment, stored),))

    controlled.run(file, work)


def _leader(listing: Listing) -> str:
    values = {entry.key: entry.value for entry in listing.entries}
    return values.get(LEADER, b"").decode(errors="replace")


@contextlib.contextmanager
def _bearing(errors: bool) -> Any:
    """Go on after an error of the store, if wanted."""
    try:
        yield
    except StoreError as error:
        if not errors:
            raise
        out.print(f"{error}", markup=False)


def _show(number: int, event: Event, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"number": number, **msgspec.to_builtins(event)}), flush=True)
        return
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.at))
    inputs = ", ".join(f"{name} {value:.4g}" for name, value in event.numbers.items())
    whose = f" {', '.join(event.instances)}" if event.instances else ""
    line = f"{when} {event.what:7} {event.group or '-'}{whose}: {event.text}"
    out.print(line + (f" ({inputs})" if inputs else ""), markup=False, soft_wrap=True)
