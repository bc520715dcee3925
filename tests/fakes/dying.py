"""The project's own models, whose background work fails when a test says so.

`models` copies the model repository so that each instance's process calls `install`. A test names
what is to fail by creating a file of that name (`DEATHS`) in the folder: the first process that
gets there takes the file away, and raises. A prompt with the token `POISON` ends the process of
every decode that computes a step of it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from pdctl.paths import MODEL_REPOSITORY, ROOT

POISON = 31_337
ENDED = "ended"
"""A file with a line for each process that the poison has ended."""
DEATHS = ("decode loop", "prefill loop", "outbox thread")


def models(folder: Path) -> Path:
    """Copy the project's models so that they can fail; return the `source` of a deployment."""
    target = folder / "dying_models"
    shutil.copytree(MODEL_REPOSITORY, target, ignore=shutil.ignore_patterns("__pycache__"))
    for role in ("prefill", "decode"):
        model = target / role / "1" / "model.py"
        lines = (
            "import sys\n",
            f"sys.path.insert(0, {str(ROOT)!r})\n",
            "from tests.fakes import dying\n",
            f"dying.install({role!r}, {str(folder)!r})\n",
        )
        model.write_text("".join(lines) + model.read_text())
    return target


def install(role: str, folder: str) -> None:
    """Called in a stub: let the work fail whose name is that of a file in `folder`."""
    from pdserve.engines.emulated import EmulatedDecode
    from pdserve.instances.prefill import PrefillInstance
    from pdserve.instances.running_batch import RunningBatch
    from pdserve.triton.outbox import Outbox

    if role == "prefill":
        _fails(PrefillInstance, "_hand_over", Path(folder) / "prefill loop")
        _fails(Outbox, "_do", Path(folder) / "outbox thread")
    else:
        _fails(RunningBatch, "append", Path(folder) / "decode loop")
        _poisoned(EmulatedDecode, Path(folder) / ENDED)


def _fails(owner: Any, method: str, file: Path) -> None:
    works: Callable[..., Any] = getattr(owner, method)

    @wraps(works)
    def call(*args: Any) -> Any:
        try:
            file.unlink()
        except FileNotFoundError:
            return works(*args)
        raise RuntimeError(f"a test has asked for the end of the {file.name}")

    setattr(owner, method, call)


def _poisoned(engine: Any, ended: Path) -> None:
    works = engine.step

    async def step(self: Any, batch: Any) -> list[int]:
        if any(POISON in one.prompt for one in batch):
            with ended.open("a") as file:
                file.write(f"{os.getpid()}\n")
            os._exit(1)
        return await works(self, batch)  # type: ignore[no-any-return]

    engine.step = step
