"""Changes of the deployment while the servers run: which are applied, and a description of each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from pdserve.config import loading
from pdserve.config.deployment import Deployment

_GATEWAY = (
    "ttft_limit_ms",
    "max_prompt_tokens",
    "max_prompt_bytes",
    "max_stop_words",
    "default_scenario",
    "strict",
)
"""Fields of the gateway section that are applied; ``servers`` and ``scenarios`` are applied
whole."""


class DeploymentFile:
    """A deployment file, and the deployment that was last read from it."""

    def __init__(self, path: Path) -> None:
        """Read the file. Raises DeploymentError."""
        self._path = path
        self._stamp = self._look()
        self.deployment = loading.load(path)

    def changed(self) -> bool:
        """Read the file if it has changed; tell whether the deployment has.

        Raises:
            DeploymentError: it cannot be read or is wrong; ``deployment`` stays as it was.
        """
        stamp = self._look()
        if stamp == self._stamp:
            return False
        self._stamp = stamp
        before, self.deployment = self.deployment, loading.load(self._path)
        return self.deployment != before

    def _look(self) -> tuple[int, ...]:
        try:
            found = self._path.stat()
        except OSError:
            return ()  # reading it will report the error
        return found.st_mtime_ns, found.st_size, found.st_ino


def taken_over(running: Deployment, wanted: Deployment) -> Deployment:
    """Return what running gateways apply of another deployment; the rest waits for a restart."""
    gateway = {name: getattr(wanted.gateway, name) for name in _GATEWAY}
    same = _store(running) == _store(wanted)
    return msgspec.structs.replace(
        running,
        servers=wanted.servers,
        scenarios=wanted.scenarios,
        gateway=msgspec.structs.replace(running.gateway, **gateway),
        control=wanted.control if same else running.control,
    )


def _store(deployment: Deployment) -> object:
    """Return what says where the control plane's state is; it does not move while servers run."""
    control = deployment.control
    return control and (control.id, control.etcd)


def changes(before: Deployment, after: Deployment) -> list[str]:
    """Return each field that differs, with both values: ``gateway.strict: false -> true``."""
    return list(_differences("", msgspec.to_builtins(before), msgspec.to_builtins(after)))


def _differences(path: str, before: Any, after: Any) -> Iterator[str]:
    if before == after:
        return
    one, other = _named(before), _named(after)
    if one is None or other is None:
        yield f"{path}: {_shown(before)} -> {_shown(after)}"
        return
    if [name for name in one if name in other] != [name for name in other if name in one]:
        yield f"{path}: in another order"
    for name in (*one, *(name for name in other if name not in one)):
        below = f"{path}.{name}" if path else name
        if name not in other:
            yield f"{below}: removed"
        elif name not in one:
            yield f"{below}: added"
        else:
            yield from _differences(below, one[name], other[name])


def _named(value: Any) -> dict[str, Any] | None:
    """Return the fields of a struct, or the members of a list that have names; None: neither."""
    if isinstance(value, dict):
        return value
    if isinstance(value, list | tuple) and all(
        isinstance(one, dict) and "name" in one for one in value
    ):
        return {one["name"]: one for one in value}
    return None


def _shown(value: Any) -> str:
    return msgspec.json.encode(value).decode()
