"""Snapshots: a checkpoint in memory of its own, written while training goes on.

The loop waits only for the copy. Memory that nobody reads any more is used again: asking for new pages would
take longer than the copy.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gdl_ray.train import checkpoint
from gdl_ray.train.checkpoint import Contents


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """A checkpoint that is not on disk yet."""

    contents: Contents
    release: Callable[[], None]
    """Give the memory back: call it once, when nobody will write this snapshot any more."""

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
        checkpoint.save(directory, self.contents)


class Memory:
    """Host memory for copies of one set of tensors, taken again and again."""

    def __init__(self) -> None:
        self._spare: list[dict[str, Tensor]] = []

    @torch.no_grad()
    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy tensors from whatever device they are on."""
        copies = self._spare.pop() if self._spare else {}
        for name in copies.keys() - tensors.keys():
            del copies[name]
        for name, tensor in tensors.items():
            if name not in copies or copies[name].shape != tensor.shape:
                copies[name] = _empty_like(tensor)
            copies[name].copy_(tensor, non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()
        return copies

    def take_back(self, copies: dict[str, Tensor]) -> None:
        """Use the memory of copies again."""
        self._spare.append(copies)


def _empty_like(tensor: Tensor) -> Tensor:
    """Make room in host memory; pinned, where a GPU copies to it."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
