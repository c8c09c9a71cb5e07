"""The energy-based model against laws known in closed form, by quadrature and by enumeration."""

import math
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from gdl_ray.data import Dataset, training_batch
from gdl_ray.families import build
from gdl_ray.families.energy import Energy, EnergyConfig, Point, anneal, langevin, log_mean
from gdl_ray.family import UNLABELLED, Batch, DataSpec
from gdl_ray.random import fold, normal, uniform

PRECISION = torch.tensor([[3.0, 1.2], [1.2, 1.5]])  # of a correlated Gaussian, whose mean is MEAN
COVARIANCE = torch.linalg.inv(PRECISION)
ROOT: Tensor = torch.linalg.cholesky(COVARIANCE)
MEAN = torch.tensor([0.5, -1.0])
PAIR = DataSpec(
    name="pair",
    kind="image",
    shape=(1, 1, 2),
    levels=3,
    classes=2,
    counts=torch.tensor([[50, 30, 20], [10, 60, 30]]),
)
EVERY_PAIR = torch.cartesian_prod(*[torch.arange(3, dtype=torch.uint8)] * 2).view(9, 1, 1, 2)


def gaussian_tilt(z: Tensor) -> tuple[Tensor, Tensor]:
    """Turn N(0, I) into N(MEAN, PRECISION^-1): f(z) = -z (P - I) z / 2 + z P mean."""
    slope: Tensor = z - z @ PRECISION + PRECISION @ MEAN
    return ((slope + PRECISION @ MEAN) * z).sum(1, keepdim=True) / 2, slope


GAUSSIAN_LOG_Z = (0.5 * (MEAN @ PRECISION @ MEAN) - 0.5 * torch.logdet(PRECISION)).item()


def gaussian_draws(count: int, seed: int) -> Tensor:
    return MEAN + normal(fold(seed, torch.arange(count)), (2,), 0) @ ROOT.T


def run_chains(z: Tensor, moves: int, size: float, untested: bool = False) -> tuple[Tensor, float]:
    keys, at, moved = fold(5, torch.arange(len(z))), Point(z, *gaussian_tilt(z)), 0.0
    for number in range(moves):
        at, passed = langevin(gaussian_tilt, at, keys, number, 1.0, size, untested=untested)
        moved += passed.float().mean().item() / moves
    return at.z, moved


@pytest.mark.parametrize("moves", [1, 5])
def test_a_move_leaves_the_law_of_the_model_as_it_is(moves: int) -> None:
    count = 50_000
    z, moved = run_chains(gaussian_draws(count, 0), moves, size=1.0)
    assert 0.3 < moved < 0.9
    torch.testing.assert_close(z.mean(0), MEAN, atol=5 * COVARIANCE.max().item() / count**0.5, rtol=0)
    torch.testing.assert_close(z.T.cov(), COVARIANCE, atol=8 / count**0.5, rtol=0)


def test_a_move_is_as_likely_as_the_one_back() -> None:
    start = gaussian_draws(100_000, 1)
    end, _ = run_chains(start, 1, size=1.0)
    difference = start[:, 0].sin() * end[:, 1].square() - end[:, 0].sin() * start[:, 1].square()
    assert abs(difference.mean()) < 4 * difference.std() / len(start) ** 0.5


def test_chains_find_the_law_from_afar_and_untested_ones_nearly() -> None:
    far = torch.full((20_000, 2), 4.0)
    tested, _ = run_chains(far, 60, size=0.8)
    untested, moved = run_chains(far, 100, size=0.3, untested=True)
    assert moved == pytest.approx(1)
    for z, slack in ((tested, 0.03), (untested, 0.08)):
        torch.testing.assert_close(z.mean(0), MEAN, atol=slack, rtol=0)
        torch.testing.assert_close(z.T.cov(), COVARIANCE, atol=slack, rtol=0)


