"""Diffusion against data whose denoiser is known in closed form: its bound, its paths and its draws."""

import math

import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from gdl_ray.data import Dataset, evaluation_batches, training_batch
from gdl_ray.families import build
from gdl_ray.families.diffusion import Diffusion, DiffusionConfig, _Denoiser, _mean, _weigh
from gdl_ray.family import UNLABELLED, Batch, DataSpec
from gdl_ray.nn import logistic
from gdl_ray.random import fold, normal, uniform

TINY = DataSpec(name="tiny", kind="image", shape=(1, 1, 2), levels=3, classes=0)
FINE = DataSpec(name="fine", kind="image", shape=(1, 2, 3), levels=256, classes=0)
PAIR = DataSpec(name="pair", kind="image", shape=(1, 1, 2), levels=256, classes=0)
LABELLED = DataSpec(name="labelled", kind="image", shape=(1, 5, 4), levels=4, classes=3)
SMALL = DiffusionConfig(width=8, halvings=1)


def diffusion(spec: DataSpec, config: DiffusionConfig = SMALL) -> Diffusion:
    model = build("diffusion", config, spec, seed=1)
    assert isinstance(model, Diffusion)
    return model.eval()


def batch_of(x: Tensor, draw: int = 0) -> Batch:
    return Batch(x, torch.full((len(x),), UNLABELLED), fold(draw, torch.arange(len(x))))


class Silence(nn.Module):
    """A network without a word, for speed."""

    def forward(self, x: Tensor, gamma: Tensor, y: Tensor, key: Tensor | None) -> Tensor:
        return torch.zeros(len(x), SMALL.width, *x.shape[2:])


def independent() -> tuple[Diffusion, Tensor]:
    """A model whose denoiser is exact for data with independent values, and their log P, (2, 3)."""
    model = diffusion(TINY)
    log_p = torch.tensor([[0.6, 0.3, 0.1], [0.05, 0.15, 0.8]]).log()
    with torch.no_grad():
        model.marginal.copy_(log_p.view(1, 1, 2, 3))
        for parameter in model.to_logits.parameters():
            parameter.zero_()
    model.unet = Silence()  # type: ignore[assignment]
    return model, log_p


def gaussian(model: Diffusion, variance: float) -> None:
    """Make the denoiser that of normal data with mean 0."""

    def exact(z: Tensor, gamma: Tensor, y: Tensor, key: Tensor | None = None) -> Tensor:
        return variance / (variance + gamma.exp().view(-1, 1, 1, 1)) * z

    model._denoise = exact  # type: ignore[method-assign]


def test_the_denoiser_is_the_posterior_mean_of_what_the_network_says() -> None:
    keys = fold(0, torch.arange(50))
    logits = 3 * normal(keys, (1, 1, 2, 5))
    z = 0.5 * normal(keys, (1, 1, 2), 1)
    level = torch.tensor([-0.8, -0.4, 0.0, 0.4, 0.8], dtype=torch.float64)
    for s in (0.05, 0.4, 10.0):
        found = _mean(_weigh(logits, z, torch.full((50, 1, 1, 1), s)))
        weight = logits.double().exp() * torch.exp(-0.5 * ((z.double()[..., None] - level) / s) ** 2)
        expected = (weight * level).sum(-1) / weight.sum(-1)
        torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=0)


def normal_density(z: Tensor) -> Tensor:
    return torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)


def prior_gap(log_p: Tensor, gamma: float) -> Tensor:
    """What the bound of each level loses at gamma_1: E_q(z|x) log q(z) / p(z), by quadrature, (3,)."""
    z, scale = torch.linspace(-35, 35, 20001)[:, None], math.exp(gamma / 2)
    q = normal_density((z - logistic.centers(torch.arange(3), 3)) / scale) / scale
    prior = normal_density(z / math.hypot(1, scale)) / math.hypot(1, scale)
    return torch.trapezoid(q * (q @ log_p.exp()[:, None] / prior).log(), z, dim=0)


