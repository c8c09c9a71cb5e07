"""How a worker measures a piece of an evaluation."""

from functools import lru_cache, partial

import torch

from gdl_ray import registry
from gdl_ray.data import Dataset, load
from gdl_ray.evaluate.classifier import Classifier
from gdl_ray.evaluate.protocol import Findings, Piece, Protocol, Subject, measure
from gdl_ray.family import Family
from gdl_ray.home import home
from gdl_ray.tracking import PATIENCE_S, persist
from gdl_ray.train.checkpoint import load_family


def measure_piece(
    name: str, version: int, device: str, classifier: Classifier, protocol: Protocol, piece: Piece
) -> Findings:
    """Measure a piece of a version.

    Args:
        name: of the registered model.
        version: its number.
        device: to measure on: cpu or cuda.
        classifier: in whose features samples are compared.
        protocol: how all is measured.
        piece: what to measure.

    Raises:
        RegistryUnavailable: the registry does not answer for ten minutes.
    """
    model, dataset = _opened(name, version, device)
    return measure(Subject(model, dataset, classifier, protocol), piece)


@lru_cache(maxsize=1)
def _opened(name: str, version: int, device: str) -> tuple[Family, Dataset]:
    """Load a version and its data, once for all pieces that this process measures."""
    torch.set_num_threads(1)  # the same sums in the same order, on any worker
    folder = persist(partial(registry.fetch, name, version), PATIENCE_S)
    model = load_family(folder).to(device)
    return model, load(model.spec.name, home() / "data")
