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
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from gdl_ray.random import uniform

UNLABELLED = -1
"""The label of an example or a sample without one."""

_LABEL_STREAM = 2**31 - 1  # of an example's noise: whether it shows its label


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

    def sometimes_unlabelled(self, share: float) -> "Batch":
        """Leave a share of the labels out, so that one model learns p(x | y) and p(x)."""
        keep = uniform(self.key, (), _LABEL_STREAM) >= share
        return replace(self, y=torch.where(keep, self.y, UNLABELLED))


@dataclass(frozen=True, slots=True)
class Losses:
    """What one phase of a step returns."""

    loss: Tensor
    """Mean over the batch, a scalar: what the phase minimises."""
    metrics: dict[str, Tensor]
    """Means over the batch worth watching, detached scalars; the same names at every step."""


Precision = Literal["float32", "bfloat16"]


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
    precision: Precision = "float32"
    """Of matrix products in training, where the device computes them fast; weights stay float32."""
    recompute: bool = False
    """Compute hidden values again in the backward pass instead of keeping them: less memory, more time."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "learning_rate", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")
        if self.precision not in get_args(Precision):
            raise ValueError(f"precision={self.precision!r} must be one of {', '.join(get_args(Precision))}")
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
"""Examples under way: every tensor has the batch dimension first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """A number that whoever asks for samples may set, each sample's its own."""

    default: float
    least: float
    most: float
    meaning: str
    whole: bool = False
    """Only integers."""

    def check(self, name: str, value: float) -> None:
        """Refuse a value that is out of range.

        Raises:
            ValueError: naming the option, its value and the range.
        """
        kind = "an integer" if self.whole else "a number"
        if not self.least <= value <= self.most or (self.whole and value != int(value)):
            raise ValueError(f"{name}={value:g} must be {kind} from {self.least:g} to {self.most:g}")


GUIDANCE = Option(
    default=1,
    least=0,
    most=20,
    meaning="Weight of the label: 1 samples p(x | y), 0 leaves it out, more exaggerates it.",
)
TEMPERATURE = Option(
    default=1, least=0.01, most=2, meaning="Spread of each draw: below 1 the likelier values gain."
)


