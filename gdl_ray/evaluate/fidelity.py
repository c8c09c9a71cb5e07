"""How near a set of samples is to a set of data, and how much of it they reach, in a space of features.

The Frechet distance is that of normal distributions with the means and covariances of the two sets (Heusel et
al., Eq. 6):

    |m - m'|^2 + trace(C + C' - 2 (C C')^(1/2))

The kernel distance (KID) compares all moments to the third, and has no bias by the sizes of the sets: the
squared maximum mean discrepancy (Gretton et al., Eq. 3) under a cubic kernel (Binkowski et al., section 3),

    E k(x, x') + E k(y, y') - 2 E k(x, y),     k(a, b) = (a . b / D + 1)^3

The others count points x in balls: a ball lies around each point of one set and ends at its k-th nearest
neighbour in that set (Kynkaanniemi et al., Eq. 1 and 2; Naeem et al., section 3).

    precision   share of samples in a ball of the data       recall     share of data in a ball of samples
    density     balls of the data that a sample lies in,     coverage   share of the data's balls that hold
                over k; above 1 where they crowd                        a sample

All but the kernel distance depend on the sizes of the sets, and all on the features: compare figures of equal
ones.

References:
    Gretton et al. A Kernel Two-Sample Test. 2012. https://jmlr.org/papers/v13/gretton12a.html
    Efron, Stein. The Jackknife Estimate of Variance. 1981. https://doi.org/10.1214/aos/1176345462
    Heusel et al. GANs Trained by a Two Time-Scale Update Rule. 2017. https://arxiv.org/abs/1706.08500
    Binkowski et al. Demystifying MMD GANs. 2018. https://arxiv.org/abs/1801.01401
    Kynkaanniemi et al. Improved Precision and Recall Metric. 2019. https://arxiv.org/abs/1904.06991
    Naeem et al. Reliable Fidelity and Diversity Metrics. 2020. https://arxiv.org/abs/2002.09797
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK_DISTANCES = 2**22  # that are held at a time, 16 MiB
_CHUNK_ROWS = 1024  # whose products are held at a time


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


def kernel_distance(data: Tensor, samples: Tensor) -> tuple[float, float]:
    """Compute the kernel distance between features, (N, D) and (M, D), and its standard error.

    The estimate is that of all pairs, which the customary mean over random subsets only approaches; it may be
    negative. Its error is the jackknife's, an example left out at a time, over both sets: right where they
    differ, and up to the square root of 2 too large where they are alike (Efron and Stein).

    Takes time in proportion to (N + M) D^3, and memory to D^3: it is for tens of dimensions.

    Raises:
        ValueError: if a set has fewer than three points.
    """
    for name, features in (("data", data), ("samples", samples)):
        if len(features) < 3:
            raise ValueError(f"{len(features)} {name} are too few to tell an error: give 3 or more")
    a, b = _lifted(data), _lifted(samples)
    of_a, of_b = _third_moment(a), _third_moment(b)
    across, across_b = _kernel_sums(a, of_b), _kernel_sums(b, of_a)
    within, left_out = _mean_kernel(a, of_a)
    within_b, left_out_b = _mean_kernel(b, of_b)
    # What the absence of each point makes of the estimate, but for what stays as it is.
    left_out = left_out - 2 * (across.sum() - across) / ((len(a) - 1) * len(b))
    left_out_b = left_out_b - 2 * (across_b.sum() - across_b) / (len(a) * (len(b) - 1))
    variance = (len(a) - 1) * left_out.var(correction=0) + (len(b) - 1) * left_out_b.var(correction=0)
    return float(within + within_b - 2 * across.mean() / len(b)), float(variance.sqrt())


def _lifted(features: Tensor) -> Tensor:
    """Append a coordinate, so that k(a, b) is the third power of a product: (N, D + 1)."""
    count, dims = features.shape
    ones = torch.ones(count, 1, dtype=torch.float64, device=features.device)
    return torch.cat([features.double() / dims**0.5, ones], 1)


def _third_moment(b: Tensor) -> Tensor:
    """Add up b_i b_j b_k over rows of (M, D): (D^2, D)."""
    return torch.stack([_pairs(rows).T @ rows for rows in torch.split(b, _CHUNK_ROWS)]).sum(0)


def _kernel_sums(a: Tensor, moment: Tensor) -> Tensor:
    """Add k(a, b) up over all rows b of a third moment, for each row of (N, D): (N,)."""
    return torch.cat([(_pairs(rows) @ moment * rows).sum(1) for rows in torch.split(a, _CHUNK_ROWS)])


def _pairs(a: Tensor) -> Tensor:
    """Multiply the coordinates of each row with each other: (N, D^2)."""
    return (a[:, :, None] * a[:, None, :]).flatten(1)


def _mean_kernel(a: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    """Average k over pairs of different rows, (N, D): of all, and of those left without each, (N,)."""
    count, own = len(a), a.square().sum(1) ** 3
    sums = _kernel_sums(a, moment) - own
    left_out = (sums.sum() - 2 * sums) / ((count - 1) * (count - 2))
    return sums.mean() / (count - 1), left_out


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
