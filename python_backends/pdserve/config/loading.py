"""Reads ``deployment.yaml``.

A file is decoded and checked at once; an error names the field, its value's type and what is
allowed. Paths in the file are relative to the file.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from pdserve.config import addresses, checks, documents
from pdserve.config.deployment import FORMER_KEYS, Deployment
from pdserve.config.llm_options import ELSEWHERE
from pdserve.errors import DeploymentError


def load(path: Path) -> Deployment:
    """Read and check a deployment; its paths are made absolute.

    Raises:
        DeploymentError: the file is unreadable, not YAML, or a field is wrong or duplicate; the
            message names it.
    """
    try:
        deployment = documents.decode(path.read_bytes(), Deployment, FORMER_KEYS | ELSEWHERE)
    except OSError as error:
        raise DeploymentError(f"{path}: {error.strerror}") from error
    except msgspec.MsgspecError as error:
        raise DeploymentError(f"{path}: {error}") from error
    servers = tuple(
        msgspec.structs.replace(server, host=addresses.resolved(server.host))
        for server in deployment.servers
    )
    deployment = msgspec.structs.replace(deployment, servers=servers)
    problem = next(checks.problems(deployment), None)
    if problem is not None:
        raise DeploymentError(f"{path}: {problem}")

    def absolute(value: str) -> str:
        try:
            return str((path.parent / Path(value).expanduser()).resolve())
        except (RuntimeError, ValueError, OSError) as error:
            raise DeploymentError(f"{path}: {value!r} is no path: {error}") from error

    engine = deployment.engine
    if engine.profile is not None:
        engine = msgspec.structs.replace(engine, profile=absolute(engine.profile))
    transfer = deployment.transfer
    transfer = msgspec.structs.replace(transfer, key_file=absolute(transfer.key_file))
    control = deployment.control
    if control and control.etcd:
        files = ("ca", "certificate", "key", "password_file")
        given = {name: value for name in files if (value := getattr(control.etcd, name))}
        etcd = msgspec.structs.replace(
            control.etcd, **{name: absolute(value) for name, value in given.items()}
        )
        control = msgspec.structs.replace(control, etcd=etcd)
    return msgspec.structs.replace(
        deployment,
        model=absolute(deployment.model),
        engine=engine,
        transfer=transfer,
        control=control,
    )
