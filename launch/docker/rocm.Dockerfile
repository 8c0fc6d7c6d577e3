# docker build -f launch/docker/rocm.Dockerfile -t distbench:rocm .
# Takes torch with RCCL, aiter and mori from the base image: an SGLang image for ROCm has all three (docs/amd.md).
ARG BASE=rocm/pytorch:latest
FROM ${BASE}
WORKDIR /opt/distbench
COPY pyproject.toml README.md ./
COPY distbench distbench
RUN python -m pip install --no-cache-dir .
WORKDIR /results
ENTRYPOINT []
CMD ["distbench", "suite", "smoke"]
