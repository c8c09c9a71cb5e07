"""Prepared folders: whole or not there."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gdl_ray.data import Dataset, arrays, load
from gdl_ray.data.arrays import DamagedDataError


@pytest.fixture
def folder(tmp_path: Path, digits: Dataset) -> Path:
    arrays.write(tmp_path / "digits", digits.spec, digits.splits)
    return tmp_path / "digits"


def test_reads_back_what_was_written(folder: Path, digits: Dataset) -> None:
    found = arrays.read(folder)
    assert found.spec == digits.spec
    assert found.digest == digits.digest
    for name, split in digits.splits.items():
        assert np.array_equal(found.splits[name].x, split.x)
        assert np.array_equal(found.splits[name].y, split.y)
    assert isinstance(found.splits["train"].x, np.memmap)


def test_counts_are_those_of_the_training_split(digits: Dataset) -> None:
    counts = digits.spec.counts
    assert counts is not None
    train = torch.from_numpy(np.array(digits.splits["train"].x)).flatten(1)
    assert (counts.sum(1) == len(train)).all()
    assert counts[20, 3] == (train[:, 20] == 3).sum()


def _truncate(folder: Path) -> None:
    path = folder / "train.x.npy"
    path.write_bytes(path.read_bytes()[:-1])


def _flip(folder: Path) -> None:
    content = bytearray((folder / "test.y.npy").read_bytes())
    content[-1] ^= 1
    (folder / "test.y.npy").write_bytes(content)


def _forget(folder: Path) -> None:
    (folder / "counts.npy").unlink()


def _half_description(folder: Path) -> None:
    text = (folder / "spec.json").read_text()
    (folder / "spec.json").write_text(text[: len(text) // 2])


def _other_format(folder: Path) -> None:
    description = json.loads((folder / "spec.json").read_text())
    (folder / "spec.json").write_text(json.dumps({**description, "format": 0}))


DAMAGES = [_truncate, _flip, _forget, _half_description, _other_format, shutil.rmtree]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_mended(folder: Path, digits: Dataset, damage: Callable[[Path], None]) -> None:
    damage(folder)
    with pytest.raises(DamagedDataError, match="digits"):
        arrays.read(folder)
    assert load("digits", folder.parent).digest == digits.digest
    assert [path.name for path in folder.parent.iterdir()] == ["digits"]


def test_a_failed_write_leaves_what_was_there(folder: Path, digits: Dataset) -> None:
    with pytest.raises(KeyError):
        arrays.write(folder, replace(digits.spec, levels=16), {"test": digits.splits["test"]})
    assert arrays.read(folder).digest == digits.digest
    assert [path.name for path in folder.parent.iterdir()] == ["digits"]
