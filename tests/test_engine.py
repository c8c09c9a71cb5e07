"""The engine against samplers whose every value is known."""

import gc
import itertools
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from gdl_ray.engine import (
    LIKELIHOOD,
    SAMPLES,
    Engine,
    Job,
    Load,
    Preview,
    QueueFull,
    keys_of,
    request_keys,
    seeds_of,
)
from gdl_ray.family import (
    UNLABELLED,
    Batch,
    Completion,
    DataSpec,
    Density,
    Family,
    Losses,
    Option,
    Sampler,
    State,
    draw,
)
from gdl_ray.random import fold, normal

SPEC = DataSpec(name="toy", kind="image", shape=(1, 2, 2), levels=256, classes=10)


class Walk(Sampler):
    """Folds each step's number into the sample's key, which is lost if steps do not come in order."""

    def __init__(self, steps: int, before_step: Callable[[Tensor], None]) -> None:
        self.steps = steps
        self.before_step = before_step

    def start(self, keys: Tensor, labels: Tensor, options: Mapping[str, Tensor]) -> State:
        return {"key": fold(keys, labels + 1), "steps_taken": torch.zeros_like(keys)}

    def step(self, state: State, index: Tensor) -> State:
        self.before_step(index)
        in_order = state["steps_taken"] == index  # but in rows that are nobody's
        key = torch.where(in_order, fold(state["key"], index), 0)
        return {"key": key, "steps_taken": state["steps_taken"] + 1}

    def finish(self, state: State) -> Tensor:
        pixels = torch.stack([state["key"] >> shift & 255 for shift in (0, 8, 16, 24)], dim=1)
        return pixels.to(torch.uint8).view(-1, 1, 2, 2)


class Stride(Sampler):
    """Counts its steps, each as long as the option says; the option `steps` says how many."""

    steps = 3
    options = {
        "steps": Option(default=3, least=1, most=9, meaning="Number of steps.", whole=True),
        "length": Option(default=1, least=0, most=20, meaning="Of each step."),
    }

    def start(self, keys: Tensor, labels: Tensor, options: Mapping[str, Tensor]) -> State:
        assert options.keys() == self.options.keys()
        return {"sum": torch.zeros(len(keys)), "length": options["length"], "steps": options["steps"]}

    def step(self, state: State, index: Tensor) -> State:
        return {**state, "sum": state["sum"] + state["length"]}

    def finish(self, state: State) -> Tensor:
        return state["sum"].to(torch.uint8).view(-1, 1, 1, 1)


class Strides(Stride):
    """Strides that wait at a gate."""

    def __init__(self, before_step: Callable[[Tensor], None]) -> None:
        self.before_step = before_step

    def step(self, state: State, index: Tensor) -> State:
        self.before_step(index)
        return super().step(state, index)


