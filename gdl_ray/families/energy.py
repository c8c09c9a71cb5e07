"""Energy-based model: independent pixels, tilted by a network that learns from its own Markov chains.

    z = marginal(x + u):  levels x and uniform noise u made normal, dimension by dimension
    p(z, y) = N(z; 0, I) exp(l_y(z)) / Z,   p(z) = N(z; 0, I) exp(f(z)) / Z,   f = log sum_y exp l_y   (1)
    gradient of -log p(z) = E over p of [gradient of f] - gradient of f(z)                             (2)

The energy is |z|^2 / 2 - f(z). With f = 0 the pixels are independent and Z = 1: the network learns what
dependence there is, and annealed importance sampling from N(0, I) finds log Z. Chains that persist from step
to step stand for p in (2); they make Langevin moves with a Metropolis test. The logits also classify:
p(y | z) = softmax(l). Not here: chains that are restarted, clipped or cooled, which train a sampler but leave
the density wrong; spectral norms; training without samples.

References:
    Tieleman. Training Restricted Boltzmann Machines Using Approximations to the Likelihood Gradient. 2008.
        https://doi.org/10.1145/1390156.1390290
    Grathwohl et al. Your Classifier is Secretly an Energy Based Model and You Should Treat It Like One. 2019.
        https://arxiv.org/abs/1912.03263
    Cotter, Roberts, Stuart, White. MCMC Methods for Functions: Modifying Old Algorithms to Make Them Faster.
        2012. https://arxiv.org/abs/1202.0709
    Neal. Annealed Importance Sampling. 1998. https://arxiv.org/abs/physics/9803008
    Grosse, Ghahramani, Adams. Sandwiching the Marginal Likelihood Using Bidirectional Monte Carlo. 2015.
        https://arxiv.org/abs/1511.02543
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import NamedTuple

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
    LikelihoodKind,
    LogZ,
    Losses,
    Optimization,
    Option,
    Preset,
    Sampler,
    State,
    Unnormalized,
)
from gdl_ray.nn.marginal import MarginalGaussianization
from gdl_ray.random import fold, normal, uniform

__all__ = ["Energy", "EnergyConfig", "Point", "Tilt", "anneal", "langevin", "log_mean"]

# What the noise of an example, a chain or a sample is for; move i of a chain draws _MOVES + 2 i and the next.
_BITS, _START, _MOVES = 0, 1, 2

_RESTING = 0.25  # share of a sample's steps at the end that are taken at the model itself
_SPREAD = 10.0  # between the largest and the smallest step size


@dataclass(frozen=True, kw_only=True, slots=True)
class EnergyConfig:
    """Size of an energy's network, its chains, and how it meets labels."""

    width: int = 256
    """Units of each hidden layer."""
    depth: int = 2
    """Hidden layers."""
    halvings: int = 0
    """Convolutions before them that halve the resolution; with 0 the hidden layers see the pixels."""
    channels: int = 16
    """Channels after the first halving, doubled at each further one."""
    chains: int = 8
    """Chains for each example of a batch."""
    moves: int = 10
    """Moves of each chain in a training step."""
    move_size: float = 0.2
    """Largest time of a move at the model; the base forgets half of where it was in a time of 0.7."""
    temperatures: int = 300
    """Steps from the base to the model: of a sample, and of the estimate of log Z in validation."""
    class_weight: float = 0.3
    """Weight of the cross-entropy of p(y | z), nats per nat."""
    energy_decay: float = 1e-3
    """Weight of f squared, at data and chains: it keeps f from drifting by a constant."""
    label_drop: float = 0.1
    """Share of training examples that are shown without their label."""

    def __post_init__(self) -> None:
        for name in ("width", "depth", "channels", "chains", "moves", "temperatures"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not self.move_size > 0:
            raise ValueError(f"move_size={self.move_size} must be above 0")
        for name in ("halvings", "class_weight", "energy_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if not 0 <= self.label_drop <= 1:
            raise ValueError(f"label_drop={self.label_drop} must lie in [0, 1]")


def digits() -> Preset:
    """8x8 images: about a minute on one CPU core."""
    optimization = Optimization(
        learning_rate=6e-3, betas=(0.9, 0.99), weight_decay=0.2, ema_decay=0.995, precision="bfloat16"
    )
    return Preset(model=EnergyConfig(), optimization=optimization, steps=2500)


def mnist() -> Preset:
    """28x28 images: minutes on a GPU."""
    model = EnergyConfig(width=512, chains=2, move_size=0.4, temperatures=500)
    optimization = replace(
        digits().optimization, batch_size=128, learning_rate=6e-4, weight_decay=0.01, ema_decay=0.999
    )
    return Preset(model=model, optimization=optimization, steps=20_000)


def cifar10() -> Preset:
    """32x32 colour images: hours on a GPU. Stable on smaller images, untried on these."""
    model = EnergyConfig(width=512, halvings=3, channels=64, chains=2, move_size=0.1, temperatures=1000)
    return Preset(model=model, optimization=replace(mnist().optimization, learning_rate=5e-5), steps=100_000)


Tilt = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Maps z, (R, D), to f(z), (R, 1), and the gradient of each with respect to its z, (R, D)."""


class Point(NamedTuple):
    """Where R chains are."""

    z: Tensor
    """Positions, (R, D)."""
    tilt: Tensor
    """f(z), (R, 1)."""
    slope: Tensor
    """Gradient of f at z, (R, D)."""


def langevin(
    tilt: Tilt,
    at: Point,
    key: Tensor,
    number: Tensor | int,
    beta: Tensor | float,
    size: float,
    free: Tensor | float = 1.0,
    untested: Tensor | bool = False,
) -> tuple[Point, Tensor]:
    """Move chains so that N(z; 0, I) exp(beta f(z)) stays as it is (Cotter et al.: pCNL).

    A proposal follows dz = (beta grad f - z) dt + sqrt(2) dW for a time with grad f held: exact for the base.
    Times are drawn between `size` / sqrt(beta) and a tenth of it: some pass where f is steep, some go far.

    Args:
        tilt: f and its gradient.
        at: where the chains are.
        key: noise keys of the chains, int64 (R,).
        number: of the move, which has its own noise: an int, or int64 (R,).
        beta: a number, or (R, 1).
        size: largest time at beta = 1.
        free: 1 where z may move and 0 where it may not, (R, D).
        untested: which chains skip the Metropolis test, bool (R, 1): their law is a little off.

    Returns:
        Where the chains are now, and whether they moved, bool (R, 1).
    """
    u = uniform(key, (2,), _MOVES + 1 + 2 * number)
    # Not by `**`, whose last bit on a CPU depends on where in a tensor a value stands.
    share = torch.exp(-math.log(_SPREAD) * u[:, :1])
    keep = torch.exp(-size * torch.as_tensor(beta).rsqrt() * share)
    noise = normal(key, (at.z.shape[1],), _MOVES + 2 * number)
    forth = beta * free * at.slope
    z = at.z + free * ((1 - keep) * (forth - at.z) + (1 - keep.square()).sqrt() * noise)
    there = Point(z, *tilt(z))
    back = beta * free * there.slope
    # What the base's own proposal, which is reversible, contributes has cancelled.
    log_forth = (forth * (z - keep * at.z - (1 - keep) / 2 * forth)).sum(1, keepdim=True)
    log_back = (back * (at.z - keep * z - (1 - keep) / 2 * back)).sum(1, keepdim=True)
    log_odds = beta * (there.tilt - at.tilt) + (log_back - log_forth) / (1 + keep)
    moved = (u[:, 1:].log() < log_odds) | untested
    return Point(*(torch.where(moved, new, old) for new, old in zip(there, at, strict=True))), moved


def anneal(tilt: Tilt, z: Tensor, key: Tensor, betas: Sequence[float], size: float) -> tuple[Point, Tensor]:
    """Carry chains from the law of the first beta to that of the last by importance sampling.

    That of beta is N(z; 0, I) exp(beta f(z)) / Z. Betas rise from 0 to 1, or fall from 1 to 0; z, (R, D), are
    draws from the first law; key and size are those of `langevin`. Returns the ends and log-weights, (R,).
    """
    at = Point(z, *tilt(z))
    log_weight = torch.zeros_like(at.tilt)
    for number, (beta, following) in enumerate(pairwise(betas)):
        log_weight += (following - beta) * at.tilt
        at, _ = langevin(tilt, at, key, number, following, size)
    return at, log_weight.squeeze(1)


def log_mean(log_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Estimate log (last Z / first Z) from log-weights; also how many equal weights they are worth."""
    log_share = log_weight.log_softmax(0)
    return log_weight.logsumexp(0) - math.log(len(log_weight)), torch.exp(-(2 * log_share).logsumexp(0))


class Energy(Family, Unnormalized, Completion):
    """A tilt of independent pixels, whose chains are carried from step to step."""

    density = Density.APPROXIMATE
    likelihood_kind = LikelihoodKind.ESTIMATE
    presets = {"digits": digits, "mnist": mnist, "cifar10": cifar10}
    Config = EnergyConfig
    widths = ("width", "channels")
    depths = ("depth",)
    healthy = {"acceptance": (0.05, math.inf), "energy_gap": (-1.0, 1.0)}
    advice = "lower --optimization.learning-rate, or --model.move-size where the acceptance is low"

    log_z: Tensor
    log_class: Tensor
    effective_chains: Tensor

    def __init__(self, config: EnergyConfig, spec: DataSpec):
        super().__init__(config, spec)
        self.marginal = MarginalGaussianization(spec.counts, spec.dims, spec.levels)
        self.logits = _network(config, spec)
        # What `normalize` finds; a constant that is infinite has yet to be found.
        self.register_buffer("log_z", torch.tensor(math.inf))
        self.register_buffer("log_class", torch.zeros(max(1, spec.classes)))
        self.register_buffer("effective_chains", torch.tensor(0.0))

    def forward(self, batch: Batch, phase: str = "main") -> Losses:
        y = batch.sometimes_unlabelled(self.config.label_drop).y
        z, log_base = self._to_normal(batch.x, uniform(batch.key, (self.spec.dims,), _BITS))
        chains, acceptance = self._advance_chains(batch.key)
        logits, of_chains = self.logits(torch.cat([z, chains])).float().tensor_split([len(z)])
        f, f_chains = logits.logsumexp(1), of_chains.logsumexp(1)
        gap = f.mean() - f_chains.mean()
        entropy = F.cross_entropy(logits, y, ignore_index=UNLABELLED, reduction="sum") / len(z)
        decay = f.square().mean() + f_chains.square().mean()
        # The base trains the marginals; its value would hide the others'.
        base = log_base.mean()
        loss = base.detach() - base - gap + self.config.energy_decay * decay
        loss = loss + self.config.class_weight * entropy
        metrics = {
            "energy_data_nats": -f.mean(),
            "energy_chains_nats": -f_chains.mean(),
            "energy_gap": gap / self.spec.dims,
            "acceptance": acceptance,
            "marginal_nats": -base,
            "class_nats": entropy,
            "class_accuracy": (logits.argmax(1) == y).sum() / (y != UNLABELLED).sum().clamp(min=1),
        }
        return Losses(loss, {name: value.detach() for name, value in metrics.items()})

    @torch.no_grad()
    def normalize(self, chains: int = 360, temperatures: int | None = None) -> None:
        """Estimate log Z and log p(y) by annealing from the base, with the same noise at every call."""
        key = fold(0, torch.arange(chains, device=self.log_z.device))
        z = normal(key, (self.spec.dims,), _START)
        at, log_weight = anneal(self.tilt, z, key, self._betas(temperatures), self.config.move_size)
        log_z, effective = log_mean(log_weight)
        self.log_z.copy_(log_z)
        self.effective_chains.copy_(effective)
        log_share = log_weight.log_softmax(0)[:, None]
        self.log_class.copy_((log_share + self.logits(at.z).log_softmax(1)).logsumexp(0))

    @torch.no_grad()
    def reverse_log_z(self, z: Tensor, temperatures: int | None = None) -> tuple[float, float]:
        """Estimate log Z by annealing draws of the model, (R, D), to the base; also the weights' worth."""
        key = fold(1, torch.arange(len(z), device=z.device))
        falling = self._betas(temperatures)[::-1]
        log_ratio, effective = log_mean(anneal(self.tilt, z, key, falling, self.config.move_size)[1])
        return -log_ratio.item(), effective.item()

    def log_constant(self, x: Tensor) -> LogZ:
        bits = uniform(fold(2, torch.arange(len(x), device=x.device)), (self.spec.dims,), _BITS)
        reverse, _ = self.reverse_log_z(self._to_normal(x, bits)[0].detach())
        return LogZ(self.log_z.item(), reverse, self.effective_chains.item())

    @torch.no_grad()
    def log_likelihood(self, batch: Batch, samples: int = 1) -> Tensor:
        """Average p(x + u | y) over as many u as there are samples; without a constant, find it first."""
        if self.log_z.isinf():
            self.normalize()
        nats = []
        for k in range(samples):
            z, log_base = self._to_normal(batch.x, uniform(batch.key, (self.spec.dims,), k))
            logits = self.logits(z)
            labelled = (logits - self.log_class).gather(1, batch.y.clamp(min=0)[:, None])[:, 0]
            f = torch.where(batch.y == UNLABELLED, logits.logsumexp(1), labelled)
            nats.append(log_base + f - self.log_z)
        return torch.stack(nats).logsumexp(0) - math.log(samples)

    def tilt(self, z: Tensor, pull: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Compute f(z) + sum of pull_y log p(y | z), pull (R, classes), as a Tilt: no graph to parameters."""
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            logits = self.logits(z).float()
            f = logits.logsumexp(1, keepdim=True)
            if pull is not None:
                f = f + (pull * (logits - f)).sum(1, keepdim=True)
            (slope,) = torch.autograd.grad(f.sum(), z)
        return f.detach(), slope

    def sampler(self) -> Sampler:
        return _AnnealedSampler(self)

    def completion(self, x: Tensor, known: Tensor) -> Sampler:
        return _AnnealedSampler(self, x, known)

    def _to_normal(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Map levels to z, (B, D), and to the log-density of x + u under the base, (B,)."""
        z, log_slope = self.marginal(x.flatten(1), u)
        log_normal = -0.5 * (z.square() + math.log(2 * math.pi)).sum(1)
        return z, log_normal + log_slope

    @torch.no_grad()
    def _advance_chains(self, key: Tensor) -> tuple[Tensor, Tensor]:
        """Move each example's chains on; returns their positions, (B * chains, D), and the acceptance."""
        places, count, dims = len(key), self.config.chains, self.spec.dims
        key = fold(key[:, None], torch.arange(count, device=key.device)).flatten()
        z = self.carried.get("chains")
        z = normal(key, (dims,), _START) if z is None or len(z) != places else z.flatten(0, 1)
        at, acceptance = Point(z, *self.tilt(z)), torch.zeros((), device=key.device)
        for number in range(self.config.moves):
            at, made = langevin(self.tilt, at, key, number, 1.0, self.config.move_size)
            acceptance += made.float().mean() / self.config.moves
        if self.training:
            self.carried = {"chains": at.z.view(places, count, dims)}
        return at.z, acceptance

    def _betas(self, temperatures: int | None) -> list[float]:
        return torch.linspace(0, 1, (temperatures or self.config.temperatures) + 1).tolist()


_METROPOLIS = Option(default=1, least=0, most=1, meaning="0 tests no move: rougher samples.", whole=True)
_STEPS = Option(default=300, least=10, most=10_000, meaning="Moves from noise to a sample.", whole=True)


class _AnnealedSampler(Sampler):
    """Chains from the base to the model, a temperature a step; what is known of an example stays in place."""

    def __init__(self, model: Energy, x: Tensor | None = None, known: Tensor | None = None):
        self.model = model
        self.given = None if x is None or known is None else (torch.where(known, x, 0), known)
        self.steps = model.config.temperatures
        steps = replace(_STEPS, default=self.steps)
        self.options = {"guidance": GUIDANCE, "metropolis": _METROPOLIS, "steps": steps}

    def start(self, keys: Tensor, labels: Tensor, options: Mapping[str, Tensor]) -> State:
        z = normal(keys, (self.model.spec.dims,), _START)
        blank = z.new_zeros(len(z), *self.model.spec.shape, dtype=torch.uint8)
        x, known = self.given or (blank, blank.bool())
        free = known.flatten(1).logical_not().float()
        if self.given:
            u = uniform(keys, (self.model.spec.dims,), _BITS)
            z = torch.where(free == 1, z, self.model.marginal(x.flatten(1), u)[0])
        classes = F.one_hot(labels.clamp(min=0), max(1, self.model.spec.classes))
        weight = options["guidance"] * (labels != UNLABELLED)
        state = {"key": keys, "x": x, "known": known, "free": free, "pull": weight[:, None] * classes}
        tilt, slope = self.model.tilt(z, state["pull"])
        options = {name: options[name][:, None] for name in ("metropolis", "steps")}
        return {**state, **options, "z": z, "tilt": tilt, "slope": slope}

    def step(self, state: State, index: Tensor) -> State:
        beta = ((index[:, None] + 1) / ((1 - _RESTING) * state["steps"])).clamp(max=1)
        at, _ = langevin(
            partial(self.model.tilt, pull=state["pull"]),
            Point(*(state[name] for name in Point._fields)),
            state["key"],
            index,
            beta,
            self.model.config.move_size,
            free=state["free"],
            untested=state["metropolis"] == 0,
        )
        return {**state, **at._asdict()}

    def finish(self, state: State) -> Tensor:
        x = self.model.marginal.inverse(state["z"])[0].view(-1, *self.model.spec.shape).to(torch.uint8)
        return torch.where(state["known"], state["x"], x)


def _network(config: EnergyConfig, spec: DataSpec) -> nn.Sequential:
    """Positions (R, D) -> logits (R, classes), or (R, 1) without classes; smooth, as Langevin steps need."""
    channels, height, width = spec.shape
    layers: list[nn.Module] = [nn.Unflatten(1, spec.shape)]
    for i in range(config.halvings):
        layers += [nn.Conv2d(channels, config.channels * 2**i, 3, stride=2, padding=1), nn.SiLU()]
        channels, height, width = config.channels * 2**i, -(-height // 2), -(-width // 2)
    layers.append(nn.Flatten())
    features = channels * height * width
    for _ in range(config.depth):
        layers += [nn.Linear(features, config.width), nn.SiLU()]
        features = config.width
    return nn.Sequential(*layers, nn.Linear(features, max(1, spec.classes)))
