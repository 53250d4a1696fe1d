# trace_jax on a CPU, or with the accelerator named by ACCELERATOR (tpu, cuda).
#
#   docker build --tag trace-jax .
#   docker build --tag trace-jax --build-arg ACCELERATOR=tpu .
#   docker run --rm --user "$(id -u)" --volume "$PWD:/work" trace-jax --config quickstart
FROM python:3.12-slim
ARG ACCELERATOR=""
WORKDIR /trace_jax
COPY pyproject.toml README.md LICENSE ./
COPY trace_jax trace_jax
COPY configs configs
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ".[gcs,data${ACCELERATOR:+,$ACCELERATOR}]"
ENV HOME=/tmp
WORKDIR /work
ENTRYPOINT ["trace-jax"]
CMD ["help"]
