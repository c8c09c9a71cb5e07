"""Which examples a step reads, and the noise keys they carry: pure functions of (seed, step).

Epochs are permutations laid end to end; step s reads positions [s * batch, (s + 1) * batch) of that endless
row, and worker r of W takes its r-th slice; the slices differ in length by one at most. So neither the number
of workers nor a restart changes what a step sees.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from gdl_ray.data.arrays import Split
from gdl_ray.family import Batch
from gdl_ray.random import fold

_ORDER, _NOISE, _EVALUATION = 0, 1, 2


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, size: int) -> npt.NDArray[np.int64]:
    keys = fold(fold(seed, epoch, _ORDER), torch.arange(size))
    return torch.argsort(keys).numpy()


def example_indices(seed: int, start: int, stop: int, size: int) -> npt.NDArray[np.int64]:
    """Look up positions [start, stop) of the endless row of epochs over `size` examples."""
    positions = np.arange(start, stop)
    epochs = positions // size
    return np.concatenate(
        [
            _permutation(seed, int(epoch), size)[positions[epochs == epoch] % size]
            for epoch in np.unique(epochs)
        ]
    )


def share_of(total: int, rank: int, world: int) -> range:
    """Tell which of `total` rows are those of a worker; the shares differ by one row at most."""
    return range(rank * total // world, (rank + 1) * total // world)


def training_batch(
    split: Split, *, seed: int, step: int, batch_size: int, rank: int = 0, world: int = 1
) -> Batch:
    """Read a worker's share of one training step.

    Args:
        split: the training split.
        seed: of the run.
        step: number of the step, from 0.
        batch_size: examples of the step over all workers.
        rank: this worker, in [0, world - 1].
        world: number of workers.
    """
    share = share_of(batch_size, rank, world)
    start = step * batch_size
    indices = example_indices(seed, start + share.start, start + share.stop, len(split))
    keys = training_keys(seed, step, torch.arange(share.start, share.stop))
    return _read(split, indices, keys)


def training_keys(seed: int, step: torch.Tensor | int, place: torch.Tensor) -> torch.Tensor:
    """Make the noise keys of places in the whole batch of a step; steps and places broadcast."""
    return fold(fold(seed, step, _NOISE), place)


def evaluation_batches(
    split: Split, *, batch_size: int, seed: int = 0, rank: int = 0, world: int = 1
) -> Iterator[Batch]:
    """Yield a worker's share of a split in batches; an example's noise depends on its number alone."""
    mine = np.arange(rank, len(split), world)
    for start in range(0, len(mine), batch_size):
        yield evaluation_batch(split, mine[start : start + batch_size], seed)


def evaluation_batch(split: Split, indices: npt.NDArray[np.int64], seed: int = 0) -> Batch:
    """Read examples of a split by their numbers, each with the noise that `evaluation_batches` gives it."""
    return _read(split, indices, fold(seed, torch.from_numpy(indices), _EVALUATION))


def _read(split: Split, indices: npt.NDArray[np.int64], keys: torch.Tensor) -> Batch:
    return Batch(x=torch.from_numpy(split.x[indices]), y=torch.from_numpy(split.y[indices]), key=keys)
