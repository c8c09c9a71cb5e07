"""The marginal map against SciPy's normal, autograd and independent categoricals, on hopeless pixels too."""

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from gdl_ray.nn.marginal import MarginalGaussianization
from gdl_ray.random import fold, uniform

LEVELS = 256


def hard_counts() -> Tensor:
    """Count levels of 60,000 examples at pixels that are always off, on, or grey; one of two; any."""
    counts = torch.zeros(5, LEVELS, dtype=torch.int64)
    counts[0, 0] = counts[1, -1] = counts[2, 100] = 60_000
    counts[3, 0], counts[3, 255] = 40_000, 20_000
    counts[4] = 100 + 500 * (torch.arange(LEVELS) % 7)
    return counts


def hard_map() -> MarginalGaussianization:
    return MarginalGaussianization(hard_counts(), 5, LEVELS)


def every_level(dims: int) -> tuple[Tensor, Tensor]:
    """Each level at each dimension, and places in their bins."""
    x = torch.arange(LEVELS)[:, None].expand(LEVELS, dims)
    return x, uniform(fold(0, torch.arange(LEVELS)), (dims,))


def test_it_is_the_normal_quantile_of_the_distribution_function() -> None:
    marginal, (x, u) = hard_map().double(), every_level(5)
    z, _ = marginal(x, u.double())
    mass = marginal.log_mass.detach().softmax(1).numpy()
    below = mass.cumsum(1) - mass
    for d in range(5):
        v = below[d] + u[:, d].double().numpy() * mass[d]
        torch.testing.assert_close(
            z[:, d].detach(), torch.from_numpy(stats.norm.ppf(v)), atol=1e-5, rtol=1e-6
        )


def test_the_inverse_finds_every_level_even_where_no_example_has_it() -> None:
    marginal, (x, u) = hard_map(), every_level(5)
    z, log_det = marginal(x, u)
    assert z.isfinite().all()
    assert log_det.isfinite().all()
    found, place = marginal.inverse(z)
    # Of two values the levels between have a ten-millionth of the mass half-way up, where float32 ends.
    told_apart = torch.ones(LEVELS, 5, dtype=torch.bool)
    told_apart[1:255, 3] = False
    assert torch.equal(found[told_apart], x[told_apart])
    torch.testing.assert_close(place[told_apart], u[told_apart], atol=0.01, rtol=0)
    common = hard_counts().T > 100
    torch.testing.assert_close(place[common], u[common], atol=2e-4, rtol=0)


def test_normal_variables_come_back() -> None:
    marginal = hard_map()
    z = torch.linspace(-4, 4, 81)[:, None].expand(81, 5)
    again, _ = marginal(*marginal.inverse(z))
    torch.testing.assert_close(again, z, atol=3e-4, rtol=0)  # float32 u, close to 1


def test_variables_beyond_float_decode_to_the_ends() -> None:
    x, place = hard_map().inverse(torch.tensor([[-40.0], [40.0]]).expand(2, 5))
    assert x.tolist() == [[0] * 5, [LEVELS - 1] * 5]
    assert ((place >= 0) & (place <= 1)).all()


def test_log_determinant_is_the_jacobians() -> None:
    marginal, (x, u) = hard_map().double(), every_level(5)
    u = u.double().requires_grad_()
    z, log_det = marginal(x, u)
    (slopes,) = torch.autograd.grad(z.sum(), u)  # each z depends on its own u alone
    torch.testing.assert_close(log_det, slopes.log().sum(1), atol=1e-8, rtol=1e-8)


def test_with_a_normal_prior_it_is_independent_categoricals_from_the_start() -> None:
    marginal, (x, u) = hard_map(), every_level(5)
    z, log_det = marginal(x, u)
    log_density = (-0.5 * z.square() - 0.5 * math.log(2 * math.pi)).sum(1) + log_det
    counts = hard_counts().double()
    share = (counts + 1 / LEVELS) / (counts.sum(1, keepdim=True) + 1)
    torch.testing.assert_close(log_density.double(), share.log().sum(0), atol=1e-3, rtol=1e-5)


def test_its_gradient_is_that_of_categoricals() -> None:
    marginal, (x, u) = hard_map(), every_level(5)
    z, log_det = marginal(x, u)
    (log_det - 0.5 * z.square().sum(1)).sum().backward()
    # d log softmax(m)[x] / dm = onehot(x) - softmax(m), and every level occurs once.
    expected = 1 - LEVELS * marginal.log_mass.detach().softmax(1)
    assert marginal.log_mass.grad is not None
    torch.testing.assert_close(marginal.log_mass.grad, expected, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("output", [0, 1])
def test_gradients_of_both_outputs_are_those_of_finite_differences(output: int) -> None:
    marginal = MarginalGaussianization(torch.tensor([[5, 1, 0], [2, 2, 3]]), 2, 3).double()
    x = torch.tensor([[0, 2], [1, 1], [2, 0]])
    u = torch.tensor([[0.2, 0.9], [0.5, 0.4], [0.7, 0.1]], dtype=torch.float64)

    def result(log_mass: Tensor) -> Tensor:
        outputs: tuple[Tensor, Tensor] = torch.func.functional_call(marginal, {"log_mass": log_mass}, (x, u))
        return outputs[output]

    assert torch.autograd.gradcheck(result, marginal.log_mass.detach().requires_grad_())
