"""Costs against closed forms of a small network, and against torch's own counters and allocator."""

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from gdl_ray.evaluate.efficiency import (
    parameters,
    sampling_speed,
    seconds_to,
    step_flops,
    training_memory_bytes,
)
from gdl_ray.families import build, preset
from gdl_ray.family import Batch, DataSpec, Density, Family, Losses, Sampler, State
from gdl_ray.random import fold, uniform
from gdl_ray.train.loop import Training
from gdl_ray.train.parallel import World
from gdl_ray.train.plan import Budget, Plan

SPEC = DataSpec(name="grey", kind="image", shape=(1, 8, 8), levels=17, classes=10)
B, DIMS, WIDTH = 32, 64, 48
FLOAT = 4  # bytes


@dataclass(frozen=True)
class TwoLayers:
    """Nothing to configure."""


class Network(Family):
    """Two phases, each of a network of two layers; its samples are labels."""

    density = Density.IMPLICIT
    phases = ("first", "second")
    Config = TwoLayers

    def __init__(self) -> None:
        super().__init__(TwoLayers(), SPEC)
        self.nets = nn.ModuleDict({"first": layers(WIDTH), "second": layers(2 * WIDTH)})
        self.asked: list[list[int]] = []

    def forward(self, batch: Batch, phase: str = "main") -> Losses:
        return Losses(self.nets[phase](batch.x.flatten(1).float()).square().mean(), {})

    def phase_parameters(self, phase: str) -> Any:
        return self.nets[phase].parameters()

    def sampler(self) -> Sampler:
        return Echo(self.asked)


def layers(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(DIMS, width), nn.SiLU(), nn.Linear(width, 1))


class Echo(Sampler):
    """Notes the labels that it is asked for."""

    steps = 0

    def __init__(self, asked: list[list[int]]):
        self.asked = asked

    def start(self, keys: Tensor, labels: Tensor, options: Mapping[str, Tensor]) -> State:
        self.asked.append(labels.tolist())
        return {"x": labels}

    def step(self, state: State, index: Tensor) -> State:
        return state

    def finish(self, state: State) -> Tensor:
        return state["x"]


def batch_of(size: int) -> Batch:
    keys = fold(3, torch.arange(size))
    x = (uniform(keys, SPEC.shape) * SPEC.levels).to(torch.uint8)
    return Batch(x, torch.arange(size) % SPEC.classes, keys)


def test_weights_are_counted() -> None:
    assert parameters(Network()) == sum((DIMS + 1) * width + width + 1 for width in (WIDTH, 2 * WIDTH))


def test_flops_of_a_network() -> None:
    model = Network()
    # A layer's output and its weights' gradient cost a product each; the first has no gradient to pass on.
    expected = [2 * B * width * (2 * DIMS + 3) for width in (WIDTH, 2 * WIDTH)]
    assert [step_flops(model, batch_of(B), [phase]) for phase in model.phases] == expected
    assert step_flops(model, batch_of(B), model.phases) == sum(expected)


@pytest.mark.parametrize("key", ["flow", "vae"])  # without attention, which it misses on a CPU
def test_flops_of_a_family_by_another_counter(key: str) -> None:
    model = build(key, preset(key, "digits").model, SPEC)
    counted = step_flops(model, batch_of(4), model.phases)
    with FlopCounterMode(display=False) as counter:
        model.train()(batch_of(4)).loss.backward()
    assert counted == counter.get_total_flops() > 0


def test_memory_of_a_network() -> None:
    model, width = Network(), 2 * WIDTH
    largest = (DIMS + 1) * width + width + 1  # the second phase's
    # Kept: the input, what goes into SiLU, what comes out of it, and what is squared.
    kept = B * (DIMS + 2 * width + 1)
    expected = FLOAT * (4 * parameters(model) + largest + kept)
    assert training_memory_bytes(model, batch_of(B)) == expected


def allocated_by(work: Callable[[], None]) -> int:
    """Most bytes that work has allocated and not freed, as torch's profiler saw it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    results: Any = profiler.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: int(event.start_ns())):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize("key", ["autoregressive", "vae", "energy", "gan"])
def test_memory_of_a_family_as_allocated(key: str) -> None:
    chosen = preset(key, "digits")
    model, batch = build(key, chosen.model, SPEC), batch_of(64)
    optimization = replace(chosen.optimization, precision="float32")
    training = Training(
        copy.deepcopy(model), Plan(optimization=optimization, budget=Budget(steps=9)), World()
    )
    training.advance(batch)  # moments are made
    state = [*model.parameters(), *model.buffers(), *model.parameters()]  # as large as the moments
    held = 2 * sum(tensor.nbytes for tensor in state)
    real = held + allocated_by(lambda: training.advance(batch))
    assert training_memory_bytes(model, batch) == pytest.approx(real, rel=0.15)


def test_autocast_halves_what_is_kept() -> None:
    model = build("hierarchical", preset("hierarchical", "digits").model, SPEC)
    whole = training_memory_bytes(model, batch_of(64))
    with torch.autocast("cpu", torch.bfloat16):
        low = training_memory_bytes(model, batch_of(64))
    assert low < 0.9 * whole


def test_counting_leaves_a_model_as_it_is() -> None:
    model = build("energy", preset("energy", "digits").model, SPEC).eval()
    before = copy.deepcopy(model.state_dict())
    training_memory_bytes(model, batch_of(4))
    step_flops(model, batch_of(4), model.phases)
    assert not model.training
    assert not model.carried
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_sampling_is_timed_after_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    # Read before and after each batch: 100 s for the first, then 3, 1, and 2.
    readings = iter([0.0, 100, 100, 103, 103, 104, 104, 106])
    model = Network().eval()
    with monkeypatch.context() as patch:
        patch.setattr(time, "perf_counter", lambda: next(readings))
        assert sampling_speed(model, batch=12, repeats=3) == 2
    assert model.asked == [[*range(10), 0, 1]] * 4


def test_the_first_point_that_is_good_enough_counts() -> None:
    curve = [(10.0, 3.0), (20.0, 2.5), (30.0, 2.6), (40.0, 2.0), (50.0, float("nan"))]
    assert [seconds_to(curve, quality) for quality in (3.5, 2.5, 2.2, 1.9)] == [10, 20, 40, None]
    assert seconds_to([], 1.0) is None
