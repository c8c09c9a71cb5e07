"""The loop, without ray: exact to resume, indifferent to the number of workers, loud when it diverges."""

import gc
import json
import math
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.multiprocessing.spawn import spawn

from gdl_ray.data import Dataset, load, training_batch
from gdl_ray.evaluate.likelihood import Nats
from gdl_ray.families import build
from gdl_ray.families.vae import VAEConfig
from gdl_ray.family import Batch, DataSpec, Density, Family, Losses, Optimization, Sampler
from gdl_ray.random import normal
from gdl_ray.train import checkpoint, parallel, validation
from gdl_ray.train.checkpoint import Contents
from gdl_ray.train.local import LocalRun
from gdl_ray.train.loop import DivergenceError, Report, Training, train
from gdl_ray.train.parallel import World
from gdl_ray.train.plan import Budget, Plan, learning_rate
from gdl_ray.train.validation import SCORE

ROOT = Path(__file__).parents[2]
SMALL = VAEConfig(width=4, hidden=32, latent=4)
PLAN = Plan(
    optimization=Optimization(batch_size=32, learning_rate=2e-3),
    budget=Budget(steps=60),
    report_every=10,
    checkpoint_every=20,
)


class Record:
    """Reporter that keeps reports, and the last checkpoint."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.reports: list[Report] = []

    def __call__(self, report: Report) -> None:
        self.reports.append(report)
        if report.snapshot:
            if self.folder:
                report.snapshot.write(self.folder / f"step-{report.step}")
            report.snapshot.release()

    def saved(self, step: int) -> Path:
        assert self.folder
        return self.folder / f"step-{step}"

    def load(self, step: int) -> Contents:
        return checkpoint.load(self.saved(step))


def same_state(first: Path, second: Path) -> bool:
    """Compare all that training goes on from, bit by bit; what the clock says is no part of it."""
    for file in ("model.safetensors", "resume/tensors.safetensors"):
        if (first / file).read_bytes() != (second / file).read_bytes():
            return False
    counters = [json.loads((path / "resume/counters.json").read_text()) for path in (first, second)]
    return all(counters[0][key] == counters[1][key] for key in counters[0] if key != "seconds")


def compare_reports(first: list[Report], second: list[Report]) -> None:
    """Compare all metrics, bit by bit, but for what the clock says."""
    for before, after in zip(first, second, strict=True):
        for name in before.metrics.keys() - {"seconds", "examples_per_s"}:
            assert before.metrics[name] == after.metrics[name], name


def test_reports_are_regular_and_complete(digits: Dataset, tmp_path: Path) -> None:
    record = Record(tmp_path)
    train(build("vae", SMALL, digits.spec), digits, PLAN, record)
    assert [report.step for report in record.reports] == [10, 20, 30, 40, 50, 60]
    assert [report.step for report in record.reports if report.snapshot] == [20, 40, 60]
    losses = [report.metrics["train/loss"] for report in record.reports]
    assert losses[-1] < losses[0]
    assert record.reports[-1].metrics["progress"] == 1
    assert all((SCORE in report.metrics) == (report.snapshot is not None) for report in record.reports)


def test_resumed_is_the_same_as_never_interrupted(digits: Dataset, tmp_path: Path) -> None:
    whole, resumed = Record(tmp_path / "whole"), Record(tmp_path / "resumed")
    train(build("vae", SMALL, digits.spec), digits, PLAN, whole)
    # Other initial weights: a resumed run must not remember any.
    train(
        build("vae", SMALL, digits.spec, seed=9),
        digits,
        PLAN,
        resumed,
        resume=whole.load(20),
    )
    assert [report.step for report in resumed.reports] == [30, 40, 50, 60]
    compare_reports(whole.reports[2:], resumed.reports)
    assert same_state(whole.saved(60), resumed.saved(60))


KILLED = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from gdl_ray.data import load
from gdl_ray.families import build
from gdl_ray.train import loop
from gdl_ray.train.checkpoint import load as load_checkpoint
from gdl_ray.train.checkpoint import Contents
from gdl_ray.train.local import LocalRun
from gdl_ray.train.loop import train
from tests.train.test_loop import LONG, SMALL
digits = load("digits", Path(sys.argv[1]))
run = LocalRun(Path(sys.argv[2]))
train(build("vae", SMALL, digits.spec), digits, LONG, run, resume=run.last and load_checkpoint(run.last))
"""
LONG = replace(PLAN, budget=Budget(steps=200), patience=100)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_killed_and_resumed_is_the_same_as_never_killed(tmp_path: Path, seed: int) -> None:
    digits = load("digits", tmp_path / "data")
    whole, killed = LocalRun(tmp_path / "whole"), tmp_path / "killed"
    train(build("vae", SMALL, digits.spec), digits, LONG, whole)
    command = [sys.executable, "-c", KILLED, str(tmp_path / "data"), str(killed)]
    moments = random.Random(seed)
    for _ in range(3):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT)
        assert process.stdout
        process.stdout.readline()  # the first report: training is under way
        time.sleep(moments.uniform(0, 0.7))
        process.kill()
        process.communicate()
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    last = LocalRun(killed)
    assert whole.last
    assert last.last
    assert last.last.name == whole.last.name
    assert same_state(whole.last, last.last)


