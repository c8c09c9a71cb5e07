"""Draw any number of samples of a registered model on the whole cluster, in shards.

ray job submit --working-dir . -- python -m jobs.sample digits-vae -n 50000 --out s3://bucket/digits

    request.json        what was asked for, written first
    shard-00000.npz     samples, and of each its seed and its label: np.load(file)["samples"]
    manifest.json       the request, and the sha256 sum of every shard, written last

The samples are those that the service draws of the same version for the same seeds. A job that was cut short
goes on when the same command is submitted again.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from gdl_ray import registry, tracking
from gdl_ray.family import Family, Option
from gdl_ray.train.store import Store, patiently
from jobs.cluster import TimeoutExpired, connect, wait_for_room
from jobs.models import open_model, resolve
from jobs.options import UsageError, open_store, seconds
from jobs.shards import BALANCED, REQUEST, Draw, SamplingError, Shard, draw_shard, shard_name
from jobs.tasks import Tasks

MAX_SHARDS = 100_000
"""Most shards of a draw; their names have five digits."""
TELL_S = 1.0
"""Least seconds between two lines of progress."""
MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """A draw, where it goes, and who does it."""

    draw: Draw
    store: Store
    tasks: Tasks


def parse(arguments: Sequence[str]) -> Work:
    """Read the command line, and refuse what cannot be done.

    Raises:
        UsageError: naming the option, its value and the cure.
        RegistryUnavailable: if MLflow does not answer.
    """
    given, rest = _parser().parse_known_args(arguments)
    for name, least in (("n", 1), ("shard", 1), ("workers", 0), ("seed", 0)):
        if getattr(given, name) < least:
            dashes = "-" if len(name) == 1 else "--"
            raise UsageError(f"{dashes}{name} {getattr(given, name)} must be at least {least}")
    if given.seed >= 2**53:
        raise UsageError(f"--seed {given.seed} must be below 2**53")
    store = open_store(given.out, "--out")
    if given.timeout:
        seconds("timeout", given.timeout)
    tracking.check()
    model, version = resolve(given.model)
    family = open_model(model, version)
    draw = Draw(
        model=model,
        version=version,
        n=given.n,
        seed=given.seed,
        labels=_labels(given.labels, family.spec.classes),
        options=_options(rest, family),
        shard=given.shard,
        shape=family.spec.shape,
        classes=family.spec.classes,
    )
    if draw.shards > MAX_SHARDS:
        raise UsageError(f"--shard {given.shard} makes {draw.shards:,} shards: make them larger")
    tasks = Tasks(job="jobs.sample", workers=given.workers, gpu=given.gpu, timeout=given.timeout)
    return Work(draw=draw, store=store, tasks=tasks)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.sample",
        description="Draw any number of samples of a registered model on the whole cluster, in shards.",
        epilog="Besides, the model's own options, such as --steps or --guidance.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model", help="registered model: NAME for its champion, NAME@3 for a version, NAME@ALIAS")
    add("-n", type=int, required=True, help="how many samples")
    add("--out", required=True, help="a folder that all nodes see, or an address as s3://bucket/folder")
    add("--seed", type=int, default=0, help="decides all samples, in [0, 2**53 - 1] (default: 0)")
    add("--labels", default="none", help="none, a class, or balanced: every class in turn (default: none)")
    add("--shard", type=int, default=1000, help="samples in a shard (default: 1000)")
    add("--workers", type=int, default=0, help="most at a time (default: as many as there is room for)")
    add("--gpu", action="store_true", help="give each worker a GPU")
    add("--timeout", default="", help="wait so long for room for a worker, as 60s, 10min or 2h")
    return parser


def _labels(asked: str, classes: int) -> str:
    is_class = re.fullmatch(r"\d{1,9}", asked, re.ASCII) and int(asked) < classes
    if asked == "none" or is_class or (asked == BALANCED and classes):
        return asked
    known = (
        f"none, {BALANCED} or a class from 0 to {classes - 1}"
        if classes
        else "none: the model has no classes"
    )
    raise UsageError(f"--labels {asked}: write {known}")


def _options(arguments: Sequence[str], family: Family) -> dict[str, float]:
    """Read the model's own options; what is left out has its default."""
    sampler = family.sampler()
    parser = argparse.ArgumentParser(
        prog="python -m jobs.sample", usage=_usage(sampler.options), allow_abbrev=False
    )
    for name in sampler.options:
        parser.add_argument(f"--{name}", type=float, default=argparse.SUPPRESS)
    try:
        return sampler.settle(vars(parser.parse_args(arguments)))
    except ValueError as error:
        raise UsageError(f"--{error}") from error


