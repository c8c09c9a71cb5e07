"""Workers average gradients once a step, however a phase is computed."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch._C._distributed_c10d import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from gdl_ray.data import load, training_batch
from gdl_ray.families import build
from gdl_ray.families.vae import VAEConfig
from gdl_ray.family import Optimization
from gdl_ray.train.loop import Training
from gdl_ray.train.parallel import World
from gdl_ray.train.plan import Budget, Plan
from tests.train.test_loop import in_workers

BATCH = 13
"""An odd number: one of two workers has a row more, and their micro-batches differ too."""
PLAN = Plan(optimization=Optimization(batch_size=BATCH), budget=Budget(steps=100))
PLANS = {"plain": PLAN, "micro": replace(PLAN, micro_batch=3), "compiled": replace(PLAN, compile=True)}


def advance_all(root: Path, world: World) -> None:
    """Take three steps by each plan."""
    digits = load("digits", root / "data")
    torch.compile = partial(torch.compile, backend="aot_eager")
    for name, plan in PLANS.items():
        model = build("vae", VAEConfig(width=4, hidden=32, latent=4), digits.spec)
        training = Training(model, plan, world)
        averagings = [count_averagings(module) for module in training._modules.values()]
        for step in range(3):
            share = {"rank": world.rank, "world": world.size}
            training.advance(
                training_batch(digits.splits["train"], seed=0, step=step, batch_size=BATCH, **share)
            )
        held = {**training.family.state_dict(), "averagings": torch.tensor([count() for count in averagings])}
        save_file(held, root / f"{name}-{world.size}-{world.rank}.safetensors")


def count_averagings(module: torch.nn.Module) -> Callable[[], int]:
    """Count how often gradients are averaged: a bucket at a time."""
    if not isinstance(module, DistributedDataParallel):
        return lambda: 0
    done: list[None] = []

    def hook(group: dist.ProcessGroup, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        done.append(None)
        return allreduce_hook(group, bucket)

    module.register_comm_hook(dist.group.WORLD, hook)
    return lambda: len(done)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("workers")
    torch.set_num_threads(1)
    plain = torch.compile
    advance_all(root, World())
    torch.compile = plain
    in_workers(2, root, partial(advance_all, root))
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
def test_two_workers_train_what_one_does(name: str, trained: Path) -> None:
    alone = load_file(trained / "plain-1-0.safetensors")
    first, second = (load_file(trained / f"{name}-2-{rank}.safetensors") for rank in range(2))
    for weight in alone.keys() - {"averagings"}:
        assert torch.equal(first[weight], second[weight]), weight
        difference = (first[weight] - alone[weight]).norm() / alone[weight].norm().clamp(min=1e-3)
        assert difference < 1e-3, weight


@pytest.mark.slow
def test_micro_batches_are_averaged_once_a_step(trained: Path) -> None:
    plain, micro = (
        load_file(trained / f"{name}-2-0.safetensors")["averagings"] for name in ("plain", "micro")
    )
    assert torch.equal(plain, micro)
    assert (plain >= 3).all()


def test_a_worker_alone_agrees_with_itself() -> None:
    world = World()
    assert world.from_first(1.5, True) == [1.5, 1.0]
    assert world.least(2.5) == 2.5
    rows = torch.arange(6).view(3, 2)
    assert torch.equal(world.gather(rows, 3), rows)
    assert torch.equal(world.share(rows), rows)
