"""Has a decode lose its CUDA context when the suite asks for it; installed in the decode's process.

On a GPU a kernel fails an assertion, which ends the context: every later call of the process fails.
On a CPU the same error is raised, and again by every later step and prefill.
"""

from __future__ import annotations

from functools import wraps
from pathlib import Path
from typing import Any

MESSAGE = "CUDA error: device-side assert triggered (imitated)"


def install(file: str) -> None:
    """Lose the context in the first step after the file has been made; the file is taken away."""
    from pdserve.engines.pytorch.decode import TorchDecode  # noqa: PLC0415 - it imports torch

    asked, lost = Path(file), [False]

    def failing(name: str) -> None:
        works = getattr(TorchDecode, name)

        @wraps(works)
        def call(self: Any, *args: Any) -> Any:
            if not lost[0] and name == "step":
                try:
                    asked.unlink()
                except FileNotFoundError:
                    pass
                else:
                    lost[0] = True
                    _lose(self._pool)
            if lost[0] and not self._pool.is_cuda:
                raise RuntimeError(MESSAGE)
            return works(self, *args)

        setattr(TorchDecode, name, call)

    failing("step")
    failing("prefill")


def _lose(pool: Any) -> None:
    import torch  # noqa: PLC0415 - see above

    if pool.is_cuda:
        far = torch.tensor([1 << 30], device=pool.device)
        torch.zeros(1, device=pool.device).index_select(0, far)
        torch.cuda.synchronize()
