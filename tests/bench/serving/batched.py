"""What continuous batching is measured against: Ray Serve's own batching of whole requests.

    ray job submit --working-dir . -- python -m tests.bench.serving.batched digits-diffusion 1

deploys a model at /batched, in the same layout of processes and with the same encoding as the service itself.
"""

import asyncio
import io
import sys

import numpy as np
import ray
import torch
from ray import serve
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from torch import Tensor

from gdl_ray import registry
from gdl_ray.engine import request_keys
from gdl_ray.family import UNLABELLED
from gdl_ray.train.checkpoint import load_family

APPLICATION = "batched"
MOST_SAMPLES = 64
"""As many as the engine has slots."""
REQUEST_SAMPLES = 4
WAIT_S = 0.01


class Replica:
    """Holds a model, and draws the samples of several requests in one go."""

    def __init__(self, name: str, version: int) -> None:
        torch.set_num_threads(1)
        sys.setswitchinterval(0.0002)  # both as the service's own replicas do
        self._family = load_family(registry.fetch(name, version))

    def __serve_build_asgi_app__(self) -> Starlette:
        """Tell Serve the application that answers this replica's requests."""
        return Starlette(routes=[Route("/sample", self._sample, methods=["POST"])])

    async def _sample(self, request: Request) -> Response:
        asked = await request.json()
        samples = await self._draw(request_keys(asked["seed"], asked["n"]))
        stream = io.BytesIO()
        np.save(stream, samples.numpy(), allow_pickle=False)
        return Response(stream.getvalue(), media_type="application/x-npy")

    @serve.batch(max_batch_size=MOST_SAMPLES // REQUEST_SAMPLES, batch_wait_timeout_s=WAIT_S)
    async def _draw(self, keys: list[Tensor]) -> list[Tensor]:
        samples = await asyncio.to_thread(self._draw_all, torch.cat(keys))
        return list(torch.split(samples, [len(each) for each in keys]))

    def _draw_all(self, keys: Tensor) -> Tensor:
        with torch.no_grad():
            return self._family.sample(keys, torch.full((len(keys),), UNLABELLED))


def main(name: str, version: str) -> None:
    """Deploy the application, and return when it answers."""
    ray.init()
    deployment = serve.deployment(
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=10_000,
        logging_config={"enable_access_log": False},
    )(serve.ingress()(Replica))
    serve.run(deployment.bind(name, int(version)), name=APPLICATION, route_prefix=f"/{APPLICATION}")


if __name__ == "__main__":
    main(*sys.argv[1:])
