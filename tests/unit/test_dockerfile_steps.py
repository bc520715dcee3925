"""Runs the step of target gpu that installs packages, in a Python that has what the image has.

It is no container: Triton, TensorRT-LLM and torch are not there. It needs a package index.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from pdctl.paths import ROOT
from tests.dockerfile import files, placed, read

pytestmark = pytest.mark.full

THEIRS = {"numpy": "1.26.4", "openai": "1.107.3", "transformers": "4.57.1"}
"""Packages as in images 26.04 to 26.07, as far as they are known."""
VERSIONS = """
import json, sys
from importlib import metadata
print(json.dumps({name: metadata.version(name) for name in sys.argv[1:]}))
"""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Return a folder with the context's files as ``pdserve``, and the Python as ``venv``."""
    venv.create(tmp_path / "venv", with_pip=True, symlinks=True)
    run(tmp_path, f"python3 -m pip install {' '.join(f'{n}=={v}' for n, v in THEIRS.items())}")
    for copy in read()[1]["gpu"].copies:
        for file in files(copy.source):
            target = tmp_path / "pdserve" / placed(copy, file)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, target)
    return tmp_path


def run(image: Path, line: str, *, status: int = 0) -> str:
    """Run a line of shell where PATH has that Python; return what it prints."""
    (image / "pdserve").mkdir(exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    path = {"PATH": f"{image / 'venv' / 'bin'}:/usr/bin:/bin", "HOME": str(image)}
    done = subprocess.run(
        ["sh", "-ec", line],
        cwd=image / "pdserve",
        env=kept | path,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


def versions(image: Path, *names: str) -> dict[str, str]:
    found: dict[str, str] = json.loads(run(image, f"python3 -c '{VERSIONS}' {' '.join(names)}"))
    return found


@pytest.mark.skipif(sys.version_info < (3, 11), reason="transformers 4.57 is tried with one Python")
def test_the_packages_of_the_image_stay_and_pdctl_runs(image: Path) -> None:
    before = versions(image, *THEIRS, "tokenizers", "huggingface-hub")
    (step,) = (text for text in read()[1]["gpu"].all("RUN") if "pip install" in text)
    step = re.sub(r"--mount=\S+", "", step).replace("/tmp/", f"{image}/")
    run(image, step)

    after = versions(image, *before, "pdserve")
    assert after.pop("openai").startswith("1.")
    assert {name: after[name] for name in before if name != "openai"} == {
        name: version for name, version in before.items() if name != "openai"
    }
    module = "openai.types.responses.response_content_part_added_event"
    run(image, f"python3 -c 'from {module} import PartReasoningText'")
    told = json.loads(run(image, "pdctl doctor --json", status=3))
    assert told["inventory"]["software"]["packages"]["numpy"] == THEIRS["numpy"]
    problems = {one["about"] for one in told["findings"] if one["state"] == "problem"}
    assert {"Triton", "tensorrt_llm", "GPUs", "model"} >= problems
