"""How long a checkpoint holds training up, against one that is saved at once.

    python tests/bench/checkpoint.py [MILLIONS_OF_PARAMETERS]

Both save the same state (weights, their average, both moments of Adam) of one perceptron, in turns.
Held up is the time to hand a snapshot over, and that for which the next step waits. Prints the medians.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from gdl_ray.data import load, training_batch
from gdl_ray.family import Batch, DataSpec, Density, Family, Losses, Optimization, Sampler
from gdl_ray.train import checkpoint
from gdl_ray.train.loop import Training
from gdl_ray.train.parallel import World
from gdl_ray.train.plan import Budget, Plan
from gdl_ray.train.saver import Saver
from gdl_ray.train.store import Store

ROUNDS = 5


class Wide(Family):
    """A perceptron of so many million parameters."""

    density = Density.IMPLICIT
    presets: ClassVar[dict[str, Any]] = {}
    Config = dict
    widths = ()

    def __init__(self, spec: DataSpec, millions: int) -> None:
        super().__init__({}, spec)
        self.enter = nn.Linear(spec.dims, 1000)
        self.layers = nn.Sequential(*(nn.Linear(1000, 1000) for _ in range(millions)))

    def forward(self, batch: Batch, phase: str = "main") -> Losses:
        """Do something with every parameter."""
        return Losses(self.layers(self.enter(batch.x.flatten(1) / 16)).square().mean(), {})

    def sampler(self) -> Sampler:
        """Not asked for: nothing is pictured."""
        raise AssertionError


def seconds(call: Callable[[], object]) -> float:
    """Time a call."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def save_at_once(training: Training, store: Store) -> None:
    """Save as a loop would that waits for all of it."""
    snapshot = training.snapshot(None, evaluated=False)
    assert snapshot
    store.save(snapshot, keep=1)
    snapshot.release()


def hand_over(training: Training, saver: Saver) -> None:
    """Save as the loop does."""
    snapshot = training.snapshot(None, evaluated=False)
    assert snapshot
    saver.submit(snapshot)


def main(millions: int) -> None:
    """Measure, and print."""
    checkpoint.describe = lambda model: {}  # this family is in no table
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        digits = load("digits", Path(folder))
        plan = Plan(optimization=Optimization(), budget=Budget(steps=100))
        training = Training(Wide(digits.spec, millions), plan, World())
        step = partial(
            training.advance, training_batch(digits.splits["train"], seed=0, step=0, batch_size=64)
        )
        store = Store(folder)
        saver = Saver(partial(store.save, keep=1))
        settle = training._memory.settle
        waits: list[float] = []
        training._memory.settle = lambda: waits.append(seconds(settle))  # type: ignore[method-assign]
        step()
        at_once, blocked = [], []
        for number in range(ROUNDS + 1):
            at_once.append(seconds(partial(save_at_once, training, store)))
            waits.clear()
            handing_over = seconds(partial(hand_over, training, saver))
            step()
            blocked.append(handing_over + sum(waits))
            begin = time.perf_counter()
            step()
            saver.drain()
            print(
                f"{number}: saved at once in {at_once[-1]:.2f} s; in the background, the loop is held up for "
                f"{blocked[-1]:.3f} s (step {time.perf_counter() - begin:.2f} s)",
                flush=True,
            )
    waited, whole = (
        statistics.median(blocked[1:]),
        statistics.median(at_once[1:]),
    )  # the first asks for memory
    print(f"{millions} M parameters: held up {waited:.3f} s of {whole:.2f} s: {waited / whole:.1%}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100)
