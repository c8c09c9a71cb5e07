"""Validation apart: a Ray task scores each checkpoint that is saved, and training does not wait for it."""

import math
import sys
from queue import Queue
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
from gdl_ray.train.store import Saved, Store, patiently
from gdl_ray.train.task import Task
from gdl_ray.train.validation import SCORE, sample_grid, validation_score

_TELL_S = 30.0


def validate(task: Task, name: str) -> tuple[float | None, bytes]:
    """Score and picture a checkpoint of a run.

    Returns:
        Bits per dimension, None where the family has no likelihood, and a PNG of samples.
    """
    device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
    with Store(task.storage).open(name) as directory:
        model = load_family(directory).to(device)
    picture = sample_grid(model)
    if not isinstance(model, Likelihood):
        return None, picture
    dataset = load(task.data, task.data_root)
    return validation_score(model, dataset, task.plan.validation_examples, World(device=device)), picture


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
        self._pending: Queue[tuple[Saved, Any]] = Queue()
        self._unrated: list[tuple[Saved, float]] = []
        self.saver = Saver(self._save)

    def resume(self, step: int) -> None:
        """Take up the checkpoint whose score the loop has not heeded yet, when it goes on from a step."""
        evaluated = [
            saved for saved in patiently(self._store.saved) if saved.evaluated and saved.step <= step
        ]
        if evaluated:
            self._begin(max(evaluated))

    def collect(self) -> tuple[int, float]:
        """Wait for the scores of all checkpoints that were saved since the last time.

        Returns:
            Step and score of the last one; step 0 where there is none.
        """
        self.saver.settle()
        last = (0, math.nan)
        while not self._pending.empty():
            saved, answer = self._pending.get()
            try:
                score, picture = self._wait(saved, answer)
            except RayError as error:
                print(f"step {saved.step}: the validation failed: {error}", file=sys.stderr, flush=True)
                continue
            self._run.log.remote(saved.step, {} if score is None else {SCORE: score}, picture)
            if score is not None:
                self._unrated.append((saved, score))
                last = (saved.step, score)
        self._rate()
        return last

    def _wait(self, saved: Saved, answer: Any) -> tuple[float | None, bytes]:
        while not ray.wait([answer], timeout=_TELL_S)[0]:
            place = "GPU" if self._task.gpu else "CPU"
            print(f"step {saved.step}: waiting for its validation, or for a {place} to do it on", flush=True)
        found: tuple[float | None, bytes] = ray.get(answer)
        return found

    def _rate(self) -> None:
        """Write down scores; one that the store does not take now is tried again the next time."""
        try:
            while self._unrated:
                self._store.rate(*self._unrated[0])
                del self._unrated[0]
        except OSError as error:
            print(f"step {self._unrated[0][0].step}: its score cannot be saved ({error}); training goes on")

    def _save(self, snapshot: Snapshot) -> None:
        saved = self._store.save(snapshot, self._task.keep)
        if saved.evaluated:
            self._begin(saved)

    def _begin(self, saved: Saved) -> None:
        self._pending.put((saved, self._validate.remote(self._task, saved.name)))
