"""One server of a deployment: starts it, waits for it, stops it.

Its files are in its folder ``<run>/<name>/``: ``models/`` (its repository),
``log`` (and OLD_LOGS, of the starts before), ``token`` (marks its processes and shared
memory, see footprint.py), ``key`` (for the calls that change what it runs), perhaps
``shared-memory.key`` (see protocols.py), ``kv.key`` (its copy of the deployment's, see keys.py),
``started`` (how it was started, see started.py), and the files of its watchdog (see watchers.py).
A repair reads these files, and writes none.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from pdctl import (
    footprint,
    keys,
    limits,
    locks,
    log,
    network,
    ports,
    private,
    protocols,
    triton,
    watchers,
)
from pdctl import started as records
from pdctl.endpoint import Endpoint
from pdctl.errors import AlreadyRunning, ServerError, Starved, Stopped
from pdctl.guard import Guard
from pdctl.loading import GivenUp
from pdctl.paths import MODEL_REPOSITORY, RUN
from pdctl.repository import models, render
from pdserve import config
from pdserve.config import Deployment
from pdserve.config import Server as Spec
from pdserve.errors import DeploymentError
from pdserve.node import epoch
from pdserve.transfer import key as kv_key

OLD_LOGS = ("log.old", "log.old.2", "log.old.3")
"""Names of the logs of the starts before, the latest first."""

_log = logging.getLogger(__name__)


class Server(Endpoint):
    """One ``tritonserver``, running or not.

    Args:
        run: parent of the servers' folders.
        source: templates of the repositories.
        file: the deployment's file, if it was read from one.
    """

    def __init__(
        self,
        deployment: Deployment,
        spec: Spec,
        run: Path = RUN,
        source: Path = MODEL_REPOSITORY,
        file: Path | None = None,
    ) -> None:
        self.spec = spec
        self.deployment = deployment
        self.file = str(file.resolve()) if file is not None else ""
        self.folder = run.resolve() / spec.name
        self.log = self.folder / "log"
        self.inherited: dict[str, str] = {}
        """Environment of its latest start, which it has again if it is started again."""
        self._source = source
        self._token: str | None = None
        """The mark of the start by this process."""
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: Guard | None = None

    @property
    def held(self) -> bool:
        """Tell whether this process has started it, to end with it."""
        return self._guard is not None

    @property
    def actual(self) -> Spec:
        """Return the server as it was started; if it has not been, as the deployment has it."""
        started = self.started
        return self.spec if started is None else started.spec

    @property
    def started(self) -> records.Started | None:
        """Return the latest start; None: never started, or stopped in good order."""
        return None if self.token is None else records.noted(self.folder)

    @property
    def running(self) -> Deployment:
        """Return the deployment that its models read; if it has not been started, as given."""
        if self.started is not None:
            with contextlib.suppress(DeploymentError):
                return config.load(self.repository / "deployment.yaml")
        return self.deployment

    def others(self) -> Iterator[Server]:
        """Return the other servers of its deployment, except foreign ones."""
        for spec in self.deployment.servers:
            one = Server(self.deployment, spec, self.folder.parent, self._source)
            one.file = self.file
            if spec.name != self.spec.name and not one.foreign:
                yield one

    @property
    def foreign(self) -> str:
        """Return which other deployment started this server name last; empty: this one."""
        started = self.started
        return started.other(self.deployment, self.spec, self.file) if started else ""

    def refuse_other(self) -> None:
        """Raises ServerError: another deployment runs, or repairs, a server of this name."""
        if not (other := self.foreign):
            return
        pid = self.pid
        if pid is not None or watchers.watched(self.folder):
            how = "is being repaired" if pid is None else f"runs (process {pid})"
            raise ServerError(
                f"server {self.spec.name} {how}, but it is one of {other}. Give this one another "
                "name, or stop that one first, by its own deployment."
            )

    @property
    def http(self) -> str:
        return f"http://{self.actual.host}:{self.actual.http_port}"

    @property
    def grpc(self) -> str:
        return f"{self.actual.host}:{self.actual.grpc_port}"

    @property
    def metrics(self) -> str:
        return f"http://{self.actual.host}:{self.actual.metrics_port}/metrics"

    @property
    def token(self) -> str | None:
        """Return the mark of the latest start; None: never started, or stopped in good order."""
        return footprint.token(self.folder)

    @property
    def pid(self) -> int | None:
        """Return the process id of the running ``tritonserver``."""
        if self.token is None:
            return None
        process = footprint.server_process(self.token)
        return process.pid if process else None

    def render(self) -> None:
        """Write the repository.

        Raises:
            ServerError: it runs, and would load what is written.
            DeploymentError: as repository.render.
        """
        if (pid := self.pid) is not None:
            started = self.started
            file = f" from {started.file}" if started and started.file else ""
            raise ServerError(
                f"server {self.spec.name} runs (process {pid}, started{file}) on the repository "
                f"{self.repository}: `pdctl reload` applies another deployment to it"
            )
        self._make_folder()
        render(self.deployment, self.spec, self._source, self.repository)

    def start(self, *, held: bool, again: bool = False) -> None:
        """Clean up after a crash, render the repository and start the process; see wait_ready.

        Args:
            held: the server ends with this process, however that ends.
            again: repository, keys and mark stay as they are, and nothing is written.

        Raises:
            Stopped: it must not run again.
            AlreadyRunning, PortTaken, ServerError, DeploymentError.
        """
        if not again:
            self._make_folder()
        with locks.locked(self.folder):
            pid = self.pid
            if pid is not None:
                raise AlreadyRunning(f"server {self.spec.name} runs already (process {pid})")
            if again:
                if self.token is None:
                    raise Stopped(f"server {self.spec.name} has been stopped")
                self._token = self.token
                footprint.erase([self.token], grace_s=0)
            else:
                watchers.end(self.folder)  # it would start what is cleaned up
                self.clean()
            spec = self.actual
            ports.check(spec)
            found = triton.linked(triton.locate(), self.folder)
            known = triton.options(found)
            if not again:
                self._prepare()
            token = self.token or ""
            shared_memory = protocols.shared_memory_key(spec, self.folder, again=again)
            given = triton.Keys((self.folder / "key").read_text(), shared_memory)
            if held:
                self._guard = Guard(self.folder, token)
            with self._new_log() as output, limits.raised() as variables:
                self._process = subprocess.Popen(
                    triton.command(
                        found,
                        known,
                        spec,
                        Path(self.repository.name),
                        token,
                        given,
                        self.deployment.gateway.max_prompt_bytes,
                    ),
                    cwd=self.folder,
                    env=(self.inherited or self._environment(found, token))
                    | variables
                    | {kv_key.VARIABLE: str(keys.copy(self.folder))},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    umask=private.UMASK,
                    # Ctrl-C is handled by pdctl, which then stops the server
                    start_new_session=True,
                )

    def _environment(self, found: triton.Triton, token: str) -> dict[str, str]:
        return triton.environment(found, token) | network.variables(self.deployment)

    def _make_folder(self) -> None:
        private.folder(self.folder.parent)
        private.folder(self.folder)

    def _prepare(self) -> None:
        """Write what a new start needs. Raises: ServerError, DeploymentError, OSError."""
        self.render()
        given = self.deployment
        running = {
            other.spec.name: other.folder
            for other in self.others()
            if (known := other.started) is not None
            and known.key_file == given.transfer.key_file
            and other.pid is not None
        }
        key = keys.find(Path(given.transfer.key_file), running)
        private.write(keys.copy(self.folder), key)
        boot = epoch.boot()
        started = records.Started(
            self.file, given.model, given.transfer.key_file, self.spec, boot=boot
        )
        records.note(self.folder, started)
        private.write(self.folder / "key", secrets.token_hex(16).encode())
        self._token = footprint.new_token(self.spec.name)
        # Last, because a folder with a token counts as complete.
        private.write(self.folder / "token", self._token.encode())

    def _new_log(self) -> IO[bytes]:
        try:
            logs = [self.log, *(self.folder / name for name in OLD_LOGS)]
            for older, newer in zip(logs[:0:-1], logs[-2::-1], strict=True):
                if newer.exists():
                    newer.replace(older)
            return private.opened(self.log)
        except OSError as error:  # a server without a log is better than none
            _log.warning("%s: nothing is logged: %s", self.log, error.strerror)
            return Path(os.devnull).open("wb")

    def wait_ready(self, timeout_s: float, progress: Progress = lambda *_: None) -> None:
        """Wait until every model of a server can be used.

        A server that another process has started need not be ready if it has been before: then its
        watchdog repairs it.

        Args:
            progress: called often with this server, the models that are loaded, and the others.

        Raises:
            ServerError: it died, or was not ready in time; the message quotes its log.
            Starved: it died because the machine was too slow; the next start may succeed.
        """
        spec = self.actual
        expected = {name for name, _ in models(spec)}
        deadline = time.monotonic() + timeout_s
        usable = self.ready if self._process is not None else self.live
        given_up = GivenUp(self.token or "")
        # Triton opens its metrics port last, 40 ms after it reports ready.
        while not (usable() and ports.listens(spec.host, spec.metrics_port)):
            self.check_alive()
            footprint.narrow(self.token or "")
            loaded = log.loaded(self.read_log()) & expected
            given_up.end(expected - loaded)
            if time.monotonic() > deadline:
                raise ServerError(
                    f"server {self.spec.name} is not ready after {timeout_s:.0f} s; still loading: "
                    f"{', '.join(sorted(expected - loaded)) or 'nothing'}\n{self._excerpt()}"
                )
            progress(self, loaded, expected - loaded)
            time.sleep(0.1)
        footprint.narrow(self.token or "")
        progress(self, expected, set())

    def check_alive(self) -> None:
        """Raises ServerError: the server is dead, for this reason; Starved: for lack of time."""
        if self._process is None:
            if self.pid is not None:
                return
            how = "has ended"
        else:
            status = self._process.poll()
            if status is None:
                return
            how = f"was killed by signal {-status}" if status < 0 else f"ended with {status}"
        with locks.locked(self.folder):  # a command that stops the server has said so by then
            token = self.token
        if token is None or self._token not in (None, token):
            how = f"was stopped by another pdctl; its log: {self.log}"
            raise ServerError(f"server {self.spec.name} {how}")
        kind = Starved if log.starved(self.read_log()) else ServerError
        raise kind(f"server {self.spec.name} {how}\n{self._excerpt()}")

    def stop(self, *, own: bool = False) -> None:
        """End the server, wait for its end and remove what it left; do nothing if it is not up.

        Its watchdog ends first. Takes at most EXIT_TIMEOUT_S and a few seconds more.

        Args:
            own: only if its latest start is that of this process.

        Raises:
            ServerError: its watchdog does not end.
        """
        ours = self._token is not None and self.token == self._token
        if self.folder.exists() and (ours or not own):
            watchers.end(self.folder)
            with locks.locked(self.folder):
                if not own or self.token == self._token:
                    self.clean()
        if self._process is not None:
            self._process.wait()
        if self._guard is not None:
            self._guard.dismiss()
            self._guard = None

    def kill(self) -> None:
        """End the server at once, as a crash would, and remove what it left; see ``start``."""
        if self.token is not None:
            footprint.erase([self.token], grace_s=0)
        if self._process is not None:
            self._process.poll()  # it is a zombie, or will be one soon

    def clean(self) -> None:
        """Make sure that nothing of the latest start is left on this machine."""
        if self.token is not None:
            footprint.erase([self.token])
            (self.folder / "token").unlink(missing_ok=True)

    def read_log(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def _excerpt(self) -> str:
        lines = "\n".join(f"  {line}" for line in log.relevant(self.read_log()))
        return f"{lines}\nits whole log: {self.log}"


Progress = Callable[[Server, set[str], set[str]], None]
