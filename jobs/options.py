"""The command line of a training job, and what it refuses."""

import os
import re
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import tyro

from gdl_ray import families, tracking
from gdl_ray.data import DATASETS, Dataset, load
from gdl_ray.families import FAMILIES
from gdl_ray.family import Optimization, Preset
from gdl_ray.home import home
from gdl_ray.train.plan import Budget, Plan
from gdl_ray.train.store import Store

Model = TypeVar("Model")

MAX_SIZE = 16.0
"""Largest factor of a preset's width and depth; its weights grow with the third power."""

FREE = (
    *("workers", "cpus", "gpu", "compile", "micro_batch"),
    *("name", "storage", "keep", "timeout", "promote", "max_failures"),
)
"""Options that do not change what is trained, but for rounding: a run may go on with other ones."""

_UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0}


class UsageError(Exception):
    """What the user asked for cannot be done; the message says what to change."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options(Generic[Model]):
    """Train a family of generative models on a dataset, and register the best checkpoint in MLflow."""

    family: tyro.conf.Positional[str]
    """Key of the family; several families, or several seeds, are as many runs."""
    data: str = "digits"
    """Name of the dataset."""
    size: float = 1.0
    """Multiplies width and depth of the preset's network."""
    workers: str = "1"
    """Ray Train workers; they share each batch. 1:4 takes as many of one to four as there is room for."""
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
    """Name of the run; made from family, data and the time if left out. That of a run that was cut short goes
    on with it."""
    storage: str = ""
    """Where runs keep their checkpoints: a folder that all nodes see, or an address as s3://bucket/folder.
    Left out, what GDL_RAY_STORAGE says, as on a cluster in a cloud; else the platform's own folder."""
    keep: int = 1
    """How many of the last checkpoints to keep, beside the best."""
    promote: bool = False
    """Make the new version champion even if there is one already. A first version always is."""
    report_every: int = 50
    """Steps between lines of metrics."""
    checkpoint_every: int = 250
    """Steps between checkpoints, each with a validation and samples."""
    patience: int = 10
    """Validations in a row without a better one, after which training ends."""
    compile: bool = False
    """Compile the model by torch.compile; where that fails, train as without it and say why."""
    micro_batch: int = 0
    """Most examples that a worker computes at once; its share of a batch is cut to fit. 0 for no limit."""
    validate_apart: bool = False
    """Validate in a task of its own, on one more CPU or GPU, while training goes on; early stopping then
    heeds each score when the next checkpoint is due."""
    timeout: str = ""
    """Wait so long for the workers' resources, as 60s, 10min or 2h, then give up. Left out, the job waits for
    resources that others use, and refuses what the cluster does not have."""
    max_failures: int = 3
    """How often workers may die in a row, without a checkpoint in between, before the job gives up."""
    model: Model
    """Configuration of the family."""
    optimization: Optimization
    """How it is trained."""

    @property
    def job(self) -> str:
        """Name of the job, which begins what it prints."""
        return "jobs.train"

    @property
    def asked(self) -> str:
        """Options that ask for workers."""
        return f"--workers {self.workers}{' and --validate-apart' if self.validate_apart else ''}"

    @property
    def resources(self) -> dict[str, int]:
        """What Ray has to give each worker."""
        return {"CPU": self.cpus} | ({"GPU": 1} if self.gpu else {})

    @property
    def workers_range(self) -> tuple[int, int]:
        """Least and most workers."""
        least, _, most = self.workers.partition(":")
        return int(least), int(most or least)

    @property
    def least_places(self) -> int:
        """How many times a worker's resources must be free: for each of the least, and for validation."""
        return self.workers_range[0] + int(self.validate_apart)

    @property
    def timeout_s(self) -> float | None:
        """Seconds to wait for resources; None where no limit is given."""
        return seconds("timeout", self.timeout) if self.timeout else None

    def store(self, name: str) -> Store:
        """Open the store of a run.

        Raises:
            UsageError: if --storage is not understood.
        """
        storage = self.storage or os.environ.get("GDL_RAY_STORAGE") or str(home() / "runs")
        place, mark, query = storage.partition("?")
        return open_store(f"{place}/{name}{mark}{query}", "--storage")

    def flat(self) -> dict[str, str]:
        """Name every option and its value, as MLflow compares them."""
        flat: dict[str, str] = {}
        for key, value in asdict(self).items():
            parts = {f"{key}.{name}": part for name, part in value.items()} if isinstance(value, dict) else {}
            flat |= {name: str(part) for name, part in (parts or {key: value}).items()}
        return flat

    def decisive(self) -> dict[str, str]:
        """Name the options that decide what is trained."""
        return {name: value for name, value in self.flat().items() if name not in FREE}


def open_store(address: str, option: str) -> Store:
    """Open what an option names: an address, or a folder, which the working directory is the start of.

    Raises:
        UsageError: if it is not understood, or does not answer.
    """
    try:
        return Store(address if "://" in address else f"{Path(address).expanduser().absolute()}")
    except ValueError as error:
        raise UsageError(f"{option} {error}") from error
    except OSError as error:
        raise UsageError(f"{option} {address} does not answer: {error}") from error


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
    for name, least in (("cpus", 1), ("keep", 1), ("max_failures", 0)):
        if getattr(options, name) < least:
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag} {getattr(options, name)} must be at least {least}")
    _check_workers(options)
    if options.timeout:
        seconds("timeout", options.timeout)
    if options.name and not re.fullmatch(r"[\w.-]+", options.name):
        raise UsageError(f"--name {options.name!r}: use letters, digits, '.', '_' and '-' alone")
    try:
        options.store("")
        dataset = load(options.data, home() / "data")
        tracking.check()
    except (ValueError, tracking.RegistryUnavailable) as error:
        raise UsageError(str(error)) from error
    return plan, dataset


def _check_workers(options: Options[Any]) -> None:
    match = re.fullmatch(r"(\d+)(?::(\d+))?", options.workers)
    if not match or not 1 <= int(match[1]) <= int(match[2] or match[1]):
        raise UsageError(f"--workers {options.workers}: write a number from 1 on, or two as 1:4")
    if options.validate_apart and ":" in options.workers:
        raise UsageError(
            f"--workers {options.workers} may take all the room there is, and --validate-apart needs some: "
            f"give one number of workers"
        )
    batch_size = options.optimization.batch_size
    if options.workers_range[1] > batch_size:
        raise UsageError(
            f"--workers {options.workers} share batches of --optimization.batch-size {batch_size}: "
            f"ask for {batch_size} workers at most"
        )


def _plan(options: Options[Any]) -> Plan:
    try:
        return Plan(
            optimization=options.optimization,
            budget=_budget(options),
            seed=options.seed,
            report_every=options.report_every,
            checkpoint_every=options.checkpoint_every,
            patience=options.patience,
            compile=options.compile,
            micro_batch=options.micro_batch,
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
    if options.budget:
        return Budget(seconds=seconds("budget", options.budget))
    return Budget(steps=options.steps)


def seconds(name: str, time: str) -> float:
    """Read a time that an option gives, in seconds.

    Raises:
        UsageError: if it is not written as one.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(s|min|h)", time)
    if not match or not float(match[1]):
        raise UsageError(f"--{name} {time!r}: write a time as 60s, 10min or 2h")
    return float(match[1]) * _UNITS[match[2]]