def test_a_run_goes_on_from_what_is_whole_in_its_folder(digits: Dataset, tmp_path: Path) -> None:
    run = LocalRun(tmp_path)
    train(build("vae", SMALL, digits.spec), digits, PLAN, run)
    torn = tmp_path / "step-00000080"
    shutil.copytree(tmp_path / "step-00000060", torn)
    (torn / "manifest.json").unlink()
    again = LocalRun(tmp_path)
    assert (again.last, again.best) == (run.last, run.best)
    assert not torn.exists()


def worker(rank: int, world_size: int, meeting: Path, function: Callable[[World], None]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size)
    function(World(rank, world_size))
    gc.collect()  # what is distributed must go before its group: freed as Python ends, it aborts
    dist.destroy_process_group()


def in_workers(count: int, folder: Path, function: Callable[[World], None]) -> None:
    """Run a picklable function in a group of processes, and wait."""
    spawn(worker, (count, folder / "meeting", function), nprocs=count)  # type: ignore[no-untyped-call]


def train_vae(root: Path, world: World) -> None:
    digits = load("digits", root / "data")
    plan = replace(PLAN, budget=Budget(steps=50), checkpoint_every=50)
    record = Record(root / f"{world.size}-workers" if world.rank == 0 else None)
    train(build("vae", SMALL, digits.spec), digits, plan, record, world=world)


@pytest.mark.slow
def test_two_workers_train_what_one_does(tmp_path: Path) -> None:
    train_vae(tmp_path, World())
    in_workers(2, tmp_path, partial(train_vae, tmp_path))
    alone, shared = (
        load_file(tmp_path / f"{count}-workers/step-50/resume/tensors.safetensors") for count in (1, 2)
    )
    for name in alone:
        if name.startswith("weights/"):
            difference = (alone[name] - shared[name]).norm() / alone[name].norm().clamp(min=1e-12)
            assert difference < 1e-5, name


def test_interrupted_at_any_step_is_the_same_as_never_interrupted(digits: Dataset, tmp_path: Path) -> None:
    """A checkpoint between two reports keeps what the next report has gathered so far."""
    whole, first, second = (Record(tmp_path / name) for name in ("whole", "first", "second"))
    train(build("vae", SMALL, digits.spec), digits, PLAN, whole)
    notices = iter([False] * 26 + [True])
    family = build("vae", SMALL, digits.spec)
    assert not train(family, digits, PLAN, first, interrupted=lambda: next(notices))
    assert [report.step for report in first.reports] == [10, 20, 27]
    assert first.reports[-1].metrics == {}
    assert train(
        build("vae", SMALL, digits.spec, seed=9),
        digits,
        PLAN,
        second,
        resume=first.load(27),
    )
    assert [report.step for report in second.reports] == [30, 40, 50, 60]
    told = [report for report in [*first.reports, *second.reports] if report.metrics]
    compare_reports(whole.reports, told)
    assert same_state(whole.saved(60), second.saved(60))


