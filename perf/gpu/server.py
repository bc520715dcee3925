"""A real Triton server with prefills and decodes on the device, and the aggregated baseline."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
from tests.clients import metrics, wait_until
from tests.servers import Running

from pdctl import fleet, watchers
from pdctl.errors import ServerError
from pdctl.paths import ROOT
from pdserve import config
from perf.gpu import model
from perf.gpu.scale import Scale
from perf.serving import MeasuredServer
from perf.serving import deployment as usual

START_S = 400.0
LINKED_S = 60.0
LOSE = "lose-context"
"""A file of this name in the server's folder has the next decode step lose its CUDA context."""
BASELINE = "aggregated"


def deployment(scale: Scale, shape: str, each: int) -> config.Deployment:
    """Return one server with `each` prefills and as many decodes of a model of random weights."""
    on_gpu = scale.gpu is not None
    folder = model.made(shape, scale.dtype, scale.device)
    engine = config.Engine(
        device=scale.device,
        dtype=scale.dtype,  # type: ignore[arg-type]
        threads=0 if on_gpu else 1,
        load_s=START_S,
    )
    prefill = config.Prefill(slots=32, batch=8, arena_mib=64)
    decode = config.Decode(slots=64)
    if on_gpu:
        prefill = msgspec.structs.replace(prefill, batch_tokens=8192, arena_mib=16 << 10)
        decode = msgspec.structs.replace(decode, blocks=8192)
    return msgspec.structs.replace(
        usual(None, each=each), model=str(folder), engine=engine, prefill=prefill, decode=decode
    )


class SuiteServer(MeasuredServer):
    """A server whose decodes can lose their CUDA context; see `perf.gpu.lost_context`."""

    def render(self) -> None:
        super().render()
        for name in self.spec.decode:
            file = self.repository / name / "1" / "model.py"
            lines = (
                "import sys\n",
                f"sys.path.insert(0, {str(ROOT)!r})\n",
                "from perf.gpu import lost_context\n",
                f"lost_context.install({str(self.folder / LOSE)!r})\n",
            )
            file.write_text("".join(lines) + file.read_text())


def _linked(server: Running) -> bool:
    """Tell whether the gateways know all links; the baseline, which needs none, is one of them."""
    found = [sample for sample in metrics(server) if sample.name == "pdserve_kv_links"]
    unknown = [sample.value for sample in found if sample.labels["state"] == "unknown"]
    return bool(unknown) and not any(unknown)


@contextlib.contextmanager
def serving(scale: Scale, shape: str, *, each: int, baseline: bool) -> Iterator[Running]:
    """Run a server with its watchdog; it ends, and leaves nothing behind, with the block."""
    asked = deployment(scale, shape, each)
    with tempfile.TemporaryDirectory(prefix="pdserve-gpu-") as run:
        server = SuiteServer(asked, Path(run), (BASELINE,) if baseline else ())
        fleet.start([server], held=True, timeout_s=START_S, progress=lambda *_: None)
        try:
            fleet.watch([server])
            running = Running(server.http, server.grpc, server.metrics, asked, [server])
            wait_until(lambda: _linked(running), LINKED_S, lambda: "links are not made")
            yield running
        finally:
            with contextlib.suppress(ServerError):
                watchers.end(server.folder)  # otherwise it would start the server again
            server.kill()  # one whose processes were killed takes its whole time-out to end
            server.stop()
