"""A model that draws in steps, knows its likelihood, and can be held up."""

import threading
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import pytest
import torch
from starlette.testclient import TestClient
from torch import Tensor

from gdl_ray.engine import Engine
from gdl_ray.families import FAMILIES
from gdl_ray.family import (
    Batch,
    DataSpec,
    Density,
    Family,
    Likelihood,
    LikelihoodKind,
    Losses,
    Option,
    Sampler,
    State,
)
from gdl_ray.random import uniform
from serve.model import LIKELIHOOD_BATCH, Model, ModelApp

IMAGES = DataSpec(name="toy", kind="image", shape=(1, 4, 4), levels=17, classes=10)


class Drawing(Sampler):
    """Noise; the label in the first value, the option `shade` in the last."""

    steps = 2
    options = {"shade": Option(default=0, least=0, most=16, meaning="Value of the last.", whole=True)}

    def __init__(self, spec: DataSpec, gate: threading.Event) -> None:
        self.spec = spec
        self.gate = gate

    def start(self, keys: Tensor, labels: Tensor, options: Mapping[str, Tensor]) -> State:
        return {"x": uniform(keys, self.spec.shape), "label": labels, "shade": options["shade"]}

    def step(self, state: State, index: Tensor) -> State:
        assert self.gate.wait(timeout=30)
        return state

    def finish(self, state: State) -> Tensor:
        x = (state["x"] * self.spec.levels).to(torch.int64)
        x.view(len(x), -1)[:, 0] = state["label"].clamp(min=0)
        x.view(len(x), -1)[:, -1] = state["shade"].long()
        return x.to(torch.uint8) if self.spec.kind == "image" else x


class Implicit(Family):
    density = Density.IMPLICIT
    presets: ClassVar[dict[str, Any]] = {}
    Config = dict
    kinds = ("image", "tokens")
    widths = ()

    def __init__(self, spec: DataSpec = IMAGES) -> None:
        super().__init__({}, spec)
        self.gate = threading.Event()
        self.gate.set()

    def forward(self, batch: Batch, phase: str = "main") -> Losses:
        raise AssertionError("serving does not train")

    def sampler(self) -> Sampler:
        return Drawing(self.spec, self.gate)


class Explicit(Implicit, Likelihood):
    """Gives -(sum of the values) - label / samples for a log-likelihood."""

    density = Density.TRACTABLE
    likelihood_kind = LikelihoodKind.EXACT

    def log_likelihood(self, batch: Batch, samples: int = 1) -> Tensor:
        assert len(batch.x) <= LIKELIHOOD_BATCH
        return -batch.x.flatten(1).sum(1, dtype=torch.float32) - batch.y / samples


class Served:
    """A model's application with a client that talks to it as if it came through Ray Serve."""

    def __init__(self, family: Family, queue_samples: int) -> None:
        self.family = family
        self.app = ModelApp("toy-fake")
        self.app.model = Model("toy-fake", 3, family, Engine(family, slots=8, queue_samples=queue_samples))
        self.client = TestClient(self.app, base_url="http://server", root_path="")

    def close(self) -> None:
        if isinstance(self.family, Implicit):
            self.family.gate.set()
        assert self.app.model is not None
        self.app.model.engine.close(drain=False)


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enter the families of this file into the table."""
    monkeypatch.setitem(FAMILIES, "implicit", Implicit)
    monkeypatch.setitem(FAMILIES, "explicit", Explicit)


@pytest.fixture
def serve_family() -> Iterator[Any]:
    """Make the application of a family; ends its engine after the test."""
    started: list[Served] = []

    def start(family: Family, queue_samples: int = 4096) -> Served:
        started.append(Served(family, queue_samples))
        return started[-1]

    yield start
    for served in started:
        served.close()


@pytest.fixture
def explicit() -> Explicit:
    return Explicit()


@pytest.fixture
def implicit() -> Implicit:
    return Implicit()


@pytest.fixture
def tokens() -> Explicit:
    return Explicit(DataSpec(name="toy", kind="tokens", shape=(6,), levels=300, classes=0))
