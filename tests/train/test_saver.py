"""Saving in the background: in order, never blocking for long, never losing the newest or the best."""

import math
import threading
import time
from collections.abc import Callable

import pytest
import torch

from gdl_ray.train import saver
from gdl_ray.train.checkpoint import Contents
from gdl_ray.train.saver import Saver, StorageError
from gdl_ray.train.snapshot import Snapshot


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saver, "_FIRST_RETRY_S", 0.01)
    monkeypatch.setattr(saver, "_LAST_RETRY_S", 0.05)


class Disk:
    """Stands for a store: full or not, and slow if asked."""

    def __init__(self) -> None:
        self.full = False
        self.gate = threading.Event()
        self.gate.set()
        self.saved: list[int] = []

    def save(self, snapshot: Snapshot) -> None:
        self.gate.wait()
        if self.full:
            raise OSError("No space left on device")
        self.saved.append(snapshot.step)


def snapshot(step: int, score: float = math.inf, released: list[int] | None = None) -> Snapshot:
    counters = {"step": step, "score": None if math.isinf(score) else score}
    released = [] if released is None else released
    weights = {"w": torch.zeros(2)}  # whose comparison has no truth value
    contents = Contents(description={}, weights=weights, counters=counters)
    return Snapshot(contents=contents, release=lambda: released.append(step))


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_snapshots_are_saved_in_order_and_released() -> None:
    disk, released = Disk(), list[int]()
    background = Saver(disk.save)
    for step in range(5):
        background.submit(snapshot(step, released=released))
    background.drain()
    assert disk.saved == released == [0, 1, 2, 3, 4]


def test_a_slow_store_holds_training_up_rather_than_lose_a_checkpoint() -> None:
    disk = Disk()
    disk.gate.clear()
    background = Saver(disk.save)
    background.submit(snapshot(0))
    background.submit(snapshot(1))
    third = threading.Thread(target=background.submit, args=(snapshot(2),))
    third.start()
    third.join(0.1)
    assert third.is_alive()
    disk.gate.set()
    third.join(10)
    background.drain()
    assert disk.saved == [0, 1, 2]


def test_while_nothing_can_be_saved_training_goes_on_and_the_newest_and_best_wait() -> None:
    disk, released, lines = Disk(), list[int](), list[str]()
    disk.full = True
    background = Saver(disk.save, lines.append)
    background.submit(snapshot(0, 2.5, released))
    eventually(lambda: bool(lines))
    for step, score in enumerate([2.0, 2.2, 2.4, 2.3], start=1):
        background.submit(snapshot(step, score, released))  # would hang if it waited
    eventually(lambda: sorted(released) == [0, 2, 3])
    disk.full = False
    background.drain()
    assert disk.saved == [1, 4]
    assert lines == [
        "step 0: the checkpoint cannot be saved (No space left on device); training goes on",
        "step 1: checkpoints can be saved again",
    ]


def test_what_is_no_fault_of_the_store_is_raised_where_it_is_heard() -> None:
    def save(snapshot: Snapshot) -> None:
        raise ZeroDivisionError("a bug")

    background = Saver(save)
    background.submit(snapshot(1))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        background.drain()
    with pytest.raises(ZeroDivisionError, match="a bug"):
        background.submit(snapshot(2))


def test_the_end_of_training_does_not_wait_for_ever() -> None:
    disk = Disk()
    disk.full = True
    background = Saver(disk.save, lambda line: None)
    background.submit(snapshot(7))
    with pytest.raises(StorageError, match="step 7 could not be saved within 0 s"):
        background.drain(limit_s=0.1)
    disk.full = False  # lets the thread come to rest
    background.drain()
