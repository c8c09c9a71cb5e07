"""The training loop: one for every family, free of ray, exact to resume.

    for each step: batch -> for each phase: forward, backward, clip, optimizer step -> average of the weights
    now and then:  metrics are reported; the average is validated, sampled and saved

What a step does is a function of (configuration, seed, step) and the tensors of the checkpoint before it: not
of the number of workers, beyond the order of additions, nor of how often training was interrupted.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from gdl_ray.data import Dataset, Split, evaluation_batches, training_batch
from gdl_ray.evaluate.likelihood import Nats, log_likelihood
from gdl_ray.family import Batch, Family, Likelihood, Optimization, State, Unnormalized
from gdl_ray.images import png_grid
from gdl_ray.random import fold
from gdl_ray.train import checkpoint
from gdl_ray.train.parallel import World, distribute, fast_matrix_products, require_grad

Clock = Callable[[], float]
"""Tells the time in seconds since any moment."""

SCORE = "validation/bits_per_dim"
"""The metric that tells the best checkpoint, lower is better; only families with a likelihood report it."""

_CLOCK_STEPS = 10  # how often workers agree on the time
_RATE_FLOOR = 0.02  # of the peak learning rate
_EVALUATION_BATCH = 256
_FEW_EXAMPLES = 1000  # that need all of a model's quick samples
_GRID_ROWS = 5
_GRID_COLUMNS = 10


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

    def __post_init__(self) -> None:
        for name in ("report_every", "checkpoint_every", "patience", "validation_examples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.checkpoint_every % self.report_every:
            raise ValueError(
                f"checkpoint_every={self.checkpoint_every} must be a multiple of "
                f"report_every={self.report_every}"
            )


@dataclass(frozen=True, slots=True)
class Report:
    """What the loop tells its reporter, on every worker at the same steps."""

    step: int
    metrics: Mapping[str, float]
    """Equal on all workers, but for what their clocks say."""
    write: Callable[[Path], None] | None
    """Writes a checkpoint into an empty folder, until the reporter returns; None if none is due. Any one
    worker's is that of all."""


class Reporter(Protocol):
    """Where reports go. It may block until all workers have reported."""

    def __call__(self, report: Report) -> None:
        """Take a report."""


class DivergenceError(Exception):
    """A metric is no longer finite or healthy; raised on all workers at the same step."""


def train(
    family: Family,
    dataset: Dataset,
    plan: Plan,
    report: Reporter,
    resume: Path | None = None,
    world: World | None = None,
    clock: Clock = time.perf_counter,
) -> None:
    """Train a model until its budget is spent or validation stops improving.

    Args:
        family: the model, untrained; every worker passes the same weights.
        dataset: what to train on.
        plan: how.
        report: told every `report_every` steps; it keeps the checkpoints that it is handed.
        resume: a checkpoint to go on from.
        world: this worker among its peers; alone by default.
        clock: what a budget of seconds is measured with.

    Raises:
        ValueError: if the workers do not divide the batch.
        DivergenceError: if a loss is no longer finite, or a metric no longer healthy.
        DamagedCheckpointError: if `resume` is.
    """
    world = world or World()
    batch_size = plan.optimization.batch_size
    if batch_size % world.size:
        raise ValueError(f"batch_size={batch_size} is not a multiple of the {world.size} workers")
    training = Training(family.to(world.device), plan, world, clock)
    if resume:
        training.restore(resume)
    split = dataset.splits["train"]
    while not training.ended:
        batch = training_batch(
            split,
            seed=plan.seed,
            step=training.step,
            batch_size=batch_size,
            rank=world.rank,
            world=world.size,
        )
        training.advance(batch.to(world.device))
        if training.step % plan.report_every == 0 or training.ended:
            metrics = training.read_metrics()  # on the clock: it waits for the steps to be done
            with training.clock.stopped():
                report(training.summarize(metrics, dataset))


