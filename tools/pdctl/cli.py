"""The command line: ``pdctl --help`` lists the commands."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from pdctl import (
    control_commands,
    controlled,
    fleet,
    links,
    paths,
    private,
    probe,
    ratio,
    starting,
    watchers,
)
from pdctl.chat import Question, ask
from pdctl.console import err, out
from pdctl.doctor import examination
from pdctl.doctor.report import report
from pdctl.errors import ServerError
from pdctl.log import Following
from pdctl.options import File, Json, Only
from pdctl.output import Output
from pdctl.overview import page
from pdctl.reload import Reload, differing, plan
from pdctl.repository import models
from pdctl.server import Server
from pdctl.signals import Interrupted, interruptible
from pdctl.status import looked_after, scrape
from pdctl.status import status as status_of
from pdctl.timeline import timeline
from pdctl.wrap import Wrap
from pdserve import config
from pdserve.errors import DeploymentError

DEMO_PROMPT = "What is photosynthesis? Answer in one sentence."
"""The default model's greedy answer is one true sentence of 22 tokens, which it ends itself."""
DEMO_TOKENS = 96
NOT_READY = 3
"""Exit status of ``status``, ``links``, ``probe``, ``doctor`` when something is not in order."""

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="rich")

INT32, UINT64 = (1 << 31) - 1, (1 << 64) - 1
"""The largest numbers that the tensors of a request hold."""
DAY_S = 86400.0

Timeout = Annotated[
    float | None,
    typer.Option(
        help="Seconds until every model must be ready.",
        min=1,
        max=DAY_S,
        show_default="engine.load_s",
    ),
]
Watched = Annotated[
    bool,
    typer.Option("--watch/--no-watch", help="Watch the servers, and repair what fails in them."),
]
Window = Annotated[float, typer.Option(help="Seconds of load to look at.", min=5, max=3600)]
MaxTokens = Annotated[int, typer.Option(help="Maximum tokens of the answer.", min=1, max=INT32)]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"pdserve {metadata.version('pdserve')}")
        raise typer.Exit


