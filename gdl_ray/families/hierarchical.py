"""Hierarchical autoregression: discrete codes from coarse to fine, and an autoregressive prior over them.

    p(x | y) = sum over codes c of p(c | y) p(x | c, y),     p(x | c, y) = product of discretized logistics
    p(c | y) = product over tokens t of p(c_t | c_<t, y),    in raster order on grids from coarse to fine
    log p(x | y) >= E_q [log p(x | c, y) + log p(c | y) - log q(c | x, y)]

A token is a few digits, rounded values of the encoder (finite scalar quantization): there is no codebook to
keep alive. The encoder adds logistic noise before it rounds, of a scale that it learns, so q is a discretized
logistic at each digit and the training loss is the bound itself; noise that blurs no pixel is paid back.

One descent from a single place to the whole image serves encoder and decoder: at each grid of codes, the
encoder reads the image and what coarser codes have made so far, and the decoder adds what is drawn. All is
trained at once, but the prior takes codes as they come: if its loss reached the encoder, codes would rather
be cheap than tell something. Not here: drawing a whole grid at once (Tian et al.), and completion.

References:
    Razavi et al. Generating Diverse High-Fidelity Images with VQ-VAE-2. 2019. https://arxiv.org/abs/1906.00446
    Mentzer et al. Finite Scalar Quantization: VQ-VAE Made Simple. 2023. https://arxiv.org/abs/2309.15505
    Tian et al. Visual Autoregressive Modeling via Next-Scale Prediction. 2024. https://arxiv.org/abs/2404.02905
    Burda, Grosse, Salakhutdinov. Importance Weighted Autoencoders. 2015. https://arxiv.org/abs/1509.00519
    Ho, Salimans. Classifier-Free Diffusion Guidance. 2022. https://arxiv.org/abs/2207.12598
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

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
from gdl_ray.nn import logistic
from gdl_ray.nn.dropout import dropout
from gdl_ray.nn.embedding import ClassEmbedding
from gdl_ray.nn.recompute import Block
from gdl_ray.nn.transformer import CausalTransformer
from gdl_ray.random import uniform

__all__ = ["Hierarchical", "HierarchicalConfig"]

# What the noise of an example or a sample is for.
_POSTERIOR, _PRIOR_DROPOUT, _ENCODER_DROPOUT, _DECODER_DROPOUT = 1, 1000, 2000, 3000
_PIXELS, _TOKENS = 0, 1

_LOG_SCALE_RANGE = (-7.0, 4.0)
_HEADS = 4

_Pixels = tuple[Tensor, Tensor]  # mean and log-scale of each, (B, C, H, W)
_Choose = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class HierarchicalConfig:
    """Size of the codes and of the networks around them, and how they meet labels."""

    halvings: int = 2
    """How often the finest grid of codes halves the resolution; coarser grids go on to a single place."""
    digits: int = 2
    """Digits of a token."""
    base: int = 8
    """Values of a digit: a token is one of base ** digits."""
    width: int = 16
    """Channels at full resolution, doubled at each halving down to the finest grid of codes."""
    prior_width: int = 64
    """Width of the transformer over tokens, a multiple of 4."""
    prior_depth: int = 2
    """Blocks of the transformer over tokens."""
    dropout: float = 0.1
    """Share of values that every block drops in training."""
    label_drop: float = 0.5
    """Share of training examples that are shown without their label."""

    def __post_init__(self) -> None:
        for name in ("halvings", "digits", "width", "prior_width", "prior_depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 2 <= self.base <= 256:
            raise ValueError(f"base={self.base} must lie in [2, 256]")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must lie in [0, 1)")
        if not 0 <= self.label_drop <= 1:
            raise ValueError(f"label_drop={self.label_drop} must lie in [0, 1]")


def digits() -> Preset:
    """8x8 images, codes on 1x1 and 2x2: about a minute on one CPU core."""
    optimization = Optimization(learning_rate=4e-3, weight_decay=0.3, precision="bfloat16")
    return Preset(model=HierarchicalConfig(), optimization=optimization, steps=2000)


def mnist() -> Preset:
    """28x28 images, codes on 1x1, 2x2, 4x4 and 7x7: minutes on a GPU."""
    model = HierarchicalConfig(width=24, prior_width=128, prior_depth=4)
    optimization = Optimization(learning_rate=2e-3, ema_decay=0.999, precision="bfloat16")
    return Preset(model=model, optimization=optimization, steps=20_000)


def cifar10() -> Preset:
    """32x32 images in colour, codes on 1x1 to 8x8: hours on a GPU."""
    model = HierarchicalConfig(digits=3, width=64, prior_width=512, prior_depth=8)
    optimization = Optimization(batch_size=128, ema_decay=0.9995, precision="bfloat16")
    return Preset(model=model, optimization=optimization, steps=100_000)


class Hierarchical(Family, Likelihood, Latent):
    """Discrete codes at several scales with an autoregressive prior and a discretized-logistic decoder."""

    density = Density.APPROXIMATE
    likelihood_kind = LikelihoodKind.LOWER_BOUND
    presets = {"digits": digits, "mnist": mnist, "cifar10": cifar10}
    Config = HierarchicalConfig
    widths = ("width", "prior_width")
    depths = ("prior_depth",)
    healthy = {"bits_per_dim": (0.0, 30.0)}

    def __init__(self, config: HierarchicalConfig, spec: DataSpec):
        super().__init__(config, spec)
        sizes = _resolutions(spec)
        halvings = min(config.halvings, len(sizes) - 1)
        channels = [config.width * 2 ** min(i, halvings) for i in range(len(sizes))]
        self.encoder = nn.ModuleList(
            _Stage(before, after, 1 if i == 0 else 2, config.dropout, _ENCODER_DROPOUT + i)
            for i, (before, after) in enumerate(pairwise([spec.shape[0], *channels]))
        )
        self.sizes, channels = sizes[::-1], channels[::-1]  # coarse to fine from here on
        self.grids = self.sizes[: len(sizes) - halvings]
        self.decoder = nn.ModuleList(
            _Stage(before, after, 1, config.dropout, _DECODER_DROPOUT + i)
            for i, (before, after) in enumerate(pairwise([channels[0], *channels]))
        )
        coded = channels[: len(self.grids)]
        self.posterior = nn.ModuleList(nn.Conv2d(2 * width, 2 * config.digits, 1) for width in coded)
        self.from_code = nn.ModuleList(_Conv2d(config.digits, width, 1) for width in coded)
        self.top = ClassEmbedding(spec.classes, channels[0])
        self.to_pixels = nn.Conv2d(channels[-1], 2 * spec.shape[0], 3, padding=1)
        # What a pixel is before a code says otherwise.
        self.marginal = nn.Parameter(logistic.marginal(spec.counts, spec.shape, spec.levels))
        self.prior = _Prior(config, spec.classes, sum(height * width for height, width in self.grids))
        self.latent_dims = self.prior.tokens * config.digits

    def forward(self, batch: Batch, phase: str = "main") -> Losses:
        y = batch.sometimes_unlabelled(self.config.label_drop).y
        key = batch.key if self.training else None
        u = uniform(batch.key, (self.prior.tokens, self.config.digits), _POSTERIOR)
        code, log_q, pixels = self._draw(self._features(batch.x, key), y, u, key)
        tokens = self._tokens(code)
        reconstruction = logistic.log_prob(batch.x, *pixels, self.spec.levels).flatten(1).sum(1).mean()
        entropy = -(log_q.exp() * log_q).flatten(1).sum(1).mean()
        rate = -self.prior(tokens, y, key).mean() - entropy
        loss = rate - reconstruction
        metrics = {
            "bits_per_dim": loss.detach() / (self.spec.dims * math.log(2)),
            "reconstruction_nats": -reconstruction.detach(),
            "rate_nats": rate.detach(),
            "entropy_nats": entropy.detach(),
        }
        return Losses(loss, metrics | self._use(tokens))

    @torch.no_grad()
    def log_likelihood(self, batch: Batch, samples: int = 1) -> Tensor:
        """Compute the importance-weighted bound (Burda et al., Eq. 8); one sample makes it the plain one."""
        features = self._features(batch.x)
        log_weights = []
        for k in range(samples):
            u = uniform(batch.key, (self.prior.tokens, self.config.digits), stream=k)
            code, log_q, pixels = self._draw(features, batch.y, u)
            log_posterior = log_q.gather(3, code[..., None].long()).flatten(1).sum(1)
            log_prior = self.prior(self._tokens(code), batch.y)
            log_pixels = logistic.log_prob(batch.x, *pixels, self.spec.levels).flatten(1).sum(1)
            log_weights.append(log_pixels + log_prior - log_posterior)
        return torch.stack(log_weights).logsumexp(0) - math.log(samples)

    @torch.no_grad()
    def encode(self, x: Tensor, labels: Tensor) -> Tensor:
        """Find the codes that the encoder rounds to without noise, on the scale of [-1, 1]."""
        u = torch.full((len(x), self.prior.tokens, self.config.digits), 0.5, device=x.device)
        code, _, _ = self._draw(self._features(x), labels, u)
        return logistic.centers(code, self.config.base).flatten(1)

    @torch.no_grad()
    def decode(self, z: Tensor, labels: Tensor) -> Tensor:
        """Find the middle of p(x | c, y); codes may lie between the values that the encoder rounds to."""
        return logistic.quantize(self._pixels(z, labels)[0], self.spec.levels)

    def sampler(self) -> Sampler:
        return _TokenSampler(self)

    def _features(self, x: Tensor, key: Tensor | None = None) -> list[Tensor]:
        """Read images at each resolution, coarse to fine."""
        features = [logistic.centers(x, self.spec.levels)]
        for stage in self.encoder:
            features.append(stage(features[-1], key))
        return features[:0:-1]

    def _descend(self, y: Tensor, choose: _Choose, key: Tensor | None = None) -> _Pixels:
        """Go down to p(x | c, y): `choose(i, h)` gives codes of grid i, h is what coarser ones have made."""
        h = self.top(y)[:, :, None, None]
        for i, (size, stage) in enumerate(zip(self.sizes, self.decoder, strict=True)):
            h = F.interpolate(h, size)
            if i < len(self.grids):
                h = h + self.from_code[i](choose(i, h))
            h = stage(h, key)
        mean, log_scale = (self.to_pixels(h).float() + self.marginal).chunk(2, dim=1)
        return mean, log_scale.clamp(*_LOG_SCALE_RANGE)

    def _draw(
        self, features: list[Tensor], y: Tensor, u: Tensor, key: Tensor | None = None
    ) -> tuple[Tensor, Tensor, _Pixels]:
        """Turn uniforms (B, T, digits) into codes c ~ q(c | x, y) on the way down to p(x | c, y).

        Returns:
            Codes, uint8 (B, T, digits); log q of each value of each digit, (B, T, digits, base); pixels.
        """
        base, uniforms = self.config.base, self._maps(u)
        drawn: list[tuple[Tensor, Tensor, Tensor]] = []

        def choose(i: int, h: Tensor) -> Tensor:
            mean, log_scale = self.posterior[i](torch.cat([features[i], h], 1)).float().chunk(2, dim=1)
            # Bounded as in Mentzer et al., Section 3.1; the noise starts at a third of a digit's bin.
            mean, log_scale = mean.tanh(), (log_scale + math.log(0.6 / base)).clamp(*_LOG_SCALE_RANGE)
            value: Tensor = mean + log_scale.exp() * torch.logit(uniforms[i])
            code = logistic.quantize(value, base)
            drawn.append((code, mean, log_scale))
            # Straight through: rounded, but with the gradient of what was rounded.
            return value + (logistic.centers(code, base) - value).detach()

        pixels = self._descend(y, choose, key)
        code, mean, log_scale = (
            torch.cat([part.flatten(2).mT for part in maps], dim=1) for maps in zip(*drawn, strict=True)
        )
        values = torch.arange(base, device=u.device)
        return code, logistic.log_prob(values, mean[..., None], log_scale[..., None], base), pixels

    def _pixels(self, z: Tensor, y: Tensor) -> _Pixels:
        """Find p(x | c, y) of codes on the scale of [-1, 1], (B, T * digits)."""
        values = self._maps(z.view(len(z), self.prior.tokens, self.config.digits))
        return self._descend(y, lambda i, h: values[i])

    def _tokens(self, code: Tensor) -> Tensor:
        """Read digits (B, T, digits) as numbers: int64 (B, T)."""
        number = torch.zeros_like(code[..., 0], dtype=torch.int64)
        for digit in reversed(code.unbind(-1)):
            number = number * self.config.base + digit
        return number

    def _code(self, tokens: Tensor) -> Tensor:
        """Write numbers (B, T) as digits: int64 (B, T, digits)."""
        base = self.config.base
        return torch.stack([tokens // base**i % base for i in range(self.config.digits)], dim=-1)

    def _maps(self, rows: Tensor) -> list[Tensor]:
        """Lay (B, T, digits) out on the grids, coarse to fine: (B, digits, H, W) each."""
        parts = torch.split(rows, [height * width for height, width in self.grids], dim=1)
        return [part.mT.reshape(len(rows), -1, *size) for part, size in zip(parts, self.grids, strict=True)]

    def _use(self, tokens: Tensor) -> dict[str, Tensor]:
        """Share of all possible tokens that a batch has, and at each grid the perplexity of their use."""
        nothing = tokens.new_zeros(self.prior.vocabulary)
        places = [each.flatten() for each in self._maps(tokens[..., None])]
        # Not by bincount, for which a GPU waits.
        counts = [nothing.index_add(0, each, torch.ones_like(each)) for each in places]
        use = {"codes_used": (torch.stack(counts).sum(0) > 0).float().mean()}
        for (height, width), count in zip(self.grids, counts, strict=True):
            use[f"perplexity_{height}x{width}"] = torch.special.entr(count / count.sum()).sum().exp()
        return use


class _TokenSampler(Sampler):
    """Draws a token a step from the prior, with the keys and values of those before it kept."""

    options = {"guidance": GUIDANCE, "temperature": TEMPERATURE}

    def __init__(self, model: Hierarchical):
        self.model = model
        self.steps = model.prior.tokens

    def start(self, keys: Tensor, labels: Tensor, options: Mapping[str, Tensor]) -> State:
        prior = self.model.prior
        return {
            "key": keys,
            "label": torch.where(options["guidance"] == 0, UNLABELLED, labels),
            "guidance": options["guidance"],
            "temperature": options["temperature"],
            "tokens": torch.full((len(keys), prior.tokens), -1, device=keys.device),
            "cache": prior.body.empty_cache(len(keys), prior.tokens, keys.device),
            "unlabelled_cache": prior.body.empty_cache(len(keys), prior.tokens, keys.device),
        }

    def step(self, state: State, index: Tensor) -> State:
        logits = self._logits(state, index) / state["temperature"][:, None]
        u = uniform(state["key"], (), _TOKENS + index)[:, None]
        # The sum of all may be just below 1, and u above it.
        token = (logits.softmax(1).cumsum(1) < u).sum(1).clamp(max=self.model.prior.vocabulary - 1)
        state["tokens"][torch.arange(len(index), device=index.device), index] = token
        return state

    def finish(self, state: State) -> Tensor:
        """Draw the pixels; tokens that are yet to come count as the middle of all codes."""
        tokens = state["tokens"]
        values = logistic.centers(self.model._code(tokens), self.model.config.base)
        z = torch.where(tokens[..., None] < 0, 0.0, values).flatten(1)
        mean, log_scale = self.model._pixels(z, state["label"])
        spread = state["temperature"].log().view(-1, 1, 1, 1)
        u = uniform(state["key"], self.model.spec.shape, _PIXELS)
        return logistic.sample(u, mean, log_scale + spread, self.model.spec.levels)

    def _logits(self, state: State, index: Tensor) -> Tensor:
        """Log-odds of each sample's next token (B, vocabulary), guided where asked for."""
        prior, label = self.model.prior, state["label"]
        logits = prior.step(state["tokens"], label, state["cache"], index)
        guided = (state["guidance"] != 1) & (label != UNLABELLED)
        if guided.any():
            nobody = torch.full_like(label, UNLABELLED)
            unlabelled = prior.step(state["tokens"], nobody, state["unlabelled_cache"], index)
            # As Ho and Salimans, Eq. 6, with logits in the place of scores.
            towards = unlabelled + state["guidance"][:, None] * (logits - unlabelled)
            logits = torch.where(guided[:, None], towards, logits)
        return logits


