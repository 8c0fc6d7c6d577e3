# docker build -f launch/docker/cpu.Dockerfile -t distbench:cpu .
FROM python:3.12-slim
ENV DISTBENCH_IMAGE="distbench on python:3.12-slim"
WORKDIR /opt/distbench
COPY pyproject.toml README.md LICENSE ./
COPY distbench distbench
COPY launch launch
# hadolint ignore=DL3013 # the version is that of this checkout
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu ".[cpu]"
WORKDIR /results
ENTRYPOINT []
CMD ["distbench", "suite", "smoke"]
