"""A batch in pieces has the gradient of the whole, and one that exceeds the memory is told what fits."""

import weakref
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from gdl_ray.data import Dataset, training_batch
from gdl_ray.families import FAMILIES, build, preset
from gdl_ray.family import Batch, DataSpec, Density, Family, Losses, Optimization, Sampler
from gdl_ray.train.loop import Training
from gdl_ray.train.micro import MemoryExhaustedError
from gdl_ray.train.parallel import World
from gdl_ray.train.plan import Budget, Plan

BATCH = 13


def trained(key: str, digits: Dataset, micro_batch: int) -> Training:
    """Take two steps of plain gradient descent: Adam magnifies the rounding of small gradients."""
    chosen = preset(key, "digits")
    optimization = replace(chosen.optimization, batch_size=BATCH, precision="float32")
    plan = Plan(optimization=optimization, budget=Budget(steps=100), micro_batch=micro_batch)
    training = Training(build(key, chosen.model, digits.spec), plan, World())
    descent: dict[str, Any] = {
        phase: torch.optim.SGD(parameters) for phase, parameters in training._parameters.items()
    }
    training._optimizers = descent
    for step in range(2):
        training.advance(training_batch(digits.splits["train"], seed=0, step=step, batch_size=BATCH))
    return training


@pytest.mark.parametrize("key", FAMILIES)
def test_pieces_train_as_the_whole_batch_does(key: str, digits: Dataset) -> None:
    whole, pieces = trained(key, digits, 0), trained(key, digits, 4)
    for name, value in whole.family.state_dict().items():
        torch.testing.assert_close(pieces.family.state_dict()[name], value, rtol=1e-4, atol=1e-6)
    assert whole.family.carried.keys() == pieces.family.carried.keys()
    for name, rows in whole.family.carried.items():
        torch.testing.assert_close(pieces.family.carried[name], rows, rtol=1e-4, atol=1e-4)
    one, other = whole.read_metrics(), pieces.read_metrics()
    assert one.keys() == other.keys()
    for name in (name for name in one if name.endswith(("loss", "gradient_norm"))):
        assert other[name] == pytest.approx(one[name], rel=1e-4)


class Greedy(Family):
    """Has memory for so many examples at once, and no more."""

    density = Density.IMPLICIT
    presets: ClassVar[dict[str, Any]] = {}
    Config = dict
    widths = ()

    def __init__(self, spec: DataSpec, room: int, fails: str = "forward") -> None:
        super().__init__({}, spec)
        self.room, self.fails, self.seen = room, fails, list[int]()
        self.held: list[weakref.ref[Tensor]] = []
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, batch: Batch, phase: str = "main") -> Losses:
        self.seen.append(len(batch.x))
        assert all(kept() is None for kept in self.held)  # the failed pass has left the memory
        self.carried = {"seen": self.carried.get("seen", torch.zeros(len(batch.x))) + 1}
        hidden = self.weight.exp() * batch.x.float()
        if len(batch.x) > self.room:
            self.held.append(weakref.ref(hidden))
            if self.fails == "forward":
                exhaust()
            hidden.register_hook(exhaust)  # type: ignore[no-untyped-call]
        return Losses(hidden.square().mean(), {})

    def sampler(self) -> Sampler:
        raise AssertionError("nothing is sampled")


def exhaust(gradient: Tensor | None = None) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore.")


def advance(family: Family, digits: Dataset, micro_batch: int = 0) -> None:
    plan = Plan(optimization=Optimization(batch_size=BATCH), budget=Budget(steps=9), micro_batch=micro_batch)
    batch = training_batch(digits.splits["train"], seed=0, step=0, batch_size=BATCH)
    Training(family, plan, World()).advance(batch)


@pytest.mark.parametrize("fails", ["forward", "backward"])
@pytest.mark.parametrize(("room", "fits"), [(12, 7), (4, 4), (1, 1)])
def test_out_of_memory_says_which_micro_batch_fits(digits: Dataset, room: int, fits: int, fails: str) -> None:
    message = (
        rf"13 examples at once exceed .* \(CUDA out of memory.*GiB\.\); {fits} fit: --micro-batch {fits}"
    )
    with pytest.raises(MemoryExhaustedError, match=message):
        advance(Greedy(digits.spec, room, fails), digits)
    advance(Greedy(digits.spec, room), digits, micro_batch=fits)


def test_out_of_memory_for_one_example_is_said(digits: Dataset) -> None:
    with pytest.raises(MemoryExhaustedError, match="nor does one: make the model smaller"):
        advance(Greedy(digits.spec, room=0), digits)


def test_pieces_are_of_about_one_size_and_carry_their_own_rows(digits: Dataset) -> None:
    family = Greedy(digits.spec, room=5)
    advance(family, digits, micro_batch=5)
    assert sorted(family.seen) == [4, 4, 5]
    assert torch.equal(family.carried["seen"], torch.ones(BATCH))


def test_a_negative_micro_batch_is_named() -> None:
    with pytest.raises(ValueError, match="micro_batch=-1 must not be negative"):
        Plan(optimization=Optimization(), budget=Budget(steps=1), micro_batch=-1)
