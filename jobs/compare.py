"""Train every family on the same data under one budget, measure all, and say which is good at what.

ray job submit --working-dir . -- python -m jobs.compare --data digits --budget 60s

A comparison is a parent run in MLflow, with the runs of its families as children, and its tables, page and
picture as artifacts. One that was cut short goes on when the same command is submitted again with its
`--name`: what is trained is not trained again, and what is measured not measured again.
"""

import argparse
import json
import math
import os
import secrets
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from gdl_ray import registry, tracking
from gdl_ray.data import Dataset, training_batch
from gdl_ray.evaluate.baselines import independent
from gdl_ray.evaluate.classifier import Classifier
from gdl_ray.evaluate.efficiency import step_flops
from gdl_ray.evaluate.protocol import Subject, sample_metrics
from gdl_ray.families import FAMILIES, build
from gdl_ray.random import fold
from gdl_ray.train.checkpoint import git_commit
from gdl_ray.train.task import RUN_FILE
from gdl_ray.train.validation import sample_grid
from jobs import options as training
from jobs.classifier import found_or_fitted
from jobs.cluster import TimeoutExpired, connect
from jobs.evaluate import Evaluation, EvaluationError, Work, curve, evaluate, prepare, quality_metrics
from jobs.figure import picture
from jobs.models import open_model
from jobs.options import Options, UsageError
from jobs.report import Entry, markdown, page, picks, text
from jobs.sweep import Run, room, sweep
from jobs.tasks import Tasks

PARENT_FILE = "comparison.json"
"""In the store of runs: which MLflow run is the parent."""

_SIGNALLED = 128  # an exit code above it is that of a signal
_ENDS = ("--budget", "--examples", "--steps")


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """What is compared, and how."""

    name: str
    budget: str
    """As people read it."""
    runs: Sequence[Run]
    options: Sequence[Options[Any]]
    """Of each run."""
    dataset: Dataset
    work: Work
    """How models are measured; its quality is 0 where that which all families reach is meant."""

    @property
    def params(self) -> dict[str, str]:
        """What the parent run says of it."""
        families = dict.fromkeys(run.family for run in self.runs)
        seeds = dict.fromkeys(run.seed for run in self.runs)
        return {"families": " ".join(families), "seeds": " ".join(seeds), "budget": self.budget}


def parse(arguments: Sequence[str]) -> Comparison:
    """Read the command line; what is no option of a comparison is one of `jobs.train`, for every run.

    Raises:
        UsageError: naming the option, its value and the cure.
    """
    given, rest = _parser().parse_known_args(arguments)
    families = list(dict.fromkeys(given.families))
    if unknown := [family for family in families if family not in FAMILIES]:
        raise UsageError(f"--families {' '.join(unknown)}: choose from {', '.join(FAMILIES)}")
    if len(families) < 2:
        raise UsageError(f"--families {' '.join(families)}: name at least two to compare")
    for name, least in (("seeds", 1), ("flops", 0), ("quality", 0), ("usd_per_hour", 0)):
        if not least <= getattr(given, name) < math.inf:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(given, name)} must be {least} or more")
    if any(word.partition("=")[0] == "--seed" for word in rest):
        raise UsageError(
            "--seed is for one run: a comparison takes --seeds, the number of runs of each family"
        )
    if given.flops and (other := [word for word in rest if word.partition("=")[0] in _ENDS]):
        raise UsageError(f"--flops {given.flops:g} and {other[0]} both say when to end: give one of them")
    name = given.name or f"compare-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    rest += ["--data", given.data, *(["--gpu"] if given.gpu else [])]
    runs = [
        _run(name, family, seed, given.flops, rest) for seed, family in product(range(given.seeds), families)
    ]
    options = [training.parse(run.arguments) for run in runs]
    checked = [training.check(each) for each in options]
    tasks = Tasks(job="jobs.compare", gpu=given.gpu, timeout=options[0].timeout)
    work = Work(quality=given.quality, usd_per_hour=given.usd_per_hour, tasks=tasks)
    budget = f"{given.flops:g} FLOPs" if given.flops else _budget(options[0])
    return Comparison(name=name, budget=budget, runs=runs, options=options, dataset=checked[0][1], work=work)


