# docker build -f launch/docker/cuda.Dockerfile -t distbench:cuda .
# Takes torch with NCCL and triton from the base image, and replaces none of it.
ARG BASE=pytorch/pytorch:2.9.0-cuda12.8-cudnn9-runtime
FROM ${BASE}
ARG BASE
ENV DISTBENCH_IMAGE="distbench on ${BASE}"
WORKDIR /opt/distbench
COPY pyproject.toml README.md LICENSE ./
COPY distbench distbench
COPY launch launch
RUN python -m pip install --no-cache-dir .
WORKDIR /results
ENTRYPOINT []
CMD ["distbench", "suite", "smoke", "--device", "cuda"]
