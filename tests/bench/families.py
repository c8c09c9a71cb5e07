"""Train a family on the digits for 60 s of one CPU thread, and report what the best checkpoint is worth.

    python tests/bench/families.py FAMILY [--seconds 60] [--seed 0] [--test] [--set model.FIELD=VALUE]

Seconds are CPU seconds of the process, so that two runs side by side take no time from each other. It reports
on the validation split, by which choices are made; `--test` reads the test split, once they are made.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gdl_ray.data import Split, evaluation_batches, load
from gdl_ray.evaluate.likelihood import log_likelihood
from gdl_ray.families import FAMILIES, build, preset
from gdl_ray.family import DataSpec, Family, Likelihood, Preset
from gdl_ray.home import home
from gdl_ray.random import fold
from gdl_ray.train.checkpoint import load_family
from gdl_ray.train.local import LocalRun
from gdl_ray.train.loop import Budget, Plan, train

TIGHT_SAMPLES = {"vae": 1000, "flow": 64, "hierarchical": 64}


def overridden(chosen: Preset, settings: list[str]) -> Preset:
    """Apply settings such as `model.width=32` to a preset."""
    for setting in settings:
        (part, field), text = setting.split("=")[0].split("."), setting.split("=")[1]
        value: Any = text if text.isidentifier() else json.loads(text)
        value = tuple(value) if isinstance(value, list) else value
        changed: Any = replace(getattr(chosen, part), **{field: value})
        chosen = replace(chosen, **{part: changed})
    return chosen


def report_likelihood(model: Likelihood, spec: DataSpec, split: Split, samples: int) -> None:
    """Print bits/dim of a split and its standard error over examples."""
    since = time.process_time()
    batches = [batch.unlabelled() for batch in evaluation_batches(split, batch_size=360)]
    nats = log_likelihood(model, batches, samples)
    score, error = -spec.bits_per_dim(nats.mean), spec.bits_per_dim(nats.standard_error)
    spent = time.process_time() - since
    print(f"bits/dim, {samples} samples, {model.likelihood_kind}: {score:.4f} +- {error:.4f} ({spent:.1f} s)")


def report_sampling(model: Family) -> None:
    """Print the time that 360 samples take."""
    since = time.process_time()
    model.sample(fold(7, torch.arange(360)), torch.arange(360) % max(1, model.spec.classes))
    print(f"360 samples: {time.process_time() - since:.2f} s")


def main() -> None:
    """Train, then report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test", action="store_true", help="read the test split, not the validation split")
    parser.add_argument("--every", type=int, default=250, help="steps between validations")
    parser.add_argument("--set", action="append", default=[], metavar="PART.FIELD=VALUE")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    digits = load("digits", home() / "data")
    chosen = overridden(preset(asked.family, "digits"), asked.set)
    plan = Plan(
        optimization=chosen.optimization,
        budget=Budget(seconds=asked.seconds),
        seed=asked.seed,
        checkpoint_every=asked.every,
    )
    print(f"{asked.family} {chosen}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        run = LocalRun(Path(folder))
        family = build(asked.family, chosen.model, digits.spec, asked.seed)
        train(family, digits, plan, run, clock=time.process_time)
        if run.best is None:
            raise RuntimeError("no checkpoint was written")
        model = load_family(run.best)
    split = "test" if asked.test else "validation"
    weights = sum(p.numel() for p in model.parameters())
    print(f"{asked.family}, seed {asked.seed}, {split} split, {weights:,} weights")
    if isinstance(model, Likelihood):
        for samples in sorted({model.quick_samples, TIGHT_SAMPLES.get(asked.family, model.quick_samples)}):
            report_likelihood(model, digits.spec, digits.splits[split], samples)
    report_sampling(model)


if __name__ == "__main__":
    main()
