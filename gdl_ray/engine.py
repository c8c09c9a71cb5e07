"""Continuous batching: one engine draws the samples of many requests on any family's step machine.

The engine owns a fixed number of slots, the rows of one state. Waiting samples take free slots before any
step, each slot counts its own steps, and a sample leaves when it has taken them all: no request waits for
another to end, and none waits for a batch to fill.

The state always has all its rows, used or not: a free row repeats the last step that it took, for nobody.
So a sample meets the same kernels, of the same shapes, alone or in a crowd, and its values do not depend on
how many neighbours it has.
"""

import threading
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gdl_ray.family import UNLABELLED, Family, Option, State
from gdl_ray.random import fold

SAMPLES, LIKELIHOOD = 0, 1
"""What the noise of a request is for: a bound on the likelihood of samples needs noise of its own."""


class QueueFull(Exception):  # noqa: N818  (as queue.Full: it says what is so)
    """More samples wait than the engine was told to hold; try again later."""


def request_keys(seed: int, n: int, purpose: int = SAMPLES) -> Tensor:
    """Derive the noise keys of a request, so that (model version, seed, label) decides its samples.

    Args:
        seed: in [0, 2**53 - 1]: the integers that JSON numbers hold exactly.
        n: number of keys; the keys of a smaller n are the first of a larger.
        purpose: SAMPLES or LIKELIHOOD; keys for one are independent of those for the other.

    Returns:
        int64 (n,).
    """
    return fold(seed, torch.arange(n), purpose)


@dataclass(eq=False, slots=True)
class Job:
    """The samples of one request."""

    seed: int
    labels: Tensor
    options: Mapping[str, float]
    """A value of every option that the sampler has."""
    steps: int
    """How many steps each of the samples takes."""
    future: "Future[Tensor]" = field(default_factory=Future)
    """Resolves to the samples in the order of the labels, on the CPU: uint8 (n, C, H, W) or int64 (n, T)."""
    admitted: int = 0
    """How many of the samples have been given a slot."""
    drawn: int = 0
    """How many of the samples are finished; they finish in the order in which they were admitted."""
    parts: list[Tensor] = field(default_factory=list)
    """The finished samples."""

    def cancel(self) -> None:
        """Give the samples up: their slots are free at the next step. Too late once they are drawn."""
        self.future.cancel()

    @property
    def missing(self) -> int:
        """How many of the samples wait for a slot."""
        return len(self.labels) - self.admitted


@dataclass(eq=False, frozen=True, slots=True)
class _Run:
    """Samples of one job that were admitted together and so finish together."""

    job: Job
    first: int
    """Number of the first of them within the job."""
    rows: list[int]
    end: int
    """The engine's clock when they have taken all their steps."""


