"""Prepared data: a folder of .npy arrays beside a JSON file that describes and checks them.

    spec.json           DataSpec, number of examples and sha256 of each array, digest of the whole
    counts.npy          int64 (dims, levels), level counts of the training split
    train.x.npy         uint8 (N, C, H, W);  train.y.npy: int64 (N,); likewise `validation`, `test`

A folder appears under its name only when it is whole. One that no longer matches its sums is not opened.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from gdl_ray.family import DataSpec
from gdl_ray.home import file_sha256, made_whole

Array = npt.NDArray[np.generic]

_FORMAT = 1


class DamagedDataError(Exception):
    """A prepared folder is missing, half-written, altered or of another format."""


@dataclass(frozen=True, slots=True)
class Split:
    """One split of a dataset."""

    x: Array
    """Examples, shape (N, *spec.shape), read-only and memory-mapped."""
    y: Array
    """Labels, int64 (N,)."""

    def __len__(self) -> int:
        return len(self.x)

    def first(self, count: int) -> "Split":
        """Take the first examples, or all where there are no more."""
        return Split(self.x[:count], self.y[:count])


@dataclass(frozen=True, slots=True)
class Dataset:
    """A prepared dataset."""

    spec: DataSpec
    splits: Mapping[str, Split]
    """`train`, `validation` and `test`."""
    digest: str
    """sha256 over every array of every split: two runs with equal digests saw the same data."""


def write(folder: Path, spec: DataSpec, splits: Mapping[str, Split]) -> None:
    """Prepare a folder, replacing what is there; another process that reads or writes it is not disturbed."""
    with made_whole(folder) as new:
        _write_arrays(new, spec, splits)


def _write_arrays(folder: Path, spec: DataSpec, splits: Mapping[str, Split]) -> None:
    arrays = {"counts": level_counts(spec, splits["train"].x)}
    for name, split in splits.items():
        arrays |= {f"{name}.x": np.ascontiguousarray(split.x), f"{name}.y": split.y.astype(np.int64)}
    sums = {}
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
        sums[name] = file_sha256(folder / f"{name}.npy")
    description = {
        "format": _FORMAT,
        "spec": spec.to_json(),
        "examples": {name: len(split) for name, split in splits.items()},
        "sha256": sums,
        "digest": _digest(sums),
    }
    (folder / "spec.json").write_text(json.dumps(description, indent=2) + "\n")


def level_counts(spec: DataSpec, x: Array) -> npt.NDArray[np.int64]:
    """Count how often each level occurs at each dimension: shape (dims, levels)."""
    flat = x.reshape(len(x), spec.dims)
    return np.stack([np.bincount(column, minlength=spec.levels) for column in flat.T]).astype(np.int64)


def read(folder: Path) -> Dataset:
    """Open a prepared folder.

    Raises:
        DamagedDataError: if it is missing, half-written, altered or of another format.
    """
    try:
        description = json.loads((folder / "spec.json").read_text())
        if description["format"] != _FORMAT:
            raise DamagedDataError(f"{folder}: format {description['format']}, this version reads {_FORMAT}")
        for name, expected in description["sha256"].items():
            if file_sha256(folder / f"{name}.npy") != expected:
                raise DamagedDataError(f"{folder / name}.npy does not match its sha256 sum")
        counts = torch.from_numpy(np.load(folder / "counts.npy"))
        return Dataset(
            spec=DataSpec.from_json(description["spec"], counts),
            splits={name: _open(folder, name) for name in description["examples"]},
            digest=description["digest"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedDataError(f"{folder}: {error}") from error


def _open(folder: Path, name: str) -> Split:
    return Split(
        x=np.load(folder / f"{name}.x.npy", mmap_mode="r"),
        y=np.load(folder / f"{name}.y.npy", mmap_mode="r"),
    )


def _digest(sums: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()
