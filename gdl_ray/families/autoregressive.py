"""Autoregressive model: each value given those before it, so that the likelihood is exact.

    log p(x | y) = sum over t of log p(x_t | x_1 .. x_t-1, y)                                         (1)

Images go in raster order, a pixel with all its channels at a time; tokens in their own. One causal
transformer reads, at each position, what came before (of an image, a window of the pixels above and to the
left), where it is, and the class. It answers with the law of what comes next: of a token, a softmax; of a
pixel, a mixture of K logistics P_k, discretized, in which each channel shifts the means of those after it:

    p(x_t | ..) = sum over k of w_k prod over c of P_k(x_tc; m_kc + sum over i < c of a_kci x_ti, s_kc)   (2)

Sampling inverts the distribution function of one value after the other. Guidance g and temperature T act on
each value's law, not on a stand-in for it:

    log q(x_tc) = (log p(x_tc | ..) + g (log p(x_tc | .., y) - log p(x_tc | ..))) / T + constant          (3)

The class is left out now and then in training, so that one model answers with and without a label.
Completion keeps what is known and draws the rest in the same order. That is the model's own law where what is
known comes first, as the beginning of a text or the upper part of an image; else a value is drawn without
regard to what is known further on. Not here: random orders, which would mend that.

References:
    Van den Oord, Kalchbrenner, Kavukcuoglu. Pixel Recurrent Neural Networks. 2016.
        https://arxiv.org/abs/1601.06759
    Salimans, Karpathy, Chen, Kingma. PixelCNN++. 2017. https://arxiv.org/abs/1701.05517 (Section 2)
    Parmar, Vaswani, Uszkoreit, Kaiser, Shazeer, Ku, Tran. Image Transformer. 2018.
        https://arxiv.org/abs/1802.05751
    Ho, Salimans. Classifier-Free Diffusion Guidance. 2022. https://arxiv.org/abs/2207.12598
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdl_ray.family import (
    GUIDANCE,
    TEMPERATURE,
    UNLABELLED,
    Batch,
    Completion,
    DataSpec,
    Density,
    Family,
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
from gdl_ray.nn.embedding import ClassEmbedding
from gdl_ray.nn.transformer import CausalTransformer
from gdl_ray.random import uniform

__all__ = ["Autoregressive", "AutoregressiveConfig"]

_LOG_SCALE_RANGE = (-7.0, 4.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoregressiveConfig:
    """Size of an autoregressive model, and how it meets labels."""

    width: int = 64
    """Units of each position, a multiple of `heads`."""
    depth: int = 2
    """Blocks of the transformer."""
    heads: int = 4
    """Attention heads."""
    reach: int = 3
    """Pixels that the window spans upwards, to the left and, in the rows above, to the right."""
    components: int = 10
    """Logistics in the mixture of a pixel."""
    dropout: float = 0.2
    """Share of what each block adds that is dropped in training."""
    label_drop: float = 0.2
    """Share of training examples that are shown without their label."""

    def __post_init__(self) -> None:
        for name in ("width", "depth", "heads", "reach", "components"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must lie in [0, 1)")
        if not 0 <= self.label_drop <= 1:
            raise ValueError(f"label_drop={self.label_drop} must lie in [0, 1]")


def digits() -> Preset:
    """8x8 images: a minute on one CPU core."""
    optimization = Optimization(
        batch_size=32, learning_rate=6e-3, weight_decay=0.1, ema_decay=0.997, precision="bfloat16"
    )
    return Preset(model=AutoregressiveConfig(), optimization=optimization, steps=2000)


def mnist() -> Preset:
    """28x28 images: minutes on a GPU."""
    model = AutoregressiveConfig(width=96, depth=3, heads=2, dropout=0.0)
    optimization = Optimization(
        batch_size=16, learning_rate=3e-3, weight_decay=0.1, ema_decay=0.995, precision="bfloat16"
    )
    return Preset(model=model, optimization=optimization, steps=20_000)


def cifar10() -> Preset:
    """32x32 colour images: hours on a GPU."""
    model = AutoregressiveConfig(width=512, depth=12, heads=8, dropout=0.0, label_drop=0.1)
    optimization = Optimization(
        batch_size=64, learning_rate=5e-4, weight_decay=0.1, ema_decay=0.999, precision="bfloat16"
    )
    return Preset(model=model, optimization=optimization, steps=100_000)


class Autoregressive(Family, Likelihood, Completion):
    """Causal transformer over the pixels of an image, or over tokens."""

    density = Density.TRACTABLE
    likelihood_kind = LikelihoodKind.EXACT
    tight_samples = 1
    kinds = ("image", "tokens")
    presets = {"digits": digits, "mnist": mnist, "cifar10": cifar10}
    Config = AutoregressiveConfig
    widths = ("width",)
    depths = ("depth",)
    healthy = {"bits_per_dim": (0, 30)}

    stem: nn.Module
    head: "_Head"
    window: Tensor

    def __init__(self, config: AutoregressiveConfig, spec: DataSpec):
        super().__init__(config, spec)
        if spec.kind == "image":
            self.channels, height, self.columns = spec.shape
            window = _window(height, self.columns, config.reach)
            self.stem = _pixel_stem(self.channels * window.shape[1], config.width, spec.levels)
            self.head = _MixtureHead(config.width, config.components, self.channels, spec.levels)
        else:  # an image of one row and one channel, where each pixel sees the one before
            self.channels, height, (self.columns,) = 1, 1, spec.shape
            window = torch.arange(-1, self.columns - 1)[:, None] % (self.columns + 1)
            self.stem = nn.Sequential(nn.Embedding(spec.levels + 1, config.width), nn.Flatten(-3))
            self.head = _SoftmaxHead(config.width, spec.levels)
        self.register_buffer("window", window, persistent=False)
        self.row = nn.Embedding(height, config.width)
        self.column = nn.Embedding(self.columns, config.width)
        self.label = ClassEmbedding(spec.classes, config.width)
        for table in (self.row, self.column, self.label.table):
            nn.init.normal_(table.weight, std=0.02)  # where a position is must not drown what it sees
        self.transformer = CausalTransformer(config.width, config.depth, config.heads, config.dropout)

    def forward(self, batch: Batch, phase: str = "main") -> Losses:
        y = batch.sometimes_unlabelled(self.config.label_drop).y
        nats = -self._log_prob(batch.x, y, batch.key if self.training else None)
        bits = nats.detach() / (self.channels * math.log(2))
        halves = bits.chunk(2, dim=1)
        metrics = {
            "bits_per_dim": bits.mean(),
            "bits_per_dim_first_half": halves[0].mean(),
            "bits_per_dim_second_half": halves[-1].mean(),
        }
        return Losses(nats.sum(1).mean(), metrics)

    @torch.no_grad()
    def log_likelihood(self, batch: Batch, samples: int = 1) -> Tensor:
        """Compute log p(x | y), or log p(x), exactly; the number of samples changes nothing."""
        return self._log_prob(batch.x, batch.y).sum(1)

    def sampler(self) -> Sampler:
        return _RasterSampler(self)

    def completion(self, x: Tensor, known: Tensor) -> Sampler:
        return _RasterSampler(self, (x, known))

    def _log_prob(self, x: Tensor, y: Tensor, key: Tensor | None = None) -> Tensor:
        """Compute the terms of Eq. 1, nats, (B, T)."""
        sequence = self._sequence(x)
        position = torch.arange(len(self.window), device=x.device)
        seen = sequence[:, :, self.window].transpose(1, 2)
        h = self.transformer(self._input(seen, position, y[:, None]), key)
        with torch.autocast(x.device.type, enabled=False):
            return self.head.log_prob(self.head(h.float()), sequence[:, :, :-1].transpose(1, 2))

    def _sequence(self, x: Tensor) -> Tensor:
        """Lay pixels in a row, and behind them what stands for those outside: int64 (B, C, T + 1)."""
        return F.pad(x.reshape(len(x), self.channels, -1).long(), (0, 1), value=self.spec.levels)

    def _input(self, seen: Tensor, position: Tensor, y: Tensor) -> Tensor:
        """Tell a position the values in its window, (..., C, K), where it is and its class."""
        place = self.row(position // self.columns) + self.column(position % self.columns)
        h: Tensor = self.stem(seen) + place + self.label(y)
        return h

    def _step(self, x: Tensor, cache: Tensor, index: Tensor, y: Tensor) -> Tensor:
        """Find the parameters of the law of one pixel of each sequence, (B, ...)."""
        seen = x.gather(2, self.window[index, None].expand(-1, self.channels, -1))
        parameters: Tensor = self.head(self.transformer.step(self._input(seen, index, y), cache, index))
        return parameters


class _RasterSampler(Sampler):
    """Draws one pixel, or one token, of each sample per step; keeps the values that are given as known."""

    def __init__(self, model: Autoregressive, given: tuple[Tensor, Tensor] | None = None):
        self.model = model
        self.given = given
        self.steps = len(model.window)
        guidance = {"guidance": GUIDANCE} if model.spec.classes else {}
        self.options: Mapping[str, Option] = {"temperature": TEMPERATURE, **guidance}

    def start(self, keys: Tensor, labels: Tensor, options: Mapping[str, Tensor]) -> State:
        model, B = self.model, len(keys)
        blank = torch.zeros(B, *model.spec.shape, dtype=torch.uint8, device=keys.device)
        x, known = self.given or (blank, blank.bool())
        return {
            "key": keys,
            "label": labels,
            "temperature": options["temperature"],
            "guidance": options.get("guidance", torch.ones_like(options["temperature"])),
            "x": model._sequence(torch.where(known, x, 0)),
            "known": known.reshape(B, model.channels, -1).clone(),
            "cache": model.transformer.empty_cache(B, self.steps, keys.device),
            "cache_unlabelled": model.transformer.empty_cache(B, self.steps, keys.device),
        }

    def step(self, state: State, index: Tensor) -> State:
        head, x = self.model.head, state["x"]
        rows = torch.arange(len(x), device=x.device)
        laws = self._laws(state, index)
        u = uniform(state["key"], (self.model.channels,), index)
        for c in range(self.model.channels):
            log_p = [head.conditional(law, x[rows, :c, index]) for law in laws]
            drawn = _invert(self._guide(state, log_p[0], log_p[-1]), u[:, c])
            x[rows, c, index] = torch.where(state["known"][rows, c, index], x[rows, c, index], drawn)
        return state

    def _laws(self, state: State, index: Tensor) -> list[Tensor]:
        """Find the parameters of a pixel with the label and, if any sample is guided, without."""
        laws = [self.model._step(state["x"], state["cache"], index, state["label"])]
        if self._guided(state).any():
            unlabelled = torch.full_like(state["label"], UNLABELLED)
            laws.append(self.model._step(state["x"], state["cache_unlabelled"], index, unlabelled))
        return laws

    def _guide(self, state: State, log_p: Tensor, log_p_unlabelled: Tensor) -> Tensor:
        """Change the law of a value by Eq. 3, (B, L)."""
        towards_label = log_p_unlabelled + state["guidance"][:, None] * (log_p - log_p_unlabelled)
        # Chosen by row, so that a sample without guidance is the same beside one with.
        log_q = torch.where(self._guided(state)[:, None], towards_label, log_p)
        return log_q / state["temperature"][:, None]

    def _guided(self, state: State) -> Tensor:
        return (state["guidance"] != 1) & (state["label"] != UNLABELLED)

    def finish(self, state: State) -> Tensor:
        spec = self.model.spec
        x = state["x"][:, :, :-1].reshape(-1, *spec.shape)
        return x.to(torch.uint8 if spec.kind == "image" else torch.int64, copy=True)


def _pixel_stem(values: int, width: int, levels: int) -> nn.Sequential:
    """Levels in a window, int64 (..., C, K) -> vectors (..., width)."""
    first, last = nn.Linear(4 * values, 2 * width), nn.Linear(2 * width, width)
    return nn.Sequential(_LevelFeatures(levels), nn.Flatten(-3), first, nn.SiLU(), last)


class _LevelFeatures(nn.Module):
    """Describes levels: the value, whether it is the first or the last, and that it is in the image."""

    table: Tensor

    def __init__(self, levels: int):
        super().__init__()
        level = torch.arange(levels)
        inside = torch.ones(levels)
        columns = [logistic.centers(level, levels), level == 0, level == levels - 1, inside]
        outside = torch.zeros(1, len(columns))
        table = torch.cat([torch.stack([column.float() for column in columns], dim=1), outside])
        self.register_buffer("table", table, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.embedding(x, self.table)


class _Head(nn.Module, ABC):
    """Maps what a position has read, (..., width), to the parameters of the law of its C values."""

    @abstractmethod
    def log_prob(self, parameters: Tensor, x: Tensor) -> Tensor:
        """Compute log p(x), nats, of values (..., C)."""

    @abstractmethod
    def conditional(self, parameters: Tensor, before: Tensor) -> Tensor:
        """Compute log p(x_c), nats, of every level, (B, L), given the values before it, (B, c)."""


class _SoftmaxHead(_Head):
    """The law of an unordered symbol."""

    def __init__(self, width: int, levels: int):
        super().__init__()
        self.logits = nn.Linear(width, levels)

    def forward(self, h: Tensor) -> Tensor:
        return F.log_softmax(self.logits(h), dim=-1)

    def log_prob(self, parameters: Tensor, x: Tensor) -> Tensor:
        return parameters.gather(-1, x).squeeze(-1)

    def conditional(self, parameters: Tensor, before: Tensor) -> Tensor:
        return parameters


class _MixtureHead(_Head):
    """The law of a pixel, Eq. 2: parameters are (..., 1 + 2 C + C (C - 1) / 2, K)."""

    def __init__(self, width: int, components: int, channels: int, levels: int):
        super().__init__()
        self.channels, self.levels = channels, levels
        self.rows = 1 + 2 * channels + channels * (channels - 1) // 2
        self.linear = nn.Linear(width, self.rows * components)
        # The components of a fresh model share out the range.
        bias = torch.zeros(self.rows, components)
        bias[1 : 1 + channels] = logistic.centers(torch.arange(components), components)
        bias[1 + channels : 1 + 2 * channels] = -math.log(components)
        self.linear.bias = nn.Parameter(bias.flatten())

    def forward(self, h: Tensor) -> Tensor:
        parameters: Tensor = self.linear(h).unflatten(-1, (self.rows, -1))
        return parameters

    def log_prob(self, parameters: Tensor, x: Tensor) -> Tensor:
        return self._joint(parameters, x).logsumexp(-1)

    def conditional(self, parameters: Tensor, before: Tensor) -> Tensor:
        posterior = self._joint(parameters, before).log_softmax(-1)
        mean, log_scale = self._logistic(parameters, before)
        level = torch.arange(self.levels, device=before.device)
        each = logistic.log_prob(level, mean[..., None], log_scale[..., None], self.levels)
        # Over components with the levels innermost: sums over a short last dimension are slow.
        return (posterior[..., None] + each).logsumexp(1)

    def _joint(self, parameters: Tensor, x: Tensor) -> Tensor:
        """Compute log of the summand of Eq. 2, over the first channels alone if x, (..., c), has no more."""
        joint = parameters[..., 0, :].log_softmax(-1)
        for c in range(x.shape[-1]):
            mean, log_scale = self._logistic(parameters, x[..., :c])
            joint = joint + logistic.log_prob(x[..., c, None], mean, log_scale, self.levels)
        return joint

    def _logistic(self, parameters: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-scale of each component of the channel after those before it, (..., c)."""
        c, C = before.shape[-1], self.channels
        mean, log_scale = parameters[..., 1 + c, :], parameters[..., 1 + C + c, :]
        first = 1 + 2 * C + c * (c - 1) // 2
        shift = parameters[..., first : first + c, :] * logistic.centers(before, self.levels)[..., None]
        return mean + shift.sum(-2), log_scale.clamp(*_LOG_SCALE_RANGE)


def _window(height: int, columns: int, reach: int) -> Tensor:
    """Number the pixels that each pixel sees, those outside the image as T: int64 (T, K)."""
    above = [(-dy, dx) for dy in range(1, reach + 1) for dx in range(-reach, reach + 1)]
    offsets = torch.tensor(above + [(0, -dx) for dx in range(1, reach + 1)])
    position = torch.arange(height * columns)[:, None]
    row, column = position // columns + offsets[:, 0], position % columns + offsets[:, 1]
    inside = (row >= 0) & (column >= 0) & (column < columns)
    return torch.where(inside, row * columns + column, height * columns)


def _invert(log_q: Tensor, u: Tensor) -> Tensor:
    """Find the level at a share u, (B,), of the distribution with these log-weights, (B, L): int64 (B,)."""
    below = log_q.softmax(-1).cumsum(-1)
    return torch.searchsorted(below, u[:, None] * below[:, -1:]).squeeze(1)
