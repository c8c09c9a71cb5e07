"""Several runs for one command: every family with every seed, as many at a time as the cluster has room for.

Each run is a driver of its own, `python -m jobs.train` with one family and one seed: what diverges, crashes
or is killed is that run alone. To Ray they are separate trainers, and one without room waits in its queue.
"""

import asyncio
import os
import re
import secrets
import signal
import statistics
import sys
import time
from argparse import ArgumentParser
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import groupby, product
from typing import TextIO

from gdl_ray.evaluate.metrics import BITS_PER_DIM
from gdl_ray.families import FAMILIES
from gdl_ray.train.validation import SCORE
from jobs.cluster import places, whole_nodes

_DRIVER = (sys.executable, "-m", "jobs.train")
_REGISTERED = re.compile(r"jobs\.train: (?P<model>\S+) version (?P<version>\d+) \(.*?\)(?P<scores>.*)")
_ERROR = re.compile(r"[\w.]+(: |$)")  # `jobs.train: ...`, `ValueError: ...`; nothing that Ray adds for others
_KEPT_LINES = 1000  # of the end of a run's output: its outcome is among them
_LONGEST_LINE_BYTES = 2**24
_GRACE_S = 2.0  # `ray job stop` kills what has not ended after three


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a sweep."""

    family: str
    seed: str
    """As the command line has it."""
    name: str
    """In storage and in MLflow; what resumes it."""
    arguments: tuple[str, ...]
    """The command line that `jobs.train` has for it."""

    @property
    def label(self) -> str:
        """What the sweep calls it."""
        return f"{self.family}-{self.seed}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a run."""

    failure: str = "not started"
    """Why there is no model; empty if there is one."""
    seconds: float = 0.0
    """Time from its start to its end."""
    version: str = "-"
    """The registered version, as `digits-vae 3`."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Bits per dimension, by names that say what they are, where the family has a likelihood."""


def expand(arguments: Sequence[str]) -> list[Run]:
    """Make one command line for each family and seed; every family's first seed comes before any second one.

    Returns:
        The runs of a sweep; none if the command line asks for a single run.
    """
    known = ArgumentParser(prog="python -m jobs.train", add_help=False, allow_abbrev=False)
    known.add_argument("--seed", nargs="+", action="extend", default=[])
    known.add_argument("--name")
    given, rest = known.parse_known_args(arguments)
    words = [*rest, *given.seed]  # `--seed 0 1 vae` says as much as `vae --seed 0 1`
    families = [word for word in dict.fromkeys(words) if word in FAMILIES]
    seeds = [word for word in dict.fromkeys(given.seed) if word not in FAMILIES] or ["0"]
    if len(families) * len(seeds) < 2:
        return []
    name = given.name or f"sweep-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    common = [word for word in rest if word not in FAMILIES]
    return [
        Run(family, seed, own := f"{name}-{family}-{seed}", (family, *common, "--seed", seed, "--name", own))
        for seed, family in product(seeds, families)
    ]


