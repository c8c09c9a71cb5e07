"""Models that draw in steps, can do all that may be asked, and can be held up; and their application."""

import asyncio
import threading
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from starlette.testclient import TestClient
from torch import Tensor

from gdl_ray.engine import Engine
from gdl_ray.families import FAMILIES
from gdl_ray.family import (
    Batch,
    Completion,
    DataSpec,
    Density,
    Family,
    Latent,
    Likelihood,
    LikelihoodKind,
    Losses,
    Option,
    Sampler,
    State,
)
from gdl_ray.random import uniform
from serve.app import App
from serve.audit import Audit
from serve.directory import Directory, Entry
from serve.keys import Keyring
from serve.metrics import Meter
from serve.model import Model
from serve.operations import BATCH
from serve.pages import build_pages
from serve.shelf import Shelf

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
        assert len(batch.x) <= BATCH
        return -batch.x.flatten(1).sum(1, dtype=torch.float32) - batch.y / samples


class Filling(Drawing):
    """Noise where nothing is known."""

    def __init__(self, spec: DataSpec, gate: threading.Event, given: State) -> None:
        super().__init__(spec, gate)
        self.given = given

    def start(self, keys: Tensor, labels: Tensor, options: Mapping[str, Tensor]) -> State:
        return super().start(keys, labels, options) | {name: x.clone() for name, x in self.given.items()}

    def finish(self, state: State) -> Tensor:
        return torch.where(state["known"], state["given"], super().finish(state))


class Able(Explicit, Latent, Completion):
    """Its latents are the values themselves."""

    def encode(self, x: Tensor, labels: Tensor) -> Tensor:
        return x.flatten(1).float()

    def decode(self, z: Tensor, labels: Tensor) -> Tensor:
        return z.round().clamp(0, self.spec.levels - 1).to(torch.uint8).view(-1, *self.spec.shape)

    def completion(self, x: Tensor, known: Tensor) -> Sampler:
        return Filling(self.spec, self.gate, {"given": x, "known": known})


def directory(version: int = 3, **fields: Any) -> Directory:
    """A registry of one model."""
    entries = {"toy-fake": Entry(aliases={"champion": version, "old": 1})}
    return Directory(**{"entries": entries, "failure": None, "serial": 1, **fields})


async def followed(shelf: Shelf, known: Directory, warm: Collection[str] = ()) -> None:
    """Tell a shelf what the registry has, and wait until it has done what there is to do."""
    shelf.follow(known, warm)
    while shelf._tasks:
        await asyncio.sleep(0.01)


class Served:
    """A replica's application with a client that talks to it as if it came through Ray Serve."""

    def __init__(self, family: Family, audit: Path, queue_samples: int, required: bool) -> None:
        self.family = family
        self.queue_samples = queue_samples
        self.refreshed = 0
        self.keyring = Keyring(required)
        self.models: list[Model] = []
        self.shelf = Shelf(4, self._load, lambda name, version: True, Meter())
        self.audit = audit
        self.app = App(self.shelf, self.keyring, Meter(), Audit(audit), build_pages(), self._refresh)
        self.client = TestClient(self.app, base_url="http://server/v1/models/toy-fake")
        asyncio.run(followed(self.shelf, directory(), {"toy-fake"}))

    @property
    def engine(self) -> Engine:
        """Of the champion."""
        return self.models[0].engine

    def _load(self, name: str, version: int) -> Model:
        if version == 9:
            raise ValueError("it is damaged")
        engine = Engine(self.family, slots=8, queue_samples=self.queue_samples)
        self.models.append(Model(name, version, self.family, engine))
        return self.models[-1]

    async def _refresh(self) -> None:
        self.refreshed += 1

    def close(self) -> None:
        if isinstance(self.family, Implicit):
            self.family.gate.set()
        for model in self.models:
            model.close(drain=False)
        self.app.close()


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enter the families of this file into the table."""
    for family in (Implicit, Explicit, Able):
        monkeypatch.setitem(FAMILIES, family.__name__.lower(), family)


@pytest.fixture
def serve_family(tmp_path: Path) -> Iterator[Any]:
    """Make the application of a family; ends its engines after the test."""
    started: list[Served] = []

    def start(family: Family, queue_samples: int = 4096, required: bool = False) -> Served:
        started.append(Served(family, tmp_path / "audit", queue_samples, required))
        return started[-1]

    yield start
    for served in started:
        served.close()


@pytest.fixture
def explicit() -> Explicit:
    return Explicit()


@pytest.fixture
def able() -> Able:
    return Able()


@pytest.fixture
def implicit() -> Implicit:
    return Implicit()


@pytest.fixture
def tokens() -> Explicit:
    return Explicit(DataSpec(name="toy", kind="tokens", shape=(6,), levels=300, classes=0))
