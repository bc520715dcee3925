"""Calls of a running server's HTTP port with the key of the server."""

from __future__ import annotations

import contextlib
import json
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from pathlib import Path

from pdctl import footprint, protocols
from pdctl.errors import ServerError
from pdserve import connections


class Endpoint(ABC):
    """The HTTP port of one server, whose folder has its key and its models."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    @abstractmethod
    def http(self) -> str:
        """http://host:port"""

    @property
    def repository(self) -> Path:
        return self.folder / "models"

    def live(self) -> bool:
        """Tell whether it answers: it has loaded, or given up, every model that it began with."""
        return self._says("health/live")

    def ready(self, model: str | None = None) -> bool:
        """Tell whether every model of the server, or one of them, can be used."""
        return self._says("health/ready" if model is None else f"models/{model}/ready")

    def _says(self, what: str) -> bool:
        try:
            connections.read(f"{self.http}/v2/{what}", 2)
        except OSError:
            return False
        return True

    def index(self) -> dict[str, str]:
        """Return the state of each model of a server (READY, UNAVAILABLE, ...); see `state_of`.

        Raises:
            ServerError: the server does not answer.
        """
        return {name: state_of(states) for name, states in self.versions().items()}

    def versions(self) -> dict[str, dict[str, str]]:
        """Return the state of each version of each model; of a model never tried, that of "" alone.

        Raises:
            ServerError: the server does not answer.
        """
        try:
            answer = self._post("/v2/repository/index", 5)
        except OSError as error:
            raise ServerError(f"server {self.name} does not answer: {error}") from error
        found: dict[str, dict[str, str]] = {}
        for entry in json.loads(answer):
            states = found.setdefault(entry["name"], {})
            states[str(entry.get("version", ""))] = entry.get("state", "")
        return found

    def load(self, model: str, timeout_s: float) -> None:
        """Load a model of a running server anew, and wait until it is ready.

        Raises:
            ServerError: it cannot be loaded, for this reason.
            OSError: the server does not answer.
        """
        # Triton would not load unchanged files again, unless the model is unloaded first.
        for file in (self.repository / model).rglob("model.py"):
            with contextlib.suppress(OSError):
                file.touch()
        try:
            self._post(f"/v2/repository/models/{model}/load", timeout_s)
        except urllib.error.HTTPError as error:
            reason = _reason(error.read()) or f"HTTP {error.code}"
            raise ServerError(f"model {model} cannot be loaded: {reason}") from error
        footprint.narrow(footprint.token(self.folder) or "")

    def unload(self, model: str, timeout_s: float = 5) -> None:
        """Unload a model: from now on it gets no new request, and is not ready. Raises: OSError."""
        self._post(f"/v2/repository/models/{model}/unload", timeout_s)

    def _post(self, path: str, timeout_s: float) -> bytes:
        key = (self.folder / "key").read_text()
        request = urllib.request.Request(
            self.http + path, method="POST", headers={protocols.ADMIN_HEADER: key}
        )
        return connections.read(request, timeout_s)


def _reason(body: bytes) -> str:
    """Return the first line of Triton's error; empty: there is none."""
    try:
        return str(json.loads(body)["error"]).partition("\n")[0].strip()
    except (ValueError, KeyError, TypeError):
        return ""


def state_of(versions: dict[str, str]) -> str:
    """Return a model's state by those of its versions: one READY version serves."""
    return "READY" if "READY" in versions.values() else next(reversed(versions.values()))
