"""Train a family on a dataset, register the best checkpoint, and say where to look.

ray job submit --working-dir . -- python -m jobs.train vae --data digits --workers 2
"""

import logging
import os
import re
import secrets
import signal
import sys
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Generic, TypeVar

import ray
import ray.train
import tyro
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from gdl_ray import families, registry
from gdl_ray.data import DATASETS, Dataset, load
from gdl_ray.families import FAMILIES
from gdl_ray.family import Likelihood, Optimization, Preset
from gdl_ray.home import home
from gdl_ray.train.checkpoint import git_commit, load_family
from gdl_ray.train.loop import SCORE, Budget, Plan, split_nats
from gdl_ray.train.parallel import World
from gdl_ray.train.worker import Task, work

Model = TypeVar("Model")

MAX_SIZE = 16.0
"""Largest factor of a preset's width and depth; its weights grow with the third power."""

_UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0}


class UsageError(Exception):
    """What the user asked for cannot be done; the message says what to change."""


class TrainingError(Exception):
    """Training ended without a model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options(Generic[Model]):
    """Train a family of generative models on a dataset, and register the best checkpoint in MLflow."""

    family: tyro.conf.Positional[str]
    """Key of the family."""
    data: str = "digits"
    """Name of the dataset."""
    size: float = 1.0
    """Multiplies width and depth of the preset's network."""
    workers: int = 1
    """Ray Train workers; they share each batch."""
    cpus: int = 1
    """CPU cores per worker."""
    gpu: bool = False
    """Give each worker a GPU."""
    steps: int
    """End after so many optimizer steps, if neither --examples nor --budget is given."""
    examples: int = 0
    """End after so many examples; 0 for no such end."""
    budget: str = ""
    """End after so much time spent on steps, as 60s, 10min or 2h; validation and checkpoints do not count."""
    seed: int = 0
    """Decides initial weights, order of examples and all noise."""
    name: str = ""
    """Name of the run; made from family, data and the time if left out."""
    promote: bool = False
    """Make the new version champion even if there is one already. A first version always is."""
    report_every: int = 50
    """Steps between lines of metrics."""
    checkpoint_every: int = 250
    """Steps between checkpoints, each with a validation and samples."""
    patience: int = 10
    """Validations in a row without a better one, after which training ends."""
    max_failures: int = 3
    """How often workers may die before the job gives up; they go on from the last checkpoint."""
    model: Model
    """Configuration of the family."""
    optimization: Optimization
    """How it is trained."""

    @property
    def resources(self) -> dict[str, int]:
        """What Ray has to give each worker."""
        return {"CPU": self.cpus} | ({"GPU": 1} if self.gpu else {})


def parse(arguments: Sequence[str]) -> Options[Any]:
    """Read the command line; the defaults are the preset of its family and dataset.

    Raises:
        UsageError: if family or dataset are unknown.
    """
    pairs = zip(["", *arguments], arguments, strict=False)
    words = [word for before, word in pairs if word in FAMILIES and before != "--name"]
    family = words[0] if words else next(iter(FAMILIES))
    known = ArgumentParser(add_help=False, allow_abbrev=False)
    known.add_argument("--data", default="digits")
    known.add_argument("--size", default="1")
    given = known.parse_known_args(arguments)[0]
    preset = _preset(family, given.data, given.size)
    kind: Any = Options[FAMILIES[family].Config]  # type: ignore[misc]  # the command line decides the type
    options: Options[Any] = tyro.cli(
        kind,
        args=arguments,
        default=Options(
            family=tyro.MISSING,
            data=given.data,
            steps=preset.steps,
            model=preset.model,
            optimization=preset.optimization,
        ),
        prog="python -m jobs.train",
    )
    if options.family != family:
        raise UsageError(f"unknown family {options.family!r}: choose from {', '.join(FAMILIES)}")
    return options


def _preset(family: str, data: str, size: str) -> Preset:
    if data not in DATASETS:
        raise UsageError(f"unknown dataset --data {data}: choose from {', '.join(DATASETS)}")
    if data not in FAMILIES[family].presets:
        able = [key for key, kind in FAMILIES.items() if data in kind.presets]
        raise UsageError(f"{family} has no preset for --data {data}: choose from {', '.join(able)}")
    try:
        factor = float(size)
    except ValueError:
        factor = 0.0
    if not 0 < factor <= MAX_SIZE:
        raise UsageError(f"--size {size}: write a factor above 0, at most {MAX_SIZE:g}, such as 0.5 or 2")
    try:
        return families.preset(family, data, factor)
    except ValueError as error:
        raise UsageError(f"--size {size}: {error}") from error


