"""How long a checkpoint holds training up: the snapshot that the loop waits for, against saving at once.

    python tests/bench/checkpoint.py [MILLIONS_OF_PARAMETERS]

Both save the same state (weights, their average, both moments of Adam) of one model, in turns in one run; the saver
writes in the background while the loop would train. Prints the medians and their ratio.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
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
    """Nothing but parameters."""

    density = Density.IMPLICIT
    presets: ClassVar[dict[str, Any]] = {}
    Config = dict
    widths = ()

    def __init__(self, spec: DataSpec, millions: int) -> None:
        super().__init__({}, spec)
        self.layers = nn.ParameterList(nn.Parameter(torch.randn(1000, 1000)) for _ in range(millions))

    def forward(self, batch: Batch, phase: str = "main") -> Losses:
        """Touch every parameter."""
        return Losses(torch.stack([layer.square().mean() for layer in self.layers]).sum(), {})

    def sampler(self) -> Sampler:
        """Not asked for: nothing is pictured."""
        raise AssertionError


def seconds(call: Callable[[], object]) -> float:
    """Time a call."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def main(millions: int) -> None:
    """Measure, and print."""
    checkpoint.describe = lambda model: {}  # this family is in no table
    with tempfile.TemporaryDirectory() as folder:
        digits = load("digits", Path(folder))
        plan = Plan(optimization=Optimization(), budget=Budget(steps=100))
        training = Training(Wide(digits.spec, millions), plan, World())
        train = digits.splits["train"]
        training.advance(training_batch(train, seed=0, step=0, batch_size=64))
        store = Store(f"{folder}/run")
        saver = Saver(lambda snapshot: store.save(snapshot, keep=1))
        blocked, at_once = [], []
        for number in range(ROUNDS + 1):
            training.step += 1
            begin = time.perf_counter()
            snapshot = training.snapshot(None, evaluated=False)
            assert snapshot
            saver.submit(snapshot)
            blocked.append(time.perf_counter() - begin)
            saver.drain()
            at_once.append(blocked[-1] + seconds(lambda: store.save(snapshot, keep=1)))
            kind = "first, memory asked for" if number == 0 else f"round {number}"
            print(f"{kind}: blocked {blocked[-1]:.3f} s, saved at once {at_once[-1]:.3f} s", flush=True)
    waited, whole = statistics.median(blocked[1:]), statistics.median(at_once[1:])
    print(f"{millions} M parameters: the loop waits {waited:.3f} s of {whole:.3f} s: {waited / whole:.1%}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100)