def room(each: Mapping[str, float], workers: int) -> int:
    """Tell how many runs the cluster can hold at once, at least one.

    Args:
        each: Ray resources of a worker.
        workers: the least that a run needs.
    """
    return max(1, places(each, whole_nodes()) // workers)


def sweep(runs: Sequence[Run], has_room_for: Callable[[], int]) -> int:
    """Do the runs, show what they print, and sum them up.

    SIGTERM and SIGINT end the runs that go on; the others are not started.

    Args:
        runs: as `expand` makes them, and checked.
        has_room_for: tells how many may go on at once; asked again whenever one ends.

    Returns:
        The exit code: 1 if any run has no model; 128 and the number of the signal, if one has ended them.
    """
    name = runs[0].name.removesuffix(f"-{runs[0].label}")
    print(f"jobs.train: sweep {name}: {len(runs)} runs, {has_room_for()} at a time", flush=True)
    drivers = _Drivers(runs)
    outcomes = asyncio.run(drivers.drive(has_room_for))
    print(f"\n{table(outcomes)}\n", flush=True)
    failed = sum(bool(outcome.failure) for outcome in outcomes.values())
    print(f"jobs.train: sweep {name}: {len(runs) - failed} of {len(runs)} runs succeeded", flush=True)
    if failed:
        print(f"  the same command with --name {name} goes on with the rest", flush=True)
    return 128 + drivers.stopped_by if drivers.stopped_by else int(failed > 0)


class _Drivers:
    """The processes of a sweep's runs."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self._outcomes = {run: Outcome() for run in runs}
        self._waiting = deque(runs)
        self._processes: set[Process] = set()
        self.stopped_by: signal.Signals | None = None  # if one came
        self._margin = max(len(run.label) for run in runs)

    async def drive(self, has_room_for: Callable[[], int]) -> dict[Run, Outcome]:
        """Start each run when there is room; returns when all that were started are over."""
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._stop, number)
        going: set[asyncio.Task[None]] = set()
        while self._waiting or going:
            while self._waiting and len(going) < has_room_for():
                going.add(asyncio.create_task(self._do(self._waiting.popleft())))
            over, going = await asyncio.wait(going, return_when=asyncio.FIRST_COMPLETED)
            for task in over:
                task.result()
        return self._outcomes

    def _stop(self, number: signal.Signals) -> None:
        """Pass a signal on, start nothing more, and tell how far it came if the end is long in coming."""
        self.stopped_by = number
        asyncio.get_running_loop().call_later(
            _GRACE_S, lambda: print(f"\n{table(self._outcomes)}\n", flush=True)
        )
        self._waiting.clear()
        for process in self._processes:
            with suppress(ProcessLookupError):
                process.send_signal(number)

    async def _do(self, run: Run) -> None:
        self._outcomes[run] = Outcome("has not ended")
        begin_s = time.monotonic()
        env = os.environ | {"PYTHONUNBUFFERED": "1"}  # what it has printed is here when it is killed
        command = (*_DRIVER, *run.arguments)
        process = await asyncio.create_subprocess_exec(
            *command, env=env, stdin=DEVNULL, stdout=PIPE, stderr=PIPE, limit=_LONGEST_LINE_BYTES
        )
        self._processes.add(process)
        if self.stopped_by:  # it came while the process did
            process.send_signal(self.stopped_by)
        prefix = f"{run.label:<{self._margin}} | "
        pipes = ((process.stdout, sys.stdout), (process.stderr, sys.stderr))
        said, complained = await asyncio.gather(*(_show(pipe, prefix, to) for pipe, to in pipes))
        code = await process.wait()
        self._processes.discard(process)
        self._outcomes[run] = self._outcome(code, time.monotonic() - begin_s, said, complained)

    def _outcome(self, code: int, seconds: float, said: Sequence[str], complained: Sequence[str]) -> Outcome:
        """Read what became of a run from its exit code and the ends of its stdout and stderr."""
        registered = next(filter(None, map(_REGISTERED.match, reversed(said))), None)
        if code == 0 and registered:
            scores = re.findall(r"(\S+/bits_per_dim\w*) (\S+)", registered["scores"])
            version = f"{registered['model']} {registered['version']}"
            return Outcome("", seconds, version, {name: float(value) for name, value in scores})
        if self.stopped_by:
            return Outcome(f"stopped by {self.stopped_by.name}", seconds)
        return Outcome(_failure(code, complained), seconds, "failed")


async def _show(pipe: asyncio.StreamReader | None, prefix: str, to: TextIO) -> list[str]:
    """Print every line of a run behind its label; returns the last ones."""
    last: deque[str] = deque(maxlen=_KEPT_LINES)
    while pipe and (line := await pipe.readline()):
        last.append(line.decode(errors="replace").rstrip())
        print(f"{prefix}{last[-1]}", file=to, flush=True)
    return list(last)


def _failure(code: int, complained: Sequence[str]) -> str:
    """Tell in a line why a run failed: the signal that ended it, or the last thing that it said of errors."""
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    errors = [line for line in complained if _ERROR.match(line)]
    return [f"exit code {code}, and no model", *errors][-1].removeprefix("jobs.train: ")


def table(outcomes: Mapping[Run, Outcome]) -> str:
    """Lay out what became of the runs, by family and seed; several seeds with mean and standard deviation."""
    rows = [["run", "version", SCORE, "test bits/dim", "seconds", ""]]
    ordered = sorted(outcomes, key=lambda run: (run.family, int(run.seed)))
    for family, runs in groupby(ordered, key=lambda run: run.family):
        members = {run.label: outcomes[run] for run in runs}
        rows += [[label, each.version, *_figures([each]), each.failure] for label, each in members.items()]
        succeeded = [each for each in members.values() if not each.failure]
        if len(succeeded) > 1:
            rows.append([family, f"mean of {len(succeeded)}", *_figures(succeeded), ""])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(_line(row, widths) for row in rows)


def _figures(outcomes: Sequence[Outcome]) -> list[str]:
    """Write the scores, where all have them, and the seconds: means and deviations if there are several."""
    name = next((name for name in BITS_PER_DIM if name in outcomes[0].scores), "")
    kind = name.removeprefix("test/bits_per_dim_").replace("_", " ")
    shown = [_scores(SCORE, outcomes), f"{_scores(name, outcomes)} {kind}".strip()]
    return [*shown, _mean([each.seconds for each in outcomes], 0)]


def _scores(name: str, outcomes: Sequence[Outcome]) -> str:
    values = [each.scores[name] for each in outcomes if name in each.scores]
    return _mean(values, 4) if len(values) == len(outcomes) else "-"


def _mean(values: Sequence[float], digits: int) -> str:
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Pad the cells of a row: figures to the right, words to the left."""
    padded = [f"{cell:{side}{width}}" for cell, side, width in zip(cells, "<<>>><", widths, strict=True)]
    return "  ".join(padded).rstrip()
