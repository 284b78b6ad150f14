# bitdance serve on one machine. Not built in CI.
#
#   docker build -t bitdance .
#   docker run --rm -p 127.0.0.1:8000:8000 -e BITDANCE_API_KEY=secret bitdance
#   docker run --rm -p 127.0.0.1:8000:8000 -e BITDANCE_API_KEY=secret --gpus all -v "$PWD/models/14b:/model:ro" bitdance --model /model
#
# What was begun is finished when the container is stopped, if it is given the time: docker stop --time 600.
# For GPUs, TORCH names a build of torch that fits the driver: docker build --build-arg TORCH=torch==2.13.0 …
FROM python:3.12-slim AS wheel
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .

FROM python:3.12-slim
ARG TORCH=torch==2.13.0
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN useradd --create-home bitdance && pip install "$TORCH"
COPY --from=wheel /wheel /wheel
RUN pip install "$(echo /wheel/*.whl)[serve]"
USER bitdance
WORKDIR /app
EXPOSE 8000
HEALTHCHECK --start-period=120s CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=5)"]
ENTRYPOINT ["bitdance", "serve", "--host", "0.0.0.0"]
