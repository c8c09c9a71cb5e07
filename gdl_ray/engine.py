"""Continuous batching: one engine draws the samples of many requests on any family's step machine.

The engine owns a fixed number of slots, the rows of one state. Waiting samples take free slots before any
step, each counts its own steps, and a sample leaves when it has taken them all: no request waits for another
to end, and none waits for a batch to fill. Who waits takes turns: see `turns`. Where samples lie, and why one
does not depend on its neighbours: see `rows`.
"""

import logging
import math
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gdl_ray.family import UNLABELLED, Completion, Family, Option, Sampler
from gdl_ray.random import fold
from gdl_ray.rows import Rows
from gdl_ray.turns import Job, Preview, Turns

__all__ = [
    "LIKELIHOOD",
    "SAMPLES",
    "Engine",
    "Job",
    "Load",
    "Preview",
    "QueueFull",
    "keys_of",
    "request_keys",
    "seeds_of",
]

SAMPLES, LIKELIHOOD = 0, 1
"""What the noise of a sample is for: a bound on its likelihood needs noise of its own."""

MAX_SEED = 2**53 - 1
"""The largest of the integers that JSON numbers hold exactly."""

_STEP_DECAY = 0.9  # of the moving average of a step's time

log = logging.getLogger(__name__)


class QueueFull(Exception):  # noqa: N818  (as queue.Full: it says what is so)
    """More samples wait than the engine was told to hold, or for longer than who asks would; try again."""

    def __init__(self, told: str, wait_s: float) -> None:
        super().__init__(told)
        self.wait_s = wait_s
        """Estimated seconds that the samples would have waited."""


def seeds_of(seed: int, n: int) -> Tensor:
    """Derive the seeds of a request's samples, so that each can be made again by itself: SplitMix64.

    Args:
        seed: of the request, in [0, MAX_SEED].
        n: number of seeds; those of a smaller n are the first of a larger.

    Returns:
        int64 (n,), each in [0, MAX_SEED].

    Raises:
        ValueError: the seed is out of range.

    References:
        Steele, Lea, Flood. Fast Splittable Pseudorandom Number Generators. OOPSLA 2014.
        https://doi.org/10.1145/2660193.2660195
    """
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed={seed} must lie in [0, 2**53 - 1]")
    # Every request waits for this: NumPy takes a fraction of the time that tensors would.
    z = np.uint64(seed) + np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy(((z ^ (z >> np.uint64(31))) >> np.uint64(11)).astype(np.int64))


def keys_of(seeds: Tensor, purpose: int = SAMPLES) -> Tensor:
    """Derive the noise keys of samples from their seeds, so that (model version, seed, label) decides one.

    Args:
        seeds: int64 (n,), each in [0, MAX_SEED].
        purpose: SAMPLES or LIKELIHOOD; keys for one are independent of those for the other.

    Returns:
        int64 (n,).
    """
    return fold(seeds, 0, purpose)


def request_keys(seed: int, n: int, purpose: int = SAMPLES) -> Tensor:
    """Derive the noise keys of a request's samples; arguments as in `seeds_of` and `keys_of`."""
    return keys_of(seeds_of(seed, n), purpose)


@dataclass(frozen=True, slots=True)
class Load:
    """How busy an engine is."""

    slots: int
    """Samples that can be under way at a time."""
    active: int
    """Samples under way."""
    waiting: int
    """Samples that wait for a slot."""
    step_s: float
    """Seconds that a step takes, lately; 0 before the first."""
    wait_s: float
    """Estimated seconds until a sample that is submitted now gets a slot, if all others go first."""


class _Sample(NamedTuple):
    """What is in a row."""

    job: Job
    number: int
    """Of the sample within the job."""
    end: int
    """The engine's clock when it has taken all its steps."""


