"""The VAE against a model whose exact likelihood is known: its bounds must be bounds, and tighten."""

import math

import pytest
import torch
from torch import Tensor, nn

from gdl_ray.data import Dataset, training_batch
from gdl_ray.families import build
from gdl_ray.families.vae import VAE, VAEConfig
from gdl_ray.family import UNLABELLED, Batch, DataSpec
from gdl_ray.nn import logistic
from gdl_ray.random import fold

TINY = DataSpec(name="tiny", kind="image", shape=(1, 1, 3), levels=3, classes=0)


def every_image(spec: DataSpec) -> Tensor:
    values = torch.arange(spec.levels, dtype=torch.uint8)
    return torch.cartesian_prod(*[values] * spec.dims).view(-1, *spec.shape)


def tiny_vae(latent: int = 1) -> VAE:
    model = build("vae", VAEConfig(latent=latent, width=4, hidden=16), TINY, seed=2)
    assert isinstance(model, VAE)
    with torch.no_grad():  # far from the prior's indifference, so that the latent matters
        model.from_latent.weight.mul_(6)
    return model.eval()


def exact_log_likelihood(model: VAE, x: Tensor) -> Tensor:
    """Integrate z out on a fine grid, in one dimension."""
    z = torch.linspace(-9, 9, 4001)[:, None]
    y = torch.full((len(z),), UNLABELLED)
    log_prior = -0.5 * z.squeeze(1) ** 2 - 0.5 * math.log(2 * math.pi) + math.log(18 / 4000)
    with torch.no_grad():
        pixels = model._pixels(z, y)
    conditional = [
        logistic.log_prob(image, *pixels, TINY.levels).flatten(1).sum(1) for image in x.unsqueeze(1)
    ]
    return torch.stack([(log_prior + each).logsumexp(0) for each in conditional])


def batch_of(x: Tensor, draw: int = 0) -> Batch:
    return Batch(x, torch.full((len(x),), UNLABELLED), fold(draw, torch.arange(len(x))))


def test_bounds_lie_below_the_exact_likelihood_and_close_in() -> None:
    model, x = tiny_vae(), every_image(TINY)
    exact = exact_log_likelihood(model, x)
    assert exact.exp().sum().item() == pytest.approx(1, abs=1e-3)

    def mean_bound(samples: int, draws: int) -> Tensor:
        bounds = [model.log_likelihood(batch_of(x, draw), samples) for draw in range(draws)]
        return torch.stack(bounds).mean(0)

    elbo, tighter, tight = mean_bound(1, 500), mean_bound(20, 50), mean_bound(2000, 1)
    assert (elbo <= exact + 0.02).all()
    assert (exact - elbo).mean() > 0.02  # or the bound would hold for nothing
    assert elbo.mean() < tighter.mean() < exact.mean() + 1e-3
    torch.testing.assert_close(tight, exact, atol=0.03, rtol=0)


def test_training_loss_is_the_negative_elbo(digits: Dataset) -> None:
    model = build("vae", VAEConfig(label_drop=0.0), digits.spec).eval()
    assert isinstance(model, VAE)
    batch = training_batch(digits.splits["train"], seed=0, step=0, batch_size=16)
    draws = 200
    with torch.no_grad():
        losses = [model(Batch(batch.x, batch.y, fold(d, batch.key % 2**31))).loss for d in range(draws)]
    bounds = [
        model.log_likelihood(Batch(batch.x, batch.y, fold(draws + d, batch.key % 2**31))).mean()
        for d in range(draws)
    ]
    spread = torch.stack(bounds).std().item() / draws**0.5
    assert torch.stack(losses).mean().item() == pytest.approx(
        -torch.stack(bounds).mean().item(), abs=5 * spread
    )


def test_the_share_of_examples_without_label_is_the_one_asked_for(digits: Dataset) -> None:
    model = build("vae", VAEConfig(label_drop=0.3), digits.spec)
    assert isinstance(model, VAE)
    seen: list[Tensor] = []
    model.encoder_class.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    for step in range(20):
        model(training_batch(digits.splits["train"], seed=0, step=step, batch_size=100))
    share = (torch.cat(seen) == digits.spec.classes).float().mean().item()
    assert share == pytest.approx(0.3, abs=4 * (0.3 * 0.7 / 2000) ** 0.5)


def test_it_starts_at_the_marginal_mean(digits: Dataset) -> None:
    model = build("vae", VAEConfig(), digits.spec)
    assert isinstance(model, VAE)
    train = torch.from_numpy(digits.splits["train"].x.copy())
    expected = logistic.centers(train, digits.spec.levels).mean(0)
    torch.testing.assert_close(model.marginal[:1].detach(), expected, atol=1e-5, rtol=0)


def test_decode_of_encode_resembles(digits: Dataset) -> None:
    model = build("vae", VAEConfig(label_drop=0.0), digits.spec)
    assert isinstance(model, VAE)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for step in range(150):
        optimizer.zero_grad()
        model(training_batch(digits.splits["train"], seed=0, step=step, batch_size=64)).loss.backward()
        optimizer.step()
    x = torch.from_numpy(digits.splits["test"].x.copy())
    y = torch.from_numpy(digits.splits["test"].y.copy())
    error = (model.decode(model.encode(x, y), y).float() - x.float()).square().mean()
    assert error < 0.6 * x.float().var(0).mean()


@pytest.mark.parametrize("field", ["latent", "width", "halvings", "hidden"])
def test_impossible_sizes_are_named(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field}=0 must be at least 1"):
        VAEConfig(**{field: 0})


def test_a_share_outside_its_range_is_named() -> None:
    with pytest.raises(ValueError, match=r"label_drop=1.5 must lie in \[0, 1\]"):
        VAEConfig(label_drop=1.5)


def test_any_size_can_be_halved_and_comes_back() -> None:
    spec = DataSpec(name="odd", kind="image", shape=(2, 13, 9), levels=4, classes=0)
    model = build("vae", VAEConfig(halvings=3), spec)
    assert isinstance(model.get_submodule("decoder"), nn.Sequential)
    assert model.sample(fold(0, torch.arange(2))).shape == (2, 2, 13, 9)
