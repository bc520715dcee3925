"""Tests for each of the server's protocols: open for a stated reason, or not without a key."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any

import grpc
import msgspec
import numpy as np
import psutil
import pytest
import tritonclient.grpc
import tritonclient.http
from perf import perf_analyzer
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException
from tritonclient.utils import shared_memory as client_memory

from pdctl import footprint, protocols, triton
from tests.clients import connect
from tests.servers import Running, emulated_deployment, running

if TYPE_CHECKING:
    from types import ModuleType

pytestmark = pytest.mark.triton

RPCS = {
    "ServerLive": "health",
    "ServerReady": "health",
    "ModelReady": "health",
    "ServerMetadata": "metadata",
    "ModelMetadata": "metadata",
    "ModelInfer": "inference",
    "ModelStreamInfer": "inference",
    "ModelConfig": "model-config",
    "ModelStatistics": "statistics",
    "RepositoryIndex": "model-repository",
    "RepositoryModelLoad": "model-repository",
    "RepositoryModelUnload": "model-repository",
    "SystemSharedMemoryStatus": "shared-memory",
    "SystemSharedMemoryRegister": "shared-memory",
    "SystemSharedMemoryUnregister": "shared-memory",
    "CudaSharedMemoryStatus": "shared-memory",
    "CudaSharedMemoryRegister": "shared-memory",
    "CudaSharedMemoryUnregister": "shared-memory",
    "TraceSetting": "trace",
    "LogSettings": "logging",
}
"""Every RPC of the inference service, with the protocol that it belongs to."""

MODEL = "/v2/models/([^/]+)(?:/versions/([0-9]+))?"
MODEL_CALLS = "(?:/(infer|generate|generate_stream|ready|config|stats|trace/setting))?"
REGION_CALLS = "(?:/region/([^/]+))?/(status|register|unregister)"
ROUTES = {
    "/v2(?:/health/(live|ready))?": [
        ("GET", "/v2/health/live", "health"),
        ("GET", "/v2/health/ready", "health"),
        ("GET", "/v2", "metadata"),
    ],
    "/v2": [("GET", "/v2", "metadata")],
    MODEL + MODEL_CALLS: [
        ("GET", "/v2/models/pdserve/ready", "health"),
        ("GET", "/v2/models/pdserve/versions/1/ready", "health"),
        ("GET", "/v2/models/pdserve", "metadata"),
        ("GET", "/v2/models/prefill_0/config", "model-config"),
        ("GET", "/v2/models/pdserve/stats", "statistics"),
        ("POST", "/v2/models/pdserve/infer", "inference"),
        ("POST", "/v2/models/pdserve/generate", "inference"),
        ("POST", "/v2/models/pdserve/generate_stream", "inference"),
        ("GET", "/v2/models/pdserve/trace/setting", "trace"),
        ("POST", "/v2/models/pdserve/trace/setting", "trace"),
    ],
    "/v2/models/stats": [("GET", "/v2/models/stats", "statistics")],
    "/v2/repository(?:/([^/]+))?/(index|models/([^/]+)/(load|unload))": [
        ("POST", "/v2/repository/index", "model-repository"),
        ("POST", "/v2/repository/any/index", "model-repository"),
        ("POST", "/v2/repository/models/pdserve/load", "model-repository"),
        ("POST", "/v2/repository/models/pdserve/unload", "model-repository"),
    ],
    **{
        f"/v2/{kind}sharedmemory{REGION_CALLS}": [
            ("GET", f"/v2/{kind}sharedmemory/status", "shared-memory"),
            ("GET", f"/v2/{kind}sharedmemory/region/any/status", "shared-memory"),
            ("POST", f"/v2/{kind}sharedmemory/region/any/register", "shared-memory"),
            ("POST", f"/v2/{kind}sharedmemory/unregister", "shared-memory"),
            ("POST", f"/v2/{kind}sharedmemory/region/any/unregister", "shared-memory"),
        ]
        for kind in ("system", "cuda")
    },
    "/v2/trace/setting": [
        ("GET", "/v2/trace/setting", "trace"),
        ("POST", "/v2/trace/setting", "trace"),
    ],
    "/v2/logging": [("GET", "/v2/logging", "logging"), ("POST", "/v2/logging", "logging")],
}
"""Every route of the HTTP server, as in the binary: method, path and protocol of its calls."""

CALLS = sorted({call for calls in ROUTES.values() for call in calls})
GENERATE = json.dumps({"text_input": "a", "max_tokens": 1})


@pytest.fixture(scope="module")
def keyed_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that lets clients with a key register shared memory."""
    folder = tmp_path_factory.mktemp("keyed")
    deployment = emulated_deployment(folder, {})
    servers = tuple(
        msgspec.structs.replace(server, client_shared_memory="key") for server in deployment.servers
    )
    with running(msgspec.structs.replace(deployment, servers=servers), folder) as server:
        yield server


def binary() -> bytes:
    return triton.locate().binary.read_bytes()


