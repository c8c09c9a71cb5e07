"""Variational autoencoder: a latent variable model trained on a bound of its likelihood.

    p(x | y) = integral of p(x | z, y) N(z; 0, I) dz,     p(x | z, y) = product of discretized logistics
    log p(x | y) >= E_q [log p(x | z, y)] - KL(q(z | x, y) || N(0, I)) = ELBO,    q = N(mean, diag(scale^2))

Encoder and decoder are small convolutional networks. The class enters both as an embedding and is left out
now and then in training, so that one model answers with and without a label. Not here: learned priors, many
layers of latents, and training on the importance-weighted bound, which overfits small data; it is evaluated.

References:
    Kingma, Welling. Auto-Encoding Variational Bayes. 2013. https://arxiv.org/abs/1312.6114
    Burda, Grosse, Salakhutdinov. Importance Weighted Autoencoders. 2015. https://arxiv.org/abs/1509.00519
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdl_ray.family import (
    UNLABELLED,
    Batch,
    DataSpec,
    Density,
    Family,
    Latent,
    Likelihood,
    LikelihoodKind,
    Losses,
    Optimization,
    Preset,
    Sampler,
    State,
)
from gdl_ray.nn import logistic
from gdl_ray.random import normal, uniform

__all__ = ["VAE", "VAEConfig"]

# What the noise of an example or a sample is for.
_POSTERIOR = 1
_PRIOR, _PIXELS = 0, 1

_LOG_SCALE_RANGE = (-7.0, 4.0)
_ACTIVE = 0.01  # variance over a batch


@dataclass(frozen=True, kw_only=True, slots=True)
class VAEConfig:
    """Size of a VAE, and how it meets labels."""

    latent: int = 16
    """Latent dimensions."""
    width: int = 16
    """Channels at full resolution, doubled at each halving of it."""
    halvings: int = 1
    """How often the encoder halves the resolution."""
    depth: int = 1
    """Convolutions at each resolution, in encoder and decoder alike."""
    hidden: int = 256
    """Units of the layer between convolutions and latents."""
    label_drop: float = 0.25
    """Share of training examples that are shown without their label."""

    def __post_init__(self) -> None:
        for name in ("latent", "width", "halvings", "depth", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.label_drop <= 1:
            raise ValueError(f"label_drop={self.label_drop} must lie in [0, 1]")


def digits() -> Preset:
    """8x8 images: about half a minute on two CPU cores."""
    optimization = Optimization(learning_rate=2e-3, weight_decay=0.3)
    return Preset(model=VAEConfig(), optimization=optimization, steps=1000)


def mnist() -> Preset:
    """28x28 images: minutes on a GPU."""
    model = VAEConfig(latent=32, width=32, halvings=2, hidden=512)
    return Preset(model=model, optimization=Optimization(batch_size=128, ema_decay=0.999), steps=20_000)


def cifar10() -> Preset:
    """32x32 colour images: an hour on a GPU."""
    model = VAEConfig(latent=128, width=64, halvings=2, depth=2, hidden=1024)
    return Preset(model=model, optimization=Optimization(batch_size=128, ema_decay=0.999), steps=50_000)


class VAE(Family, Likelihood, Latent):
    """Variational autoencoder with a discretized-logistic decoder."""

    density = Density.APPROXIMATE
    likelihood_kind = LikelihoodKind.LOWER_BOUND
    tight_samples = 1000
    presets = {"digits": digits, "mnist": mnist, "cifar10": cifar10}
    Config = VAEConfig
    widths = ("width", "hidden")
    depths = ("depth",)

    def __init__(self, config: VAEConfig, spec: DataSpec):
        super().__init__(config, spec)
        self.latent_dims = config.latent
        # The last embedding stands for "no label".
        self.encoder_class = nn.Embedding(spec.classes + 1, config.hidden)
        self.decoder_class = nn.Embedding(spec.classes + 1, config.hidden)
        self.encoder = _encoder(config, spec)
        self.to_posterior = nn.Linear(config.hidden, 2 * config.latent)
        self.from_latent = nn.Linear(config.latent, config.hidden)
        self.decoder = _decoder(config, spec)
        # Mean and log-scale of each pixel before an image says otherwise.
        self.marginal = nn.Parameter(logistic.marginal(spec.counts, spec.shape, spec.levels))

    def forward(self, batch: Batch, phase: str = "main") -> Losses:
        y = batch.sometimes_unlabelled(self.config.label_drop).y
        mean, log_scale = self._posterior(batch.x, y)
        z = mean + log_scale.exp() * normal(batch.key, (self.config.latent,), _POSTERIOR)
        reconstruction = self._log_prob(batch.x, z, y).mean()
        divergence = (0.5 * (mean.square() + (2 * log_scale).exp() - 1) - log_scale).sum(1).mean()
        loss = divergence - reconstruction
        metrics = {
            "bits_per_dim": loss.detach() / (self.spec.dims * math.log(2)),
            "kl_nats": divergence.detach(),
            "reconstruction_nats": -reconstruction.detach(),
            # Burda et al., section 4.2: latents whose posterior mean moves with x.
            "active_units": (mean.detach().var(0, unbiased=False) > _ACTIVE).sum().float(),
        }
        return Losses(loss, metrics)

    @torch.no_grad()
    def log_likelihood(self, batch: Batch, samples: int = 1) -> Tensor:
        """Compute the importance-weighted bound (Burda et al., Eq. 8); one sample makes it the ELBO."""
        mean, log_scale = self._posterior(batch.x, batch.y)
        log_weights = []
        for k in range(samples):
            noise = normal(batch.key, (self.config.latent,), stream=k)
            z = mean + log_scale.exp() * noise
            # log N(z; 0, I) - log q(z | x, y), where the constants cancel.
            log_ratio = (0.5 * (noise.square() - z.square()) + log_scale).sum(1)
            log_weights.append(log_ratio + self._log_prob(batch.x, z, batch.y))
        return torch.stack(log_weights).logsumexp(0) - math.log(samples)

    @torch.no_grad()
    def encode(self, x: Tensor, labels: Tensor) -> Tensor:
        """Find the mean of q(z | x, y)."""
        return self._posterior(x, labels)[0]

    @torch.no_grad()
    def decode(self, z: Tensor, labels: Tensor) -> Tensor:
        """Find the middle of p(x | z, y): the level at the location of each pixel's logistic."""
        return logistic.quantize(self._pixels(z, labels)[0], self.spec.levels)

    def sampler(self) -> Sampler:
        return _AncestralSampler(self)

    def _posterior(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-scale of q(z | x, y), each (B, D)."""
        features = self.encoder(logistic.centers(x, self.spec.levels))
        hidden = F.silu(features + self.encoder_class(self._class(y)))
        mean, log_scale = self.to_posterior(hidden).chunk(2, dim=1)
        return mean, log_scale

    def _pixels(self, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-scale of p(x | z, y), each (B, C, H, W)."""
        hidden = F.silu(self.from_latent(z) + self.decoder_class(self._class(y)))
        mean, log_scale = (self.decoder(hidden) + self.marginal).chunk(2, dim=1)
        return mean, log_scale.clamp(*_LOG_SCALE_RANGE)

    def _log_prob(self, x: Tensor, z: Tensor, y: Tensor) -> Tensor:
        """Compute log p(x | z, y), nats, (B,)."""
        return logistic.log_prob(x, *self._pixels(z, y), self.spec.levels).flatten(1).sum(1)

    def _class(self, y: Tensor) -> Tensor:
        return torch.where(y == UNLABELLED, self.spec.classes, y)


class _AncestralSampler(Sampler):
    """Draws z from the prior and x given z, in one step."""

    steps = 1

    def __init__(self, model: VAE):
        self.model = model

    def start(self, keys: Tensor, labels: Tensor, options: Mapping[str, Tensor]) -> State:
        x = torch.zeros(len(keys), *self.model.spec.shape, dtype=torch.uint8, device=keys.device)
        return {"key": keys, "label": labels, "x": x}

    def step(self, state: State, index: Tensor) -> State:
        z = normal(state["key"], (self.model.config.latent,), _PRIOR)
        u = uniform(state["key"], self.model.spec.shape, _PIXELS)
        mean, log_scale = self.model._pixels(z, state["label"])
        return {**state, "x": logistic.sample(u, mean, log_scale, self.model.spec.levels)}

    def finish(self, state: State) -> Tensor:
        return state["x"]


def _resolutions(config: VAEConfig, spec: DataSpec) -> list[tuple[int, int]]:
    """Height and width before and after each halving."""
    _, height, width = spec.shape
    return [(-(-height // 2**i), -(-width // 2**i)) for i in range(config.halvings + 1)]


def _encoder(config: VAEConfig, spec: DataSpec) -> nn.Sequential:
    """Images (B, C, H, W) -> features (B, hidden)."""
    channels = config.width
    layers: list[nn.Module] = [nn.Conv2d(spec.shape[0], channels, 3, padding=1), nn.SiLU()]
    for _ in range(config.halvings):
        layers += _convolutions(channels, config.depth - 1)
        layers += [nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1), nn.SiLU()]
        channels *= 2
    height, width = _resolutions(config, spec)[-1]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * height * width, config.hidden))


def _decoder(config: VAEConfig, spec: DataSpec) -> nn.Sequential:
    """Features (B, hidden) -> mean and log-scale (B, 2 C, H, W)."""
    *larger, (height, width) = _resolutions(config, spec)
    channels = config.width * 2**config.halvings
    layers: list[nn.Module] = [
        nn.Linear(config.hidden, channels * height * width),
        nn.SiLU(),
        nn.Unflatten(1, (channels, height, width)),
        *_convolutions(channels, config.depth),
    ]
    for size in reversed(larger):
        layers += [nn.Upsample(size), nn.Conv2d(channels, channels // 2, 3, padding=1), nn.SiLU()]
        channels //= 2
        layers += _convolutions(channels, config.depth - 1)
    return nn.Sequential(*layers, nn.Conv2d(channels, 2 * spec.shape[0], 3, padding=1))


def _convolutions(channels: int, count: int) -> list[nn.Module]:
    return [layer for _ in range(count) for layer in (nn.Conv2d(channels, channels, 3, padding=1), nn.SiLU())]
