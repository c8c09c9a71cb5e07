"""Sums over a split against NumPy on a model whose likelihoods are known; log Z of a mixture."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from gdl_ray.data import Dataset, evaluation_batches
from gdl_ray.evaluate.likelihood import log_likelihood
from gdl_ray.families.energy import anneal, log_mean
from gdl_ray.family import Batch, Likelihood, LikelihoodKind
from gdl_ray.random import fold, normal

DIMS, SPREAD, LOG_Z = 64, 0.8, 3.0
WEIGHTS = torch.tensor([0.1, 0.2, 0.3, 0.4])
MEANS = torch.nn.functional.normalize(normal(fold(1, torch.arange(4)), (DIMS,))) * 3


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


def mixture_tilt(z: Tensor) -> tuple[Tensor, Tensor]:
    """Turn N(0, I) into exp(LOG_Z) times a mixture of four normals with deviation SPREAD."""
    offsets = z[:, None] - MEANS
    log_joint = WEIGHTS.log() - 0.5 * offsets.square().sum(2) / SPREAD**2 - DIMS * math.log(SPREAD)
    f = log_joint.logsumexp(1, keepdim=True) + 0.5 * z.square().sum(1, keepdim=True) + LOG_Z
    pull = (log_joint.softmax(1)[..., None] * offsets).sum(1) / SPREAD**2
    return f, z - pull


def test_annealing_finds_the_constant_of_a_mixture_in_64_dimensions_from_both_ends() -> None:
    keys = fold(2, torch.arange(1000))
    base = normal(keys, (DIMS,), stream=0)
    component = torch.multinomial(WEIGHTS.expand(1000, 4), 1, generator=torch.manual_seed(0)).squeeze(1)
    draws = MEANS[component] + SPREAD * base
    rising = torch.linspace(0, 1, 201).tolist()
    _, log_weight = anneal(mixture_tilt, base, keys, rising, size=1.0)
    _, reverse_log_weight = anneal(mixture_tilt, draws, keys, rising[::-1], size=1.0)
    for weights, expected in ((log_weight, LOG_Z), (reverse_log_weight, -LOG_Z)):
        estimate, effective = log_mean(weights)
        assert estimate.item() == pytest.approx(expected, abs=0.05)
        assert effective > 500
    # Without temperatures between, hardly a draw counts.
    assert log_mean(mixture_tilt(base)[0].squeeze(1))[1] < 20
