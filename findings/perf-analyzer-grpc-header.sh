#!/usr/bin/env bash
# perf_analyzer of tritonclient 2.50.0, with Triton 2.51.0 (release 24.10, in nvidia-pytriton 0.7.0):
# a header given by -H is sent over gRPC, too, although the help says that it is ignored there.
#
# Who is affected: everybody who load-tests Triton over gRPC where something looks at metadata: a
# proxy that wants a token, routing by tenant, tracing.
# What happens: the help says of -H that the header is "ignored for GRPC requests". It arrives, as
# metadata of each request. People who believe the help conclude that such a set-up cannot be tested
# with perf_analyzer; or they leave the header of an HTTP test in the command line, and send it (it
# may be a secret) to a server that they did not mean to have it.
# What to do: give -H for metadata over gRPC, as name:value with the name in lower case, as gRPC wants
# it; remove it from command lines where it must not be sent.
#
# Seen, as the model's request.parameters(); --grpc-header-forward-pattern has Triton put it there:
#   without -H:          {}
#   -H x-tenant:finding: {'x-tenant': 'finding'}
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
timeout 900 "$python" -m pip install --quiet --no-deps \
    nvidia-pytriton==0.7.0 tritonclient==2.50.0 numpy==1.26.4

# perf_analyzer needs two libraries, which the Triton wheel has under other names.
site=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
mkdir "$work/lib"
ln -s "$site"/nvidia_pytriton.libs/libb64-*.so.0d "$work/lib/libb64.so.0d"
ln -s "$site"/nvidia_pytriton.libs/libcudart-*.so.12* "$work/lib/libcudart.so.12"

# The model writes down the parameters of each request.
mkdir -p "$work/models/echo/1" "$work/backends/python"
export SEEN=$work/seen
cat >"$work/models/echo/config.pbtxt" <<'CONFIG'
backend: "python"
input [{ name: "INPUT" data_type: TYPE_INT32 dims: [1] }]
output [{ name: "OUTPUT" data_type: TYPE_INT32 dims: [1] }]
instance_group [{ kind: KIND_CPU }]
CONFIG
cat >"$work/models/echo/1/model.py" <<'MODEL'
import os

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        answers = []
        for request in requests:
            with open(os.environ["SEEN"], "a") as seen:
                print(request.parameters() or "{}", file=seen)
            data = pb_utils.get_input_tensor_by_name(request, "INPUT").as_numpy()
            answers.append(pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT", data)]))
        return answers
MODEL

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
    --grpc-header-forward-pattern='x-.*' --exit-timeout-secs=5 >"$work/log" 2>&1 &
server=$!

timeout 400 "$python" - "$port" "$work" <<'CHECK'
import json
import os
import pathlib
import socket
import subprocess
import sys
import time

ADDRESS = ("127.0.0.1", int(sys.argv[1]))
WORK = pathlib.Path(sys.argv[2])
SEEN = WORK / "seen"


def wait_until_listening():
    """Triton opens its gRPC port when its models are loaded."""
    for _ in range(240):
        try:
            socket.create_connection(ADDRESS, timeout=5).close()
            return
        except OSError:
            time.sleep(0.5)
    sys.exit("the server did not start:\n" + (WORK / "log").read_text()[-2000:])


def perf_analyzer(*arguments):
    done = subprocess.run(
        [str(WORK / "venv/bin/perf_analyzer"), *arguments],
        env={**os.environ, "LD_LIBRARY_PATH": str(WORK / "lib")},
        capture_output=True, text=True, timeout=120, check=False,
    )
    return done.stdout + done.stderr


def parameters_of_requests(*header):
    """The distinct parameters that the model saw in a run with this header."""
    SEEN.write_text("")
    output = perf_analyzer(
        "-m", "echo", "-i", "grpc", "-u", "{}:{}".format(*ADDRESS), "--request-count", "8", *header
    )
    lines = set(SEEN.read_text().splitlines())
    if not lines:
        sys.exit(f"perf_analyzer sent no request:\n{output[-2000:]}")
    return [json.loads(line) for line in sorted(lines)]


wait_until_listening()
denied = "ignored for GRPC requests" in " ".join(perf_analyzer("--help").split())
without, with_header = parameters_of_requests(), parameters_of_requests("-H", "x-tenant:finding")
print("help says 'ignored for GRPC requests':", denied)
print("without -H:         ", *without)
print("-H x-tenant:finding:", *with_header)
if not (denied and without == [{}] and with_header == [{"x-tenant": "finding"}]):
    sys.exit("CHANGED: this is no longer what the finding says")
print("unchanged: perf_analyzer sends over gRPC a header that its help calls ignored")
CHECK
