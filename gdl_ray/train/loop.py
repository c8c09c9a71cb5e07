"""The training loop: one for every family, free of ray, exact to resume.

    for each step: batch -> for each phase: forward, backward, clip, optimizer step -> average of the weights
    now and then:  metrics are reported; the average is validated, sampled and saved

What a step does is a function of (configuration, seed, step) and the tensors of the checkpoint before it: not
of the number of workers, beyond the order of additions, nor of how often training was interrupted.
"""

import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gdl_ray.data import Dataset, Feed
from gdl_ray.family import Batch, Family, Likelihood, Optimization, Unnormalized
from gdl_ray.nn.recompute import recompute_blocks
from gdl_ray.train import checkpoint
from gdl_ray.train.checkpoint import Contents
from gdl_ray.train.clock import Clock, Stopwatch
from gdl_ray.train.micro import fitting, micro_batches
from gdl_ray.train.parallel import World, distribute, fast_matrix_products, require_grad, sync_gradients
from gdl_ray.train.plan import Plan, learning_rate
from gdl_ray.train.snapshot import Memory, Snapshot
from gdl_ray.train.validation import SCORE, sample_grid, validation_score

_AGREE_STEPS = 10  # within which workers agree on the time, and on whether to stop
_AGREE_S = 1.0  # within which they do, where steps are slow


@dataclass(frozen=True, slots=True)
class Report:
    """What the loop tells its reporter, on every worker at the same steps."""

    step: int
    metrics: Mapping[str, float]
    """Equal on all workers, but for what their clocks say; empty if training is interrupted between two."""
    snapshot: Snapshot | None = None
    """A checkpoint to keep, on the first worker, if one is due: whoever takes it releases it."""


class Reporter(Protocol):
    """Where reports go."""

    def __call__(self, report: Report) -> None:
        """Take a report."""


class Judge(Protocol):
    """Validates checkpoints elsewhere, so that the loop need not; asked on the first worker."""

    def collect(self) -> tuple[int, float]:
        """Wait for the score of the checkpoint before; returns its step and bits/dim, step 0 for none."""


class DivergenceError(Exception):
    """A metric is no longer finite or healthy; raised on all workers at the same step."""


def train(
    family: Family,
    dataset: Dataset,
    plan: Plan,
    report: Reporter,
    resume: Contents | None = None,
    world: World | None = None,
    clock: Clock = time.perf_counter,
    interrupted: Callable[[], bool] = lambda: False,
    judge: Judge | None = None,
) -> bool:
    """Train a model until its budget is spent, validation stops improving, or it is interrupted.

    Args:
        family: the model, untrained; every worker passes the same weights.
        dataset: what to train on.
        plan: how.
        report: told every `report_every` steps; it keeps the checkpoints that it is handed.
        resume: a checkpoint to go on from.
        world: this worker among its peers; alone by default.
        clock: what a budget of seconds is measured with.
        interrupted: asked on the first worker, at least every ten steps, whether to stop with a checkpoint.
        judge: validates checkpoints, each until the next one is due; the loop does by default.

    Returns:
        Whether training has ended; False if it was interrupted, to go on from its last checkpoint.

    Raises:
        ValueError: if there are more workers than examples in a batch.
        DivergenceError: if a loss is no longer finite, or a metric no longer healthy.
    """
    world = world or World()
    batch_size = plan.optimization.batch_size
    if batch_size < world.size:
        raise ValueError(f"batch_size={batch_size} has no example for some of the {world.size} workers")
    training = Training(family.to(world.device), plan, world, clock)
    if resume:
        training.restore(resume)
        resume = None  # as large as the model and its optimizer
    feed = Feed(
        dataset.splits["train"],
        seed=plan.seed,
        batch_size=batch_size,
        device=world.device,
        rank=world.rank,
        world=world.size,
    )
    while not training.ended:
        training.advance(feed.batch(training.step))
        stop = training.agree(interrupted())
        if training.is_report_due or stop:
            metrics = training.read_metrics() if training.is_report_due else {}  # on the clock: it waits
            with training.clock.stopped():
                if judge and training.is_checkpoint_due:
                    training.heed(judge, report)
                report(training.summarize(metrics, None if judge else dataset, stop))
        if stop:
            break
    if judge and training.ended:
        training.heed(judge, report)
    return training.ended


