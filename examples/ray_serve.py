"""Many GPUs: the app of `bitdance serve` under Ray Serve, with a replica for each GPU.

    pip install 'bitdance[serve]' 'ray[serve]'
    BITDANCE_MODEL=models/14b BITDANCE_REPLICAS=4 serve run examples.ray_serve:app

    BITDANCE_GPUS=0 BITDANCE_REPLICAS=2 serve run examples.ray_serve:app        two replicas of the bundled model on a CPU

BITDANCE_MOST_REPLICAS=8 lets Ray add replicas while each has more than two batches to make, and remove them later;
BITDANCE_BATCH_SIZE and BITDANCE_API_KEY are those of `bitdance serve`.

Every replica has the batches and the limits of `bitdance serve`. Ray gives it four batches of requests at most, holds as many
more in a queue of its own, and refuses the rest with 429 and Retry-After. `max_ongoing_requests` caps the batch, too. A job lives
in the replica that took it in, so `/v1/jobs/ID` is reliable with one replica alone: with several, clients wait for their answer.
"""

import os

from fastapi import FastAPI
from ray import serve
from ray.serve.config import BackpressureConfig

from bitdance.serve.api import create_app
from bitdance.serve.model import ServedModel
from bitdance.serve.settings import Limits

BATCH = int(os.environ.get("BITDANCE_BATCH_SIZE", "8"))
GPUS = float(os.environ.get("BITDANCE_GPUS", "1"))
LEAST = int(os.environ.get("BITDANCE_REPLICAS", "1"))
MOST = int(os.environ.get("BITDANCE_MOST_REPLICAS", LEAST))


def build() -> FastAPI:
    """The app, made in the replica that will serve it: a model does not travel."""
    model = ServedModel.load(os.environ.get("BITDANCE_MODEL", "demo"), ("cuda" if GPUS else "cpu",))
    return create_app(model, Limits(batch_size=BATCH, queue=4 * BATCH), os.environ.get("BITDANCE_API_KEY") or None)


app = serve.deployment(
    serve.ingress(build)(),
    autoscaling_config={"min_replicas": LEAST, "max_replicas": MOST, "target_ongoing_requests": 2 * BATCH},
    ray_actor_options={"num_gpus": GPUS},
    max_ongoing_requests=4 * BATCH,
    max_queued_requests=4 * BATCH * LEAST,
    backpressure_config=BackpressureConfig(status_code=429, retry_after_s=5),
    graceful_shutdown_timeout_s=120,
).bind()
