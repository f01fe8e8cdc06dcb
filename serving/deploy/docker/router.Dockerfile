# vllm-router, in front of prefill and decode workers:
#
#   docker build -t dispec-router:0.1.17 -f serving/deploy/docker/router.Dockerfile serving/deploy/docker
ARG PYTHON_IMAGE=python:3.11-slim-bookworm
FROM ${PYTHON_IMAGE}
RUN pip install --no-cache-dir --disable-pip-version-check vllm-router==0.1.17
USER 10001:10001
EXPOSE 8000
ENTRYPOINT ["vllm-router"]
