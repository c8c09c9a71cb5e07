"""The order of examples: epochs are permutations, and neither workers nor restarts change it."""

import numpy as np
import pytest
import torch

from gdl_ray.data import Dataset, Split, evaluation_batches, training_batch
from gdl_ray.data.batches import example_indices


def test_every_epoch_shows_each_example_once_in_another_order() -> None:
    first, second = example_indices(0, 0, 100, 100), example_indices(0, 100, 200, 100)
    assert sorted(first) == sorted(second) == list(range(100))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, example_indices(1, 0, 100, 100))


def test_a_step_may_span_epochs() -> None:
    assert np.array_equal(
        example_indices(3, 0, 25, 10),
        np.concatenate([example_indices(3, s, s + 5, 10) for s in range(0, 25, 5)]),
    )


@pytest.mark.parametrize("world", [2, 4])
def test_workers_share_the_step_of_one(digits: Dataset, world: int) -> None:
    train = digits.splits["train"]
    whole = training_batch(train, seed=5, step=30, batch_size=64)
    shares = [
        training_batch(train, seed=5, step=30, batch_size=64, rank=rank, world=world) for rank in range(world)
    ]
    for name in ("x", "y", "key"):
        assert torch.equal(torch.cat([getattr(share, name) for share in shares]), getattr(whole, name))


def test_noise_keys_differ_between_examples_and_steps(digits: Dataset) -> None:
    batches = [training_batch(digits.splits["train"], seed=0, step=step, batch_size=64) for step in range(50)]
    assert len({int(key) for batch in batches for key in batch.key}) == 50 * 64


def test_evaluation_shows_every_example_once_with_noise_of_its_own() -> None:
    split = Split(np.arange(23, dtype=np.uint8).reshape(-1, 1), np.zeros(23, np.int64))
    alone = list(evaluation_batches(split, batch_size=5))
    shared = [b for rank in range(3) for b in evaluation_batches(split, batch_size=4, rank=rank, world=3)]
    keys = {int(x): int(key) for batch in alone for x, key in zip(batch.x, batch.key, strict=True)}
    assert keys == {int(x): int(key) for batch in shared for x, key in zip(batch.x, batch.key, strict=True)}
    assert len(keys) == len(set(keys.values())) == 23
