"""The bare loop against plain PyTorch, a script as one writes it for a single model, in turns in one run.

    python tests/bench/peer.py [vae|diffusion] [--data digits] [--steps 300]

Both train the same model class with the same batch size: on a CPU in two processes of one thread, on a GPU in
one, the bare loop compiled and both in bfloat16. The first steps, in which compilers and buckets settle, do
not count. The peer's data loader, distributed wrapper, clipping and fused optimizer are torch's own. CPU
seconds are printed beside those of the clock: others who use the machine disturb them less.
"""

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from gdl_ray.data import Dataset, Split
from gdl_ray.data.arrays import level_counts
from gdl_ray.families import build, preset
from gdl_ray.family import Batch, DataSpec, Preset
from gdl_ray.train.loop import Report, train
from gdl_ray.train.parallel import World
from gdl_ray.train.plan import Budget, Plan

ROUNDS = 9
SHAPES = {"digits": ((1, 8, 8), 17), "mnist": ((1, 28, 28), 256), "cifar10": ((3, 32, 32), 256)}
EXAMPLES = 4096
LOG_EVERY = 50
WORKERS = 1 if torch.cuda.is_available() else 2
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def peer(rank: int, dataset: Dataset, chosen: Preset, family: str, steps: int) -> list[float]:
    """Train as a script for this one model would; returns seconds and CPU seconds after the first steps."""
    optimization, split = chosen.optimization, dataset.splits["train"]
    torch.manual_seed(0)
    model = build(family, chosen.model, dataset.spec).to(DEVICE).train()
    average = copy.deepcopy(model).eval().requires_grad_(False)
    module: nn.Module = DistributedDataParallel(model) if WORKERS > 1 else model
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=optimization.learning_rate, weight_decay=optimization.weight_decay, fused=True
    )
    data = TensorDataset(torch.from_numpy(split.x), torch.from_numpy(split.y))
    sampler: DistributedSampler[tuple[Tensor, ...]] = DistributedSampler(data, WORKERS, rank)
    loader = DataLoader(
        data,
        optimization.batch_size // WORKERS,
        sampler=sampler,
        drop_last=True,
        num_workers=4 if DEVICE.type == "cuda" else 0,
        pin_memory=DEVICE.type == "cuda",
    )
    step, epoch, since = 0, 0, now()
    while step < steps:
        sampler.set_epoch(epoch)
        epoch += 1
        for x, y in loader:
            x, y = x.to(DEVICE, non_blocking=True), y.to(DEVICE, non_blocking=True)
            batch = Batch(x, y, torch.randint(2**62, y.shape, device=DEVICE))
            low = optimization.precision == "bfloat16"
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=low):
                loss = module(batch).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), optimization.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for mine, trained in zip(average.parameters(), model.parameters(), strict=True):
                    mine.lerp_(trained, 1 - optimization.ema_decay)
            step += 1
            if step % LOG_EVERY == 0 and rank == 0:
                print(f"  peer: step {step}, loss {loss.item():.2f}", end="\r", flush=True)
            if step == LOG_EVERY:
                since = now()
            if step == steps:
                break
    return elapsed(since)


def ours(rank: int, dataset: Dataset, chosen: Preset, family: str, steps: int) -> list[float]:
    """Train by the loop; returns seconds and CPU seconds after the first steps."""
    plan = Plan(
        optimization=chosen.optimization,
        budget=Budget(steps=steps + LOG_EVERY),  # the last report follows a validation
        report_every=LOG_EVERY,
        checkpoint_every=LOG_EVERY * steps,
        compile=DEVICE.type == "cuda",
    )
    since, taken = now(), [0.0]

    def report(report: Report) -> None:
        nonlocal since, taken
        if report.step == LOG_EVERY:
            since = now()
        if report.step == steps:
            taken = elapsed(since)
        if rank == 0:
            print(
                f"  ours: step {report.step}, loss {report.metrics['train/loss']:.2f}", end="\r", flush=True
            )

    model = build(family, chosen.model, dataset.spec)
    train(model, dataset, plan, report, world=World(rank, WORKERS, DEVICE))
    return taken


def now() -> tuple[float, float]:
    """Seconds of the clock and of this process's CPU, once a GPU has done what it was asked."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def elapsed(since: tuple[float, float]) -> list[float]:
    """Seconds since a moment, of the clock and of this process's CPU."""
    return [later - earlier for later, earlier in zip(now(), since, strict=True)]


def random_images(data: str) -> Dataset:
    """Make images of a named dataset's shape, of even noise; all splits are one."""
    shape, levels = SHAPES[data]
    spec = DataSpec(name=data, kind="image", shape=shape, levels=levels, classes=10)
    draw = np.random.default_rng(0)
    split = Split(
        draw.integers(levels, size=(EXAMPLES, *shape), dtype=np.uint8), draw.integers(10, size=EXAMPLES)
    )
    spec = replace(spec, counts=torch.from_numpy(level_counts(spec, split.x)))
    return Dataset(spec, dict.fromkeys(("train", "validation"), split), "")


def work(
    rank: int, family: str, data: str, steps: int, folder: Path, loops: list[Callable[..., list[float]]]
) -> None:
    """Run both loops in turns as one of the processes; the first writes down what they took."""
    torch.set_num_threads(1)
    if WORKERS > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORKERS)
    dataset, chosen = random_images(data), preset(family, data)
    if DEVICE.type == "cuda":
        chosen = replace(chosen, optimization=replace(chosen.optimization, precision="bfloat16"))
    for _ in range(ROUNDS):
        taken = [loop(rank, dataset, chosen, family, steps) for loop in loops]
        if rank == 0:
            with (folder / "taken").open("a") as file:
                file.write(" ".join(str(seconds) for each in taken for seconds in each) + "\n")


def main() -> None:
    """Print the medians of both, and their ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("family", nargs="?", choices=["vae", "diffusion"], default="vae")
    parser.add_argument("--data", choices=SHAPES, default="digits")
    parser.add_argument("--steps", type=int, default=200, help="of a round, a multiple of 50")
    asked = parser.parse_args()
    if asked.steps % LOG_EVERY or asked.steps <= LOG_EVERY:
        parser.error(f"--steps {asked.steps} must be a multiple of {LOG_EVERY} above it")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arguments = (asked.family, asked.data, asked.steps, folder, [peer, ours])
        spawn(work, arguments, nprocs=WORKERS)  # type: ignore[no-untyped-call]
        rounds = [[float(seconds) for seconds in line.split()] for line in (folder / "taken").open()]
    examples = (asked.steps - LOG_EVERY) * preset(asked.family, asked.data).optimization.batch_size
    rates = [examples / statistics.median(seconds) for seconds in zip(*rounds, strict=True)]
    for unit, theirs, mine in (("s", rates[0], rates[2]), ("CPU s of a process", rates[1], rates[3])):
        print(f"examples/{unit}: peer {theirs:,.0f}, ours {mine:,.0f}, ratio {mine / theirs:.3f}")


if __name__ == "__main__":
    main()