class Net(Sampler):
    """Two steps of a network, for the rounding of real kernels."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.steps = 2

    def start(self, keys: Tensor, labels: Tensor, options: Mapping[str, Tensor]) -> State:
        return {"x": normal(keys, (1, 8, 8)), "key": keys}

    def step(self, state: State, index: Tensor) -> State:
        return {**state, "x": self.net(state["x"]) + normal(state["key"], (1, 8, 8), index + 1)}

    def finish(self, state: State) -> Tensor:
        # The raw bits of the floats: equal bytes are equal results to the last digit.
        return state["x"].contiguous().view(torch.uint8).view(-1, 1, 8, 32)


class Fake(Family):
    density = Density.IMPLICIT
    presets: ClassVar[dict[str, Any]] = {}
    Config = dict
    widths = ()

    def __init__(self, make: Callable[[], Sampler]) -> None:
        super().__init__({}, SPEC)
        self.make = make

    def forward(self, batch: Batch, phase: str = "main") -> Losses:
        raise AssertionError("the engine does not train")

    def sampler(self) -> Sampler:
        return self.make()


class FakeCompletion(Fake, Completion):
    def completion(self, x: Tensor, known: Tensor) -> Sampler:
        return self.make()


def walk(steps: int, before_step: Callable[[Tensor], None] = lambda index: None) -> Fake:
    return Fake(lambda: Walk(steps, before_step))


@contextmanager
def running(family: Family, slots: int = 8, queue_samples: int = 4096) -> Iterator[Engine]:
    engine = Engine(family, slots, queue_samples)
    try:
        yield engine
    finally:
        engine.close(drain=False)


def labels_of(n: int, label: int = UNLABELLED) -> Tensor:
    return torch.full((n,), label)


def ask(engine: Engine, seed: int, labels: Tensor, options: Mapping[str, float] | None = None) -> Job:
    return engine.submit(seeds_of(seed, len(labels)), labels, options)


class Gate:
    """Lets the engine take steps one by one."""

    def __init__(self) -> None:
        self.steps = threading.Semaphore(0)
        self.reached = threading.Semaphore(0)
        self.index = torch.zeros(0)

    def __call__(self, index: Tensor) -> None:
        self.index = index
        self.reached.release()
        assert self.steps.acquire(timeout=10)

    def wait(self) -> None:
        assert self.reached.acquire(timeout=10)

    def step(self, count: int = 1) -> None:
        """Let `count` steps happen and wait until the engine stands before the next."""
        for _ in range(count):
            self.steps.release()
            self.wait()

    def open(self) -> None:
        self.steps.release(10**6)


@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize("n", [1, 8, 50])
def test_samples_are_those_of_the_family_in_order(steps: int, n: int) -> None:
    family, labels = walk(steps), torch.arange(n) % 11 - 1
    with running(family) as engine:
        result = ask(engine, 7, labels).future.result(timeout=10)
    assert torch.equal(result, family.sample(request_keys(7, n), labels))


def test_requests_from_many_threads_each_get_their_own_samples() -> None:
    family = walk(5)
    wrong: list[int] = []

    def client(seed: int, engine: Engine) -> None:
        for n in (1, 3, 20):
            result = ask(engine, seed, labels_of(n)).future.result(timeout=30)
            if not torch.equal(result, family.sample(request_keys(seed, n))):
                wrong.append(seed)

    with running(family) as engine:
        threads = [threading.Thread(target=client, args=(seed, engine)) for seed in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
        assert not wrong
        assert (engine.load.waiting, engine.load.active) == (0, 0)


def test_samples_join_and_leave_between_any_two_steps() -> None:
    gate = Gate()
    family = walk(4)
    with running(walk(4, gate)) as engine:
        first = ask(engine, 1, labels_of(2))
        gate.wait()
        second = ask(engine, 2, labels_of(3))
        gate.step()
        assert sorted(gate.index.tolist()) == [0, 0, 0, 1, 1, 1, 1, 1]  # three rows are nobody's
        assert engine.load.active == 5
        gate.step(3)
        assert first.future.done()
        assert not second.future.done()
        assert engine.load.active == 3
        gate.open()
        assert torch.equal(second.future.result(timeout=10), family.sample(request_keys(2, 3)))
        assert torch.equal(first.future.result(), family.sample(request_keys(1, 2)))


def test_samples_of_other_options_share_a_batch() -> None:
    family = Fake(Stride)
    asked: list[dict[str, float]] = [{}, {"steps": 9, "length": 2}, {"steps": 1}, {"length": 20}]
    with running(family) as engine:
        jobs = [ask(engine, 0, labels_of(3), each) for each in asked * 5]
        drawn = [job.future.result(timeout=10).flatten().tolist() for job in jobs]
    assert drawn == [[3] * 3, [18] * 3, [1] * 3, [60] * 3] * 5
    assert family.sample(torch.arange(2), steps=9, length=2).flatten().tolist() == [18, 18]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"width": 1}, "width=1 is no option of this model; it has: steps, length"),
        ({"steps": 2.5}, "steps=2.5 must be an integer from 1 to 9"),
        ({"steps": 10}, "steps=10 must be an integer from 1 to 9"),
        ({"length": float("nan")}, "length=nan must be a number from 0 to 20"),
    ],
)
def test_options_out_of_range_are_refused(asked: dict[str, float], told: str) -> None:
    with running(Fake(Stride)) as engine, pytest.raises(ValueError, match=told):
        ask(engine, 0, labels_of(1), asked)
    with pytest.raises(ValueError, match=told):
        draw(Stride(), torch.arange(1), None, asked)


def test_only_new_samples_are_started() -> None:
    starts: list[int] = []

    class Counted(Stride):
        def start(self, keys: Tensor, labels: Tensor, options: Mapping[str, Tensor]) -> State:
            starts.append(len(keys))
            return super().start(keys, labels, options)

    with running(Fake(Counted)) as engine:
        for steps in (9, 1, 3, 1, 9):
            drawn = ask(engine, 0, labels_of(2), {"steps": steps}).future.result(timeout=10)
            assert drawn.flatten().tolist() == [steps, steps]
    assert starts == [8] * 5


def test_a_large_request_is_cut_up_and_starves_nobody() -> None:
    gate = Gate()
    with running(walk(2, gate), slots=8) as engine:
        large = ask(engine, 1, labels_of(20))
        small = ask(engine, 2, labels_of(1))
        gate.wait()
        gate.step(2)  # 8 samples are through, 7 + 1 under way
        assert (engine.load.waiting, engine.load.active) == (5, 8)
        gate.step(2)
        assert small.future.done()
        assert not large.future.done()
        gate.open()
        assert large.future.result(timeout=10).shape == (20, 1, 2, 2)
        assert small.future.result(timeout=10).shape == (1, 1, 2, 2)


def test_a_cancelled_job_frees_its_slots_at_the_next_step() -> None:
    gate = Gate()
    with running(walk(100, gate), slots=8) as engine:
        dropped = ask(engine, 1, labels_of(12))
        gate.wait()
        kept = ask(engine, 2, labels_of(8))
        assert engine.load.waiting >= 8
        dropped.cancel()
        assert engine.load.waiting == 8  # what waited of it is gone at once
        gate.step()
        assert (engine.load.waiting, engine.load.active) == (0, 8)
        assert gate.index.tolist() == [0] * 8
        gate.open()
        assert torch.equal(kept.future.result(timeout=10), walk(100).sample(request_keys(2, 8)))
        with pytest.raises(CancelledError):
            dropped.future.result()


def test_the_queue_is_bounded_in_samples() -> None:
    gate = Gate()
    with running(walk(1, gate), slots=8, queue_samples=20) as engine:
        ask(engine, 0, labels_of(8))
        gate.wait()
        waiting = ask(engine, 1, labels_of(15))
        with pytest.raises(QueueFull, match="15 samples wait, 20 may; 6 more asked"):
            ask(engine, 2, labels_of(6))
        ask(engine, 3, labels_of(5))
        waiting.cancel()
        ask(engine, 2, labels_of(6))
        assert engine.load.waiting == 11
        gate.open()


def test_a_client_with_less_than_its_share_of_the_queue_is_let_in() -> None:
    gate = Gate()
    with running(walk(1, gate), slots=8, queue_samples=40) as engine:
        engine.submit(seeds_of(0, 8), labels_of(8), client="busy")
        gate.wait()
        engine.submit(seeds_of(1, 40), labels_of(40), client="busy")
        other = engine.submit(seeds_of(2, 20), labels_of(20), client="other")
        for client in ("busy", "other"):
            with pytest.raises(QueueFull, match="60 samples wait, 40 may; 1 more asked"):
                engine.submit(seeds_of(3, 1), labels_of(1), client=client)
        gate.open()
        assert len(other.future.result(timeout=10)) == 20


def test_who_would_wait_for_too_long_is_refused_and_told_how_long() -> None:
    gate = Gate()
    with running(Fake(lambda: Strides(gate)), slots=8) as engine:
        engine.submit(seeds_of(0, 88), labels_of(88), {"steps": 9}, client="busy")
        gate.wait()
        gate.step(2)
        step_s = engine.load.step_s
        assert engine.load.wait_s == pytest.approx((7 + 80 * 9 / 8) * step_s)
        cases = [("busy", 4, 3, 4 * 3 * 2 * 1), ("other", 4, 3, 4 * 3 * 2), ("other", 100, 9, 80 * 9)]
        for client, n, steps, before in cases:
            wait_s = (7 + before / 8) * step_s
            with pytest.raises(QueueFull, match=f"{n} more samples would wait") as refused:
                engine.submit(
                    seeds_of(1, n), labels_of(n), {"steps": steps}, client=client, most_wait_s=0.99 * wait_s
                )
            assert refused.value.wait_s == pytest.approx(wait_s)
        job = engine.submit(
            seeds_of(1, 4), labels_of(4), {"steps": 3}, client="other", most_wait_s=11 * step_s
        )
        gate.open()
        assert job.future.result(timeout=10).flatten().tolist() == [3] * 4


def test_who_finds_room_waits_for_nothing() -> None:
    gate = Gate()
    with running(walk(9, gate), slots=8) as engine:
        ask(engine, 0, labels_of(4))
        gate.wait()
        gate.step(2)
        job = engine.submit(seeds_of(1, 4), labels_of(4), most_wait_s=0)
        gate.open()
        assert len(job.future.result(timeout=10)) == 4


def test_a_short_request_overtakes_long_ones() -> None:
    """Of a client's 64 samples of 3000 steps, 56 are under way: another's single step is taken at once."""

    class Long(Stride):
        options = {**Stride.options, "steps": Option(default=3, least=1, most=3000, meaning="", whole=True)}

        def step(self, state: State, index: Tensor) -> State:
            time.sleep(0.001)
            return super().step(state, index)

    with running(Fake(Long), slots=64) as engine:
        long = engine.submit(seeds_of(0, 64), labels_of(64), {"steps": 3000}, client="long")
        while not engine.steps:
            time.sleep(0.001)
        assert (engine.load.active, engine.load.waiting) == (56, 8)
        short = engine.submit(seeds_of(1, 1), labels_of(1), {"steps": 1}, client="short")
        assert short.future.result(timeout=10).item() == 1
        assert not long.future.done()
        assert engine.steps < 3000


def test_only_what_is_asked_for_is_finished() -> None:
    """Rows that ended and rows to be shown, in granules; and of the state what the finisher reads."""
    finished: list[tuple[int, list[str]]] = []

    class Counted(Stride):
        granule = 4

        def finish(self, state: State) -> Tensor:
            samples = super().finish(state)
            finished.append((len(samples), sorted(state)))
            return samples

    with running(Fake(Counted), slots=32) as engine:
        jobs = [ask(engine, 0, labels_of(n), {"steps": n}) for n in (1, 5, 9)]
        for job in jobs:
            job.future.result(timeout=10)
    assert finished == [(4, ["sum"]), (8, ["sum"]), (12, ["sum"])]


def test_a_sampler_that_raises_fails_its_jobs_and_no_others() -> None:
    gate = Gate()
    failures = [ArithmeticError("loss of precision")]

    def step(index: Tensor) -> None:
        gate(index)
        if failures:
            raise failures.pop()

    with running(walk(3, step), slots=8) as engine:
        broken = ask(engine, 1, labels_of(10))
        gate.wait()
        later = ask(engine, 2, labels_of(2))
        gate.open()
        with pytest.raises(ArithmeticError, match="loss of precision"):
            broken.future.result(timeout=10)
        assert torch.equal(later.future.result(timeout=10), walk(3).sample(request_keys(2, 2)))


@pytest.mark.parametrize("label", [-2, SPEC.classes])
def test_a_label_that_the_data_have_not_is_refused(label: int) -> None:
    with running(walk(1)) as engine, pytest.raises(ValueError, match=rf"labels hold {label}; .* \[0, 9\]"):
        ask(engine, 0, torch.tensor([0, label]))


def test_samples_that_cannot_be_started_fail_their_job_alone() -> None:
    gate = Gate()

    class Picky(Walk):
        def start(self, keys: Tensor, labels: Tensor, options: Mapping[str, Tensor]) -> State:
            if (labels == 9).any():
                raise ArithmeticError("no nines")
            return super().start(keys, labels, options)

    with running(Fake(lambda: Picky(4, gate)), slots=8) as engine:
        neighbour = ask(engine, 1, labels_of(3))
        gate.wait()
        half = ask(engine, 2, torch.tensor([1] * 5 + [9] * 5))  # five are under way when the others fail
        broken = ask(engine, 3, labels_of(3, 9))
        gate.open()
        for job in (half, broken):
            with pytest.raises(ArithmeticError, match="no nines"):
                job.future.result(timeout=10)
        later = ask(engine, 4, labels_of(2))
        for seed, job in ((1, neighbour), (4, later)):
            n = len(job.seeds)
            assert torch.equal(job.future.result(timeout=10), walk(4).sample(request_keys(seed, n)))


@pytest.mark.parametrize("moment", [0, 1], ids=["filling rows", "joining samples"])
def test_an_engine_that_itself_fails_lives_on(monkeypatch: pytest.MonkeyPatch, moment: int) -> None:
    cat, calls = torch.cat, itertools.count()

    def without_memory(tensors: list[Tensor]) -> Tensor:
        if next(calls) == moment:
            raise MemoryError
        return cat(tensors)

    monkeypatch.setattr(torch, "cat", without_memory)
    with running(walk(3)) as engine:
        with pytest.raises(MemoryError):
            ask(engine, 1, labels_of(2)).future.result(timeout=10)
        assert (engine.load.waiting, engine.load.active) == (0, 0)
        result = ask(engine, 1, labels_of(2)).future.result(timeout=10)
        assert torch.equal(result, walk(3).sample(request_keys(1, 2)))


def test_rows_that_cannot_be_freed_fail_their_jobs_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate = Gate()
    with running(walk(1000, gate)) as engine:
        dropped = ask(engine, 1, labels_of(4))
        gate.wait()
        neighbour = ask(engine, 2, labels_of(4))
        gate.step()
        put = Tensor.__setitem__

        def without_memory(tensor: Tensor, place: Any, value: Any) -> None:
            if isinstance(place, list):  # as where rows move
                monkeypatch.undo()
                raise MemoryError
            put(tensor, place, value)

        monkeypatch.setattr(Tensor, "__setitem__", without_memory)
        dropped.cancel()
        gate.open()
        with pytest.raises(MemoryError):
            neighbour.future.result(timeout=10)
        result = ask(engine, 3, labels_of(2)).future.result(timeout=10)
        assert torch.equal(result, walk(1000).sample(request_keys(3, 2)))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_whose_thread_ends_leaves_nobody_waiting() -> None:
    gate = Gate()

    def leave(index: Tensor) -> None:
        gate(index)
        raise SystemExit

    with running(walk(3, leave)) as engine:
        jobs = [ask(engine, seed, labels_of(8)) for seed in range(2)]
        gate.wait()
        gate.open()
        for job in jobs:
            with pytest.raises(RuntimeError, match="the engine's thread ended"):
                job.future.result(timeout=10)
        with pytest.raises(RuntimeError, match="closed"):
            ask(engine, 0, labels_of(1))


def test_nothing_waits_of_a_job_that_failed_while_it_was_submitted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The job fails before its submission has gone on from where others can see it."""
    failed = threading.Event()

    def fail(index: Tensor) -> None:
        raise MemoryError

    class Slow(Future[Tensor]):
        def add_done_callback(self, fn: Callable[[Future[Tensor]], object]) -> None:
            failed.wait(timeout=0.2)
            super().add_done_callback(fn)

        def set_exception(self, exception: BaseException | None) -> None:
            super().set_exception(exception)
            failed.set()

    monkeypatch.setattr("gdl_ray.engine.Job", lambda *args: replace(Job(*args), future=Slow()))
    with running(walk(3, fail)) as engine:
        job = ask(engine, 1, labels_of(30))
        with pytest.raises(MemoryError):
            job.future.result(timeout=10)
        assert (engine.load.waiting, engine.load.active) == (0, 0)
        with pytest.raises(MemoryError):
            ask(engine, 2, labels_of(1)).future.result(timeout=10)