@app.callback()
def pdctl(
    version: Annotated[
        bool, typer.Option("--version", help="Print it and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Start, stop, inspect and use the servers of a deployment.

    The server's log is .run/SERVER/log in the checkout, the watchdog's is .run/SERVER/watch.log.
    """


@app.command()
def up(
    file: File = paths.DEPLOYMENT, only: Only = None, timeout: Timeout = None, watch: Watched = True
) -> None:
    """Start the servers and leave them running."""
    servers = _servers(file, only)
    for server in servers:
        if (pid := server.pid) is not None:
            out.print(f"{server.spec.name} runs already (process {pid})")
            for line in differing(server):
                out.print(line, markup=False)
    deployment = servers[0].deployment
    controlled.check(deployment)
    starting.start(servers, keep=False, timeout=timeout)
    fleet.watch(servers, wanted=watch)
    controlled.begin(deployment, held=False)


@app.command()
def serve(
    file: File = paths.DEPLOYMENT, only: Only = None, timeout: Timeout = None, watch: Watched = True
) -> None:
    """Start the servers and stay until Ctrl-C; they end when this command ends."""
    found = _servers(file, only)
    deployment = found[0].deployment
    controlled.check(deployment)
    with starting.held(found, timeout) as servers:
        logs = [Following(server.folder / "watch.log") for server in servers]
        fleet.watch(servers, wanted=watch)
        controlled.begin(deployment, held=True)
        try:
            out.print("Ctrl-C ends it.")
            while True:
                for log in logs:
                    out.print(log.new(), end="", markup=False, highlight=False)
                for server in servers:
                    if not watchers.watched(server.folder) and server.pid is None:
                        server.check_alive()
                time.sleep(0.5)
        except Interrupted:
            out.print("stopping the servers ...")
            controlled.end(deployment)


@app.command()
def down(file: File = paths.DEPLOYMENT, only: Only = None) -> None:
    """Stop the servers, and remove their processes and shared memory."""
    servers = _servers(file, only, left=True)
    pids = {server.spec.name: server.pid for server in servers}
    if only is None:
        controlled.end(servers[0].deployment)
    fleet.stop(servers)
    for name, pid in pids.items():
        out.print(f"{name} " + (f"stopped (process {pid})" if pid else "was not running"))


@app.command()
def status(file: File = paths.DEPLOYMENT, only: Only = None, as_json: Json = False) -> None:
    """Show servers, models, ports and counters; exit status 3 unless all are ready and watched."""
    found = [status_of(server) for server in _servers(file, only, left=True)]
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        for entry in found:
            out.print(page(entry))
    if not all(entry["state"] == "ready" and looked_after(entry) for entry in found):
        raise typer.Exit(NOT_READY)


@app.command("links")
def links_command(file: File = paths.DEPLOYMENT, as_json: Json = False) -> None:
    """Show the transport of each pair of decode and prefill; exit status 3 if any has none."""
    pages, gone = [], set[str]()
    for server in _servers(file):
        answers = server.live()
        instances = (*server.spec.prefill, *server.spec.decode)
        gone |= {name for name in instances if not (answers and server.ready(name))}
        if server.spec.decode:
            try:
                pages.append(scrape(server))
            except OSError as error:
                err.print(f"{server.spec.name} does not answer: {error}")
    found = links.links(config.load(file), pages, gone)
    if as_json:
        print(json.dumps(links.rows(found), indent=2))
    else:
        out.print(links.table(found))
    if not all(link.transport for link in found):
        raise typer.Exit(NOT_READY)


@app.command("ratio")
def ratio_command(
    file: File = paths.DEPLOYMENT,
    window: Window = 60,
    as_json: Json = False,
) -> None:
    """Say which ratio of prefills and decodes each group should have by its load; change nothing.

    The instances of each role must complete 100 requests in the window.
    """
    servers = _servers(file)
    samples = []
    with out.status("looking at the load") as shown:
        for left in range(ratio.SAMPLES - 1, -1, -1):
            samples.append(ratio.Sample([_scraped(server) for server in servers]))
            between = window / (ratio.SAMPLES - 1)
            shown.update(f"looking at the load: {left * between:.0f} s more")
            time.sleep(between if left else 0)
    found = ratio.ratios(config.load(file), samples)
    if as_json:
        print(json.dumps([one.row() for one in found], indent=2))
    else:
        out.print(ratio.table(found))


def _scraped(server: Server) -> dict[str, float]:
    """Return a server's series.

    Raises:
        ServerError: it does not answer; its load is unknown then, and not zero.
    """
    try:
        return scrape(server)
    except OSError as error:
        raise ServerError(f"{server.spec.name}: its load is unknown: {error}") from error


@app.command("probe")
def probe_command(
    file: File = paths.DEPLOYMENT,
    only: Only = None,
    timeout: Annotated[
        float, typer.Option(help="Seconds until an answer.", min=0.1, max=DAY_S)
    ] = 10,
    as_json: Json = False,
) -> None:
    """Send a short request through each gateway; exit status 3 if any gives no answer."""
    found = probe.probe(_servers(file, only), timeout)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        for one in found:
            out.print(probe.line(one), markup=False)
    if not all(one["ok"] for one in found):
        raise typer.Exit(NOT_READY)


@app.command()
def doctor(file: File = paths.DEPLOYMENT, as_json: Json = False) -> None:
    """Show what this host can do and lacks; exit status 3 if it cannot serve the deployment."""
    found = examination.examine(file)
    if as_json:
        print(found.json)
    else:
        out.print(report(found.findings, found.conclusion, file.name), soft_wrap=False)
    if not found.conclusion.served:
        raise typer.Exit(NOT_READY)


@app.command()
def chat(
    prompt: Annotated[str, typer.Argument(help="Prompt; - reads it from standard input.")],
    file: File = paths.DEPLOYMENT,
    max_tokens: MaxTokens = 128,
    temperature: Annotated[
        float | None,
        typer.Option(help="Temperature of sampling; 0 or absent: greedy.", min=0, max=100),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Seed of sampling; the same seed gives the same answer.", min=0, max=UINT64
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    no_chat: Annotated[
        bool, typer.Option("--no-chat", help="Continue the text without a chat template.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Ask a running deployment; stream the answer, then print its timeline."""
    options: dict[str, tuple[str, Any]] = {
        "max_tokens": ("INT32", max_tokens),
        "temperature": ("FP32", temperature),
        "seed": ("UINT64", seed),
    }
    text = sys.stdin.read() if prompt == "-" else prompt
    if no_chat and system is not None:
        raise typer.BadParameter("--system needs chat; drop --no-chat")
    _converse(_gateway(_servers(file)), Question(text, not no_chat, system, options), as_json)


@app.command()
def demo(
    prompt: Annotated[str, typer.Argument(help="Prompt.")] = DEMO_PROMPT,
    file: File = paths.DEPLOYMENT,
    timeout: Timeout = None,
    max_tokens: MaxTokens = DEMO_TOKENS,
) -> None:
    """Start the servers, stream one answer with its timeline, stop."""
    with starting.held(_servers(file), timeout) as servers:
        out.print(f"\n[bold]> {prompt}[/bold]")
        question = Question(prompt, options={"max_tokens": ("INT32", max_tokens)})
        _converse(_gateway(servers), question, as_json=False)
    out.print("\nservers stopped")


@app.command("reload")
def reload_command(
    file: File = paths.DEPLOYMENT,
    only: Only = None,
    check: Annotated[bool, typer.Option("--check", help="Only report what would change.")] = False,
) -> None:
    """Apply a changed deployment to running servers, and report what needs a restart."""
    servers = _servers(file, only)
    reloads = [Reload(server) for server in servers if server.pid is not None]
    for line in plan(servers, reloads, check=check):
        out.print(line, markup=False)
    if not check:
        for one in reloads:
            one.begin()
        controlled.give(servers[0].deployment)
        for one in reloads:
            one.wait()


@app.command("render")
def render_command(file: File = paths.DEPLOYMENT, as_json: Json = False) -> None:
    """Write each server's model repository, without starting the server."""
    servers = _servers(file)
    for server in servers:
        server.render()
    if as_json:
        print(json.dumps({server.spec.name: str(server.repository) for server in servers}))
    else:
        for server in servers:
            names = ", ".join(name for name, _ in models(server.spec))
            out.print(f"{server.spec.name}: {server.repository} ({names})")


control_commands.add_to(app)


def _servers(file: Path, only: str | None = None, *, left: bool = False) -> list[Server]:
    """Return the servers of a deployment; also those that it has lost, but that run, if `left`."""
    deployment = config.load(file)
    servers = [Server(deployment, spec, file=file) for spec in deployment.servers]
    if left:
        servers += fleet.left_behind(servers)
    found = [server for server in servers if only in (None, server.spec.name)]
    if not found:
        names = ", ".join(server.spec.name for server in servers)
        raise DeploymentError(f"{file}: no server is named {only}; there are: {names}")
    for server in found:
        server.refuse_other()
    return found


def _gateway(servers: list[Server]) -> Server:
    """Return the first gateway that is ready."""
    gateways = [server for server in servers if server.spec.gateway]
    if not gateways:
        raise DeploymentError("no server has gateway: true; at least 1 is needed to be asked")
    for server in gateways:
        if server.ready("pdserve"):
            return server
    names = ", ".join(f"{server.spec.name} ({server.http})" for server in gateways)
    for server in gateways:
        if reason := watchers.repairing(server.folder):
            raise ServerError(
                f"no gateway is ready: {names}; the watchdog of {server.spec.name} is repairing "
                f"it ({reason}): ask again, `pdctl status` shows its state"
            )
    raise ServerError(f"no gateway is ready: {names}; `pdctl up` starts them")


def _converse(server: Server, question: Question, as_json: bool) -> None:
    text, finish_reason, stats = "", "", None
    wrap = Wrap(out.width if out.is_terminal else None)
    for part in ask(server.grpc, question):
        if not as_json:
            sys.stdout.write(wrap.take(part.text))
            sys.stdout.flush()
            if isinstance(sys.stdout, Output) and sys.stdout.lost:
                return  # the output is closed, so the request is cancelled
        text += part.text
        finish_reason = part.finish_reason or finish_reason
        stats = part.stats or stats
    if as_json:
        print(json.dumps({"text": text, "finish_reason": finish_reason, "stats": stats}))
    else:
        sys.stdout.write(wrap.rest())
        out.print(f"\n[dim]({_ending(finish_reason, stats)})[/dim]\n")
        if stats is not None:
            out.print(timeline(stats))


def _ending(finish_reason: str, stats: dict[str, Any] | None) -> str:
    """Return in words why an answer ended."""
    if finish_reason == "length" and stats is not None:
        return f"length: cut off after {stats['output_tokens']} tokens"
    return "stop: the model ended its answer" if finish_reason == "stop" else finish_reason


def main() -> None:
    os.umask(private.UMASK)
    output = Output(sys.stdout)
    # rich, typer and print look up sys.stdout at each use.
    with contextlib.redirect_stdout(output):
        status = _status()
        output.flush()
    if output.lost is not None and output.lost.errno != errno.EPIPE:
        _complain(f"standard output cannot be written: {output.lost.strerror}")
    sys.exit(output.status or status)


def _status() -> int | str | None:
    """Run the command and return its exit status; expected errors are printed as one line."""
    try:
        with interruptible():
            app()
    except SystemExit as ended:
        return ended.code
    except (ServerError, DeploymentError, msgspec.MsgspecError, UnicodeError) as error:
        _complain(str(error))
    except json.JSONDecodeError as error:
        _complain(f"an answer is no JSON: {error}")
    except OSError as error:
        reason = error.strerror or str(error)
        _complain(f"{error.filename}: {reason}" if error.filename else reason)
    except Interrupted as interrupted:
        err.print("interrupted")
        return interrupted.status
    return 1


def _complain(message: str) -> None:
    with contextlib.suppress(OSError):
        err.print("[red]pdctl:[/red] ", end="")
        err.print(message, markup=False)
