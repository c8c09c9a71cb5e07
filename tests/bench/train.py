"""How fast training is, and how much of the machine it uses.

    python tests/bench/train.py table [FAMILY ...] [--data cifar10] [--size 2] [--compile]
    python tests/bench/train.py ray [--workers 2] [--steps 500]

`table` needs no cluster and no files: images are random, and each family trains in a process of its own, on
the GPU if there is one. FLOPs are those of matrix products, convolutions and attention in one step of all
phases, forward and backward; utilisation is the time that they take at the stated peak, over that of a step.
`ray` compares the loop under Ray Train with the bare loop, as many workers each, in turns in one run.
"""

import argparse
import gc
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn
from torch.profiler import ProfilerActivity, profile

from gdl_ray.data import Feed, Split, load
from gdl_ray.data.arrays import level_counts
from gdl_ray.evaluate.efficiency import step_flops
from gdl_ray.families import FAMILIES, build, preset
from gdl_ray.family import DataSpec, Precision
from gdl_ray.train.loop import Report, Training, train
from gdl_ray.train.parallel import World
from gdl_ray.train.plan import Budget, Plan

ROUNDS = 5
SHAPES = {"digits": ((1, 8, 8), 17), "mnist": ((1, 28, 28), 256), "cifar10": ((3, 32, 32), 256)}
EXAMPLES = 4096

PEAKS = {
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "A10G": 70e12,
    "L40S": 362e12,
    "L4": 121e12,
}
"""FLOP/s of dense bfloat16 matrix products as stated, by a part of the GPU's name: the first that fits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What a table is about."""

    data: str
    size: float
    precision: Precision | None
    """None for the preset's own."""
    compile: bool
    steps: int
    """In each round, after as many to warm up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """A row of the table."""

    batch_size: int
    examples_per_s: float
    flops: float
    """Of one example."""
    memory_bytes: int
    """At most: allocated on a GPU, resident in the process on a CPU."""
    kernels_s: float
    """In which a GPU is busy, of each step; 0 on a CPU."""


def measure(key: str, setting: Setting) -> Speed:
    """Train a family on random images."""
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    spec, split = random_images(setting.data)
    training = trainer(key, setting, spec, device)
    batch_size = training.plan.optimization.batch_size
    feed = Feed(split, seed=0, batch_size=batch_size, device=device)
    flops = step_flops(training.family, feed.batch(0), training.family.phases)

    def steps() -> None:
        for _ in range(setting.steps):
            training.advance(feed.batch(training.step))
        synchronize()

    steps()
    seconds = statistics.median(timed(steps) for _ in range(ROUNDS)) / setting.steps
    return Speed(
        batch_size=batch_size,
        examples_per_s=batch_size / seconds,
        flops=flops / batch_size,
        memory_bytes=peak_bytes(),
        kernels_s=kernel_seconds(steps) / setting.steps,
    )


def random_images(data: str) -> tuple[DataSpec, Split]:
    """Make images of a named dataset's shape, of even noise."""
    shape, levels = SHAPES[data]
    spec = DataSpec(name=data, kind="image", shape=shape, levels=levels, classes=10)
    draw = np.random.default_rng(0)
    x = draw.integers(levels, size=(EXAMPLES, *shape), dtype=np.uint8)
    counts = torch.from_numpy(level_counts(spec, x))
    return replace(spec, counts=counts), Split(x, draw.integers(10, size=EXAMPLES))


def trainer(key: str, setting: Setting, spec: DataSpec, device: torch.device) -> Training:
    """Make a family and all that trains it."""
    chosen = preset(key, setting.data, setting.size)
    optimization = chosen.optimization
    if setting.precision:
        optimization = replace(optimization, precision=setting.precision)
    plan = Plan(optimization=optimization, budget=Budget(steps=1_000_000), compile=setting.compile)
    return Training(build(key, chosen.model, spec).to(device), plan, World(device=device))


def timed(work: Callable[[], None]) -> float:
    """Seconds that work takes."""
    since = time.perf_counter()
    work()
    return time.perf_counter() - since


def synchronize() -> None:
    """Wait for a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes() -> int:
    """Most memory that this process has held."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def kernel_seconds(work: Callable[[], None]) -> float:
    """Seconds in which work keeps a GPU busy; 0 without one."""
    if not torch.cuda.is_available():
        return 0.0
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
    return float(sum(event.self_device_time_total for event in profiler.key_averages())) * 1e-6


def peak_flops() -> tuple[str, float]:
    """Say what utilisation is measured against, and its FLOP/s: as stated, or else measured here."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, one thread"
    for part, peak in PEAKS.items():
        if part in name:
            return f"{name}, bfloat16 as stated", peak
    fastest = max((measured_flops(dtype), str(dtype)) for dtype in (torch.float32, torch.bfloat16))
    return f"{name}, {fastest[1]} as measured", fastest[0]


def measured_flops(dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product."""
    a = torch.ones(2048, 2048, dtype=dtype, device="cuda" if torch.cuda.is_available() else "cpu")

    def product() -> None:
        torch.mm(a, a)
        synchronize()

    return 2 * len(a) ** 3 / min(timed(product) for _ in range(4 * ROUNDS))


