"""Tests for the Dockerfile without a container runtime: what it names exists and fits together."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import hatchling.build
import pytest
import typer

import bootstrap
from constraints import constraints
from pdctl import cli, signals
from pdctl.doctor import variables, versions
from pdctl.paths import ROOT
from pdserve import config
from tests.dockerfile import FINAL, HOME, TEXT, files, placed, read

ARGUMENTS, STAGES = read()
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()
DEPLOYMENTS = {"cpu": "docker/deployment.yaml", "gpu": "docker/deployment-gpu.yaml"}
# Commands of Debian's and Ubuntu's base systems.
SYSTEM = {"apt-get", "groupadd", "install", "rm", "useradd"}


def name_of(package: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[\[=<>~; ]", package)[0]).lower()


PINNED = {name_of(line) for line in (ROOT / "requirements.txt").read_text().splitlines()}
# What TensorRT-LLM lacks in its own image, in another version than there.
OF_THE_IMAGE = {versions.OPENAI}


def ignored(path: str) -> bool:
    """Tell whether .dockerignore excludes a path: the last pattern that matches it or a parent."""
    out = False
    parts = path.split("/")
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        if not pattern or line.startswith("#"):
            continue
        anywhere, last = pattern.startswith("**/"), pattern.split("/")[-1]
        candidates = parts if anywhere else parts[:1]
        if any(Path(part).match(last) for part in candidates):
            out = not line.startswith("!")
    return out


@pytest.fixture
def context(tmp_path: Path) -> Path:
    """Return a folder with the files that stage ``setup`` has copied at its beginning."""
    for copy in STAGES["setup"].copies:
        for file in files(copy.source):
            target = tmp_path / placed(copy, file)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / file).read_bytes())
    return tmp_path


@pytest.mark.parametrize("name", STAGES)
def test_every_source_is_in_the_context(name: str) -> None:
    for copy in STAGES[name].copies:
        if copy.origin:
            assert copy.origin in STAGES
            made = ROOT / Path(copy.source).relative_to(HOME)
            folders = [step.folder for step in bootstrap.steps()]
            assert any(made in (folder, folder.parent) for folder in folders), copy
        else:
            found = files(copy.source)
            assert found, f"{copy.source} is neither in git nor new"
            assert not [file for file in found if ignored(file)]


@pytest.mark.parametrize(
    "path",
    [
        ".git/config",
        ".venv/bin/python",
        ".cache/models/SmolLM2-135M-Instruct/model.safetensors",
        ".run/local/key",
        "kv.key",
        "docker/kv.key",
        "tests/servers.py",
        "perf/results/load.json",
        "python_backends/pdserve/__pycache__/config.cpython-311.pyc",
    ],
)
def test_what_stays_out_of_the_context(path: str) -> None:
    assert ignored(path)


@pytest.mark.parametrize("name", STAGES)
def test_every_command_exists(name: str) -> None:
    stage = STAGES[name]
    copies = [copy for copy in stage.copies if not copy.origin]
    there = {placed(copy, file) for copy in copies for file in files(copy.source)}
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    for program, *words in stage.commands:
        if program == "pdctl":
            commands[words[0]].make_context(words[0], words[1:])  # refuses unknown options
        elif program in ("python3", ".venv/bin/python") and words[:2] == ["-m", "pip"]:
            packages = [word for word in words[3:] if not word.startswith("-")]
            packages = [word for word in packages if "/" not in word and word != "."]
            if name == "gpu" and "." not in words:
                assert set(packages) >= OF_THE_IMAGE
                packages = sorted({*packages} - OF_THE_IMAGE)
            assert {name_of(package) for package in packages} <= PINNED
        elif program == "python3":
            assert {word for word in words if not word.startswith("-")} <= there
            assert words == ["tools/bootstrap.py"] or words[0] == "tools/constraints.py"
        else:
            assert program in SYSTEM


def test_the_set_up_has_all_that_it_reads(context: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "ROOT", context)
    assert [step.name for step in bootstrap.steps()][:2] == ["environment", "project"]
    tools = context / "tools"
    code = f"import sys; sys.path.insert(0, {str(tools)!r}); import bootstrap"
    subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True)


def test_the_project_is_installed_before_its_code_comes(
    context: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(context)
    (context / "out").mkdir()
    wheel = hatchling.build.build_editable(str(context / "out"))
    with zipfile.ZipFile(context / "out" / wheel) as archive:
        folders = archive.read("_pdserve.pth").decode().splitlines()
    assert folders == [str(context / "python_backends"), str(context / "tools")]


@pytest.mark.parametrize("name", FINAL)
def test_a_final_stage_serves_as_somebody(name: str) -> None:
    stage = STAGES[name]
    user, group = stage.one("USER").split(":")
    made = [words for words in stage.commands if words[0] in ("groupadd", "useradd")]
    assert int(user) > 0
    assert int(group) > 0
    assert [group, user] == [words[words.index(f"--{kind}") + 1] for words, kind in
                             zip(made, ("gid", "uid"), strict=True)]  # fmt: skip
    assert stage.instructions[-1][0] == "CMD", "everything else comes before"
    assert signal.Signals[stage.one("STOPSIGNAL")] in signals.ENDING
    assert stage.list("ENTRYPOINT") == ["tini", "--"]
    assert stage.list("CMD")[:2] == ["pdctl", "serve"]
    assert stage.health[:2] == ["pdctl", "probe"]


@pytest.mark.parametrize("name", FINAL)
def test_a_deployment_that_can_be_reached(name: str, tmp_path: Path) -> None:
    (copy,) = (copy for copy in STAGES[name].copies if copy.source == DEPLOYMENTS[name])
    assert placed(copy, copy.source) == "deployment.yaml", "where pdctl looks for it"
    file = tmp_path / "deployment.yaml"
    file.write_bytes((ROOT / copy.source).read_bytes())
    deployment = config.load(file)
    (server,) = deployment.servers
    assert server.host == "0.0.0.0"
    assert STAGES[name].one("EXPOSE").split() == [str(port) for port in server.ports]
    assert Path(deployment.transfer.key_file) == tmp_path / ".run" / "kv.key"
    if name == "cpu":
        model = bootstrap.CACHE.relative_to(ROOT) / "models" / bootstrap.MODEL_NAME
        assert Path(deployment.model) == tmp_path / model


def test_shared_memory_for_the_arenas() -> None:
    deployment = config.load(ROOT / DEPLOYMENTS["cpu"])
    arenas = deployment.prefill.arena_mib * len(deployment.instances("prefill"))
    sizes = re.findall(r"--shm-size=(\d+)g", TEXT + OPERATIONS)
    assert len(sizes) >= 4
    for size in map(int, sizes):
        assert arenas + 256 <= size << 10


def test_tags_are_of_the_range_that_is_documented() -> None:
    for text in (TEXT, OPERATIONS):
        (accepted,) = re.findall(r"ccepted(?:: | are )(\d\d\.\d\d) to (\d\d\.\d\d)", text)
        oldest, newest = accepted
        assert oldest <= ARGUMENTS["TRITON_TAG"] <= newest
    python = re.match(r"(\d+)\.(\d+)-slim-bookworm$", ARGUMENTS["PYTHON_TAG"])
    assert python is not None
    assert (int(python[1]), int(python[2])) in bootstrap.SUPPORTED
    assert {STAGES[name].base for name in ("setup", "cpu")} == {"python:${PYTHON_TAG}"}
    assert STAGES["gpu"].base == "nvcr.io/nvidia/tritonserver:${TRITON_TAG}-trtllm-python-py3"


def test_the_image_of_tensorrt_llm_keeps_its_python() -> None:
    """From 26.04 on its packages are in a virtual environment, which is nothing before that."""
    gpu = STAGES["gpu"]
    path = gpu.environment["PATH"].split(":")
    assert path == ["/opt/tritonserver/bin", "/opt/venv-tritonserver/bin", "${PATH}"]
    words = [word for word, text in gpu.instructions if "PATH=" in text or "pip install" in text]
    assert words == ["ENV", "RUN"], "the environment is chosen before anything is installed"
    for text in gpu.all("RUN"):
        assert text.count("--break-system-packages") == text.count("pip install")
    (installed, project) = [words for words in gpu.commands if "pip" in words]
    assert "--constraint" in installed
    assert "--no-deps" in project, "pyproject.toml wants the embedded Triton's numpy"


def test_no_statistics_of_use_are_sent() -> None:
    for name, values in variables.NO_STATISTICS.items():
        if name in STAGES["gpu"].environment:
            assert STAGES["gpu"].environment[name] in values
    assert "TRTLLM_NO_USAGE_STATS" in STAGES["gpu"].environment


def test_nothing_is_kept_that_should_not_be() -> None:
    assert "://" not in TEXT, "the builder configures the indexes"
    for stage in STAGES.values():
        for text in stage.all("RUN"):
            if "pip install" in text:
                assert text.count("--no-cache-dir") == text.count("pip install")
            if "apt-get install" in text:
                assert "rm -rf /var/lib/apt/lists/*" in text
            if "bootstrap" in text or "pip install" in text:
                assert "--mount=type=secret,id=pip,target=/etc/pip.conf" in text
    assert STAGES["setup"].environment["PIP_NO_CACHE_DIR"] == "1"


def test_what_is_installed_stays_as_it_is() -> None:
    lines = ["# Pins.", "numpy==1.0", "no-such-package==3 ; python_version < '3.11'", ""]
    import numpy as np

    assert list(constraints(lines)) == [f"numpy=={np.__version__}", lines[2]]