def test_a_checkpoint_holds_all_past_reports(digits: Dataset, tmp_path: Path) -> None:
    record = Record(tmp_path)
    train(build("vae", SMALL, digits.spec), digits, PLAN, record)
    history = json.loads((record.saved(60) / "resume/history.json").read_text())
    assert history == [[report.step, report.metrics] for report in record.reports]


def test_a_snapshot_does_not_change_while_training_goes_on(digits: Dataset, tmp_path: Path) -> None:
    training = Training(build("vae", SMALL, digits.spec), PLAN, World())
    batches = [training_batch(digits.splits["train"], seed=0, step=s, batch_size=32) for s in range(3)]
    training.advance(batches[0])
    early = training.snapshot(None, evaluated=False)
    assert early
    early.write(tmp_path / "before")
    training.advance(batches[1])
    early.write(tmp_path / "after")
    assert same_state(tmp_path / "before", tmp_path / "after")
    early.release()
    late = training.snapshot(None, evaluated=False)  # in the same memory
    assert late
    late.write(tmp_path / "late")
    assert not same_state(tmp_path / "before", tmp_path / "late")


def train_elastically(root: Path, stage: int, world: World) -> None:
    """Train a part of the plan, going on from what another number of workers did before.

    It is interrupted after 25 steps, and again after some more, amid what a report gathers.
    """
    digits = load("digits", root / "data")
    record = Record(root / f"stage-{stage}" if world.rank == 0 else None)
    notices = iter(range(1, 10**6))
    before = max((root / f"stage-{stage - 1}").glob("step-*"), default=root)
    train(
        build("vae", SMALL, digits.spec),
        digits,
        PLAN,
        record,
        resume=checkpoint.load(before) if stage else None,
        world=world,
        interrupted=lambda: next(notices) >= (25, 5, 10**6)[stage],
    )


@pytest.mark.slow
def test_a_change_of_workers_does_not_change_the_curve(tmp_path: Path) -> None:
    digits = load("digits", tmp_path / "data")
    whole = Record(tmp_path / "whole")
    train(build("vae", SMALL, digits.spec), digits, PLAN, whole)
    for stage, workers in enumerate([1, 3, 2]):
        if workers == 1:
            train_elastically(tmp_path, stage, World())
        else:
            in_workers(workers, tmp_path, partial(train_elastically, tmp_path, stage))
    stops = [int(max((tmp_path / f"stage-{n}").glob("step-*")).name[5:]) for n in range(2)]
    assert stops[0] == 25
    assert all(stop % PLAN.report_every for stop in stops)
    history = json.loads((tmp_path / "stage-2/step-60/resume/history.json").read_text())
    assert [step for step, _ in history] == [report.step for report in whole.reports]
    for before, (_, after) in zip(whole.reports, history, strict=True):
        for name in ("train/loss", "train/gradient_norm", "train/kl_nats"):
            assert after[name] == pytest.approx(before.metrics[name], rel=1e-4)


class Duel(Family):
    """Two phases over parameters of their own, one with a gradient of a gradient, as in a GAN."""

    density = Density.IMPLICIT
    phases = ("critic", "generator")
    presets: ClassVar[dict[str, Any]] = {}
    Config = dict
    widths = ()

    def __init__(self, spec: DataSpec) -> None:
        super().__init__({}, spec)
        self.critic = nn.Sequential(nn.Linear(64, 16), nn.SiLU(), nn.Linear(16, 1))
        self.generator = nn.Linear(8, 64)

    def phase_parameters(self, phase: str) -> Iterator[nn.Parameter]:
        return (self.critic if phase == "critic" else self.generator).parameters()

    def forward(self, batch: Batch, phase: str = "main") -> Losses:
        real = (batch.x.flatten(1) / 16).requires_grad_()
        fake = self.generator(normal(batch.key, (8,)))
        score = self.critic(real)
        if phase == "generator":
            return Losses((score.detach() - self.critic(fake)).mean(), {})
        (slope,) = torch.autograd.grad(score.sum(), real, create_graph=True)
        penalty = slope.square().sum(1).mean()
        return Losses((self.critic(fake.detach()) - score).mean() + penalty, {"penalty": penalty.detach()})

    def sampler(self) -> Sampler:
        raise AssertionError("the loop asks for samples only to save them")


