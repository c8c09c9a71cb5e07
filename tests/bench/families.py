"""Train a family on the digits for 60 s of one CPU thread, and report what the best checkpoint is worth.

    python tests/bench/families.py FAMILY [--seconds 60] [--seed 0] [--test] [--set model.FIELD=VALUE]
    python tests/bench/families.py --references [--test]        what such figures are to be read beside

Seconds are CPU seconds of the process, so that two runs side by side take no time from each other. It reports
on the validation split, by which choices are made; `--test` reads the test split, once they are made.

Sample metrics compare as many samples as the split has images, of the same labels, with these. Their features
are those of a classifier trained on the training split: figures compare within the same features and n.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gdl_ray.data import Dataset, evaluation_batches, load
from gdl_ray.evaluate.baselines import ProductMixture, fit_mixture, independent
from gdl_ray.evaluate.bayes import bayes_accuracy, log_prior
from gdl_ray.evaluate.classifier import fit_classifier
from gdl_ray.evaluate.fidelity import frechet_distance, label_agreement, neighbours
from gdl_ray.evaluate.likelihood import log_likelihood
from gdl_ray.families import FAMILIES, build, preset
from gdl_ray.family import Family, Likelihood, Preset
from gdl_ray.home import home
from gdl_ray.random import fold
from gdl_ray.train import loop
from gdl_ray.train.checkpoint import load_family
from gdl_ray.train.local import LocalRun
from gdl_ray.train.plan import Budget, Plan

MOST_BAYES_SAMPLES = 128  # for each class
TIMED_SAMPLES = 360


def overridden(chosen: Preset, settings: list[str]) -> Preset:
    """Apply settings such as `model.width=32` to a preset."""
    for setting in settings:
        (part, field), text = setting.split("=")[0].split("."), setting.split("=")[1]
        value: Any = text if text.isidentifier() else json.loads(text)
        value = tuple(value) if isinstance(value, list) else value
        changed: Any = replace(getattr(chosen, part), **{field: value})
        chosen = replace(chosen, **{part: changed})
    return chosen


def trained(key: str, digits: Dataset, asked: argparse.Namespace) -> Family:
    """Train a family; returns its best checkpoint."""
    chosen = overridden(preset(key, "digits"), asked.set)
    plan = Plan(
        optimization=chosen.optimization,
        budget=Budget(seconds=asked.seconds),
        seed=asked.seed,
        checkpoint_every=asked.every,
    )
    print(f"{key} {chosen}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        run = LocalRun(Path(folder))
        loop.train(
            build(key, chosen.model, digits.spec, asked.seed), digits, plan, run, clock=time.process_time
        )
        if run.best is None:
            raise RuntimeError("no checkpoint was written")
        return load_family(run.best)


def alike(y: Tensor, other: Tensor, draw: int) -> Tensor:
    """Draw rows of labels y such that each class is as frequent as in another set; each draw has its own."""
    order = fold(7, torch.arange(len(y))).argsort()
    counts = enumerate(torch.bincount(other).tolist())
    return torch.cat([order[y[order] == label][draw * n :][:n] for label, n in counts])


@contextmanager
def timed() -> Iterator[None]:
    """End the line with the CPU seconds that its figures took."""
    since = time.process_time()
    yield
    print(f"  ({time.process_time() - since:.2f} s)", flush=True)


class Judge:
    """Measures models and sample sets against one split of the digits."""

    def __init__(self, digits: Dataset, split: str) -> None:
        self.digits, self.spec, self.split = digits, digits.spec, digits.splits[split]
        self.classifier = fit_classifier(digits)
        self.features = self.classifier.features(torch.tensor(self.split.x))

    def likelihood(self, model: Likelihood, samples: int) -> None:
        """Print bits/dim and their standard error over examples."""
        with timed():
            batches = [batch.unlabelled() for batch in evaluation_batches(self.split, batch_size=360)]
            nats = log_likelihood(model, batches, samples)
            score, error = -self.spec.bits_per_dim(nats.mean), self.spec.bits_per_dim(nats.standard_error)
            what = f"bits/dim, {samples} samples, {model.likelihood_kind}"
            print(f"{what}: {score:.4f} +- {error:.4f}", end="")

    def bayes(self, model: Likelihood, samples: int) -> None:
        """Print the accuracy of Bayes' rule; costs ten times the likelihood with as many samples."""
        with timed():
            prior = log_prior(torch.tensor(self.digits.splits["train"].y), self.spec.classes)
            batches = evaluation_batches(self.split, batch_size=360)
            accuracy = bayes_accuracy(model, batches, prior, samples)
            print(f"Bayes accuracy, {samples} samples: {accuracy:.4f}", end="")

    def sampling(self, model: Family) -> None:
        """Print the time that samples take, and what those are worth that the split has images."""
        labels = torch.tensor(np.resize(self.split.y, max(TIMED_SAMPLES, len(self.split))))
        with timed():
            x = model.sample(fold(7, torch.arange(len(labels))), labels)
            print(f"{len(x)} samples:", end="")
        self.heading()
        self.samples("samples", x[: len(self.split)], labels[: len(self.split)])

    def heading(self) -> None:
        """Print what the columns of sample metrics are."""
        print(f"features {self.classifier.fingerprint()}, {len(self.split)} images; k = 5")
        print(f"{'':24}{'n':>5}      FD  precision  recall  density  coverage  labels")

    def samples(self, name: str, x: Tensor, labels: Tensor | None = None) -> None:
        """Print a row of sample metrics."""
        features = self.classifier.features(x)
        near, distance = neighbours(self.features, features), frechet_distance(self.features, features)
        agreement = "-" if labels is None else f"{label_agreement(self.classifier.predict(x), labels):.3f}"
        print(
            f"{name:24}{len(x):5}{distance:8.3f}{near.precision:11.3f}{near.recall:8.3f}"
            f"{near.density:9.3f}{near.coverage:10.3f}{agreement:>8}"
        )

    def density(self, name: str, mixture: ProductMixture) -> None:
        """Print exact bits/dim of a density that is no family."""
        nats = mixture.log_prob(torch.tensor(self.split.x))
        print(f"bits/dim, exact, {name}: {-self.spec.bits_per_dim(nats.mean().item()):.4f}")

    def references(self) -> None:
        """Print the figures of data, and of models that need no network."""
        train = self.digits.splits["train"]
        x, y = torch.tensor(train.x), torch.tensor(train.y)
        if self.spec.counts is None:
            raise RuntimeError("the data have no counts")
        pixels = independent(self.spec.counts)
        self.density("uniform", independent(torch.zeros_like(self.spec.counts)))
        self.density("independent pixels", pixels)
        for seed in range(3):
            mixture = fit_mixture(x, self.spec.levels, seed=seed)
            self.density(f"mixture of 40 products, seed {seed}", mixture)
        n = len(self.split)
        keys = fold(7, torch.arange(n))
        self.heading()
        for draw in range(3):
            rows = alike(y, torch.tensor(self.split.y), draw)
            self.samples(f"training images, draw {draw}", x[rows], y[rows])
        self.samples("independent pixels", pixels.sample(keys).view(n, *self.spec.shape))
        self.samples("mixture of 40 products", mixture.sample(keys).view(n, *self.spec.shape))
        self.samples("training images of a 0", x[y == 0][:n])


def main() -> None:
    """Train, then report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("family", choices=FAMILIES, nargs="?")
    what.add_argument("--references", action="store_true", help="train none; report what to read figures by")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test", action="store_true", help="read the test split, not the validation split")
    parser.add_argument("--every", type=int, default=250, help="steps between validations")
    parser.add_argument("--set", action="append", default=[], metavar="PART.FIELD=VALUE")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    digits = load("digits", home() / "data")
    split = "test" if asked.test else "validation"
    if asked.references:
        print(f"references, {split} split")
        Judge(digits, split).references()
        return
    model = trained(asked.family, digits, asked)
    weights = sum(p.numel() for p in model.parameters())
    print(f"{asked.family}, seed {asked.seed}, {split} split, {weights:,} weights")
    judge = Judge(digits, split)
    if isinstance(model, Likelihood):
        for samples in sorted({model.quick_samples, model.tight_samples}):
            judge.likelihood(model, samples)
        judge.bayes(model, min(model.tight_samples, MOST_BAYES_SAMPLES))
    judge.sampling(model)


if __name__ == "__main__":
    main()
