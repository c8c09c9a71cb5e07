"""Time the sample metrics of 10,000 MNIST samples: 60 s or less on two cores.

    python tests/bench/evaluation.py [--samples 10000]

MNIST's files are looked for in the home's `data/raw/mnist`. Samples are the validation images, and then the
same again, moved by a pixel. The classifier is fitted once for a dataset; its time is told apart.
"""

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gdl_ray.data import load
from gdl_ray.evaluate.classifier import fit_classifier
from gdl_ray.evaluate.fidelity import frechet_distance, kernel_distance, neighbours
from gdl_ray.evaluate.interpret import class_coverage
from gdl_ray.evaluate.memory import memorisation, nearest
from gdl_ray.home import home

CORES = 2
HELD_OUT = 1000  # whose distances to the training split say what is usual


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Print the seconds of a part, and those that its threads computed: fewer, where others computed too."""
    since, computed = time.perf_counter(), time.process_time()
    yield
    print(
        f"{what:42}{time.perf_counter() - since:7.1f} s{time.process_time() - computed:7.1f} CPU s",
        flush=True,
    )


def main() -> None:
    """Print a line for each part."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=10_000, help="at most 10,000")
    asked = parser.parse_args().samples
    torch.set_num_threads(CORES)
    mnist = load("mnist", home() / "data")
    train, x, data = (torch.tensor(mnist.splits[name].x) for name in ("train", "validation", "test"))
    samples = torch.cat([x, x.roll(1, dims=3)])[:asked]
    with timed("classifier, once for a dataset"):
        classifier = fit_classifier(mnist)
    with timed(f"evaluation of {len(samples):,} samples, in all"):
        with timed("  features of samples and data"):
            theirs, features = classifier.features(samples), classifier.features(data)
        with timed("  Frechet distance"):
            frechet = frechet_distance(features, theirs)
        with timed("  kernel distance and its error"):
            kernel = kernel_distance(features, theirs)
        with timed("  precision, recall, density, coverage"):
            near = neighbours(features, theirs)
        with timed("  nearest of 55,000 training images"):
            usual, found = nearest(train, data[:HELD_OUT])[0], nearest(train, samples)[0]
            memory = memorisation(usual, found)
        with timed("  class coverage"):
            coverage = class_coverage(classifier.predict(samples), mnist.spec.classes)
    print(f"Frechet {frechet:.3f}, kernel {kernel[0]:.4f} +- {kernel[1]:.4f}, {near}")
    print(f"{memory}, class coverage {coverage:.3f}")


if __name__ == "__main__":
    main()
