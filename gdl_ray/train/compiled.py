"""Compilation of a phase by torch.compile, or the reason why it runs as it is."""

import logging
from collections.abc import Callable

import torch
from torch import nn

from gdl_ray.family import Batch, Family, Losses

_Forward = Callable[[Batch, str], Losses]


class Compiled(nn.Module):
    """A family whose forward is compiled for one phase, if that works: the first batch tells.

    Compilers fail for want of a C++ compiler, of an operation, or of a gradient of a gradient, and some of it
    only when the gradient is computed. So the first batch is tried, forward and backward, before it trains.
    """

    def __init__(self, family: Family):
        super().__init__()
        self.family = family
        self._chosen: _Forward | None = None

    def forward(self, batch: Batch, phase: str) -> Losses:
        """Compute the loss of the phase, as the family does."""
        self._chosen = self._chosen or self._choose(batch, phase)
        return self._chosen(batch, phase)

    def _choose(self, batch: Batch, phase: str) -> _Forward:
        # A gradient within the loss becomes part of the graph, and that graph can be differentiated.
        torch._dynamo.config.trace_autograd_ops = True
        # Few shapes are ever met, and each is fastest by itself.
        compiled: _Forward = torch.compile(self.family.forward, dynamic=False)
        carried = self.family.carried
        try:
            loss = compiled(batch, phase).loss
            torch.autograd.grad(loss, list(self.family.phase_parameters(phase)), allow_unused=True)
        except (
            Exception
        ) as error:  # a compiler raises what it likes; what is no fault of its own, eager raises too
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            logging.getLogger(__name__).warning("phase %s is not compiled: %s", phase, reason)
            return self.family.forward
        finally:
            self.family.carried = carried
        return compiled
