"""Train a family on a dataset, register the best checkpoint, and say where to look.

ray job submit --working-dir . -- python -m jobs.train vae --data digits --workers 2

A run whose driver was killed goes on when the same command is submitted again with its `--name`. Several
families or seeds are several runs: `jobs.train vae gan --seed 0 1 2`. `jobs.train classifier --data digits`
fits the classifier that evaluations compare samples by.
"""

import os
import secrets
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import ray
import ray.train
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gdl_ray import registry, tracking
from gdl_ray.data import Dataset
from gdl_ray.evaluate import metrics
from gdl_ray.families import FAMILIES
from gdl_ray.family import Likelihood
from gdl_ray.home import home
from gdl_ray.train.checkpoint import git_commit, load_family
from gdl_ray.train.parallel import World
from gdl_ray.train.plan import Plan
from gdl_ray.train.store import Store, patiently
from gdl_ray.train.task import RUN_FILE, Task
from gdl_ray.train.validation import SCORE, split_nats
from gdl_ray.train.worker import FINAL, work
from jobs import classifier
from jobs.cluster import TimeoutExpired, connect, wait_for_room
from jobs.options import Options, UsageError, check, parse
from jobs.sweep import expand, room, sweep

_CLAIM_S = 30.0  # how long the processes of a killed driver may take to vanish
_RESIZE_S = 30.0  # how often an elastic run looks for more room
_FAREWELL_S = 10.0  # how long a stopped job waits for MLflow


class TrainingError(Exception):
    """Training ended without a model."""


@dataclass(frozen=True, slots=True)
class Run:
    """A run that this job holds: where its checkpoints are, and the actor that logs its metrics."""

    name: str
    store: Store
    id: str
    """Of the MLflow run."""
    log: Any
    record: Mapping[str, Any]
    """What `run.json` says."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """How the work of one group of workers ended."""

    has_ended: bool = False
    """Whether training has."""
    failed: bool = False
    """Whether something broke; if not, the workers were asked to leave, or never began."""
    cause: str = "a node is about to be taken away"


def start(options: Options[Any], dataset: Dataset) -> Run:
    """Start a run, or take up the one of that name; no other job may have it.

    Raises:
        UsageError: if another job trains it, or it was started to train something else.
    """
    name = options.name or _new_name(options)
    store = options.store(name)
    log = _claim(store)
    wanted = options.decisive() | {"dataset_digest": dataset.digest}
    record = _take_up(name, store, wanted)
    run_id = record["mlflow_run"]
    page = tracking.resume_run(run_id) if run_id else None
    if page is None:
        run_id, page = tracking.start_run(name, dataset, options.flat(), _tags(options, dataset))
        record |= {"mlflow_run": run_id}
        store.write_json(RUN_FILE, record)
    log.open.remote(run_id)
    last = max(store.saved(), default=None)
    print(f"jobs.train: run {name}{f' goes on after step {last.step}' if last else ''}, {page}", flush=True)
    return Run(name, store, run_id, log, record)


def _take_up(name: str, store: Store, wanted: dict[str, str]) -> dict[str, Any]:
    """Read what the store says of a run, or note down there what it is to be."""
    try:
        record: dict[str, Any] | None = store.read_json(RUN_FILE)
        if record is None:
            store.create()
            record = {"mlflow_run": "", "options": wanted, "is_finished": False}
            store.write_json(RUN_FILE, record)
    except OSError as error:
        raise UsageError(f"--storage {store.address}: {error}") from error
    _check_same(name, record["options"], wanted)
    return record


def _new_name(options: Options[Any]) -> str:
    """Make a name that no other run has, also of those started in the same second."""
    return f"{options.family}-{options.data}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def _claim(store: Store) -> Any:
    """Make the actor that logs a run: its name in the cluster says that the run is taken."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote: Any = ray.remote(tracking.Run)
    actor = remote.options(num_cpus=0, name=f"run {store.address}", scheduling_strategy=here)
    deadline = time.monotonic() + _CLAIM_S
    while True:
        try:
            return actor.remote(tracking.tracking_uri())
        except ValueError as error:
            if time.monotonic() > deadline:
                raise UsageError(
                    f"{store.address} is trained by another job now: choose another --name"
                ) from error
            time.sleep(1)