class Chain(Family):
    """Carries a number for each example from step to step: it grows by the example's first pixel."""

    density = Density.IMPLICIT
    presets: ClassVar[dict[str, Any]] = {}
    Config = dict
    widths = ()
    healthy: ClassVar[dict[str, tuple[float, float]]] = {"height": (0.0, 400.0)}
    advice = "climb less"

    def __init__(self, spec: DataSpec) -> None:
        super().__init__({}, spec)
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, batch: Batch, phase: str = "main") -> Losses:
        before = self.carried.get("height", torch.zeros(len(batch.x)))
        self.carried = {"height": before + batch.x[:, 0, 4, 4]}
        return Losses(self.weight.square() + 1, {"height": self.carried["height"].mean()})

    def sampler(self) -> Sampler:
        raise AssertionError("the loop asks for samples only to save them")


def carry(root: Path, world: World) -> None:
    """Carry for six steps, with a checkpoint and a new start after three."""
    digits = load("digits", root / "data")
    training = Training(Chain(digits.spec), PLAN, world)
    for step in range(6):
        if step == 3:
            gathered = world.gather(training.family.carried["height"], 32)
            training = Training(Chain(digits.spec), PLAN, world)
            training.family.carried = {"height": world.share(gathered)}
        share = {"rank": world.rank, "world": world.size}
        training.advance(training_batch(digits.splits["train"], seed=0, step=step, batch_size=32, **share))
    height = world.gather(training.family.carried["height"], 32)
    save_file({"height": height}, root / f"carried-{world.size}-{world.rank}.safetensors")


@pytest.mark.slow
def test_what_is_carried_does_not_depend_on_workers_or_restarts(tmp_path: Path) -> None:
    carry(tmp_path, World())
    in_workers(3, tmp_path, partial(carry, tmp_path))  # shares of 10, 11 and 11 examples
    names = ("1-0", "3-0", "3-1", "3-2")
    everywhere = [load_file(tmp_path / f"carried-{name}.safetensors")["height"] for name in names]
    digits = load("digits", tmp_path / "data")
    batches = [training_batch(digits.splits["train"], seed=0, step=s, batch_size=32) for s in range(6)]
    expected = torch.stack([batch.x[:, 0, 4, 4].float() for batch in batches]).sum(0)
    for carried in everywhere:
        assert torch.equal(carried, expected)


def test_a_metric_out_of_its_healthy_range_stops_training(digits: Dataset, tmp_path: Path) -> None:
    plan = replace(PLAN, budget=Budget(steps=200), checkpoint_every=200)
    with pytest.raises(
        DivergenceError, match=r"train/height is \d+(\.\d+)? \(healthy: 0 to 400\).*diverged; climb less"
    ):
        train(Chain(digits.spec), digits, plan, Record(tmp_path))


class Cliff(Family):
    """Its loss is finite where its gradient is not."""

    density = Density.IMPLICIT
    presets: ClassVar[dict[str, Any]] = {}
    Config = dict
    widths = ()

    def __init__(self, spec: DataSpec) -> None:
        super().__init__({}, spec)
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, batch: Batch, phase: str = "main") -> Losses:
        return Losses(self.weight.abs().sqrt(), {})

    def sampler(self) -> Sampler:
        raise AssertionError("nothing is saved")


def test_a_gradient_that_is_not_finite_stops_training(digits: Dataset) -> None:
    training = Training(Cliff(digits.spec), PLAN, World())
    for step in range(3):
        training.advance(training_batch(digits.splits["train"], seed=0, step=step, batch_size=32))
    with pytest.raises(DivergenceError, match="is nan at step 1: "):
        training.read_metrics()


