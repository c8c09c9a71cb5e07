"""Whether a model makes anything, or repeats the images that it was trained on.

A copy lies much nearer to one training image than to any other. So a sample x is one if the ratio of its
distances to the two nearest, t1 and t2 (Yoon et al.), is as small as for one held-out image in a hundred:

    |x - t1| / |x - t2|  <=  the 1st percentile of this ratio over held-out images

The distance |x - t1| alone accuses the wrong ones: blurred images, and models that keep to plain ones, lie
nearer to the training split than held-out images do, and copy none of it. How much nearer is reported, as a z
of Mann and Whitney (Meehan et al.), negative where samples are nearer.

References:
    Mann, Whitney. On a Test of Whether One of Two Random Variables is Stochastically Larger than the Other.
        1947. https://doi.org/10.1214/aoms/1177730491
    Meehan, Chaudhuri, Dasgupta. A Non-Parametric Test to Detect Data-Copying in Generative Models. 2020.
        https://arxiv.org/abs/2004.05675
    Yoon et al. Diffusion Probabilistic Models Generalize when They Fail to Memorize. 2023.
        https://openreview.net/forum?id=shciCbSk9h
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gdl_ray.images import png_grid

_PERCENTILE = 0.01
_MOST_COPIED = 0.05  # share of samples beyond what held-out images have; with few held out, chance adds some
_CHUNK_DISTANCES = 2**23  # that are held at a time, 32 MiB
_EXACT_DIMS = 2**10  # whose products of bytes float32 adds up without rounding: 2^10 * 128^2 = 2^24


@dataclass(frozen=True, slots=True)
class Memorisation:
    """What samples have from the training split."""

    copied_share: float
    """Share of samples that are copies of a training image, in [0, 1]; about 0.01 for real images."""
    z: float
    """How much farther from the training split than held-out images: standard normal for real images."""
    is_memorised: bool
    """Whether more samples are copies than chance explains."""


def nearest(train: Tensor, x: Tensor, k: int = 2) -> tuple[Tensor, Tensor]:
    """Find the nearest training images, exactly.

    Args:
        train: images, uint8 (N, *shape).
        x: images of the same shape, uint8 (M, *shape), on the same device.
        k: how many, from 1 to N.

    Returns:
        Euclidean distances in levels, float32 (M, k), ascending, and the rows of the images, int64 (M, k).

    Raises:
        ValueError: if there are fewer than k training images.
    """
    if not 1 <= k <= len(train):
        raise ValueError(f"k={k} must lie between 1 and the number of training images, {len(train)}")
    train, x = _centred(train), _centred(x)
    # |x - t|^2 = |x|^2 + (|t|^2 - 2 x . t), in integers: copies are at distance 0.
    norms, squares = _squares(train), _squares(x)
    found = []
    count = max(1, _CHUNK_DISTANCES // len(train))
    for rows, square in zip(torch.split(x, count), torch.split(squares, count), strict=True):
        least, indices = torch.sub(norms, _products(rows, train), alpha=2).topk(k, largest=False)
        found.append((least + square[:, None], indices))
    distances, indices = (torch.cat(each) for each in zip(*found, strict=True))
    return distances.float().sqrt(), indices


def _centred(x: Tensor) -> Tensor:
    """Shift levels to [-128, 127]: float32 (N, dims)."""
    return x.flatten(1).float() - 128


def _squares(x: Tensor) -> Tensor:
    """Add up the squares of each row, int32 (N,)."""
    return x.square().sum(1, dtype=torch.float64).to(torch.int32)


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Multiply rows with rows, as many dimensions at a time as float32 adds up exactly: int32 (N, M)."""
    parts = zip(torch.split(a, _EXACT_DIMS, 1), torch.split(b, _EXACT_DIMS, 1), strict=True)
    first, *rest = ((part @ other.T).to(torch.int32) for part, other in parts)
    return sum(rest, start=first)


def memorisation(held_out: Tensor, samples: Tensor) -> Memorisation:
    """Judge samples by the distances to their two nearest training images, (M, 2), as `nearest` finds them.

    Those of held-out images, (N, 2), say what is usual: take a split that no weight was chosen by.
    """
    ratios = _ratios(held_out)
    threshold = torch.quantile(ratios, _PERCENTILE)
    # At it too: where a hundredth of real images is in the training split already, it is 0.
    copied, chance = ((each <= threshold).double().mean().item() for each in (_ratios(samples), ratios))
    z = mann_whitney_z(samples[:, 0], held_out[:, 0])
    return Memorisation(copied_share=copied, z=z, is_memorised=copied > chance + _MOST_COPIED)


def _ratios(distances: Tensor) -> Tensor:
    """Divide the smaller distance by the larger, (N, 2): (N,), 0 where both are 0."""
    first, second = distances.double().unbind(1)
    return torch.where(first == 0, 0, first / second)


def mann_whitney_z(a: Tensor, b: Tensor) -> float:
    """Tell by how many standard deviations values (N,) tend to be greater than others (M,).

    Standard normal, for many values, if both have one distribution; ties count half. 0 if all are equal.
    """
    n, m = len(a), len(b)
    _, place, ties = torch.unique(torch.cat([a, b]), return_inverse=True, return_counts=True)
    ties = ties.double()
    ranks = (ties.cumsum(0) - (ties - 1) / 2)[place]
    above = ranks[:n].sum() - n * (n + 1) / 2  # U: pairs in which that of a is greater
    variance = n * m / 12 * (n + m + 1 - (ties**3 - ties).sum() / ((n + m) * (n + m - 1)))
    return float((above - n * m / 2) / variance.sqrt()) if variance > 0 else 0.0


def neighbours_png(samples: Tensor, nearest: Tensor, levels: int) -> bytes:
    """Picture samples, each with the training image nearest to it at its right.

    Args:
        samples: uint8 (N, C, H, W) in [0, levels - 1], with 1 or 3 channels.
        nearest: the training images, of the same shape.
        levels: number of levels, shown from black to white.

    Returns:
        A PNG file, about square.
    """
    pairs = torch.stack([samples, nearest], 1).flatten(0, 1)
    return png_grid(pairs, levels, columns=2 * math.ceil(math.sqrt(len(samples) / 2)))