def _usage(options: Mapping[str, Option]) -> str:
    ranges = (f"[--{name} {one.least:g}..{one.most:g}]" for name, one in options.items())
    return f"%(prog)s MODEL -n N --out OUT ... {' '.join(ranges)}"


def run(work: Work) -> None:
    """Draw all shards, and write the manifest.

    Raises:
        UsageError: the folder has another draw.
        SamplingError: a shard could not be drawn, or the manifest not be written.
        TimeoutExpired: there was no room in time.
    """
    _claim(work.store, work.draw)
    wait_for_room(work.tasks)
    progress = _Progress(work.draw)
    sums: dict[str, str] = {}
    for shard in _drawn(work):
        sums[shard_name(shard.number)] = shard.sha256
        progress.tell(shard)
    manifest = work.draw.record | {"shards": dict(sorted(sums.items()))}
    try:
        patiently(partial(work.store.write_json, MANIFEST, manifest))
    except OSError as error:
        raise SamplingError(
            f"all shards are written, but not {work.store.path(MANIFEST)}: {error}"
        ) from error
    print(
        f"jobs.sample: {work.draw.n:,} samples in {len(sums):,} shards, {work.store.path(MANIFEST)}",
        flush=True,
    )


def _claim(store: Store, draw: Draw) -> None:
    """Note down what is drawn, unless it was before; of two jobs that do so at once, one is refused.

    Raises:
        UsageError: the folder has another draw, or cannot be written.
    """
    wanted = draw.record
    try:
        store.create()
        if store.read(REQUEST) is None:
            store.write_first(REQUEST, json.dumps(wanted, indent=2).encode())
        before = store.read_json(REQUEST)
    except OSError as error:
        raise UsageError(f"--out {store.address}: {error}") from error
    except ValueError:
        before = None
    if not isinstance(before, dict) or before.keys() != wanted.keys():
        raise UsageError(
            f"--out {store.address}: {store.path(REQUEST)} is not the request of a draw: "
            f"delete it, or choose another place"
        )
    for name in wanted:
        if before[name] != wanted[name]:
            raise UsageError(
                f"--out {store.address} has a draw of {name}={before[name]}, not {wanted[name]}: "
                f"ask for the same to go on with it, or choose another place"
            )


def _drawn(work: Work) -> Iterator[Shard]:
    """Have shards drawn, as many at a time as there is room for, and yield each when it is written."""
    remote = work.tasks.remote(draw_shard)
    numbers = iter(range(work.draw.shards))
    pending: list[Any] = []
    while True:
        while len(pending) < work.tasks.room() and (number := next(numbers, None)) is not None:
            pending.append(remote.remote(work.draw, number, work.store.address, work.tasks.device))
        if not pending:
            return
        ended, pending = ray.wait(pending, num_returns=1)
        try:
            yield ray.get(ended[0])
        except RayError as error:
            cause = error.cause if isinstance(error, RayTaskError) else error
            told = (
                str(cause) if isinstance(cause, SamplingError) else f"a shard could not be drawn: {cause!r}"
            )
            raise SamplingError(told) from error


class _Progress:
    """Prints how far a draw is."""

    def __init__(self, draw: Draw) -> None:
        self._draw = draw
        self._told = time.monotonic()
        self._begin = 0.0  # when the first shard was drawn: until then, workers start
        self._done = self._drawn = 0

    def tell(self, shard: Shard) -> None:
        """Count a shard; print a line if it is time to."""
        self._done += self._draw.size(shard.number)
        now = time.monotonic()
        if self._begin:
            self._drawn += shard.drawn
        elif shard.drawn:
            self._begin = now
        is_last = self._done == self._draw.n
        if now - self._told < TELL_S and not is_last:
            return
        self._told = now
        share = f"{self._done:,} of {self._draw.n:,}  {self._done / self._draw.n:4.0%}"
        speed = ""
        if self._drawn:
            rate = self._drawn / (now - self._begin)
            speed = f"  {rate:,.0f} samples/s  {(self._draw.n - self._done) / rate:,.0f} s left"
        print(f"jobs.sample: {share}{speed}", flush=True)


def main(arguments: Sequence[str]) -> int:
    """Run the job; returns its exit code: 2 if it was asked for what cannot be done."""
    try:
        work = parse(arguments)
        connect(work.tasks)
        run(work)
    except (UsageError, registry.RegistryUnavailable) as error:
        print(f"jobs.sample: {error}", file=sys.stderr)
        return 2
    except (SamplingError, TimeoutExpired) as error:
        print(f"jobs.sample: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
