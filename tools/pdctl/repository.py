"""Each server's model repository, made from ``model_repository/`` and a deployment."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec

from pdctl import private
from pdserve.config import Deployment, Server, names
from pdserve.errors import DeploymentError
from pdserve.node.reconcile import Kind

GATEWAY_MODELS = names.GATEWAY_MODELS
INSTANCES: tuple[Kind, ...] = ("prefill", "decode", "flexible")
"""Templates of instances."""
_NAME = re.compile(r'^name:\s*"[^"]*"', re.MULTILINE)


def models(server: Server) -> Iterator[tuple[str, str]]:
    """Return every model of a server: its name, and its source folder in ``model_repository/``."""
    if server.gateway:
        yield from ((name, name) for name in GATEWAY_MODELS)
    for role in names.ROLES:
        for name in getattr(server, role):
            yield name, names.FLEXIBLE if name in server.flexible else role


def processes(server: Server) -> Iterator[tuple[str, str]]:
    """Return the same, without the ensemble, which Triton runs without a process for it."""
    return (model for model in models(server) if model[0] != names.ENSEMBLE)


def render(deployment: Deployment, server: Server, source: Path, target: Path) -> None:
    """Write a server's repository to ``target``, in place of whatever was there.

    Every model reads the deployment in ``deployment.yaml`` beside the models. Only this user can
    access the files, since the server runs code from them.

    Raises:
        DeploymentError: ``source`` lacks a model that the server needs.
    """
    shutil.rmtree(target, ignore_errors=True)
    private.folder(target)  # before anything is written there
    for name, template in models(server):
        write(name, source / template, target / name)
    private.write(target / "deployment.yaml", msgspec.yaml.encode(deployment))
    private.tree(target)


def write(name: str, template: Path, target: Path) -> None:
    """Write one model to a folder that does not exist.

    Raises:
        DeploymentError: ``template`` is no model.
    """
    if not (template / "config.pbtxt").is_file():
        raise DeploymentError(f"{template}: no config.pbtxt for the model {name}")
    shutil.copytree(template, target, ignore=shutil.ignore_patterns("__pycache__"))
    config = target / "config.pbtxt"
    text, found = _NAME.subn(f'name: "{name}"', config.read_text())
    if found != 1:
        raise DeploymentError(f"{template / 'config.pbtxt'}: needs one line name")
    config.write_text(text)
    private.tree(target)
