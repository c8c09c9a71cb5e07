"""Where a worker's batches come from: its device if the split fits there, or else a thread that reads ahead.

Every batch is bit for bit that of `training_batch`. But the order and the noise keys of many steps are found
at once, at the cost of one step's: alone, they take a tenth of a small model's step.
"""

import os
import warnings
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from gdl_ray.data.arrays import Split
from gdl_ray.data.batches import example_indices, share_of, training_keys
from gdl_ray.family import Batch

_BLOCK = 32  # steps whose order and keys are found at once
_AHEAD = 4  # batches that are read before they are asked for
_SHARE = 0.25  # of a device's memory, for a split


class Feed:
    """The training batches of one worker, on its device.

    Args:
        split: the training split.
        seed: of the run.
        batch_size: examples of a step over all workers.
        device: where batches go.
        rank: this worker, in [0, world - 1].
        world: number of workers.
    """

    def __init__(
        self, split: Split, *, seed: int, batch_size: int, device: torch.device, rank: int = 0, world: int = 1
    ):
        self._seed, self._batch_size, self._device = seed, batch_size, device
        share = share_of(batch_size, rank, world)
        self._places = slice(share.start, share.stop)
        self._x, self._y = _view(split)
        self._resident = self._x.nbytes + self._y.nbytes <= _SHARE * _memory_bytes(device)
        if self._resident:
            self._x, self._y = self._x.to(device), self._y.to(device)
        self._block = -1  # the block of steps whose order is at hand
        self._reader = ThreadPoolExecutor(1, "feed")  # has no thread until it is given work
        self._reading: dict[int, Future[Batch]] = {}

    def batch(self, step: int) -> Batch:
        """Give this worker's share of a step, from 0: of any step, but fastest in a row."""
        if self._resident:
            return self._read(step)
        wanted = range(step, step + 1 + _AHEAD)
        self._reading = {
            number: self._reading.get(number) or self._reader.submit(self._read, number) for number in wanted
        }
        batch = self._reading.pop(step).result()
        return Batch(*(part.to(self._device, non_blocking=True) for part in (batch.x, batch.y, batch.key)))

    def _read(self, step: int) -> Batch:
        """Read a batch to where the split lies; one thread alone calls this."""
        block, number = divmod(step, _BLOCK)
        if block != self._block:
            self._rows, self._keys = self._order(block)
            self._block = block
        rows, key = self._rows[number], self._keys[number]
        x, y = self._x.index_select(0, rows), self._y.index_select(0, rows)
        return Batch(x, y, key) if self._resident else Batch(self._pinned(x), self._pinned(y), key)

    def _order(self, block: int) -> tuple[Tensor, Tensor]:
        """Find the examples that the steps of a block read, and their keys: int64 (_BLOCK, share) each."""
        start, stop = (number * _BLOCK * self._batch_size for number in (block, block + 1))
        order = example_indices(self._seed, start, stop, len(self._x)).reshape(_BLOCK, self._batch_size)
        steps = torch.arange(block * _BLOCK, (block + 1) * _BLOCK)[:, None]
        keys = training_keys(self._seed, steps, torch.arange(self._batch_size)[self._places])
        mine = (self._pinned(part) for part in (torch.from_numpy(order[:, self._places]), keys))
        rows, keys = (part.to(self._x.device, non_blocking=True) for part in mine)
        return rows, keys

    def _pinned(self, tensor: Tensor) -> Tensor:
        """Lay a tensor where a GPU fetches it while both go on; leave it where there is none."""
        return tensor.pin_memory() if self._device.type == "cuda" else tensor


def _view(split: Split) -> tuple[Tensor, Tensor]:
    """See a split as tensors without reading it; nobody may write to them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(split.x), torch.from_numpy(split.y)


def _memory_bytes(device: torch.device) -> int:
    """What is free on a GPU; for a CPU, all of the machine's, where files stay that were read before."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
