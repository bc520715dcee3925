"""One server of a deployment: start it, wait for it, stop it.

What it needs and leaves lies in its folder ``<run>/<name>/``: ``models/`` (its repository),
``log`` (and ``log.old``, of the start before), ``token`` (marks its processes and shared
memory, see footprint.py), ``key`` (for the calls that change what it runs), perhaps
``shared-memory.key`` (see protocols.py), and what its watchdog keeps (see watchers.py).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import secrets
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from pdctl import (
    footprint,
    limits,
    log,
    network,
    ports,
    private,
    protocols,
    triton,
    watchers,
)
from pdctl.errors import AlreadyRunning, ServerError
from pdctl.guard import Guard
from pdctl.paths import MODEL_REPOSITORY, RUN
from pdctl.repository import models, render
from pdserve import connections
from pdserve.config import Deployment
from pdserve.config import Server as Spec


class Server:
    """One ``tritonserver``, running or not."""

    def __init__(
        self,
        deployment: Deployment,
        spec: Spec,
        run: Path = RUN,
        source: Path = MODEL_REPOSITORY,
    ) -> None:
        self.spec = spec
        self.deployment = deployment
        self.folder = run.resolve() / spec.name
        self.repository = self.folder / "models"
        self.log = self.folder / "log"
        self._source = source
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: Guard | None = None

    @property
    def held(self) -> bool:
        """Started by this process, to end with it."""
        return self._guard is not None

    @property
    def http(self) -> str:
        return f"http://{self.spec.host}:{self.spec.http_port}"

    @property
    def grpc(self) -> str:
        return f"{self.spec.host}:{self.spec.grpc_port}"

    @property
    def metrics(self) -> str:
        return f"http://{self.spec.host}:{self.spec.metrics_port}/metrics"

    @property
    def token(self) -> str | None:
        """The mark of the latest start; None: never started, or stopped in good order."""
        return footprint.token(self.folder)

    @property
    def pid(self) -> int | None:
        """The process id of the running ``tritonserver``."""
        if self.token is None:
            return None
        process = footprint.server_process(self.token)
        return process.pid if process else None

    def render(self) -> None:
        """Write the repository. Raises: DeploymentError, as repository.render."""
        self._make_folder()
        render(self.deployment, self.spec, self._source, self.repository)

    def start(self, *, held: bool, again: bool = False) -> None:
        """Clean up after a crash, render the repository and start the process; see wait_ready.

        Args:
            held: the server ends with this process, however that ends.
            again: the repository stays as it is.

        Raises:
            AlreadyRunning, PortTaken, ServerError, DeploymentError.
        """
        self._make_folder()
        with self._starting():
            pid = self.pid
            if pid is not None:
                raise AlreadyRunning(f"server {self.spec.name} runs already (process {pid})")
            self.clean()
            ports.check(self.spec)
            found = triton.linked(triton.locate(), self.folder)
            known = triton.options(found)
            if not again:
                self.render()
            token = footprint.new_token(self.spec.name)
            shared_memory = protocols.shared_memory_key(self.spec, self.folder, again=again)
            keys = triton.Keys(secrets.token_hex(16), shared_memory)
            private.write(self.folder / "key", keys.admin.encode())
            private.write(self.folder / "token", token.encode())
            if self.log.exists():
                self.log.replace(self.folder / "log.old")
            if held:
                self._guard = Guard(self.folder)
            with private.opened(self.log) as output, limits.raised() as variables:
                self._process = subprocess.Popen(
                    triton.command(
                        found,
                        known,
                        self.spec,
                        Path(self.repository.name),
                        token,
                        keys,
                        self.deployment.gateway.max_prompt_bytes,
                    ),
                    cwd=self.folder,
                    env=triton.environment(found, token)
                    | network.variables(self.deployment)
                    | variables,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    umask=private.UMASK,
                    start_new_session=True,  # Ctrl-C is for pdctl, which then stops the server
                )

    def _make_folder(self) -> None:
        private.folder(self.folder.parent)
        private.folder(self.folder)

    @contextlib.contextmanager
    def _starting(self) -> Iterator[None]:
        with private.opened(self.folder / "lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def wait_ready(self, timeout_s: float, progress: Progress = lambda *_: None) -> None:
        """Wait until every model of a server that this process started can be used.

        Args:
            progress: called often with this server, the models that are loaded, and the others.

        Raises:
            ServerError: it died, or was not ready in time; the message has the log's words.
        """
        expected = {name for name, _ in models(self.spec)}
        deadline = time.monotonic() + timeout_s
        # Triton opens the port of its metrics last, 40 ms after it has said that it is ready.
        while not (self.ready() and ports.listens(self.spec.host, self.spec.metrics_port)):
            self.check_alive()
            footprint.narrow(self.token or "")
            loaded = log.loaded(self.read_log()) & expected
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
        """Raises: ServerError: the server that this process started is dead; says why."""
        assert self._process is not None
        status = self._process.poll()
        if status is not None:
            how = f"was killed by signal {-status}" if status < 0 else f"ended with {status}"
            raise ServerError(f"server {self.spec.name} {how}\n{self._excerpt()}")

    def ready(self, model: str | None = None) -> bool:
        """Whether every model of the server, or one of them, can be used."""
        what = "health" if model is None else f"models/{model}"
        try:
            with connections.urlopen(f"{self.http}/v2/{what}/ready", 2) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def index(self) -> dict[str, str]:
        """State of each model of a running server: READY, UNAVAILABLE, ...

        Raises:
            ServerError: the server does not answer.
        """
        try:
            answer = self._post("/v2/repository/index", 5)
        except OSError as error:
            raise ServerError(f"server {self.spec.name} does not answer: {error}") from error
        return {entry["name"]: entry.get("state", "") for entry in json.loads(answer)}

    def load(self, model: str, timeout_s: float) -> None:
        """Load a model of a running server anew, and wait until it is ready.

        Raises:
            ServerError: it cannot be loaded; says why.
            OSError: the server does not answer.
        """
        # Files that have not changed would not be loaded again.
        for file in (self.repository / model).rglob("model.py"):
            file.touch()
        try:
            self._post(f"/v2/repository/models/{model}/load", timeout_s)
        except urllib.error.HTTPError as error:
            reason, *_ = json.loads(error.read())["error"].splitlines()
            raise ServerError(f"model {model} cannot be loaded: {reason}") from error
        footprint.narrow(self.token or "")

    def unload(self, model: str, timeout_s: float = 5) -> None:
        """No new request reaches a model, and it is not ready, from now on. Raises: OSError."""
        self._post(f"/v2/repository/models/{model}/unload", timeout_s)

    def _post(self, path: str, timeout_s: float) -> bytes:
        key = (self.folder / "key").read_text()
        request = urllib.request.Request(
            self.http + path, method="POST", headers={protocols.ADMIN_HEADER: key}
        )
        with connections.urlopen(request, timeout_s) as answer:
            data: bytes = answer.read()
            return data

    def stop(self) -> None:
        """End the server, wait for its end and remove what it left; nothing to do if it is not up.

        Its watchdog ends first. Takes at most EXIT_TIMEOUT_S and a few seconds more.
        """
        watchers.end(self.folder)
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
            (self.folder / "token").unlink()

    def read_log(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def _excerpt(self) -> str:
        lines = "\n".join(f"  {line}" for line in log.relevant(self.read_log()))
        return f"{lines}\nits whole log: {self.log}"


Progress = Callable[[Server, set[str], set[str]], None]