class _Prior(nn.Module):
    """Autoregressive distribution of tokens (B, T) given a label."""

    def __init__(self, config: HierarchicalConfig, classes: int, tokens: int):
        super().__init__()
        self.tokens = tokens
        self.vocabulary = config.base**config.digits
        # The last embedding stands for "no token yet".
        self.token = nn.Embedding(self.vocabulary + 1, config.prior_width)
        self.position = nn.Parameter(0.02 * torch.randn(tokens, config.prior_width))
        self.label = ClassEmbedding(classes, config.prior_width)
        self.body = CausalTransformer(config.prior_width, config.prior_depth, _HEADS, config.dropout)
        self.head = nn.Linear(config.prior_width, self.vocabulary)

    def forward(self, tokens: Tensor, y: Tensor, key: Tensor | None = None) -> Tensor:
        """Compute log p(c | y), nats, (B,)."""
        before = F.pad(tokens[:, :-1], (1, 0), value=self.vocabulary)
        h = self.token(before) + self.position + self.label(y)[:, None]
        logits = self.head(self.body(h, key, _PRIOR_DROPOUT)).float()
        return -F.cross_entropy(logits.mT, tokens, reduction="none").sum(1)

    def step(self, tokens: Tensor, y: Tensor, cache: Tensor, index: Tensor) -> Tensor:
        """Compute the logits of each sequence's token number `index` (B,): (B, vocabulary)."""
        rows = torch.arange(len(index), device=index.device)
        before = torch.where(index > 0, tokens[rows, index - 1], self.vocabulary)
        before = before.clamp(min=0)  # a row that is nobody's may lack the token
        h = self.token(before) + self.position[index] + self.label(y)
        logits: Tensor = self.head(self.body.step(h, cache, index))
        return logits