def test_the_bound_of_independent_values_is_exact_but_for_its_prior() -> None:
    model, log_p = independent()
    x = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    exact = log_p[0, x[:, 0]] + log_p[1, x[:, 1]]
    gap = prior_gap(log_p[0], model.gamma_1)[x[:, 0]] + prior_gap(log_p[1], model.gamma_1)[x[:, 1]]
    copies = 5000
    rows = x.to(torch.uint8).view(9, 1, 1, 2).repeat_interleave(copies, 0)
    bounds = model.log_likelihood(batch_of(rows), samples=64).view(9, copies)
    error = bounds.std(1).max().item() / copies**0.5
    assert error < 0.015
    torch.testing.assert_close(bounds.mean(1), exact - gap, atol=5 * error, rtol=0)
    mean = (exact.exp() * bounds.mean(1)).sum().item()
    assert -0.04 < mean - (exact.exp() * exact).sum().item() < 0


def test_prior_and_reconstruction_are_what_they_are_called() -> None:
    model = diffusion(FINE)
    x = logistic.centers((uniform(fold(0, torch.arange(7)), FINE.shape) * 256).to(torch.uint8), 256)
    alpha = 1 / math.sqrt(1 + math.exp(model.gamma_1))  # in VDM's coordinates
    divergence = kl_divergence(Normal(alpha * x, math.sqrt(1 - alpha**2)), Normal(0.0, 1.0))
    torch.testing.assert_close(model._prior_nats(x), divergence.flatten(1).sum(1), atol=1e-5, rtol=1e-3)
    assert model._prior_nats(x).max() < math.exp(-2) / 2

    model = diffusion(TINY)
    middle = batch_of(torch.ones(20000, 1, 1, 2, dtype=torch.uint8))
    assert model._reconstruction_nats(middle).mean() < 1e-2
    model.gamma_0 = 2 * math.log(1 / 3)  # an edge of the bin is one s away
    noise = torch.linspace(-6, 6, 10001)
    neighbours = torch.exp(-2 - 2 * noise) + torch.exp(-2 + 2 * noise)  # two s away, relative to the middle
    expected = torch.trapezoid(normal_density(noise) * neighbours.log1p(), noise)
    found = model._reconstruction_nats(middle).mean().item() / 2
    assert found == pytest.approx(expected.item(), abs=0.01)


def test_training_weighs_errors_as_edm_does_and_draws_its_noise() -> None:
    model = diffusion(FINE)
    seen: list[tuple[Tensor, Tensor]] = []

    def record(z: Tensor, gamma: Tensor, y: Tensor, key: Tensor | None = None) -> Tensor:
        seen.append((z, gamma))
        return 0.5 * z.clamp(-1, 1)

    model._denoise = record  # type: ignore[method-assign]
    batch = batch_of((uniform(fold(0, torch.arange(5000)), FINE.shape) * 256).to(torch.uint8))
    loss = model(batch).loss
    z, gamma = seen[0]
    s = torch.exp(gamma / 2)
    weight = (s**2 + 0.5**2) / (s * 0.5) ** 2
    error = (0.5 * z.clamp(-1, 1) - logistic.centers(batch.x, 256)).square().flatten(1).sum(1)
    torch.testing.assert_close(loss, (0.5 * weight * error).mean())
    low, high = ((end / 2 + 1.0) / 1.2 for end in (model.gamma_0, model.gamma_1))
    law = stats.truncnorm(low, high, loc=-1.0, scale=1.2)
    assert stats.kstest(s.log().numpy(), law.cdf).pvalue > 1e-3


def test_the_bits_of_training_are_those_of_the_bound() -> None:
    model, _ = independent()
    x = torch.tensor([[0, 2], [2, 1]], dtype=torch.uint8).view(2, 1, 1, 2).repeat(10000, 1, 1, 1)
    metrics = model(batch_of(x)).metrics
    bound = TINY.bits_per_dim(-model.log_likelihood(batch_of(x, 1), samples=4).mean().item())
    assert metrics["bits_per_dim"].item() == pytest.approx(bound, abs=0.05)
    thirds = sum(metrics[f"bits_{part}_noise"].item() for part in ("low", "middle", "high"))
    prior = TINY.bits_per_dim(model._prior_nats(logistic.centers(x, 3)).mean().item())
    assert thirds + prior == pytest.approx(metrics["bits_per_dim"].item(), abs=1e-5)