class Training:
    """Everything that changes while a model trains: saved in a checkpoint, restored from it."""

    def __init__(self, family: Family, plan: Plan, world: World, clock: Clock = time.perf_counter):
        self.family = family
        self.average = copy.deepcopy(family).eval().requires_grad_(False)
        self.plan = plan
        self.world = world
        self.step = 0
        self.best = math.inf
        self.stale = 0  # validations since the best one
        self.ended = False
        self.clock = Stopwatch(clock)
        self._modules = {phase: distribute(family, phase, world) for phase in family.phases}
        self._optimizers = {phase: _optimizer(family, phase, plan.optimization) for phase in family.phases}
        self._sums: dict[str, Tensor] = {}  # of metrics since the last report
        self._first = 0  # step of the last report
        self._progress = 0.0

    def advance(self, batch: Batch) -> None:
        """Take one optimizer step per phase, and average the weights."""
        rate = learning_rate(self.plan.optimization, self._progress)
        self.family.train()
        for phase in self.family.phases:
            require_grad(self.family, phase)
            with fast_matrix_products(self.world.device, self.plan.optimization.precision):
                losses = self._modules[phase](batch, phase)
            losses.loss.backward()
            norm = self._update(phase, rate)
            # A gradient that is not finite spoils the weights one step before any loss tells.
            self._record(phase, {"loss": losses.loss.detach(), **losses.metrics, "gradient_norm": norm})
        self.step += 1
        self._update_average()
        self._update_progress()

    def _update(self, phase: str, rate: float) -> Tensor:
        """Take an optimizer step; returns the norm of the gradient."""
        optimizer = self._optimizers[phase]
        for group in optimizer.param_groups:
            group["lr"] = rate
        norm = nn.utils.clip_grad_norm_(self.family.phase_parameters(phase), self.plan.optimization.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm.detach()

    def _record(self, phase: str, metrics: Mapping[str, Tensor]) -> None:
        """Add to the sums without reading them: reading would wait for the device."""
        prefix = "train/" if len(self.family.phases) == 1 else f"train/{phase}/"
        for name, value in metrics.items():
            self._sums[prefix + name] = self._sums.get(prefix + name, 0) + value

    @torch.no_grad()
    def _update_average(self) -> None:
        # A young average must not remember the random weights it started from.
        decay = min(self.plan.optimization.ema_decay, self.step / (self.step + 10))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.family.parameters()), 1 - decay)
        for mine, trained in zip(self.average.buffers(), self.family.buffers(), strict=True):
            mine.copy_(trained)

    def _update_progress(self) -> None:
        budget = self.plan.budget
        if budget.steps:
            self._progress = self.step / budget.steps
        elif self.world.size == 1 or self.step % _CLOCK_STEPS == 0:
            self._progress = self.world.from_first(self.clock.seconds) / budget.seconds
        self.ended = self._progress >= 1

    def summarize(self, metrics: dict[str, float], dataset: Dataset) -> Report:
        """Report metrics; validate and offer a checkpoint when one is due."""
        due = self.ended or self.step % self.plan.checkpoint_every == 0
        if due:
            metrics |= self._validate(dataset)
        write = partial(self._write, self._gather_carried()) if due else None
        return Report(self.step, metrics, write)

    def read_metrics(self) -> dict[str, float]:
        """Average the metrics since the last reading, over steps and workers."""
        steps = self.step - self._first
        sums = self.world.sum(torch.stack([value.double() for value in self._sums.values()]))
        values = (sums / (steps * self.world.size)).tolist()
        metrics = dict(zip(self._sums, values, strict=True))
        for name, value in metrics.items():
            self._check_health(name, value)
        rate = steps * self.plan.optimization.batch_size / self.clock.lap()
        self._sums, self._first = {}, self.step
        return metrics | {"progress": self._progress, "seconds": self.clock.seconds, "examples_per_s": rate}

    def _check_health(self, name: str, value: float) -> None:
        healthy = self.family.healthy.get(name.rpartition("/")[2])
        least, most = healthy or (-math.inf, math.inf)
        if math.isfinite(value) and least <= value <= most:
            return
        usual = f" (healthy: {least:g} to {most:g})" if healthy else ""
        optimization = self.plan.optimization
        raise DivergenceError(
            f"{name} is {value:.4g}{usual} within steps {self._first + 1} to {self.step}: "
            f"training diverged; {self.family.advice} "
            f"(peak learning rate now {optimization.learning_rate:g}, clip norm {optimization.clip_norm:g})"
        )

    def _validate(self, dataset: Dataset) -> dict[str, float]:
        if not isinstance(self.average, Likelihood):
            return {}
        if isinstance(self.average, Unnormalized):
            self.average.normalize()
        examples = dataset.splits["validation"].first(self.plan.validation_examples)
        nats = split_nats(self.average, examples, self.world)
        score = -dataset.spec.bits_per_dim(nats.mean)
        self._check_health(SCORE, score)
        self.stale = 0 if score < self.best else self.stale + 1
        self.best = min(score, self.best)
        self.ended = self.ended or self.stale >= self.plan.patience
        return {SCORE: score}

    def _gather_carried(self) -> State:
        return {name: self.world.gather(rows) for name, rows in sorted(self.family.carried.items())}

    def _write(self, carried: State, directory: Path) -> None:
        tensors = {f"weights/{name}": tensor for name, tensor in self.family.state_dict().items()}
        tensors |= {f"carried/{name}": rows for name, rows in carried.items()}
        for phase, optimizer in self._optimizers.items():
            for index, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer/{phase}/{index}/{name}": value for name, value in state.items()}
        counters = {
            "step": self.step,
            "seconds": self.clock.seconds,
            "progress": self._progress,
            "best": self.best if math.isfinite(self.best) else None,
            "stale": self.stale,
            "ended": self.ended,
        }
        checkpoint.save(directory, self.average, sample_grid(self.average), tensors, counters)

    def restore(self, directory: Path) -> None:
        """Go on from a checkpoint as if there had been no interruption."""
        average, tensors, counters = checkpoint.load_resume(directory)
        self.average.load_state_dict(average)
        self.family.load_state_dict(_below("weights/", tensors))
        self.family.carried = {
            name: self._share(name, rows) for name, rows in _below("carried/", tensors).items()
        }
        for phase, optimizer in self._optimizers.items():
            state: dict[int, dict[str, Tensor]] = {}
            for path, value in _below(f"optimizer/{phase}/", tensors).items():
                index, name = path.split("/")
                state.setdefault(int(index), {})[name] = value
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        self.step = self._first = counters["step"]
        self.best = math.inf if counters["best"] is None else counters["best"]
        self.stale = counters["stale"]
        self.ended, self._progress = counters["ended"], counters["progress"]
        self.clock = Stopwatch(self.clock.now, counters["seconds"])

    def _share(self, name: str, rows: Tensor) -> Tensor:
        """Take this worker's rows of what was carried by all."""
        batch_size = self.plan.optimization.batch_size
        if len(rows) != batch_size:
            raise ValueError(
                f"batch_size={batch_size}: the checkpoint carries {name} for {len(rows)} examples; "
                f"resume with batch_size={len(rows)}"
            )
        return self.world.share(rows).to(self.world.device)


