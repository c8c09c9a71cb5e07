"""Every image of three pixels and three levels: what families say of all 27, beside exact sums and integrals.

Exact likelihoods sum to one, for each class and without. A lower bound is below log p(x) for each x: where
that is an integral over few latents or a sum over few codes, it is computed; elsewhere exp(bound) may not sum
to more than one.
"""

import math
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from gdl_ray.families import FAMILIES, build, preset
from gdl_ray.families.flow import Flow
from gdl_ray.families.hierarchical import Hierarchical
from gdl_ray.families.vae import VAE
from gdl_ray.family import UNLABELLED, Batch, DataSpec, Family, Likelihood, LikelihoodKind
from gdl_ray.random import fold, uniform

SPEC = DataSpec(
    name="tiny",
    kind="image",
    shape=(1, 1, 3),
    levels=3,
    classes=2,
    counts=torch.tensor([[5, 3, 2], [1, 6, 3], [4, 2, 4]]),
)
EVERY = torch.cartesian_prod(*[torch.arange(3, dtype=torch.uint8)] * 3).view(27, 1, 1, 3)
LABELS = torch.tensor([UNLABELLED, 0, 1]).repeat_interleave(27)
"""For each of the images thrice: without a label, and with each."""

SMALL: dict[str, dict[str, Any]] = {
    "autoregressive": {"width": 16, "depth": 1},
    "flow": {"blocks": 2, "width": 16},
    "vae": {"latent": 2, "width": 4, "hidden": 16},
    "diffusion": {"width": 16},
    "hierarchical": {"digits": 1, "base": 3, "width": 4, "prior_width": 16, "prior_depth": 1},
}
KINDS = {
    key: kind.likelihood_kind
    for key, kind in FAMILIES.items()
    if issubclass(kind, Likelihood) and key in SMALL
}
BOUNDED = [key for key, kind in KINDS.items() if kind == LikelihoodKind.LOWER_BOUND]
EXACT = [key for key, kind in KINDS.items() if kind == LikelihoodKind.EXACT]

STEPS = pytest.mark.parametrize("steps", [0, 60], ids=["untrained", "trained"])


def every_image(draws: int = 1) -> Batch:
    """All images, with each label and without; each time with noise of its own."""
    count = 81 * draws
    return Batch(EVERY.repeat(3 * draws, 1, 1, 1), LABELS.repeat(draws), fold(1, torch.arange(count)))


def model_of(key: str, steps: int) -> Family:
    """Make a small model, and train it for a moment on images of which most are alike."""
    model = build(key, replace(preset(key, "digits").model, **SMALL[key]), SPEC)
    with torch.no_grad():  # much of a new model is zero, and nothing depends on anything
        for i, parameter in enumerate(model.parameters()):
            parameter.add_(uniform(torch.tensor([i]), tuple(parameter.shape))[0] - 0.5, alpha=0.3)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(steps):
        keys = fold(fold(2, step), torch.arange(64))
        y = torch.arange(64) % 2
        x = (uniform(keys, (), 5)[:, None] * 3).long().clamp(max=2) + torch.tensor([0, 1, 2]) * y[:, None]
        optimizer.zero_grad()
        model(Batch((x % 3).to(torch.uint8).view(64, 1, 1, 3), y, keys)).loss.backward()
        optimizer.step()
    return model.eval()


def log_likelihood(model: Family, batch: Batch, samples: int = 1) -> Tensor:
    assert isinstance(model, Likelihood)
    return model.log_likelihood(batch, samples).double()


def test_every_family_with_a_likelihood_is_here_or_has_an_estimate() -> None:
    kinds = {key: kind for key, kind in FAMILIES.items() if issubclass(kind, Likelihood)}
    estimates = {key for key, kind in kinds.items() if kind.likelihood_kind == LikelihoodKind.ESTIMATE}
    assert kinds.keys() == {*EXACT, *BOUNDED, *estimates}
    assert EXACT
    assert estimates == {"energy"}  # test_energy.py sums it up


@STEPS
@pytest.mark.parametrize("key", EXACT)
def test_exact_likelihoods_sum_to_one(key: str, steps: int) -> None:
    nats = log_likelihood(model_of(key, steps), every_image()).view(3, 27)
    torch.testing.assert_close(nats.exp().sum(1), torch.ones(3).double(), atol=1e-4, rtol=0)
    assert nats.std(1).min() > 0.2  # not by being uniform