def test_a_finished_job_is_gone_at_once() -> None:
    gc.collect()
    gc.disable()
    try:
        with running(walk(2)) as engine:
            gone: list[weakref.ref[Any]] = []
            for seed in range(5):
                job = ask(engine, seed, labels_of(4))
                gone += [weakref.ref(job), weakref.ref(job.future.result(timeout=10))]
            del job
            deadline = time.monotonic() + 10
            while any(thing() is not None for thing in gone) and time.monotonic() < deadline:
                time.sleep(0.01)  # the engine may be about to let go of the last
            assert [thing() for thing in gone] == [None] * len(gone)
    finally:
        gc.enable()


@pytest.mark.parametrize("drain", [True, False])
def test_close_finishes_or_cancels_what_is_held(drain: bool) -> None:
    engine = Engine(walk(3, lambda index: time.sleep(0.01)), slots=8)
    jobs = [ask(engine, seed, labels_of(5)) for seed in range(4)]
    engine.close(drain)
    for seed, job in enumerate(jobs):
        assert job.future.done()
        if drain:
            assert torch.equal(job.future.result(), walk(3).sample(request_keys(seed, 5)))
    assert jobs[-1].future.cancelled() is not drain
    with pytest.raises(RuntimeError, match="closed"):
        ask(engine, 0, labels_of(1))


