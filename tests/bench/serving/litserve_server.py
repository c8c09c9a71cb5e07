"""A model behind LitServe's dynamic batching; runs in LitServe's own environment."""

import io
import os
from pathlib import Path
from typing import Any

import litserve  # type: ignore[import-not-found]
import numpy as np
import torch
from fastapi import Response
from numpy.typing import NDArray
from torch import Tensor

from gdl_ray.engine import request_keys
from gdl_ray.family import UNLABELLED
from gdl_ray.train.checkpoint import load_family


class Sampler(litserve.LitAPI):  # type: ignore[misc]
    """Draws the samples of several requests in one go, and answers in NumPy's format."""

    def setup(self, device: str) -> None:
        """Load the model."""
        torch.set_num_threads(1)
        self._family = load_family(Path(os.environ["CHECKPOINT"]))

    def decode_request(self, request: dict[str, Any]) -> Tensor:
        """Read the keys of the noise out of a request."""
        return request_keys(request["seed"], request["n"])

    def batch(self, inputs: list[Tensor]) -> list[Tensor]:
        """Leave the requests apart, so that `predict` knows where each ends."""
        return inputs

    def predict(self, x: list[Tensor]) -> list[NDArray[Any]]:
        """Draw the samples of all requests."""
        keys = torch.cat(x)
        with torch.no_grad():
            samples = self._family.sample(keys, torch.full((len(keys),), UNLABELLED))
        return [part.numpy() for part in torch.split(samples, [len(each) for each in x])]

    def unbatch(self, output: list[NDArray[Any]]) -> list[NDArray[Any]]:
        """Give each request its own."""
        return output

    def encode_response(self, output: NDArray[Any]) -> Response:
        """Encode the samples of a request."""
        stream = io.BytesIO()
        np.save(stream, output, allow_pickle=False)
        return Response(stream.getvalue(), media_type="application/x-npy")


if __name__ == "__main__":
    api = Sampler(max_batch_size=16, batch_timeout=0.002)
    server = litserve.LitServer(api, accelerator="cpu", devices=1, workers_per_device=2, fast_queue=True)
    server.run(
        host="127.0.0.1",
        port=int(os.environ["PORT"]),
        num_api_servers=2,
        generate_client_file=False,
        log_level="warning",
    )
