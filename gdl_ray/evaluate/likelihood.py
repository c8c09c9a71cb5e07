"""Log-likelihood of a split under a model."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from gdl_ray.family import Batch, Likelihood


@dataclass(frozen=True, slots=True)
class Nats:
    """Log-likelihoods of some examples, as sums that workers can add up."""

    total: float
    squares: float
    examples: float

    @property
    def mean(self) -> float:
        """Nats per example."""
        return self.total / self.examples

    @property
    def standard_error(self) -> float:
        """Standard error of the mean over examples, nats."""
        variance = self.squares / self.examples - self.mean**2
        return math.sqrt(max(variance, 0.0) / self.examples)


def log_likelihood(model: Likelihood, batches: Iterable[Batch], samples: int = 1) -> Nats:
    """Measure log p(x | y) of batches, or log p(x) of unlabelled ones.

    Args:
        model: a family in evaluation mode.
        batches: examples on the model's device.
        samples: Monte-Carlo samples an example.
    """
    nats = [model.log_likelihood(batch, samples).double() for batch in batches]
    sums = _sums(torch.cat(nats)) if nats else [0.0, 0.0, 0.0]
    return Nats(*sums)


def _sums(nats: Tensor) -> list[float]:
    return [nats.sum().item(), nats.square().sum().item(), float(len(nats))]