def test_a_checkpoint_of_another_batch_is_refused(digits: Dataset) -> None:
    training = Training(Chain(digits.spec), PLAN, World())
    with pytest.raises(ValueError, match="batch_size=32: the checkpoint carries height for 16 examples"):
        training._share("height", torch.zeros(16))


def test_an_unknown_precision_is_named() -> None:
    with pytest.raises(ValueError, match="precision='bf16' must be one of float32, bfloat16"):
        replace(PLAN.optimization, precision="bf16")  # type: ignore[arg-type]


def train_duel(root: Path, world: World) -> None:
    digits = load("digits", root / "data")
    torch.manual_seed(0)
    training = Training(Duel(digits.spec), PLAN, world)
    for step in range(3):
        share = {"rank": world.rank, "world": world.size}
        training.advance(training_batch(digits.splits["train"], seed=0, step=step, batch_size=32, **share))
    save_file(training.family.state_dict(), root / f"duel-{world.size}-{world.rank}.safetensors")


@pytest.mark.slow
def test_each_phase_is_averaged_over_the_workers(tmp_path: Path) -> None:
    train_duel(tmp_path, World())
    in_workers(2, tmp_path, partial(train_duel, tmp_path))
    alone, first, second = (
        load_file(tmp_path / f"duel-{name}.safetensors") for name in ("1-0", "2-0", "2-1")
    )
    for name in alone:
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], alone[name], rtol=1e-4, atol=1e-6)


