"""Tests for replacing the running deployment: a change is found, compared, applied or refused."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from pdserve import config
from pdserve.config.reloading import DeploymentFile, changes, taken_over
from pdserve.errors import DeploymentError
from tests.unit.config.test_scenarios import FILE

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "deployment.yaml"
    file.write_bytes(msgspec.yaml.encode(FILE))
    return file


def deployment(path: Path, **sections: Any) -> config.Deployment:
    """Return the deployment of the file with these sections replaced."""
    path.write_bytes(msgspec.yaml.encode({**FILE, **sections}))
    return config.load(path)


# ----------------------------------------------------------------------------------------- the file


def test_a_change_is_seen_once(path: Path) -> None:
    file = DeploymentFile(path)
    assert not file.changed()
    wanted = deployment(path, model="other")
    assert file.changed()
    assert file.deployment == wanted
    assert not file.changed()


def test_a_change_that_says_the_same_is_none(path: Path) -> None:
    file = DeploymentFile(path)
    path.write_text("# a comment\n" + path.read_text())
    assert not file.changed()


def test_a_file_put_in_its_place_is_seen(path: Path) -> None:
    """A replaced file is seen though it has the same size and time, as an editor may leave it."""
    file = DeploymentFile(path)
    before = path.stat()
    other = path.with_name("other")
    other.write_text(path.read_text().replace("model: m", "model: n"))
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)
    assert file.changed()


@pytest.mark.parametrize("text", ["model: [", "model: m", None])
def test_an_error_is_told_once_and_the_old_one_stays(path: Path, text: str | None) -> None:
    file = DeploymentFile(path)
    before = file.deployment
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    with pytest.raises(DeploymentError, match=str(path)):
        file.changed()
    assert file.deployment == before
    assert not file.changed()
    deployment(path, gateway={"default_scenario": "code"})
    assert file.changed()


# --------------------------------------------------------------------------------------- comparison


def test_every_field_that_differs_is_named_with_both_values(path: Path) -> None:
    before = config.load(path)
    chat, code = FILE["scenarios"]
    after = deployment(
        path,
        gateway={"default_scenario": "chat", "strict": True},
        engine={"kind": "emulated"},
        scenarios=[
            chat,
            {
                **code,
                "ttft_limit_ms": 250,
                "rules": [{"prefix": "def "}],
                "groups": [{**code["groups"][0], "share": 3}],
            },
        ],
    )
    prefix = '{"prefix":"def ","tenant":null,"model":null}'
    acme = '{"prefix":null,"tenant":"acme","model":"scheduler"}'
    assert changes(before, after) == [
        'engine.kind: "torch" -> "emulated"',
        "gateway.strict: false -> true",
        "scenarios.code.groups.code_a.share: 2.0 -> 3.0",
        f"scenarios.code.rules: [{prefix},{acme}] -> [{prefix}]",
        "scenarios.code.ttft_limit_ms: 500 -> 250",
    ]
    assert changes(after, after) == []


def test_what_comes_and_goes_is_named(path: Path) -> None:
    before = config.load(path)
    everyone = {"name": "all", "prefill": ["prefill_0", "prefill_1", "prefill_2"]}
    after = deployment(
        path,
        servers=[
            *FILE["servers"],
            {"name": "more", "http_port": 1, "grpc_port": 2, "metrics_port": 3}
            | {"prefill": ["prefill_2"]},
        ],
        scenarios=[
            {"name": "chat", "groups": [everyone | {"decode": ["decode_0", "decode_1"]}]},
        ],
    )
    assert changes(before, after) == [
        "servers.more: added",
        "scenarios.chat.groups.chat_a: removed",
        "scenarios.chat.groups.all: added",
        "scenarios.code: removed",
    ]


def test_order_counts_where_rules_depend_on_it(path: Path) -> None:
    before = config.load(path)
    after = deployment(path, scenarios=FILE["scenarios"][::-1])
    assert changes(before, after) == ["scenarios: in another order"]


# -------------------------------------------------------------------------------- applying a change


def test_gateways_take_over_traffic_and_leave_what_is_built_into_processes(path: Path) -> None:
    running = config.load(path)
    wanted = deployment(
        path,
        model="other",
        engine={"kind": "emulated"},
        prefill={"slots": 9},
        decode={"slots": 9},
        transfer={"pulls": 9},
        servers=[{**FILE["servers"][0], "grpc_port": 9}],
        gateway={"default_scenario": "code", "strict": True, "ttft_limit_ms": 9, "channel": "bls"},
    )
    taken = taken_over(running, wanted)
    assert changes(running, taken) == [
        "servers.local.grpc_port: 8001 -> 9",
        "gateway.ttft_limit_ms: 60000 -> 9",
        'gateway.default_scenario: "chat" -> "code"',
        "gateway.strict: false -> true",
    ]
    waiting = [line.partition(":")[0] for line in changes(taken, wanted)]
    assert waiting == [
        "model",
        "engine.kind",
        "prefill.slots",
        "decode.slots",
        "gateway.channel",
        "transfer.pulls",
    ]
