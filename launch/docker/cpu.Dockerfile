# docker build -f launch/docker/cpu.Dockerfile -t distbench:cpu .
FROM python:3.12-slim
WORKDIR /opt/distbench
COPY pyproject.toml README.md ./
COPY distbench distbench
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu ".[cpu]"
WORKDIR /results
ENTRYPOINT []
CMD ["distbench", "suite", "smoke"]
