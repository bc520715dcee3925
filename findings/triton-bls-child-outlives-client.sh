#!/usr/bin/env bash
# Triton 2.51.0 (release 24.10, in nvidia-pytriton 0.7.0): a model that a Python model calls (business
# logic scripting, BLS) works on when the client has gone, and does not know whose request it serves.
#
# Who is affected: everybody who puts a Python model in front of others (a router, a tokenizer, a
# gateway of a language model) and expects the inner models to stop when the client has gone.
# What happens: the outer model's request.is_cancelled() turns True when the gRPC client cancels or
# its time is over. The request that the outer model makes by InferenceRequest.exec() stays as it is:
# its is_cancelled() is False to the end, and the outer model cannot cancel it, since InferenceRequest
# has no cancel() in this version. The request id, the parameters and the timeout do not go along
# either: the inner model sees '', {} and 0.
# What to do: hand request_id, parameters and timeout to InferenceRequest() yourself, by its arguments
# of these names. Ask the inner model for little work at a time, or reach it as a gRPC client of the
# same server, whose calls can be cancelled.
#
# Seen, after a client that cancelled while the inner model was at work, which went on for 3 s:
#   outer: is_cancelled True, id 'finding', timeout 60000000, parameters {'tenant': 'a'}
#   inner: is_cancelled False, id '', timeout 0, parameters {}
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
timeout 900 "$python" -m pip install --quiet --no-deps nvidia-pytriton==0.7.0 numpy==1.26.4 \
    tritonclient==2.73.0 grpcio==1.85.1 protobuf==6.33.6 python-rapidjson==1.25 urllib3==2.8.0 \
    typing_extensions==4.16.0 ml_dtypes==0.5.4 packaging==26.4

# Both models write down what they know of their request: the inner one works on for 3 s after the
# client has gone, unless it notices; then the outer one.
mkdir -p "$work"/models/{outer,inner}/1 "$work/backends/python"
export WORK=$work
cat >"$work/models/outer/config.pbtxt" <<'CONFIG'
backend: "python"
input [{ name: "INPUT" data_type: TYPE_INT32 dims: [1] }]
output [{ name: "OUTPUT" data_type: TYPE_INT32 dims: [1] }]
instance_group [{ kind: KIND_CPU }]
CONFIG
cp "$work/models/outer/config.pbtxt" "$work/models/inner/"
cat >"$work/models/inner/1/model.py" <<'MODEL'
import json
import os
import pathlib
import time

import triton_python_backend_utils as pb_utils

WORK = pathlib.Path(os.environ["WORK"])


def write_down(model, request):
    known = {
        "is_cancelled": request.is_cancelled(),
        "id": request.request_id(),
        "timeout": request.timeout(),
        "parameters": json.loads(request.parameters() or "{}"),
        "cancel offered": hasattr(pb_utils.InferenceRequest, "cancel"),
    }
    with (WORK / "seen").open("a") as seen:
        print(json.dumps({model: known}), file=seen)


def wait(seconds, over):
    end = time.monotonic() + seconds
    while time.monotonic() < end and not over():
        time.sleep(0.05)


class TritonPythonModel:
    def execute(self, requests):
        answers = []
        for request in requests:
            (WORK / "begun").touch()
            wait(30, (WORK / "gone").exists)
            wait(3, request.is_cancelled)
            write_down("inner", request)
            data = pb_utils.get_input_tensor_by_name(request, "INPUT").as_numpy()
            answers.append(pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT", data)]))
        return answers
MODEL
{
    sed '/^class/,$d' "$work/models/inner/1/model.py"
    cat <<'MODEL'
class TritonPythonModel:
    def execute(self, requests):
        answers = []
        for request in requests:
            inner = pb_utils.InferenceRequest(
                model_name="inner", requested_output_names=["OUTPUT"], inputs=request.inputs()
            ).exec()
            write_down("outer", request)
            answers.append(pb_utils.InferenceResponse(inner.output_tensors(), error=inner.error()))
        return answers
MODEL
} >"$work/models/outer/1/model.py"

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
    --grpc-address=127.0.0.1 --grpc-port="$port" --allow-http=false --allow-metrics=false \
    --exit-timeout-secs=5 >"$work/log" 2>&1 &
server=$!

timeout 180 "$python" - "$port" "$work" <<'CHECK'
import json
import pathlib
import queue
import sys
import time

import numpy as np
from tritonclient import grpc as triton
from tritonclient.utils import InferenceServerException

WORK = pathlib.Path(sys.argv[2])
client = triton.InferenceServerClient(f"127.0.0.1:{sys.argv[1]}")


def wait_until_ready():
    for _ in range(240):
        try:
            if client.is_server_ready(client_timeout=5):
                return
        except InferenceServerException:
            pass
        time.sleep(0.5)
    sys.exit("the server did not become ready:\n" + (WORK / "log").read_text()[-2000:])


def lines_of(name, number):
    """The lines of a file that the models write, when it has as many."""
    for _ in range(120):
        if (WORK / name).exists():
            lines = (WORK / name).read_text().splitlines()
            if len(lines) >= number:
                return lines
        time.sleep(0.5)
    sys.exit(f"the models did not write {name}:\n" + (WORK / "log").read_text()[-2000:])


wait_until_ready()
tensor = triton.InferInput("INPUT", [1], "INT32")
tensor.set_data_from_numpy(np.array([1], dtype=np.int32))
ended = queue.Queue()
call = client.async_infer(
    "outer", [tensor], lambda result, error: ended.put(error),
    request_id="finding", timeout=60_000_000, parameters={"tenant": "a"},
)
lines_of("begun", 0)
call.cancel()
print("client:", ended.get(timeout=30))
(WORK / "gone").touch()
saw = {name: seen for line in lines_of("seen", 2) for name, seen in json.loads(line).items()}
print("outer: ", saw["outer"])
print("inner: ", saw["inner"])
outer = {
    "is_cancelled": True, "id": "finding", "timeout": 60_000_000, "parameters": {"tenant": "a"},
    "cancel offered": False,
}
inner = {
    "is_cancelled": False, "id": "", "timeout": 0, "parameters": {}, "cancel offered": False,
}
if saw != {"outer": outer, "inner": inner}:
    sys.exit("CHANGED: this is no longer what the finding says")
print("unchanged: the inner model neither stops nor knows whose request it serves")
CHECK
