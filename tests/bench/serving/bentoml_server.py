"""A model behind BentoML's adaptive batching; runs in BentoML's own environment.

Its requests are rows of (key of the noise, label), which it batches along the first dimension. It answers in
JSON: for arrays it has no other encoding but pickle.
"""

import os
from pathlib import Path

import bentoml  # type: ignore[import-not-found]
import numpy as np
import torch
from numpy.typing import NDArray

from gdl_ray.train.checkpoint import load_family


@bentoml.service(workers=2, metrics={"enabled": False}, logging={"access": {"enabled": False}})
class Sampler:
    """Draws a sample for each row."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._family = load_family(Path(os.environ["CHECKPOINT"]))

    @bentoml.api(batchable=True, max_batch_size=64, max_latency_ms=10_000)  # type: ignore[untyped-decorator]
    def sample(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Draw samples: int64 (B, 2) to uint8 (B, C, H, W)."""
        keys, labels = torch.from_numpy(rows.astype(np.int64)).unbind(1)
        with torch.no_grad():
            return self._family.sample(keys, labels).numpy()