def test_noise_falls_evenly_from_first_to_last_step() -> None:
    model = diffusion(TINY)
    for steps in (2, 3, 25):
        state = {"steps": torch.full((steps + 1,), float(steps))}
        levels = _Denoiser(model)._gamma(state, torch.arange(steps + 1))
        torch.testing.assert_close(levels[:-1], torch.linspace(model.gamma_1, model.gamma_0, steps))
        assert levels[-1] == levels[-2]


def test_samples_of_normal_data_have_its_moments() -> None:
    model = diffusion(FINE)
    gaussian(model, 0.04)
    keys = fold(0, torch.arange(4000))
    x = logistic.centers(model.sample(keys, steps=200), 256)
    assert x.mean().item() == pytest.approx(0, abs=0.01)
    assert x.std().item() == pytest.approx(0.2, abs=0.005)


def test_latents_of_normal_data_are_its_scaled_self_and_come_back() -> None:
    model = diffusion(FINE)
    gaussian(model, 0.04)
    x = (uniform(fold(0, torch.arange(20)), FINE.shape) * 256).to(torch.uint8)
    y = torch.full((20,), UNLABELLED)
    z = model.encode(x, y)
    # The path keeps z in proportion to the spread of q(z) = N(0, variance + s^2).
    grown = math.sqrt((0.04 + math.exp(model.gamma_1)) / (0.04 + math.exp(model.gamma_0)))
    expected = logistic.centers(x, 256).flatten(1) * grown / math.sqrt(1 + math.exp(model.gamma_1))
    torch.testing.assert_close(z, expected, rtol=0.15, atol=0)
    assert (model.decode(expected, y).int() - x.int()).abs().max() < 20


def test_decode_of_encode_is_the_data() -> None:
    model, _ = independent()
    x = torch.cartesian_prod(torch.arange(3), torch.arange(3)).to(torch.uint8).view(9, 1, 1, 2)
    z = model.encode(x, batch_of(x).y)
    assert torch.equal(model.decode(z, batch_of(x).y), x)
    assert (torch.cdist(z, z) + torch.eye(9)).min() > 0.01


