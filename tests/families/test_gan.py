"""The GAN against critics whose gradients are known in closed form, and on data that can be counted."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from gdl_ray.families import build
from gdl_ray.families.gan import GAN, GANConfig, _Residual, _squared_gradients
from gdl_ray.family import UNLABELLED, Batch, DataSpec, Losses, Optimization
from gdl_ray.nn import logistic
from gdl_ray.nn.embedding import ClassEmbedding
from gdl_ray.random import fold, normal, uniform
from gdl_ray.train.loop import Training
from gdl_ray.train.parallel import World, require_grad
from gdl_ray.train.plan import Budget, Plan

GREY = DataSpec(name="grey", kind="image", shape=(1, 8, 8), levels=17, classes=10)
SMALL = GANConfig(patch=2, width=8, halvings=2, latent=8, penalty=0.7)
SLOPE = 0.3


def gan(config: GANConfig = SMALL, spec: DataSpec = GREY) -> GAN:
    model = build("gan", config, spec, seed=1)
    assert isinstance(model, GAN)
    return model


def disturbed(model: GAN) -> GAN:
    """Give the residual branches, which start at zero, something to say."""
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.add_(normal(torch.tensor([i]), tuple(parameter.shape))[0], alpha=0.1)
    return model


def batch_of(spec: DataSpec = GREY, size: int = 8) -> Batch:
    keys = fold(3, torch.arange(size))
    y = torch.arange(size) % spec.classes if spec.classes else torch.full((size,), UNLABELLED)
    return Batch((uniform(keys, spec.shape) * spec.levels).to(torch.uint8), y, keys)


class Quadratic(nn.Module):
    """D(x) = a / 2 |x|^2, whose gradient is a x. It remembers what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(SLOPE))
        self.shown: list[Tensor] = []

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        self.shown.append(x.detach())
        score: Tensor = self.a * halved_square(x)
        return score


def halved_square(x: Tensor) -> Tensor:
    return x.square().flatten(1).sum(1) / 2


def play(phase: str) -> tuple[Quadratic, Losses, Tensor, Tensor]:
    """Run a phase under the quadratic critic; returns halves of |x|^2 of the real and the fake images too."""
    model, critic = gan(), Quadratic()
    model.critic = critic  # type: ignore[assignment]
    losses = model(batch_of(), phase)
    real, fake = halved_square(torch.cat(critic.shown)).chunk(2)
    return critic, losses, real, fake


def test_penalties_are_the_squared_gradients_of_a_known_critic() -> None:
    _, losses, real, fake = play("critic")
    for name, halves in (("r1", real), ("r2", fake)):
        torch.testing.assert_close(losses.metrics[name], 0.7 * SLOPE**2 * halves.mean())


def test_the_critic_descends_its_formula() -> None:
    critic, losses, real, fake = play("critic")
    margin = SLOPE * (real - fake)
    penalties = 0.7 * SLOPE**2 * (real + fake).mean()
    torch.testing.assert_close(losses.metrics["margin"], margin.mean())
    torch.testing.assert_close(losses.loss.detach(), (1 + (-margin).exp()).log().mean() + penalties)
    # Of the penalties too, which needs a second derivative of the critic.
    (found,) = torch.autograd.grad(losses.loss, critic.a)
    slope = 2 * penalties / SLOPE - ((real - fake) / (1 + margin.exp())).mean()
    torch.testing.assert_close(found, slope)


def test_the_generator_wants_the_opposite() -> None:
    _, losses, real, fake = play("generator")
    margin = SLOPE * (real - fake)
    torch.testing.assert_close(losses.loss.detach(), (1 + margin.exp()).log().mean())
    assert 0 < (fake > real).float().mean() < 1
    assert losses.metrics["fooled"] == (fake > real).float().mean()


