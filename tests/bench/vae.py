"""Train the VAE on the digits for 60 s on one CPU thread, and report test bits/dim.

    python tests/bench/vae.py [SECONDS] [SEED]

Choices were made on the validation split; the test split is read here alone.
"""

import sys
import tempfile
import time
from pathlib import Path

import torch

from gdl_ray.data import evaluation_batches, load
from gdl_ray.evaluate.likelihood import log_likelihood
from gdl_ray.families import build, preset
from gdl_ray.family import Likelihood
from gdl_ray.home import home
from gdl_ray.train.checkpoint import load_family
from gdl_ray.train.local import LocalRun
from gdl_ray.train.loop import Budget, Plan, train


def main(seconds: float, seed: int) -> None:
    """Print ELBO and importance-weighted bound of the checkpoint that validation chose."""
    torch.set_num_threads(1)
    digits = load("digits", home() / "data")
    chosen = preset("vae", "digits")
    plan = Plan(optimization=chosen.optimization, budget=Budget(seconds=seconds), seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        run = LocalRun(Path(folder))
        train(build("vae", chosen.model, digits.spec, seed), digits, plan, run)
        assert run.best
        model = load_family(run.best)
    assert isinstance(model, Likelihood)
    for samples in (1, 1000):
        since = time.perf_counter()
        batches = evaluation_batches(digits.splits["test"], batch_size=360)
        nats = log_likelihood(model, (batch.unlabelled() for batch in batches), samples)
        error = digits.spec.bits_per_dim(nats.standard_error)
        score = -digits.spec.bits_per_dim(nats.mean)
        spent = time.perf_counter() - since
        print(f"seed {seed}: test bits/dim, {samples} samples: {score:.4f} +- {error:.4f} ({spent:.1f} s)")


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 60.0, int(sys.argv[2]) if len(sys.argv) > 2 else 0)
