"""Dropout whose mask is a function of each example's own noise key: no worker and no restart changes it."""

from torch import Tensor

from gdl_ray.random import uniform


def dropout(x: Tensor, rate: float, key: Tensor | None, stream: int) -> Tensor:
    """Zero a share of the values and scale the others up by as much.

    Args:
        x: shape (B, ...).
        rate: share of zeros, in [0, 1).
        key: noise keys, int64 of shape (B,); None, as in evaluation, changes nothing.
        stream: of the noise: another one for each use in a network.
    """
    if key is None or rate == 0:
        return x
    keep = uniform(key, tuple(x.shape[1:]), stream) >= rate
    return x * (keep * (1 / (1 - rate))).to(x.dtype)
