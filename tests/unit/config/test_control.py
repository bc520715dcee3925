"""Tests for the section ``control``: defaults, and errors that name value and what is allowed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from pdserve import config
from pdserve.config.control import QUIET_S
from pdserve.config.reloading import taken_over
from pdserve.errors import DeploymentError
from pdserve.transfer.producer import lease_manager
from tests.unit.config.test_scenarios import load

if TYPE_CHECKING:
    from pathlib import Path

FILE: dict[str, Any] = {
    "model": "m",
    "servers": [
        {
            "name": "local",
            "prefill": ["prefill_0", "prefill_1", "prefill_2"],
            "decode": ["decode_0", "decode_1"],
        }
    ],
}


def tide(**fields: Any) -> dict[str, Any]:
    """Return a tide that is valid without these fields."""
    night = {"start": "22:00", "end": "06:00"}
    return {"group": "default", "to": "training", "hours": [night], **fields}


def problem(folder: Path, **control: Any) -> str:
    """Return the error of a file with this section."""
    with pytest.raises(DeploymentError) as raised:
        load(folder, {**FILE, "control": {"id": "chat", **control}})
    return str(raised.value)


def test_a_file_without_the_section_is_static(tmp_path: Path) -> None:
    assert load(tmp_path, FILE).control is None


def test_defaults(tmp_path: Path) -> None:
    deployment = load(tmp_path, {**FILE, "control": {"id": "chat"}})
    assert deployment.control
    assert (deployment.control.ratio, deployment.control.etcd) == ("advise", None)
    assert deployment.drain_s == 30 + QUIET_S + 10
    bounds = deployment.control.groups
    assert bounds == {}


def test_a_spare_is_in_no_group(tmp_path: Path) -> None:
    deployment = load(tmp_path, {**FILE, "control": {"id": "chat", "spares": ["prefill_2"]}})
    (group,) = deployment.served[0].groups
    assert group.prefill == ("prefill_0", "prefill_1")
    scenario = {
        "name": "default",
        "groups": [
            {"name": "a", "prefill": ["prefill_0", "prefill_1"], "decode": ["decode_0", "decode_1"]}
        ],
    }
    with pytest.raises(DeploymentError, match="prefill prefill_2 is in no group"):
        load(tmp_path, {**FILE, "scenarios": [scenario], "control": {"id": "chat"}})
    with_spare = {"id": "chat", "spares": ["prefill_2"]}
    load(tmp_path, {**FILE, "scenarios": [scenario], "control": with_spare})
    with_other = {"id": "chat", "spares": ["prefill_2", "prefill_0"]}
    with pytest.raises(DeploymentError, match="prefill_0 is in the group a; a spare is in none"):
        load(tmp_path, {**FILE, "scenarios": [scenario], "control": with_other})


@pytest.mark.parametrize(
    ("control", "named"),
    [
        (
            {"drain_s": 35},
            "control.drain_s: 35; allowed: more than 35, the sum of prefill.lease_s 30",
        ),
        ({"spares": ["other"]}, "control.spares: there is no instance other; there are: prefill_0"),
        ({"spares": ["decode_0", "decode_1"]}, "every decode is one"),
        ({"groups": {"chat": {}}}, "there is no group chat; there are: default"),
        (
            {"groups": {"default": {"least_prefill": 4}}},
            "control.groups.default.least_prefill: 4; the group has 3 at first",
        ),
        ({"groups": {"default": {"most": 4}}}, "most: 4; the group has 5 instances at first"),
        ({"budget": 4}, "control.budget: 4; the deployment loads 5 instances at first"),
        ({"tides": [tide(group="other")]}, "tides[0].group: there is no other; there are: default"),
        ({"tides": [tide(to="default")]}, "tides[0].to: default is the group itself"),
        ({"tides": [tide(), tide()]}, "tides[1].group: the whole group default goes by another"),
        ({"tides": [tide(prefill=2)]}, "tides[0].prefill: 2; allowed: 0 to 1, of 3 at first"),
        ({"tides": [tide(decode=1)]}, "tides[0].decode: 1; allowed: 0 to 0, of 2 at first"),
        ({"tides": [tide(prefill=0)]}, "prefill and decode are both 0"),
        ({"tides": [tide(volume=True)]}, "one of hours and volume"),
        ({"tides": [tide(hours=[])]}, "one of hours and volume"),
        ({"tides": [tide(hours=[{"start": "24:00", "end": "06:00"}])]}, "24:00"),
        ({"tides": [tide(hours=[{"start": "06:00", "end": "06:00"}])]}, "start and end are both"),
        ({"tides": [tide(hours=[{"start": "1:00", "end": "06:00"}])]}, "1:00"),
        ({"ratio": "always"}, "'always' is not allowed; allowed: act, advise, never"),
        ({"id": "Chat"}, "Chat"),
        ({"etcd": {"endpoints": []}}, "control.etcd.endpoints"),
        ({"etcd": {"endpoints": ["h:99999"]}}, "port 99999 of h:99999 is not allowed"),
        ({"etcd": {"endpoints": ["h:1"], "key": "k"}}, "certificate and key are given together"),
        ({"etcd": {"endpoints": ["h:1"], "user": "u"}}, "user and password_file"),
        (
            {"etcd": {"endpoints": ["h:1"], "user": "u", "password_file": "p"}},
            "needs TLS, and so a ca",
        ),
        ({"metrics_port": 8001}, "control.metrics_port: 8001 is a port of server local"),
    ],
)
def test_errors_name_what_is_wrong(tmp_path: Path, control: dict[str, Any], named: str) -> None:
    assert named in problem(tmp_path, **control)


def test_hours_are_read_as_they_are_written(tmp_path: Path) -> None:
    file = tmp_path / "deployment.yaml"
    load(tmp_path, FILE)
    text = file.read_text() + (
        "control: {id: chat, tides: [{group: default, to: training, prefill: 1, "
        "hours: [{start: 22:00, end: 06:30, days: [sat, sun]}]}]}\n"
    )
    file.write_text(text)
    control = config.load(file).control
    assert control
    assert control.tides == (
        config.Tide("default", "training", (config.Hours("22:00", "06:30", ("sat", "sun")),), 1),
    )


def test_files_of_etcd_are_relative_to_the_deployment(tmp_path: Path) -> None:
    etcd = {"endpoints": ["h:1"], "ca": "ca.pem", "user": "u", "password_file": "/etc/password"}
    deployment = load(tmp_path, {**FILE, "control": {"id": "chat", "etcd": etcd}})
    assert deployment.control
    assert deployment.control.etcd
    assert deployment.control.etcd.ca == str(tmp_path / "ca.pem")
    assert deployment.control.etcd.password_file == "/etc/password"
    assert deployment.control.etcd.certificate is None


def test_a_reload_changes_bounds_and_not_the_store(tmp_path: Path) -> None:
    running = load(tmp_path, {**FILE, "control": {"id": "chat"}})
    wanted = load(tmp_path, {**FILE, "control": {"id": "chat", "ratio": "act"}})
    assert taken_over(running, wanted) == wanted
    moved = load(tmp_path, {**FILE, "control": {"id": "other", "ratio": "act"}})
    assert taken_over(running, moved) == running
    assert taken_over(running, load(tmp_path, FILE)) == running


def test_the_quiet_time_is_that_of_the_leases() -> None:
    assert QUIET_S == lease_manager.QUIET_S