@pytest.mark.parametrize("shape", [(0,), (2, 3), ()])
def test_seeds_and_labels_that_are_not_a_row_are_refused(shape: tuple[int, ...]) -> None:
    column = torch.zeros(shape, dtype=torch.int64)
    with running(walk(1)) as engine:
        with pytest.raises(ValueError, match=r"labels \(.*n >= 1"):
            engine.submit(torch.tensor([7]), column)
        with pytest.raises(ValueError, match=r"seeds \(.*n >= 1"):
            engine.submit(column, torch.tensor([7]))


@pytest.mark.parametrize(
    ("seeds", "labels", "complaint"),
    [
        (torch.tensor([0, -1]), labels_of(2), "seeds hold -1"),
        (torch.tensor([2**53, 0]), labels_of(2), "seeds hold 9007199254740992"),
        (torch.tensor([0.0]), labels_of(1), "seeds are torch.float32 on cpu"),
        (torch.tensor([0]), labels_of(1).to(torch.int32), "labels are torch.int32 on cpu"),
        (torch.tensor([0]), labels_of(1).to("meta"), "labels are torch.int64 on meta"),
        (torch.tensor([0, 1]), labels_of(3), "labels are 3 for 2 seeds"),
    ],
)
def test_what_the_engine_cannot_draw_is_refused_at_once(
    seeds: Tensor, labels: Tensor, complaint: str
) -> None:
    with running(walk(1)) as engine:
        with pytest.raises(ValueError, match=complaint):
            engine.submit(seeds, labels)
        drawn = engine.submit(torch.tensor([0, 2**53 - 1]), labels_of(2)).future.result(timeout=10)
        assert drawn.shape == (2, 1, 2, 2)


