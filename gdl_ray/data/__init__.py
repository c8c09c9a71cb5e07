"""Named datasets as memory-mapped arrays, and the order in which training reads them."""

from gdl_ray.data.arrays import Dataset, Split
from gdl_ray.data.batches import evaluation_batch, evaluation_batches, training_batch
from gdl_ray.data.feed import Feed
from gdl_ray.data.sources import DATASETS, load

__all__ = [
    "DATASETS",
    "Dataset",
    "Feed",
    "Split",
    "evaluation_batch",
    "evaluation_batches",
    "load",
    "training_batch",
]
