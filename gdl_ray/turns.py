"""The queue of a sampling engine: waiting jobs take free slots in turns.

A turn is one sample, and is charged its steps: the client who was charged the least is next, and of its jobs
the one that would end first if they all shared alike. Each ends no later than if they did, and small ones and
those that came first end much sooner. So a request of a thousand samples does not starve one of four, nor a
client's hundred requests another client's one, nor samples of a thousand steps those of ten.

Whoever joins starts at what one who had waited all along would have been charged: to have been away saves
nothing up, and a train of newcomers cannot hold up those who wait.

Of samples that take more than 100 steps a client holds at most 7/8 of the slots, so that others find room.

References:
    Demers, Keshav, Shenker. Analysis and Simulation of a Fair Queueing Algorithm. SIGCOMM 1989.
    https://doi.org/10.1145/75246.75248
    Friedman, Henderson. Fairness and Efficiency in Web Server Protocols. SIGMETRICS 2003.
    https://doi.org/10.1145/781027.781056
"""

import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

LONG = 100
"""A sample that takes more steps is long."""


@dataclass(frozen=True, eq=False, slots=True)
class Preview:
    """What a job looks like before it is done."""

    share: float
    """Share of its steps that are taken, in (0, 1)."""
    samples: Tensor
    """As the job's own, on the CPU: finished ones final, others as they are so far, zeros if not begun."""


@dataclass(eq=False, slots=True, weakref_slot=True)
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
    finish: float = 0.0
    """On its client's clock, when it would end if the client's jobs shared alike."""
    shown: int = 0
    """How many parts of the work had been done when the last preview was shown."""
    samples: Tensor = field(default_factory=lambda: torch.zeros(0))
    """The finished samples, and zeros for the others; empty until the first is finished or shown."""

    def cancel(self) -> None:
        """Give the samples up: their slots are free at the next step. Too late once they are drawn."""
        self.future.cancel()

    def settle(self, outcome: Tensor | Exception) -> None:
        """Resolve the future, unless that is done."""
        # The second is False if it is cancelled at this very moment.
        if self.future.done() or not self.future.set_running_or_notify_cancel():
            return
        if isinstance(outcome, Exception):
            self.future.set_exception(outcome)
        else:
            self.future.set_result(outcome)

    @property
    def long(self) -> bool:
        """Whether its samples are long."""
        return self.steps > LONG

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


_Entry = tuple[float, int, Job]
"""A job in a heap, after its charge and the number of its last turn."""


@dataclass(eq=False, slots=True)
class _Client:
    """Whoever asks, and the jobs of it that wait."""

    charged: float
    """What it pays for its turns, in steps, on the clock of all clients."""
    turn: int
    """Number of its last turn, or of its joining: among equals, whoever waits longest is next."""
    samples: int = 0
    """How many of its samples wait."""
    clock: float = 0.0
    """Steps that each of its jobs would have taken by now, if they shared alike."""
    lines: tuple[list[_Entry], ...] = field(default_factory=lambda: ([], []))
    """Heaps of its jobs, the next one first: of short ones and of long ones."""

    @property
    def jobs(self) -> list[Job]:
        return [job for line in self.lines for _, _, job in line]

    @property
    def count(self) -> int:
        """How many of its jobs wait."""
        short, long = self.lines
        return len(short) + len(long)

    def line(self, long_too: bool) -> list[_Entry]:
        """Find the line whose first job is next; an empty one if there is none."""
        short, long = self.lines
        if not (long and long_too):
            return short
        return min(short, long) if short else long


class Turns:
    """Jobs that wait. Its owner sees to it that one thread at a time uses it."""

    def __init__(self) -> None:
        # Of those of whom nothing waits, the ones that paid ahead of the clock.
        self._clients: dict[str, _Client] = {}
        self._clock = 0.0
        self._turns = itertools.count()
        self.samples = 0
        """How many samples wait."""
        self.steps = 0
        """How many steps they will take."""

    def add(self, job: Job) -> None:
        """Line a job up among those of its client, or its client among the clients."""
        turn = next(self._turns)
        client = self._clients.setdefault(job.client, _Client(self._clock, turn))
        if not client.count:
            client.charged, client.turn = max(client.charged, self._clock), turn
        job.finish = client.clock + job.missing * job.steps
        heapq.heappush(client.lines[job.long], (job.finish, turn, job))
        self._count(client, job, job.missing)

    def remove(self, job: Job) -> None:
        """Take out what still waits of a job, if anything does."""
        if job.missing:
            client = self._clients[job.client]
            line = client.lines[job.long]
            line[:] = [entry for entry in line if entry[2] is not job]
            heapq.heapify(line)
            self._count(client, job, -job.missing)
            job.admitted = len(job.seeds)

    def jobs(self) -> list[Job]:
        """List the jobs of which something waits."""
        return [job for client in self._clients.values() for job in client.jobs]

    def waiting(self, name: str) -> int:
        """Count the samples of a client that wait."""
        return self._clients[name].samples if name in self._clients else 0

    def rivals(self, name: str) -> tuple[int, int]:
        """Count the clients of whom something waits and this client's jobs, were it to ask once more."""
        waiting = sum(client.samples > 0 for client in self._clients.values())
        jobs = self._clients[name].count if name in self._clients else 0
        return waiting + (not jobs), jobs + 1

    def take(self, slots: int, held: Sequence[Job]) -> list[tuple[Job, range]]:
        """Admit as many samples as there is room for: jobs, and the numbers of their samples.

        Args:
            slots: how many there are.
            held: whose the samples in them are.
        """
        room, most = slots - len(held), slots * 7 // 8
        long = Counter(job.client for job in held if job.long)
        counts: Counter[Job] = Counter()
        while room and (ready := self._ready({name for name, count in long.items() if count >= most})):
            client, line = min(ready, key=lambda each: (each[0].charged, each[0].turn))
            job = line[0][2]
            # One after another, unless the client is alone: then all at once, which is faster.
            least = min(room, most - long[job.client]) if job.long else room
            count = min(least, job.missing) if len(ready) == 1 else 1
            self._give(client, line, count, among=len(ready))
            long[job.client] += count * job.long
            counts[job] += count
            room -= count
        self._forget()
        return [(job, range(job.admitted - count, job.admitted)) for job, count in counts.items()]

    def _ready(self, full: set[str]) -> list[tuple[_Client, list[_Entry]]]:
        """List the clients of whom something may be admitted, of those who are `full` only what is short."""
        return [
            (client, line)
            for name, client in self._clients.items()
            if (line := client.line(long_too=name not in full))
        ]

    def _give(self, client: _Client, line: list[_Entry], count: int, among: int) -> None:
        """Admit samples of the first job of a line, and charge them."""
        job = line[0][2]
        self._count(client, job, -count)
        steps = count * job.steps
        self._clock += steps / among
        client.clock += steps / client.count
        client.charged += steps
        client.turn = next(self._turns)
        job.admitted += count
        if not job.missing:
            heapq.heappop(line)

    def _forget(self) -> None:
        """Keep no account of those who have gone, but for those who paid ahead while others waited."""
        kept = self._clients if self.samples else {}
        ahead = self._clock
        self._clients = {
            name: client for name, client in kept.items() if client.count or client.charged > ahead
        }

    def _count(self, client: _Client, job: Job, samples: int) -> None:
        client.samples += samples
        self.samples += samples
        self.steps += samples * job.steps
