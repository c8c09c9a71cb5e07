"""Measure registered models by the protocol that all share, and write the figures beside them in MLflow.

ray job submit --working-dir . -- python -m jobs.evaluate digits-vae

The figures go to the run that trained a version, and onto the version, so that MLflow compares them. The
record, with the whole protocol, is an artifact of that run. The same version has the same figures each time,
but for those of speed, which are the machine's.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError

from gdl_ray import registry, tracking
from gdl_ray.data import load
from gdl_ray.evaluate.classifier import Classifier
from gdl_ray.evaluate.efficiency import seconds_to
from gdl_ray.evaluate.memory import nearest, neighbours_png
from gdl_ray.evaluate.metrics import METRICS, STANDARD_ERROR, standard_error
from gdl_ray.evaluate.protocol import (
    Findings,
    Subject,
    gather,
    pieces,
    protocol_of,
    summarize,
)
from gdl_ray.home import home
from gdl_ray.images import png_grid
from gdl_ray.train.validation import SCORE
from jobs.classifier import found_or_fitted
from jobs.cluster import TimeoutExpired, connect, wait_for_room
from jobs.models import open_model, resolve
from jobs.options import UsageError, seconds
from jobs.pieces import measure_piece
from jobs.report import written
from jobs.tasks import Tasks

SHOWN = 40
"""Samples that are pictured beside the training image that is nearest."""
TELL_S = 5.0
"""Least seconds between two lines of progress."""


class EvaluationError(Exception):
    """A piece could not be measured; nothing was written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """Who measures, and how much."""

    examples: int = 0
    """Of the test split; 0 for all, at most 10,000."""
    samples: int = 0
    """To draw; 0 for as many as examples."""
    quality: float = 0.0
    """Bits/dim on the validation split: how soon training reached it is told; 0 for none."""
    usd_per_hour: float = 0.0
    """Price of a worker's device; 0 for none."""
    tasks: Tasks