class Engine:
    """Draws samples from one family on its own thread.

    Args:
        family: in eval mode; its parameters are not changed while the engine lives.
        slots: samples under way at a time, a multiple of the sampler's granule. Up to 64, a sample was found
            to have the same bits in any company.
        queue_samples: most samples that may wait for a slot; a client who has less than its equal share of
            them waiting is let in all the same.
        completes: whether to draw completions of what is given, instead of samples.

    Raises:
        ValueError: slots is no multiple of the granule, or the family is to complete and cannot.
    """

    def __init__(
        self, family: Family, slots: int = 64, queue_samples: int = 4096, completes: bool = False
    ) -> None:
        self._spec = family.spec
        self._device = next((p.device for p in family.parameters()), torch.device("cpu"))
        self._completion = _completion_of(family) if completes else None
        self._sampler = self._completion(*self._blank()) if self._completion else family.sampler()
        self._slots, self._queue_samples = slots, queue_samples
        self._state = Rows(self._sampler, slots, self._device)
        # Whose its first rows are; a new list at each change, so that any thread may read it.
        self._rows: list[_Sample] = []
        self._queue = Turns()
        self._step_s = 0.0
        self.steps = 0
        """How many steps were taken, each by all samples under way."""
        self.drawn = 0
        """How many samples were finished."""
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    @property
    def options(self) -> Mapping[str, Option]:
        """What may be asked for with `submit`."""
        return self._sampler.options

    @property
    def load(self) -> Load:
        """How busy it is now; any thread may ask."""
        with self._changed:
            active, waiting = len(self._rows), self._queue.samples
            wait_s = self._wait_s(self._queue.steps) if active + waiting >= self._slots else 0.0
        return Load(self._slots, active, waiting, self._step_s, wait_s)

    def submit(
        self,
        seeds: Tensor,
        labels: Tensor,
        options: Mapping[str, float] | None = None,
        *,
        client: str = "",
        given: tuple[Tensor, Tensor] | None = None,
        previews: int = 0,
        on_preview: Callable[[Preview], None] | None = None,
        most_wait_s: float = math.inf,
    ) -> Job:
        """Ask for one sample per seed, with the keys `keys_of(seeds)`; any thread may.

        Args:
            seeds: int64 (n,), n of 1 or more, on the CPU, each in [0, MAX_SEED].
            labels: classes, int64 (n,), on the CPU, in [0, classes - 1]; UNLABELLED asks for any.
            options: those of `self.options` that are not to have their defaults.
            client: whoever asks; clients share slots and queue evenly.
            given: of an engine that completes, and of no other: examples (n, ...) as in Batch and what is
                known of each, bool of the same shape, on the CPU.
            previews: how often `on_preview` is shown what there is: after equal parts of the work. Samples
                that take a single step have none.
            on_preview: called on the engine's thread, which waits; what it raises is logged.
            most_wait_s: estimated wait for slots, in seconds, that is too long.

        Raises:
            QueueFull: the samples do not fit into the queue, or would wait for too long.
            RuntimeError: the engine is closed.
            ValueError: an argument is not as described.
        """
        _check_columns(seeds, labels)
        self._check_labels(labels)
        self._check_given(given, len(seeds))
        if previews < 0:
            raise ValueError(f"previews={previews} must not be negative")
        settled = self._sampler.settle(options or {})
        steps = self._sampler.steps_of(settled)
        shown = previews if on_preview and steps > 1 else 0
        job = Job(seeds, labels, settled, steps, client, given or (), shown, on_preview)
        with self._changed:
            if self._closed:
                raise RuntimeError("the engine is closed")
            self._check_room(job, most_wait_s)
            job.future.add_done_callback(self._withdrawal(weakref.ref(job)))
            self._queue.add(job)
            self._changed.notify()
        return job

    def close(self, drain: bool) -> None:
        """Take no more jobs and end the thread: after finishing those held (`drain`), or cancelling them."""
        with self._changed:
            self._closed = True
            held = [] if drain else self._queue.jobs() + [sample.job for sample in self._rows]
            self._changed.notify()
        for job in held:
            job.cancel()
        self._thread.join()

    def _withdrawal(self, job: weakref.ref[Job]) -> Callable[["Future[Tensor]"], None]:
        """Make what takes the rest of a job out of the queue once it is settled.

        The job is referred to weakly: its future holds this, and a cycle would keep its tensors.
        """

        def withdraw(_: "Future[Tensor]") -> None:
            with self._changed:
                if waiting := job():
                    self._queue.remove(waiting)

        return withdraw

    def _wait_s(self, steps: float) -> float:
        """Estimate how long so many steps keep a sample from its slot, if none is free."""
        soonest = min((sample.end for sample in self._rows), default=self.steps)
        return (max(0, soonest - self.steps) + steps / self._slots) * self._step_s

    def _check_room(self, job: Job, most_wait_s: float) -> None:
        """Refuse a job that the queue does not hold, or not for long enough."""
        clients, jobs = self._queue.rivals(job.client)
        waiting, own, n = self._queue.samples, self._queue.waiting(job.client), job.missing
        free = len(self._rows) + waiting + n <= self._slots
        turns = job.steps * n * jobs * clients  # until all of them have gone as often as this job
        wait_s = 0.0 if free else self._wait_s(min(turns, self._queue.steps))
        if waiting + n > self._queue_samples and own + n > self._queue_samples / clients:
            raise QueueFull(f"{waiting} samples wait, {self._queue_samples} may; {n} more asked", wait_s)
        if wait_s > most_wait_s:
            raise QueueFull(f"{n} more samples would wait for {wait_s:.0f} s", wait_s)

    @torch.no_grad()
    def _loop(self) -> None:
        """Work until the engine is closed; should that itself fail, leave nobody waiting."""
        try:
            while self._wait():
                try:
                    self._work()
                except Exception as error:  # a broken sampler must not take the engine down
                    self._fail(error, {sample.job for sample in self._rows})
                    self._rows = []
                    self._state.reset()
        finally:
            with self._changed:
                self._closed = True
                held = {*self._queue.jobs(), *(sample.job for sample in self._rows)}
            self._fail(RuntimeError("the engine's thread ended"), held)

    def _wait(self) -> bool:
        """Wait until there is something to do; False if there will be nothing more."""
        with self._changed:
            self._changed.wait_for(lambda: self._rows or self._queue.samples or self._closed)
            return bool(self._rows or self._queue.samples)

    def _work(self) -> None:
        """Take one step, with the samples that are under way and those that find room."""
        since = time.perf_counter()
        self._leave([row for row, sample in enumerate(self._rows) if sample.job.future.done()])
        self._begin(self._admit())
        if not self._rows:
            return
        self._advance()
        complete, pictures = self._harvest()
        self._measure(time.perf_counter() - since)
        for job in complete:
            job.settle(job.samples)
        for job, picture in pictures:
            _show(job, picture)

    def _admit(self) -> list[tuple[Job, range]]:
        """Give free rows, the first of them, to samples that wait: jobs, and the numbers of their samples."""
        with self._changed:
            placed = self._queue.take(self._slots, [sample.job for sample in self._rows])
            self._rows = self._rows + [
                _Sample(job, number, self.steps + job.steps) for job, numbers in placed for number in numbers
            ]
        return placed

    def _begin(self, placed: list[tuple[Job, range]]) -> None:
        """Start the samples that took the last rows; if that fails, their jobs alone do."""
        if not placed:
            return
        try:
            self._start(placed)
        except Exception as error:
            self._rows = self._rows[: -sum(len(numbers) for _, numbers in placed)]
            self._fail(error, {job for job, _ in placed})

    def _start(self, placed: list[tuple[Job, range]]) -> None:
        """Begin the samples that took the last rows."""
        fresh = self._rows[-sum(len(numbers) for _, numbers in placed) :]
        blanks = self._state.computed(len(fresh)) - len(fresh)

        def column(of: Callable[[Job], Tensor], blank: float) -> Tensor:
            parts = [of(job)[numbers.start : numbers.stop] for job, numbers in placed]
            return torch.cat([*parts, parts[0].new_full((blanks, *parts[0].shape[1:]), blank)]).to(
                self._device
            )

        options = {}
        for name, option in self.options.items():
            values = [sample.job.options[name] for sample in fresh] + [float(option.default)] * blanks
            options[name] = torch.tensor(values, device=self._device)
        sampler = self._sampler
        if self._completion:
            x, known = column(lambda job: job.given[0], 0), column(lambda job: job.given[1], 0)
            sampler = self._completion(x, known)
        keys, labels = keys_of(column(lambda job: job.seeds, 0)), column(lambda job: job.labels, UNLABELLED)
        self._state.add(sampler.start(keys, labels, options), len(fresh))

    def _advance(self) -> None:
        """Take one step with every sample."""
        self._state.step()
        self.steps += 1
        for sample in self._rows:
            sample.job.taken += 1

    def _harvest(self) -> tuple[list[Job], list[tuple[Job, Preview]]]:
        """Hand finished samples to their jobs; returns those that are complete, and previews that are due."""
        ended = [row for row, sample in enumerate(self._rows) if sample.end == self.steps]
        watched = {job for job in {sample.job for sample in self._rows} if job.due}
        if not ended and not watched:
            return [], []
        under_way = [row for row, sample in enumerate(self._rows) if sample.job in watched]
        finished, pictured = self._by_job(ended), self._by_job(under_way)
        samples = self._state.finish(sorted({*ended, *under_way}))
        for job, rows in finished.items():
            job.keep([self._rows[row].number for row in rows], samples(rows))
        self.drawn += len(ended)
        pictures = [
            (job, job.preview([self._rows[row].number for row in rows], samples(rows)))
            for job, rows in pictured.items()
        ]
        self._leave(ended)  # last: until then `_fail` finds the jobs by their rows
        return [job for job in finished if job.drawn == len(job.seeds)], pictures

    def _by_job(self, rows: list[int]) -> dict[Job, list[int]]:
        found: dict[Job, list[int]] = {}
        for row in rows:
            found.setdefault(self._rows[row].job, []).append(row)
        return found

    def _leave(self, rows: list[int]) -> None:
        """Free some rows."""
        if rows:
            self._rows = [self._rows[row] for row in self._state.free(rows)]

    def _fail(self, error: Exception, jobs: set[Job]) -> None:
        """Fail some jobs, and forget what still waits of them."""
        with self._changed:
            for job in jobs:
                self._queue.remove(job)
        for job in jobs:
            job.settle(error)

    def _measure(self, spent_s: float) -> None:
        """Take the time of a step into the average; the first of all is slower."""
        if self.steps == 1:
            return
        self._step_s = _STEP_DECAY * self._step_s + (1 - _STEP_DECAY) * spent_s if self._step_s else spent_s

    def _blank(self) -> tuple[Tensor, Tensor]:
        """Make one example of which nothing is known."""
        dtype = torch.uint8 if self._spec.kind == "image" else torch.int64
        x = torch.zeros(1, *self._spec.shape, dtype=dtype, device=self._device)
        return x, torch.zeros_like(x, dtype=torch.bool)

    def _check_labels(self, labels: Tensor) -> None:
        """Refuse labels that the data have not."""
        classes = self._spec.classes
        least, most = labels.aminmax()  # one pass: every request waits for it
        if least >= UNLABELLED and most < classes:
            return
        label = int(most if most >= classes else least)
        known = (
            f"in [0, {classes - 1}], or {UNLABELLED} for any" if classes else f"{UNLABELLED}: there are none"
        )
        raise ValueError(f"labels hold {label}; each must be {known}")

    def _check_given(self, given: tuple[Tensor, Tensor] | None, n: int) -> None:
        """Refuse what is given if it is not what this engine draws from."""
        if (given is None) == bool(self._completion):
            wanted = "completes what is given" if self._completion else "draws from nothing"
            raise ValueError(f"given={'None' if given is None else '(x, known)'}: this engine {wanted}")
        for name, column, blank in zip(("x", "known"), given or (), self._blank(), strict=False):
            shape = (n, *self._spec.shape)
            if column.shape != shape or column.dtype != blank.dtype or column.device.type != "cpu":
                told = f"{column.dtype} {tuple(column.shape)} on {column.device}"
                raise ValueError(
                    f"{name} of what is given is {told}; it must be {blank.dtype} {shape} on cpu"
                )
        if given and (given[1] & ((given[0] < 0) | (given[0] >= self._spec.levels))).any():
            raise ValueError(f"known values must lie in [0, {self._spec.levels - 1}]")


