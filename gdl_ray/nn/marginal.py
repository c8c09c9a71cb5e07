"""A learned map of ordered levels to normal variables, dimension by dimension.

Level x and a uniform u within its bin become z = Phi^-1(F(x + u)), where F is the piecewise linear
distribution function whose bins have learned masses: the first half of a Gaussian copula. With the masses at
the frequencies of the data, and z normal, the model is that of independent dimensions: what is built on z
starts from there, and has only the dependence to learn.
"""

import math

import torch
from torch import Tensor, nn

_TAIL = 1e-6  # F stays so far from 0 and 1, lest z be infinite


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
        below = mass.cumsum(1) - mass
        x = x.long()
        dimension = torch.arange(x.shape[1], device=x.device).expand_as(x)
        v = (below[dimension, x] + u * mass[dimension, x]).clamp(_TAIL, 1 - _TAIL)
        z = math.sqrt(2) * torch.erfinv(2 * v - 1)
        log_normal = -0.5 * z.square() - 0.5 * math.log(2 * math.pi)
        return z, (log_mass[dimension, x] - log_normal).sum(1)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Map normal variables, shape (B, dims), back.

        Returns:
            Levels, int64, and where in its bin each lies, in [0, 1]; both (B, dims).
        """
        mass = self.log_mass.softmax(1)
        above = mass.cumsum(1)
        v = 0.5 * (1 + torch.erf(z / math.sqrt(2)))
        x = torch.searchsorted(above, v.T.contiguous()).T.clamp(max=mass.shape[1] - 1)
        dimension = torch.arange(x.shape[1], device=x.device).expand_as(x)
        u = (v - (above - mass)[dimension, x]) / mass[dimension, x]
        return x, u.clamp(0, 1)