def _check_same(name: str, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    for option in sorted(before.keys() | now.keys()):
        if before.get(option) != now.get(option):
            raise UsageError(
                f"--name {name}: that run was started with {option}={before.get(option)}, not "
                f"{now.get(option)}: ask for the same to go on with it, or choose another name"
            )


def run(options: Options[Any], plan: Plan, dataset: Dataset) -> int:
    """Train, evaluate on the test split once, register; returns the exit code."""
    held = start(options, dataset)
    try:
        version, scores = _registered(held, options) or _train_and_register(held, options, plan, dataset)
    except (TrainingError, TimeoutExpired) as error:
        print(f"jobs.train: {error}", file=sys.stderr, flush=True)
        ray.get(held.log.finish.remote("FAILED"))
        return 1
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt | SystemExit)
        ray.get(held.log.finish.remote("KILLED" if stopped else "FAILED", _FAREWELL_S))
        raise
    print(_summary(version, scores), flush=True)
    if lost := ray.get(held.log.finish.remote()):
        print(f"  {lost} reports could not be logged")
    return 0


def _registered(held: Run, options: Options[Any]) -> tuple[registry.Version, dict[str, float]] | None:
    """Look up the version of a run that had come to its end before."""
    found = registry.registered_by(held.id, registry.model_name(options.data, options.family))
    if found and held.record["is_finished"]:
        print(f"jobs.train: run {held.name} is finished", flush=True)
        return found
    return None


def _train_and_register(
    held: Run, options: Options[Any], plan: Plan, dataset: Dataset
) -> tuple[registry.Version, dict[str, float]]:
    _fit(held, options, plan)
    best = patiently(held.store.best)
    if best is None:
        raise TrainingError(f"no whole checkpoint is left in {held.store.address}")
    print(f"jobs.train: the best checkpoint is {held.store.path(best.name)}", flush=True)
    with held.store.open(best.name) as directory:
        scores = _test_scores(directory, dataset)
        held.log.log_final.remote(scores)
        scores |= {SCORE: best.score} if issubclass(FAMILIES[options.family], Likelihood) else {}
        version = registry.register(held.id, directory, options.promote, scores)
    patiently(lambda: held.store.write_json(RUN_FILE, {**held.record, "is_finished": True}))
    return version, scores


def _fit(held: Run, options: Options[Any], plan: Plan) -> None:
    """Train to the end, on one group of workers after the other.

    Raises:
        TrainingError: if workers fail again and again, or training has failed for good.
        TimeoutExpired: if there is no room for workers.
    """
    failures, reached = 0, _reached(held.store)
    while True:
        wait_for_room(options)
        attempt = _attempt(held, options, plan)
        if attempt.has_ended:
            return
        before, reached = reached, max(reached, _reached(held.store))
        if attempt.failed:
            failures = failures + 1 if reached <= before else 1
        if failures > options.max_failures:
            raise TrainingError(
                f"workers failed {failures} times in a row after step {reached}; lastly:\n{attempt.cause}"
            )
        in_a_line = f"workers failed ({attempt.cause.splitlines()[-1]})" if attempt.failed else attempt.cause
        print(f"jobs.train: {in_a_line}; going on from step {reached}", flush=True)


def _reached(store: Store) -> int:
    """Step of the last checkpoint; 0 where there is none."""
    return max((saved.step for saved in patiently(store.saved)), default=0)


