# The two images of latentflow. Build one of them with:
#   docker build --target control --tag latentflow-control:0.1.0 .    (operator and gateway; no torch)
#   docker build --target node --tag latentflow-node:0.1.0 .          (model servers)
# The lock files pin all libraries. Our own code is a small last layer, so a change of it does not pull the libraries again. BASE
# is any image with Python 3.11 to 3.13 and its venv module.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS base
RUN python3 -m venv /opt/uv && /opt/uv/bin/pip install --no-cache-dir --quiet uv==0.13.9 && python3 -m venv /opt/latentflow
ENV PATH=/app/bin:/opt/latentflow/bin:$PATH PYTHONPATH=/app PYTHONDONTWRITEBYTECODE=1
WORKDIR /src

FROM base AS control-libraries
COPY requirements-control.lock ./
RUN /opt/uv/bin/uv pip install --system-certs --python /opt/latentflow/bin/python --no-cache --quiet --compile-bytecode \
      --requirement requirements-control.lock

FROM base AS node-libraries
COPY requirements-node.lock ./
RUN /opt/uv/bin/uv pip install --system-certs --python /opt/latentflow/bin/python --no-cache --quiet --compile-bytecode \
      --requirement requirements-node.lock

FROM base AS code
COPY . .
RUN /opt/uv/bin/uv pip install --system-certs --python /opt/latentflow/bin/python --no-cache --quiet --compile-bytecode --no-deps \
      --target /app .

FROM control-libraries AS control
COPY --from=code /app /app
WORKDIR /
USER 10001:10001

FROM node-libraries AS node
COPY --from=code /app /app
WORKDIR /
USER 10001:10001
