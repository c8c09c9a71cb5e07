"""The training loop under Ray Train: what each worker of a job runs."""

import logging
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch

from gdl_ray.data import load
from gdl_ray.families import build
from gdl_ray.train.checkpoint import DamagedCheckpointError, verify
from gdl_ray.train.local import progress_line
from gdl_ray.train.loop import DivergenceError, Plan, Report, train
from gdl_ray.train.parallel import World


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What the workers of a job train."""

    family: str
    """A key of FAMILIES."""
    model: Any
    """The family's Config."""
    data: str
    """A key of DATASETS."""
    data_root: Path
    """Folder of prepared datasets, on every node."""
    plan: Plan


def work(config: Mapping[str, Any]) -> str | None:
    """Train on this worker, from the last intact checkpoint of the run if there is one.

    Args:
        config: `task`, a Task.

    Returns:
        Why training failed for good; None if it did not.
    """
    task: Task = config["task"]
    context = ray.train.get_context()
    world = World(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())
    torch.set_num_threads(_cpus())
    # It repeats every report in its own words.
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    dataset = load(task.data, task.data_root)
    family = build(task.family, task.model, dataset.spec, task.plan.seed)
    try:
        with _resume() as directory:
            train(family, dataset, task.plan, _report, directory, world)
    except DivergenceError as error:
        # Not raised: Ray would restart the workers, to diverge again at the same step.
        return str(error)
    return None


def _cpus() -> int:
    """Threads for this worker: the CPUs that Ray gave it."""
    return max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1)))  # type: ignore[no-untyped-call]


def _report(report: Report) -> None:
    """Hand a report to Ray Train; waits for all workers."""
    metrics = {"step": report.step, **report.metrics}
    if ray.train.get_context().get_world_rank() == 0:
        print(progress_line(report), flush=True)
    if report.write is None:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "checkpoint"
        report.write(directory)
        checkpoint = ray.train.Checkpoint.from_directory(directory)
        ray.train.report(metrics, checkpoint=checkpoint, checkpoint_dir_name=f"step-{report.step:08d}")


@contextmanager
def _resume() -> Iterator[Path | None]:
    """Open the last checkpoint of this run that is whole, if there is one; says which ones are not."""
    for reported in reversed(ray.train.get_all_reported_checkpoints()):
        with reported.checkpoint.as_directory() as directory:
            try:
                verify(Path(directory))
            except DamagedCheckpointError as error:
                print(f"{error}; trying the one before", file=sys.stderr, flush=True)
                continue
            yield Path(directory)
            return
    yield None
