"""Reads the metrics pages of all servers of a deployment, at the same time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

from pdserve.config import Deployment, Server
from pdserve.control.loads import Page

_log = logging.getLogger(__name__)

WITHIN_S = 2.0
"""Seconds for a page; a server that needs longer is unknown."""
MOST_BYTES = 32 << 20
"""Bytes of a page; a larger one is not read. A decode with 1,000 links has 0.5 MiB."""
AT_ONCE = 32
"""Pages that are read at the same time."""


async def scrape(deployment: Deployment) -> Mapping[str, Page | None]:
    """Return the page of every server; None: it did not answer, and is unknown."""
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(server: Server) -> Page | None:
        async with gate:
            try:
                text = await asyncio.wait_for(read(server.host, server.metrics_port), WITHIN_S)
            except (OSError, ValueError, asyncio.TimeoutError) as error:
                _log.debug("the load of %s is unknown: %r", server.name, error)
                return None
            return Page(text)

    servers = deployment.servers
    pages = await asyncio.gather(*map(one, servers))
    return {server.name: page for server, page in zip(servers, pages, strict=True)}


async def read(host: str, port: int) -> str:
    """Return a metrics page.

    HTTP/1.0, with a connection for each page, needs neither a thread nor a library.

    Raises:
        OSError: there is no answer.
        ValueError: it is no page, or too large.
    """
    reader, writer = await asyncio.open_connection(host, port, limit=1 << 20)
    try:
        writer.write(f"GET /metrics HTTP/1.0\r\nHost: {host}:{port}\r\n\r\n".encode())
        head = await reader.readuntil(b"\r\n\r\n")
        status = head.split(None, 2)[1:2]
        if status != [b"200"]:
            raise ValueError(f"{host}:{port}: HTTP status {status}")
        parts, size = [], 0
        while part := await reader.read(1 << 18):
            parts.append(part)
            if (size := size + len(part)) > MOST_BYTES:
                raise ValueError(f"{host}:{port}: its page has more than {MOST_BYTES} bytes")
        return b"".join(parts).decode(errors="replace")
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
        raise ValueError(f"{host}:{port}: {error}") from error
    finally:
        writer.close()
