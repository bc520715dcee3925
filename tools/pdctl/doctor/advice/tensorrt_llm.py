"""Findings about an installed TensorRT-LLM: whether it can be used, and what it does unasked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pdctl.doctor.advice.finding import Finding
from pdctl.doctor.advice.needs import Needs
from pdctl.doctor.inventory import Inventory
from pdctl.doctor.variables import NO_STATISTICS
from pdctl.doctor.versions import OPENAI, READ, STATISTICS, SUPPORTED, within
from pdserve.config import Deployment
from pdserve.config.llm_options import BACKEND_VARIABLES

NAME = "tensorrt_llm"
_MENDS = (
    (
        ("PartReasoningText", "openai"),
        f"pip install -U '{OPENAI}'",
    ),
    (
        ("libcuda", "libnvidia-ml"),
        "a GPU and its driver; in a container: --gpus all",
    ),
)
"""What mends an import, by words of its error; otherwise it is another image that does."""
_IMAGE = "the Dockerfile's target gpu, which installs what TensorRT-LLM lacks"


def tensorrt_llm(inventory: Inventory, needs: Needs, deployment: Deployment) -> Iterator[Finding]:
    version = inventory.software.packages.get(NAME, "")
    if not within(version, SUPPORTED[NAME]):  # which is among the versions
        return
    if inventory.software.tensorrt_llm:
        yield _unusable(version, inventory.software.tensorrt_llm)
    elif not within(version, READ[NAME]):
        yield Finding(
            about=NAME,
            state="note",
            found=f"{version}: newer than the versions that were read, {READ[NAME]}",
            used="every name that is used, which the engine checks when it is loaded",
            mend="a version that was read, if answers or transfers are wrong",
        )
    if needs.engine == NAME:
        environment = inventory.process.environment
        yield from _backend(environment, deployment)
        yield from _statistics(environment, version)
        yield from _flexible(deployment)


def _unusable(version: str, why: str) -> Finding:
    mend = next((mend for words, mend in _MENDS if any(word in why for word in words)), _IMAGE)
    return Finding(
        about=NAME, state="problem", found=f"{version}: {why}", unused=f"engine {NAME}", mend=mend
    )


def _backend(environment: Mapping[str, str], deployment: Deployment) -> Iterator[Finding]:
    configured = deployment.engine.tensorrt_llm.cache_transceiver_config.backend
    for name, chosen in BACKEND_VARIABLES.items():
        if environment.get(name) != "1" or chosen == configured:
            continue
        decides = configured == "DEFAULT"
        yield Finding(
            about="transceiver",
            state="note",
            found=f"{name}=1; the deployment's backend is {configured}",
            used=f"{chosen}, in the servers that have this variable" if decides else configured,
            unused="links to engines whose servers have other variables" if decides else name,
            mend=f"unset {name}"
            + (f", and cache_transceiver_config: {{backend: {chosen}}}" if decides else ""),
        )


def _statistics(environment: Mapping[str, str], version: str) -> Iterator[Finding]:
    off = any(environment.get(name, "").lower() in no for name, no in NO_STATISTICS.items())
    if within(version, STATISTICS) and not off:
        yield Finding(
            about="statistics of use",
            state="note",
            found=f"tensorrt_llm {version} sends them to NVIDIA: GPUs, options, model architecture",
            used="a connection to the internet, unless ~/.config/trtllm/do_not_track is there",
            mend="TRTLLM_NO_USAGE_STATS=1 in the servers' environment",
        )


def _flexible(deployment: Deployment) -> Iterator[Finding]:
    if not deployment.flexible:
        return
    fixed = len(deployment.instances("decode").keys() - deployment.flexible)
    yield Finding(
        about="flexible instances",
        state="note",
        found=", ".join(sorted(deployment.flexible)),
        used="equal arguments in both roles; a change of roles has run with a fake only",
        unused=(
            "the overlap scheduler in decodes"
            + (f", also in the {fixed} that keep their role" if fixed else "")
            + ": the host's work between two steps adds to the time of each token"
        ),
        mend="a fixed role for every instance, if that costs too much: measure it with your model",
    )