def test_no_rpc_of_the_server_is_missing_here() -> None:
    """The list equals that of the server binary, and that of the clients' generated code."""
    service = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    served = set(re.findall(rb"/inference\.GRPCInferenceService/(\w+)\0", binary()))

    assert {method.name for method in service.methods} == set(RPCS)
    assert {name.decode() for name in served} == set(RPCS)


def test_no_route_of_the_server_is_missing_here() -> None:
    served = set(re.findall(rb"\0(/v2[!-~]*)(?=\0)", binary()))

    assert {route.decode() for route in served} == set(ROUTES)
    for route, calls in ROUTES.items():
        assert all(re.fullmatch(route, path) for _, path, _ in calls), route


def test_every_protocol_is_one_that_the_server_can_restrict() -> None:
    known = triton.options(triton.locate())

    assert set(protocols.OPEN) == {
        *("health", "metadata", "inference", "model-config", "statistics"),
    }
    for names in (known.http_protocols, known.grpc_protocols):
        assert set(names) == set(RPCS.values())
        assert set(protocols.OPEN) < set(names)
    assert {protocol for _, _, protocol in CALLS} == set(RPCS.values())


@pytest.mark.parametrize("rpc", RPCS)
def test_rpc_without_a_key(emulated_server: Running, rpc: str) -> None:
    """An open call is served or reports an error of the request; any other is refused unread."""
    words = refusal(emulated_server, rpc, None)

    assert ("protocol is restricted" in words) == (RPCS[rpc] not in protocols.OPEN)


@pytest.mark.parametrize(("method", "path", "protocol"), CALLS)
def test_route_without_a_key(
    emulated_server: Running, method: str, path: str, protocol: str
) -> None:
    status, body = ask(emulated_server, method, path)

    assert (status == 403 and "API is restricted" in body) == (protocol not in protocols.OPEN)
    assert status != 404


@pytest.mark.parametrize("service", ["grpc.health.v1.Health/Check", "grpc.health.v1.Health/Watch"])
def test_the_health_service_tells_no_more_than_health(
    emulated_server: Running, service: str
) -> None:
    answers = []
    with (
        grpc.insecure_channel(emulated_server.grpc) as channel,
        contextlib.suppress(grpc.RpcError),  # 24.10 has no Watch
    ):
        answers += channel.unary_stream(f"/{service}")(b"", timeout=10)

    assert answers in ([], [b"\x08\x01"])  # SERVING


@pytest.mark.parametrize("path", ["/ping", "/invocations", "/models", "/v2/models/stats/x", "/"])
def test_what_is_no_route_is_not_there(emulated_server: Running, path: str) -> None:
    """The routes for SageMaker and Vertex AI, which the binary contains, are off."""
    assert ask(emulated_server, "GET", path)[0] in (400, 404)


def test_nobody_is_told_the_key_of_shared_memory_that_is_off(emulated_server: Running) -> None:
    """The key on the command line cannot be sent over HTTP, since no header carries a line feed."""
    (server,) = emulated_server.servers
    words = psutil.Process(server.pid).cmdline()
    (key,) = {word.rpartition("=")[2] for word in words if "shared-memory:" in word}

    assert len(key) > 60
    assert key.endswith("\n")
    assert not list(server.folder.glob("*shared-memory*"))
    for sent in (key, key.strip()):
        try:
            status, _ = ask(
                emulated_server,
                "GET",
                "/v2/systemsharedmemory/status",
                {protocols.SHARED_MEMORY_HEADER: sent},
            )
        except ValueError:
            continue  # Python's client refuses to send it
        assert status == 403


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_shared_memory_with_its_key(keyed_server: Running, kind: str) -> None:
    """The inputs come from a region of the client, by unchanged tritonclient."""
    client, headers, module = connected(keyed_server, kind)
    prompt = np.array([[b"a b c"]], object)
    data = tritonclient.utils.serialize_byte_tensor(prompt).item()
    handle = client_memory.create_shared_memory_region("prompt", f"/pdserve-test-{kind}", len(data))
    try:
        with closing(client):
            client_memory.set_shared_memory_region(handle, [np.frombuffer(data, np.uint8)])
            client.register_system_shared_memory(
                "prompt", f"/pdserve-test-{kind}", len(data), headers=headers
            )
            given = module.InferInput("text_input", [1, 1], "BYTES")
            given.set_shared_memory("prompt", len(data))
            ids = client.infer("tokenizer", [given]).as_numpy("input_ids")
            client.unregister_system_shared_memory(headers=headers)
    finally:
        client_memory.destroy_shared_memory_region(handle)

    assert ids.size == 3


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_perf_analyzer_with_shared_memory(keyed_server: Running, kind: str) -> None:
    """Its ``-H`` is sent with the calls that register regions, over gRPC as well."""
    client, headers, _ = connected(keyed_server, kind)
    client.close()
    ((header, key),) = headers.items()
    address = {"grpc": keyed_server.grpc, "http": keyed_server.http.removeprefix("http://")}
    line = [str(perf_analyzer.BUNDLED), "-m", "tokenizer", "-u", address[kind], "-i", kind]
    line += ["--shared-memory", "system", "--string-length", "8", "--request-count", "4"]

    refused = subprocess.run(line, capture_output=True, text=True, check=False, timeout=120)
    served = subprocess.run(
        [*line, "-H", f"{header}:{key}"], capture_output=True, text=True, check=False, timeout=120
    )

    assert "restricted, expecting header" in refused.stdout + refused.stderr
    assert served.returncode == 0, served.stdout + served.stderr


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_shared_memory_with_another_key(keyed_server: Running, kind: str) -> None:
    """No key, a wrong key, and the key of the administrative calls are all refused."""
    (server,) = keyed_server.servers
    client, headers, _ = connected(keyed_server, kind)
    (header,) = headers
    admin = (server.folder / "key").read_text()
    prefix = protocols.GRPC_PREFIX if kind == "grpc" else ""
    with closing(client):
        for wrong in ({}, {header: "x"}, {header: admin}, {prefix + protocols.ADMIN_HEADER: admin}):
            with pytest.raises(InferenceServerException, match="restricted, expecting header"):
                client.register_system_shared_memory("any", "/any", 1, headers=wrong)
        with pytest.raises(InferenceServerException, match="restricted, expecting header"):
            client.unload_model("pdserve", headers=headers)


