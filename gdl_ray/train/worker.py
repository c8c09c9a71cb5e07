"""The training loop under Ray Train: what each worker of a job runs."""

import logging
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
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
from gdl_ray.train.checkpoint import SAMPLES_FILE, DamagedCheckpointError, verify
from gdl_ray.train.local import progress_line
from gdl_ray.train.loop import DivergenceError, Plan, Report, train
from gdl_ray.train.parallel import World

_STEP = "step"


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
        config: `task`, a Task, and `run`, the handle of an actor like `registry.Run` that logs metrics.

    Returns:
        Why training failed for good; None if it did not.
    """
    logging.getLogger().setLevel(logging.WARNING)  # Ray Train tells every report again, at length
    task: Task = config["task"]
    context = ray.train.get_context()
    world = World(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())
    torch.set_num_threads(_cpus())
    dataset = load(task.data, task.data_root)
    family = build(task.family, task.model, dataset.spec, task.plan.seed)
    reporter = _Reporter(world.rank, config["run"])
    try:
        with _resume() as directory:
            train(family, dataset, task.plan, reporter, directory, world)
    except DivergenceError as error:
        # Not raised: Ray would restart the workers, to diverge again at the same step.
        return str(error)
    return None


def _cpus() -> int:
    """Threads for this worker: the CPUs that Ray gave it."""
    return max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1)))  # type: ignore[no-untyped-call]


class _Reporter:
    """Prints and logs what the loop reports, and hands its checkpoints to Ray Train.

    Metrics do not pass through Ray Train, whose controller collects them every two seconds and lets the
    workers wait meanwhile.
    """

    def __init__(self, rank: int, run: Any) -> None:
        self._rank = rank
        self._run = run

    def __call__(self, report: Report) -> None:
        """Take a report, on every worker."""
        picture = self._save(report, report.write) if report.write else None
        if self._rank == 0:
            print(progress_line(report), flush=True)
            self._run.log.remote(report.step, dict(report.metrics), picture)

    def _save(self, report: Report, write: Callable[[Path], None]) -> bytes | None:
        """Hand over a checkpoint, which is uploaded while training goes on; returns its samples."""
        metrics = {_STEP: report.step, **report.metrics}
        if self._rank > 0:
            ray.train.report(metrics)
            return None
        directory = Path(tempfile.mkdtemp(prefix="gdl-ray-"))
        try:
            write(directory)
            picture = (directory / SAMPLES_FILE).read_bytes()
        except BaseException:
            shutil.rmtree(directory)
            raise
        ray.train.report(
            metrics,
            checkpoint=ray.train.Checkpoint.from_directory(directory),
            # A step that is repeated after a failure is another folder, lest pruning the old one takes both.
            checkpoint_dir_name=f"step-{report.step:08d}-{secrets.token_hex(3)}",
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
        )
        return picture


@contextmanager
def _resume() -> Iterator[Path | None]:
    """Open the last checkpoint of this run that is whole, if there is one; says which ones are not."""
    # Ray Train lists them by score.
    known = ray.train.get_all_reported_checkpoints()
    for reported in sorted(known, key=lambda reported: reported.metrics[_STEP], reverse=True):
        with reported.checkpoint.as_directory() as directory:
            try:
                verify(Path(directory))
            except DamagedCheckpointError as error:
                print(f"{error}; trying the one before", file=sys.stderr, flush=True)
                continue
            yield Path(directory)
            return
    yield None