@STEPS
@pytest.mark.parametrize("key", BOUNDED)
def test_bounds_do_not_sum_to_more_than_one(key: str, steps: int) -> None:
    draws = 50
    nats = log_likelihood(model_of(key, steps), every_image(draws), samples=8).view(draws, 3, 27)
    bound, error = nats.mean(0), nats.std(0) / math.sqrt(draws)
    total, slack = bound.exp().sum(1), (bound.exp() * error).norm(dim=1)
    assert (total < 1 + 4 * slack).all()
    assert (total > 0.2).all()  # a bound worth the name
    assert (slack < 0.15).all()


def likelihood_of_vae(model: VAE, points: int = 161) -> Tensor:
    """Integrate p(x | z, y) N(z; 0, I) over a plane of latents: log p(x | y), (3, 27)."""
    side = torch.linspace(-7, 7, points)
    z = torch.cartesian_prod(side, side)
    log_prior = -0.5 * z.square().sum(1) - math.log(2 * math.pi) + 2 * math.log(14 / (points - 1))
    return torch.stack([_mixture(model, y, z, log_prior) for y in (UNLABELLED, 0, 1)])


def likelihood_of_hierarchical(model: Hierarchical) -> Tensor:
    """Add p(c | y) p(x | c, y) up over all sequences of tokens: log p(x | y), (3, 27)."""
    tokens, vocabulary = model.prior.tokens, model.prior.vocabulary
    codes = torch.cartesian_prod(*[torch.arange(vocabulary)] * tokens).view(-1, tokens)
    values = (2 * model._code(codes).float() + 1) / model.config.base - 1
    found = []
    for label in (UNLABELLED, 0, 1):
        log_prior = model.prior(codes, torch.full((len(codes),), label))
        assert log_prior.exp().sum().item() == pytest.approx(1, abs=1e-4)
        found.append(_mixture(model, label, values.flatten(1), log_prior))
    return torch.stack(found)


def _mixture(model: VAE | Hierarchical, label: int, z: Tensor, log_prior: Tensor) -> Tensor:
    """Compute log sum of p(z) p(x | z, y) over given latents, by logistics of double precision: (27,)."""
    mean, log_scale = (part.double() for part in model._pixels(z, torch.full((len(z),), label)))
    edges = torch.tensor([-math.inf, -1 / 3, 1 / 3, math.inf]).double()  # of three bins on [-1, 1]
    below = ((edges - mean[..., None]) / log_scale.exp()[..., None]).sigmoid()
    log_level = below.diff(dim=-1).clamp(min=1e-300).log().view(len(z), 3, 3)  # by pixel and level
    log_x = torch.stack([log_level[:, i, EVERY.view(27, 3)[:, i].long()] for i in range(3)]).sum(0)
    return (log_x + log_prior[:, None]).logsumexp(0)


def likelihood_of_flow(model: Flow, points: int = 24) -> Tensor:
    """Integrate the density of x + u over the cube of u by midpoints: log p(x | y), (3, 27)."""
    batch = every_image()
    side = (torch.arange(points) + 0.5) / points
    u = torch.cartesian_prod(side, side, side)
    nats = torch.empty(81, len(u), dtype=torch.float64)
    for i in range(81):
        x, y = batch.x[i : i + 1].expand(len(u), 1, 1, 3), batch.y[i].expand(len(u))
        z, log_det = model._to_latent(x, u, y)
        nats[i] = (log_det - 0.5 * (z.square() + math.log(2 * math.pi)).sum(1)).double()
    return (nats.logsumexp(1) - math.log(len(u))).view(3, 27)


@STEPS
@pytest.mark.parametrize(("key", "precision"), [("vae", 1e-3), ("hierarchical", 1e-3), ("flow", 0.02)])
@torch.no_grad()
def test_bounds_are_below_the_exact_value_and_close_in_on_it(key: str, precision: float, steps: int) -> None:
    exact = {
        "vae": lambda model: likelihood_of_vae(cast(VAE, model)),
        "hierarchical": lambda model: likelihood_of_hierarchical(cast(Hierarchical, model)),
        "flow": lambda model: likelihood_of_flow(cast(Flow, model)),
    }
    with torch.enable_grad():
        model = model_of(key, steps)
    truth = exact[key](model)
    torch.testing.assert_close(truth.exp().sum(1), torch.ones(3).double(), atol=precision, rtol=0)
    draws = 25
    gaps = []
    for samples in (1, 32):
        nats = log_likelihood(model, every_image(draws), samples).view(draws, 3, 27)
        bound, error = nats.mean(0), nats.std(0) / math.sqrt(draws)
        assert (bound < truth + 4 * error + precision).all()
        gaps.append((truth - bound).mean().item())
    assert gaps[0] > 2 * gaps[1]
