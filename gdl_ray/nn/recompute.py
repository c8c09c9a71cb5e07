"""Blocks that forget their hidden values and compute them again in the backward pass: less memory, more time.

References:
    Chen, Xu, Zhang, Guestrin. Training Deep Nets with Sublinear Memory Cost. 2016.
    https://arxiv.org/abs/1604.06174
"""

from abc import ABC, abstractmethod
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


class Block(nn.Module, ABC):
    """A part of a network, met many times, whose input is small beside what it keeps for its gradient.

    What it computes must be a function of its arguments and its weights: noise is, by its key.
    """

    @abstractmethod
    def forward(self, *args: Any) -> Any:
        """Compute the block's output."""


def recompute_blocks(network: nn.Module) -> None:
    """Let every block of a network keep its input alone; loss and gradient stay the same."""
    for block in network.modules():
        if isinstance(block, Block):
            forward = type(block).forward.__get__(block)
            block.forward = partial(  # type: ignore[method-assign]
                checkpoint, forward, use_reentrant=False, preserve_rng_state=False
            )