def _attempt(held: Run, options: Options[Any], plan: Plan) -> Attempt:
    """Train with one group of workers.

    Raises:
        TrainingError: if another group would fail in the same way.
    """
    task = Task(
        family=options.family,
        model=options.model,
        data=options.data,
        data_root=home() / "data",
        plan=plan,
        storage=held.store.address,
        keep=options.keep,
        validate_apart=options.validate_apart,
        gpu=options.gpu,
    )
    least, most = options.workers_range
    scaling: Any = {
        "num_workers": most if least == most else (least, most),
        "elastic_resize_monitor_interval_s": _RESIZE_S,
    }
    # One failure ends an attempt: whether there is another, and when, is decided here.
    failures: Any = {"controller_failure_limit": 0, "relax_collectives_on_preemption": True}
    quiet: Any = {"logging_config": ray.train.LoggingConfig(log_level="WARNING")}
    trainer: Any = TorchTrainer(
        work,  # type: ignore[arg-type]  # ray 2.60 annotates Train V1 and runs V2
        train_loop_config={"task": task, "run": held.log},
        scaling_config=ScalingConfig(use_gpu=options.gpu, resources_per_worker=options.resources, **scaling),
        run_config=RunConfig(
            name=held.name,
            storage_path=str(home() / "ray_train"),  # Ray Train wants one, and keeps nothing in it
            failure_config=FailureConfig(max_failures=0, **failures),
            **quiet,
        ),
    )
    try:
        return Attempt(has_ended=trainer.fit().return_value)
    except (ray.train.TrainingFailedError, RayError) as error:
        for failure in getattr(error, "worker_failures", {}).values():
            if isinstance(failure, FINAL):
                raise TrainingError(f"{failure}; {_kept(held.store)}") from error
        starting = getattr(error, "controller_failure", None)
        if type(starting).__name__ == "WorkerGroupStartupTimeoutError":  # others were faster: wait again
            return Attempt(cause="others took the room for workers")
        return Attempt(failed=True, cause=str(error).strip() or repr(error))


def _kept(store: Store) -> str:
    """Say where the last checkpoint is."""
    try:
        last = store.last()
    except OSError as error:
        return f"the storage does not answer now ({error})"
    return f"the last checkpoint is {store.path(last.name)}" if last else "nothing was saved"


def _test_scores(directory: Path, dataset: Dataset) -> dict[str, float]:
    """Evaluate a checkpoint on the test split."""
    model = load_family(directory)
    if not isinstance(model, Likelihood):
        return {}
    print(f"jobs.train: scoring it on the {len(dataset.splits['test']):,} test examples", flush=True)
    found = split_nats(model, dataset.splits["test"], World())
    nats, bits = metrics.nats(model.likelihood_kind), metrics.bits_per_dim(model.likelihood_kind)
    return {
        nats: found.mean,
        metrics.standard_error(nats): found.standard_error,
        bits: -dataset.spec.bits_per_dim(found.mean),
        metrics.standard_error(bits): dataset.spec.bits_per_dim(found.standard_error),
    }


def _tags(options: Options[Any], dataset: Dataset) -> dict[str, str]:
    kind = FAMILIES[options.family]
    return {
        "family": options.family,
        "density": kind.density,
        "likelihood": kind.likelihood_kind if issubclass(kind, Likelihood) else "none",
        "workers": options.workers,
        "device": "gpu" if options.gpu else "cpu",
        "git_commit": git_commit(),
        "dataset_digest": dataset.digest,
    }


def _summary(version: registry.Version, scores: Mapping[str, float]) -> str:
    is_champion = version.champion == version.version
    served = "champion" if is_champion else f"champion stays {version.champion}; --promote moves it"
    known = [name for name in (SCORE, *metrics.BITS_PER_DIM) if name in scores]
    shown = "  ".join(f"{name} {scores[name]:.4f}" for name in known)
    return f"jobs.train: {version.name} version {version.version} ({served})  {shown}\n  {version.page}"


def _prepare_ray_train() -> None:
    """Set what Ray Train reads from the environment of a driver."""
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # it would print what workers print again
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # how soon it sees that they are done
    os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "15")  # then look who has the room


def main(arguments: Sequence[str]) -> int:
    """Run the job; returns its exit code: 2 if it was asked for what cannot be done."""
    if arguments[:1] == [registry.CLASSIFIER]:
        return classifier.main(arguments[1:])
    _prepare_ray_train()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    try:
        runs = expand(arguments)
        asked = [parse(each.arguments) for each in runs] or [parse(arguments)]
        ready = [check(options) for options in asked]
        for options in asked:
            connect(options)
        if runs:
            return sweep(runs, partial(room, asked[0].resources, asked[0].least_places))
        return run(asked[0], *ready[0])
    except UsageError as error:
        print(f"jobs.train: {error}", file=sys.stderr)
        return 2


def _stop(number: int, _frame: FrameType | None) -> None:
    """End the job, after the run is told; `ray job stop` and a sweep may both ask."""
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, signal.SIG_IGN)
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