class Engine:
    """Draws samples from one family on its own thread.

    Args:
        family: in eval mode; its parameters are not changed while the engine lives.
        slots: samples under way at a time. A multiple of 64 keeps every row of a contiguous tensor in the
            body of vectorised CPU loops, so that a sample's values do not depend on its row either.
        queue_samples: most samples that may wait for a slot.
    """

    def __init__(self, family: Family, slots: int = 64, queue_samples: int = 4096) -> None:
        self._sampler = family.sampler()
        self._device = next((p.device for p in family.parameters()), torch.device("cpu"))
        self._queue_samples = queue_samples
        # What a slot holds. Step numbers stay on the CPU, where asking them needs no wait.
        self._keys = torch.zeros(slots, dtype=torch.int64)
        self._labels = torch.full_like(self._keys, UNLABELLED)
        self._options = {
            name: torch.full((slots,), float(option.default))
            for name, option in self._sampler.options.items()
        }
        self._steps = torch.full_like(self._keys, self._sampler.steps)
        self._index = torch.zeros_like(self._keys)
        self._state: State = {}
        self._clock = 0
        self._free = list(range(slots))
        self._runs: list[_Run] = []
        self._queue: deque[Job] = deque()
        self._waiting = 0
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Number of samples that wait for a slot."""
        return self._waiting

    @property
    def active(self) -> int:
        """Number of samples under way."""
        return len(self._keys) - len(self._free)

    @property
    def options(self) -> Mapping[str, Option]:
        """What may be asked for with `submit`."""
        return self._sampler.options

    def submit(self, seed: int, labels: Tensor, options: Mapping[str, float] | None = None) -> Job:
        """Ask for one sample per label, with the keys `request_keys(seed, n)`; any thread may.

        Args:
            seed: in [0, 2**53 - 1].
            labels: classes, int64 (n,), n of 1 or more, on the CPU; UNLABELLED asks for any.
            options: those of `self.options` that are not to have their defaults.

        Raises:
            QueueFull: the samples do not fit into the queue.
            RuntimeError: the engine is closed.
            ValueError: the seed, the labels or the options are not as described.
        """
        if not 0 <= seed < 2**53:
            raise ValueError(f"seed={seed} must lie in [0, 2**53 - 1]")
        if labels.dim() != 1 or len(labels) == 0:
            raise ValueError(f"labels {tuple(labels.shape)} must be (n,), n >= 1")
        if labels.dtype != torch.int64 or labels.device.type != "cpu":
            raise ValueError(f"labels are {labels.dtype} on {labels.device}; they must be int64 on the CPU")
        settled = self._sampler.settle(options or {})
        job = Job(seed, labels, settled, self._sampler.steps_of(settled))
        with self._changed:
            if self._closed:
                raise RuntimeError("the engine is closed")
            if self._waiting + job.missing > self._queue_samples:
                raise QueueFull(
                    f"{self._waiting} samples wait, {self._queue_samples} may; {len(labels)} more asked"
                )
            self._waiting += job.missing
            self._queue.append(job)
            self._changed.notify()
        job.future.add_done_callback(lambda _: self._withdraw(job))
        return job

    def close(self, drain: bool) -> None:
        """Take no more jobs and end the thread: after finishing those held (`drain`), or cancelling them."""
        with self._changed:
            self._closed = True
            held = [] if drain else [run.job for run in self._runs] + list(self._queue)
            self._changed.notify()
        for job in held:
            job.cancel()
        self._thread.join()

    def _withdraw(self, job: Job) -> None:
        """Take what still waits of a settled job out of the queue."""
        with self._changed:
            self._waiting -= job.missing
            job.admitted = len(job.labels)

    @torch.no_grad()
    def _loop(self) -> None:
        while (placed := self._admit()) is not None:
            try:
                if placed:
                    self._start(self._fill(placed))
                self._advance()
                complete = self._retire()
            except Exception as error:  # a broken sampler must not take the engine down
                self._fail(error)
                continue
            for job, samples in complete:
                if job.future.set_running_or_notify_cancel():  # False if it was cancelled at the last moment
                    job.future.set_result(samples)

    def _admit(self) -> list[_Run] | None:
        """Free the slots of cancelled jobs, wait for work and give it free slots; None ends the thread."""
        with self._changed:
            self._drop([run for run in self._runs if run.job.future.cancelled()])
            while not self._runs and not self._waiting:
                if self._closed:
                    return None
                self._changed.wait()
            placed = []
            while self._free and self._queue:
                if self._queue[0].missing:
                    placed.append(self._place(self._queue[0]))
                if not self._queue[0].missing:
                    self._queue.popleft()
        return placed

    def _place(self, job: Job) -> _Run:
        """Give as many of a job's samples as fit a slot."""
        count = min(job.missing, len(self._free))
        run = _Run(job, job.admitted, self._free[:count], self._clock + job.steps)
        del self._free[:count]
        self._runs.append(run)
        job.admitted += count
        self._waiting -= count
        return run

    def _fill(self, runs: list[_Run]) -> list[int]:
        """Write down what the samples of runs are, each at its row; returns the rows."""
        rows = [row for run in runs for row in run.rows]
        seeds = [run.job.seed for run in runs for _ in run.rows]
        numbers = [run.first + i for run in runs for i in range(len(run.rows))]
        # The keys of all at once: folding costs the same for one and for a slotful.
        self._keys[rows] = fold(torch.tensor(seeds), torch.tensor(numbers))
        self._labels[rows] = torch.cat([run.job.labels[run.first :][: len(run.rows)] for run in runs])
        self._index[rows] = 0
        for run in runs:
            self._steps[run.rows] = run.job.steps
            for name, value in run.job.options.items():
                self._options[name][run.rows] = value
        return rows

    def _drop(self, runs: list[_Run]) -> None:
        """Free the slots of runs."""
        for run in runs:
            self._runs.remove(run)
            self._free += run.rows

    def _start(self, rows: list[int]) -> None:
        """Begin the samples at some rows; at all of them, if there is no state yet."""
        # A copy, because the state may hold on to what it is given.
        keys, labels = (held.to(self._device, copy=True) for held in (self._keys, self._labels))
        options = {name: held.to(self._device, copy=True) for name, held in self._options.items()}
        started = self._sampler.start(keys, labels, options)
        if self._state:
            fresh = torch.tensor(rows, device=self._device)
            for name, tensor in self._state.items():
                tensor[fresh] = started[name][fresh]
        else:
            self._state = started

    def _advance(self) -> None:
        """Take one step with every slot."""
        self._state = self._sampler.step(self._state, self._index.to(self._device))
        self._index = torch.minimum(self._index + 1, self._steps - 1)
        self._clock += 1

    def _retire(self) -> list[tuple[Job, Tensor]]:
        """Hand finished samples to their jobs; returns the jobs that are now complete, and their samples."""
        ended = [run for run in self._runs if run.end == self._clock]
        if not ended:
            return []
        samples = self._sampler.finish(self._state).cpu()
        for run in ended:
            run.job.parts.append(samples[run.rows])
            run.job.drawn += len(run.rows)
        jobs = [run.job for run in ended if run.job.drawn == len(run.job.labels)]
        complete = [(job, torch.cat(job.parts)) for job in jobs]
        with self._changed:  # last: until then `_fail` finds the jobs by their runs
            self._drop(ended)
        return complete

    def _fail(self, error: Exception) -> None:
        """Fail the jobs under way and start afresh."""
        with self._changed:
            jobs = dict.fromkeys(run.job for run in self._runs)
            self._drop(list(self._runs))
        # A free row goes on with what it held: the key or label that broke the sampler must not stay.
        for held, blank in ((self._keys, 0), (self._labels, UNLABELLED), (self._index, 0)):
            held.fill_(blank)
        for name, option in self._sampler.options.items():
            self._options[name].fill_(option.default)
        self._steps.fill_(self._sampler.steps)
        self._state = {}
        for job in jobs:
            if job.future.set_running_or_notify_cancel():
                job.future.set_exception(error)
