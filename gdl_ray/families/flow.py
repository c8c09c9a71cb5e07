"""Normalizing flow: an invertible network between images and noise, trained on its exact density.

    z_0 = Phi^-1(F(x + u)),  u ~ U(0, 1)                         each dimension by itself, F learned       (1)
    z_t <- exp(-a) (z_t - b - C z_t),  (a, b, C) = f(z_<t, y)    an autoregressive block, patch t          (2)
    z_free <- exp(-a) (z_free - b),    (a, b) = f(z_kept, y)     a coupling block                          (3)
    log p(x | y) >= E_u [log N(z_K; 0, I) + log |dz_K / d(x + u)|]                                         (4)

Each f starts close to zero, so that training starts from independent dimensions. In (2) f is a causal
transformer, C is strictly lower triangular, and order and shape of the patches change from block to block;
forward is one pass, the inverse goes patch by patch. In (3) f is a small dense network, and both ways are one
pass. The density of x + u is exact. As the data are discrete, what is reported is the bound (4), or the
tighter log-mean over several u. Not here: training on noisier data, which sharpens samples and forfeits the
bound, learned noise u, and several scales.

References:
    Dinh, Sohl-Dickstein, Bengio. Density Estimation Using Real NVP. 2016. https://arxiv.org/abs/1605.08803
    Zhai et al. Normalizing Flows Are Capable Generative Models. 2024. https://arxiv.org/abs/2412.06329
    Theis, van den Oord, Bethge. A Note on the Evaluation of Generative Models. 2015.
        https://arxiv.org/abs/1511.01844 (section 3.1: dequantization)
    Hoogeboom, Cohen, Tomczak. Learning Discrete Distributions by Dequantization. 2020.
        https://arxiv.org/abs/2001.11235 (importance-weighted bound)
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdl_ray.family import (
    GUIDANCE,
    TEMPERATURE,
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
from gdl_ray.nn.dropout import dropout
from gdl_ray.nn.embedding import ClassEmbedding
from gdl_ray.nn.marginal import MarginalGaussianization
from gdl_ray.nn.transformer import CausalTransformer
from gdl_ray.random import normal, uniform

__all__ = ["Flow", "FlowConfig"]

# What the noise of an example or a sample is for; dropout takes streams from its number on.
_DEQUANTIZATION, _DROPOUT = 0, 1
_PRIOR = 0

_LOG_SCALE_LIMIT = 3.0


@dataclass(frozen=True, kw_only=True, slots=True)
class FlowConfig:
    """Size of a flow, and how it meets labels."""

    kind: Literal["autoregressive", "coupling"] = "autoregressive"
    """Of the blocks. `coupling` trains and samples faster, and is the better one for the smallest images."""
    blocks: int = 4
    """Invertible blocks."""
    depth: int = 2
    """Layers of each block's network."""
    width: int = 64
    """Units of each layer."""
    heads: int = 2
    """Attention heads of an autoregressive block; they divide the width."""
    patch: int = 4
    """Side of an autoregressive block's patches, pixels; those at the edge may be smaller."""
    dropout: float = 0.1
    """Share of what each layer yields that is dropped in training."""
    label_drop: float = 0.5
    """Share of training examples that are shown without their label."""

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ValueError(f"kind={self.kind} must be one of: {', '.join(_KINDS)}")
        for name in ("blocks", "depth", "width", "heads", "patch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.width % self.heads:
            raise ValueError(f"width={self.width} must be a multiple of heads={self.heads}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must lie in [0, 1)")
        if not 0 <= self.label_drop <= 1:
            raise ValueError(f"label_drop={self.label_drop} must lie in [0, 1]")


def digits() -> Preset:
    """8x8 images: about half a minute on one CPU core."""
    model = FlowConfig(kind="coupling", blocks=8, width=128, dropout=0.3)
    return Preset(model=model, optimization=Optimization(learning_rate=2e-3), steps=3000)


def mnist() -> Preset:
    """28x28 images: minutes on a GPU."""
    model = FlowConfig(width=128, dropout=0.0)
    optimization = Optimization(learning_rate=2e-3, ema_decay=0.998, precision="bfloat16")
    return Preset(model=model, optimization=optimization, steps=20_000)


def cifar10() -> Preset:
    """32x32 images in colour: hours on a GPU."""
    model = FlowConfig(blocks=8, depth=4, width=512, heads=8, patch=2)
    optimization = Optimization(batch_size=128, learning_rate=5e-4, ema_decay=0.999, precision="bfloat16")
    return Preset(model=model, optimization=optimization, steps=100_000)


class Flow(Family, Likelihood, Latent):
    """Normalizing flow over dequantized levels."""

    density = Density.TRACTABLE
    likelihood_kind = LikelihoodKind.LOWER_BOUND
    presets = {"digits": digits, "mnist": mnist, "cifar10": cifar10}
    Config = FlowConfig
    widths = ("width",)
    depths = ("blocks",)
    healthy = {"latent_square": (0.1, 10.0), "bits_per_dim": (-1.0, 16.0)}

    def __init__(self, config: FlowConfig, spec: DataSpec):
        super().__init__(config, spec)
        self.marginal = MarginalGaussianization(spec.counts, spec.dims, spec.levels)
        self.blocks = nn.ModuleList(_KINDS[config.kind](config, spec, i) for i in range(config.blocks))

    def forward(self, batch: Batch, phase: str = "main") -> Losses:
        y = batch.sometimes_unlabelled(self.config.label_drop).y
        u = uniform(batch.key, (self.spec.dims,), _DEQUANTIZATION)
        z, log_det = self._to_latent(batch.x, u, y, batch.key if self.training else None)
        loss = -(_log_normal(z) + log_det).mean()  # (4)
        metrics = {
            "bits_per_dim": loss.detach() / (self.spec.dims * math.log(2)),
            "log_determinant_nats": log_det.detach().mean(),
            "latent_square": z.detach().square().mean(),  # 1 if the latents are normal
        }
        return Losses(loss, metrics)

    @torch.no_grad()
    def log_likelihood(self, batch: Batch, samples: int = 1) -> Tensor:
        """Compute the importance-weighted bound (Hoogeboom et al., section 3); one sample makes it (4)."""
        densities = []
        for k in range(samples):
            u = uniform(batch.key, (self.spec.dims,), stream=k)
            z, log_det = self._to_latent(batch.x, u, batch.y)
            densities.append(_log_normal(z) + log_det)
        return torch.stack(densities).logsumexp(0) - math.log(samples)

    @torch.no_grad()
    def encode(self, x: Tensor, labels: Tensor) -> Tensor:
        """Map the centre of each value's bin."""
        middle = torch.full((len(x), self.spec.dims), 0.5, device=x.device)
        return self._to_latent(x, middle, labels)[0]

    @torch.no_grad()
    def decode(self, z: Tensor, labels: Tensor) -> Tensor:
        guidance = torch.ones(len(z), device=z.device)
        for number in reversed(range(len(self.blocks))):
            z = self._block(number).inverse(z, labels, guidance)
        return self._to_levels(z)

    def sampler(self) -> Sampler:
        return _BlockSampler(self)

    def _to_latent(self, x: Tensor, u: Tensor, y: Tensor, key: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map x + u to z, (B, D), and log |dz / d(x + u)|, (B,); dropout where there is a key."""
        z, log_det = self.marginal(x.flatten(1), u)
        for number in range(len(self.blocks)):
            stream = _DROPOUT + 2 * self.config.depth * number
            z, added = self._block(number)(z, y, key, stream)
            log_det = log_det + added
        return z, log_det

    def _to_levels(self, z: Tensor) -> Tensor:
        """Find the levels whose bins hold z_0, (B, D): uint8 (B, C, H, W)."""
        return self.marginal.inverse(z)[0].view(-1, *self.spec.shape).to(torch.uint8)

    def _block(self, number: int) -> "_Bijection":
        return cast(_Bijection, self.blocks[number])


class _BlockSampler(Sampler):
    """Draws z from the prior and inverts one block a step, the last block first."""

    options = {"guidance": GUIDANCE, "temperature": TEMPERATURE}

    def __init__(self, model: Flow):
        self.model = model
        self.steps = len(model.blocks)

    def start(self, keys: Tensor, labels: Tensor, options: Mapping[str, Tensor]) -> State:
        z = normal(keys, (self.model.spec.dims,), _PRIOR) * options["temperature"][:, None]
        return {"z": z, "label": labels, "guidance": options["guidance"]}

    def step(self, state: State, index: Tensor) -> State:
        z = state["z"].clone()
        for i in torch.unique(index).tolist():
            rows = torch.nonzero(index == i).squeeze(1)
            some = self.padded(rows, len(index))
            block = self.model._block(self.steps - 1 - i)
            inverted = block.inverse(state["z"][some], state["label"][some], state["guidance"][some])
            z[rows] = inverted[: len(rows)]
        return {**state, "z": z}

    def finish(self, state: State) -> Tensor:
        return self.model._to_levels(state["z"])


class _Bijection(nn.Module, ABC):
    """An invertible map of vectors to vectors, given a class."""

    @abstractmethod
    def forward(self, x: Tensor, y: Tensor, key: Tensor | None, stream: int) -> tuple[Tensor, Tensor]:
        """Map x, (B, D), to z, (B, D), and log |dz / dx|, (B,); `key` and `stream` are dropout's."""

    @abstractmethod
    def inverse(self, z: Tensor, y: Tensor, guidance: Tensor) -> Tensor:
        """Map z, (B, D), to x, (B, D); guidance, (B,), weighs the label of each. Without gradient."""


class _Autoregressive(_Bijection):
    """Equation (2), with C for what the pixels of a patch say about one another.

    Tokens are patches: neighbouring pixels in two blocks, then in two blocks pixels that lie far apart, as
    those of a coarser image do; every other block takes them backwards.
    """

    slots: Tensor
    places: Tensor
    present: Tensor

    def __init__(self, config: FlowConfig, spec: DataSpec, number: int):
        super().__init__()
        slots = _patches(spec, config.patch, apart=number % 4 >= 2)
        slots = slots.flip(0) if number % 2 else slots
        T, P = slots.shape
        self.register_buffer("slots", slots, persistent=False)
        self.register_buffer("places", slots.flatten().argsort()[: spec.dims], persistent=False)
        self.register_buffer("present", slots < spec.dims, persistent=False)
        self.embed = nn.Linear(P, config.width)
        self.position = nn.Parameter(nn.init.normal_(torch.empty(T, config.width), std=0.02))
        self.embed_class = ClassEmbedding(spec.classes, config.width)
        self.transformer = CausalTransformer(config.width, config.depth, config.heads, config.dropout)
        self.head = _near_zero(nn.Linear(config.width, P * (2 + P)))

    def forward(self, x: Tensor, y: Tensor, key: Tensor | None, stream: int) -> tuple[Tensor, Tensor]:
        tokens = self._split(x)
        before = F.pad(tokens, (0, 0, 1, -1))  # each position sees the token before it
        h = self.embed(before) + self.position + self.embed_class(y)[:, None]
        affine, mix = self._read(self.transformer(h, key, stream), self.present)
        log_scale, shift = _log_scale_and_shift(affine, self.present)
        mixed = (mix @ tokens[..., None]).squeeze(-1)
        z = torch.exp(-log_scale) * (tokens - shift - mixed)  # (2)
        return self._join(z), -log_scale.sum((1, 2))

    def inverse(self, z: Tensor, y: Tensor, guidance: Tensor) -> Tensor:
        tokens = self._split(z)
        B, T, _ = tokens.shape
        passes = [
            (self.embed_class(labels), self.transformer.empty_cache(B, T, z.device))
            for labels in _labels_to_ask(y, guidance)
        ]
        x = torch.zeros_like(tokens)
        for t in range(T):
            index = torch.full_like(y, t)
            h = self.embed(x[:, max(t - 1, 0)]) + self.position[t]
            hidden = [self.transformer.step(h + label, cache, index) for label, cache in passes]
            asked = [self._read(each, self.present[t]) for each in hidden]
            affine = _guided([affine for affine, _ in asked], guidance)
            # Never beyond the label's own: the inverse of an exaggerated C has no bound.
            mix = _guided([mix for _, mix in asked], guidance.clamp(max=1))
            log_scale, shift = _log_scale_and_shift(affine, self.present[t])
            x[:, t] = _unmix(mix, torch.exp(log_scale) * tokens[:, t] + shift)
        return self._join(x)

    def _read(self, h: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """Find what becomes scale and shift, (..., 2 P), and C, (..., P, P), of patches with these pixels."""
        P = present.shape[-1]
        affine, mix = torch.split(self.head(h).float(), [2 * P, P * P], dim=-1)
        return affine, mix.view(*mix.shape[:-1], P, P).tril(-1) * present[..., None]

    def _split(self, x: Tensor) -> Tensor:
        """Cut vectors, (B, D), into tokens, (B, T, P), with zeros where a patch lacks pixels."""
        return F.pad(x, (0, 1))[:, self.slots]

    def _join(self, tokens: Tensor) -> Tensor:
        """Undo `_split`."""
        return tokens.flatten(1)[:, self.places]


class _Coupling(_Bijection):
    """Equation (3): half of the dimensions stay, and say how the others are scaled and shifted."""

    free: Tensor

    def __init__(self, config: FlowConfig, spec: DataSpec, number: int):
        super().__init__()
        self.dropout = config.dropout
        self.register_buffer("free", _checkerboard(spec) ^ (number % 2 == 1), persistent=False)
        self.embed = nn.Linear(spec.dims, config.width)
        self.embed_class = ClassEmbedding(spec.classes, config.width)
        self.hidden = nn.ModuleList(nn.Linear(config.width, config.width) for _ in range(config.depth - 1))
        self.head = _near_zero(nn.Linear(config.width, 2 * spec.dims))

    def forward(self, x: Tensor, y: Tensor, key: Tensor | None, stream: int) -> tuple[Tensor, Tensor]:
        log_scale, shift = _log_scale_and_shift(self._network(x, y, key, stream), self.free)
        return torch.exp(-log_scale) * (x - shift), -log_scale.sum(1)  # (3)

    def inverse(self, z: Tensor, y: Tensor, guidance: Tensor) -> Tensor:
        asked = [self._network(z, labels) for labels in _labels_to_ask(y, guidance)]
        log_scale, shift = _log_scale_and_shift(_guided(asked, guidance), self.free)
        return torch.exp(log_scale) * z + shift

    def _network(self, x: Tensor, y: Tensor, key: Tensor | None = None, stream: int = 0) -> Tensor:
        h = self.embed(x.masked_fill(self.free, 0)) + self.embed_class(y)
        for i, layer in enumerate(self.hidden):
            h = layer(dropout(F.silu(h), self.dropout, key, stream + i))
        raw: Tensor = self.head(F.silu(h)).float()
        return raw


_KINDS: Mapping[str, type[_Autoregressive] | type[_Coupling]] = {
    "autoregressive": _Autoregressive,
    "coupling": _Coupling,
}


def _log_scale_and_shift(raw: Tensor, moves: Tensor) -> tuple[Tensor, Tensor]:
    """Split (..., 2 N) in two, bound the scale, and leave alone what does not move: bool, (..., N)."""
    log_scale, shift = raw.chunk(2, dim=-1)
    log_scale = _LOG_SCALE_LIMIT * torch.tanh(log_scale / _LOG_SCALE_LIMIT)
    return log_scale * moves, shift * moves


def _labels_to_ask(y: Tensor, guidance: Tensor) -> list[Tensor]:
    """Say which labels a network is to be asked with: the samples' own and, if any row needs it, none."""
    needed = ((guidance != 1) & (y != UNLABELLED)).any()
    return [y, torch.full_like(y, UNLABELLED)] if needed else [y]


def _guided(asked: list[Tensor], guidance: Tensor) -> Tensor:
    """Weigh a network's answers with and without label, as `_labels_to_ask` orders them."""
    given, *others = asked
    if not others:
        return given
    weight = guidance.view(-1, *[1] * (given.dim() - 1))
    return torch.where(weight == 1, given, others[0] + weight * (given - others[0]))


def _unmix(mix: Tensor, x: Tensor) -> Tensor:
    """Solve (I - C) result = x for strictly lower triangular C, (B, P, P), and x, (B, P)."""
    identity = torch.eye(x.shape[1], device=x.device)
    solved: Tensor = torch.linalg.solve_triangular(
        identity - mix, x[..., None], upper=False, unitriangular=True
    )
    return solved.squeeze(-1)


def _log_normal(z: Tensor) -> Tensor:
    """Compute log N(z; 0, I), nats, (B,)."""
    return (-0.5 * z.square() - 0.5 * math.log(2 * math.pi)).sum(1)


def _patches(spec: DataSpec, side: int, apart: bool) -> Tensor:
    """Number the dimensions of each patch, int64 (T, P); `spec.dims` where a patch lacks a pixel.

    Patches are side x side pixels of all channels in raster order, next to one another or, where they are to
    lie apart, spread evenly over the image.
    """
    channels, height, width = spec.shape
    rows, columns = -(-height // side), -(-width // side)
    grid = torch.arange(spec.dims).view(spec.shape)
    grid = F.pad(grid, (0, columns * side - width, 0, rows * side - height), value=spec.dims)
    if apart:
        cut = grid.view(channels, side, rows, side, columns).permute(2, 4, 0, 1, 3)
    else:
        cut = grid.view(channels, rows, side, columns, side).permute(1, 3, 0, 2, 4)
    return cut.reshape(rows * columns, -1)


def _checkerboard(spec: DataSpec) -> Tensor:
    """Colour the dimensions like a chessboard, in space and over channels: bool, (D,)."""
    place = torch.meshgrid(*(torch.arange(size) for size in spec.shape), indexing="ij")
    return (torch.stack(place).sum(0) % 2 == 0).flatten()


def _near_zero(layer: nn.Linear) -> nn.Linear:
    nn.init.normal_(layer.weight, std=1e-4)  # not zero, or labels would mean nothing before the first step
    nn.init.zeros_(layer.bias)
    return layer
