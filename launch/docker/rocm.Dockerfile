# docker build -f launch/docker/rocm.Dockerfile -t distbench:rocm .
# Takes torch with RCCL, aiter and mori from the base image: an SGLang image for ROCm has all three (docs/amd.md). This
# one is for MI300X and MI325X; for MI355X: --build-arg BASE=lmsysorg/sglang:v0.5.12-rocm720-mi35x
ARG BASE=lmsysorg/sglang:v0.5.12-rocm720-mi30x
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
