#!/usr/bin/env bash
# Triton 2.51.0 (release 24.10, in nvidia-pytriton 0.7.0): `timeout` and `priority` of a request
# are obeyed on /infer, and lose their meaning on /generate.
#
# Who is affected: everybody who calls a model through the generate extension and relies on
# Triton's queues, that is, on `priority_levels` or on a time limit of the single request.
# What happens: /infer takes "parameters": {"timeout": ..., "priority": ...} for the scheduler. The
# model then reads the timeout with request.timeout(), and has no way at all to read the priority:
# there is no request.priority(), and request.parameters() leaves both out. /generate hands the same
# two on as custom parameters, which the model does find in request.parameters(); the scheduler
# gives the request its default priority and no time limit, and nobody is told.
# What to do: call /infer or gRPC where these two must count. A Python model that wants to know the
# priority itself needs it as an input tensor, or as a parameter under another name.
#
# Seen:
#   infer:    timeout() 5000000, parameters() {'tenant': 'a'}, scheduled with priority 1
#   generate: timeout() 0, parameters() {'priority': 1, 'tenant': 'a', 'timeout': 5000000},
#             scheduled with priority 3
#
# Exit status: 0 while this is so, another as soon as it is not.
set -euo pipefail

work=$(mktemp -d)
server=
finish() {
    if [ -n "$server" ]; then
        kill -TERM "$server" 2>/dev/null || true
        timeout 20 tail --pid="$server" -f /dev/null || true
        kill -KILL -- "-$server" 2>/dev/null || true
        rm -f /dev/shm/"finding_${server}_"*
    fi
    rm -rf "$work"
}
trap finish EXIT

python3 -m venv "$work/venv"
python=$work/venv/bin/python
timeout 900 "$python" -m pip install --quiet --no-deps nvidia-pytriton==0.7.0 numpy==1.26.4

# The model answers with all that it can know of a request.
mkdir -p "$work/models/attributes/1" "$work/backends/python"
cat >"$work/models/attributes/config.pbtxt" <<'CONFIG'
backend: "python"
max_batch_size: 1
dynamic_batching { priority_levels: 3 default_priority_level: 3 }
input [{ name: "INPUT" data_type: TYPE_INT32 dims: [1] }]
output [{ name: "SEEN" data_type: TYPE_STRING dims: [1] }]
instance_group [{ kind: KIND_CPU }]
CONFIG
cat >"$work/models/attributes/1/model.py" <<'MODEL'
import json

import numpy as np
import triton_python_backend_utils as pb_utils


def seen(request):
    return {
        "timeout": request.timeout(),
        "parameters": json.loads(request.parameters() or "{}"),
        "priority readable": hasattr(request, "priority"),
    }


class TritonPythonModel:
    def execute(self, requests):
        answers = [np.array([[json.dumps(seen(request))]], dtype=object) for request in requests]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("SEEN", one)]) for one in answers]
MODEL

site=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
triton=$site/pytriton/tritonserver
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
library=$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("LIBDIR"))')
ln -s "$triton"/backends/python/{libtriton_python.so,triton_python_backend_utils.py} \
    "$triton/python_backend_stubs/$version/triton_python_backend_stub" "$work/backends/python/"
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0))
print(s.getsockname()[1])')
export LD_LIBRARY_PATH=$library PATH="$work/venv/bin:$PATH"
setsid bash -c 'exec "$0" "$@" --backend-config=python,shm-region-prefix-name=finding_$$_' \
    "$triton/bin/tritonserver" --model-repository="$work/models" \
    --backend-directory="$work/backends" --disable-auto-complete-config \
    --http-address=127.0.0.1 --http-port="$port" --allow-grpc=false --allow-metrics=false \
    --log-verbose=1 --exit-timeout-secs=5 >"$work/log" 2>&1 &
server=$!

timeout 180 "$python" - "$port" "$work/log" <<'CHECK'
import json
import pathlib
import re
import sys
import time
import urllib.request

BASE = f"http://127.0.0.1:{sys.argv[1]}/v2"
LOG = pathlib.Path(sys.argv[2])


def wait_until_ready():
    for _ in range(240):
        try:
            with urllib.request.urlopen(f"{BASE}/health/ready", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    sys.exit("the server did not become ready:\n" + LOG.read_text()[-2000:])


def ask(endpoint, body):
    request = urllib.request.Request(
        f"{BASE}/models/attributes/{endpoint}", data=json.dumps(body).encode()
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def scheduled_priority(name):
    """The priority that the server's core logs as it queues the request of this id."""
    line = re.compile(rf"request id: {name}, .* priority: (\d+), timeout")
    for _ in range(60):
        if found := line.search(LOG.read_text()):
            return int(found[1])
        time.sleep(0.5)
    sys.exit(f"request {name} is not in the log")


wait_until_ready()
parameters = {"timeout": 5_000_000, "priority": 1, "tenant": "a"}
tensor = {"name": "INPUT", "shape": [1, 1], "datatype": "INT32", "data": [1]}
answer = ask("infer", {"id": "by-infer", "inputs": [tensor], "parameters": parameters})
infer = json.loads(answer["outputs"][0]["data"][0])
answer = ask("generate", {"id": "by-generate", "INPUT": 1, "parameters": parameters})
generate = json.loads(answer["SEEN"])
generate["parameters"].pop("id", None)
infer["priority"] = scheduled_priority("by-infer")
generate["priority"] = scheduled_priority("by-generate")
print("infer:   ", infer)
print("generate:", generate)

expected_infer = {
    "timeout": 5_000_000,
    "parameters": {"tenant": "a"},
    "priority readable": False,
    "priority": 1,
}
expected_generate = {
    "timeout": 0,
    "parameters": parameters,
    "priority readable": False,
    "priority": 3,
}
if (infer, generate) != (expected_infer, expected_generate):
    sys.exit("CHANGED: this is no longer what the finding says")
print("unchanged: /generate takes timeout and priority for custom parameters")
CHECK
