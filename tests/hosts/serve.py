"""``python -m tests.hosts.serve FILE NAME FOLDER``: runs one server of the deployment in FILE.

Says "ready" when it is, or why it is not. Ends, with the server, when its standard input does.
FOLDER receives the server's own folder.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pdctl import fleet
from pdctl.errors import ServerError
from pdctl.server import Server
from pdserve import config
from tests.servers import START_TIMEOUT_S


def main(file: str, name: str, folder: str) -> None:
    deployment = config.load(Path(file))
    (spec,) = (server for server in deployment.servers if server.name == name)
    server = Server(deployment, spec, Path(folder))
    try:
        fleet.start([server], held=True, timeout_s=START_TIMEOUT_S, progress=lambda *_: None)
    except ServerError as error:
        sys.exit(str(error))
    try:
        print("ready", flush=True)
        sys.stdin.read()
    finally:
        fleet.stop([server])


if __name__ == "__main__":
    main(*sys.argv[1:])
