"""Dropout: how much it drops, that means are kept, and whose noise it uses."""

import math

import pytest
import torch

from gdl_ray.nn.dropout import dropout
from gdl_ray.random import fold

KEYS = fold(0, torch.arange(50))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_it_drops_the_share_asked_for_and_scales_the_rest(rate: float) -> None:
    x = torch.ones(50, 20, 30)
    y = dropout(x, rate, KEYS, stream=4)
    share = (y == 0).float().mean().item()
    assert share == pytest.approx(rate, abs=4 * math.sqrt(rate * (1 - rate) / x.numel()))
    torch.testing.assert_close(y, torch.where(y == 0, 0, 1 / (1 - rate)))


def test_the_mask_of_an_example_is_its_key_s() -> None:
    x = torch.ones(50, 40)
    y = dropout(x, 0.5, KEYS, stream=1)
    assert torch.equal(y[7:9], dropout(x[7:9], 0.5, KEYS[7:9], stream=1))
    assert len({tuple(row) for row in y.tolist()}) == 50
    other = dropout(x, 0.5, KEYS, stream=2)
    agreement = (y == other).float().mean().item()
    assert agreement == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(x.numel()))


def test_without_key_or_rate_it_changes_nothing() -> None:
    x = torch.randn(50, 3)
    assert torch.equal(dropout(x, 0.5, None, stream=0), x)
    assert torch.equal(dropout(x, 0.0, KEYS, stream=0), x)


def test_it_keeps_the_precision() -> None:
    assert dropout(torch.ones(50, 3, dtype=torch.bfloat16), 0.5, KEYS, stream=0).dtype == torch.bfloat16


def test_gradients_pass_where_values_do() -> None:
    x = torch.ones(50, 6, requires_grad=True)
    y = dropout(x, 0.25, KEYS, stream=0)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, y.detach())