def test_chains_that_are_held_in_one_dimension_find_the_conditional() -> None:
    z = torch.tensor([2.0, 0.0]).expand(20_000, 2)
    keys, at = fold(5, torch.arange(len(z))), Point(z, *gaussian_tilt(z))
    for number in range(40):
        at, _ = langevin(gaussian_tilt, at, keys, number, 1.0, 2.0, free=torch.tensor([0.0, 1.0]))
    assert (at.z[:, 0] == 2).all()
    mean = MEAN[1] - PRECISION[0, 1] / PRECISION[1, 1] * (2 - MEAN[0])
    assert at.z[:, 1].mean().item() == pytest.approx(mean.item(), abs=0.025)
    assert at.z[:, 1].var().item() == pytest.approx(1 / PRECISION[1, 1].item(), abs=0.03)


@pytest.mark.parametrize("rising", [True, False])
def test_annealing_finds_a_constant_that_is_known(rising: bool) -> None:
    keys = fold(2, torch.arange(3000))
    z = normal(keys, (2,), 0) if rising else gaussian_draws(3000, 3)
    betas = torch.linspace(0, 1, 21).tolist()
    _, log_weight = anneal(gaussian_tilt, z, keys, betas if rising else betas[::-1], 0.5)
    log_ratio, effective = log_mean(log_weight)
    error = (1 / effective - 1 / len(z)).sqrt().item()
    assert 0.005 < error < 0.03
    assert log_ratio.item() == pytest.approx(GAUSSIAN_LOG_Z if rising else -GAUSSIAN_LOG_Z, abs=4 * error)


class Exact(NamedTuple):
    """What a model of two pixels is, by quadrature."""

    log_z: Tensor
    classes: Tensor  # p(y)
    images: Tensor  # p(x), by level of either pixel, (3, 3)
    labelled: Tensor  # p(x | y), (2, 3, 3)


def exact(model: Energy, points: int = 501) -> Exact:
    side = torch.linspace(-5.5, 5.5, points)
    z = torch.cartesian_prod(side, side)
    log_base = -0.5 * z.square().sum(1) - math.log(2 * math.pi) + 2 * math.log(11 / (points - 1))
    log_joint = log_base[:, None] + model.logits(z)
    log_z = log_joint.flatten().logsumexp(0)
    x = model.marginal.inverse(z.detach())[0]
    joint = torch.zeros(9, 2).index_add(0, x[:, 0] * 3 + x[:, 1], (log_joint - log_z).exp())
    classes = joint.sum(0)
    return Exact(log_z, classes, joint.sum(1).view(3, 3), (joint / classes).T.reshape(2, 3, 3))


def pair_model(**fields: Any) -> Energy:
    config = EnergyConfig(width=16, temperatures=200, move_size=0.5)
    model = build("energy", replace(config, **fields), PAIR, seed=0)
    assert isinstance(model, Energy)
    with torch.no_grad():  # far from the base, and from one class to the other
        for parameter in model.logits.parameters():
            parameter.mul_(2.2)
    return model


def shares(x: Tensor) -> Tensor:
    """How often each pair of levels occurs, (3, 3)."""
    return torch.bincount(x.flatten(1).long() @ torch.tensor([3, 1]), minlength=9).view(3, 3) / len(x)


def test_the_likelihood_is_normalized() -> None:
    model = pair_model().eval()
    truth = exact(model)
    model.normalize(chains=4000)
    assert model.log_z.item() == pytest.approx(truth.log_z.item(), abs=0.03)
    torch.testing.assert_close(model.log_class.exp(), truth.classes, atol=0.02, rtol=0)
    assert (truth.classes - 0.5).abs().max() > 0.04
    labels = torch.tensor([UNLABELLED, 0, 1]).repeat_interleave(9)
    batch = Batch(EVERY_PAIR.repeat(3, 1, 1, 1), labels, fold(4, torch.arange(27)))
    found = model.log_likelihood(batch, samples=1000).exp().view(3, 3, 3)
    torch.testing.assert_close(found, torch.stack([truth.images, *truth.labelled]), atol=0.02, rtol=0)
    torch.testing.assert_close(found.sum((1, 2)), torch.ones(3), atol=0.03, rtol=0)