def parse(arguments: Sequence[str]) -> tuple[list[str], Work]:
    """Read the command line: references of models, and the rest.

    Raises:
        UsageError: naming the option, its value and the cure.
    """
    parser = argparse.ArgumentParser(
        prog="python -m jobs.evaluate",
        description="Measure registered models by one protocol, and write the figures beside them in MLflow.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="NAME for its champion, NAME@3 for a version, NAME@ALIAS")
    add("--examples", type=int, default=0, help="of the test split (default: all, at most 10,000)")
    add("--samples", type=int, default=0, help="to draw (default: as many as examples)")
    add("--quality", type=float, default=0.0, help="tell when training reached these validation bits/dim")
    add("--usd-per-hour", type=float, default=0.0, help="price of a worker's device, for what that cost")
    add("--workers", type=int, default=0, help="most at a time (default: as many as there is room for)")
    add("--gpu", action="store_true", help="give each worker a GPU")
    add("--timeout", default="", help="wait so long for room for a worker, as 60s, 10min or 2h")
    given = vars(parser.parse_args(arguments))
    models = given.pop("models")
    for name in ("examples", "samples", "quality", "usd_per_hour", "workers"):
        if given[name] < 0:
            raise UsageError(f"--{name.replace('_', '-')} {given[name]} must not be negative")
    by = {name: given.pop(name) for name in ("workers", "gpu", "timeout")}
    work = Work(**given, tasks=Tasks(job="jobs.evaluate", **by))
    if by["timeout"]:
        seconds("timeout", by["timeout"])
    return models, work


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """What a version was measured to be."""

    model: str
    version: int
    protocol: Mapping[str, Any]
    """Fields of the Protocol."""
    protocol_digest: str
    metrics: Mapping[str, float]

    @property
    def reference(self) -> str:
        """The version, as commands name it."""
        return f"{self.model}@{self.version}"


def prepare(name: str, version: int, work: Work, found: tuple[Classifier, str] | None = None) -> Subject:
    """Load a version, its data and the classifier, and choose the protocol.

    Args:
        name: of the registered model.
        version: its number.
        work: how much is to be measured.
        found: the classifier and its name, if it is at hand.

    Raises:
        UsageError: there is no such version, or it cannot be measured so.
        TimeoutExpired: there was no room to fit a classifier.
        RegistryUnavailable: MLflow does not answer.
    """
    model = open_model(name, version)
    try:
        dataset = load(model.spec.name, home() / "data")
        classifier, extractor = found or found_or_fitted(dataset, work.tasks)
        protocol = protocol_of(model, dataset, extractor, work.examples, work.samples)
    except ValueError as error:
        raise UsageError(f"{name}@{version} cannot be measured: {error}") from error
    return Subject(model, dataset, classifier, protocol)


def evaluate(name: str, version: int, subject: Subject, work: Work) -> Evaluation:
    """Measure a version on the cluster, and write what was found beside it.

    Raises:
        EvaluationError: a piece could not be measured.
        TimeoutExpired: there was no room in time.
        RegistryUnavailable: MLflow does not answer for ten minutes.
    """
    protocol = subject.protocol
    run_id = registry.run_of(name, version).id
    known = training_metrics(run_id) | quality_metrics(run_id, work)  # now: later, what was measured waits
    print(f"{work.tasks.job}: measuring {name}@{version} by protocol {protocol.digest}", flush=True)
    wait_for_room(work.tasks)
    found = gather(_found(name, version, subject, work))
    evaluation = Evaluation(
        model=name,
        version=version,
        protocol=asdict(protocol),
        protocol_digest=protocol.digest,
        metrics=summarize(subject, found) | known,
    )
    registry.write_evaluation(name, version, asdict(evaluation), _pictures(subject, found))
    return evaluation


def _found(name: str, version: int, subject: Subject, work: Work) -> Iterator[Findings]:
    """Have all pieces measured, as many at a time as there is room for; what is timed, after the rest."""
    remote = work.tasks.remote(measure_piece)
    shared = [ray.put(each) for each in (subject.classifier, subject.protocol)]
    start = partial(remote.remote, name, version, work.tasks.device, *shared)
    wanted = sorted(
        pieces(subject.model, subject.dataset, subject.protocol), key=lambda piece: piece.is_timed
    )
    progress = _Progress(work.tasks.job, len(wanted))
    found: dict[int, Findings] = {}
    pending: dict[Any, int] = {}
    for number, piece in enumerate(wanted):
        while pending and (piece.is_timed or len(pending) >= work.tasks.room()):
            _take(pending, found, progress)
        pending[start(piece)] = number
    while pending:
        _take(pending, found, progress)
    return (found[number] for number in range(len(wanted)))


def _take(pending: dict[Any, int], found: dict[int, Findings], progress: "_Progress") -> None:
    """Wait for a piece that is measured.

    Raises:
        EvaluationError: if it cannot be.
    """
    (ended,), _ = ray.wait(list(pending), num_returns=1)
    try:
        found[pending.pop(ended)] = ray.get(ended)
    except RayError as error:
        cause = error.cause if isinstance(error, RayTaskError) else error
        raise EvaluationError(f"a piece could not be measured: {cause!r}") from error
    progress.tell(len(found))


def _pictures(subject: Subject, found: Findings) -> dict[str, bytes]:
    """Picture samples, and beside some of them the training images that are nearest."""
    x, levels = found["samples"], subject.dataset.spec.levels
    train = torch.tensor(subject.dataset.splits["train"].x)
    return {
        "samples.png": png_grid(x[:100], levels),
        "nearest.png": neighbours_png(x[:SHOWN], train[nearest(train, x[:SHOWN])[1][:, 0]], levels),
    }


def training_metrics(run_id: str) -> dict[str, float]:
    """Read from a run how fast it trained."""
    clock = tracking.history(run_id, "seconds")
    if not clock:
        return {}
    step, _, seconds = clock[-1]
    batch_size = int(tracking.run_facts(run_id).params["optimization.batch_size"])
    return {"efficiency/examples_per_s": step * batch_size / seconds}


def quality_metrics(run_id: str, work: Work) -> dict[str, float]:
    """Read from a run how soon it was as good as asked, and what that cost; nothing if it never was."""
    reached_s = seconds_to(curve(run_id), work.quality) if work.quality else None
    if reached_s is None:
        return {}
    metrics = {"efficiency/seconds_to_quality": reached_s}
    if work.usd_per_hour:
        devices = int(tracking.run_facts(run_id).params["workers"].rpartition(":")[2])
        metrics["efficiency/usd_to_quality"] = devices * reached_s / 3600 * work.usd_per_hour
    return metrics


def curve(run_id: str) -> list[tuple[float, float]]:
    """Read what validation said of a run: seconds of training, and bits/dim; nothing without a likelihood."""
    clock = {step: seconds for step, _, seconds in tracking.history(run_id, "seconds")}
    return [(clock[step], bits) for step, _, bits in tracking.history(run_id, SCORE) if step in clock]


class _Progress:
    """Prints how far a measurement is."""

    def __init__(self, job: str, total: int) -> None:
        self._job, self._total = job, total
        self._told = time.monotonic()

    def tell(self, done: int) -> None:
        """Print a line if it is time to."""
        if time.monotonic() - self._told >= TELL_S:
            self._told = time.monotonic()
            print(f"{self._job}: {done} of {self._total} pieces  {done / self._total:4.0%}", flush=True)


def shown(evaluation: Evaluation) -> str:
    """Lay the figures of a version out, a line each, with their errors and units."""
    lines = []
    for name, value in evaluation.metrics.items():
        if not name.endswith(STANDARD_ERROR):
            error = evaluation.metrics.get(standard_error(name))
            lines.append(f"  {name:40} {written(value, error):>20}  {METRICS[name].unit}".rstrip())
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Run the job; returns its exit code: 2 if it was asked for what cannot be done."""
    torch.set_num_threads(1)  # the same sums in the same order, on any machine
    try:
        models, work = parse(arguments)
        tracking.check()
        versions = [resolve(model) for model in models]
        connect(work.tasks)
        for name, version in versions:
            evaluation = evaluate(name, version, prepare(name, version, work), work)
            print(f"{shown(evaluation)}\n  {registry.page(name, version)}", flush=True)
    except (UsageError, tracking.RegistryUnavailable, tracking.Refusal) as error:
        print(f"jobs.evaluate: {error}", file=sys.stderr)
        return 2
    except (EvaluationError, TimeoutExpired) as error:
        print(f"jobs.evaluate: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