def test_squared_gradients_agree_with_finite_differences() -> None:
    model = disturbed(gan())
    x = uniform(fold(0, torch.arange(2)), GREY.shape) * 2 - 1
    y = torch.tensor([3, UNLABELLED])
    leaf = x.clone().requires_grad_()
    squares = _squared_gradients(model.critic(leaf, y), leaf)
    shifts = 5e-3 * torch.eye(GREY.dims).view(-1, *GREY.shape)
    with torch.no_grad():
        for image, label, square in zip(x, y.expand(GREY.dims, 2).T, squares, strict=True):
            rise = model.critic(image + shifts, label) - model.critic(image - shifts, label)
            assert square.item() == pytest.approx((rise / 1e-2).square().sum().item(), rel=0.02)


@pytest.mark.parametrize("phase", GAN.phases)
def test_gradients_are_those_of_the_phase(phase: str) -> None:
    # Without the penalties, which jump where a rectifier switches: finite differences would see that.
    model = disturbed(gan(replace(SMALL, penalty=0.0)))
    require_grad(model, phase)
    loss = model(batch_of(), phase).loss
    owned: list[Tensor] = list(model.phase_parameters(phase))
    gradients = torch.autograd.grad(loss, owned)
    steepness = sum(gradient.square().sum().item() for gradient in gradients)

    @torch.no_grad()
    def move(distance: float) -> None:
        torch._foreach_add_(owned, [distance * gradient for gradient in gradients])

    def after(distance: float) -> float:
        move(distance)
        value: float = model(batch_of(), phase).loss.item()
        move(-distance)
        return value

    step = 5e-4 / steepness
    assert (after(step) - after(-step)) / (2 * step) == pytest.approx(steepness, rel=0.05)


def test_real_and_fake_are_spread_within_their_level_and_show_the_same_label() -> None:
    model, critic = gan(), Quadratic()
    labels: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, ClassEmbedding):
            module.register_forward_pre_hook(lambda _, inputs: labels.append(inputs[0]))
    batch = batch_of(size=400)
    model(batch, "critic")
    of_fake, of_both = labels
    assert torch.equal(of_both, of_fake.repeat(2))
    dropped = of_fake == UNLABELLED
    assert torch.equal(of_fake[~dropped], batch.y[~dropped])
    assert dropped.float().mean().item() == pytest.approx(model.config.label_drop, abs=4 * 0.5 / 20)
    model.critic = critic  # type: ignore[assignment]
    model(batch, "critic")
    real = critic.shown[0][:400]
    assert torch.equal(logistic.quantize(real, GREY.levels), batch.x)
    offset = (real - logistic.centers(batch.x, GREY.levels)) * GREY.levels / 2
    assert offset.var().item() == pytest.approx(1 / 12, rel=0.03)


def test_it_learns_the_frequencies_of_data_that_can_be_counted() -> None:
    spec = DataSpec(name="pair", kind="image", shape=(1, 1, 2), levels=3, classes=2)
    # Images of two pixels: 60 % are (0, 0) of class 0; class 1 is (2, 1) thrice as often as (0, 2).
    kinds = torch.tensor([[0, 0]] * 6 + [[2, 1]] * 3 + [[0, 2]], dtype=torch.uint8).view(-1, 1, 1, 2)
    optimization = Optimization(
        batch_size=60, learning_rate=6e-3, betas=(0.0, 0.99), weight_decay=0.0, clip_norm=100
    )
    config = GANConfig(patch=2, width=32, halvings=0, latent=4, penalty=0.1, label_drop=0.5)
    plan = Plan(optimization=optimization, budget=Budget(steps=500))
    training = Training(gan(config, spec), plan, World())
    for step in range(500):
        which = torch.arange(step, step + 60) % 10
        training.advance(Batch(kinds[which], (which >= 6).long(), fold(step, torch.arange(60))))

    def shares(label: int) -> list[float]:
        keys = fold(0, torch.arange(2000))
        x = training.average.sample(keys, torch.full_like(keys, label)).flatten(1)
        found = [(x == kind.flatten()).all(1).float().mean().item() for kind in kinds[[0, 6, 9]]]
        return [*found, 1 - sum(found)]

    assert shares(UNLABELLED) == pytest.approx([0.6, 0.3, 0.1, 0], abs=0.1)
    assert shares(0) == pytest.approx([1, 0, 0, 0], abs=0.1)
    assert shares(1) == pytest.approx([0, 0.75, 0.25, 0], abs=0.1)


