"""Two workers with different data hold the same parameters, in every family."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gdl_ray.data import load, training_batch
from gdl_ray.families import FAMILIES, build, preset
from gdl_ray.train.loop import Training
from gdl_ray.train.parallel import World
from gdl_ray.train.plan import Budget, Plan
from tests.train.test_loop import in_workers

pytestmark = pytest.mark.slow


def advance_all(root: Path, world: World) -> None:
    """Take three steps in every family."""
    digits = load("digits", root / "data")
    for key in FAMILIES:
        chosen = preset(key, "digits")
        # In float32: the rounding of bfloat16 depends on how a batch is cut.
        optimization = replace(chosen.optimization, batch_size=8, precision="float32")
        plan = Plan(optimization=optimization, budget=Budget(steps=100))
        training = Training(build(key, chosen.model, digits.spec), plan, world)
        for step in range(3):
            share = {"rank": world.rank, "world": world.size}
            training.advance(training_batch(digits.splits["train"], seed=0, step=step, batch_size=8, **share))
        tensors = dict(training.family.named_parameters()) | {
            f"carried/{name}": world.gather(rows, 8) for name, rows in training.family.carried.items()
        }
        held = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        save_file(held, root / f"{key}-{world.size}-{world.rank}.safetensors")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("workers")
    torch.set_num_threads(1)
    advance_all(root, World())
    in_workers(3, root, partial(advance_all, root))  # shares of 2, 3 and 3 examples
    return root


@pytest.mark.parametrize("key", FAMILIES)
def test_workers_agree_with_each_other_and_with_one_alone(key: str, trained: Path) -> None:
    alone, first, second, third = (
        load_file(trained / f"{key}-{name}.safetensors") for name in ("1-0", "3-0", "3-1", "3-2")
    )
    for name, tensor in alone.items():
        assert torch.equal(first[name], second[name]), name
        assert torch.equal(first[name], third[name]), name
        # Adam's first steps magnify what rounding leaves of a gradient near zero.
        difference = (first[name] - tensor).norm() / tensor.norm().clamp(min=1e-3)
        assert difference < 2e-2, name