@pytest.mark.parametrize("seed", [-1, 2**53, 2**63])
def test_a_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=f"seed={seed}"):
        seeds_of(seed, 1)


@pytest.mark.parametrize(
    "net",
    [
        nn.Sequential(
            nn.Flatten(), nn.Linear(64, 200), nn.SiLU(), nn.Linear(200, 64), nn.Unflatten(1, (1, 8, 8))
        ),
        nn.Sequential(
            nn.Conv2d(1, 12, 3, padding=1), nn.GELU(), nn.Conv2d(12, 1, 3, padding=1), nn.Sigmoid()
        ),
    ],
    ids=["mlp", "conv"],
)
def test_a_sample_is_bit_identical_alone_and_in_a_crowd(net: nn.Module) -> None:
    family = Fake(lambda: Net(net.eval()))
    family.net = net
    with running(family, slots=64) as engine:
        alone = ask(engine, 7, labels_of(5)).future.result(timeout=10)
        for n in range(1, 5):
            assert torch.equal(ask(engine, 7, labels_of(n)).future.result(timeout=10), alone[:n])
        for round_ in range(20):
            crowd = [ask(engine, 100 * round_ + i, labels_of(i)) for i in range(1, 9)]
            amid = ask(engine, 7, labels_of(5))
            crowd += [ask(engine, 100 * round_ + i, labels_of(i)) for i in range(9, 12)]
            assert torch.equal(amid.future.result(timeout=10), alone)
            for job in crowd:
                job.future.result(timeout=10)


