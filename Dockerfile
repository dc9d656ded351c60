# rapidin on the CPU (the default), or with its CUDA kernels:
#
#   docker build --tag rapidin .
#   docker build --tag rapidin:cuda --target cuda .
#   docker run --rm --volume "$PWD:/data" rapidin query cache --ask "Tell me about the moon."
#   docker run --rm --gpus all --volume "$PWD:/data" rapidin:cuda query cache --ask "Tell me about the moon."
#
# --build-arg PIP_EXTRA_INDEX_URL=... names an index with CPU builds of torch, which save gigabytes of CUDA libraries in the first.
# Each image is built in two stages, so that compilers stay out of it.
FROM python:3.12-slim-bookworm AS build-cpu
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY pyproject.toml setup.py MANIFEST.in README.md LICENSE constraints.txt ./
COPY csrc csrc
COPY kernels kernels
COPY rapidin rapidin
RUN RAPIDIN_CUDA=off pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM nvidia/cuda:13.0.1-devel-ubuntu24.04 AS build-cuda
RUN apt-get update && apt-get install -y --no-install-recommends g++ python3-dev python3-pip && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY --from=build-cpu /source .
RUN RAPIDIN_CUDA=off pip wheel --no-cache-dir --no-deps --wheel-dir /wheels . \
    && RAPIDIN_BUILD_JOBS=4 pip wheel --no-cache-dir --no-deps --wheel-dir /wheels ./csrc/rapidin_cuda

# CUDA's own libraries come with torch; the driver is the host's.
FROM ubuntu:24.04 AS cuda
RUN apt-get update && apt-get install -y --no-install-recommends python3-venv && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/rapidin
COPY --from=build-cuda /source/constraints.txt /wheels/*.whl /wheels/
RUN /opt/rapidin/bin/pip install --no-cache-dir --constraint /wheels/constraints.txt /wheels/*.whl triton
ENV PATH=/opt/rapidin/bin:$PATH
WORKDIR /data
ENTRYPOINT ["rapidin"]

FROM python:3.12-slim-bookworm AS cpu
ARG PIP_EXTRA_INDEX_URL
COPY --from=build-cpu /source/constraints.txt /wheels/*.whl /wheels/
RUN pip install --no-cache-dir --constraint /wheels/constraints.txt /wheels/*.whl
WORKDIR /data
ENTRYPOINT ["rapidin"]
