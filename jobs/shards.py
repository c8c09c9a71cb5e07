"""The shards of a large draw, and how a worker makes one.

    shard-00000.npz     samples, and of each its seed and its label

A shard is written whole or not at all, and is a function of what was asked for: one that is lost with its
worker is drawn again by another, and one that is there need not be.
"""

import io
import zipfile
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gdl_ray import registry
from gdl_ray.engine import Engine, seeds_of
from gdl_ray.family import UNLABELLED
from gdl_ray.home import bytes_sha256
from gdl_ray.train.checkpoint import load_family
from gdl_ray.train.store import Store

BALANCED = "balanced"
"""As labels: every class in turn."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """What decides the samples of a draw, and how they are cut into shards."""

    model: str
    version: int
    n: int
    """How many samples."""
    seed: int
    """In [0, 2**53 - 1]."""
    labels: str
    """`none`, a class, or BALANCED."""
    options: dict[str, float]
    """A value of every option that the model has."""
    shard: int
    """Samples in each shard, but for the last."""

    @property
    def shards(self) -> int:
        """How many shards there are."""
        return -(-self.n // self.shard)

    def size(self, number: int) -> int:
        """Count the samples of a shard."""
        return min(self.shard, self.n - number * self.shard)

    def seeds_in(self, number: int) -> Tensor:
        """Derive the seeds of a shard's samples, int64 (size,)."""
        return _seeds(self.seed, self.n)[number * self.shard :][: self.shard]

    def labels_in(self, number: int, classes: int) -> Tensor:
        """Choose the classes of a shard's samples, int64 (size,); UNLABELLED for any."""
        if self.labels == BALANCED:
            return (torch.arange(self.size(number)) + number * self.shard) % classes
        label = UNLABELLED if self.labels == "none" else int(self.labels)
        return torch.full((self.size(number),), label)


@lru_cache(maxsize=1)
def _seeds(seed: int, n: int) -> Tensor:
    """Derive the seeds of all samples, once for all shards of this process."""
    return seeds_of(seed, n)


@dataclass(frozen=True, slots=True)
class Shard:
    """A shard that is written."""

    number: int
    sha256: str
    drawn: int
    """How many samples were drawn for it; 0 if it was there before."""


def shard_name(number: int) -> str:
    """Name the file of a shard."""
    return f"shard-{number:05d}.npz"


def draw_shard(draw: Draw, number: int, address: str, device: str) -> Shard:
    """Write a shard of a draw, unless it is there.

    Args:
        draw: what is asked for.
        number: of the shard.
        address: of the folder, as of Store.
        device: to draw on: cpu or cuda.
    """
    store, name = Store(address), shard_name(number)
    seeds = draw.seeds_in(number)
    there = store.read(name)
    if there is not None and _holds(there, seeds):
        return Shard(number, bytes_sha256(there), 0)
    engine, classes = _engine(draw.model, draw.version, device, draw.shard)
    labels = draw.labels_in(number, classes)
    samples = engine.submit(seeds, labels, draw.options).future.result()
    content = _packed(samples=samples.numpy(), seeds=seeds.numpy(), labels=labels.numpy())
    store.write(name, content)
    return Shard(number, bytes_sha256(content), len(seeds))


@lru_cache(maxsize=1)
def _engine(model: str, version: int, device: str, queue_samples: int) -> tuple[Engine, int]:
    """Load a version, once for all shards that this process draws; returns the number of classes too."""
    torch.set_num_threads(1)  # as the service does, for the same sums in the same order
    family = load_family(registry.fetch(model, version)).to(device)
    return Engine(family, queue_samples=queue_samples), family.spec.classes


def _packed(**arrays: NDArray[np.generic]) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, allow_pickle=False, **arrays)
    return stream.getvalue()


def _holds(content: bytes, seeds: Tensor) -> bool:
    """Tell whether a file is whole, and the shard of these seeds."""
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            sizes = {len(arrays[name]) for name in ("samples", "seeds", "labels")}
            return sizes == {len(seeds)} and bool((arrays["seeds"] == seeds.numpy()).all())
    except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile):
        return False
