"""A learned map of ordered levels to normal variables, dimension by dimension.

Level x and a uniform u within its bin become z = Phi^-1(F(x + u)), where F is the piecewise linear
distribution function whose bins have learned masses: the first half of a Gaussian copula. With the masses at
the frequencies of the data, and z normal, the model is that of independent dimensions: what is built on z
starts from there, and has only the dependence to learn.

Both tails are computed as sums of masses, never as one minus the other: in float32 a level that one example
in a million shows still has its own place on the line.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LEAST = 1e-30  # a smaller tail would be at infinity


class MarginalGaussianization(nn.Module):
    """Turns levels into normal variables and back.

    Args:
        counts: how often each level occurs at each dimension, int64 of shape (dims, levels); None where the
            masses will be loaded.
        dims: number of dimensions.
        levels: number of levels.
    """

    def __init__(self, counts: Tensor | None, dims: int, levels: int):
        super().__init__()
        counts = torch.zeros(dims, levels) if counts is None else counts.float()
        # One more example, spread evenly, so that no level is impossible.
        self.log_mass = nn.Parameter(((counts + 1 / levels) / (counts.sum(1, keepdim=True) + 1)).log())

    def forward(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Map levels to normal variables.

        Args:
            x: levels, any integer type, shape (B, dims).
            u: where in its bin each lies, float in (0, 1), shape (B, dims).

        Returns:
            z, shape (B, dims), and log |dz / d(x + u)| summed over dimensions, shape (B,).
        """
        log_mass = self.log_mass.log_softmax(1)
        mass = log_mass.exp()
        x, u = x.long().T, u.T  # as the tables: dimensions first
        lower = _below(mass).gather(1, x) + u * mass.gather(1, x)
        upper = _above(mass).gather(1, x) + (1 - u) * mass.gather(1, x)
        smaller = torch.special.ndtri(torch.minimum(lower, upper).clamp(min=_LEAST))
        z = torch.where(lower < upper, smaller, -smaller)
        log_normal = -0.5 * z.square() - 0.5 * math.log(2 * math.pi)
        return z.T, (log_mass.gather(1, x) - log_normal).sum(0)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Map normal variables, shape (B, dims), back.

        Returns:
            Levels, int64, and where in its bin each lies, in [0, 1]; both (B, dims).
        """
        mass = self.log_mass.softmax(1)
        # The smaller tail of the normal; torch.special.ndtr has no correct digit far out in float32.
        smaller = 0.5 * torch.erfc(z.abs() / math.sqrt(2)).T.contiguous()
        from_first, into_first = _locate(mass, smaller)
        from_last, into_last = _locate(mass.flip(1), smaller)
        low = z < 0
        x = torch.where(low, from_first.T, mass.shape[1] - 1 - from_last.T)
        return x, torch.where(low, into_first.T, 1 - into_last.T)


def _below(mass: Tensor) -> Tensor:
    """Sum the masses of the levels below each: (dims, levels)."""
    return F.pad(mass.cumsum(1)[:, :-1], (1, 0))


def _above(mass: Tensor) -> Tensor:
    """Sum the masses of the levels above each: (dims, levels)."""
    return _below(mass.flip(1)).flip(1)


def _locate(mass: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Find the bin in which the masses add up to v, and the share of the bin it takes; (dims, B) each."""
    x = torch.searchsorted(mass.cumsum(1), v).clamp(max=mass.shape[1] - 1)
    share = (v - _below(mass).gather(1, x)) / mass.gather(1, x)
    return x, share.clamp(0, 1)
