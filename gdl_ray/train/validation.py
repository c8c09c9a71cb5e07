"""What is measured and shown of a model while it trains."""

import torch

from gdl_ray.data import Dataset, Split, evaluation_batches
from gdl_ray.evaluate.likelihood import Nats, log_likelihood
from gdl_ray.family import Family, Likelihood
from gdl_ray.images import png_grid
from gdl_ray.random import fold
from gdl_ray.train.parallel import World

SCORE = "validation/bits_per_dim"
"""The metric that tells the best checkpoint, lower is better; only families with a likelihood report it."""

_BATCH = 256
_FEW_EXAMPLES = 1000  # that need all of a model's quick samples
_GRID_ROWS = 5
_GRID_COLUMNS = 10


def split_nats(model: Likelihood, split: Split, world: World) -> Nats:
    """Measure log p(x) over a split, each worker a share of it.

    What a small split averages over draws, a large one averages over examples.
    """
    samples = max(1, model.quick_samples * _FEW_EXAMPLES // max(len(split), _FEW_EXAMPLES))
    batches = evaluation_batches(split, batch_size=_BATCH, rank=world.rank, world=world.size)
    unlabelled = (batch.unlabelled().to(world.device) for batch in batches)
    mine = log_likelihood(model, unlabelled, samples)
    sums = torch.tensor([mine.total, mine.squares, mine.examples], dtype=torch.float64, device=world.device)
    return Nats(*world.sum(sums).tolist())


def validation_score(model: Likelihood, dataset: Dataset, examples: int, world: World) -> float:
    """Measure bits/dim on the first examples of the validation split, each worker a share of them."""
    nats = split_nats(model, dataset.splits["validation"].first(examples), world)
    return -dataset.spec.bits_per_dim(nats.mean)


def sample_grid(model: Family) -> bytes:
    """Picture samples, a class per column, with the same keys at every step of every run."""
    count = _GRID_ROWS * _GRID_COLUMNS
    device = next(model.parameters()).device
    keys = fold(0, torch.arange(count, device=device))
    classes = model.spec.classes
    labels = torch.arange(count, device=device) % _GRID_COLUMNS % classes if classes else None
    return png_grid(model.sample(keys, labels).cpu(), model.spec.levels, columns=_GRID_COLUMNS)
