"""A feed gives bit for bit the batches of `training_batch`, wherever the split lies."""

import threading
from collections.abc import Sequence

import pytest
import torch

from gdl_ray.data import Dataset, Feed, training_batch
from gdl_ray.data import feed as module
from gdl_ray.family import Batch

CPU = torch.device("cpu")
SIZE = 48
"""Of a batch: the 1,293 training digits end an epoch within a step."""


@pytest.fixture(params=["resident", "read ahead"])
def _room(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "read ahead":
        monkeypatch.setattr(module, "_memory_bytes", lambda device: 0)


def check(digits: Dataset, steps: Sequence[int], rank: int = 0, world: int = 1) -> None:
    """Compare the batches of steps, in this order, with those that are read one by one."""
    split, share = digits.splits["train"], {"rank": rank, "world": world}
    feed = Feed(split, seed=3, batch_size=SIZE, device=CPU, **share)
    # All before any is compared: one that is overwritten later would differ.
    given = [feed.batch(step) for step in steps]
    for step, batch in zip(steps, given, strict=True):
        same(batch, training_batch(split, seed=3, step=step, batch_size=SIZE, **share))


def same(batch: Batch, expected: Batch) -> None:
    for name in ("x", "y", "key"):
        mine, other = getattr(batch, name), getattr(expected, name)
        assert mine.dtype == other.dtype
        assert torch.equal(mine, other), name


@pytest.mark.usefixtures("_room")
@pytest.mark.parametrize(("rank", "world"), [(0, 1), (0, 2), (2, 5)])
def test_batches_are_those_that_are_read_one_by_one(digits: Dataset, rank: int, world: int) -> None:
    check(digits, range(70), rank, world)


@pytest.mark.usefixtures("_room")
def test_steps_may_be_skipped_and_asked_for_again(digits: Dataset) -> None:
    check(digits, [41, 42, 7, 8, 8, 200, 0])


def test_a_thread_reads_ahead_only_where_the_split_does_not_fit(
    digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(threading.enumerate())

    def started() -> int:
        return sum(thread.name.startswith("feed") for thread in set(threading.enumerate()) - before)

    split = digits.splits["train"]
    resident = Feed(split, seed=0, batch_size=SIZE, device=CPU)
    resident.batch(0)
    assert started() == 0
    monkeypatch.setattr(module, "_memory_bytes", lambda device: 0)
    ahead = Feed(split, seed=0, batch_size=SIZE, device=CPU)
    ahead.batch(0)
    assert started() == 1
