"""Which Triton server there is, and how it is called."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from pdctl.errors import ServerError
from pdctl.paths import BACKENDS
from pdserve.config import Server

EXIT_TIMEOUT_S = 5
"""How long Triton waits for requests in flight when it is told to stop."""
KEY_HEADER = "pdctl-key"
RESTRICTED = "model-repository,trace,logging"
FORWARDED = "^traceparent$"
"""gRPC metadata that becomes a request parameter. Of HTTP's headers, generate passes on none."""


@dataclass(frozen=True)
class Triton:
    """A ``tritonserver`` and what it needs around it."""

    binary: Path
    flags: tuple[str, ...]
    environment: dict[str, str]


def locate() -> Triton:
    """The ``tritonserver`` on PATH, as in NVIDIA's images; otherwise the one of the environment.

    Raises:
        ServerError: there is neither.
    """
    binary = shutil.which("tritonserver")
    if binary is not None:
        return Triton(Path(binary), (), {})
    packages = Path(sysconfig.get_path("purelib"))
    bundled = packages / "pytriton" / "tritonserver" / "bin" / "tritonserver"
    if not (bundled.is_file() and BACKENDS.is_dir()):
        raise ServerError("no tritonserver on PATH and none set up here: run `make setup`")
    # The stub embeds this Python: it finds the library by the loader and the packages by PATH.
    library = sysconfig.get_config_var("LIBDIR")
    environment = {
        "PATH": f"{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": ":".join(filter(None, (library, os.environ.get("LD_LIBRARY_PATH")))),
    }
    return Triton(bundled, (f"--backend-directory={BACKENDS}",), environment)


def command(triton: Triton, server: Server, repository: Path, token: str, key: str) -> list[str]:
    """The command line of a server.

    ``key`` must come with every call that could change what the server runs. It keeps out
    other machines and web pages, not other users of this machine, who can read command lines.
    """
    return [
        str(triton.binary),
        *triton.flags,
        f"--model-repository={repository}",
        "--model-control-mode=explicit",
        "--load-model=*",
        "--disable-auto-complete-config",
        f"--exit-timeout-secs={EXIT_TIMEOUT_S}",
        f"--http-address={server.host}",
        f"--grpc-address={server.host}",
        f"--metrics-address={server.host}",
        f"--http-port={server.http_port}",
        f"--grpc-port={server.grpc_port}",
        f"--metrics-port={server.metrics_port}",
        f"--http-restricted-api={RESTRICTED}:{KEY_HEADER}={key}",
        f"--grpc-restricted-protocol={RESTRICTED}:{KEY_HEADER}={key}",
        f"--grpc-header-forward-pattern={FORWARDED}",
        f"--backend-config=python,shm-region-prefix-name={token}-triton-",
    ]


def environment(triton: Triton, token: str) -> dict[str, str]:
    """What a server's processes find in their environment; the token marks them as its own."""
    return {
        **os.environ,
        **triton.environment,
        "PDSERVE_SHM_PREFIX": token,
        # Threads that spin while they wait would take the cores from the other instances.
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