def table(families: list[str], setting: Setting) -> None:
    """Print a row for each family."""
    torch.set_num_threads(1)
    where, peak = peak_flops()
    print(f"{setting}\npeak: {peak / 1e12:,.2f} TFLOP/s ({where})")
    print("family           batch  examples/s  MFLOP/example  utilisation  memory, MiB  GPU idle")
    for key in families:
        # A process each: peaks of memory are those of a process, and so are a compiler's leavings.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
            speed = alone.submit(measure, key, setting).result()
        used = speed.flops * speed.examples_per_s / peak
        step_s = speed.batch_size / speed.examples_per_s
        idle = f"{1 - speed.kernels_s / step_s:.0%}" if speed.kernels_s else "-"
        print(
            f"{key:15}{speed.batch_size:7}{speed.examples_per_s:12,.0f}{speed.flops / 1e6:15,.2f}{used:13.1%}"
            f"{speed.memory_bytes / 2**20:13,.0f}{idle:>10}",
            flush=True,
        )


class Rates:
    """Stands where the run of a job stands: keeps the seconds that the loop reports."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def log(self, step: int, metrics: dict[str, float], picture: bytes | None) -> None:
        """Take what a job would log in MLflow."""
        self.seconds = metrics["seconds"]

    def last(self) -> float:
        """Seconds at the last report."""
        return self.seconds


def digits_plan(steps: int) -> tuple[Any, Plan]:
    """Choose the model and the plan that both loops follow."""
    chosen = preset("vae", "digits")
    return chosen.model, Plan(optimization=chosen.optimization, budget=Budget(steps=steps))


def under_ray(root: Path, steps: int, workers: int) -> float:
    """Train under Ray Train; returns the seconds of the steps."""
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from gdl_ray.train.store import Store
    from gdl_ray.train.task import RUN_FILE, Task
    from gdl_ray.train.worker import work

    model, plan = digits_plan(steps)
    storage = f"{root}/runs/{time.time_ns()}"
    store = Store(storage)
    store.create()
    store.write_json(RUN_FILE, {})
    task = Task(family="vae", model=model, data="digits", data_root=root, plan=plan, storage=storage, keep=1)
    actor: Any = ray.remote(num_cpus=0)(Rates)
    rates = actor.remote()
    TorchTrainer(
        work,  # type: ignore[arg-type]
        train_loop_config={"task": task, "run": rates},
        scaling_config=ScalingConfig(num_workers=workers),
        run_config=RunConfig(storage_path=str(root / "runs")),
    ).fit()
    seconds: float = ray.get(rates.last.remote())
    return seconds


def bare(root: Path, steps: int, workers: int) -> float:
    """Train without Ray, in as many processes; returns the seconds of the steps."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(work_bare, (root, steps, workers, Path(folder)), nprocs=workers)  # type: ignore[no-untyped-call]
        return float((Path(folder) / "seconds").read_text())


def work_bare(rank: int, root: Path, steps: int, workers: int, folder: Path) -> None:
    """Train as one of the processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=workers)
    digits = load("digits", root)
    model, plan = digits_plan(steps)

    def report(report: Report) -> None:
        if rank == 0:
            (folder / "seconds").write_text(str(report.metrics["seconds"]))

    train(build("vae", model, digits.spec), digits, plan, report, world=World(rank, workers))
    gc.collect()  # else what is distributed goes after its group, and aborts
    dist.destroy_process_group()


def compare(steps: int, workers: int) -> None:
    """Print the rates of both loops, and the ratio of their medians."""
    import ray

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        load("digits", root)
        ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False)
        pairs = [(bare(root, steps, workers), under_ray(root, steps, workers)) for _ in range(ROUNDS)]
    examples = steps * digits_plan(steps)[1].optimization.batch_size
    alone, shared = (examples / statistics.median(seconds) for seconds in zip(*pairs, strict=True))
    print(
        f"{workers} workers: bare loop {alone:,.0f} examples/s, under Ray Train {shared:,.0f}: "
        f"ratio {shared / alone:.3f}"
    )


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    rows = commands.add_parser("table", help="one table of all families, or of those named")
    rows.add_argument("families", nargs="*", metavar="FAMILY")
    rows.add_argument("--data", choices=SHAPES, default="digits")
    rows.add_argument("--size", type=float, default=1.0)
    rows.add_argument("--precision", choices=["float32", "bfloat16"], help="the preset's own by default")
    rows.add_argument("--compile", action="store_true")
    rows.add_argument("--steps", type=int, default=30, help="of a round, after as many to warm up")
    pair = commands.add_parser("ray", help="the loop under Ray Train against the bare loop")
    pair.add_argument("--workers", type=int, default=1)
    pair.add_argument("--steps", type=int, default=500)
    asked = vars(parser.parse_args())
    if asked.pop("command") == "ray":
        compare(**asked)
    else:
        table(asked.pop("families") or list(FAMILIES), Setting(**asked))


if __name__ == "__main__":
    main()