def test_a_label_matters_and_so_does_its_absence() -> None:
    model, keys = gan(), fold(0, torch.arange(32))
    samples = [model.sample(keys, torch.full_like(keys, label)) for label in (UNLABELLED, 0, 9)]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert (samples[first] != samples[second]).flatten(1).any(1).all()


def test_temperature_scales_the_latent_that_a_sample_decodes() -> None:
    model, keys = gan(), fold(0, torch.arange(6))
    labels, z = torch.arange(6), normal(keys, (SMALL.latent,))
    assert torch.equal(model.sample(keys, labels), model.decode(z, labels))
    assert torch.equal(model.sample(keys, labels, temperature=0.5), model.decode(z / 2, labels))
    mixed = torch.linspace(0.1, 2, 6)
    sampler = model.sampler()
    state = sampler.step(sampler.start(keys, labels, {"temperature": mixed}), torch.zeros_like(keys))
    assert torch.equal(sampler.finish(state), model.decode(z * mixed[:, None], labels))


@pytest.mark.parametrize("patch", [1, 3, 8, 16])
@pytest.mark.parametrize("halvings", [0, 2])
def test_every_pixel_of_any_size_is_made_and_judged(patch: int, halvings: int) -> None:
    spec = DataSpec(name="odd", kind="image", shape=(3, 13, 9), levels=256, classes=0)
    model = disturbed(gan(GANConfig(patch=patch, width=8, halvings=halvings, latent=8), spec))
    y = torch.full((4,), UNLABELLED)
    x = model.generator(normal(fold(0, torch.arange(4)), (8,)), y)
    assert x.shape == (4, *spec.shape)
    assert (x.var(0) > 0).all()
    leaf = x.detach().requires_grad_()
    model.critic(leaf, y).sum().backward()
    assert leaf.grad is not None
    assert (leaf.grad != 0).any(0).all()


def test_the_generator_fills_the_range_from_the_middle_of_one_outer_level_to_that_of_the_other() -> None:
    model = gan()
    with torch.no_grad():
        for parameter in model.generator.parameters():
            parameter.mul_(8)
    x = model.generator(normal(fold(0, torch.arange(64)), (SMALL.latent,)), torch.arange(64) % 10)
    lowest, highest = logistic.centers(torch.tensor([0, 16]), GREY.levels)
    assert lowest - 1e-6 < x.min() < lowest + 1e-3
    assert highest - 1e-3 < x.max() < highest + 1e-6


def test_residual_branches_start_at_zero() -> None:
    model, unmoved = gan(), []
    for module in model.modules():
        if isinstance(module, _Residual):
            module.register_forward_hook(lambda _, given, made: unmoved.append(torch.equal(given[0], made)))
    model(batch_of(), "critic")
    assert unmoved == [True] * 6
    disturbed(model)(batch_of(), "critic")
    assert unmoved[6:] == [False] * 6


def test_a_step_moves_the_scores_as_much_at_any_depth() -> None:
    def steepness(blocks: int) -> float:
        critic = gan(GANConfig(patch=8, width=64, halvings=0, blocks=blocks)).critic
        scores = critic(normal(fold(0, torch.arange(8)), GREY.shape), torch.arange(8))
        blocks_of = [module for module in critic.modules() if isinstance(module, _Residual)]
        weights = [p for block in blocks_of for p in block.parameters() if p.dim() > 1]
        return sum(g.square().sum().item() for g in torch.autograd.grad(scores.sum(), weights))

    assert steepness(16) == pytest.approx(steepness(1), rel=0.5)


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("latent", 0, "be at least 1"),
        ("patch", 0, "be at least 1"),
        ("width", 0, "be at least 1"),
        ("blocks", 0, "be at least 1"),
        ("halvings", -1, "be at least 0"),
        ("penalty", -0.5, "not be negative"),
        ("label_drop", 1.5, r"lie in \[0, 1\]"),
    ],
)
def test_impossible_configurations_are_named(field: str, value: float, rule: str) -> None:
    with pytest.raises(ValueError, match=f"{field}={value} must {rule}"):
        GANConfig(**{field: value})  # type: ignore[arg-type]
