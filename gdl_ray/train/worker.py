"""The training loop under Ray Train: what each worker of a job runs.

Ray Train places the workers and tells of preemption. Checkpoints and metrics do not pass through it: a store
that is away would end its controller, which also lets the workers wait for each report.
"""

import logging
import threading
import time
from collections.abc import Mapping
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch

from gdl_ray.data import load
from gdl_ray.families import build
from gdl_ray.train import checkpoint
from gdl_ray.train.checkpoint import Contents
from gdl_ray.train.judge import Judge
from gdl_ray.train.local import progress_line
from gdl_ray.train.loop import DivergenceError, Report, train
from gdl_ray.train.micro import MemoryExhaustedError
from gdl_ray.train.parallel import World
from gdl_ray.train.saver import Saver, StorageError
from gdl_ray.train.store import Store, patiently
from gdl_ray.train.task import RUN_FILE, Task

_PREEMPTION_POLL_S = 1.0
_LATE_S = 120.0


FINAL = (DivergenceError, MemoryExhaustedError, StorageError)
"""Errors that would come again if workers were started again."""


def work(config: Mapping[str, Any]) -> bool:
    """Train on this worker, from the last whole checkpoint of the run if there is one.

    Args:
        config: `task`, a Task, and `run`, the handle of an actor like `tracking.Run` that logs metrics.

    Returns:
        Whether training has ended; if not, it was interrupted and goes on from its last checkpoint.
    """
    logging.getLogger().setLevel(logging.WARNING)
    task: Task = config["task"]
    context = ray.train.get_context()
    world = World(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())
    torch.set_num_threads(_cpus())
    store = Store(task.storage)
    if not _is_there(store):
        raise StorageError(
            f"{task.storage} is not to be seen from a worker's node: give --storage a folder that all nodes "
            f"share, or a bucket"
        )
    return _train(task, store, world, config["run"])


def _is_there(store: Store) -> bool:
    """Whether the run's store is to be seen from here; a folder may come late to a node."""
    deadline = time.monotonic() + _LATE_S
    while patiently(lambda: store.read_json(RUN_FILE)) is None:
        if time.monotonic() > deadline:
            return False
        time.sleep(1)
    return True


def _train(task: Task, store: Store, world: World, run: Any) -> bool:
    """Train from the last checkpoint on; returns whether training has ended."""
    dataset = load(task.data, task.data_root)
    family = build(task.family, task.model, dataset.spec, task.plan.seed)
    judge = Judge(task, store, run) if task.validate_apart else None
    saver = judge.saver if judge else Saver(lambda snapshot: store.save(snapshot, task.keep))
    saved = _last_checkpoint(store, world)
    reporter = _Reporter(run, saver)
    if saved and world.rank == 0:
        reporter.recall(saved)
        if judge:
            judge.resume(saved.counters["step"])
    ended = train(
        family,
        dataset,
        task.plan,
        reporter if world.rank == 0 else _ignore,
        resume=saved,
        world=world,
        interrupted=_watch_for_preemption().is_set,
        judge=judge,
    )
    reporter.close()
    return ended


def _cpus() -> int:
    """Threads for this worker: the CPUs that Ray gave it."""
    return max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1)))  # type: ignore[no-untyped-call]


def _watch_for_preemption() -> threading.Event:
    """Have an event that is set once a node of this group is about to be taken away.

    A thread asks, because the question waits for all workers, and a step may be shorter than the answer.
    """
    preempted = threading.Event()

    def watch() -> None:
        while not preempted.is_set():
            time.sleep(_PREEMPTION_POLL_S)
            if ray.train.get_preemption_info():
                preempted.set()

    threading.Thread(target=watch, name="preemption", daemon=True).start()
    return preempted


class _Reporter:
    """Prints and logs what the loop reports, and has its checkpoints saved."""

    def __init__(self, run: Any, saver: Saver) -> None:
        self._run = run
        self._saver = saver
        self._logged: Any = None

    def __call__(self, report: Report) -> None:
        """Take a report."""
        print(progress_line(report), flush=True)
        picture = report.snapshot.contents.samples_png if report.snapshot else None
        if report.metrics:
            self._logged = self._run.log.remote(report.step, dict(report.metrics), picture)
        if report.snapshot:
            self._saver.submit(report.snapshot)

    def recall(self, saved: Contents) -> None:
        """Log again what a checkpoint remembers: its driver may have died before it was delivered."""
        for step, metrics in saved.history:
            self._run.log.remote(step, metrics)

    def close(self) -> None:
        """Wait until all is saved, and has reached the log.

        Raises:
            StorageError: if the store is away for too long.
        """
        self._saver.drain()
        if self._logged:
            ray.get(self._logged)


def _ignore(report: Report) -> None:
    """Leave a report to the first worker."""


def _last_checkpoint(store: Store, world: World) -> Contents | None:
    """Load the checkpoint to go on from.

    The first worker chooses it: another node may see a shared folder as it was a while ago, and workers that
    go on from different steps would train on without a word.
    """
    last = patiently(store.last) if world.rank == 0 else None
    name = world.text_from_first(last.name if last else "")
    if not name:
        return None
    with store.open(name) as directory:
        return checkpoint.load(directory)
