"""What a run of the training loop is to do: for how long, how often it reports, at which learning rate."""

import math
from dataclasses import dataclass

from gdl_ray.family import Optimization

_RATE_FLOOR = 0.02  # of the peak learning rate


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """When training ends; exactly one of the two is above 0."""

    steps: int = 0
    """Optimizer steps."""
    seconds: float = 0.0
    """Seconds spent on steps: validation, checkpoints and interruptions do not count."""

    def __post_init__(self) -> None:
        if min(self.steps, self.seconds) < 0 or (self.steps > 0) == (self.seconds > 0):
            raise ValueError(f"{self}: exactly one of steps and seconds must be above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One run of the loop."""

    optimization: Optimization
    budget: Budget
    seed: int = 0
    """Decides the order of examples and all noise."""
    report_every: int = 50
    """Steps between reports of metrics."""
    checkpoint_every: int = 250
    """Steps between checkpoints, each with a validation and samples; a multiple of report_every."""
    patience: int = 10
    """Training ends after so many validations in a row without a better one."""
    validation_examples: int = 1000
    """Most examples that a validation reads: the first of the split, whose order is random."""
    micro_batch: int = 0
    """Most examples that a worker computes at once, to save memory; 0 for its whole share of a batch."""
    compile: bool = False
    """Compile each phase, where that works: minutes at first, and then faster steps."""

    def __post_init__(self) -> None:
        for name in ("report_every", "checkpoint_every", "patience", "validation_examples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.micro_batch < 0:
            raise ValueError(f"micro_batch={self.micro_batch} must not be negative")
        if self.checkpoint_every % self.report_every:
            raise ValueError(
                f"checkpoint_every={self.checkpoint_every} must be a multiple of "
                f"report_every={self.report_every}"
            )


def learning_rate(optimization: Optimization, progress: float) -> float:
    """Compute the learning rate at a share of the budget in [0, 1]: linear warm-up, then a cosine."""
    rising = progress / optimization.warmup if optimization.warmup else 1.0
    falling = (1 + math.cos(math.pi * min(progress, 1.0))) / 2
    return optimization.learning_rate * max(min(rising, falling), _RATE_FLOOR)
