"""The GPU suite: what only a GPU can show, in resumable parts: `python -m perf.gpu`."""
