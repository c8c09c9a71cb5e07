"""Mixtures of products by enumeration: every image of a tiny space has its probability."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from gdl_ray.data import Dataset
from gdl_ray.evaluate.baselines import ProductMixture, fit_mixture, independent
from gdl_ray.random import fold

DIMS, LEVELS = 4, 3
EVERY = torch.cartesian_prod(*[torch.arange(LEVELS)] * DIMS).to(torch.uint8)
KNOWN = ProductMixture(
    torch.tensor([0.3, 0.7]).log(),
    torch.tensor([[[0.8, 0.1], [0.1, 0.2], [0.1, 0.7]]]).expand(DIMS, -1, -1).log(),
)


def known_probability(x: Tensor) -> float:
    """Probability of one image of KNOWN, factor by factor."""
    total = 0.0
    for weight, masses in ((0.3, (0.8, 0.1, 0.1)), (0.7, (0.1, 0.2, 0.7))):
        for level in x.tolist():
            weight *= masses[level]
        total += weight
    return total


def drawn(count: int) -> Tensor:
    return KNOWN.sample(fold(0, torch.arange(count)))


def divergence(model: ProductMixture) -> float:
    """KL of KNOWN from a model, nats, by enumeration."""
    log_p = KNOWN.log_prob(EVERY)
    return (log_p.exp() * (log_p - model.log_prob(EVERY))).sum().item()


def test_probabilities_are_products_in_a_sum() -> None:
    expected = [known_probability(x) for x in EVERY]
    assert sum(expected) == pytest.approx(1)
    assert KNOWN.log_prob(EVERY).exp().tolist() == pytest.approx(expected, rel=1e-5)


def test_samples_occur_as_often_as_they_should() -> None:
    count = 20_000
    x = drawn(count)
    assert x.dtype == torch.uint8
    occurs = torch.bincount(x.long() @ LEVELS ** torch.arange(DIMS).flip(0), minlength=len(EVERY))
    expected = count * KNOWN.log_prob(EVERY).exp()
    chi_squared = ((occurs - expected).square() / expected).sum().item()
    degrees = len(EVERY) - 1
    assert abs(chi_squared - degrees) < 5 * (2 * degrees) ** 0.5
    assert torch.equal(x[5:6], KNOWN.sample(fold(0, torch.arange(5, 6))))


def test_independent_dimensions_have_their_frequencies(digits: Dataset) -> None:
    counts = digits.spec.counts
    assert counts is not None
    x = torch.tensor(digits.splits["train"].x[:5])
    total = len(digits.splits["train"])
    for image, nats in zip(x, independent(counts).log_prob(x), strict=True):
        seen = torch.tensor([counts[d, level] for d, level in enumerate(image.flatten().tolist())])
        assert nats.item() == pytest.approx(((seen + 1 / 17) / (total + 1)).log().sum().item(), rel=1e-5)


def test_without_counts_all_images_are_alike() -> None:
    nats = independent(torch.zeros(DIMS, LEVELS)).log_prob(EVERY)
    torch.testing.assert_close(nats.exp(), torch.full((81,), 1 / 81))


def test_fitting_finds_the_mixture_that_made_the_data() -> None:
    x = drawn(5000)
    counts = torch.stack([torch.bincount(column.long(), minlength=LEVELS) for column in x.T])
    assert divergence(independent(counts)) > 0.2
    fitted = fit_mixture(x, LEVELS, components=2, prior=0.1, steps=100)
    assert divergence(fitted) < 0.005
    assert sorted(fitted.log_weight.exp().tolist()) == pytest.approx([0.3, 0.7], abs=0.03)


def log_posterior(mixture: ProductMixture, x: Tensor, prior: float) -> Tensor:
    """What fitting should maximize, written down once more."""
    frequency = independent(torch.nn.functional.one_hot(x.flatten(1).long(), 17).sum(0)).log_mass.exp()
    log_prior = (frequency * mixture.log_mass).sum() + mixture.log_weight.sum()
    return mixture.log_prob(x).sum() + prior * log_prior


def test_every_step_of_fitting_raises_the_posterior(digits: Dataset) -> None:
    x = torch.tensor(digits.splits["train"].x[:300])
    fits = [fit_mixture(x, 17, components=8, prior=5.0, steps=steps) for steps in range(1, 12)]
    heights = [log_posterior(mixture, x, 5.0).item() for mixture in fits]
    assert all(later > earlier - 0.05 for earlier, later in pairwise(heights))
    assert heights[-1] > heights[0] + 100


def test_fitting_ends_where_the_posterior_is_flat(digits: Dataset) -> None:
    x = torch.tensor(digits.splits["train"].x[:300])
    fitted = fit_mixture(x, 17, components=4, prior=30.0, steps=100)
    weight, mass = fitted.log_weight.requires_grad_(), fitted.log_mass.requires_grad_()
    height = log_posterior(ProductMixture(weight.log_softmax(0), mass.log_softmax(1)), x, 30.0)
    for slope in torch.autograd.grad(height, (weight, mass)):
        assert slope.abs().max() < 0.01  # of an example


def test_a_prior_beyond_all_data_makes_dimensions_independent() -> None:
    x = drawn(200)
    counts = torch.nn.functional.one_hot(x.long(), LEVELS).sum(0)
    fitted = fit_mixture(x, LEVELS, components=3, prior=1e6)
    torch.testing.assert_close(fitted.log_prob(EVERY), independent(counts).log_prob(EVERY), atol=0.01, rtol=0)
