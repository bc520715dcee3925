#!/usr/bin/env bash
# Triton 2.51.0 (release 24.10, in nvidia-pytriton 0.7.0): an integer in a JSON request that does not
# fit into its input is cut to its low bits, and the request is served with what is left.
#
# Who is affected: everybody who sends JSON over HTTP, by /generate or by /infer: limits such as
# max_tokens, seeds, token ids. Binary tensors and gRPC have the width of their type and are not
# affected.
# What happens: the value is read as 64 bits and narrowed to INT8, INT16, INT32, UINT8, ... without a
# look at its range. 4294967298 arrives at an INT32 input as 2 and 300 at an INT8 input as 44; neither
# the client nor the model is told. A fraction or a word in the same place is refused.
# What to do: check ranges in the client, or in a proxy, before Triton reads the body. The model
# cannot: it sees a value that is in range.
#
# Seen:
#   generate:  200 {"GIVEN": [2, 44], ...}     of INT32 4294967298 and INT8 300
#   infer:     200 {..., "data": [2, 1]}       of INT32 4294967298 and INT8 1
#   1.5:       500 {"error": "Unable to parse 'data': ..."}
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

# The model gives back what it was given.
mkdir -p "$work/models/echo/1" "$work/backends/python"
cat >"$work/models/echo/config.pbtxt" <<'CONFIG'
backend: "python"
input [{ name: "WIDE" data_type: TYPE_INT32 dims: [1] }, { name: "NARROW" data_type: TYPE_INT8 dims: [1] }]
output [{ name: "GIVEN" data_type: TYPE_INT32 dims: [2] }]
instance_group [{ kind: KIND_CPU }]
CONFIG
cat >"$work/models/echo/1/model.py" <<'MODEL'
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        def given(request, name):
            return int(pb_utils.get_input_tensor_by_name(request, name).as_numpy()[0])

        return [
            pb_utils.InferenceResponse(
                [pb_utils.Tensor("GIVEN", np.array([given(r, "WIDE"), given(r, "NARROW")], np.int32))]
            )
            for r in requests
        ]
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
    --exit-timeout-secs=5 >"$work/log" 2>&1 &
server=$!

timeout 180 "$python" - "$port" "$work/log" <<'CHECK'
import json
import pathlib
import sys
import time
import urllib.error
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


def post(how, body):
    request = json.dumps(body).encode()
    try:
        answer = urllib.request.urlopen(f"{BASE}/models/echo/{how}", request, timeout=30)
    except urllib.error.HTTPError as error:
        answer = error
    with answer:
        return answer.status, json.load(answer)


def tensor(name, kind, value):
    return {"name": name, "datatype": kind, "shape": [1], "data": [value]}


wait_until_ready()
wide, narrow = 2**32 + 2, 300
generated = post("generate", {"WIDE": wide, "NARROW": narrow})
inferred = post("infer", {"inputs": [tensor("WIDE", "INT32", wide), tensor("NARROW", "INT8", 1)]})
fraction = post("generate", {"WIDE": 1.5, "NARROW": 1})
for what, (status, body) in {"generate": generated, "infer": inferred, "1.5": fraction}.items():
    print(f"{what + ':':10} {status} {json.dumps(body)}")
unchanged = (
    generated[0] == inferred[0] == 200
    and generated[1].get("GIVEN") == [2, 44]
    and inferred[1]["outputs"][0]["data"] == [2, 1]
    and fraction[0] != 200
)
if not unchanged:
    sys.exit("CHANGED: this is no longer what the finding says")
print("unchanged: integers that do not fit are cut to their low bits")
CHECK
