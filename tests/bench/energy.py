"""Train the energy on the digits for 60 s of one CPU thread; report its constant both ways, and its chains.

    python tests/bench/energy.py [--seconds 60] [--seed 0] [--temperatures 2000] [--test]

log Z is estimated forwards, from the base, and in reverse, from the carried chains and from images, which the
model moves on first. Bits/dim are those of a split under each, K draws of the noise an image. It reports on
the validation split, by which choices are made; `--test` reads the test split, once they are made.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from gdl_ray.data import Dataset, Split, evaluation_batches, load
from gdl_ray.evaluate.likelihood import log_likelihood
from gdl_ray.families import build, preset
from gdl_ray.families.energy import Energy, Point, langevin
from gdl_ray.home import home
from gdl_ray.random import fold, uniform
from gdl_ray.train.checkpoint import load_family
from gdl_ray.train.local import LocalRun
from gdl_ray.train.loop import train
from gdl_ray.train.plan import Budget, Plan

CHAINS = 360
LONG_MOVES = 1000
LEAST_EFFECTIVE = 5  # chains; below, log Z is anybody's guess


def trained(digits: Dataset, seconds: float, seed: int) -> tuple[Energy, Energy]:
    """Train the preset: the last weights with their chains, and the checkpoint that validation chose."""
    chosen = preset("energy", "digits")
    plan = Plan(optimization=chosen.optimization, budget=Budget(seconds=seconds), seed=seed)
    last = build("energy", chosen.model, digits.spec, seed)
    with tempfile.TemporaryDirectory() as folder:
        run = LocalRun(Path(folder))
        train(last, digits, plan, run, clock=time.process_time)
        assert run.best
        best = load_family(run.best)
    assert isinstance(last, Energy)
    assert isinstance(best, Energy)
    return last.eval(), best


@torch.no_grad()
def moved_on(model: Energy, z: Tensor, seed: int) -> tuple[Point, float]:
    """Run chains for long; also how many of their moves were accepted."""
    at, keys, accepted = Point(z, *model.tilt(z)), fold(seed, torch.arange(len(z))), 0.0
    for number in range(LONG_MOVES):
        at, moved = langevin(model.tilt, at, keys, number, 1.0, model.config.move_size)
        accepted += moved.float().mean().item() / LONG_MOVES
    return at, accepted


@torch.no_grad()
def positions(model: Energy, split: Split) -> Tensor:
    """Map a split to normal variables, each value at a place in its bin of its own."""
    x = torch.from_numpy(split.x.copy()).flatten(1)
    u = uniform(fold(0, torch.arange(len(x))), (x.shape[1],))
    z: Tensor = model.marginal(x, u)[0]
    return z


def mean_energy(tilt: Tensor) -> str:
    """Tell -f and its standard error over chains."""
    return f"{-tilt.mean().item():.2f} +- {tilt.std().item() / len(tilt) ** 0.5:.2f}"


def report_chains(last: Energy, split: Split) -> None:
    """Compare the energies of the carried chains with those of the same chains much later, and of data."""
    chains = last.carried["chains"].flatten(0, 1)
    later, accepted = moved_on(last, chains, seed=2)
    print(f"energy (nats) of carried chains: {mean_energy(last.tilt(chains)[0])}", end="; ")
    print(f"{LONG_MOVES} moves later: {mean_energy(later.tilt)} ({accepted:.0%} accepted)", end="; ")
    print(f"of data: {mean_energy(last.tilt(positions(last, split))[0])}")


def report_likelihood(model: Energy, digits: Dataset, split: Split) -> None:
    """Print bits/dim of a split under the constant that the model holds."""
    for samples in (1, 64):
        batches = [batch.unlabelled() for batch in evaluation_batches(split, batch_size=360)]
        nats = log_likelihood(model, batches, samples)
        score, error = -digits.spec.bits_per_dim(nats.mean), digits.spec.bits_per_dim(nats.standard_error)
        print(f"  bits/dim, K = {samples}: {score:.4f} +- {error:.4f} over images")


def report_constant(model: Energy, chains: Tensor, digits: Dataset, split: Split, temperatures: int) -> None:
    """Print log Z forwards and in reverse, and what each makes of a split."""
    since = time.process_time()
    model.normalize(CHAINS, temperatures)
    estimates = {"forward": (model.log_z.item(), model.effective_chains.item())}
    print(f"forward annealing, {temperatures} temperatures: {time.process_time() - since:.1f} s")
    for name, start in (
        ("reverse, chains", chains[:: len(chains) // CHAINS][:CHAINS]),
        ("reverse, data", positions(model, split)),
    ):
        moved, _ = moved_on(model, start, seed=3)
        estimates[name] = model.reverse_log_z(moved.z, temperatures)
    for name, (log_z, effective) in estimates.items():
        gap = digits.spec.bits_per_dim(log_z - estimates["forward"][0])
        print(f"{name}: log Z {log_z:.3f} (gap {gap:.4f} bits/dim), ESS {effective:.0f} of {CHAINS}")
        if effective < LEAST_EFFECTIVE:
            print("  no figure: too few chains count")
            continue
        model.log_z.fill_(log_z)
        report_likelihood(model, digits, split)


def report_classes(model: Energy, split: Split) -> None:
    """Print how often p(y | z) is right, one draw of the noise an image."""
    right = model.logits(positions(model, split)).argmax(1) == torch.from_numpy(split.y.copy())
    print(f"classes: {right.float().mean().item():.1%} right")


def main() -> None:
    """Train, then report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--temperatures", type=int, default=2000)
    parser.add_argument("--test", action="store_true", help="read the test split, not the validation split")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    digits = load("digits", home() / "data")
    last, best = trained(digits, asked.seconds, asked.seed)
    name = "test" if asked.test else "validation"
    split = digits.splits[name]
    print(f"energy, seed {asked.seed}, {name} split, {sum(p.numel() for p in best.parameters()):,} weights")
    report_chains(last, split)
    report_constant(best, last.carried["chains"].flatten(0, 1), digits, split, asked.temperatures)
    report_classes(best, split)


if __name__ == "__main__":
    main()
