"""Imports TensorRT-LLM like an engine, in a separate process, as it takes long and may crash."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from pdctl.doctor.probe.command import Failed, Unknown, answer
from pdserve.engines.tensorrt_llm.api import Api
from pdserve.errors import DeploymentError

TIMEOUT_S = 120.0
"""Seconds; the import reads some GiB of libraries, and its first one in a container is slow."""
_MARK = "pdctl-doctor: "
"""Begins the answer, since the import prints lines of its own."""


def fault(environment: Mapping[str, str]) -> str:
    """Return why an engine cannot use the installed tensorrt_llm; empty: it can.

    Raises:
        Unknown: the import has not ended in time.
    """
    try:
        said = answer(
            *(sys.executable, "-m", __name__), environment=environment, timeout_s=TIMEOUT_S
        )
    except Failed as error:
        return f"its import ends the process: {error}"
    except Unknown as error:
        raise Unknown(f"its import has not ended in {TIMEOUT_S:.0f} s") from error
    *_, last = [line for line in said.splitlines() if line.startswith(_MARK)] or [_MARK]
    return last.removeprefix(_MARK)


def main() -> None:
    """Print the line that `fault` reads."""
    try:
        Api(())
        why = ""
    except DeploymentError as error:
        why = str(error).removeprefix("engine tensorrt_llm: ")
    except Exception as error:  # a package may raise anything when it is imported
        why = f"it cannot be used: {error!r}"
    print(f"\n{_MARK}{' '.join(why.split())}", flush=True)


if __name__ == "__main__":
    main()
