"""Validation apart: a Ray task scores each checkpoint that is saved, and training does not wait for it."""

import math
import sys
from typing import Any

import ray
import torch
from ray.exceptions import RayError

from gdl_ray.data import load
from gdl_ray.family import Likelihood
from gdl_ray.train.checkpoint import load_family
from gdl_ray.train.parallel import World
from gdl_ray.train.saver import Saver
from gdl_ray.train.snapshot import Snapshot
from gdl_ray.train.store import Saved, Store
from gdl_ray.train.task import Task
from gdl_ray.train.validation import SCORE, sample_grid, split_nats


def validate(task: Task, name: str) -> tuple[float, bytes]:
    """Score and picture a checkpoint of a run.

    Returns:
        Bits per dimension, nan where the family has no likelihood, and a PNG of samples.
    """
    device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
    with Store(task.storage).open(name) as directory:
        model = load_family(directory).to(device)
    picture = sample_grid(model)
    if not isinstance(model, Likelihood):
        return math.nan, picture
    dataset = load(task.data, task.data_root)
    examples = dataset.splits["validation"].first(task.plan.validation_examples)
    nats = split_nats(model, examples, World(device=device))
    return -dataset.spec.bits_per_dim(nats.mean), picture


class Judge:
    """Has the checkpoints of a run validated by tasks beside the workers.

    Args:
        task: what the workers train.
        store: where its checkpoints are kept.
        run: the handle of an actor like `tracking.Run`.
    """

    def __init__(self, task: Task, store: Store, run: Any) -> None:
        self._task = task
        self._store = store
        self._run = run
        self._validate: Any = ray.remote(num_cpus=1, num_gpus=int(task.gpu))(validate)
        self._pending: tuple[Saved, Any] | None = None
        self.saver = Saver(self._save)

    def resume(self) -> None:
        """Validate what the worker before had saved, and had not seen validated."""
        evaluated = [saved for saved in self._store.saved() if saved.evaluated]
        last = max(evaluated, default=None)
        if last and math.isinf(last.score):
            self._begin(last)

    def collect(self) -> tuple[int, float]:
        """Wait for the score of the checkpoint that was saved last.

        Returns:
            Its step and score; step 0 where there is none.
        """
        self.saver.settle()
        if self._pending is None:
            return 0, math.nan
        (saved, answer), self._pending = self._pending, None
        try:
            score, picture = ray.get(answer)
        except RayError as error:
            print(f"step {saved.step}: the validation failed: {error}", file=sys.stderr, flush=True)
            return 0, math.nan
        metrics = {} if math.isnan(score) else {SCORE: score}
        self._run.log.remote(saved.step, metrics, picture)
        if metrics:
            self._store.rate(saved, score)
        return (saved.step, score) if metrics else (0, math.nan)

    def _save(self, snapshot: Snapshot) -> None:
        saved = self._store.save(snapshot, self._task.keep)
        if saved.evaluated:
            self._begin(saved)

    def _begin(self, saved: Saved) -> None:
        self._pending = saved, self._validate.remote(self._task, saved.name)