class _Stage(Block):
    """A convolution to another resolution or width, and two that are added to it and at first add nothing."""

    def __init__(self, before: int, after: int, stride: int, dropout: float, stream: int):
        super().__init__()
        self.dropout, self.stream = dropout, stream
        self.change = _Conv2d(before, after, 3, stride=stride, padding=1)
        self.first = _Conv2d(after, after, 3, padding=1)
        self.second = _Conv2d(after, after, 3, padding=1)
        nn.init.zeros_(self.second.weight)

    def forward(self, h: Tensor, key: Tensor | None) -> Tensor:
        h = self.change(h)
        hidden = dropout(F.silu(self.first(F.silu(h))), self.dropout, key, self.stream)
        return F.silu(h + self.second(hidden))


class _Conv2d(nn.Conv2d):
    """A convolution. Of one place it is a product with its kernel's middle, and faster called so."""

    def forward(self, h: Tensor) -> Tensor:
        if h.shape[2:] != (1, 1):
            return super().forward(h)
        i = self.kernel_size[0] // 2
        return F.linear(h.flatten(1), self.weight[:, :, i, i], self.bias)[..., None, None]


def _resolutions(spec: DataSpec) -> list[tuple[int, int]]:
    """Height and width, halved until one place is left."""
    _, height, width = spec.shape
    return [(-(-height // 2**i), -(-width // 2**i)) for i in range((max(height, width) - 1).bit_length() + 1)]