def louder(model: Diffusion) -> Diffusion:
    """Make what labels say matter."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "second" in name or "to_logits" in name:
                parameter.mul_(40)
    return model


def test_each_row_has_its_own_steps_and_guidance() -> None:
    model = louder(diffusion(LABELLED))
    keys, labels = fold(0, torch.arange(64)), torch.arange(64) % 3
    steps = torch.tensor([3.0, 6.0]).repeat(32)
    guidance = torch.tensor([0.0, 1.0, 3.0, 1.0]).repeat(16)
    sampler = model.sampler()
    state = sampler.start(keys, labels, {"steps": steps, "guidance": guidance})
    finished = {}
    with torch.no_grad():
        for i in range(6):
            state = sampler.step(state, torch.full_like(keys, i))
            finished[i + 1] = sampler.finish(state)
    for row in range(4):
        n, weight = int(steps[row]), guidance[row].item()
        alone = model.sample(keys, labels, steps=n, guidance=weight)
        assert torch.equal(finished[n][row::4], alone[row::4])


def test_guidance_of_0_leaves_labels_out_and_of_1_is_the_conditional() -> None:
    model = louder(diffusion(LABELLED))
    labels, sampler, gamma = torch.arange(64) % 3, _Denoiser(model), torch.zeros(64)
    state = sampler.start(labels, labels, {"steps": torch.ones(64)})
    with torch.no_grad():
        weights = {weight: {"guidance": torch.full((64,), weight)} for weight in (0.0, 0.9, 1.0, 1.1)}
        x = {weight: sampler._predict(state | asked, gamma) for weight, asked in weights.items()}
        without = model._denoise(state["z"], gamma, torch.full_like(labels, UNLABELLED))
        conditional = model._denoise(state["z"], gamma, labels)
    assert torch.equal(x[0.0], without)
    assert torch.equal(x[1.0], conditional)
    assert not torch.equal(without, conditional)
    torch.testing.assert_close(x[0.9] + x[1.1], 2 * conditional, atol=1e-5, rtol=0)


def test_a_completion_keeps_what_is_known_and_draws_what_fits() -> None:
    model, rho = diffusion(PAIR), 0.9
    covariance = 0.04 * torch.tensor([[1, rho], [rho, 1]])

    def exact(z: Tensor, gamma: Tensor, y: Tensor, key: Tensor | None = None) -> Tensor:
        noisy = covariance + gamma.exp()[:, None, None] * torch.eye(2)
        mean: Tensor = torch.linalg.solve(noisy, z.flatten(1)) @ covariance
        return mean.view_as(z)

    model._denoise = exact  # type: ignore[method-assign]
    x = torch.tensor([170, 0], dtype=torch.uint8).expand(3000, 1, 1, 2)
    known, keys = torch.tensor([True, False]).expand(x.shape), fold(0, torch.arange(3000))
    drawn = model.complete(x, known, keys, steps=100)
    assert torch.equal(drawn[known], x[known])
    assert torch.equal(model.complete(x + ~known, known, keys, steps=100), drawn)  # the unknown is not read
    other = logistic.centers(drawn[~known], 256)
    assert other.mean().item() == pytest.approx(rho * (2 * 170.5 / 256 - 1), abs=0.03)
    assert other.std().item() == pytest.approx(0.2 * math.sqrt(1 - rho**2), abs=0.01)
    free = logistic.centers(model.complete(x, torch.zeros_like(known), keys, steps=100), 256).flatten(1)
    assert free.std(0).mean().item() == pytest.approx(0.2, abs=0.01)
    assert torch.corrcoef(free.T)[0, 1].item() == pytest.approx(rho, abs=0.02)
    sampler = model.completion(x, known)
    state = sampler.start(keys, keys, {"steps": torch.ones(3000), "guidance": torch.ones(3000)})
    assert torch.equal(sampler.finish(state)[known], x[known])  # of previews too


def test_it_starts_at_the_marginals_and_learns_more(digits: Dataset) -> None:
    model = diffusion(digits.spec, DiffusionConfig(width=16))
    batch = next(iter(evaluation_batches(digits.splits["validation"], batch_size=144))).unlabelled()
    before = digits.spec.bits_per_dim(-model.log_likelihood(batch, 32).mean().item())
    log_share = model.marginal.detach().log_softmax(-1).expand(144, -1, -1, -1, -1)
    nats = -log_share.gather(-1, batch.x.long()[..., None]).sum().item() / 144
    assert before == pytest.approx(digits.spec.bits_per_dim(nats), abs=0.1)
    assert digits.spec.counts is not None
    shares = digits.spec.counts / digits.spec.counts.sum(1, keepdim=True)
    torch.testing.assert_close(log_share[0].exp().view(64, 17), shares, atol=1e-3, rtol=0)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(100):
        optimizer.zero_grad()
        shown = training_batch(digits.splits["train"], seed=0, step=step, batch_size=64)
        model.train()(shown).loss.backward()
        optimizer.step()
    after = digits.spec.bits_per_dim(-model.eval().log_likelihood(batch, 32).mean().item())
    assert after < before - 0.2


def test_any_size_can_be_halved_and_comes_back() -> None:
    for shape in ((1, 13, 9), (2, 1, 5)):
        spec = DataSpec(name="odd", kind="image", shape=shape, levels=4, classes=0)
        model = diffusion(spec, DiffusionConfig(width=8, halvings=3))
        assert model.sample(fold(0, torch.arange(2)), steps=2).shape == (2, *shape)


def test_dropout_acts_in_training_alone_and_follows_the_key() -> None:
    model = diffusion(LABELLED)
    batch = batch_of((uniform(fold(0, torch.arange(4)), LABELLED.shape) * 4).to(torch.uint8))
    quiet = model(batch).loss
    first, second = model.train()(batch).loss, model(batch).loss
    assert torch.equal(first, second)
    assert not torch.equal(first, quiet)


@pytest.mark.parametrize("setting", ["width=12", "blocks=0", "dropout=1", "label_drop=2", "noise_spread=0"])
def test_impossible_settings_are_named(setting: str) -> None:
    name, value = setting.split("=")
    with pytest.raises(ValueError, match=f"{setting} must"):
        DiffusionConfig(**{name: int(value)})
