"""Data parallelism: one DistributedDataParallel wrapper per phase, over that phase's parameters alone."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gdl_ray.family import Family

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class World:
    """This worker among its peers; their process group is the default one."""

    rank: int = 0
    size: int = 1
    device: torch.device = CPU

    def sum(self, values: Tensor) -> Tensor:
        """Add a tensor up over the workers."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def from_first(self, value: float) -> float:
        """Agree on the first worker's value."""
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        if self.size > 1:
            dist.broadcast(tensor, src=0)
        return tensor.item()


def require_grad(family: Family, phase: str) -> None:
    """Let gradients flow to the parameters of one phase, and to no other."""
    family.requires_grad_(False)
    for parameter in family.phase_parameters(phase):
        parameter.requires_grad_(True)


def distribute(family: Family, phase: str, world: World) -> nn.Module:
    """Wrap a family so that the gradients of one phase are averaged over the workers.

    A wrapper sees only what requires a gradient when it is made and when it runs, so it never searches for
    unused parameters: call `require_grad` before each use.
    """
    if world.size == 1:
        return family
    require_grad(family, phase)
    return DistributedDataParallel(family, forward_sync_buffers=False, gradient_as_bucket_view=True)
