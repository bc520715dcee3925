"""Tests for connections that ignore the proxies of the environment."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from socketserver import StreamRequestHandler, TCPServer

import pytest

from pdctl.endpoint import Endpoint
from pdserve import config, connections
from pdserve.gateway import spans
from pdserve.triton import former
from tests.servers import free_ports


class Page(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"page")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def page() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Page) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


def test_a_page_is_read_past_a_proxy(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_ports(1)[0]}")

    assert connections.read(page, 5) == b"page"


def test_programs_get_an_environment_without_them() -> None:
    given = {"PATH": "/bin", "http_proxy": "x", "HTTPS_PROXY": "x", "grpc_proxy": "x"}

    assert connections.without_proxies(given) == {"PATH": "/bin"}


@pytest.mark.parametrize(
    ("url", "near"),
    [
        ("http://127.0.0.1:4318/v1/traces", True),
        ("https://[::1]:4318/", True),
        ("http://localhost/v1", True),
        ("http://collector.example:4318/v1/traces", False),
        ("http://10.0.0.1:4318/", False),
    ],
)
def test_a_collector_elsewhere_may_be_behind_one(url: str, near: bool) -> None:
    """OpenTelemetry's own session uses the proxy for a collector on another host only."""
    session = spans._session(url)

    assert connections.is_loopback(url) is near
    assert (session is None) is not near
    assert session is None or not session.trust_env


@pytest.fixture
def garbage() -> Iterator[int]:
    """Return the port of a program that answers, though not in HTTP."""

    class Answer(StreamRequestHandler):
        def handle(self) -> None:
            self.rfile.readline()
            self.wfile.write(b"SSH-2.0-something\r\n")

    with TCPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


def test_what_does_not_speak_http_is_not_live_and_has_no_metrics(
    garbage: int, tmp_path: Path
) -> None:
    (tmp_path / "key").write_text("key")

    class Other(Endpoint):
        folder = tmp_path
        http = f"http://127.0.0.1:{garbage}"

    assert not Other().live()
    assert not Other().ready("pdserve")
    with pytest.raises(OSError, match="no answer in HTTP"):
        Other().unload("pdserve")

    server = config.Server(
        name="local", prefill=("prefill_0",), decode=("decode_0",), metrics_port=garbage
    )
    assert not former.page(config.Deployment(model="m", servers=(server,)), "prefill_0")