def learning_rate(optimization: Optimization, progress: float) -> float:
    """Compute the learning rate at a share of the budget in [0, 1]: linear warm-up, then a cosine."""
    rising = progress / optimization.warmup if optimization.warmup else 1.0
    falling = (1 + math.cos(math.pi * min(progress, 1.0))) / 2
    return optimization.learning_rate * max(min(rising, falling), _RATE_FLOOR)


def split_nats(model: Likelihood, split: Split, world: World) -> Nats:
    """Measure log p(x) over a split, each worker a share of it.

    What a small split averages over draws, a large one averages over examples.
    """
    samples = max(1, model.quick_samples * _FEW_EXAMPLES // max(len(split), _FEW_EXAMPLES))
    batches = evaluation_batches(split, batch_size=_EVALUATION_BATCH, rank=world.rank, world=world.size)
    unlabelled = (batch.unlabelled().to(world.device) for batch in batches)
    mine = log_likelihood(model, unlabelled, samples)
    sums = torch.tensor([mine.total, mine.squares, mine.examples], dtype=torch.float64, device=world.device)
    return Nats(*world.sum(sums).tolist())


def sample_grid(model: Family) -> bytes:
    """Picture samples, a class per column, with the same keys at every step of every run."""
    count = _GRID_ROWS * _GRID_COLUMNS
    device = next(model.parameters()).device
    keys = fold(0, torch.arange(count, device=device))
    classes = model.spec.classes
    labels = torch.arange(count, device=device) % _GRID_COLUMNS % classes if classes else None
    return png_grid(model.sample(keys, labels).cpu(), model.spec.levels, columns=_GRID_COLUMNS)


def _optimizer(family: Family, phase: str, optimization: Optimization) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        list(family.phase_parameters(phase)),
        lr=optimization.learning_rate,
        betas=optimization.betas,
        weight_decay=optimization.weight_decay,
        fused=True,
    )


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


class Stopwatch:
    """Seconds spent on steps."""

    def __init__(self, now: Clock = time.perf_counter, seconds: float = 0.0):
        self.now = now
        self._counted = seconds
        self._since: float | None = now()
        self._lap = seconds

    @property
    def seconds(self) -> float:
        """Seconds counted so far."""
        return self._counted + (0.0 if self._since is None else self.now() - self._since)

    def lap(self) -> float:
        """Seconds counted since the last lap."""
        now = self.seconds
        lap, self._lap = now - self._lap, now
        return lap

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Count nothing meanwhile."""
        self._counted, self._since = self.seconds, None
        try:
            yield
        finally:
            self._since = self.now()
