"""Rank "models" whose worth is known, by the sample metrics that models are ranked by.

    python tests/bench/impostors.py [--test]

Copies of training images are perfect by every distance and worth nothing; held-out images are as good as
samples can be; a mixture of products and blurred images are in between, noise is last. All are compared with
one half of the images that no weight was fitted to, the validation split or with `--test` the test split; the
other half plays the held-out images.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gdl_ray.data import Dataset, load
from gdl_ray.evaluate.baselines import fit_mixture
from gdl_ray.evaluate.classifier import Classifier, fit_classifier
from gdl_ray.evaluate.fidelity import Neighbours, frechet_distance, kernel_distance, neighbours
from gdl_ray.evaluate.memory import Memorisation, memorisation, nearest
from gdl_ray.evaluate.ranking import Standing, rank
from gdl_ray.home import home
from gdl_ray.random import fold, uniform

BLUR = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the metrics say of a set of samples."""

    kernel: tuple[float, float]
    frechet: float
    near: Neighbours
    memory: Memorisation

    @property
    def standing(self) -> Standing:
        """What it is ranked by."""
        distance, error = self.kernel
        return Standing(distance=distance, error=error, is_memorised=self.memory.is_memorised)


def blurred(x: Tensor) -> Tensor:
    """Average each pixel with those around it."""
    return F.conv2d(F.pad(x.float(), (1, 1, 1, 1)), BLUR[None, None]).round().to(torch.uint8)


def impostors(train: Tensor, held_out: Tensor, levels: int) -> dict[str, Tensor]:
    """Make sets of samples, each as large as that of held-out images, from the best to the worst."""
    count, shape = len(held_out), tuple(held_out.shape[1:])
    keys = fold(7, torch.arange(count))
    chosen = fold(8, torch.arange(len(train))).argsort()[:count]
    return {
        "held-out images": held_out,
        "mixture of 40 products": fit_mixture(train, levels).sample(keys).view(count, *shape),
        "blurred images": blurred(held_out),
        "uniform noise": (uniform(keys, shape) * levels).to(torch.uint8),
        "copies of training images": train[chosen],
    }


def judge(dataset: Dataset, classifier: Classifier, split: str) -> Mapping[str, Judgement]:
    """Measure each set of samples against one half of a split."""
    train, x = (torch.tensor(dataset.splits[name].x) for name in ("train", split))
    reference, held_out = x[::2], x[1::2]
    features, usual = classifier.features(reference), nearest(train, reference)[0]
    found = {}
    for name, samples in impostors(train, held_out, dataset.spec.levels).items():
        theirs = classifier.features(samples)
        found[name] = Judgement(
            kernel=kernel_distance(features, theirs),
            frechet=frechet_distance(features, theirs),
            near=neighbours(features, theirs),
            memory=memorisation(usual, nearest(train, samples)[0]),
        )
    return found


def main() -> None:
    """Print the table, best first."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--test", action="store_true", help="read the test split, not the validation split")
    split = "test" if parser.parse_args().test else "validation"
    torch.set_num_threads(1)
    digits = load("digits", home() / "data")
    classifier = fit_classifier(digits)
    found = judge(digits, classifier, split)
    print(f"{split} split of the digits, features {classifier.fingerprint()}")
    print(
        "place  samples                      kernel distance  Frechet  precision  coverage  copied        z"
    )
    for place, name in rank({name: judgement.standing for name, judgement in found.items()}):
        row = found[name]
        (distance, error), memory = row.kernel, row.memory
        print(
            f"{place or '-':5}  {name:28}{distance:8.3f} +- {error:.3f}{row.frechet:9.2f}"
            f"{row.near.precision:11.3f}{row.near.coverage:10.3f}{memory.copied_share:8.3f}{memory.z:9.1f}"
            f"{'  memorised' if memory.is_memorised else ''}"
        )


if __name__ == "__main__":
    main()
