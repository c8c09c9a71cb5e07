"""The contract: what a family of generative models is, and what it may be able to do.

A family is a `torch.nn.Module` whose `forward` is its training loss and whose `sampler` is a step machine.
What only some families can do (report a likelihood, encode to latents) is a class that they also inherit; ask
with `isinstance`.

Letters, everywhere: B batch, C/H/W channels, height, width, T tokens, D latent dimensions.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from math import log, prod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

UNLABELLED = -1
"""The label of an example or a sample without one."""


class Density(StrEnum):
    """How a family treats the density p(x)."""

    TRACTABLE = "tractable"
    APPROXIMATE = "approximate"
    IMPLICIT = "implicit"


class LikelihoodKind(StrEnum):
    """What the number that a family reports as log p(x) is."""

    EXACT = "exact"
    LOWER_BOUND = "lower_bound"
    ESTIMATE = "estimate"


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSpec:
    """What a model must know of its data."""

    name: str
    """Name of the dataset, a part of the names of its experiment and models."""
    kind: Literal["image", "tokens"]
    """`image`: ordered levels on a grid. `tokens`: unordered symbols in a row."""
    shape: tuple[int, ...]
    """Shape of one example: (C, H, W) or (T,)."""
    levels: int
    """Values lie in [0, levels - 1]."""
    classes: int
    """Labels lie in [0, classes - 1]; 0 where the data have none."""
    counts: Tensor | None = field(default=None, compare=False, repr=False)
    """How often each level occurs at each dimension of the training split: int64, shape (dims, levels).
    Families that start from the marginals copy them into their weights, so a saved model goes without."""

    @property
    def dims(self) -> int:
        """Number of values in one example."""
        return prod(self.shape)

    def bits_per_dim(self, nats: float) -> float:
        """Convert nats per example to bits per dimension."""
        return nats / (self.dims * log(2))

    def to_json(self) -> dict[str, Any]:
        """Every field but the counts, as JSON values."""
        return {
            "name": self.name,
            "kind": self.kind,
            "shape": list(self.shape),
            "levels": self.levels,
            "classes": self.classes,
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any], counts: Tensor | None = None) -> "DataSpec":
        """Rebuild a spec from `to_json`."""
        return cls(**{**fields, "shape": tuple(fields["shape"])}, counts=counts)


@dataclass(frozen=True, slots=True)
class Batch:
    """Examples of one training or evaluation step."""

    x: Tensor
    """Images, uint8 (B, C, H, W), or tokens, int64 (B, T), in [0, levels - 1]."""
    y: Tensor
    """Labels, int64 (B,); UNLABELLED where there is none."""
    key: Tensor
    """Noise keys, int64 (B,): all randomness of an example comes from its own."""

    def to(self, device: torch.device) -> "Batch":
        """Move to a device."""
        return Batch(self.x.to(device), self.y.to(device), self.key.to(device))

    def unlabelled(self) -> "Batch":
        """Leave the labels out."""
        return replace(self, y=torch.full_like(self.y, UNLABELLED))


@dataclass(frozen=True, slots=True)
class Losses:
    """What one phase of a step returns."""

    loss: Tensor
    """Mean over the batch, a scalar: what the phase minimises."""
    metrics: dict[str, Tensor]
    """Means over the batch worth watching, detached scalars."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Optimization:
    """How the loop trains a family: AdamW, warm-up and cosine schedule, and an average of the weights."""

    batch_size: int = 64
    """Examples per step, over all workers."""
    learning_rate: float = 1e-3
    """Peak learning rate; the cosine ends at 2 % of it."""
    warmup: float = 0.02
    """Share of the budget in which the learning rate rises linearly."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of Adam's two moment averages, per step."""
    weight_decay: float = 0.01
    """Decoupled weight decay, as a multiple of the learning rate."""
    clip_norm: float = 1.0
    """Largest L2 norm of a phase's gradient."""
    ema_decay: float = 0.99
    """Decay of the weight average that is evaluated and served, per step; warmed up over the first steps."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "learning_rate", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")
        shares = {"warmup": self.warmup, "ema_decay": self.ema_decay}
        for name, value in {**shares, "betas[0]": self.betas[0], "betas[1]": self.betas[1]}.items():
            if not 0 <= value < 1:
                raise ValueError(f"{name}={value} must lie in [0, 1)")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay={self.weight_decay} must not be negative")


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """A full configuration of a family for one dataset."""

    model: Any
    """The family's Config."""
    optimization: Optimization
    steps: int
    """Optimizer steps that a run takes if it is given no other budget."""