class Sampler(ABC):
    """Generation as a step machine.

    Each sample carries its own step number, so samples may join and leave the batch between any two steps. A
    sample depends on its key, its label, its options and its step alone, never on its neighbours.
    """

    steps: int
    """How many calls of `step` one sample takes, unless its option `steps` says otherwise."""
    options: Mapping[str, Option] = {}
    """What may be set for each sample, by name."""
    granule: int = 8
    """Rows are computed in multiples of it: with fewer, other kernels give a sample other last bits."""

    @abstractmethod
    def start(self, keys: Tensor, labels: Tensor, options: Mapping[str, Tensor]) -> State:
        """Begin samples.

        What is read of the options later on, the state holds under their own names: rows that are nobody's
        are given the defaults there, which cost nothing. What a completion keeps is read here alone.

        Args:
            keys: noise keys, int64 (B,).
            labels: classes, int64 (B,); UNLABELLED asks for any.
            options: a value of every one of `self.options` for each sample, float32 (B,).

        Returns:
            The tensors that `step` returns, of the same names, types and shapes.
        """

    @abstractmethod
    def step(self, state: State, index: Tensor) -> State:
        """Advance each sample by its step number `index`, int64 (B,), from 0; may overwrite `state`.

        What is overwritten in its place, the state returned holds as the same tensor. A row that is nobody's
        is given the number of one in use, perhaps beyond its own last; nobody reads what becomes of it.
        """

    @abstractmethod
    def finish(self, state: State) -> Tensor:
        """Read off the samples: uint8 (B, C, H, W) or int64 (B, T). Of unfinished ones, a preview.

        The state stays as it is. It is to be asked for tensors by name: others may be large.
        """

    def padded(self, rows: Tensor, total: int) -> Tensor:
        """Repeat some of all rows, numbers int64 (n,), until their count is one that keeps a sample's bits.

        That is a multiple of `granule` on a CPU. On an accelerator it is `total`, the count of all rows.
        """
        count = -(-len(rows) // self.granule) * self.granule if rows.device.type == "cpu" else total
        return rows[torch.arange(count, device=rows.device) % len(rows)]

    def settle(self, asked: Mapping[str, float]) -> dict[str, float]:
        """Complete options by their defaults.

        Raises:
            ValueError: naming an option that this family has not, or a value that is out of range.
        """
        for name, value in asked.items():
            if name not in self.options:
                known = ", ".join(self.options) or "none"
                raise ValueError(f"{name}={value:g} is no option of this model; it has: {known}")
            self.options[name].check(name, value)
        return {name: float(asked.get(name, option.default)) for name, option in self.options.items()}

    def steps_of(self, options: Mapping[str, float]) -> int:
        """Count the calls of `step` that a sample with these options takes."""
        return int(options.get("steps", self.steps))


@torch.no_grad()
def draw(
    sampler: Sampler, keys: Tensor, labels: Tensor | None = None, asked: Mapping[str, float] | None = None
) -> Tensor:
    """Run a sampler to its end.

    Args:
        sampler: of a model in evaluation mode.
        keys: noise keys, int64 (B,), on the model's device.
        labels: classes, int64 (B,); all UNLABELLED if None.
        asked: options other than their defaults, the same for all samples.

    Returns:
        uint8 (B, C, H, W) or int64 (B, T).

    Raises:
        ValueError: an option is unknown or out of range.
    """
    options = sampler.settle(asked or {})
    columns = {name: torch.full(keys.shape, value, device=keys.device) for name, value in options.items()}
    labels = torch.full_like(keys, UNLABELLED) if labels is None else labels.clone()
    state = sampler.start(keys.clone(), labels, columns)
    for i in range(sampler.steps_of(options)):
        state = sampler.step(state, torch.full_like(keys, i))
    return sampler.finish(state)


class Family(nn.Module, ABC):
    """A family of generative models of data x with optional labels y."""

    density: ClassVar[Density]
    phases: ClassVar[tuple[str, ...]] = ("main",)
    """Losses that one training step minimises in turn, each over its own parameters."""
    kinds: ClassVar[tuple[str, ...]] = ("image",)
    """Kinds of data that it models, as in DataSpec."""
    presets: ClassVar[Mapping[str, Callable[[], Preset]]]
    """Full configurations by dataset name."""
    Config: ClassVar[type]
    widths: ClassVar[tuple[str, ...]]
    """Fields of its Config that a larger size multiplies, in multiples of 8."""
    depths: ClassVar[tuple[str, ...]] = ()
    """Fields of its Config that a larger size multiplies."""
    healthy: ClassVar[Mapping[str, tuple[float, float]]] = {}
    """Ranges that metrics keep to, in every phase, unless training diverges; by their name in `forward`."""
    advice: ClassVar[str] = "lower --optimization.learning-rate or --optimization.clip-norm"
    """What to try when it does."""

    config: Any
    spec: DataSpec

    def __init__(self, config: Any, spec: DataSpec):
        super().__init__()
        if spec.kind not in self.kinds:
            raise ValueError(
                f"{type(self).__name__} models data of the kind {' or '.join(self.kinds)}; "
                f"{spec.name} is {spec.kind}: choose another family or other data"
            )
        self.config = config
        self.spec = spec
        self.latent_dims = spec.dims
        """Number of values in a latent, D, where it has latents: those of the data, unless it says other."""
        self.carried: State = {}
        """What training takes from step to step beside weights: a row for each example of a worker's batch,
        continued by the example in the same place of the next batch. Empty until the first step."""

    @abstractmethod
    def forward(self, batch: Batch, phase: str = "main") -> Losses:
        """Compute the loss of one phase on a batch, with a graph to its parameters."""

    @abstractmethod
    def sampler(self) -> Sampler:
        """Make the step machine that draws samples from this model."""

    def phase_parameters(self, phase: str) -> Iterator[nn.Parameter]:
        """Yield the parameters that a phase trains; each belongs to exactly one phase."""
        return self.parameters()

    def sample(self, keys: Tensor, labels: Tensor | None = None, **options: float) -> Tensor:
        """Draw one sample per key; arguments and result as in `draw`."""
        return draw(self.sampler(), keys, labels, options)


class Likelihood(ABC):
    """A family that reports log p(x)."""

    likelihood_kind: ClassVar[LikelihoodKind]
    quick_samples: ClassVar[int] = 1
    """Monte-Carlo samples an example that make the mean over a thousand good enough to compare models by."""
    tight_samples: ClassVar[int] = 64
    """Monte-Carlo samples an example that a final figure deserves; more would tighten it little."""

    @abstractmethod
    def log_likelihood(self, batch: Batch, samples: int = 1) -> Tensor:
        """Compute log p(x | y), or log p(x) for unlabelled examples; without gradient.

        Args:
            batch: examples; their keys decide the noise.
            samples: Monte-Carlo samples an example; more tighten a bound or an estimate.

        Returns:
            Nats, float (B,).
        """


@dataclass(frozen=True, slots=True)
class LogZ:
    """Estimates of the log of a normalizing constant, in nats; the truth lies most likely between them."""

    forward: float
    """By annealing from the base to the model: errs downwards."""
    reverse: float
    """By annealing draws of the model to the base: errs upwards, as far as they are the model's."""
    effective: float
    """How many equal weights the forward estimate is worth."""


class Unnormalized(Likelihood):
    """A family whose log p(x) needs a constant that is estimated, once for given weights."""

    @abstractmethod
    def normalize(self) -> None:
        """Estimate the constant and keep it in a buffer, which is saved with the weights."""

    @abstractmethod
    def log_constant(self, x: Tensor) -> LogZ:
        """Estimate the constant that likelihoods are given with from both sides.

        Args:
            x: draws of the model without labels, as in Batch.
        """


class Decoder(ABC):
    """A family that turns latents into data."""

    latent_dims: int
    """Number of values in a latent: D."""

    @abstractmethod
    def decode(self, z: Tensor, labels: Tensor) -> Tensor:
        """Map latents, float (B, D), to the data they stand for, as in Batch."""


class Latent(Decoder):
    """A family with a latent space that data map to."""

    @abstractmethod
    def encode(self, x: Tensor, labels: Tensor) -> Tensor:
        """Map data, as in Batch, to latents: float (B, D)."""


class Completion(ABC):
    """A family that fills in what is missing of an example."""

    @abstractmethod
    def completion(self, x: Tensor, known: Tensor) -> Sampler:
        """Make the step machine that draws what is unknown, and keeps what is known.

        Args:
            x: examples as in Batch; their unknown values are not read.
            known: bool, the shape of x.

        Returns:
            A sampler that is started with as many keys as there are examples.
        """

    def complete(
        self, x: Tensor, known: Tensor, keys: Tensor, labels: Tensor | None = None, **options: float
    ) -> Tensor:
        """Draw one completion per example; further arguments and result as in `draw`."""
        return draw(self.completion(x, known), keys, labels, options)
