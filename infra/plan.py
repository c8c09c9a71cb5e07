"""What the verbs tell: a plan, a status, a refusal; for people, and as records for `--json`."""

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

JOB = "workers=4,gpu=1,cpu=3"


class Refused(Exception):  # noqa: N818  (it is an answer)
    """The cloud, or the project for its user's sake, does not do it; the message has cause and cure."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a training job asks of a cluster: so many workers at once, and each of them so much."""

    workers: int = 1
    cpu: float = 1
    gpu: float = 0

    @classmethod
    def parse(cls, text: str) -> "Job":
        """Read a job as `workers=4,gpu=1,cpu=3`; what is left out is one worker, one CPU, no GPU.

        Raises:
            ValueError: It is not written so.
        """
        given: dict[str, float] = {}
        for part in text.split(","):
            match = re.fullmatch(r"\s*(workers|cpu|gpu)=(\d+(?:\.\d+)?)\s*", part)
            if not match or match[1] in given:
                raise ValueError(f"{text!r}: write a job as {JOB}")
            given[match[1]] = float(match[2])
        workers = given.pop("workers", 1.0)
        if workers < 1 or workers % 1:
            raise ValueError(f"{text!r}: workers={workers:g} must be a whole number, 1 at least")
        return cls(workers=int(workers), **given)

    def __str__(self) -> str:
        return f"workers={self.workers},cpu={self.cpu:g},gpu={self.gpu:g}"

    @property
    def bundles(self) -> list[dict[str, float]]:
        """What each worker needs, as Ray's placement groups have it."""
        each = {name: amount for name, amount in (("CPU", self.cpu), ("GPU", self.gpu)) if amount}
        return [each] * self.workers


@dataclass(frozen=True)
class Step:
    """Something that `up` is to do: what, in a line, and the call that does it."""

    what: str
    do: Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class NodePlan:
    """What is known of a kind of nodes before any runs."""

    name: str
    """`head`, or the name of the workers."""
    type: str
    market: str
    max: int
    zones: tuple[str, ...]
    """Zones that have it, in the order they are tried."""
    usd_per_hour: float | None
    """Price of one node; None where it could not be told."""
    quota: str = ""
    """Quota against need, such as `32 of 64 vCPUs (L-3819A6DF)`."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `up` would do."""

    steps: list[str]
    nodes: list[NodePlan]
    worst_usd_per_hour: float | None
    """Cost of an hour in which all nodes run."""
    image: str
    problems: list[str] = field(default_factory=list)
    """Why `up` would refuse, a line for each; empty where it would not."""
    fits: dict[str, str] = field(default_factory=dict)
    """Of each job that was asked about, which nodes it would get, or that it never fits."""

    def lines(self) -> list[str]:
        """Tell it to people."""
        rows = [
            (
                each.name,
                each.type,
                each.market,
                f"{each.max}",
                _usd(each.usd_per_hour),
                each.quota or "-",
                " ".join(each.zones),
            )
            for each in self.nodes
        ]
        return [
            *table(("nodes", "type", "market", "max", "$/h each", "quota", "zones"), rows),
            f"image  {self.image or '-'}",
            f"worst case  {_usd(self.worst_usd_per_hour)} $/h, with all nodes running",
            *(f"job {job}  {fit}" for job, fit in self.fits.items()),
            *(["steps"] if self.steps else ["nothing to do: all is as the stack says"]),
            *(f"  {step}" for step in self.steps),
            *(f"refused: {problem}" for problem in self.problems),
        ]


@dataclass(frozen=True, kw_only=True)
class Node:
    """A machine that exists."""

    name: str
    type: str
    zone: str
    state: str
    age_h: float
    usd: float | None
    """What it has cost so far; None where its price could not be told."""


@dataclass(frozen=True, kw_only=True)
class Status:
    """What of a stack exists."""

    nodes: list[Node]
    usd_so_far: float | None
    expires_at: str
    """When the last node ends itself, in ISO 8601; empty where none runs."""
    drift: list[str] = field(default_factory=list)
    """What is otherwise than the stack says; `up` mends it."""
    orphans: list[str] = field(default_factory=list)
    """What belongs to the stack and to nothing that runs; `down` ends it."""

    def lines(self) -> list[str]:
        """Tell it to people."""
        rows = [
            (each.name, each.type, each.zone, each.state, f"{each.age_h:.1f}", _usd(each.usd))
            for each in self.nodes
        ]
        return [
            *(table(("node", "type", "zone", "state", "age h", "$"), rows) if rows else ["no nodes"]),
            *([f"cost so far  {_usd(self.usd_so_far)} $"] if rows else []),
            *([f"ends itself  {self.expires_at}"] if self.expires_at else []),
            *(f"drift   {line}" for line in self.drift),
            *(f"orphan  {line}" for line in self.orphans),
        ]


def confirm(question: str, yes: bool) -> None:
    """Ask the person at the terminal, if there is need and one.

    Raises:
        Refused: The answer is no, or nobody is there to give one.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise Refused(f"nobody is there to ask {question!r}: give --yes to go on without")
    if input(f"{question} [y/N] ").strip().lower() not in ("y", "yes"):
        raise Refused("not confirmed: nothing was done")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Set rows of words in columns, under a head."""
    everything = [head, *rows]
    widths = [max(len(row[i]) for row in everything) for i in range(len(head))]
    return [
        "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip()
        for row in everything
    ]


def _usd(amount: float | None) -> str:
    return "?" if amount is None else f"{amount:.2f}"
