"""The discretized logistic against SciPy's logistic, and its sampler against its probabilities."""

import numpy as np
import pytest
import torch
from scipy import stats

from gdl_ray.nn import logistic

LEVELS = 17


@pytest.mark.parametrize("mean", [-1.3, -0.2, 0.9])
@pytest.mark.parametrize("log_scale", [-4.0, -1.0, 2.0])
def test_log_prob_is_the_difference_of_the_distribution_function(mean: float, log_scale: float) -> None:
    edges = np.linspace(-1, 1, LEVELS + 1)
    edges[0], edges[-1] = -np.inf, np.inf
    expected = np.diff(stats.logistic(mean, np.exp(log_scale)).cdf(edges))
    x = torch.arange(LEVELS).double()
    parameters = torch.full_like(x, mean), torch.full_like(x, log_scale)
    probabilities = logistic.log_prob(x, *parameters, LEVELS).exp()
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(probabilities.numpy(), expected, rtol=1e-6, atol=1e-12)


def test_log_prob_stays_finite_far_out() -> None:
    x = torch.tensor([0, 8, 16])
    values = logistic.log_prob(x, torch.tensor(50.0), torch.tensor(-6.0), LEVELS)
    assert values.isfinite().all()
    assert values[2] == 0


def test_samples_follow_the_probabilities() -> None:
    u = (torch.arange(100_000) + 0.5) / 100_000
    mean, log_scale = torch.tensor(0.1), torch.tensor(-1.5)
    shares = torch.bincount(logistic.sample(u, mean, log_scale, LEVELS), minlength=LEVELS) / len(u)
    expected = logistic.log_prob(torch.arange(LEVELS), mean, log_scale, LEVELS).exp()
    torch.testing.assert_close(shares, expected, atol=1e-4, rtol=0)


def test_quantize_inverts_centers() -> None:
    x = torch.arange(LEVELS, dtype=torch.uint8)
    assert torch.equal(logistic.quantize(logistic.centers(x, LEVELS), LEVELS), x)
