"""Latents whose worth is known by construction, against closed forms."""

import math

import pytest
import torch
from torch import Tensor

from gdl_ray.data import Dataset
from gdl_ray.evaluate.interpret import active_units, arc, class_coverage, linear_probe, smoothness
from gdl_ray.family import UNLABELLED, Latent
from gdl_ray.random import fold, normal

ANGLE = math.pi / 3


class Plane(Latent):
    """Examples are angles on the unit circle; what is decoded is a function of the place on the circle."""

    def __init__(self, jump: bool = False) -> None:
        self.jump = jump
        self.latent_dims = 2

    def encode(self, x: Tensor, labels: Tensor) -> Tensor:
        assert (labels == UNLABELLED).all()
        return torch.stack([x.cos(), x.sin()], 1)

    def decode(self, z: Tensor, labels: Tensor) -> Tensor:
        assert (labels == UNLABELLED).all()
        return (z[:, 1:] > 0.5).float() if self.jump else z


def test_the_way_on_a_circle_is_an_arc() -> None:
    x = torch.tensor([0.0, 1.0, ANGLE, 1.0 + ANGLE])
    found = smoothness(Plane(), lambda decoded: decoded, x)
    chord, step = 2 * math.sin(ANGLE / 2), 2 * math.sin(ANGLE / 32)
    assert found.straightness == pytest.approx(chord / (16 * step), rel=1e-5)
    assert found.largest_step == pytest.approx(1, rel=1e-4)


def test_a_jump_is_one_step_of_all() -> None:
    found = smoothness(Plane(jump=True), lambda decoded: decoded, torch.tensor([0.0, 1.5]))
    assert (found.straightness, found.largest_step) == pytest.approx((1, 16))


def test_a_way_that_goes_nowhere_is_straight() -> None:
    found = smoothness(Plane(), torch.zeros_like, torch.tensor([0.0, 0.0, ANGLE, ANGLE]))
    assert (found.straightness, found.largest_step) == (1, 1)


def test_a_detour_is_told() -> None:
    # Features go there and back again: 1, 0, 1 on the way from one end to the other, squared.
    found = smoothness(Plane(), lambda z: (z[:, :1] - math.cos(ANGLE / 2)).square(), torch.tensor([0, ANGLE]))
    there, back = (1 - math.cos(ANGLE / 2)) ** 2, (math.cos(ANGLE) - math.cos(ANGLE / 2)) ** 2
    assert found.straightness == pytest.approx(abs(back - there) / (there + back), rel=1e-4)
    assert found.largest_step > 1.5


def test_arcs_keep_their_radius_and_their_pace() -> None:
    start, end = (normal(fold(i, torch.arange(5)), (8,)) for i in (0, 1))
    start, end = start / start.norm(dim=1, keepdim=True), end / end.norm(dim=1, keepdim=True)
    way = arc(start, end, 7)
    torch.testing.assert_close(way[0], start)
    torch.testing.assert_close(way[-1], end)
    torch.testing.assert_close(way.norm(dim=2), torch.ones(7, 5))
    angles = (way[1:] * way[:-1]).sum(2).acos()
    torch.testing.assert_close(angles, angles[:1].expand(6, 5), rtol=1e-3, atol=1e-4)


def test_ends_of_one_direction_or_of_opposite_ones_are_joined_by_a_line() -> None:
    start, end = torch.tensor([[[1.0, 2.0], [1.0, 0.0]], [[2.0, 4.0], [-1.0, 0.0]]])
    torch.testing.assert_close(arc(start, end, 3)[1], torch.tensor([[1.5, 3.0], [0.0, 0.0]]))


def test_a_probe_reads_what_is_linear_and_nothing_else() -> None:
    z, fresh = (normal(fold(i, torch.arange(2000)), (4,)) for i in (0, 1))
    scale, shift = torch.tensor([1e-3, 1, 1, 1]), torch.tensor([5.0, 0, 0, 0])

    def accuracy(truth: Tensor, other: Tensor) -> float:
        return linear_probe(z * scale + shift, truth.long(), fresh * scale + shift, other.long())

    # On the scale of the noise, and far from the origin: values are standardised.
    assert accuracy(z[:, 0] > 0, fresh[:, 0] > 0) > 0.98
    assert accuracy(z[:, 0] * z[:, 1] > 0, fresh[:, 0] * fresh[:, 1] > 0) == pytest.approx(0.5, abs=0.06)


def test_a_probe_is_as_good_as_the_best_rule_on_two_normals() -> None:
    y = torch.arange(4000) % 2
    x = normal(fold(0, torch.arange(4000)), (3,)) + torch.where(y == 1, 1.0, -1.0)[:, None]
    best = 0.5 * math.erfc(-math.sqrt(3 / 2))  # Phi of half the distance of the means
    assert linear_probe(x[:2000], y[:2000], x[2000:], y[2000:]) == pytest.approx(best, abs=0.015)


def test_pixels_of_digits_are_almost_linear(digits: Dataset) -> None:
    train, test = (
        (torch.tensor(split.x).flatten(1), torch.tensor(split.y))
        for split in (digits.splits["train"], digits.splits["test"])
    )
    assert linear_probe(*train, *test) == pytest.approx(0.96, abs=0.02)


def test_units_are_active_where_their_means_move() -> None:
    z = normal(fold(0, torch.arange(5000)), (4,)) * torch.tensor([1.0, 0.11, 0.09, 0.0]) + 3
    assert active_units(z) == 2
    assert active_units(z, threshold=0.5) == 1


def test_coverage_is_the_share_of_classes() -> None:
    assert class_coverage(torch.arange(20) % 5, classes=5) == pytest.approx(1)
    assert class_coverage(torch.arange(20) % 2, classes=5) == pytest.approx(2 / 5)
    assert class_coverage(torch.zeros(7, dtype=torch.int64), classes=5) == pytest.approx(1 / 5)
    # One class half of the time, two others a quarter: 2^1.5 classes.
    assert class_coverage(torch.tensor([0, 0, 1, 2]), classes=4) == pytest.approx(2**1.5 / 4)