def test_the_key_of_shared_memory_is_its_owners(keyed_server: Running) -> None:
    (server,) = keyed_server.servers
    file = server.folder / protocols.SHARED_MEMORY_KEY_FILE

    assert file.stat().st_mode & 0o777 == 0o600
    assert file.read_text() != (server.folder / "key").read_text()


@pytest.mark.parametrize("kind", ["http", "grpc"])
@pytest.mark.parametrize("where", ["input", "output"])
def test_a_region_that_nobody_registered(emulated_server: Running, kind: str, where: str) -> None:
    """Naming the arena's own region reads nothing, writes nothing, and reveals nothing."""
    (server,) = emulated_server.servers
    region = next(path for path in footprint.regions(server.token) if "-prefill-" in path.name).name
    client, _, module = connected(emulated_server, kind)
    given = module.InferInput("text_input", [1, 1], "BYTES")
    wanted = module.InferRequestedOutput("input_ids")
    given.set_data_from_numpy(np.array([[b"a"]], object))
    (given if where == "input" else wanted).set_shared_memory(region, 64)

    with closing(client), pytest.raises(InferenceServerException) as failed:
        client.infer("tokenizer", [given], outputs=[wanted])

    assert f"Unable to find shared memory region: '{region}'" in str(failed.value)


def test_no_page_that_is_open_names_a_region(emulated_server: Running) -> None:
    """Pages that are open without a key contain no region, nor the mark that all names share."""
    (server,) = emulated_server.servers
    for method, path, protocol in CALLS:
        if protocol in protocols.OPEN:
            assert server.token not in ask(emulated_server, method, path)[1], path
    with closing(tritonclient.grpc.InferenceServerClient(emulated_server.grpc)) as client:
        told = [client.get_server_metadata(), client.get_inference_statistics()]
        for model in ("pdserve", "prefill_0", "decode_0"):
            told += [client.get_model_config(model), client.get_model_metadata(model)]
    assert not any(server.token in str(page) for page in told)
    with urllib.request.urlopen(emulated_server.metrics, timeout=10) as page:
        assert server.token not in page.read().decode()


# ------------------------------------------------------------------------------------------ helpers


def ask(
    server: Running, method: str, path: str, headers: dict[str, str] | None = None
) -> tuple[int, str]:
    body = GENERATE if method == "POST" else None
    with closing(connect(server)) as connection:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return response.status, response.read().decode()


def refusal(server: Running, rpc: str, metadata: list[tuple[str, str]] | None) -> str:
    """Return the server's error for a call of an RPC; empty: none."""
    service = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    method = service.methods_by_name[rpc]
    request = getattr(service_pb2, method.input_type.name)()
    with grpc.insecure_channel(server.grpc) as channel:
        call = getattr(service_pb2_grpc.GRPCInferenceServiceStub(channel), rpc)
        try:
            if rpc == "ModelStreamInfer":
                for answer in call(iter([request]), timeout=10, metadata=metadata):
                    return str(answer.error_message)
            else:
                call(request, timeout=10, metadata=metadata)
        except grpc.RpcError as error:
            return str(error.details())
    return ""


def connected(server: Running, kind: str) -> tuple[Any, dict[str, str], ModuleType]:
    """Return a client of either protocol, and the headers that give it access to shared memory."""
    (one,) = server.servers
    file = one.folder / protocols.SHARED_MEMORY_KEY_FILE
    key = file.read_text() if file.exists() else ""
    if kind == "grpc":
        client = tritonclient.grpc.InferenceServerClient(server.grpc)
        headers = {protocols.GRPC_PREFIX + protocols.SHARED_MEMORY_HEADER: key}
        return client, headers, tritonclient.grpc
    client = tritonclient.http.InferenceServerClient(server.http.removeprefix("http://"))
    return client, {protocols.SHARED_MEMORY_HEADER: key}, tritonclient.http
