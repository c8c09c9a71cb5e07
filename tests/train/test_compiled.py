"""A compiled phase computes what the family does; one that cannot be compiled says why, and runs as it is."""

import shutil
from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gdl_ray.data import Dataset, training_batch
from gdl_ray.families import FAMILIES, build, preset
from gdl_ray.families.vae import VAEConfig
from gdl_ray.family import Batch, DataSpec, Density, Family, Losses, Sampler
from gdl_ray.train.parallel import World, distribute, require_grad

SMALL = VAEConfig(width=4, hidden=32, latent=4)


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """List what was logged, but for the compiler's own diary."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("gdl_ray")]


def train(family: Family, digits: Dataset, *, compiled: bool) -> list[float]:
    """Take three optimizer steps in every phase; returns what each lost."""
    family.train()
    modules = {phase: distribute(family, phase, World(), compiled=compiled) for phase in family.phases}
    optimizers = {phase: torch.optim.AdamW(family.phase_parameters(phase)) for phase in family.phases}
    losses = []
    for step in range(3):
        batch = training_batch(digits.splits["train"], seed=0, step=step, batch_size=8)
        for phase, module in modules.items():
            require_grad(family, phase)
            loss = module(batch, phase).loss
            loss.backward()
            optimizers[phase].step()
            optimizers[phase].zero_grad()
            losses.append(loss.item())
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("key", FAMILIES)
def test_every_family_trains_compiled_as_it_does_by_itself(
    key: str, digits: Dataset, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # Up to machine code, which would take minutes: the next test goes all the way.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    model = preset(key, "digits").model
    plain, compiled = (build(key, model, digits.spec) for _ in range(2))
    expected = train(plain, digits, compiled=False)
    assert train(compiled, digits, compiled=True) == pytest.approx(expected, rel=1e-5)
    assert said(caplog) == []
    for name, rows in plain.carried.items():
        torch.testing.assert_close(compiled.carried[name], rows)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex")
def test_machine_code_computes_the_same(digits: Dataset, caplog: pytest.LogCaptureFixture) -> None:
    expected = train(build("vae", SMALL, digits.spec), digits, compiled=False)
    found = train(build("vae", SMALL, digits.spec), digits, compiled=True)
    assert found == pytest.approx(expected, rel=1e-5)
    assert said(caplog) == []


@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex")
def test_without_a_compiler_a_phase_says_so_and_runs_as_it_is(
    digits: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    expected = train(build("vae", SMALL, digits.spec), digits, compiled=False)
    nowhere: dict[str, Any] = {"cpp.cxx": ("/nonexistent/g++",), "force_disable_caches": True}
    with torch._inductor.config.patch(nowhere):
        assert train(build("vae", SMALL, digits.spec), digits, compiled=True) == expected
    (line,) = said(caplog)
    assert line.startswith("phase main is not compiled: InvalidCxxCompiler: No working C++ compiler found")


class Twice(Family):
    """Takes the gradient of a gradient that crosses the border between two compiled parts."""

    density = Density.IMPLICIT
    presets: ClassVar[dict[str, Any]] = {}
    Config = dict
    widths = ()

    def __init__(self, spec: DataSpec) -> None:
        super().__init__({}, spec)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(64, 16), nn.Linear(16, 1)

    def forward(self, batch: Batch, phase: str = "main") -> Losses:
        score = self.last(F.silu(self.first(batch.x.flatten(1) / 16)))
        torch._dynamo.graph_break()
        (slope,) = torch.autograd.grad(score.mean(), self.first.weight, create_graph=True)
        seen = self.carried.get("seen", torch.zeros(len(score)))
        self.carried = {"seen": seen + 1}
        return Losses(slope.square().sum(), {})

    def sampler(self) -> Sampler:
        raise AssertionError("nothing is sampled")


def test_a_gradient_that_cannot_be_compiled_is_found_before_it_is_needed(
    digits: Dataset, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    expected = train(Twice(digits.spec), digits, compiled=False)
    family = Twice(digits.spec)
    assert train(family, digits, compiled=True) == expected
    (line,) = said(caplog)
    assert line.startswith("phase main is not compiled: torch.compile with aot_autograd does not")
    assert torch.equal(family.carried["seen"], torch.full((8,), 3.0))  # the trial is no step


def test_what_is_no_fault_of_the_compiler_is_raised(digits: Dataset) -> None:
    family = Twice(digits.spec)
    family.first = nn.Linear(63, 16)
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        train(family, digits, compiled=True)
