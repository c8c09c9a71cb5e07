"""The queue of a sampling engine: waiting jobs take free slots in turns.

A turn is one sample. Clients take turns first, and the jobs of a client among themselves: a request of a
thousand samples does not starve one of four, nor a client's hundred requests another client's one.
"""

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False, slots=True)
class Preview:
    """What a job looks like before it is done."""

    share: float
    """Share of its steps that are taken, in (0, 1)."""
    samples: Tensor
    """As the job's own, on the CPU: finished ones final, others as they are so far, zeros if not begun."""


@dataclass(eq=False, slots=True)
class Job:
    """The samples of one request."""

    seeds: Tensor
    labels: Tensor
    options: Mapping[str, float]
    """A value of every option that the sampler has."""
    steps: int
    """How many steps each of the samples takes."""
    client: str = ""
    given: tuple[Tensor, ...] = ()
    """Of a completion: examples, and what is known of each."""
    previews: int = 0
    """How many previews are to be shown."""
    on_preview: Callable[[Preview], None] | None = None
    future: "Future[Tensor]" = field(default_factory=Future)
    """Resolves to the samples in the order of the seeds, on the CPU: uint8 (n, C, H, W) or int64 (n, T)."""
    admitted: int = 0
    """How many of the samples have been given a slot."""
    drawn: int = 0
    """How many of the samples are finished."""
    taken: int = 0
    """Steps taken so far, over all samples."""
    shown: int = 0
    """How many parts of the work had been done when the last preview was shown."""
    samples: Tensor = field(default_factory=lambda: torch.zeros(0))
    """The finished samples, and zeros for the others; empty until the first is finished or shown."""

    def cancel(self) -> None:
        """Give the samples up: their slots are free at the next step. Too late once they are drawn."""
        self.future.cancel()

    @property
    def missing(self) -> int:
        """How many of the samples wait for a slot."""
        return len(self.seeds) - self.admitted

    @property
    def share(self) -> float:
        """Share of the steps that are taken."""
        return self.taken / (len(self.seeds) * self.steps)

    @property
    def due(self) -> bool:
        """Whether it is time for a preview: its k previews lie between k + 1 equal parts of its work."""
        return self.share < 1 and int(self.share * (self.previews + 1)) > self.shown

    def keep(self, numbers: list[int], samples: Tensor) -> None:
        """Take the samples with these numbers."""
        if not len(self.samples):
            self.samples = samples.new_zeros(len(self.seeds), *samples.shape[1:])
        self.samples[numbers] = samples
        self.drawn += len(numbers)

    def preview(self, numbers: list[int], samples: Tensor) -> Preview:
        """Picture what there is, with what the samples with these numbers are so far."""
        self.shown = int(self.share * (self.previews + 1))
        self.keep([], samples[:0])
        picture = self.samples.clone()
        picture[numbers] = samples
        return Preview(self.share, picture)


class Turns:
    """Jobs that wait. Its owner sees to it that one thread at a time uses it."""

    def __init__(self) -> None:
        # The client whose turn is next comes first, and so do its jobs.
        self._clients: dict[str, deque[Job]] = {}
        self.samples = 0
        """How many samples wait."""
        self.steps = 0
        """How many steps they will take."""

    def add(self, job: Job) -> None:
        """Line a job up behind the others of its client, or its client behind the other clients."""
        self._clients.setdefault(job.client, deque()).append(job)
        self._count(job, job.missing)

    def remove(self, job: Job) -> None:
        """Take out what still waits of a job, if anything does."""
        if job.missing:
            self._clients[job.client].remove(job)
            if not self._clients[job.client]:
                del self._clients[job.client]
            self._count(job, -job.missing)
            job.admitted = len(job.seeds)

    def jobs(self) -> list[Job]:
        """List the jobs of which something waits."""
        return [job for jobs in self._clients.values() for job in jobs]

    def take(self, room: int) -> list[tuple[Job, range]]:
        """Admit as many samples as there is room for: jobs, and the numbers of their samples."""
        counts: dict[Job, int] = {}
        while room and self._clients:
            job = self._turn()
            counts[job] = counts.get(job, 0) + 1
            room -= 1
        return [(job, range(job.admitted - count, job.admitted)) for job, count in counts.items()]

    def _turn(self) -> Job:
        """Admit a sample of the job whose turn it is; what it has left, and its client, go to the back."""
        client = next(iter(self._clients))
        jobs = self._clients.pop(client)
        job = jobs.popleft()
        job.admitted += 1
        self._count(job, -1)
        if job.missing:
            jobs.append(job)
        if jobs:
            self._clients[client] = jobs
        return job

    def _count(self, job: Job, samples: int) -> None:
        self.samples += samples
        self.steps += samples * job.steps
