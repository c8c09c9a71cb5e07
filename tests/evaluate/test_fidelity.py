"""Distances of feature sets against closed forms, another square root of matrices, and counting by hand."""

import math

import numpy as np
import numpy.typing as npt
import pytest
import scipy.linalg
import torch
from sklearn.metrics.pairwise import polynomial_kernel
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from gdl_ray.data import Dataset
from gdl_ray.evaluate import fidelity
from gdl_ray.evaluate.classifier import Classifier
from gdl_ray.evaluate.fidelity import (
    Neighbours,
    frechet_distance,
    kernel_distance,
    label_agreement,
    neighbours,
)
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


def kernel_by_pairs(data: Tensor, samples: Tensor) -> float:
    """Average scikit-learn's kernel over all pairs of different points."""
    a, b = data.double().numpy(), samples.double().numpy()

    def within(x: npt.NDArray[np.float64]) -> float:
        k = polynomial_kernel(x, degree=3)
        return float((k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)))

    return within(a) + within(b) - 2 * float(polynomial_kernel(a, b, degree=3).mean())


@pytest.mark.parametrize(("count", "other", "rows"), [(300, 200, 1024), (40, 250, 7), (3, 3, 2)])
def test_kernel_distance_by_pairs(count: int, other: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "_CHUNK_ROWS", rows)
    a, b = features(1, count), features(2, other)
    assert kernel_distance(a, b)[0] == pytest.approx(kernel_by_pairs(a, b), rel=1e-9)


def test_the_error_of_the_kernel_distance_is_the_jackknife() -> None:
    a, b = features(1, 6), features(2, 5)
    without = [kernel_by_pairs(torch.cat([a[:i], a[i + 1 :]]), b) for i in range(6)]
    without_b = [kernel_by_pairs(a, torch.cat([b[:i], b[i + 1 :]])) for i in range(5)]
    expected = np.sqrt(5 * np.var(without) + 4 * np.var(without_b))
    assert kernel_distance(a, b)[1] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("scale", "inflation"), [(1.5, 1.0), (1.0, math.sqrt(2))], ids=["unlike", "alike"])
def test_the_error_of_the_kernel_distance_is_its_spread(scale: float, inflation: float) -> None:
    noise = normal(fold(4, torch.arange(300 * 250)), (8,)).view(300, 250, 8)
    found = torch.tensor([kernel_distance(x[:150], scale * x[150:]) for x in noise])
    spread, error = found[:, 0].std(), found[:, 1].square().mean().sqrt()
    assert (error / spread).item() == pytest.approx(inflation, rel=0.15)
    # The kernel's mean depends on the dot product alone, so that of normals has a closed form.
    expected = sum(weight * (1 + 3 * s / 8) for weight, s in ((1, 1), (1, scale**4), (-2, scale**2)))
    assert found[:, 0].mean().item() == pytest.approx(expected, abs=4 * spread.item() / math.sqrt(300))


def test_too_few_points_are_refused() -> None:
    with pytest.raises(ValueError, match="2 samples are too few to tell an error: give 3 or more"):
        kernel_distance(features(1, 6), features(2, 2))


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


def by_scikit_learn(data: Tensor, samples: Tensor, k: int) -> Neighbours:
    """Count balls by another search for neighbours."""
    a, b = data.double().numpy(), samples.double().numpy()

    def balls(centres: npt.NDArray[np.float64], x: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
        search = NearestNeighbors(n_neighbors=k).fit(centres)
        radii = search.kneighbors()[0][:, -1]  # a point is not its own neighbour
        distances, order = NearestNeighbors(n_neighbors=len(centres)).fit(centres).kneighbors(x)
        held = np.zeros_like(distances, dtype=bool)
        np.put_along_axis(held, order, distances <= radii[order], axis=1)
        return held

    of_samples, of_data = balls(a, b), balls(b, a)
    return Neighbours(
        precision=float(of_samples.any(1).mean()),
        recall=float(of_data.any(1).mean()),
        density=float(of_samples.sum() / k / len(b)),
        coverage=float(of_samples.any(0).mean()),
    )


def test_features_of_images_against_other_implementations(digits: Dataset) -> None:
    torch.manual_seed(0)
    classifier = Classifier(digits.spec)
    data, samples = (classifier.features(torch.tensor(digits.splits[name].x)) for name in ("test", "train"))
    data, samples = data * 30, samples[::3] * 30  # an untrained one's are small
    a, b = data.double().numpy(), samples.double().numpy()
    assert frechet_distance(data, samples) == pytest.approx(frechet_by_square_root(a, b), rel=1e-4)
    assert kernel_distance(data, samples)[0] == pytest.approx(kernel_by_pairs(data, samples), rel=1e-4)
    assert_same(neighbours(data, samples, K), by_scikit_learn(data, samples, K))


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
