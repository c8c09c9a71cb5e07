"""How near a set of samples is to a set of data, and how much of it they reach, in a space of features.

The Frechet distance is that of normal distributions with the means and covariances of the two sets (Heusel et
al., Eq. 6):

    |m - m'|^2 + trace(C + C' - 2 (C C')^(1/2))

The others count points x in balls: a ball lies around each point of one set and ends at its k-th nearest
neighbour in that set (Kynkaanniemi et al., Eq. 1 and 2; Naeem et al., section 3).

    precision   share of samples in a ball of the data       recall     share of data in a ball of samples
    density     balls of the data that a sample lies in,     coverage   share of the data's balls that hold
                over k; above 1 where they crowd                        a sample

All depend on the sizes of the sets and on the features: compare figures of equal ones.

References:
    Heusel et al. GANs Trained by a Two Time-Scale Update Rule. 2017. https://arxiv.org/abs/1706.08500
    Kynkaanniemi et al. Improved Precision and Recall Metric. 2019. https://arxiv.org/abs/1904.06991
    Naeem et al. Reliable Fidelity and Diversity Metrics. 2020. https://arxiv.org/abs/2002.09797
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK_DISTANCES = 2**22  # that are held at a time, 16 MiB


@dataclass(frozen=True, slots=True)
class Neighbours:
    """What balls around nearest neighbours say of samples."""

    precision: float
    """Share of samples that look like data, in [0, 1]."""
    recall: float
    """Share of data that samples could be, in [0, 1]."""
    density: float
    """How thickly the data lie where samples do, 0 or more; about 1 for samples as good as data."""
    coverage: float
    """Share of data with a sample near by, in [0, 1]."""


def frechet_distance(data: Tensor, samples: Tensor) -> float:
    """Compute the Frechet distance (squared, as is the custom) between features, (N, D) and (M, D)."""
    mean, root = _moments(data)
    sample_mean, sample_root = _moments(samples)
    # trace (C C')^(1/2) is the sum of the singular values of R R'^T, where C = R^T R and C' = R'^T R'.
    overlap = torch.linalg.svdvals(root @ sample_root.T).sum()
    spread = root.square().sum() + sample_root.square().sum()
    return float((mean - sample_mean).square().sum() + spread - 2 * overlap)


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean, and a root R of the covariance R^T R: without squaring, so small variances stay exact."""
    features = features.double()
    mean = features.mean(0)
    _, root = torch.linalg.qr((features - mean) / (len(features) - 1) ** 0.5, mode="r")
    return mean, root


def neighbours(data: Tensor, samples: Tensor, k: int = 5) -> Neighbours:
    """Compare features, (N, D) and (M, D), by balls that reach to the k-th nearest neighbour.

    Takes time in proportion to (N + M)^2, and memory in proportion to N + M.

    Raises:
        ValueError: if a set has k points or fewer.
    """
    for name, features in (("data", data), ("samples", samples)):
        if len(features) <= k:
            raise ValueError(f"{len(features)} {name} have no {k}-th nearest neighbours")
    data_radius, sample_radius = _radii(data, k), _radii(samples, k)
    near_data = torch.zeros(len(samples), dtype=torch.bool, device=data.device)
    balls = recalled = covered = 0
    for rows, distances in _distances(data, samples):
        in_data_ball = distances <= data_radius[rows, None]
        near_data |= in_data_ball.any(0)
        balls += int(in_data_ball.sum())
        covered += int(in_data_ball.any(1).sum())
        recalled += int((distances <= sample_radius).any(1).sum())
    return Neighbours(
        precision=near_data.double().mean().item(),
        recall=recalled / len(data),
        density=balls / (k * len(samples)),
        coverage=covered / len(data),
    )


def _radii(features: Tensor, k: int) -> Tensor:
    """Distance of each point to its k-th nearest neighbour, (N,)."""
    # The nearest of all is the point itself.
    return torch.cat(
        [chunk.topk(k + 1, dim=1, largest=False).values[:, -1] for _, chunk in _distances(features, features)]
    )


def _distances(a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield rows of (N, D) and their distances to all of (M, D), a bounded number at a time."""
    count = max(1, _CHUNK_DISTANCES // len(b))
    for start in range(0, len(a), count):
        rows = slice(start, start + count)
        # Not by a matrix product, which loses small distances: a copy must be at distance 0.
        yield rows, torch.cdist(a[rows], b, compute_mode="donot_use_mm_for_euclid_dist")


def label_agreement(predicted: Tensor, asked: Tensor) -> float:
    """Measure the share of samples that a classifier takes for the class they were asked to be, (N,) each."""
    return (predicted == asked).double().mean().item()