def test_the_worth_of_weights() -> None:
    assert log_mean(torch.full((7,), 3.0))[1].item() == pytest.approx(7)
    assert log_mean(torch.tensor([100.0, 0.0, 0.0]))[1].item() == pytest.approx(1)


def test_reverse_annealing_agrees() -> None:
    model, keys = pair_model().eval(), fold(6, torch.arange(2000))
    rising = torch.linspace(0, 1, 501).tolist()
    ends, _ = anneal(model.tilt, normal(keys, (2,), 0), keys, rising, 0.5)
    log_z, effective = model.reverse_log_z(ends.z)
    assert log_z == pytest.approx(exact(model).log_z.item(), abs=0.05)
    assert 500 < effective < 2000


def test_a_constant_is_found_when_it_is_due(digits: Dataset) -> None:
    model = digits_model(digits, temperatures=5).eval()
    batch = training_batch(digits.splits["train"], seed=0, step=0, batch_size=4)
    assert model.log_z.isinf()
    nats = model.log_likelihood(batch)
    assert model.log_z.isfinite()
    model.log_z += 1  # a constant that is there is used
    torch.testing.assert_close(model.log_likelihood(batch), nats - 1)


def test_samples_follow_the_model() -> None:
    model = pair_model().eval()
    truth, keys = exact(model), fold(7, torch.arange(4000))
    ones = torch.ones_like(keys)
    for labels, options, expected, slack in [
        (None, {}, truth.images, 0.03),
        (ones, {}, truth.labelled[1], 0.03),
        (ones, {"guidance": 0.0}, truth.images, 0.03),
        (None, {"metropolis": 0.0}, truth.images, 0.1),
    ]:
        found = shares(model.sample(keys, labels, **options))
        torch.testing.assert_close(found, expected, atol=slack, rtol=0)
    assert (truth.images - truth.labelled[1]).abs().max() > 0.06


def test_guidance_exaggerates_the_label() -> None:
    model, keys = pair_model().eval(), fold(8, torch.arange(2000))
    truth = exact(model)
    rise = (truth.labelled[1] - truth.images).detach()  # where the label has more of the samples
    plain, guided = (
        shares(model.sample(keys, torch.ones_like(keys), guidance=guidance)) for guidance in (1, 3)
    )
    assert ((guided - plain) * rise).sum() > 0.5 * rise.square().sum()


def law_of_completions(model: Energy, level: int, points: int = 400) -> Tensor:
    """Law of the second pixel given the first, the first one's place in its bin at random: (3,)."""
    u = ((torch.arange(points) + 0.5) / points)[:, None].expand(points, 2)
    first = model.marginal(torch.full((points, 2), level), u)[0][:, :1]
    second = torch.linspace(-5.5, 5.5, points)
    z = torch.stack([first.expand(points, points), second.expand(points, points)], 2).detach()
    log_joint = model.logits(z.flatten(0, 1)).logsumexp(1).view(points, points) - 0.5 * second.square()
    share = log_joint.softmax(1).mean(0)
    x = model.marginal.inverse(torch.stack([second, second], 1))[0][:, 1]
    return torch.zeros(3).index_add(0, x, share)


@pytest.mark.parametrize("level", [0, 2])
def test_completions_keep_what_is_known_and_follow_the_conditional(level: int) -> None:
    model = pair_model().eval()
    x = torch.tensor([level, 255], dtype=torch.uint8).expand(4000, 1, 1, 2)  # 255: not to be read
    known = torch.tensor([True, False]).expand(4000, 1, 1, 2)
    found = model.complete(x, known, fold(9, torch.arange(4000)))
    assert (found[..., 0] == level).all()
    expected = law_of_completions(model, level)
    torch.testing.assert_close(shares(found)[level], expected, atol=0.03, rtol=0)
    assert (expected - exact(model).images.sum(0)).abs().max() > 0.05


