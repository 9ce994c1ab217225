# AnyBit in a container: `docker build --target cpu .` (the default) or `--target cuda`.
#
# TORCH_INDEX_URL: a package index to look at beside the usual one, such as PyTorch's own for CPU builds, which are
# some gigabytes smaller.
ARG PYTHON_VERSION=3.12

FROM python:${PYTHON_VERSION}-slim-bookworm AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml MANIFEST.in LICENSE README.md ./
COPY server ./server
COPY engine ./engine
COPY kernels ./kernels
COPY kvcache ./kvcache
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir dist .

FROM python:${PYTHON_VERSION}-slim-bookworm AS base
RUN useradd --uid 10001 --create-home anybit && install -d -o anybit -g anybit /var/cache/anybit
ARG TORCH_INDEX_URL=""
ENV VIRTUAL_ENV=/opt/anybit
ENV PATH=/opt/anybit/bin:$PATH
COPY --from=build /src/dist /wheels
RUN python -m venv /opt/anybit
RUN pip install --no-cache-dir ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} "$(echo /wheels/anybit-*.whl)[otel]"
# Models and compiled kernels live in the volume.
ENV ANYBIT_HOST=0.0.0.0 ANYBIT_PORT=8000 ANYBIT_CACHE_DIR=/var/cache/anybit \
    ANYBIT_KERNEL_CACHE=/var/cache/anybit/kernels HF_HOME=/var/cache/anybit/huggingface
VOLUME /var/cache/anybit
WORKDIR /var/cache/anybit
EXPOSE 8000
STOPSIGNAL SIGTERM
# Alive from the moment that it loads its model; the first start downloads and quantizes it before that.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen(f'http://127.0.0.1:{os.environ[\"ANYBIT_PORT\"]}/health', timeout=4)"]
ENTRYPOINT ["anybit", "serve"]

FROM base AS cuda
# The CUDA libraries come with PyTorch, the driver from the host. Triton builds its launchers with a C compiler.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility TRITON_CACHE_DIR=/var/cache/anybit/triton
USER anybit
CMD ["--device", "cuda"]

FROM base AS cpu
USER anybit
CMD ["--device", "cpu"]