def check(options: Options[Any]) -> tuple[Plan, Dataset]:
    """Refuse what cannot be done, before anything is held for it.

    Raises:
        UsageError: naming the option, its value and the cure.
    """
    plan = _plan(options)
    for name, least in (("workers", 1), ("cpus", 1), ("max_failures", 0)):
        if getattr(options, name) < least:
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag} {getattr(options, name)} must be at least {least}")
    if plan.optimization.batch_size % options.workers:
        raise UsageError(
            f"--workers {options.workers} does not divide --optimization.batch-size "
            f"{plan.optimization.batch_size}: make the batch a multiple of the workers"
        )
    if options.name and not re.fullmatch(r"[\w.-]+", options.name):
        raise UsageError(f"--name {options.name!r}: use letters, digits, '.', '_' and '-' alone")
    if options.name and (home() / "runs" / options.name).exists():
        raise UsageError(f"--name {options.name}: a run of that name exists; choose another")
    try:
        dataset = load(options.data, home() / "data")
        registry.check()
    except (ValueError, registry.RegistryUnavailable) as error:
        raise UsageError(str(error)) from error
    _check_cluster(options)
    return plan, dataset


def _plan(options: Options[Any]) -> Plan:
    try:
        return Plan(
            optimization=options.optimization,
            budget=_budget(options),
            seed=options.seed,
            report_every=options.report_every,
            checkpoint_every=options.checkpoint_every,
            patience=options.patience,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error


def _budget(options: Options[Any]) -> Budget:
    if options.budget and options.examples:
        raise UsageError("--budget and --examples both say when to end: give one of them")
    if options.steps < 1 or options.examples < 0:
        raise UsageError(f"--steps {options.steps}, --examples {options.examples}: write numbers above 0")
    if options.examples:
        return Budget(steps=max(1, options.examples // options.optimization.batch_size))
    if not options.budget:
        return Budget(steps=options.steps)
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(s|min|h)", options.budget)
    if not match:
        raise UsageError(f"--budget {options.budget!r}: write a time as 60s, 10min or 2h")
    return Budget(seconds=float(match[1]) * _UNITS[match[2]])


def _check_cluster(options: Options[Any]) -> None:
    try:
        ray.init(logging_level=logging.WARNING)
    except ConnectionError as error:
        raise UsageError(f"no Ray cluster answers at RAY_ADDRESS ({error}); `python -m infra up`") from error
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    for resource, each in options.resources.items():
        room = sum(int(node.get(resource, 0) // each) for node in nodes)
        if room < options.workers:
            raise UsageError(
                f"--workers {options.workers} need {each} {resource} each, and the cluster has room for "
                f"{room} such workers: ask for fewer or smaller ones, or add nodes"
            )


def run(options: Options[Any], plan: Plan, dataset: Dataset) -> int:
    """Train, evaluate on the test split once, register; returns the exit code."""
    name = options.name or _new_name(options)
    run_id, page = registry.start_run(name, dataset, _params(options), _tags(options, dataset))
    print(f"jobs.train: run {name}, {page}", flush=True)
    actor: Any = ray.remote(num_cpus=0)(registry.Run)
    tracked = actor.remote(run_id, registry.tracking_uri())
    try:
        best, metrics = _fit(options, plan, name, tracked)
        print(f"jobs.train: the best checkpoint is {best.path}", flush=True)
        with best.as_directory() as directory:
            scores = _test_scores(Path(directory), dataset)
            ray.get(tracked.log_final.remote(scores))
            scores |= {SCORE: metrics[SCORE]} if SCORE in metrics else {}
            version = registry.register(run_id, Path(directory), options.promote, scores)
    except TrainingError as error:
        ray.get(tracked.finish.remote("FAILED"))
        print(f"jobs.train: {error}", file=sys.stderr)
        return 1
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt | SystemExit)
        ray.get(tracked.finish.remote("KILLED" if stopped else "FAILED"))
        raise
    lost = ray.get(tracked.finish.remote())
    print(_summary(version, scores) + (f"\n  {lost} reports could not be logged" if lost else ""))
    return 0


def _new_name(options: Options[Any]) -> str:
    """Make a name that no other run has, also of those started in the same second."""
    return f"{options.family}-{options.data}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def _fit(
    options: Options[Any], plan: Plan, name: str, tracked: Any
) -> tuple[ray.train.Checkpoint, dict[str, float]]:
    """Train on the cluster; returns the best checkpoint with its metrics."""
    has_score = issubclass(FAMILIES[options.family], Likelihood)
    task = Task(
        family=options.family, model=options.model, data=options.data, data_root=home() / "data", plan=plan
    )
    trainer: Any = TorchTrainer(
        work,  # type: ignore[arg-type]  # ray 2.60 annotates Train V1 and runs V2
        train_loop_config={"task": task, "run": tracked},
        scaling_config=ScalingConfig(
            num_workers=options.workers, use_gpu=options.gpu, resources_per_worker=options.resources
        ),
        run_config=RunConfig(
            name=name,
            storage_path=str(home() / "runs"),
            failure_config=FailureConfig(max_failures=options.max_failures),
            # The last one, to go on from, is kept beside the best, to register.
            checkpoint_config=CheckpointConfig(
                num_to_keep=2,
                checkpoint_score_attribute=SCORE if has_score else None,
                checkpoint_score_order="min",
            ),
        ),
    )
    # Ray Train would print what workers print again, and look every two seconds whether they are done.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    try:
        result = trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise TrainingError(str(error)) from error
    if result.return_value:
        raise TrainingError(result.return_value)
    # Without a score, Ray keeps them in the order of time, and the last one is the best.
    saved: list[tuple[ray.train.Checkpoint, dict[str, float]]] = result.best_checkpoints
    return min(reversed(saved), key=lambda each: each[1].get(SCORE, 0.0))


def _test_scores(directory: Path, dataset: Dataset) -> dict[str, float]:
    """Evaluate a checkpoint on the test split."""
    model = load_family(directory)
    if not isinstance(model, Likelihood):
        return {}
    print(f"jobs.train: scoring it on the {len(dataset.splits['test']):,} test examples", flush=True)
    nats = split_nats(model, dataset.splits["test"], World())
    return {
        "test/negative_log_likelihood_nats": -nats.mean,
        "test/bits_per_dim": -dataset.spec.bits_per_dim(nats.mean),
        "test/bits_per_dim_standard_error": dataset.spec.bits_per_dim(nats.standard_error),
    }


def _params(options: Options[Any]) -> dict[str, str]:
    """Flatten the options, as MLflow compares them."""
    flat: dict[str, str] = {}
    for key, value in asdict(options).items():
        nested = {f"{key}.{name}": part for name, part in value.items()} if isinstance(value, dict) else {}
        flat |= {name: str(part) for name, part in (nested or {key: value}).items()}
    return flat


def _tags(options: Options[Any], dataset: Dataset) -> dict[str, str]:
    kind = FAMILIES[options.family]
    return {
        "family": options.family,
        "density": kind.density,
        "likelihood": kind.likelihood_kind if issubclass(kind, Likelihood) else "none",
        "workers": str(options.workers),
        "device": "gpu" if options.gpu else "cpu",
        "git_commit": git_commit(),
        "dataset_digest": dataset.digest,
    }


def _summary(version: registry.Version, scores: Mapping[str, float]) -> str:
    is_champion = version.champion == version.version
    served = "champion" if is_champion else f"champion stays {version.champion}; --promote moves it"
    shown = "  ".join(f"{name} {scores[name]:.4f}" for name in (SCORE, "test/bits_per_dim") if name in scores)
    return f"jobs.train: {version.name} version {version.version} ({served})  {shown}\n  {version.page}"


def main(arguments: Sequence[str]) -> int:
    """Run the job; returns its exit code: 2 if it was asked for what cannot be done."""
    try:
        options = parse(arguments)
        plan, dataset = check(options)
    except UsageError as error:
        print(f"jobs.train: {error}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # `ray job stop`: let the run be told
    return run(options, plan, dataset)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
