"""Distances of feature sets against closed forms, another square root of matrices, and counting by hand."""

import math

import numpy as np
import numpy.typing as npt
import pytest
import scipy.linalg
import torch
from torch import Tensor

from gdl_ray.evaluate import fidelity
from gdl_ray.evaluate.fidelity import Neighbours, frechet_distance, label_agreement, neighbours
from gdl_ray.random import fold, normal

K = 5


def features(seed: int, count: int, dims: int = 6) -> Tensor:
    """Correlated normal features, not centred."""
    mixing = normal(fold(seed, torch.arange(dims), 1), (dims,))
    return torch.addmm(torch.tensor(0.3 * seed), normal(fold(seed, torch.arange(count)), (dims,)), mixing)


def with_moments(count: int, mean: Tensor, root: Tensor) -> Tensor:
    """Features whose mean and covariance root^T root are exact."""
    noise = normal(fold(0, torch.arange(count)), (len(mean),)).double()
    orthogonal, _ = torch.linalg.qr(noise - noise.mean(0))
    return torch.addmm(mean, orthogonal, root, alpha=math.sqrt(count - 1))


def test_frechet_distance_of_known_normals() -> None:
    rotation, _ = torch.linalg.qr(features(1, 4, 4).double())
    mean, other = torch.tensor([[0.0, 0, 0, 0], [1, -2, 0, 2]]).double()
    scale, other_scale = torch.tensor([[1.0, 2, 3, 0.5], [2, 2, 1, 4]]).double()
    # Covariances that commute: the distance is that of means plus that of standard deviations.
    first = with_moments(50, mean, scale.diag() @ rotation)
    second = with_moments(80, other, other_scale.diag() @ rotation)
    assert frechet_distance(first, second) == pytest.approx(9 + (1 + 0 + 4 + 3.5**2), rel=1e-9)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9)


def frechet_by_square_root(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    covariances = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1])
    spread = np.trace(covariances[0] + covariances[1] - 2 * root.real)
    return float(np.square(a.mean(0) - b.mean(0)).sum() + spread)


@pytest.mark.parametrize(("count", "other"), [(300, 200), (40, 500), (7, 7)])
def test_frechet_distance_by_the_square_root_of_a_matrix(count: int, other: int) -> None:
    a, b = features(1, count), features(2, other)
    expected = frechet_by_square_root(a.double().numpy(), b.double().numpy())
    assert expected > 1
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_fewer_points_than_dimensions() -> None:
    a = features(1, 4)
    assert frechet_distance(a, a + 2) == pytest.approx(6 * 4, rel=1e-5)


def by_hand(data: Tensor, samples: Tensor, k: int) -> Neighbours:
    """Count balls one by one."""

    def radius(points: Tensor, i: int) -> float:
        return sorted(math.dist(points[i], other) for j, other in enumerate(points) if j != i)[k - 1]

    def holds(points: Tensor, radii: list[float], x: Tensor) -> list[bool]:
        return [math.dist(point, x) <= r for point, r in zip(points, radii, strict=True)]

    data, samples = data.double(), samples.double()
    data_radii = [radius(data, i) for i in range(len(data))]
    sample_radii = [radius(samples, i) for i in range(len(samples))]
    of_samples = np.array([holds(data, data_radii, x) for x in samples])
    of_data = np.array([holds(samples, sample_radii, x) for x in data])
    return Neighbours(
        precision=float(of_samples.any(1).mean()),
        recall=float(of_data.any(1).mean()),
        density=float(of_samples.sum() / k / len(samples)),
        coverage=float(of_samples.any(0).mean()),
    )


def assert_same(found: Neighbours, expected: Neighbours) -> None:
    for name in ("precision", "recall", "density", "coverage"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), abs=1e-12), name


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize(("count", "other"), [(60, 45), (40, 70)])
@pytest.mark.parametrize("rows", [3, 10**6], ids=["in parts", "whole"])
def test_neighbours_by_hand(
    k: int, count: int, other: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fidelity, "_CHUNK_DISTANCES", rows * 45)
    data, samples = features(0, count, 3), 0.7 * features(0, 200, 3)[-other:] + 1.5
    expected = by_hand(data, samples, k)
    assert all(0 < share < 1 for share in (expected.precision, expected.recall, expected.coverage))
    assert_same(neighbours(data, samples, k), expected)


def test_neighbours_on_a_line() -> None:
    data = torch.arange(10.0)[:, None]  # balls of radius 1
    samples = torch.tensor([[0.5], [2.5], [11.0], [30.0]])  # of radius 2, 2, 8.5 and 19
    expected = Neighbours(precision=2 / 4, recall=1.0, density=(2 + 2) / 4, coverage=4 / 10)
    assert_same(neighbours(data, samples, k=1), expected)


def test_neighbours_of_the_data_itself() -> None:
    data = features(1, 100)
    # Each ball holds its centre and k others.
    assert_same(neighbours(data, data, K), Neighbours(1.0, 1.0, (K + 1) / K, 1.0))


def test_neighbours_of_samples_elsewhere() -> None:
    data = features(1, 100)
    assert_same(neighbours(data, data + 1000, K), Neighbours(0.0, 0.0, 0.0, 0.0))


def test_samples_that_are_all_one_image_are_precise_and_reach_little() -> None:
    data = features(1, 100)
    found = neighbours(data, data[:1].expand(50, -1), K)
    # Their balls have radius 0, and hold the one image that they copy.
    assert (found.precision, found.recall) == (1.0, 0.01)
    assert found.coverage < 0.2


def test_small_distances_far_from_the_origin_are_kept() -> None:
    grid = torch.arange(40.0)[:, None].expand(-1, 32) * 2.0**-6
    assert_same(neighbours(grid + 1024, grid + 1024, 2), neighbours(grid, grid, 2))


def test_sets_without_enough_neighbours_are_refused() -> None:
    with pytest.raises(ValueError, match="5 samples have no 5-th nearest neighbours"):
        neighbours(features(1, 6), features(2, 5), K)


def test_label_agreement_is_a_share() -> None:
    assert label_agreement(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 0, 3, 4])) == 0.75