def _run(name: str, family: str, seed: int, flops: float, rest: Sequence[str]) -> Run:
    """Write the command line of one run."""
    own = f"{name}-{family}-{seed}"
    arguments = [family, *rest, "--seed", str(seed), "--name", own]
    if flops:
        arguments += ["--steps", str(_steps(arguments, flops))]
    return Run(family, str(seed), own, tuple(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.compare",
        description="Train families on the same data under the same budget, and measure all of them.",
        epilog="Besides, options of jobs.train but for a family's own: --budget 60s or --examples 100000, "
        "--workers 2, --size 2, --storage s3://bucket/runs and so on.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--data", default="digits", help="name of the dataset (default: digits)")
    add("--families", nargs="+", default=list(FAMILIES), help="which to compare (default: all)")
    add("--seeds", type=int, default=1, help="runs of each family, for mean and spread (default: 1)")
    add(
        "--flops",
        type=float,
        default=0,
        help="end training after so many, as 1e14, instead of --budget or --examples",
    )
    add(
        "--quality",
        type=float,
        default=0,
        help="validation bits/dim to reach (default: what all families reach)",
    )
    add("--usd-per-hour", type=float, default=0, help="price of a worker's device, for what that cost")
    add("--gpu", action="store_true", help="give each worker a GPU, in training and in measuring")
    add("--name", default="", help="of the comparison; that of one that was cut short goes on with it")
    return parser


def _budget(options: Options[Any]) -> str:
    """Say what ends training."""
    if options.budget:
        return f"{options.budget} of training"
    return f"{options.examples:,} examples" if options.examples else "each preset's own steps"


def _steps(arguments: Sequence[str], flops: float) -> int:
    """Count the steps of a family that take so many FLOPs, over all its phases, forward and backward."""
    options = training.parse(arguments)
    _, dataset = training.check(options)
    model = build(options.family, options.model, dataset.spec)
    size = options.optimization.batch_size
    batch = training_batch(dataset.splits["train"], seed=0, step=0, batch_size=size)
    return max(1, round(flops / step_flops(model, batch, model.phases)))


def run(comparison: Comparison) -> int:
    """Train, measure, and show; returns the exit code: 1 if a run has no model or could not be measured.

    Raises:
        UsageError: a comparison of that name compares something else.
        EvaluationError: nothing could be measured.
        TimeoutExpired: there was no room in time.
    """
    found = found_or_fitted(
        comparison.dataset, comparison.work.tasks
    )  # first: it is no child of the comparison
    parent, address = _parent(comparison)
    count = len(comparison.runs)
    print(
        f"jobs.compare: {comparison.name}: {comparison.budget} for each of {count} runs, {address}",
        flush=True,
    )
    os.environ[tracking.PARENT] = parent
    try:
        code = _train(comparison) or _show(comparison, found, parent, address)
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt | SystemExit)
        tracking.end_run(parent, "KILLED" if stopped else "FAILED")
        raise
    tracking.end_run(parent, "KILLED" if code > _SIGNALLED else "FAILED" if code else "FINISHED")
    return code


def _train(comparison: Comparison) -> int:
    """Train all runs; returns 128 and the number of the signal that ended them, or 0."""
    first = comparison.options[0]
    code = sweep(comparison.runs, partial(room, first.resources, first.least_places))
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(_SIGNALLED + number))
    return code if code > _SIGNALLED else 0


def _show(comparison: Comparison, found: tuple[Classifier, str], parent: str, address: str) -> int:
    """Measure all models, write the comparison, and print it; returns the exit code."""
    measured, quality = _measured(comparison, found)
    entries = _entries(measured, comparison, found)
    facts = _facts(comparison, measured, quality)
    _publish(parent, comparison.name, entries, facts)
    print(f"\n{text(entries)}\n", flush=True)
    for line in picks(entries):
        print(f"jobs.compare: {line}")
    print(f"  the page, with the picture: {address}/artifacts/comparison.html")
    print(f"  side by side: {tracking.comparison_page([each.id for each in measured])}", flush=True)
    return int(len(measured) < len(comparison.runs))