def test_the_keys_of_a_smaller_request_are_the_first_of_a_larger() -> None:
    keys = request_keys(2**53 - 1, 1000)
    assert torch.equal(request_keys(2**53 - 1, 10), keys[:10])
    assert len(set(keys.tolist())) == 1000
    assert not torch.isin(request_keys(0, 1000), keys).any()


def test_likelihoods_have_keys_of_their_own() -> None:
    assert torch.equal(request_keys(7, 1000, SAMPLES), request_keys(7, 1000))
    assert not torch.isin(request_keys(7, 1000, LIKELIHOOD), request_keys(7, 1000)).any()


def test_seeds_are_those_of_the_published_generator() -> None:
    """The first outputs of SplitMix64 from 1234567, by the test vectors of Vigna's and others' versions."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert seeds_of(1234567, 3).tolist() == [output >> 11 for output in published]


def test_seeds_make_single_samples_again() -> None:
    seeds = seeds_of(7, 1000)
    assert torch.equal(seeds_of(7, 10), seeds[:10])
    assert ((seeds >= 0) & (seeds < 2**53)).all()
    assert len(set(seeds.tolist())) == 1000
    assert torch.equal(keys_of(seeds, LIKELIHOOD), request_keys(7, 1000, LIKELIHOOD))
    with running(walk(3)) as engine:
        all_of_them = ask(engine, 7, labels_of(20)).future.result(timeout=10)
        again = engine.submit(seeds[[13, 4]], labels_of(2)).future.result(timeout=10)
    assert torch.equal(again, all_of_them[[13, 4]])


def test_a_client_with_many_jobs_does_not_starve_another() -> None:
    gate = Gate()
    with running(walk(1, gate), slots=8) as engine:
        busy = [engine.submit(torch.tensor([i]), labels_of(1), client="busy") for i in range(100)]
        gate.wait()
        other = engine.submit(torch.arange(4), labels_of(4), client="other")
        gate.step(2)
        assert other.future.done()
        assert sum(job.future.done() for job in busy) <= 12
        gate.open()
        for job in busy:
            job.future.result(timeout=10)


def test_rows_are_packed_and_follow_the_samples_that_move() -> None:
    """Walks of many lengths come and go, and each step sees as few rows as can be."""
    shapes: list[int] = []

    class Counted(Stride):
        def start(self, keys: Tensor, labels: Tensor, options: Mapping[str, Tensor]) -> State:
            return {**super().start(keys, labels, options), "label": labels}

        def step(self, state: State, index: Tensor) -> State:
            shapes.append(len(index))
            assert {len(tensor) for tensor in state.values()} == {len(index)}
            return super().step(state, index)

        def finish(self, state: State) -> Tensor:
            return (20 * state["sum"] + state["label"]).to(torch.uint8).view(-1, 1, 1, 1)

    with running(Fake(Counted), slots=32) as engine:
        jobs = []
        for i in range(60):
            job = ask(engine, i, torch.arange(i % 7 + 1), {"steps": i % 9 + 1})
            jobs.append((job, i))
            if i % 5 == 4:
                jobs.pop(-2)[0].cancel()
        for job, i in jobs:
            drawn = job.future.result(timeout=10).flatten().tolist()
            assert drawn == [20 * (i % 9 + 1) + label for label in range(i % 7 + 1)]
        shapes.clear()
        ask(engine, 0, labels_of(9), {"steps": 2}).future.result(timeout=10)
        ask(engine, 0, labels_of(1), {"steps": 2}).future.result(timeout=10)
    assert shapes == [16, 16, 8, 8]


def test_what_is_overwritten_in_its_place_and_what_is_made_anew_are_both_kept() -> None:
    class Both(Walk):
        def start(self, keys: Tensor, labels: Tensor, options: Mapping[str, Tensor]) -> State:
            return {**super().start(keys, labels, options), "trail": torch.zeros(len(keys), self.steps)}

        def step(self, state: State, index: Tensor) -> State:
            state["trail"][torch.arange(len(index)), index] = index + 1.0
            return {**super().step(state, index), "trail": state["trail"]}

        def finish(self, state: State) -> Tensor:
            return state["trail"].to(torch.uint8).view(-1, 1, 1, self.steps)

    with running(Fake(lambda: Both(4, lambda index: None)), slots=16) as engine:
        jobs = [ask(engine, i, labels_of(i)) for i in range(1, 12)]
        for job in jobs:
            assert (job.future.result(timeout=10).flatten(1) == torch.tensor([1, 2, 3, 4])).all()


def test_rows_left_behind_hold_the_defaults() -> None:
    lengths: list[list[float]] = []

    class Watched(Stride):
        def step(self, state: State, index: Tensor) -> State:
            lengths.append(state["length"].tolist())
            return super().step(state, index)

    with running(Fake(Watched)) as engine:
        for n, length in ((3, 20), (1, 4)):
            ask(engine, 0, labels_of(n), {"length": length}).future.result(timeout=10)
    assert lengths[0] == [20, 20, 20, 1, 1, 1, 1, 1]
    assert lengths[-1] == [4, 1, 1, 1, 1, 1, 1, 1]


def test_previews_come_after_equal_parts_of_the_work() -> None:
    seen: list[Preview] = []
    with running(Fake(Stride), slots=8) as engine:
        job = engine.submit(
            seeds_of(0, 12), labels_of(12), {"steps": 4, "length": 3}, previews=5, on_preview=seen.append
        )
        drawn = job.future.result(timeout=10)
        engine.submit(torch.tensor([1]), labels_of(1)).future.result(timeout=10)  # until all is told
    # Eight samples take four steps, then four; sixths of 48 steps are passed at steps 1, 2, 3, 4 and 6.
    assert [preview.share for preview in seen] == [8 / 48, 16 / 48, 24 / 48, 32 / 48, 40 / 48]
    parts = [preview.samples.flatten().tolist() for preview in seen]
    assert parts[0] == [3] * 8 + [0] * 4
    assert parts[3] == [12] * 8 + [0] * 4
    assert parts[4] == [12] * 8 + [6] * 4
    assert drawn.flatten().tolist() == [12] * 12


def test_a_watcher_that_raises_hurts_nobody(caplog: pytest.LogCaptureFixture) -> None:
    def fall(preview: Preview) -> None:
        raise OSError("the line is dead")

    with running(Fake(Stride)) as engine:
        watched = engine.submit(torch.tensor([1]), labels_of(1), previews=2, on_preview=fall)
        other = ask(engine, 0, labels_of(3))
        assert watched.future.result(timeout=10).item() == 3
        assert other.future.result(timeout=10).flatten().tolist() == [3] * 3
    assert "the line is dead" in caplog.text


def test_samples_of_one_step_have_no_previews() -> None:
    seen: list[Preview] = []
    with running(walk(1)) as engine:
        engine.submit(seeds_of(0, 50), labels_of(50), previews=4, on_preview=seen.append).future.result(10)
        with pytest.raises(ValueError, match="previews=-1"):
            engine.submit(seeds_of(0, 1), labels_of(1), previews=-1)
    assert seen == []


def test_the_load_tells_what_is_under_way_and_how_long_a_slot_takes() -> None:
    gate = Gate()
    with running(walk(4, gate), slots=8) as engine:
        assert engine.load == Load(slots=8, active=0, waiting=0, step_s=0, wait_s=0)
        ask(engine, 0, labels_of(5))
        gate.wait()
        gate.step()
        assert engine.load.step_s == 0  # the first step is slower than all others
        gate.step()
        load = engine.load
        assert (load.active, load.waiting, load.wait_s) == (5, 0, 0)
        assert load.step_s > 0
        ask(engine, 1, labels_of(19))
        gate.step()
        load = engine.load  # one step until the first five are through, then 16 samples of four in 8 slots
        assert (load.active, load.waiting) == (8, 16)
        assert load.wait_s == pytest.approx((1 + 16 * 4 / 8) * load.step_s)
        gate.open()
        while engine.load.active:
            time.sleep(0.01)
        assert (engine.drawn, engine.load.wait_s) == (24, 0)
        assert engine.steps >= 13


def test_only_what_fits_the_family_may_be_given() -> None:
    x = torch.zeros(2, 1, 2, 2, dtype=torch.uint8)
    with running(walk(1)) as engine, pytest.raises(ValueError, match="this engine draws from nothing"):
        engine.submit(seeds_of(0, 2), labels_of(2), given=(x, x.bool()))
    family = FakeCompletion(Stride)
    engine = Engine(family, 8, completes=True)
    try:
        for given, told in [
            (None, "given=None: this engine completes what is given"),
            ((x[:1], x.bool()), r"x of what is given is torch.uint8 \(1, 1, 2, 2\) on cpu"),
            ((x.int(), x.bool()), "it must be torch.uint8"),
            ((x, x), "known of what is given is torch.uint8"),
        ]:
            with pytest.raises(ValueError, match=told):
                engine.submit(seeds_of(0, 2), labels_of(2), given=given)
    finally:
        engine.close(drain=False)


@pytest.mark.parametrize("slots", [0, -8, 12])
def test_slots_come_in_eights(slots: int) -> None:
    with pytest.raises(ValueError, match=f"slots={slots} must be a positive multiple of 8"):
        Engine(walk(1), slots)
