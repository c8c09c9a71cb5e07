"""Diffusion: noise is added to data until nothing is left of them, and a network learns to take it away.

    q(z | x) = N(z; x, s^2 I),   gamma = 2 log s from gamma_0, where levels stand clear, to gamma_1, far above
    p(x_i | z, y) = softmax(network_i(z, gamma, y)) N(z_i; x_i, s^2) / constant,   x^ = E[x | z, y]
    loss = E [weight(s) |x^ - x|^2] / 2,   weight(s) = (s^2 + sd^2) / (s sd)^2,   log s ~ N(m, d^2)
    -log p(x | y) <= KL(q(z_1 | x) || p(z_1)) - E log p(x | z_0) + 1/2 integral E |x^ - x|^2 / s^2 d gamma

The network says what each value may be, and the value's own noise has its say: where there is little, x^ is
the nearest level, whatever the network says. So training at the noise that shapes samples gives a tight bound
too. The network is a small U-Net that starts near the marginals of the data; its residual branches start
small and need no norms. Coordinates are EDM's; VDM's are z / sqrt(1 + s^2). Not here: learned schedules,
distillation, and training on log p(x_i | z, y), which overfits small data.

References:
    Ho, Jain, Abbeel. Denoising Diffusion Probabilistic Models. 2020. https://arxiv.org/abs/2006.11239 (DDPM)
    Song, Meng, Ermon. Denoising Diffusion Implicit Models. 2020. https://arxiv.org/abs/2010.02502 (DDIM)
    Kingma, Salimans, Poole, Ho. Variational Diffusion Models. 2021. https://arxiv.org/abs/2107.00630 (VDM)
    Karras, Aittala, Aila, Laine. Elucidating the Design Space of Diffusion-Based Generative Models. 2022.
        https://arxiv.org/abs/2206.00364 (EDM)
    Ho, Salimans. Classifier-Free Diffusion Guidance. 2022. https://arxiv.org/abs/2207.12598
    Lugmayr et al. RePaint: Inpainting using DDPMs. 2022. https://arxiv.org/abs/2201.09865
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdl_ray.family import (
    GUIDANCE,
    UNLABELLED,
    Batch,
    Completion,
    DataSpec,
    Density,
    Family,
    Latent,
    Likelihood,
    LikelihoodKind,
    Losses,
    Optimization,
    Option,
    Preset,
    Sampler,
    State,
)
from gdl_ray.nn import logistic
from gdl_ray.nn.dropout import dropout
from gdl_ray.nn.embedding import ClassEmbedding
from gdl_ray.nn.recompute import Block
from gdl_ray.random import normal, uniform

__all__ = ["Diffusion", "DiffusionConfig"]

# What the noise of an example or a sample is for; further streams count up from the last.
_LEVEL, _NOISE, _DROPOUT = 0, 1, 2
_RECONSTRUCTION, _DIFFUSION = 1, 2
_START, _STEPS = 0, 1

_DATA_SCALE = 0.5  # EDM's sd: the spread of data on [-1, 1] that weights and inputs are scaled for
_ODE_STEPS = 100  # between data and latents
_REPEATS = 4  # of each step of a completion: what is drawn and what is known grow together


@dataclass(frozen=True, kw_only=True, slots=True)
class DiffusionConfig:
    """Size of the denoiser, the noise it is trained at, and how it meets labels."""

    width: int = 32
    """Channels at full resolution, doubled at each halving of it; a multiple of 8."""
    blocks: int = 1
    """Residual blocks before, and after, what is done at half a resolution."""
    halvings: int = 1
    """How often the resolution is halved; attention acts at the lowest."""
    dropout: float = 0.1
    """Share of hidden values that training leaves out."""
    noise_mean: float = -1.0
    """Mean of log s in training."""
    noise_spread: float = 1.2
    """Standard deviation of log s in training."""
    label_drop: float = 0.3
    """Share of training examples that are shown without their label."""

    def __post_init__(self) -> None:
        for name, least, unit in (("width", 8, 8), ("blocks", 1, 1), ("halvings", 0, 1)):
            value = getattr(self, name)
            if value < least or value % unit:
                raise ValueError(f"{name}={value} must be at least {least}, in steps of {unit}")
        if not self.noise_spread > 0:
            raise ValueError(f"noise_spread={self.noise_spread} must be above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must lie in [0, 1)")
        if not 0 <= self.label_drop <= 1:
            raise ValueError(f"label_drop={self.label_drop} must lie in [0, 1]")


def digits() -> Preset:
    """8x8 images: about a minute on two CPU cores."""
    optimization = Optimization(learning_rate=3e-3, ema_decay=0.999, precision="bfloat16")
    return Preset(model=DiffusionConfig(), optimization=optimization, steps=2000)


def mnist() -> Preset:
    """28x28 images: minutes on a GPU."""
    model = DiffusionConfig(halvings=2, dropout=0.0, noise_mean=-1.5, noise_spread=1.8)
    optimization = Optimization(learning_rate=2e-3, ema_decay=0.999, precision="bfloat16")
    return Preset(model=model, optimization=optimization, steps=20_000)


def cifar10() -> Preset:
    """32x32 images in colour: days on a GPU."""
    model = DiffusionConfig(width=128, blocks=3, halvings=2, noise_mean=-1.5, noise_spread=1.8)
    optimization = Optimization(batch_size=128, learning_rate=2e-4, ema_decay=0.9999, precision="bfloat16")
    return Preset(model=model, optimization=optimization, steps=200_000)


class Diffusion(Family, Likelihood, Latent, Completion):
    """Gaussian diffusion of ordered levels, denoised by the posterior mean of every value."""

    density = Density.APPROXIMATE
    likelihood_kind = LikelihoodKind.LOWER_BOUND
    quick_samples, tight_samples = 16, 128
    presets = {"digits": digits, "mnist": mnist, "cifar10": cifar10}
    Config = DiffusionConfig
    widths = ("width",)
    depths = ("blocks",)
    healthy = {"bits_per_dim": (0.0, 100.0)}

    def __init__(self, config: DiffusionConfig, spec: DataSpec):
        super().__init__(config, spec)
        # s is a quarter of the distance between a level and the edge of its bin: z_0 tells the level.
        self.gamma_0 = 2 * math.log(0.25 / spec.levels)
        self.gamma_1 = math.log(spec.dims) + 2  # the prior costs less than exp(-2) / 2 nats
        self.start_scale = math.sqrt(1 + math.exp(self.gamma_1))  # of p(z_1): noise, and data of variance 1
        self.unet = _UNet(2 * spec.shape[0], config, spec.classes)
        self.to_logits = _small(nn.Linear(config.width, spec.shape[0] * spec.levels))
        # The frequencies of each value's levels, before the rest of an image says otherwise.
        counts = torch.zeros(spec.dims, spec.levels) if spec.counts is None else spec.counts
        shares = (counts + 1 / spec.levels) / (counts.sum(1, keepdim=True) + 1)
        self.marginal = nn.Parameter(shares.log().view(*spec.shape, spec.levels))

    def forward(self, batch: Batch, phase: str = "main") -> Losses:
        y = batch.sometimes_unlabelled(self.config.label_drop).y
        x = logistic.centers(batch.x, self.spec.levels)
        gamma, density = self._training_noise(uniform(batch.key, (), _LEVEL))
        noise = normal(batch.key, self.spec.shape, _NOISE)
        nats = self._error_nats(x, noise, gamma, y, batch.key if self.training else None)
        # EDM's weight, times s^2: it shifts training towards the noise that hides objects, not details.
        loss = (nats * (1 + gamma.exp() / _DATA_SCALE**2)).mean()
        return Losses(loss, self._metrics(gamma, (nats / density).detach(), self._prior_nats(x)))

    @torch.no_grad()
    def log_likelihood(self, batch: Batch, samples: int = 1) -> Tensor:
        """Estimate the bound (VDM, Eq. 11 and 18) without bias, at noise levels stratified over gamma."""
        x = logistic.centers(batch.x, self.spec.levels)
        span = self.gamma_1 - self.gamma_0
        u = uniform(batch.key, (), _LEVEL)
        nats = torch.zeros_like(u)
        for k in range(samples):
            gamma = self.gamma_0 + span * (k + u) / samples
            noise = normal(batch.key, self.spec.shape, _DIFFUSION + k)
            nats += span / samples * self._error_nats(x, noise, gamma, batch.y, None)
        return -(self._prior_nats(x) + self._reconstruction_nats(batch) + nats)

    @torch.no_grad()
    def encode(self, x: Tensor, labels: Tensor) -> Tensor:
        """Follow the sampler's path backwards, from data to noise."""
        z = self._follow(logistic.centers(x, self.spec.levels), labels, self.gamma_0, self.gamma_1)
        return (z / self.start_scale).flatten(1)

    @torch.no_grad()
    def decode(self, z: Tensor, labels: Tensor) -> Tensor:
        """Follow the sampler's path from given noise."""
        z = z.view(-1, *self.spec.shape) * self.start_scale
        return logistic.quantize(self._follow(z, labels, self.gamma_1, self.gamma_0), self.spec.levels)

    def sampler(self) -> Sampler:
        return _Denoiser(self)

    def completion(self, x: Tensor, known: Tensor) -> Sampler:
        return _Denoiser(self, {"given": x, "known": known})

    def _training_noise(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Map uniforms to gamma, (B,), normal within [gamma_0, gamma_1], and its density there."""
        mean, spread = 2 * self.config.noise_mean, 2 * self.config.noise_spread
        low, high = ((gamma - mean) / spread for gamma in (self.gamma_0, self.gamma_1))
        below, above = ((1 + math.erf(end / math.sqrt(2))) / 2 for end in (low, high))
        standard = torch.special.ndtri(below + (above - below) * u).clamp(low, high)
        density = torch.exp(-0.5 * standard.square()) / (math.sqrt(2 * math.pi) * spread * (above - below))
        return mean + spread * standard, density

    def _error_nats(self, x: Tensor, noise: Tensor, gamma: Tensor, y: Tensor, key: Tensor | None) -> Tensor:
        """Integrand of the bound: |x^ - x|^2 / (2 s^2), nats per unit of gamma, (B,)."""
        s = _scale(gamma)
        error = (self._denoise(x + s * noise, gamma, y, key) - x) / s
        return 0.5 * error.square().flatten(1).sum(1)

    def _prior_nats(self, x: Tensor) -> Tensor:
        """KL(q(z_1 | x) || p(z_1)), (B,); the variances' ratio is 1 - share."""
        share = 1 / self.start_scale**2
        return 0.5 * (share * x.square() - share - math.log1p(-share)).flatten(1).sum(1)

    def _reconstruction_nats(self, batch: Batch) -> Tensor:
        """Draw -log p(x | z_0), (B,), where p(x | z_0) is proportional to q(z_0 | x) as in VDM."""
        x = logistic.centers(batch.x, self.spec.levels)
        s = x.new_full((1, 1, 1, 1), math.exp(self.gamma_0 / 2))
        z = x + s * normal(batch.key, self.spec.shape, _RECONSTRUCTION)
        log_p = _weigh(x.new_zeros(self.spec.levels), z, s).log_softmax(-1)
        return -log_p.gather(-1, batch.x.long()[..., None]).flatten(1).sum(1)

    def _metrics(self, gamma: Tensor, nats: Tensor, prior: Tensor) -> dict[str, Tensor]:
        """The bound without its reconstruction, and what each third of the noise levels adds to it."""
        unit = self.spec.dims * math.log(2)
        third = (3 * (gamma - self.gamma_0) / (self.gamma_1 - self.gamma_0)).long().clamp(0, 2)
        parts = enumerate(("bits_low_noise", "bits_middle_noise", "bits_high_noise"))
        bits = {name: (nats * (third == i)).mean() / unit for i, name in parts}
        return {"bits_per_dim": (nats + prior).mean() / unit, **bits}

    def _denoise(self, z: Tensor, gamma: Tensor, y: Tensor, key: Tensor | None = None) -> Tensor:
        """Find x^, the mean of p(x | z, y); a key drops hidden values."""
        s = _scale(gamma)
        # What each value says for itself. The network sees it, beside scaled data (EDM, Table 1), and adds.
        alone = _weigh(self.marginal, z, s)
        features = torch.cat([z / (s.square() + _DATA_SCALE**2).sqrt(), _mean(alone.detach())], 1)
        h = self.unet(features, gamma, y, key).permute(0, 2, 3, 1)
        logits = self.to_logits(h).float().unflatten(-1, (z.shape[1], -1)).permute(0, 3, 1, 2, 4)
        return _mean(logits + alone)

    def _follow(self, z: Tensor, y: Tensor, start: float, end: float) -> Tensor:
        """Take DDIM's steps from one noise level to another."""
        levels = torch.linspace(start, end, _ODE_STEPS + 1, device=z.device)[:, None].expand(-1, len(z))
        for gamma, following in pairwise(levels):
            z = _ddim(z, self._denoise(z, gamma, y), gamma, following)
        return z


class _Denoiser(Sampler):
    """Follows DDIM's deterministic path to data; a completion draws each step around what is known."""

    steps = 25
    options = {
        "guidance": GUIDANCE,
        "steps": Option(default=25, least=1, most=1000, whole=True, meaning="More are finer, and slower."),
    }

    def __init__(self, model: Diffusion, kept: State | None = None):
        self.model, self.kept = model, kept or {}

    def start(self, keys: Tensor, labels: Tensor, options: Mapping[str, Tensor]) -> State:
        z = normal(keys, self.model.spec.shape, _START) * self.model.start_scale
        state = {"key": keys, "label": labels, "z": z, "x": torch.zeros_like(z), **options}
        return state | {name: tensor.clone() for name, tensor in self.kept.items()}

    def step(self, state: State, index: Tensor) -> State:
        gamma, following = self._gamma(state, index), self._gamma(state, index + 1)
        if self.kept:
            return self._complete(state, index, gamma, following)
        x = self._predict(state, gamma)
        return {**state, "x": x, "z": _ddim(state["z"], x, gamma, following)}

    def finish(self, state: State) -> Tensor:
        x = logistic.quantize(state["x"], self.model.spec.levels)
        return torch.where(state["known"], state["given"], x) if self.kept else x

    def _gamma(self, state: State, index: Tensor) -> Tensor:
        """Noise level before each sample's step, (B,): evenly from gamma_1 to gamma_0."""
        done = (index / (state["steps"] - 1).clamp(min=1)).clamp(max=1)
        return self.model.gamma_1 + (self.model.gamma_0 - self.model.gamma_1) * done

    def _predict(self, state: State, gamma: Tensor) -> Tensor:
        """Find x^, with guidance (Ho and Salimans, Eq. 6) where it is asked for."""
        guidance, label = state["guidance"], state["label"]
        x = self.model._denoise(state["z"], gamma, label)
        guided = (guidance != 1) & (label != UNLABELLED)
        if not guided.any():
            return x
        without = self.model._denoise(state["z"], gamma, torch.full_like(label, UNLABELLED))
        mixed = without.lerp(x, guidance.view(-1, 1, 1, 1)).clamp(-1, 1)
        return torch.where(guided.view(-1, 1, 1, 1), mixed, x)

    def _complete(self, state: State, index: Tensor, gamma: Tensor, following: Tensor) -> State:
        """Put in what is known with as much noise, draw the rest, and again (RePaint, Algorithm 1)."""
        given = logistic.centers(state["given"], self.model.spec.levels)
        s, ratio = _scale(gamma), _scale(2 * (following - gamma))
        for i in range(_REPEATS):
            stream = _STEPS + 2 * (_REPEATS * index + i)
            noise, fresh = (normal(state["key"], self.model.spec.shape, stream + j) for j in (0, 1))
            state["z"] = torch.where(state["known"], given + s * noise, state["z"])
            state["x"] = self._predict(state, gamma)
            # q(z' | z, x^) (DDPM, Eq. 7), and back up by q(z | z') unless this is the last time.
            spread = s * ((ratio if i == _REPEATS - 1 else 1 + ratio) * (1 - ratio)).sqrt()
            state["z"] = state["x"] + ratio * (state["z"] - state["x"]) + spread * fresh
        return state


def _scale(gamma: Tensor) -> Tensor:
    """Scale of the noise, s, as (B, 1, 1, 1)."""
    return torch.exp(gamma / 2).view(-1, 1, 1, 1)


def _levels(logits: Tensor) -> Tensor:
    """What the levels stand for, (levels,)."""
    return logistic.centers(torch.arange(logits.shape[-1], device=logits.device), logits.shape[-1])


def _weigh(logits: Tensor, z: Tensor, s: Tensor) -> Tensor:
    """Add log N(z; level, s^2), but for a constant, to the logits of levels: (B, C, H, W, levels)."""
    distance = _levels(logits) / s[..., None] - (z / s)[..., None]
    return torch.addcmul(logits, distance, distance, value=-0.5)


def _mean(logits: Tensor) -> Tensor:
    """Mean of what levels stand for, weighed by softmax."""
    with torch.autocast(logits.device.type, enabled=False):
        return logits.softmax(-1) @ _levels(logits)


def _ddim(z: Tensor, x: Tensor, gamma: Tensor, following: Tensor) -> Tensor:
    """Move z along the line to x^, to where noise has its next scale (DDIM, Eq. 12 without noise)."""
    return x + _scale(following - gamma) * (z - x)


class _UNet(nn.Module):
    """Images (B, inputs, H, W) at noise levels (B,) with labels (B,) -> features (B, width, H, W)."""

    def __init__(self, inputs: int, config: DiffusionConfig, classes: int):
        super().__init__()
        width = 4 * config.width
        self.embed_noise = nn.Sequential(nn.Linear(config.width, width), nn.SiLU(), nn.Linear(width, width))
        self.embed_class = ClassEmbedding(classes, width)
        self.stem = nn.Conv2d(inputs, config.width, 3, padding=1)
        self.levels = _Level(config.width, config.halvings, config)
        for i, block in enumerate(m for m in self.modules() if isinstance(m, _Residual)):
            block.stream = _DROPOUT + i

    def forward(self, x: Tensor, gamma: Tensor, y: Tensor, key: Tensor | None) -> Tensor:
        angle = gamma[:, None] * torch.logspace(-1, 0.5, self.stem.out_channels // 2, device=gamma.device)
        waves = torch.cat([angle.sin(), angle.cos()], 1)
        condition = F.silu(self.embed_noise(waves) + self.embed_class(y))
        x = x.contiguous(memory_format=torch.channels_last)  # in which a CPU is fastest
        return F.silu(self.levels(self.stem(x), condition, key))


class _Level(nn.Module):
    """One resolution: residual blocks around all lower resolutions or, at the lowest, around attention."""

    def __init__(self, width: int, halvings: int, config: DiffusionConfig):
        super().__init__()
        self.before = nn.ModuleList(_Residual(width, config) for _ in range(config.blocks))
        self.after = nn.ModuleList(_Residual(width, config) for _ in range(config.blocks))
        self.lowest = halvings == 0
        if self.lowest:
            self.attention = nn.MultiheadAttention(width, num_heads=4, batch_first=True)
        else:
            self.shrink = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
            self.lower = _Level(2 * width, halvings - 1, config)
            self.grow = nn.Conv2d(2 * width, width, 1)

    def forward(self, h: Tensor, condition: Tensor, key: Tensor | None) -> Tensor:
        for block in self.before:
            h = block(h, condition, key)
        if self.lowest:
            positions = h.flatten(2).mT.float()
            # Not in bfloat16, in which a CPU is slow at the gradient of attention.
            with torch.autocast(h.device.type, enabled=False):
                gathered = self.attention(positions, positions, positions, need_weights=False)[0]
            h = h + gathered.mT.view_as(h)
        else:
            h = h + F.interpolate(self.grow(self.lower(self.shrink(h), condition, key)), h.shape[2:])
        for block in self.after:
            h = block(h, condition, key)
        return h


class _Residual(Block):
    """Two convolutions, scaled and shifted by the condition between them, added to their input."""

    def __init__(self, width: int, config: DiffusionConfig):
        super().__init__()
        self.dropout, self.stream = config.dropout, 0  # the network gives each block a stream of its own
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.modulate = nn.Linear(4 * config.width, 2 * width)
        self.second = _small(nn.Conv2d(width, width, 3, padding=1))

    def forward(self, h: Tensor, condition: Tensor, key: Tensor | None) -> Tensor:
        scale, shift = self.modulate(condition)[..., None, None].chunk(2, 1)
        hidden = F.silu(self.first(F.silu(h)) * (1 + scale) + shift)
        added: Tensor = h + self.second(dropout(hidden, self.dropout, key, self.stream))
        return added


def _small(layer: nn.Module) -> nn.Module:
    """Begin near zero; not at it, where labels would have no effect."""
    for parameter in layer.parameters():
        parameter.data.mul_(0.1)
    return layer