def _completion_of(family: Family) -> Callable[[Tensor, Tensor], Sampler]:
    if not isinstance(family, Completion):
        raise ValueError(f"{type(family).__name__} does not complete: completes=True must be left out")
    return family.completion


def _check_columns(seeds: Tensor, labels: Tensor) -> None:
    """Refuse seeds and labels that are not of one length, of one type and in range."""
    for name, column in (("seeds", seeds), ("labels", labels)):
        if column.dim() != 1 or len(column) == 0:
            raise ValueError(f"{name} {tuple(column.shape)} must be (n,), n >= 1")
        if column.dtype != torch.int64 or column.device.type != "cpu":
            raise ValueError(f"{name} are {column.dtype} on {column.device}; they must be int64 on the CPU")
    if len(seeds) != len(labels):
        raise ValueError(f"labels are {len(labels)} for {len(seeds)} seeds; there must be one for each")
    for seed in seeds[(seeds < 0) | (seeds > MAX_SEED)].tolist():
        raise ValueError(f"seeds hold {seed}; each must lie in [0, 2**53 - 1]")


def _show(job: Job, picture: Preview) -> None:
    """Call a watcher, whose troubles are its own."""
    try:
        if job.on_preview and not job.future.cancelled():
            job.on_preview(picture)
    except Exception:
        log.exception("a preview could not be shown")
