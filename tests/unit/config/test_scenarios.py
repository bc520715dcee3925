"""Tests for the scenarios of deployment.yaml: the allowed fields, and errors that name the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from pdctl.paths import ROOT
from pdserve import config
from pdserve.errors import DeploymentError

if TYPE_CHECKING:
    from pathlib import Path

FILE: dict[str, Any] = {
    "model": "m",
    "servers": [
        {
            "name": "local",
            "prefill": ["prefill_0", "prefill_1"],
            "decode": ["decode_0", "decode_1"],
        }
    ],
    "gateway": {"default_scenario": "chat"},
    "scenarios": [
        {
            "name": "chat",
            "groups": [{"name": "chat_a", "prefill": ["prefill_0"], "decode": ["decode_0"]}],
        },
        {
            "name": "code",
            "rules": [{"prefix": "def "}, {"tenant": "acme", "model": "scheduler"}],
            "ttft_limit_ms": 500,
            "tpot_limit_ms": 40,
            "max_tokens": 64,
            "sampling": {"temperature": 0.2},
            "priority": 3,
            "shared_prefixes": True,
            "groups": [
                {"name": "code_a", "prefill": ["prefill_1"], "decode": ["decode_1"], "share": 2}
            ],
        },
    ],
}


def load(folder: Path, wanted: dict[str, Any]) -> config.Deployment:
    file = folder / "deployment.yaml"
    file.write_bytes(msgspec.yaml.encode(wanted))
    return config.load(file)


def test_all_that_can_be_said(tmp_path: Path) -> None:
    deployment = load(tmp_path, FILE)
    assert deployment.served == deployment.scenarios
    chat, code = deployment.scenarios
    assert chat.rules == ()
    assert (chat.ttft_limit_ms, chat.max_tokens, chat.priority) == (None, None, 0)
    assert not chat.shared_prefixes
    assert chat.groups[0].share == 1
    assert code.rules[1] == config.Rule(tenant="acme", model="scheduler")
    assert code.sampling == config.SamplingDefaults(temperature=0.2)
    assert msgspec.yaml.decode(msgspec.yaml.encode(deployment), type=config.Deployment) == (
        deployment
    ), "the file as it is rendered for a server"


def test_the_example() -> None:
    chat, code = config.load(ROOT / "deployments" / "scenarios.yaml").scenarios
    assert (chat.name, code.name, len(code.rules)) == ("chat", "code", 2)


def test_without_scenarios_there_is_one_of_everybody(tmp_path: Path) -> None:
    wanted = {name: FILE[name] for name in ("model", "servers")}
    deployment = load(tmp_path, wanted)
    everyone = config.Group("default", ("prefill_0", "prefill_1"), ("decode_0", "decode_1"))
    assert deployment.served == (config.Scenario("default", (everyone,)),)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("scenarios.0.groups.0.prefill", ["prefill_1"], "prefill_1 is in the groups chat_a and"),
        ("scenarios.0.groups.0.decode", ["decode_1"], "decode_1 is in the groups chat_a and"),
        ("scenarios.0.groups.0.decode", ["decode_7"], "group chat_a: .* decode decode_7; there"),
        ("scenarios.0.groups.0.prefill", ["decode_0"], "group chat_a: .* prefill decode_0; there"),
        ("servers.0.decode", ["decode_0", "decode_1", "idle"], "decode idle is in no group"),
        ("servers.0.prefill", ["prefill_0", "prefill_1", "idle"], "prefill idle is in no group"),
        ("scenarios.0.groups.0.prefill", [], r"length >= 1 - at `\$\.scenarios\[0\]\.groups\[0\]"),
        ("scenarios.0.groups.0.decode", None, r"groups\[0\]\.decode"),
        ("scenarios.0.groups", [], r"scenarios\[0\]\.groups"),
        ("scenarios.0.groups.0.name", "code_a", "group code_a is used more than once"),
        ("scenarios.0.name", "code", "scenario code is used more than once"),
        ("scenarios.1.groups.0.share", 0, "scenario code: every group's share is 0"),
        ("scenarios.1.groups.0.share", -1, r"groups\[0\]\.share"),
        (
            "scenarios.1.rules.0",
            {},
            r"at least one of prefix.*\.scenarios\[1\]\.rules\[0\]",
        ),
        ("scenarios.1.rules.1.model", "prefill_0", r"'prefill_0'.*rules\[1\]\.model"),
        ("scenarios.1.sampling.top_p", 0, r"scenarios\[1\]\.sampling\.top_p"),
        ("scenarios.1.sampling.seed", 1, "seed"),
        ("scenarios.1.tpot_limit_ms", 0, r"scenarios\[1\]\.tpot_limit_ms"),
        ("gateway.default_scenario", "prose", "default_scenario: prose is none of: chat, code"),
        ("gateway", {}, "default_scenario: default is none of: chat, code"),
    ],
)
def test_an_error_names_the_thing(tmp_path: Path, path: str, value: Any, message: str) -> None:
    wanted = msgspec.yaml.decode(msgspec.yaml.encode(FILE))
    *way, last = path.split(".")
    place = wanted
    for step in way:
        place = place[int(step) if isinstance(place, list) else step]
    place[int(last) if isinstance(place, list) else last] = value
    with pytest.raises(DeploymentError, match=message):
        load(tmp_path, wanted)
