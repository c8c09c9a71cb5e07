"""Sums over a split against NumPy on a model whose likelihoods are known."""

import numpy as np
import pytest
import torch
from torch import Tensor

from gdl_ray.data import Dataset, evaluation_batches
from gdl_ray.evaluate.likelihood import log_likelihood
from gdl_ray.family import Batch, Likelihood, LikelihoodKind


class Brightness(Likelihood):
    """Says that log p(x) is minus the sum of x."""

    likelihood_kind = LikelihoodKind.EXACT

    def log_likelihood(self, batch: Batch, samples: int = 1) -> Tensor:
        return -batch.x.flatten(1).float().sum(1)


def test_mean_and_standard_error_are_those_of_the_examples(digits: Dataset) -> None:
    test = digits.splits["test"]
    nats = log_likelihood(Brightness(), evaluation_batches(test, batch_size=100))
    values = -test.x.reshape(len(test), -1).sum(1, dtype=np.float64)
    assert nats.examples == len(test)
    assert nats.mean == pytest.approx(values.mean())
    assert nats.standard_error == pytest.approx(values.std() / len(test) ** 0.5)


def test_no_examples_are_no_nats() -> None:
    assert log_likelihood(Brightness(), []).examples == 0


def test_bits_per_dim_of_the_uniform_model(digits: Dataset) -> None:
    nats = 64 * float(torch.log(torch.tensor(17.0)))
    assert digits.spec.bits_per_dim(nats) == pytest.approx(4.0875, abs=1e-4)
