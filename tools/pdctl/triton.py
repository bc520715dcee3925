"""Finds the Triton server, and makes its command line and environment."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, replace
from pathlib import Path

from pdctl import protocols
from pdctl.errors import ServerError
from pdctl.paths import BACKENDS
from pdserve.config import Server

EXIT_TIMEOUT_S = 5
"""How long Triton waits for requests in flight when it is told to stop."""
HELP_TIMEOUT_S = 30
PING_MS = 1000
"""Clients may ping so often, and while nothing is sent: whoever does so more often three times is
disconnected ("too_many_pings"). gRPC's own default is five minutes, which keep-alive pings of a
client whose answer takes long would break."""
BYTES_IN_JSON = 6
"""Most bytes that a byte of a prompt takes in JSON: ``\u0000``."""
REST_BYTES = 4 << 20
"""Bytes for the other fields of a request, and for prompts of token ids."""
FORWARDED = "^traceparent$"
"""gRPC metadata that becomes a request parameter. Of HTTP's headers, generate passes on none."""


IMAGE = Path("/opt/tritonserver/bin")
"""Folder of ``tritonserver`` in NVIDIA's images."""
IMAGE_PYTHON = Path("/opt/venv-tritonserver/bin")
"""Folder of their Python since release 26.04."""


@dataclass(frozen=True)
class Triton:
    """A ``tritonserver`` and the files that it needs."""

    binary: Path
    flags: tuple[str, ...]
    environment: dict[str, str]


def locate() -> Triton:
    """Return the ``tritonserver`` on PATH, as in NVIDIA's images, or that of the environment.

    Raises:
        ServerError: there is neither.
    """
    binary = shutil.which("tritonserver")
    if binary is not None:
        return Triton(Path(binary), (), {})
    packages = Path(sysconfig.get_path("purelib"))
    bundled = packages / "pytriton" / "tritonserver" / "bin" / "tritonserver"
    if not (bundled.is_file() and BACKENDS.is_dir()):
        if (IMAGE / "tritonserver").is_file():  # a login shell resets PATH
            folders = [str(folder) for folder in (IMAGE, IMAGE_PYTHON) if folder.is_dir()]
            raise ServerError(
                f"no tritonserver on PATH: run `export PATH={':'.join(folders)}:$PATH`"
            )
        raise ServerError("no tritonserver on PATH and none set up here: run `make setup`")
    # The stub embeds this Python: the loader finds the library, and PATH the packages.
    library = sysconfig.get_config_var("LIBDIR")
    environment = {
        "PATH": f"{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": ":".join(filter(None, (library, os.environ.get("LD_LIBRARY_PATH")))),
    }
    return Triton(bundled, (f"--backend-directory={BACKENDS}",), environment)


def linked(triton: Triton, folder: Path) -> Triton:
    """Return the installation as linked into a server's folder, without an outer path.

    The Python backend starts each stub by a bash command without quotes. With a blank in the path
    of the checkout, no stub would start.
    """
    if not triton.flags:
        return triton
    link = folder / "backends"
    # a repair then needs no space on the disk
    if not (link.is_symlink() and link.readlink() == BACKENDS):
        link.unlink(missing_ok=True)
        link.symlink_to(BACKENDS)
    return replace(triton, flags=(f"--backend-directory={link.name}",))


@dataclass(frozen=True)
class Options:
    """The options of a ``tritonserver``, by its own help."""

    names: frozenset[str]
    """Names of its options, without the dashes."""
    http_protocols: tuple[str, ...]
    """Protocols that ``--http-restricted-api`` knows."""
    grpc_protocols: tuple[str, ...]
    """Protocols that ``--grpc-restricted-protocol`` knows."""


def options(triton: Triton) -> Options:
    """Ask a ``tritonserver`` for its options; this takes 0.02 s.

    Raises:
        ServerError: it does not list them, or none of its protocols can be restricted.
    """
    try:
        done = subprocess.run(
            [triton.binary, "--help"],
            env={**os.environ, **triton.environment},
            capture_output=True,
            text=True,
            check=False,
            timeout=HELP_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ServerError(f"{triton.binary} --help: {error}") from error
    return parse_help(done.stdout + done.stderr)


def parse_help(text: str) -> Options:
    """Return the options in the text of ``tritonserver --help``.

    Raises:
        ServerError: it names no protocols that can be restricted.
    """
    about = dict(re.findall(r"^  --([a-z0-9-]+)(.*?)(?=^  --|\Z)", text, re.MULTILINE | re.DOTALL))

    def known(option: str) -> tuple[str, ...]:
        listed = re.search(r"Allowed \w+:\s*([a-z-]+(?:,\s*[a-z-]+)*)", about.get(option, ""))
        if listed is None:
            raise ServerError(f"tritonserver --help names no protocols for --{option}")
        return tuple(re.split(r",\s*", listed[1]))

    return Options(
        frozenset(about), known("http-restricted-api"), known("grpc-restricted-protocol")
    )


@dataclass(frozen=True)
class Keys:
    """The keys of calls that are not open to everyone; see protocols.py.

    They appear in command lines, which users of this machine can read. So they keep out other
    machines and web pages, but not other users.
    """

    admin: str
    shared_memory: str


def command(
    triton: Triton,
    known: Options,
    server: Server,
    repository: Path,
    token: str,
    keys: Keys,
    prompt_bytes: int,
) -> list[str]:
    """Return the command line of a server.

    Args:
        repository: path relative to the server's folder; see `linked`.
        prompt_bytes: bytes of the longest prompt that a gateway takes.
    """
    restricted = {
        "http-restricted-api": known.http_protocols,
        "grpc-restricted-protocol": known.grpc_protocols,
    }
    # Options that only some builds and versions have.
    optional = {
        "http-max-input-size": f"{BYTES_IN_JSON * prompt_bytes + REST_BYTES}",
        "allow-client-shm": "false" if server.client_shared_memory == "off" else "true",
        # An environment variable could turn it on, at another port and on every address.
        "allow-vertex-ai": "false",
        "allow-sagemaker": "false",
    }
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
        *(
            f"--{option}={group}"
            for option, names in restricted.items()
            for group in protocols.restrictions(names, keys.admin, keys.shared_memory)
        ),
        *(f"--{name}={value}" for name, value in optional.items() if name in known.names),
        f"--grpc-header-forward-pattern={FORWARDED}",
        f"--grpc-http2-min-recv-ping-interval-without-data={PING_MS}",
        "--grpc-keepalive-permit-without-calls=1",
        f"--backend-config=python,shm-region-prefix-name={token}-triton-",
    ]


def environment(triton: Triton, token: str) -> dict[str, str]:
    """Return the environment of a server's processes; the token marks them as its own."""
    return {
        **os.environ,
        **triton.environment,
        "PDSERVE_SHM_PREFIX": token,
        # Threads that spin while they wait would take the cores from the other instances.
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
