# bitdance serve on one machine. Not built yet in CI.
#
#   docker build -t bitdance .
#   docker run --rm -p 127.0.0.1:8000:8000 -e BITDANCE_API_KEY=secret bitdance
#   docker run --rm -p 127.0.0.1:8000:8000 -e BITDANCE_API_KEY=secret --gpus all -v "$PWD/models/14b:/model:ro" bitdance --model /model
#
# For GPUs, TORCH names a build of torch that fits the driver: docker build --build-arg TORCH=torch==2.13.0 …
FROM python:3.12-slim
ARG TORCH=torch==2.13.0
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN useradd --create-home bitdance
WORKDIR /app
RUN pip install "$TORCH"
COPY . .
RUN pip install '.[serve]'
USER bitdance
EXPOSE 8000
HEALTHCHECK --start-period=120s CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=5)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["bitdance", "serve", "--host", "0.0.0.0"]