State = dict[str, Tensor]
"""Samples under way: every tensor has the batch dimension first."""


class Sampler(ABC):
    """Generation as a step machine.

    Each sample carries its own step number, so samples may join and leave the batch between any two steps. A
    sample depends on its key, its label and its step alone, never on its neighbours in the batch.
    """

    steps: int
    """How many calls of `step` one sample takes."""

    @abstractmethod
    def start(self, keys: Tensor, labels: Tensor) -> State:
        """Begin samples.

        Args:
            keys: noise keys, int64 (B,).
            labels: classes, int64 (B,); UNLABELLED asks for any.
        """

    @abstractmethod
    def step(self, state: State, index: Tensor) -> State:
        """Advance each sample by its step number `index`, int64 (B,), in [0, steps - 1]."""

    @abstractmethod
    def finish(self, state: State) -> Tensor:
        """Read off the samples: uint8 (B, C, H, W) or int64 (B, T)."""


class Family(nn.Module, ABC):
    """A family of generative models of data x with optional labels y."""

    density: ClassVar[Density]
    phases: ClassVar[tuple[str, ...]] = ("main",)
    """Losses that one training step minimises in turn, each over its own parameters."""
    presets: ClassVar[Mapping[str, Callable[[], Preset]]]
    """Full configurations by dataset name."""
    Config: ClassVar[type]

    config: Any
    spec: DataSpec

    @abstractmethod
    def forward(self, batch: Batch, phase: str = "main") -> Losses:
        """Compute the loss of one phase on a batch, with a graph to its parameters."""

    @abstractmethod
    def sampler(self) -> Sampler:
        """Make the step machine that draws samples from this model."""

    def phase_parameters(self, phase: str) -> Iterator[nn.Parameter]:
        """Yield the parameters that a phase trains; each belongs to exactly one phase."""
        return self.parameters()

    @torch.no_grad()
    def sample(self, keys: Tensor, labels: Tensor | None = None) -> Tensor:
        """Draw one sample per key.

        Args:
            keys: noise keys, int64 (B,).
            labels: classes, int64 (B,); all UNLABELLED if None.

        Returns:
            uint8 (B, C, H, W) or int64 (B, T).
        """
        sampler = self.sampler()
        state = sampler.start(keys, torch.full_like(keys, UNLABELLED) if labels is None else labels)
        for i in range(sampler.steps):
            state = sampler.step(state, torch.full_like(keys, i))
        return sampler.finish(state)


class Likelihood(ABC):
    """A family that reports log p(x)."""

    likelihood_kind: ClassVar[LikelihoodKind]

    @abstractmethod
    def log_likelihood(self, batch: Batch, samples: int = 1) -> Tensor:
        """Compute log p(x | y), or log p(x) for unlabelled examples; without gradient.

        Args:
            batch: examples; their keys decide the noise.
            samples: Monte-Carlo samples an example; more tighten a bound or an estimate.

        Returns:
            Nats, float (B,).
        """


class Latent(ABC):
    """A family with a latent space."""

    @abstractmethod
    def encode(self, x: Tensor, labels: Tensor) -> Tensor:
        """Map data, as in Batch, to latents: float (B, D)."""

    @abstractmethod
    def decode(self, z: Tensor, labels: Tensor) -> Tensor:
        """Map latents, float (B, D), to the data they stand for, as in Batch."""
