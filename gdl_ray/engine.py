"""Continuous batching: one engine draws the samples of many requests on any family's step machine.

The engine owns a fixed number of slots, the rows of one state. Waiting samples take free slots before any
step, each counts its own steps, and a sample leaves when it has taken them all: no request waits for another
to end, and none waits for a batch to fill.

Samples under way fill the first rows: where one leaves, the last moves in. A step is taken with these rows
alone, up to a multiple of 8: a few samples do not pay for all slots. Kernels of such shapes give a row the
same values to the last bit, wherever it is and however many there are, so that a sample does not depend on
its neighbours; tests/families/test_contract.py sees to it.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gdl_ray.family import UNLABELLED, Completion, Family, Option, Sampler, State
from gdl_ray.random import fold
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

_ROWS = 8  # fewer do not give a row the same values
_STEP_DECAY = 0.9  # of the moving average of a step's time

log = logging.getLogger(__name__)


class QueueFull(Exception):  # noqa: N818  (as queue.Full: it says what is so)
    """More samples wait than the engine was told to hold; try again later."""


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
        slots: samples under way at a time, a multiple of 8. Up to 64, a sample was found to have the same
            bits in any company.
        queue_samples: most samples that may wait for a slot.
        completes: whether to draw completions of what is given, instead of samples.

    Raises:
        ValueError: slots is no multiple of 8, or the family is to complete and cannot.
    """

    def __init__(
        self, family: Family, slots: int = 64, queue_samples: int = 4096, completes: bool = False
    ) -> None:
        if slots < 1 or slots % _ROWS:
            raise ValueError(f"slots={slots} must be a positive multiple of {_ROWS}")
        self._spec = family.spec
        self._device = next((p.device for p in family.parameters()), torch.device("cpu"))
        self._completion = _completion_of(family) if completes else None
        self._sampler = self._completion(*self._blank()) if self._completion else family.sampler()
        self._slots, self._queue_samples = slots, queue_samples
        self._state: State = {}
        # Each row's step number, 0 where nobody is. On the CPU, where asking needs no wait.
        self._index = torch.zeros(slots, dtype=torch.int64)
        # Whose the first rows are; a new list at each change, so that any thread may read it.
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
            rows, waiting, steps = self._rows, self._queue.samples, self._queue.steps
        wait_s = 0.0
        if len(rows) + waiting >= self._slots:
            soonest = min((sample.end for sample in rows), default=self.steps)
            wait_s = (max(0, soonest - self.steps) + steps / self._slots) * self._step_s
        return Load(self._slots, len(rows), waiting, self._step_s, wait_s)

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
    ) -> Job:
        """Ask for one sample per seed, with the keys `keys_of(seeds)`; any thread may.

        Args:
            seeds: int64 (n,), n of 1 or more, on the CPU, each in [0, MAX_SEED].
            labels: classes, int64 (n,), on the CPU; UNLABELLED asks for any.
            options: those of `self.options` that are not to have their defaults.
            client: whoever asks; free slots go to clients in turns.
            given: of an engine that completes, and of no other: examples (n, ...) as in Batch and what is
                known of each, bool of the same shape, on the CPU.
            previews: how often `on_preview` is shown what there is: after equal parts of the work. Samples
                that take a single step have none.
            on_preview: called on the engine's thread, which waits; what it raises is logged.

        Raises:
            QueueFull: the samples do not fit into the queue.
            RuntimeError: the engine is closed.
            ValueError: an argument is not as described.
        """
        _check_columns(seeds, labels)
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
            if self._queue.samples + job.missing > self._queue_samples:
                raise QueueFull(
                    f"{self._queue.samples} samples wait, {self._queue_samples} may; {job.missing} more asked"
                )
            self._queue.add(job)
            self._changed.notify()
        job.future.add_done_callback(lambda _: self._withdraw(job))
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

    def _withdraw(self, job: Job) -> None:
        """Take what still waits of a settled job out of the queue."""
        with self._changed:
            self._queue.remove(job)

    @torch.no_grad()
    def _loop(self) -> None:
        while (placed := self._admit()) is not None:
            since = time.perf_counter()
            try:
                if placed:
                    self._start(placed)
                self._advance()
                complete, pictures = self._harvest()
            except Exception as error:  # a broken sampler must not take the engine down
                self._fail(error)
                continue
            self._measure(time.perf_counter() - since)
            for job in complete:
                if job.future.set_running_or_notify_cancel():  # False if it was cancelled at the last moment
                    job.future.set_result(job.samples)
            for job, picture in pictures:
                _show(job, picture)

    def _admit(self) -> list[tuple[Job, range]] | None:
        """Free the rows of cancelled jobs, wait for work and give it rows; None ends the thread."""
        self._leave([row for row, sample in enumerate(self._rows) if sample.job.future.cancelled()])
        with self._changed:
            while not self._rows and not self._queue.samples:
                if self._closed:
                    return None
                self._changed.wait()
            placed = self._queue.take(self._slots - len(self._rows))
            self._rows = self._rows + [
                _Sample(job, number, self.steps + job.steps) for job, numbers in placed for number in numbers
            ]
        return placed

    def _start(self, placed: list[tuple[Job, range]]) -> None:
        """Begin the samples that took the last rows."""
        fresh = self._rows[-sum(len(numbers) for _, numbers in placed) :]
        blanks = self._used(len(fresh)) - len(fresh)

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
        self._place(sampler.start(keys, labels, options), len(fresh))

    def _place(self, started: State, count: int) -> None:
        """Put the first rows of a state where the last samples are."""
        if not self._state:
            self._state = {
                name: tensor[:1].repeat(self._slots, *[1] * (tensor.dim() - 1))
                for name, tensor in started.items()
            }
            self._clear(0, self._slots)
        end = len(self._rows)
        for name, tensor in self._state.items():
            tensor[end - count : end] = started[name][:count]

    def _used(self, count: int) -> int:
        """Count the rows that are computed for so many samples; all on an accelerator, to which it is one."""
        return -(-count // _ROWS) * _ROWS if self._device.type == "cpu" else self._slots

    def _view(self) -> State:
        """See the rows that are computed now; what is written there is written to the state."""
        rows = self._used(len(self._rows))
        return {name: tensor[:rows] for name, tensor in self._state.items()}

    def _advance(self) -> None:
        """Take one step with every sample."""
        view = self._view()
        index = self._index[: self._used(len(self._rows))].to(self._device)
        stepped = self._sampler.step(dict(view), index)
        for name, tensor in view.items():
            if stepped[name] is not tensor:  # else it was overwritten in its place
                tensor.copy_(stepped[name])
        self._index[: len(self._rows)] += 1
        self.steps += 1
        for sample in self._rows:
            sample.job.taken += 1

    def _harvest(self) -> tuple[list[Job], list[tuple[Job, Preview]]]:
        """Hand finished samples to their jobs; returns those that are complete, and previews that are due."""
        ended = [row for row, sample in enumerate(self._rows) if sample.end == self.steps]
        watched = {job for job in {sample.job for sample in self._rows} if job.due}
        if not ended and not watched:
            return [], []
        samples = self._sampler.finish(self._view()).cpu()
        finished = self._by_job(ended)
        for job, rows in finished.items():
            job.keep([self._rows[row].number for row in rows], samples[rows])
        self.drawn += len(ended)
        under_way = self._by_job([row for row, sample in enumerate(self._rows) if sample.job in watched])
        pictures = [
            (job, job.preview([self._rows[row].number for row in rows], samples[rows]))
            for job, rows in under_way.items()
        ]
        self._leave(ended)  # last: until then `_fail` finds the jobs by their rows
        return [job for job in finished if job.drawn == len(job.seeds)], pictures

    def _by_job(self, rows: list[int]) -> dict[Job, list[int]]:
        found: dict[Job, list[int]] = {}
        for row in rows:
            found.setdefault(self._rows[row].job, []).append(row)
        return found

    def _leave(self, rows: list[int]) -> None:
        """Free some rows: the last of the others move in, and what is left behind them asks for nothing."""
        before, kept = len(self._rows), len(self._rows) - len(rows)
        holes = [row for row in rows if row < kept]
        movers = sorted(set(range(kept, before)).difference(rows))
        for tensor in [*self._state.values(), self._index] if holes else []:
            tensor[holes] = tensor[movers]
        moved = list(self._rows)
        for hole, mover in zip(holes, movers, strict=True):
            moved[hole] = moved[mover]
        self._rows = moved[:kept]
        self._clear(kept, before)

    def _clear(self, begin: int, end: int) -> None:
        """Let rows that are nobody's hold the defaults: a costly option must not be paid for longer."""
        self._index[begin:end] = 0
        for name, option in self.options.items():
            if name in self._state:
                self._state[name][begin:end] = option.default

    def _fail(self, error: Exception) -> None:
        """Fail the jobs under way and start afresh."""
        jobs = {sample.job for sample in self._rows}
        self._rows, self._state = [], {}
        self._index.zero_()
        for job in jobs:
            if job.future.set_running_or_notify_cancel():
                job.future.set_exception(error)

    def _measure(self, spent_s: float) -> None:
        """Take the time of a step into the average."""
        self._step_s = _STEP_DECAY * self._step_s + (1 - _STEP_DECAY) * spent_s if self._step_s else spent_s

    def _blank(self) -> tuple[Tensor, Tensor]:
        """Make one example of which nothing is known."""
        dtype = torch.uint8 if self._spec.kind == "image" else torch.int64
        x = torch.zeros(1, *self._spec.shape, dtype=dtype, device=self._device)
        return x, torch.zeros_like(x, dtype=torch.bool)

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
