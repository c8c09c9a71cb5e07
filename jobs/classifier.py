"""Fit the classifier in whose features samples of a dataset are compared, and register it.

ray job submit --working-dir . -- python -m jobs.train classifier --data digits
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from torch import Tensor

from gdl_ray import registry, tracking
from gdl_ray.data import DATASETS, Dataset, load
from gdl_ray.evaluate.classifier import Classifier, fit_classifier
from gdl_ray.evaluate.fidelity import label_agreement
from gdl_ray.home import home
from gdl_ray.train.checkpoint import git_commit
from jobs import cluster
from jobs.cluster import connect, wait_for_room
from jobs.options import UsageError


@dataclass(frozen=True, slots=True)
class Demand:
    """What fitting a classifier asks of the cluster."""

    job: str = "jobs.train"
    timeout: str = ""
    """As --timeout has it."""
    timeout_s: float | None = None

    asked = "a classifier"
    least_places = 1

    @property
    def resources(self) -> dict[str, float]:
        """What Ray has to give."""
        return {"CPU": 1}


@dataclass(frozen=True, slots=True)
class Fitted:
    """A fitted classifier."""

    weights: dict[str, Tensor]
    accuracy: float
    """Share of test examples that it labels rightly."""
    seconds: float
    """That fitting took."""


def fit(name: str, root: Path, seed: int) -> Fitted:
    """Fit a classifier to a dataset, on one thread."""
    torch.set_num_threads(1)
    dataset = load(name, root)
    begin = time.monotonic()
    classifier = fit_classifier(dataset, seed)
    seconds = time.monotonic() - begin
    test = dataset.splits["test"]
    accuracy = label_agreement(classifier.predict(torch.tensor(test.x)), torch.tensor(test.y))
    return Fitted(classifier.state_dict(), accuracy, seconds)


def found_or_fitted(dataset: Dataset, job: cluster.Demand) -> tuple[Classifier, str]:
    """Find the registered classifier of a dataset; where there is none, fit and register one in a Ray task.

    Args:
        dataset: to fit it to.
        job: that needs it, and knows how long to wait for room.

    Returns:
        The classifier, and what names it in a protocol.

    Raises:
        UsageError: if the data are no images, or have no labels.
        TimeoutExpired: there was no room in time.
        RegistryUnavailable: if MLflow does not answer.
    """
    found = registry.extractor(dataset)
    if found is None:
        _check(dataset)
        _fit_and_register(dataset, 0, Demand(job.job, job.timeout, job.timeout_s))
        found = registry.extractor(dataset)
        assert found  # noqa: S101  (registered just now)
    return found


def _check(dataset: Dataset) -> None:
    try:
        Classifier(dataset.spec)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _fit_and_register(dataset: Dataset, seed: int, demand: Demand) -> None:
    """Fit in a Ray task, log a run, register a version, and say so."""
    name = registry.model_name(dataset.spec.name, registry.CLASSIFIER)
    tags = {"kind": registry.CLASSIFIER, "git_commit": git_commit(), "dataset_digest": dataset.digest}
    wait_for_room(demand)
    run_id, page = tracking.start_run(f"{name}-{seed}", dataset, {"seed": str(seed)}, tags)
    examples = len(dataset.splits["train"])
    print(f"{demand.job}: fitting {name} to {examples:,} examples, seed {seed}, {page}", flush=True)
    try:
        task: Any = ray.remote(fit)
        fitted: Fitted = ray.get(task.remote(dataset.spec.name, home() / "data", seed))
        classifier = Classifier(dataset.spec)
        classifier.load_state_dict(fitted.weights)
        scores = {"test/accuracy": fitted.accuracy}
        tracking.log_metrics(run_id, {**scores, "seconds": fitted.seconds})
        version, champion = registry.register_classifier(run_id, dataset, classifier, seed, scores)
    except BaseException:
        tracking.end_run(run_id, "FAILED")
        raise
    tracking.end_run(run_id)
    stays = "champion" if champion == version else f"champion stays {champion}"
    print(
        f"{demand.job}: {name} version {version} ({stays})  test/accuracy {fitted.accuracy:.4f}  "
        f"{classifier.fingerprint()}  {fitted.seconds:.1f} s",
        flush=True,
    )


def main(arguments: Sequence[str]) -> int:
    """Run the job; returns its exit code: 2 if it was asked for what cannot be done."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.train classifier",
        description="Fit the classifier in whose features samples are compared with data, and register it.",
        allow_abbrev=False,
    )
    parser.add_argument("--data", default="digits", choices=DATASETS, help="name of the dataset")
    parser.add_argument("--seed", type=int, default=0, help="decides its weights (default: 0)")
    given = parser.parse_args(arguments)
    try:
        tracking.check()
        dataset = load(given.data, home() / "data")
        _check(dataset)
        if version := registry.fitted_with(dataset, given.seed):
            name = registry.model_name(given.data, registry.CLASSIFIER)
            print(f"jobs.train: {name} version {version} is it: these data, seed {given.seed}", flush=True)
            return 0
        connect(Demand())
        _fit_and_register(dataset, given.seed, Demand())
    except (UsageError, ValueError, tracking.RegistryUnavailable) as error:
        print(f"jobs.train: {error}", file=sys.stderr)
        return 2
    return 0
