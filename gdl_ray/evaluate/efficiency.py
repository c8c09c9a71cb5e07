"""What a model costs: to train, to hold and to sample.

FLOPs are those of matrix products, convolutions and attention, two for each multiplication with its addition.
"""

import copy
import statistics
import time
import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from gdl_ray.family import Batch, Family
from gdl_ray.random import fold

_MOMENTS = 2  # that Adam keeps of each weight


def sampling_speed(model: Family, batch: int, repeats: int = 5) -> float:
    """Time the drawing of samples, of all classes in turn, with the model's own options.

    Args:
        model: a family in evaluation mode.
        batch: samples that are drawn at once.
        repeats: batches that are timed, after one that is not.

    Returns:
        Seconds per batch, the median.
    """
    device = next(model.parameters()).device
    keys = fold(0, torch.arange(batch, device=device))
    labels = torch.arange(batch, device=device) % model.spec.classes if model.spec.classes else None
    seconds = []
    for _ in range(repeats + 1):
        since = time.perf_counter()
        model.sample(keys, labels)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - since)
    return statistics.median(seconds[1:])


def parameters(model: Family) -> int:
    """Count the weights that are trained."""
    return sum(parameter.numel() for parameter in model.parameters())


def training_memory_bytes(model: Family, batch: Batch) -> int:
    """Add up what a training step holds when it holds most.

    That is the weights, their average and Adam's two moments of them, and in the phase that takes most its
    gradient and the values that the backward pass needs; not what a single operation takes meanwhile. Values
    have the precision of the autocast that is on around the call, float32 without one.

    Args:
        model: a family, which stays as it is.
        batch: examples of a step on the model's device.
    """
    model = copy.deepcopy(model).train()
    trained = _bytes(model.parameters())
    state = [*model.parameters(), *model.buffers()]
    most = 0
    for phase in model.phases:
        kept = _Kept(state)
        with saved_tensors_hooks(kept.pack, kept.unpack):
            _differentiate(model, batch, phase)
        most = max(most, kept.most_bytes + _bytes(model.phase_parameters(phase)))
    return 2 * _bytes(state) + _MOMENTS * trained + most


def step_flops(model: Family, batch: Batch, phases: Sequence[str]) -> int:
    """Count the FLOPs of one optimizer step, forward and backward.

    Args:
        model: a family, which stays as it is.
        batch: examples of a step on the model's device.
        phases: those of the step, `model.phases` for all.
    """
    model = copy.deepcopy(model).train()
    with _Flops() as flops:  # type: ignore[no-untyped-call]
        for phase in phases:
            _differentiate(model, batch, phase)
    return int(flops.total)


def seconds_to(curve: Sequence[tuple[float, float]], quality: float) -> float | None:
    """Find when a curve first was at a quality or better.

    Args:
        curve: seconds and values, where less is better; in any order.
        quality: the value to reach.

    Returns:
        The seconds of the first point that has reached it, or None.
    """
    return min((seconds for seconds, value in curve if value <= quality), default=None)


def _differentiate(model: Family, batch: Batch, phase: str) -> None:
    """Compute the gradient of a phase, as a training step does."""
    trained = list(model.phase_parameters(phase))
    model.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    torch.autograd.grad(model(batch, phase).loss, trained)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


class _Held:
    """A tensor that a graph holds; it dies with the node that needs it."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


class _Kept:
    """Counts the bytes that graphs hold for the backward pass; those that several nodes share, once."""

    def __init__(self, besides: Iterable[Tensor]):
        self.most_bytes = 0
        self._bytes = 0
        self._besides = {_storage(tensor) for tensor in besides}
        self._holders: Counter[int] = Counter()

    def pack(self, tensor: Tensor) -> _Held:
        """Take a tensor in."""
        held, storage, size = _Held(tensor), _storage(tensor), tensor.untyped_storage().nbytes()
        if storage not in self._besides:
            self._hold(storage, size)
            weakref.finalize(held, self._release, storage, size)
        return held

    def unpack(self, held: _Held) -> Tensor:
        """Give it back."""
        return held.tensor

    def _hold(self, storage: int, size: int) -> None:
        self._bytes += 0 if self._holders[storage] else size
        self._holders[storage] += 1
        self.most_bytes = max(self.most_bytes, self._bytes)

    def _release(self, storage: int, size: int) -> None:
        self._holders[storage] -= 1
        self._bytes -= 0 if self._holders[storage] else size


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class _Flops(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up FLOPs by the formulas of torch's FlopCounterMode.

    That itself follows modules too, and fails where a loss takes a gradient.
    """

    total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and add what it takes."""
        result = func(*args, **kwargs or {})
        # Attention on a CPU is called otherwise than on a GPU.
        name = func._overloadpacket.__name__.replace("_for_cpu", "")
        if formula := flop_registry.get(getattr(torch.ops.aten, name, None)):
            self.total += formula(*args, **kwargs or {}, out_val=result)
        return result
