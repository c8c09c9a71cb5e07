"""What a model must beat: densities without a network.

    p(x) = sum over m of w_m p_m(x),     p_m(x) = product over d of p_m(x_d)

With one component and the frequencies of the training split, dimensions are independent. With many, fitted by
expectation maximization, p(x) knows whole shapes that come back, but nothing of which parts come back.

References:
    Dempster, Laird, Rubin. Maximum Likelihood from Incomplete Data via the EM Algorithm. 1977.
    https://doi.org/10.1111/j.2517-6161.1977.tb01600.x
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gdl_ray.random import fold, uniform

_COMPONENT, _VALUES = 0, 1  # what the noise of a sample is for


@dataclass(frozen=True, slots=True)
class ProductMixture:
    """A mixture of distributions in each of which all dimensions are independent."""

    log_weight: Tensor
    """log w_m, float (M,)."""
    log_mass: Tensor
    """log p_m(x_d), float (dims, levels, M)."""

    def log_prob(self, x: Tensor) -> Tensor:
        """Compute log p(x) in nats of levels, any integers (N, *shape): float (N,)."""
        return self._log_joint(_levels_of(x)).logsumexp(1)

    def sample(self, keys: Tensor) -> Tensor:
        """Draw a sample per noise key, int64 (B,): uint8 (B, dims)."""
        component = _invert(self.log_weight.exp(), uniform(keys, (1,), _COMPONENT).squeeze(1))
        u = uniform(keys, self.log_mass.shape[:1], _VALUES)
        columns = zip(self.log_mass.exp(), u.T, strict=True)
        return torch.stack([_invert(mass.T[component], each) for mass, each in columns], 1).to(torch.uint8)

    def _log_joint(self, x: Tensor) -> Tensor:
        """Compute log w_m p_m(x) of levels, int64 (N, dims): (N, M)."""
        dims, levels, _ = self.log_mass.shape
        # A row of the table for each dimension and level; a bag adds up those of an example.
        rows = x + levels * torch.arange(dims, device=x.device)
        return F.embedding_bag(rows, self.log_mass.flatten(0, 1), mode="sum") + self.log_weight


def independent(counts: Tensor) -> ProductMixture:
    """Make the model whose dimensions are independent from level counts, (dims, levels).

    One more example is spread evenly over the levels, lest any be impossible. From zeros alone it is uniform.
    """
    mass = (counts + 1 / counts.shape[1]) / (counts.sum(1, keepdim=True) + 1)
    return ProductMixture(torch.zeros(1), mass.log()[..., None])


def fit_mixture(
    x: Tensor, levels: int, components: int = 40, prior: float = 20.0, steps: int = 30, seed: int = 0
) -> ProductMixture:
    """Fit a mixture by expectation maximization, to a local maximum of its posterior.

    Args:
        x: levels of the training split, any integers (N, *shape), N >= components.
        levels: number of levels.
        components: M.
        prior: examples that each component counts beside its own, spread as those of all components are.
        steps: of expectation maximization.
        seed: decides the example that each component starts from.
    """
    x = _levels_of(x)
    everywhere = independent(_count(x, torch.ones(len(x), 1), levels).squeeze(2)).log_mass.exp()
    chosen = fold(seed, torch.arange(len(x))).argsort()[:components]
    belongs = torch.zeros(len(x), components)  # share of each example in each component
    belongs[chosen, torch.arange(components)] = 1
    for _ in range(steps):
        seen = belongs.sum(0) + prior
        mass = (_count(x, belongs, levels) + prior * everywhere) / seen
        mixture = ProductMixture((seen / seen.sum()).log(), mass.log())
        belongs = mixture._log_joint(x).softmax(1)
    return mixture


def _levels_of(x: Tensor) -> Tensor:
    return x.flatten(1).long()


def _count(x: Tensor, belongs: Tensor, levels: int) -> Tensor:
    """Add up how often each level occurs, by shares (N, M) in the components: (dims, levels, M)."""
    none = torch.zeros(levels, belongs.shape[1])
    return torch.stack([none.index_add(0, column, belongs) for column in x.T])


def _invert(mass: Tensor, u: Tensor) -> Tensor:
    """Find where the running sum of masses, (L,) or (B, L), passes uniforms, (B,): int64 (B,)."""
    found = torch.searchsorted(mass.cumsum(-1), u[:, None].contiguous()).squeeze(1)
    return found.clamp(max=mass.shape[-1] - 1)
