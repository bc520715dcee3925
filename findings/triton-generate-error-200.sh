#!/usr/bin/env bash
# Triton 2.51.0 (release 24.10, in nvidia-pytriton 0.7.0): /generate answers HTTP 200 with an error
# in its body when a decoupled model gives another number of responses than one.
#
# Who is affected: everybody who calls a streaming model by /generate and judges by the status: load
# balancers, retry policies, health checks, curl --fail, benchmarks that count errors.
# What happens: a decoupled model may give no response, one, or several, which often depends on the
# request ("stream": true). With one, /generate answers with its tensors. With none or with two, all
# of them are dropped, and the answer is HTTP 200 and {"error": "..."}. The status looks reliable all
# the same, since an error that the model itself sends as its first response does get one of its own:
# 400, which blames the client, even where the model said UNAVAILABLE.
# What to do: look for the key "error" in every body of /generate, whatever the status; call
# /generate_stream whenever the number of responses is not known to be one.
#
# Seen:
#   1 response:       200 {"COUNT":0,"model_name":"several","model_version":"1"}
#   0 responses:      200 {"error":"generate expects model to produce exactly 1 response, ..."}
#   2 responses:      200 {"error":"generate expects model to produce exactly 1 response, ..."}
#   UNAVAILABLE:      400 {"error":"out of memory"}
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

# The model gives as many responses as it is asked for; fewer than none: UNAVAILABLE.
mkdir -p "$work/models/several/1" "$work/backends/python"
cat >"$work/models/several/config.pbtxt" <<'CONFIG'
backend: "python"
model_transaction_policy { decoupled: true }
input [{ name: "RESPONSES" data_type: TYPE_INT32 dims: [1] }]
output [{ name: "COUNT" data_type: TYPE_INT32 dims: [1] }]
instance_group [{ kind: KIND_CPU }]
CONFIG
cat >"$work/models/several/1/model.py" <<'MODEL'
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            asked = int(pb_utils.get_input_tensor_by_name(request, "RESPONSES").as_numpy()[0])
            for count in range(asked):
                tensor = pb_utils.Tensor("COUNT", np.array([count], dtype=np.int32))
                sender.send(pb_utils.InferenceResponse([tensor]))
            if asked < 0:
                error = pb_utils.TritonError("out of memory", pb_utils.TritonError.UNAVAILABLE)
                sender.send(pb_utils.InferenceResponse(error=error))
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
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


def generate(responses):
    body = json.dumps({"RESPONSES": responses}).encode()
    try:
        answer = urllib.request.urlopen(f"{BASE}/models/several/generate", body, timeout=30)
    except urllib.error.HTTPError as error:
        answer = error
    with answer:
        return answer.status, json.load(answer)


wait_until_ready()
one, none, two, failed = (generate(number) for number in (1, 0, 2, -1))
seen = {"1 response": one, "0 responses": none, "2 responses": two, "UNAVAILABLE": failed}
for what, (status, body) in seen.items():
    print(f"{what + ':':17} {status} {json.dumps(body)}")
unchanged = (
    one[0] == 200
    and one[1].get("COUNT") == 0
    and all(status == 200 and set(body) == {"error"} for status, body in (none, two))
    and failed[0] == 400
)
if not unchanged:
    sys.exit("CHANGED: this is no longer what the finding says")
print("unchanged: /generate reports an error with HTTP 200")
CHECK