def test_the_gradient_of_the_loss_is_that_of_the_exact_likelihood() -> None:
    model = pair_model(chains=100, moves=200, class_weight=0.0, energy_decay=0.0)
    x, keys = EVERY_PAIR.repeat(10, 1, 1, 1), fold(10, torch.arange(90))
    batch = Batch(x, torch.full((90,), UNLABELLED), keys)
    model(batch).loss.backward()
    z, log_slope = model.marginal(x.flatten(1), uniform(keys, (2,), 0))
    log_joint = model.logits(z).logsumexp(1) - 0.5 * z.square().sum(1) + log_slope
    exact_loss = exact(model, 301).log_z - log_joint.mean()
    expected = torch.autograd.grad(exact_loss, list(model.parameters()))
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert parameter.grad is not None
        assert (parameter.grad - gradient).norm() < 0.05 * gradient.norm() + 0.02


def digits_model(dataset: Dataset, **fields: Any) -> Energy:
    model = build("energy", replace(EnergyConfig(width=32, chains=2, moves=3), **fields), dataset.spec)
    assert isinstance(model, Energy)
    return model


def test_chains_start_at_the_base_and_continue(digits: Dataset) -> None:
    model = digits_model(digits, move_size=1e-4)
    first, second, other = (
        training_batch(digits.splits["train"], seed=0, step=step, batch_size=size)
        for step, size in ((0, 64), (1, 64), (2, 32))
    )
    model.eval()(first)
    assert not model.carried  # evaluation leaves no trace
    metrics = model.train()(first).metrics
    assert all(least < metrics[name] < most for name, (least, most) in Energy.healthy.items())
    start = model.carried["chains"].clone()
    assert start.shape == (64, 2, 64)
    assert start.mean().item() == pytest.approx(0, abs=0.05)
    assert start.std().item() == pytest.approx(1, abs=0.05)
    model(second)
    moved = (model.carried["chains"] - start).abs()
    assert 0 < moved.mean() < 0.05
    model(other)
    assert model.carried["chains"].shape == (32, 2, 64)


def test_two_halves_are_the_whole(digits: Dataset) -> None:
    def run(world: int, rank: int) -> Energy:
        model = digits_model(digits)
        for step in range(2):
            model.zero_grad()
            batch = training_batch(
                digits.splits["train"], seed=0, step=step, batch_size=16, rank=rank, world=world
            )
            model(batch).loss.backward()
        return model

    whole, *halves = run(1, 0), run(2, 0), run(2, 1)
    chains = torch.cat([half.carried["chains"] for half in halves])
    torch.testing.assert_close(whole.carried["chains"], chains, atol=1e-4, rtol=1e-4)
    for together, *apart in zip(*(model.parameters() for model in (whole, *halves)), strict=True):
        assert together.grad is not None
        mean = torch.stack([part.grad for part in apart if part.grad is not None]).mean(0)
        torch.testing.assert_close(together.grad, mean, atol=1e-4, rtol=1e-3)


def test_convolutions_halve_any_size() -> None:
    spec = DataSpec(name="odd", kind="image", shape=(2, 13, 9), levels=4, classes=0)
    model = build("energy", EnergyConfig(halvings=3, temperatures=10), spec)
    assert model.sample(fold(0, torch.arange(2))).shape == (2, 2, 13, 9)


RULES = [
    ("chains", 0, "be at least 1"),
    ("move_size", 0, "be above 0"),
    ("energy_decay", -1, "not be negative"),
]


@pytest.mark.parametrize(("field", "value", "rule"), [*RULES, ("label_drop", 1.5, r"lie in \[0, 1\]")])
def test_numbers_out_of_range_are_named(field: str, value: Any, rule: str) -> None:
    with pytest.raises(ValueError, match=f"{field}={value} must {rule}"):
        EnergyConfig(**{field: value})