def _parent(comparison: Comparison) -> tuple[str, str]:
    """Start the parent run, or take up the one of that name; returns its id, and the address of its page.

    Raises:
        UsageError: that one compares something else.
    """
    store = comparison.options[0].store(comparison.name)
    runs = {
        run.label: options.decisive()
        for run, options in zip(comparison.runs, comparison.options, strict=True)
    }
    record = store.read_json(PARENT_FILE)
    if record and record["runs"] != runs:
        raise UsageError(
            f"--name {comparison.name}: that comparison was started with other families, seeds or options: "
            f"ask for the same to go on with it, or choose another name"
        )
    page = tracking.resume_run(record["mlflow_run"]) if record else None
    if record and page:
        return record["mlflow_run"], page
    tags = {"git_commit": git_commit(), "dataset_digest": comparison.dataset.digest}
    parent, page = tracking.start_parent(comparison.name, comparison.dataset, comparison.params, tags)
    store.create()
    store.write_json(PARENT_FILE, {"mlflow_run": parent, "runs": runs})
    return parent, page


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """A run of a comparison that has a model, and what it is worth."""

    run: Run
    id: str
    """Of the MLflow run."""
    evaluation: Evaluation
    curve: Sequence[tuple[float, float]]
    """Seconds of training, and bits/dim on the validation split."""


def _measured(comparison: Comparison, found: tuple[Classifier, str]) -> tuple[list[Measured], float]:
    """Measure the models that there are; also returns the quality to reach, 0 for none.

    Raises:
        EvaluationError: there are none.
    """
    measured = []
    for run, options in zip(comparison.runs, comparison.options, strict=True):
        run_id = (options.store(run.name).read_json(RUN_FILE) or {}).get("mlflow_run", "")
        name = registry.model_name(options.data, run.family)
        registered = registry.registered_by(run_id, name) if run_id else None
        try:
            if registered is None:
                raise EvaluationError("it has no model")
            evaluation = evaluated(name, registered[0].version, comparison.work, found)
        except EvaluationError as error:
            print(f"jobs.compare: {run.label} is left out: {error}", file=sys.stderr, flush=True)
        else:
            measured.append(Measured(run=run, id=run_id, evaluation=evaluation, curve=curve(run_id)))
    if not measured:
        raise EvaluationError("no run has a model that could be measured: nothing can be compared")
    quality = comparison.work.quality or common_quality([each.curve for each in measured])
    return [_priced(each, replace(comparison.work, quality=quality)) for each in measured], quality


def evaluated(name: str, version: int, work: Work, found: tuple[Classifier, str]) -> Evaluation:
    """Measure a version, unless it was before, by the same protocol."""
    subject = prepare(name, version, work, found)
    if record := registry.read_evaluation(name, version, subject.protocol.digest):
        print(f"{work.tasks.job}: {name}@{version} was measured before", flush=True)
        return Evaluation(**record)
    return evaluate(name, version, subject, work)


def common_quality(curves: Sequence[Sequence[tuple[float, float]]]) -> float:
    """Find the best bits/dim that all runs reach that report any; 0 if none does."""
    return max((min(bits for _, bits in each) for each in curves if each), default=0.0)


def _priced(measured: Measured, work: Work) -> Measured:
    """Add how soon a run reached a quality, and what that cost; its MLflow run is told too."""
    found = quality_metrics(measured.id, work)
    tracking.log_metrics(measured.id, found)
    # What an evaluation before has written was perhaps of another quality, at another price.
    kept = {name: value for name, value in measured.evaluation.metrics.items() if "_to_quality" not in name}
    return replace(measured, evaluation=replace(measured.evaluation, metrics=kept | found))


def _entries(
    measured: Sequence[Measured], comparison: Comparison, found: tuple[Classifier, str]
) -> list[Entry]:
    """Make the rows of the tables: families, and what to read them beside."""
    entries = []
    wanted = len({run.seed for run in comparison.runs})
    for family in dict.fromkeys(each.run.family for each in measured):
        seeds = [each for each in measured if each.run.family == family]
        first = seeds[0].evaluation
        entries.append(
            Entry(
                name=family if len(seeds) == wanted else f"{family} ({len(seeds)} of {wanted} seeds)",
                figures=[each.evaluation.metrics for each in seeds],
                versions=[f"{each.evaluation.model}@{each.evaluation.version}" for each in seeds],
                curve=seeds[0].curve,
                samples_png=sample_grid(open_model(first.model, first.version)),
            )
        )
    return [*entries, *references(prepare(first.model, first.version, comparison.work, found))]


