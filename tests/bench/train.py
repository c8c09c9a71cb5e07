"""Examples/s of the training loop under Ray Train against the bare loop, one worker, in turns in one run.

    python tests/bench/train.py [STEPS]

Both run in processes of their own with one thread; the clock is that of the loop, which counts steps alone.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from gdl_ray.data import load
from gdl_ray.families import preset
from gdl_ray.train.plan import Budget, Plan
from gdl_ray.train.store import Store
from gdl_ray.train.task import RUN_FILE, Task
from gdl_ray.train.worker import work

ROUNDS = 5
BARE = """
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
from gdl_ray.data import load
from gdl_ray.families import build, preset
from gdl_ray.train.loop import train
from gdl_ray.train.plan import Budget, Plan
root, steps = Path(sys.argv[1]), int(sys.argv[2])
digits, chosen = load("digits", root), preset("vae", "digits")
plan = Plan(optimization=chosen.optimization, budget=Budget(steps=steps))
rates = []
train(build("vae", chosen.model, digits.spec), digits, plan, lambda r: rates.append(r.metrics["seconds"]))
print(steps * chosen.optimization.batch_size / rates[-1])
"""


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


def under_ray(root: Path, steps: int) -> float:
    """Train under Ray Train; returns examples/s."""
    chosen = preset("vae", "digits")
    plan = Plan(optimization=chosen.optimization, budget=Budget(steps=steps))
    storage = f"{root}/runs/{steps}-{time.time_ns()}"
    Store(storage).write_json(RUN_FILE, {})
    task = Task(
        family="vae", model=chosen.model, data="digits", data_root=root, plan=plan, storage=storage, keep=1
    )
    actor: Any = ray.remote(num_cpus=0)(Rates)
    rates = actor.remote()
    TorchTrainer(
        work,  # type: ignore[arg-type]
        train_loop_config={"task": task, "run": rates},
        scaling_config=ScalingConfig(num_workers=1),
        run_config=RunConfig(storage_path=str(root / "runs")),
    ).fit()
    seconds: float = ray.get(rates.last.remote())
    return steps * chosen.optimization.batch_size / seconds


def bare(root: Path, steps: int) -> float:
    """Train without Ray; returns examples/s."""
    command = [sys.executable, "-c", BARE, str(root), str(steps)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main(steps: int) -> None:
    """Print both rates and the ratio of their medians."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        load("digits", root)
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        pairs = [(bare(root, steps), under_ray(root, steps)) for _ in range(ROUNDS)]
    alone, shared = (statistics.median(rates) for rates in zip(*pairs, strict=True))
    print(f"bare loop {alone:,.0f} examples/s, under Ray Train {shared:,.0f}: ratio {shared / alone:.3f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 500)
