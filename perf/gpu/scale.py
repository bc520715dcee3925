"""The sizes of the suite's parts: on a GPU, on a CPU in place of one, and the smallest for CI."""

from __future__ import annotations

from msgspec import Struct


class Transfers(Struct, frozen=True):
    """Sizes of the part `transfer`."""

    tokens: tuple[int, ...]
    """Tokens of the KV caches of each layout."""
    repeats: int
    handshakes: int
    """Largest number of blocks for which a handshake before each is measured."""


class Serving(Struct, frozen=True):
    """Sizes of the parts with a server: `exact`, `serving`, `faults`."""

    streams: int
    """Number of streams at the same time."""
    requests: int
    """Number of requests in each, one after another."""
    prompt: int
    output: int
    long_prompt: int
    """Tokens of the prompts that come while others decode."""
    long_prompts: int
    exact: int
    """Number of prompts whose answers are compared."""
    exact_output: int
    fault_output: int
    """Tokens of the answers in whose midst a process is killed: more than half a second of them."""


class Steps(Struct, frozen=True):
    """Sizes of the part `engine`."""

    batches: tuple[int, ...]
    context: int
    """Tokens of each sequence of a decode step."""
    prompts: tuple[int, ...]
    repeats: int
    square: int
    """Rows and columns of the matrices whose product gives the rate of arithmetic."""
    copied_mib: int
    """Size of the copy that gives the rate of memory."""


class Scale(Struct, frozen=True):
    """The sizes of all parts."""

    name: str
    device: str
    """The engine's, as in deployment.yaml."""
    dtype: str
    served: str
    """The model of `serving` and `engine`, of `perf.gpu.model.SHAPES`."""
    small: str
    """The model of `exact` and `faults`, whose processes load it again and again."""
    transfers: Transfers
    serving: Serving
    steps: Steps

    @property
    def gpu(self) -> int | None:
        """Return the number of the CUDA device; None: the suite runs on a CPU."""
        return None if self.device == "cpu" else int(self.device.partition(":")[2])


GPU = Scale(
    name="gpu",
    device="cuda:0",
    dtype="bfloat16",
    served="8b",
    small="1b",
    transfers=Transfers((128, 1024, 4096, 32768), 7, 20_000),
    serving=Serving(32, 3, 512, 128, 4096, 12, 24, 48, 256),
    steps=Steps((1, 8, 64), 1024, (512, 4096), 7, 8192, 4096),
)
CPU = Scale(
    name="cpu",
    device="cpu",
    dtype="float32",
    served="tiny",
    small="tiny",
    transfers=Transfers((128, 1024), 3, 512),
    serving=Serving(8, 2, 64, 16, 256, 4, 8, 16, 600),
    steps=Steps((1, 8), 64, (128,), 3, 1024, 64),
)
SMALLEST = Scale(
    name="smallest",
    device="cpu",
    dtype="float32",
    served="tiny",
    small="tiny",
    transfers=Transfers((32,), 1, 128),
    serving=Serving(2, 1, 16, 8, 64, 2, 3, 6, 1000),
    steps=Steps((1, 2), 16, (32,), 1, 256, 8),
)
SCALES = {scale.name: scale for scale in (GPU, CPU, SMALLEST)}