def references(subject: Subject) -> list[Entry]:
    """Measure training images, and pixels that know nothing of each other, as if they were samples."""
    dataset, count = subject.dataset, subject.protocol.samples
    train, labels = dataset.splits["train"], torch.tensor(dataset.splits[subject.protocol.split].y[:count])
    rows = alike(torch.tensor(train.y), labels)
    if dataset.spec.counts is None:
        raise ValueError(f"{dataset.spec.name} was loaded without its counts")
    pixels = independent(dataset.spec.counts).sample(fold(7, torch.arange(count)))
    drawn = {
        "training images": torch.tensor(train.x)[rows],
        "independent pixels": pixels.view(count, *dataset.spec.shape),
    }
    return [
        Entry(name=name, figures=[sample_metrics(subject, x)], is_reference=True) for name, x in drawn.items()
    ]


def alike(y: Tensor, asked: Tensor) -> Tensor:
    """Choose rows of labels y, (N,), with the labels that are asked for, (M,): int64 (M,), no row twice."""
    shuffled = fold(7, torch.arange(len(y))).argsort()
    rows = torch.empty(len(asked), dtype=torch.int64)
    for label in range(int(asked.max()) + 1):
        places = (asked == label).nonzero().squeeze(1)
        rows[places] = shuffled[y[shuffled] == label][: len(places)]
    return rows


def _facts(comparison: Comparison, measured: Sequence[Measured], quality: float) -> dict[str, str]:
    """Say what holds for all figures."""
    dataset, protocol = comparison.dataset, measured[0].evaluation.protocol
    sizes = ", ".join(f"{len(split):,} {name}" for name, split in dataset.splits.items())
    trained = tracking.run_facts(measured[0].id).params  # perhaps by a command that had other workers
    device = "GPU" if trained["gpu"] == "True" else f"{trained['cpus']} CPU"
    seeds = len({each.run.seed for each in measured})
    against = f"{protocol['examples']:,} images of the {protocol['split']} split"
    missing = {run.label for run in comparison.runs} - {each.run.label for each in measured}
    return {
        "Data": f"{dataset.spec.name}, {sizes} examples, digest {dataset.digest[:16]}",
        "Training": f"{comparison.budget}, on {trained['workers']} x {device}, seeds: {seeds}",
        "Spread": "± is the standard deviation over seeds; of one seed, the standard error over examples",
        "Samples": f"{protocol['samples']:,}, against {against}, in the features of {protocol['extractor']}",
        "Quality to reach": (
            f"{quality:.3f} validation bits/dim, exact, bound or estimate as each family has it"
            if quality
            else "none"
        ),
        "Versions": ", ".join(each.evaluation.reference for each in measured),
    } | ({"Left out": ", ".join(sorted(missing))} if missing else {})


def _publish(parent: str, title: str, entries: Sequence[Entry], facts: Mapping[str, str]) -> None:
    """Write the comparison beside its parent run, and end that."""
    drawn = picture(title, entries)
    record = {"facts": dict(facts), "families": {entry.name: list(entry.figures) for entry in entries}}
    files = {
        "comparison.md": markdown(title, facts, entries).encode(),
        "comparison.html": page(title, facts, entries, drawn).encode(),
        "comparison.png": drawn,
        "comparison.json": json.dumps(record, indent=2).encode(),
    }
    tracking.log_files(parent, "", files)


def main(arguments: Sequence[str]) -> int:
    """Run the job; returns its exit code: 2 if it was asked for what cannot be done."""
    torch.set_num_threads(1)  # the same sums in the same order, on any machine
    try:
        comparison = parse(arguments)
        for options in comparison.options:
            connect(options)
        return run(comparison)
    except (UsageError, tracking.RegistryUnavailable, tracking.Refusal) as error:
        print(f"jobs.compare: {error}", file=sys.stderr)
        return 2
    except (EvaluationError, TimeoutExpired) as error:
        print(f"jobs.compare: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
