"""The shards of a large draw, and how a worker makes one.

    request.json        what was asked for, written before
    shard-00000.npz     samples, and of each its seed and its label

A shard is written whole or not at all, and is a function of what was asked for: one that is lost with its
worker is drawn again by another, and one that is there need not be.
"""

import io
import platform
import time
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gdl_ray import registry
from gdl_ray.engine import Engine, seeds_of
from gdl_ray.family import UNLABELLED
from gdl_ray.home import bytes_sha256
from gdl_ray.tracking import PATIENCE_S, persist
from gdl_ray.train.checkpoint import load_family
from gdl_ray.train.store import Store, patiently

BALANCED = "balanced"
"""As labels: every class in turn."""
REQUEST = "request.json"

_LATE_S = 30.0  # how long a file that one node has written may be unseen on another


class SamplingError(Exception):
    """The draw is not complete; what is written stays, and the same command goes on with it."""


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
    shape: tuple[int, ...]
    """Of each sample: (C, H, W) or (T,)."""
    classes: int
    """How many the model has; 0 for none."""

    @property
    def record(self) -> dict[str, Any]:
        """All of it, as JSON gives it back."""
        return asdict(self) | {"shape": list(self.shape)}

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

    def labels_in(self, number: int) -> Tensor:
        """Choose the classes of a shard's samples, int64 (size,); UNLABELLED for any."""
        if self.labels == BALANCED:
            return (torch.arange(self.size(number)) + number * self.shard) % self.classes
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
    """Write a shard of a draw, unless it is there; wait for a storage or a registry that is away.

    Args:
        draw: what is asked for.
        number: of the shard.
        address: of the folder, as of Store.
        device: to draw on: cpu or cuda.

    Raises:
        SamplingError: this node sees another folder than the one that the draw was noted down in.
        OSError: the storage does not answer for ten minutes.
        RegistryUnavailable: likewise the registry.
    """
    store, name = patiently(partial(Store, address)), shard_name(number)
    _check_place(store, draw)
    there = patiently(partial(store.read, name))
    if there is not None and _holds(there, draw, number):
        return Shard(number, bytes_sha256(there), 0)
    seeds, labels = draw.seeds_in(number), draw.labels_in(number)
    samples = _engine(draw.model, draw.version, device, draw.shard).submit(seeds, labels, draw.options)
    content = _packed(samples=samples.future.result().numpy(), seeds=seeds.numpy(), labels=labels.numpy())
    patiently(partial(store.write, name, content))
    return Shard(number, bytes_sha256(content), len(seeds))


def _check_place(store: Store, draw: Draw) -> None:
    """Check that the folder is the one that the draw was noted down in; it may be seen late."""
    deadline = time.monotonic() + _LATE_S
    while (found := patiently(partial(store.read_json, REQUEST))) != draw.record:
        if time.monotonic() > deadline:
            sees = "another draw" if found else f"no {REQUEST}"
            raise SamplingError(
                f"--out {store.address} is not one folder for all nodes: node {platform.node()} sees {sees} "
                f"there; give a folder that all nodes share, or a bucket"
            )
        time.sleep(1)


@lru_cache(maxsize=1)
def _engine(model: str, version: int, device: str, queue_samples: int) -> Engine:
    """Load a version, once for all shards that this process draws."""
    torch.set_num_threads(1)  # as the service does, for the same sums in the same order
    folder = persist(partial(registry.fetch, model, version), PATIENCE_S)
    return Engine(load_family(folder).to(device), queue_samples=queue_samples)


def _packed(**arrays: NDArray[np.generic]) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, allow_pickle=False, **arrays)
    return stream.getvalue()


def _holds(content: bytes, draw: Draw, number: int) -> bool:
    """Tell whether a file is whole, and this shard of the draw."""
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            shape = (draw.size(number), *draw.shape)
            wanted = {"seeds": draw.seeds_in(number).numpy(), "labels": draw.labels_in(number).numpy()}
            same = (np.array_equal(arrays[name], each) for name, each in wanted.items())
            return arrays["samples"].shape == shape and all(same)
    except Exception:  # the readers of zip and npy raise anything at all over flipped bits: it is drawn again
        return False
