"""Bayes' rule on a model whose p(x | y) is a table."""

import math

import pytest
import torch
from torch import Tensor

from gdl_ray.evaluate.bayes import bayes_accuracy, log_posterior, log_prior
from gdl_ray.family import Batch, Likelihood, LikelihoodKind
from gdl_ray.random import fold, normal

TABLE = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.3, 0.4], [0.1, 0.2, 0.7]])
"""p(x | y): a row for each of three classes, a column for each of three levels."""
EVEN = torch.full((3,), 1 / 3).log()


class Table(Likelihood):
    """Knows p(x | y), and adds noise of an example's own key: the less, the more samples."""

    likelihood_kind = LikelihoodKind.ESTIMATE

    def __init__(self, noise: float = 0.0) -> None:
        self.noise = noise

    def log_likelihood(self, batch: Batch, samples: int = 1) -> Tensor:
        noise = normal(batch.key, ()) * self.noise / samples
        return TABLE[batch.y, batch.x.flatten().long()].log() + noise


def every_pair() -> Batch:
    """Each level with each label, once."""
    x, y = torch.cartesian_prod(torch.arange(3), torch.arange(3)).T
    return Batch(x.to(torch.uint8).view(-1, 1, 1, 1), y, fold(0, torch.arange(9)))


@pytest.mark.parametrize("prior", [EVEN, torch.tensor([0.1, 0.1, 0.8]).log()], ids=["even", "uneven"])
def test_the_posterior_is_that_of_bayes(prior: Tensor) -> None:
    batch = every_pair()
    joint = TABLE * prior.exp()[:, None]
    expected = (joint / joint.sum(0)).T[batch.x.flatten().long()]
    found = log_posterior(Table(), batch, prior)
    torch.testing.assert_close(found.exp(), expected)
    assert torch.equal(found, log_posterior(Table(), batch.unlabelled(), prior))  # it sees no label


def test_accuracy_is_that_of_the_best_rule() -> None:
    # Levels 0, 1, 2 speak for classes 0, 1, 2: right on one label of three each.
    pairs = every_pair()
    assert bayes_accuracy(Table(), [pairs], EVEN) == pytest.approx(1 / 3)
    right = pairs.x.flatten() == pairs.y
    ours = Batch(pairs.x[right], pairs.y[right], pairs.key[right])
    assert bayes_accuracy(Table(), [ours], EVEN) == 1
    assert bayes_accuracy(Table(), [ours, pairs], EVEN) == pytest.approx(6 / 12)


def test_the_prior_decides_where_the_likelihood_does_not() -> None:
    one = Batch(torch.ones(1, 1, 1, 1, dtype=torch.uint8), torch.tensor([2]), fold(0, torch.arange(1)))
    assert bayes_accuracy(Table(), [one], EVEN) == 0
    assert bayes_accuracy(Table(), [one], torch.tensor([0.2, 0.2, 0.6]).log()) == 1


def test_noise_is_common_to_the_classes() -> None:
    clear, noisy = (log_posterior(Table(noise), every_pair(), EVEN) for noise in (0.0, 50.0))
    torch.testing.assert_close(noisy, clear, atol=1e-4, rtol=0)


def test_samples_reach_the_model() -> None:
    seen: list[int] = []

    class Watched(Table):
        def log_likelihood(self, batch: Batch, samples: int = 1) -> Tensor:
            seen.append(samples)
            return super().log_likelihood(batch, samples)

    bayes_accuracy(Watched(), [every_pair()], EVEN, samples=7)
    assert seen == [7, 7, 7]


def test_prior_is_the_share_of_each_class() -> None:
    prior = log_prior(torch.tensor([0, 1, 0, 0]), classes=3)
    assert prior.tolist() == pytest.approx([math.log(0.75), math.log(0.25), -math.inf])
    # A class that never occurs is never chosen, and spoils no other's probability.
    assert log_posterior(Table(), every_pair(), prior).exp().sum(1).tolist() == pytest.approx([1.0] * 9)