def test_every_worker_needs_an_example(digits: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch_size=32 has no example for some of the 33 workers"):
        train(build("vae", SMALL, digits.spec), digits, PLAN, Record(tmp_path), world=World(0, 33))


def test_divergence_stops_before_anything_is_saved(digits: Dataset, tmp_path: Path) -> None:
    record = Record(tmp_path)
    wild = replace(PLAN, optimization=replace(PLAN.optimization, learning_rate=1e6))
    with pytest.raises(
        DivergenceError, match=r"train/\w+ is \w+ at step [2-5]: .*--optimization.learning-rate"
    ):
        train(build("vae", SMALL, digits.spec), digits, wild, record)
    assert record.reports == []


def test_training_stops_when_validation_no_longer_improves(
    digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nats = iter([-90.0, -80.0, -85.0, -81.0, -70.0])  # the second is best; two worse ones end it
    monkeypatch.setattr(validation, "split_nats", lambda *_: Nats(next(nats), 0.0, 1.0))
    run = LocalRun(tmp_path)
    plan = replace(PLAN, budget=Budget(steps=1000), patience=2)
    train(build("vae", SMALL, digits.spec), digits, plan, run)
    assert run.last == tmp_path / "step-00000080"
    assert run.best == tmp_path / "step-00000040"
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000040", "step-00000080"}


class Apart:
    """Scores each checkpoint that is saved, when it is asked; a list stands for the scores."""

    def __init__(self, record: Record, scores: dict[int, float]) -> None:
        self.record = record
        self.scores = scores

    def collect(self) -> tuple[int, float]:
        saved = [report.step for report in self.record.reports if report.snapshot]
        return (saved[-1], self.scores[saved[-1]]) if saved else (0, math.nan)


def test_a_judge_apart_is_heeded_one_checkpoint_later(digits: Dataset, tmp_path: Path) -> None:
    record = Record(tmp_path)
    scores = {20: 2.5, 40: 2.0, 60: 2.2, 80: 2.1, 100: 2.3}
    plan = replace(PLAN, budget=Budget(steps=1000), patience=2)
    judge = Apart(record, scores)
    assert train(build("vae", SMALL, digits.spec), digits, plan, record, judge=judge)
    told = [(report.step, report.metrics[SCORE]) for report in record.reports if SCORE in report.metrics]
    # At step 100 the second worse score in a row, that of step 80, is known; step 100 is still scored.
    assert told == list(scores.items())
    assert [report.step for report in record.reports if report.snapshot] == [20, 40, 60, 80, 100]
    counters = json.loads((record.saved(100) / "resume/counters.json").read_text())
    assert (counters["best"], counters["stale"], counters["ended"]) == (2.0, 2, True)
    history = json.loads((record.saved(100) / "resume/history.json").read_text())
    assert [(step, metrics[SCORE]) for step, metrics in history if SCORE in metrics] == told[:-1]


def test_weights_that_are_not_finite_are_not_saved(digits: Dataset, tmp_path: Path) -> None:
    training = Training(build("vae", SMALL, digits.spec), PLAN, World())
    training.advance(training_batch(digits.splits["train"], seed=0, step=0, batch_size=32))
    with torch.no_grad():
        next(training.average.parameters()).fill_(float("nan"))
    training.ended = True
    with pytest.raises(DivergenceError, match=f"{SCORE} is nan"):
        training.summarize(training.read_metrics(), digits)


def test_a_budget_of_seconds_counts_steps_alone(digits: Dataset, tmp_path: Path) -> None:
    class Slow(Record):
        def __call__(self, report: Report) -> None:
            super().__call__(report)
            time.sleep(0.3)

    record = Slow(tmp_path)
    train(build("vae", SMALL, digits.spec), digits, replace(PLAN, budget=Budget(seconds=0.6)), record)
    spent = record.reports[-1].metrics["seconds"]
    assert 0.6 <= spent < 1.5
    assert len(record.reports) > 1
    assert record.reports[-1].snapshot


def test_a_budget_is_measured_by_the_clock_it_is_given(digits: Dataset, tmp_path: Path) -> None:
    ticks = iter(range(10**6))
    record = Record(tmp_path)
    plan = replace(PLAN, budget=Budget(seconds=100))
    train(build("vae", SMALL, digits.spec), digits, plan, record, clock=lambda: float(next(ticks)))
    assert 100 <= record.reports[-1].metrics["seconds"] < 150


def test_bfloat16_trains_as_float32_does_to_its_rounding(
    digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "_has_bfloat16", lambda device: True)
    losses = {}
    for precision in ("float32", "bfloat16"):
        optimization: Any = replace(PLAN.optimization, precision=precision)
        training = Training(
            build("vae", SMALL, digits.spec), replace(PLAN, optimization=optimization), World()
        )
        for step in range(5):
            training.advance(training_batch(digits.splits["train"], seed=0, step=step, batch_size=32))
        assert all(p.dtype == torch.float32 for p in training.family.parameters())
        losses[precision] = training.read_metrics()["train/loss"]
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)


def test_average_follows_the_weights_by_its_decay(digits: Dataset) -> None:
    training = Training(build("vae", SMALL, digits.spec), PLAN, World())
    name, weight = next(iter(training.family.named_parameters()))
    expected = weight.detach().clone()
    for step in range(30):
        training.advance(training_batch(digits.splits["train"], seed=0, step=step, batch_size=32))
        decay = min(0.99, (step + 1) / (step + 11))
        expected = decay * expected + (1 - decay) * weight.detach()
    torch.testing.assert_close(dict(training.average.named_parameters())[name], expected)


def test_learning_rate_rises_then_falls_as_a_cosine() -> None:
    optimization = Optimization(learning_rate=1.0, warmup=0.1)
    assert learning_rate(optimization, 0.05) == pytest.approx(0.5)
    assert learning_rate(optimization, 0.1) == pytest.approx((1 + math.cos(0.1 * math.pi)) / 2)
    assert learning_rate(optimization, 0.5) == pytest.approx(0.5)
    assert learning_rate(optimization, 1.0) == 0.02
    assert all(learning_rate(optimization, p / 100) >= 0.02 for p in range(101))


@pytest.mark.parametrize("budget", [{"steps": 1, "seconds": 1.0}, {}, {"steps": -1}])
def test_a_budget_is_one_thing(budget: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="exactly one of steps and seconds"):
        Budget(**budget)


def test_checkpoints_fall_on_reports() -> None:
    with pytest.raises(ValueError, match="checkpoint_every=25 must be a multiple of report_every=10"):
        replace(PLAN, checkpoint_every=25)
