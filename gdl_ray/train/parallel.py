"""Data parallelism: one DistributedDataParallel wrapper per phase, over that phase's parameters alone."""

import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gdl_ray.data.batches import share_of
from gdl_ray.family import Family
from gdl_ray.train.compiled import Compiled

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class World:
    """This worker among its peers; their process group is the default one."""

    rank: int = 0
    size: int = 1
    device: torch.device = CPU

    def sum(self, values: Tensor) -> Tensor:
        """Add a tensor up over the workers, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, rows: Tensor, total: int) -> Tensor:
        """Lay the workers' rows, each its share of `total`, one below the other."""
        if self.size == 1:
            return rows
        lengths = [len(share_of(total, rank, self.size)) for rank in range(self.size)]
        mine = rows.new_zeros(max(lengths), *rows.shape[1:])  # shares of one length, as all_gather wants them
        mine[: len(rows)] = rows
        shares = [torch.empty_like(mine) for _ in lengths]
        dist.all_gather(shares, mine)
        return torch.cat([share[:length] for share, length in zip(shares, lengths, strict=True)])

    def share(self, rows: Tensor) -> Tensor:
        """Take this worker's rows of what `gather` made, with any number of workers."""
        mine = share_of(len(rows), self.rank, self.size)
        return rows[mine.start : mine.stop].clone()

    def least(self, value: float) -> float:
        """Agree on the least of the workers' values."""
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MIN)
        return tensor.item()

    def from_first(self, *values: float) -> list[float]:
        """Agree on the first worker's values."""
        if self.size == 1:  # a GPU need not be waited for
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.broadcast(tensor, src=0)
        numbers: list[float] = tensor.tolist()
        return numbers

    def text_from_first(self, text: str) -> str:
        """Agree on the first worker's text."""
        texts = [text]
        if self.size > 1:
            dist.broadcast_object_list(texts, src=0, device=self.device)
        return texts[0]


def require_grad(family: Family, phase: str) -> None:
    """Let gradients flow to the parameters of one phase, and to no other."""
    family.requires_grad_(False)
    for parameter in family.phase_parameters(phase):
        parameter.requires_grad_(True)


def distribute(family: Family, phase: str, world: World, *, compiled: bool = False) -> nn.Module:
    """Wrap a family so that the gradients of one phase are averaged over the workers.

    A wrapper sees only what requires a gradient when it is made and when it runs, so it never searches for
    unused parameters: call `require_grad` before each use.
    """
    module = Compiled(family) if compiled else family
    require_grad(family, phase)
    if world.size == 1:
        return module
    return DistributedDataParallel(module, forward_sync_buffers=False)


def sync_gradients(module: nn.Module, now: bool) -> AbstractContextManager[object]:
    """Average the gradients of a pass over the workers; or leave them, to be added to the next pass's."""
    if now or not isinstance(module, DistributedDataParallel):
        return nullcontext()
    return module.no_sync()


def fast_matrix_products(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Compute matrix products in a precision, or in float32 where the processor is slow at it."""
    low = precision == "bfloat16" and _has_bfloat16(device.type)
    return torch.autocast(device.type, torch.bfloat16, enabled=low)


@lru_cache
def _has_bfloat16(device: str) -> bool:
    fast = torch.cpu._is_avx512_bf16_supported() if device == "cpu" else torch.cuda.is_bf16_supported(False)
    if not fast:
        logging.getLogger(__name__).warning("this %s is slow at bfloat16: training in float32", device)
    return bool(fast)
