"""Many GPUs: the app of `bitdance serve` under Ray Serve, a replica for each GPU. Not run yet: it follows Ray's documentation.

    pip install 'bitdance[serve]' 'ray[serve]'
    BITDANCE_MODEL=models/14b serve run examples.ray_serve:app

    BITDANCE_GPUS=0 BITDANCE_REPLICAS=2 serve run examples.ray_serve:app        two replicas of the bundled model on a CPU

Every replica has the queue, the batches and the limits of `bitdance serve`; Ray spreads requests over the replicas and answers
503 when all are full. `max_ongoing_requests` is far above the batch size, for it caps the batch. A job lives in the replica that
took it in, so `GET /v1/jobs/ID` is reliable with one replica alone: with several, clients wait for their answer.
"""

import os

from fastapi import FastAPI
from ray import serve

from bitdance.serve.api import create_app
from bitdance.serve.model import ServedModel
from bitdance.serve.settings import Limits

BATCH = int(os.environ.get("BITDANCE_BATCH_SIZE", "8"))
GPUS = float(os.environ.get("BITDANCE_GPUS", "1"))
REPLICAS = int(os.environ.get("BITDANCE_REPLICAS", "1"))


def build() -> FastAPI:
    """The app, made in the replica that will serve it: a model does not travel."""
    device = "cuda" if GPUS else "cpu"
    model = ServedModel.load(os.environ.get("BITDANCE_MODEL", "demo"), (device,))
    return create_app(model, Limits(batch_size=BATCH, queue=4 * BATCH), os.environ.get("BITDANCE_API_KEY") or None)


app = serve.deployment(
    serve.ingress(build)(),
    num_replicas=REPLICAS,
    ray_actor_options={"num_gpus": GPUS},
    max_ongoing_requests=8 * BATCH,
    max_queued_requests=32 * BATCH,
    graceful_shutdown_timeout_s=120,
).bind()