class Training:
    """Everything that changes while a model trains: saved in a checkpoint, restored from it."""

    def __init__(self, family: Family, plan: Plan, world: World, clock: Clock = time.perf_counter):
        self.family = family.train()
        self.average = copy.deepcopy(family).eval().requires_grad_(False)
        if plan.optimization.recompute:
            recompute_blocks(family)
        self.plan = plan
        self.world = world
        self.step = 0
        self.best = math.inf
        self.stale = 0  # validations since the best one
        self.ended = False
        self.clock = Stopwatch(clock)
        self.history: list[tuple[int, Mapping[str, float]]] = []
        self._parameters = {phase: list(family.phase_parameters(phase)) for phase in family.phases}
        self._weights: list[Tensor] = list(family.parameters())
        self._averages: list[Tensor] = list(self.average.parameters())
        self._modules = {
            phase: distribute(family, phase, world, compiled=plan.compile) for phase in family.phases
        }
        self._optimizers = {phase: _optimizer(family, phase, plan.optimization) for phase in family.phases}
        self._sums: dict[str, Tensor] = {}  # of metrics since the last report
        self._reported = 0  # step of the last report
        self._timed = 0  # step since which the clock's lap counts
        self._broken = torch.full((), math.inf, device=world.device)  # first step that was not finite
        self._progress = 0.0
        self._agreement = 1  # step of the next one
        self._agreed, self._agreed_s = 0, 0.0  # step and seconds at the last one
        self._memory = Memory()

    @property
    def is_report_due(self) -> bool:
        """Whether metrics are read after this step."""
        return self.ended or self.step % self.plan.report_every == 0

    @property
    def is_checkpoint_due(self) -> bool:
        """Whether a checkpoint is validated, sampled and saved after this step."""
        return self.ended or self.step % self.plan.checkpoint_every == 0

    def advance(self, batch: Batch) -> None:
        """Take one optimizer step per phase, and average the weights."""
        rate = learning_rate(self.plan.optimization, self._progress)
        for phase in self.family.phases:
            if len(self.family.phases) > 1:
                require_grad(self.family, phase)
            with fitting(self.family, batch, phase, self.plan):
                loss = self._add_gradients(phase, batch)
            norm = self._update(phase, rate)
            self._record(phase, {"gradient_norm": norm}, self._weight(batch))
            # A gradient that is not finite spoils the weights one step before any loss tells.
            fine = torch.isfinite(loss + norm)
            self._broken = torch.where(fine, self._broken, self._broken.clamp(max=self.step + 1))
        self.step += 1
        if self.plan.budget.steps:
            self._progress = self.step / self.plan.budget.steps
        self._update_average()

    def _add_gradients(self, phase: str, batch: Batch) -> Tensor:
        """Compute the gradient of a phase, a micro-batch at a time; returns the sum of their losses."""
        module, precision = self._modules[phase], self.plan.optimization.precision
        most, total = self.plan.micro_batch or len(batch.x), torch.zeros((), device=self.world.device)
        for part, is_last in micro_batches(self.family, batch, most):
            weight = self._weight(part)
            with sync_gradients(module, is_last):
                with fast_matrix_products(self.world.device, precision):
                    losses = module(part, phase)
                (losses.loss * (weight * self.world.size)).backward()  # workers are averaged over
            self._record(phase, {"loss": losses.loss.detach(), **losses.metrics}, weight)
            total += losses.loss.detach()
        return total

    def _weight(self, batch: Batch) -> float:
        """Share of the batch of all workers that some examples are."""
        return len(batch.x) / self.plan.optimization.batch_size

    def _update(self, phase: str, rate: float) -> Tensor:
        """Take an optimizer step; returns the norm of the gradient."""
        optimizer = self._optimizers[phase]
        for group in optimizer.param_groups:
            group["lr"] = rate
        norm = nn.utils.clip_grad_norm_(self._parameters[phase], self.plan.optimization.clip_norm)
        self._memory.settle()  # a checkpoint before may be copying what this changes
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm.detach()

    def _record(self, phase: str, metrics: Mapping[str, Tensor], share: float) -> None:
        """Add to the sums without reading them: reading would wait for the device.

        In float64, whose sums of float32 are exact, so that neither workers nor interruptions show in them.
        """
        prefix = "train/" if len(self.family.phases) == 1 else f"train/{phase}/"
        for name, value in metrics.items():
            self._sums[prefix + name] = self._sums.get(prefix + name, 0) + (value * share).double()

    @torch.no_grad()
    def _update_average(self) -> None:
        # A young average must not remember the random weights it started from.
        decay = min(self.plan.optimization.ema_decay, self.step / (self.step + 10))
        torch._foreach_lerp_(self._averages, self._weights, 1 - decay)
        for mine, trained in zip(self.average.buffers(), self.family.buffers(), strict=True):
            mine.copy_(trained)

    def agree(self, interrupted: bool) -> bool:
        """Agree with the other workers on how far training is; returns whether all stop here."""
        stop = 0.0
        if self.world.size == 1 or self.step >= self._agreement:
            seconds, stop, steps = self.world.from_first(
                self.clock.seconds, interrupted, self._steps_to_agree()
            )
            self._agreement = self.step + int(steps)
            if not self.plan.budget.steps:
                self._progress = seconds / self.plan.budget.seconds
        self.ended = self._progress >= 1
        return bool(stop)

    def _steps_to_agree(self) -> int:
        """Choose how many steps to take until the next agreement: fewer where they are slow."""
        step_s = max(self.clock.seconds - self._agreed_s, 1e-9) / max(self.step - self._agreed, 1)
        self._agreed, self._agreed_s = self.step, self.clock.seconds
        return max(1, min(_AGREE_STEPS, round(_AGREE_S / step_s)))

    def summarize(self, metrics: dict[str, float], dataset: Dataset | None, stop: bool = False) -> Report:
        """Report metrics; validate, if a dataset is given, and offer a checkpoint if due or before a stop."""
        due = self.is_checkpoint_due
        picture = b""
        if stop:  # what is saved now was not looked at since the last report
            self._check_weights()
        if due and isinstance(self.average, Unnormalized):
            self.average.normalize()
        if due and dataset:
            metrics |= self._validate(dataset)
            picture = sample_grid(self.average) if self.world.rank == 0 else b""
        if metrics:
            self.history.append((self.step, metrics))
        snapshot = self.snapshot(metrics.get(SCORE), due, picture) if due or stop else None
        return Report(self.step, metrics, snapshot)

    def heed(self, judge: Judge, report: Reporter) -> None:
        """Take in how the checkpoint before was judged, and report it."""
        step, score = self.world.from_first(*(judge.collect() if self.world.rank == 0 else (0, 0)))
        if step:
            metrics = self._take_score(score)
            self.history.append((int(step), metrics))
            report(Report(int(step), metrics))

    def read_metrics(self) -> dict[str, float]:
        """Average the metrics since the last reading, over steps and workers."""
        names = sorted(self._sums)  # the same order on all workers
        sums = self.world.sum(torch.stack([self._sums[name] for name in names]))
        values = (sums / (self.step - self._reported)).tolist()
        metrics = dict(zip(names, values, strict=True))
        for name, value in metrics.items():
            self._check_health(name, value)
        rate = (self.step - self._timed) * self.plan.optimization.batch_size / self.clock.lap()
        self._sums, self._reported, self._timed = {}, self.step, self.step
        return metrics | {"progress": self._progress, "seconds": self.clock.seconds, "examples_per_s": rate}

    def _check_health(self, name: str, value: float) -> None:
        healthy = self.family.healthy.get(name.rpartition("/")[2])
        least, most = healthy or (-math.inf, math.inf)
        if math.isfinite(value) and least <= value <= most:
            return
        usual = f" (healthy: {least:g} to {most:g})" if healthy else ""
        first = self.world.least(self._broken.item())
        when = f"at step {first:.0f}" if math.isfinite(first) else f"by step {self.step}"
        raise self._divergence(f"{name} is {value:.4g}{usual} {when}")

    def _check_weights(self) -> None:
        first = self.world.least(self._broken.item())
        if math.isfinite(first):
            raise self._divergence(f"a loss or gradient is not finite at step {first:.0f}")

    def _divergence(self, what: str) -> DivergenceError:
        optimization = self.plan.optimization
        return DivergenceError(
            f"{what}: training diverged; {self.family.advice} "
            f"(peak learning rate now {optimization.learning_rate:g}, clip norm {optimization.clip_norm:g})"
        )

    def _validate(self, dataset: Dataset) -> dict[str, float]:
        if not isinstance(self.average, Likelihood):
            return {}
        examples = self.plan.validation_examples
        return self._take_score(validation_score(self.average, dataset, examples, self.world))

    def _take_score(self, score: float) -> dict[str, float]:
        """Remember the best score, and end training if there was none for long."""
        self._check_health(SCORE, score)
        self.stale = 0 if score < self.best else self.stale + 1
        self.best = min(score, self.best)
        self.ended = self.ended or self.stale >= self.plan.patience
        return {SCORE: score}

    def snapshot(self, score: float | None, evaluated: bool, picture: bytes = b"") -> Snapshot | None:
        """Copy all that a checkpoint holds, on the first worker; the others contribute their share."""
        batch_size = self.plan.optimization.batch_size
        carried = {
            name: self.world.gather(rows, batch_size) for name, rows in sorted(self.family.carried.items())
        }
        sums = {name: self.world.sum(value.clone()) for name, value in sorted(self._sums.items())}
        if self.world.rank > 0:
            return None
        average, weights = self.average.state_dict(), self.family.state_dict()
        parameters = dict(self.family.named_parameters())
        trained = _under("average/", average) | _under("weights/", weights)
        steady = {name: value for name, value in trained.items() if name.partition("/")[2] in parameters}
        steady |= self._optimizer_tensors()
        buffers = {name: value for name, value in trained.items() if name not in steady}
        changing = buffers | _under("carried/", carried) | _under("sums/", sums)
        copies = self._memory.copy(steady, changing)
        contents = Contents(
            description=checkpoint.describe(self.average),
            weights=_below("average/", copies),
            samples_png=picture,
            tensors={name: copies[name] for name in steady | changing if not name.startswith("average/")},
            counters=self._counters() | {"score": score, "evaluated": evaluated},
            history=list(self.history),
        )
        release = partial(self._memory.take_back, copies)
        return Snapshot(contents=contents, release=release, copied=self._memory.copied)

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for phase, optimizer in self._optimizers.items():
            for index, state in optimizer.state_dict()["state"].items():
                tensors |= _under(f"optimizer/{phase}/{index}/", state)
        return tensors

    def _counters(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "reported": self._reported,
            "seconds": self.clock.seconds,
            "progress": self._progress,
            "best": self.best if math.isfinite(self.best) else None,
            "stale": self.stale,
            "ended": self.ended,
        }

    def restore(self, saved: Contents) -> None:
        """Go on from a checkpoint as if there had been no interruption."""
        counters, tensors = saved.counters, saved.tensors
        self.average.load_state_dict(saved.weights)
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
        if self.world.rank == 0:  # they are those of all workers
            self._sums = {
                name: value.to(self.world.device) for name, value in _below("sums/", tensors).items()
            }
        self.history = list(saved.history)
        self.step = self._timed = counters["step"]
        self._reported = counters["reported"]
        self.best = math.inf if counters["best"] is None else counters["best"]
        self.stale = counters["stale"]
        self.ended, self._progress = counters["ended"], counters["progress"]
        self.clock = Stopwatch(self.clock.now, counters["seconds"])
        self._agreed, self._agreed_s = self.step, counters["seconds"]

    def _share(self, name: str, rows: Tensor) -> Tensor:
        """Take this worker's rows of what was carried by all."""
        batch_size = self.plan.optimization.batch_size
        if len(rows) != batch_size:
            raise ValueError(
                f"batch_size={batch_size}: the checkpoint carries {name} for {len(rows)} examples; "
                f"resume with batch_size={len(rows)}"
            )
        return self.world.share(rows).to(self.world.device)


def _optimizer(family: Family, phase: str, optimization: Optimization) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        list(family.phase_parameters(phase)),
        lr=optimization.learning_rate,
        betas=optimization.betas,
        weight_decay=optimization.weight_decay,
        fused=True,
    )


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in tensors.items()}


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
