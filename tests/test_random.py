"""Noise: known answers of the cipher, laws of the distributions, independence of everything but the key."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from gdl_ray.random import fold, normal, threefry, uniform

KEYS = torch.arange(400, dtype=torch.int64)


def word(value: int) -> Tensor:
    return torch.tensor([np.uint32(value).astype(np.int32).item()], dtype=torch.int32)


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [
        ((0, 0), (0, 0), (0x9D1C5EC6, 0x8BD50731)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0xFD36D048, 0x2D17272C)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xBA3E4725, 0xF27D669E)),
    ],
)
def test_threefry_gives_the_known_answers_of_random123(
    key: tuple[int, int], counter: tuple[int, int], expected: tuple[int, int]
) -> None:
    x0, x1 = threefry(word(key[0]), word(key[1]), word(counter[0]), word(counter[1]))
    assert (int(x0) & 0xFFFFFFFF, int(x1) & 0xFFFFFFFF) == expected


def test_uniform_is_uniform_and_open() -> None:
    u = uniform(KEYS, (500,)).double().flatten()
    assert 0 < u.min() < 1e-4
    assert 1 - 1e-4 < u.max() < 1
    assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-3
    assert u.mean().item() == pytest.approx(1 / 2, abs=4 * (1 / 12 / len(u)) ** 0.5)


def test_normal_is_normal() -> None:
    z = normal(KEYS, (500,)).double().flatten()
    n = len(z)
    assert stats.kstest(z.numpy(), "norm").pvalue > 1e-3
    # Moments of N(0, 1), each within four of its standard errors.
    for power, moment, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert (z**power).mean().item() == pytest.approx(moment, abs=4 * (variance / n) ** 0.5)


Draw = Callable[[Tensor, tuple[int, ...], Tensor | int], Tensor]


def correlation(a: Tensor, b: Tensor) -> float:
    return abs(float(np.corrcoef(a.flatten().numpy(), b.flatten().numpy())[0, 1]))


@pytest.mark.parametrize("draw", [uniform, normal])
def test_keys_streams_and_indices_are_independent(draw: Draw) -> None:
    x = draw(KEYS, (500,), 0)
    bound = 4.1 / x.numel() ** 0.5
    assert correlation(x, draw(KEYS, (500,), 1)) < bound
    assert correlation(x, draw(fold(KEYS, 0), (500,), 0)) < bound
    assert correlation(x[:-1], x[1:]) < bound
    assert correlation(x[:, :-1], x[:, 1:]) < bound
    # Not only linearly: squares of neighbours are as good as independent too.
    assert correlation(x[:, :-1].square(), x[:, 1:].square()) < bound


@pytest.mark.parametrize("draw", [uniform, normal])
def test_a_draw_depends_on_key_stream_and_index_alone(draw: Draw) -> None:
    x = draw(KEYS, (7, 3), 5)
    assert torch.equal(x, draw(KEYS, (7, 3), 5))
    assert torch.equal(x[17:18], draw(KEYS[17:18], (7, 3), 5))
    assert torch.equal(x.flatten(1)[:, :4], draw(KEYS, (4,), 5))
    streams = torch.arange(len(KEYS)) % 2 + 4
    mixed = draw(KEYS, (7, 3), streams)
    assert torch.equal(mixed[streams == 5], x[streams == 5])
    assert not torch.equal(mixed[streams == 4], x[streams == 4])


def test_fold_derives_keys_that_do_not_collide() -> None:
    keys = torch.stack([fold(KEYS, number, purpose) for number in range(50) for purpose in range(2)])
    assert len(set(keys.flatten().tolist())) == keys.numel()
    assert torch.equal(fold(7, torch.arange(3)), torch.stack([fold(7, i) for i in range(3)]))


def test_keys_stay_on_the_device_of_their_arguments() -> None:
    elsewhere = torch.device("meta")
    assert fold(0, torch.arange(3, device=elsewhere)).device == elsewhere
    assert fold(torch.zeros(3, dtype=torch.int64, device=elsewhere), 1).device == elsewhere
    assert normal(torch.zeros(3, dtype=torch.int64, device=elsewhere), (2,)).device == elsewhere
