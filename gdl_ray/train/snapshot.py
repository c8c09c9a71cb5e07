"""Snapshots: a checkpoint in memory of its own, copied and written while training goes on.

Parameters and what their optimizers remember change in one moment of a step alone. So they are copied by
another thread, and the loop waits for the copy only if that moment comes first. Memory that nobody reads any
more is used again: the system takes longer to give new pages than to fill old ones.
"""

import math
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gdl_ray.train import checkpoint
from gdl_ray.train.checkpoint import Contents

_DONE: "Future[None]" = Future()
_DONE.set_result(None)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Snapshot:
    """A checkpoint that is not on disk yet."""

    contents: Contents
    release: Callable[[], None]
    """Give the memory back: call it once, when nobody will write this snapshot any more."""
    copied: "Future[None]" = _DONE
    """Until when the tensors are still on their way."""

    @property
    def step(self) -> int:
        """Steps that were taken."""
        return int(self.contents.counters["step"])

    @property
    def score(self) -> float:
        """Validation score, lower is better; infinite where there is none."""
        score = self.contents.counters["score"]
        return math.inf if score is None else float(score)

    def write(self, directory: Path) -> None:
        """Write the checkpoint into an empty folder; from any thread, as often as need be."""
        self.copied.result()
        checkpoint.save(directory, self.contents)


class Memory:
    """Host memory for copies of one set of tensors, taken again and again."""

    def __init__(self) -> None:
        self._spare: list[dict[str, Tensor]] = []
        self._copier = ThreadPoolExecutor(1, "copier")
        self.copied = _DONE

    def copy(self, steady: Mapping[str, Tensor], changing: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy tensors from whatever device they are on.

        Args:
            steady: those that stay as they are until `settle` is called; copied once `copied` is done.
            changing: those that may change at once.
        """
        copies = self._spare.pop() if self._spare else {}
        for name, tensor in {**steady, **changing}.items():
            if name not in copies or copies[name].shape != tensor.shape:
                copies[name] = _empty_like(tensor)
        _fill(copies, changing)
        self.settle()
        self.copied = self._copier.submit(_fill, copies, steady)
        return copies

    def settle(self) -> None:
        """Wait until what is steady may change."""
        self.copied.result()

    def take_back(self, copies: dict[str, Tensor]) -> None:
        """Use the memory of copies again."""
        self._spare.append(copies)


def _empty_like(tensor: Tensor) -> Tensor:
    """Make room in host memory; pinned, where a GPU copies to it."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)


@torch.no_grad()
def _fill(copies: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copy on the device's main stream, behind the work that made the tensors."""
    for name, tensor in tensors.items():
        copies[name].copy_(tensor, non_blocking=True)
    for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
