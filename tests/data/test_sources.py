"""Named datasets: the digits that DESIGN fixes, and MNIST from its files, whole or refused."""

import gzip
import hashlib
import io
import shutil
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from gdl_ray.data import Dataset, load, sources
from gdl_ray.data.sources import parse_idx


def test_digits_test_split_is_the_published_one(digits: Dataset) -> None:
    x, y = load_digits(return_X_y=True)
    rest, expected, _, labels = train_test_split(x, y, test_size=0.2, random_state=0, stratify=y)
    test = digits.splits["test"]
    assert np.array_equal(test.x.reshape(-1, 64), expected)
    assert np.array_equal(test.y, labels)
    others = np.concatenate([digits.splits[name].x.reshape(-1, 64) for name in ("train", "validation")])
    assert np.array_equal(np.sort(others, axis=0), np.sort(rest, axis=0))
    assert len(digits.splits["validation"]) == 144


def test_unknown_names_are_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown dataset 'digit': choose from digits, mnist"):
        load("digit", tmp_path)


def idx(array: np.ndarray) -> bytes:
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def test_idx_reads_any_shape() -> None:
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    assert np.array_equal(parse_idx(idx(array), "name"), array)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file"),
        (b"\0\0\x0d\1" + b"\0" * 8, "not an IDX file"),
        (idx(np.zeros((2, 3), np.uint8))[:6], "cut short"),
        (idx(np.zeros((2, 3), np.uint8))[:-1], "announces"),
    ],
)
def test_idx_refuses_what_is_not_whole(content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_idx(content, "name")


def test_mnist_loads_from_its_files(tmp_path: Path, shared_mnist: Path) -> None:
    shutil.copytree(shared_mnist, tmp_path / "raw" / "mnist")
    mnist = load("mnist", tmp_path)
    assert {name: split.x.shape for name, split in mnist.splits.items()} == {
        "train": (55_000, 1, 28, 28),
        "validation": (5_000, 1, 28, 28),
        "test": (10_000, 1, 28, 28),
    }
    assert mnist.splits["test"].y[:5].tolist() == [7, 2, 1, 0, 4]  # as everybody's first five
    assert np.bincount(mnist.splits["validation"].y).tolist() == pytest.approx([500] * 10, abs=70)


def test_mnist_refuses_other_files(tmp_path: Path) -> None:
    raw = tmp_path / "raw" / "mnist"
    raw.mkdir(parents=True)
    (raw / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"\0\0\x08\1\0\0\0\0"))
    with pytest.raises(ValueError, match="is not MNIST's train-images-idx3-ubyte; delete it"):
        load("mnist", tmp_path)
    (raw / "train-images-idx3-ubyte.gz").write_bytes(b"not gzip")
    with pytest.raises(ValueError, match="is damaged"):
        load("mnist", tmp_path)


def cifar_archive(path: Path) -> np.ndarray:
    """Write an archive of CIFAR-10's form with 20 images a file; returns the images, training ones first."""
    images = np.random.default_rng(0).integers(0, 256, (120, 3, 32, 32), np.uint8)
    labels = np.arange(120, dtype=np.uint8)[:, None] % 10
    records = np.concatenate([labels, images.reshape(120, -1)], axis=1).reshape(6, -1)
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w:gz") as archive:
        for i, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}.bin")
            member.size = records[i].nbytes
            archive.addfile(member, io.BytesIO(records[i].tobytes()))
    return images


def test_cifar10_loads_from_its_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "raw" / "cifar10" / "cifar-10-binary.tar.gz"
    images = cifar_archive(path)
    monkeypatch.setattr(sources, "_CIFAR10_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    cifar = load("cifar10", tmp_path)
    assert {name: len(split) for name, split in cifar.splits.items()} == {
        "train": 90,
        "validation": 10,
        "test": 20,
    }
    assert np.array_equal(cifar.splits["test"].x, images[100:])
    assert cifar.splits["test"].y.tolist() == [i % 10 for i in range(20)]
    assert (cifar.spec.shape, cifar.spec.levels, cifar.spec.classes) == ((3, 32, 32), 256, 10)


def test_cifar10_refuses_another_archive(tmp_path: Path) -> None:
    cifar_archive(tmp_path / "raw" / "cifar10" / "cifar-10-binary.tar.gz")
    with pytest.raises(ValueError, match="is not CIFAR-10's binary archive; delete it"):
        load("cifar10", tmp_path)


def test_missing_files_name_the_place_and_the_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_MNIST_URL", "http://127.0.0.1:9/")  # nothing listens there
    with pytest.raises(ValueError, match=r"raw/mnist/train-images.* is missing and http.*put the file there"):
        load("mnist", tmp_path)
    assert not list((tmp_path / "raw" / "mnist").iterdir())
