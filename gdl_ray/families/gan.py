"""Generative adversarial network: a generator learns from a critic that tells its images from real ones.

    x' = G(z, y),   z ~ N(0, I);     margin m = D(x, y) - D(x', y),   x and x' of one label y

    critic       E[softplus(-m)] + gamma / 2 (E[|grad D(x, y)|^2] + E[|grad D(x', y)|^2])         (1)
    generator    E[softplus(m)]                                                                  (2)

Each fake is judged against a real partner, so no mode of the data can be left out at no cost, and the two
gradient penalties, R1 on real and R2 on fake images, make the game converge: this is R3GAN. Both networks are
residual, without normalisation, and every residual branch starts at zero. Real and fake levels alike are
spread over their bins, lest the critic tell one from the other by how round its numbers are.

There is no density here, so no likelihood, and no map from data to latents. Nor are there: a penalty that
fades while training goes on, augmentation, and other losses (hinge, Wasserstein).

References:
    Goodfellow et al. Generative Adversarial Networks. 2014. https://arxiv.org/abs/1406.2661
    Jolicoeur-Martineau. The relativistic discriminator. 2018. https://arxiv.org/abs/1807.00734
    Mescheder, Geiger, Nowozin. Which Training Methods for GANs do actually Converge? 2018.
        https://arxiv.org/abs/1801.04406 (R1, R2)
    Miyato, Koyama. cGANs with Projection Discriminator. 2018. https://arxiv.org/abs/1802.05637
    Zhang, Dauphin, Ma. Fixup Initialization. 2019. https://arxiv.org/abs/1901.09321
    Huang, Gokaslan, Kuleshov, Tompkin. The GAN is dead; long live the GAN! 2024.
        https://arxiv.org/abs/2501.05441 (R3GAN)
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdl_ray.family import (
    TEMPERATURE,
    Batch,
    DataSpec,
    Decoder,
    Density,
    Family,
    Losses,
    Optimization,
    Preset,
    Sampler,
    State,
)
from gdl_ray.nn import logistic
from gdl_ray.nn.embedding import ClassEmbedding
from gdl_ray.nn.recompute import Block
from gdl_ray.random import normal, uniform

__all__ = ["GAN", "GANConfig"]

# What the noise of an example or a sample is for.
_REAL, _CRITIC, _GENERATOR = 1, 2, 4  # the latter two take two streams each
_PRIOR = 0

_SLOPE = 0.2  # of the leaky rectifier below 0
_RECTIFIED = math.sqrt(2 / (1 + _SLOPE**2))  # gain that makes up for what the rectifier takes


@dataclass(frozen=True, kw_only=True, slots=True)
class GANConfig:
    """Size of generator and critic, which mirror each other, and what restrains the critic."""

    latent: int = 64
    """Dimensions of z."""
    patch: int = 1
    """Side of the squares of pixels that both networks see as one; an image of one square needs no
    convolutions, and has none."""
    width: int = 64
    """Channels at the finest resolution, that of the squares; doubled at each halving of it."""
    blocks: int = 1
    """Residual blocks at each resolution."""
    halvings: int = 2
    """How often the critic halves the resolution, and the generator doubles it."""
    penalty: float = 0.5
    """Weight gamma of both gradient penalties, in nats; pixels lie on the scale of [-1, 1]."""
    label_drop: float = 0.4
    """Share of training examples, real and fake, that are without a label."""

    def __post_init__(self) -> None:
        for name, least in {"latent": 1, "patch": 1, "width": 1, "blocks": 1, "halvings": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if self.penalty < 0:
            raise ValueError(f"penalty={self.penalty} must not be negative")
        if not 0 <= self.label_drop <= 1:
            raise ValueError(f"label_drop={self.label_drop} must lie in [0, 1]")


# Without momentum, as the opponent moves on; the penalties keep gradients small, so nothing is clipped.
_OPTIMIZATION = Optimization(
    betas=(0.0, 0.99), weight_decay=0.0, clip_norm=100.0, ema_decay=0.999, precision="bfloat16"
)


def digits() -> Preset:
    """8x8 images, each one square: a minute on a CPU core."""
    model = GANConfig(patch=8, width=256, blocks=2, halvings=0)
    optimization = replace(_OPTIMIZATION, batch_size=128, learning_rate=1.5e-3, precision="float32")
    return Preset(model=model, optimization=optimization, steps=2000)


def mnist() -> Preset:
    """28x28 images: ten minutes on a CPU core show digits, an hour on a GPU good ones."""
    model = GANConfig(width=16, penalty=5.0)
    return Preset(model=model, optimization=replace(_OPTIMIZATION, learning_rate=5e-4), steps=20_000)


def cifar10() -> Preset:
    """32x32 colour images: hours on a GPU."""
    model = GANConfig(blocks=2, halvings=3, penalty=0.05)
    optimization = replace(_OPTIMIZATION, batch_size=256, learning_rate=2e-4)
    return Preset(model=model, optimization=optimization, steps=100_000)


class GAN(Family, Decoder):
    """Conditional generative adversarial network with relativistic pairs and two gradient penalties."""

    density = Density.IMPLICIT
    phases = ("critic", "generator")
    presets = {"digits": digits, "mnist": mnist, "cifar10": cifar10}
    Config = GANConfig
    widths = ("width",)
    depths = ("blocks",)
    healthy = {"margin": (-10, 50), "r1": (0, 20), "r2": (0, 20)}
    advice = "raise --model.penalty or lower --optimization.learning-rate"

    def __init__(self, config: GANConfig, spec: DataSpec):
        super().__init__(config, spec)
        self.latent_dims = config.latent
        self.critic = _Critic(config, spec)
        self.generator = _Generator(config, spec)

    def phase_parameters(self, phase: str) -> Iterator[nn.Parameter]:
        return (self.critic if phase == "critic" else self.generator).parameters()

    def forward(self, batch: Batch, phase: str = "critic") -> Losses:
        batch = batch.sometimes_unlabelled(self.config.label_drop)
        real = self._spread(logistic.centers(batch.x, self.spec.levels), batch.key, _REAL)
        return self._critic_loss(real, batch) if phase == "critic" else self._generator_loss(real, batch)

    def _critic_loss(self, real: Tensor, batch: Batch) -> Losses:
        with torch.no_grad():
            fake = self._fake(batch, _CRITIC)
        x = torch.cat([real, fake]).requires_grad_()
        scores = self.critic(x, batch.y.repeat(2))
        margin = scores[: len(real)] - scores[len(real) :]
        r1, r2 = self.config.penalty / 2 * _squared_gradients(scores, x).view(2, -1).mean(1)
        loss = F.softplus(-margin).mean() + r1 + r2  # (1)
        metrics = {"margin": margin.mean(), "r1": r1, "r2": r2}
        return Losses(loss, {name: value.detach() for name, value in metrics.items()})

    def _generator_loss(self, real: Tensor, batch: Batch) -> Losses:
        with torch.no_grad():
            scores = self.critic(real, batch.y)
        margin = scores - self.critic(self._fake(batch, _GENERATOR), batch.y)
        return Losses(F.softplus(margin).mean(), {"fooled": (margin.detach() < 0).float().mean()})  # (2)

    def _fake(self, batch: Batch, stream: int) -> Tensor:
        z = normal(batch.key, (self.config.latent,), stream)
        return self._spread(self.generator(z, batch.y), batch.key, stream + 1)

    def _spread(self, x: Tensor, key: Tensor, stream: int) -> Tensor:
        """Move each value evenly within the width of a level."""
        return x + (uniform(key, self.spec.shape, stream) - 0.5) * (2 / self.spec.levels)

    @torch.no_grad()
    def decode(self, z: Tensor, labels: Tensor) -> Tensor:
        """Generate the images of latents."""
        return logistic.quantize(self.generator(z, labels), self.spec.levels)

    def sampler(self) -> Sampler:
        return _OneStepSampler(self)


def _squared_gradients(scores: Tensor, x: Tensor) -> Tensor:
    """Square the norm of each score's gradient to its own image: (B,), with a graph to the critic."""
    (gradient,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
    return gradient.square().flatten(1).sum(1)


class _OneStepSampler(Sampler):
    """Draws z from the prior, nearer to its middle at a low temperature, and generates."""

    steps = 1
    options = {"temperature": TEMPERATURE}
    granule = 16  # of 8 images, other convolutions are made

    def __init__(self, model: GAN):
        self.model = model

    def start(self, keys: Tensor, labels: Tensor, options: Mapping[str, Tensor]) -> State:
        z = normal(keys, (self.model.config.latent,), _PRIOR) * options["temperature"][:, None]
        x = torch.zeros(len(keys), *self.model.spec.shape, dtype=torch.uint8, device=keys.device)
        return {"z": z, "label": labels, "x": x}

    def step(self, state: State, index: Tensor) -> State:
        return {**state, "x": self.model.decode(state["z"], state["label"])}

    def finish(self, state: State) -> Tensor:
        return state["x"]


class _Generator(nn.Module):
    """Latents (B, D) and labels (B,) -> images (B, C, H, W) on the scale of [-1, 1]."""

    def __init__(self, config: GANConfig, spec: DataSpec):
        super().__init__()
        self.patch, self.spec = config.patch, spec
        grids, channels = _grids(config, spec), _channels(config)
        self.class_vector = ClassEmbedding(spec.classes, config.latent)
        self.first = _scaled(nn.Linear(2 * config.latent, channels[-1] * math.prod(grids[-1])))
        layers: list[nn.Module] = [nn.Unflatten(1, (channels[-1], *grids[-1]))]
        for i in reversed(range(len(grids))):
            layers += _stage(config, channels[i], grids[i])
            if i:
                narrower = _scaled(nn.Conv2d(channels[i], channels[i - 1], 1))
                layers += [narrower, nn.Upsample(grids[i - 1], mode="bilinear")]
        last = _layer(channels[0], spec.shape[0] * self.patch**2, grids[0], _RECTIFIED)
        self.layers = nn.Sequential(*layers, nn.LeakyReLU(_SLOPE), last)

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        _, height, width = self.spec.shape
        h = self.layers(self.first(torch.cat([z, self.class_vector(y)], dim=1))).float()
        h = F.pixel_shuffle(h, self.patch)[:, :, :height, :width]
        # From the middle of the lowest level to that of the highest, so that both are easy to keep to. Soon
        # there, as by tanh, but with a slope left far out: images once black would stay black otherwise.
        # The fourth root in two steps: the last bit of `**` depends on where in a tensor a value stands.
        return h * (h.square().square() + 1).sqrt().rsqrt() * (1 - 1 / self.spec.levels)


class _Critic(nn.Module):
    """Images (B, C, H, W) on the scale of [-1, 1] and labels (B,) -> scores (B,), higher for real ones."""

    def __init__(self, config: GANConfig, spec: DataSpec):
        super().__init__()
        self.patch = config.patch
        grids, channels = _grids(config, spec), _channels(config)
        layers = [_layer(spec.shape[0] * self.patch**2, channels[0], grids[0], gain=1.0)]
        for i in range(len(grids)):
            if i:
                wider = _scaled(nn.Conv2d(channels[i - 1], channels[i], 1))
                layers += [nn.Upsample(grids[i], mode="bilinear"), wider]
            layers += _stage(config, channels[i], grids[i])
        self.layers = nn.Sequential(*layers, nn.LeakyReLU(_SLOPE), nn.Flatten())
        features = channels[-1] * math.prod(grids[-1])
        self.to_score = nn.Linear(features, 1)
        self.class_vector = ClassEmbedding(spec.classes, features)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        height, width = x.shape[2:]
        padded = F.pad(x, (0, -width % self.patch, 0, -height % self.patch))
        h = self.layers(F.pixel_unshuffle(padded, self.patch)).float()
        projection = (h * self.class_vector(y)).sum(1) / math.sqrt(h.shape[1])
        score: Tensor = self.to_score(h).squeeze(1).float() + projection
        return score


def _grids(config: GANConfig, spec: DataSpec) -> list[tuple[int, int]]:
    """Height and width, in squares, before and after each halving."""
    _, height, width = spec.shape
    sides = [config.patch * 2**i for i in range(config.halvings + 1)]
    return [(-(-height // side), -(-width // side)) for side in sides]


def _channels(config: GANConfig) -> list[int]:
    return [config.width * 2**i for i in range(config.halvings + 1)]


def _stage(config: GANConfig, channels: int, grid: tuple[int, int]) -> list[nn.Module]:
    """Make the residual blocks of one resolution."""
    branches = config.blocks * (config.halvings + 1)
    return [_Residual(channels, grid, branches) for _ in range(config.blocks)]


class _Residual(Block):
    """Two layers whose output is added to their input; at first it is zero.

    With first layers smaller by the root of the number of branches, a step changes the network's output as
    much at any depth (Zhang, Dauphin, Ma, for branches of two layers).
    """

    def __init__(self, channels: int, grid: tuple[int, int], branches: int):
        super().__init__()
        self.first = _layer(channels, channels, grid, gain=_RECTIFIED * branches**-0.5)
        self.second = _layer(channels, channels, grid, gain=0.0)

    def forward(self, h: Tensor) -> Tensor:
        inner = self.first(F.leaky_relu(h, _SLOPE))
        added: Tensor = self.second(F.leaky_relu(inner, _SLOPE))
        return h + added


def _layer(inputs: int, outputs: int, grid: tuple[int, int], gain: float) -> nn.Module:
    """Make a 3x3 convolution; on a grid of one square that is a matrix product, and faster called so."""
    if grid != (1, 1):
        return _scaled(nn.Conv2d(inputs, outputs, 3, padding=1), gain)
    product = _scaled(nn.Linear(inputs, outputs), gain)
    return nn.Sequential(nn.Flatten(), product, nn.Unflatten(1, (outputs, 1, 1)))


def _scaled(layer: nn.Linear | nn.Conv2d, gain: float = 1.0) -> nn.Module:
    """Draw weights that multiply the mean square of their inputs by the square of the gain."""
    nn.init.normal_(layer.weight, std=gain / math.sqrt(layer.weight[0].numel()))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
