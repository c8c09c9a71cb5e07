"""Where the named datasets come from."""

import gzip
import hashlib
import math
import struct
import tarfile
import urllib.request
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gdl_ray.data import arrays
from gdl_ray.data.arrays import DamagedDataError, Dataset, Split
from gdl_ray.family import DataSpec
from gdl_ray.home import file_sha256

Source = Callable[[Path], tuple[DataSpec, Mapping[str, Split]]]

# scikit-learn is imported where data are prepared: it takes longer than all else that a worker imports, torch
# aside, and most processes find their data ready.

_MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
_MNIST_SHA256 = {  # of the unpacked files
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}

_CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
_CIFAR10_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
_CIFAR10_TRAIN = tuple(f"data_batch_{i}.bin" for i in range(1, 6))


def load(name: str, root: Path) -> Dataset:
    """Open a named dataset, preparing it first if it is not there or damaged.

    Args:
        name: a key of DATASETS.
        root: folder of prepared datasets; files of a dataset that has some lie in `root/raw/name`.

    Raises:
        ValueError: if the name is unknown, or the dataset's own files are missing or not what they should be.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown dataset {name!r}: choose from {', '.join(DATASETS)}")
    folder = root / name
    try:
        return arrays.read(folder)
    except DamagedDataError:
        arrays.write(folder, *DATASETS[name](root / "raw" / name))
        return arrays.read(folder)


def digits(raw: Path) -> tuple[DataSpec, Mapping[str, Split]]:
    """Make scikit-learn's handwritten digits: 1,797 images of 8x8 pixels and 17 levels."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = images.astype(np.uint8).reshape(-1, 1, 8, 8)
    rest, test = _carve(Split(x, labels), 0.2)
    train, validation = _carve(rest, 0.1)
    spec = DataSpec(name="digits", kind="image", shape=(1, 8, 8), levels=17, classes=10)
    return spec, {"train": train, "validation": validation, "test": test}


def mnist(raw: Path) -> tuple[DataSpec, Mapping[str, Split]]:
    """Make MNIST, 70,000 images of 28x28 pixels and 256 levels, from its four files in `raw`."""
    images, labels, test_images, test_labels = (
        parse_idx(_obtain(raw, file, sha256), file) for file, sha256 in _MNIST_SHA256.items()
    )
    train, validation = _carve(Split(images[:, None], labels), 1 / 12)
    spec = DataSpec(name="mnist", kind="image", shape=(1, 28, 28), levels=256, classes=10)
    return spec, {
        "train": train,
        "validation": validation,
        "test": Split(test_images[:, None], test_labels),
    }


def cifar10(raw: Path) -> tuple[DataSpec, Mapping[str, Split]]:
    """Make CIFAR-10, 60,000 images of 32x32 pixels, 3 channels and 256 levels, from its archive in `raw`."""
    path = raw / "cifar-10-binary.tar.gz"
    if not path.exists():
        _download(_CIFAR10_URL, path)
    if file_sha256(path) != _CIFAR10_SHA256:
        raise ValueError(f"{path} is not CIFAR-10's binary archive; delete it, and it is downloaded again")
    with tarfile.open(path) as archive:
        train, validation = _carve(_read_cifar(archive, *_CIFAR10_TRAIN), 0.1)
        test = _read_cifar(archive, "test_batch.bin")
    spec = DataSpec(name="cifar10", kind="image", shape=(3, 32, 32), levels=256, classes=10)
    return spec, {"train": train, "validation": validation, "test": test}


DATASETS: Mapping[str, Source] = {"digits": digits, "mnist": mnist, "cifar10": cifar10}


def _read_cifar(archive: tarfile.TarFile, *files: str) -> Split:
    """Read records of a label, then the red, green and blue of an image, row by row."""
    records = []
    for file in files:
        member = archive.extractfile(f"cifar-10-batches-bin/{file}")
        assert member is not None  # noqa: S101  (the archive is the one that is known)
        records.append(np.frombuffer(member.read(), np.uint8).reshape(-1, 1 + 3 * 32 * 32))
    table = np.concatenate(records)
    return Split(table[:, 1:].reshape(-1, 3, 32, 32), table[:, 0].astype(np.int64))


def _carve(split: Split, share: float) -> tuple[Split, Split]:
    """Split off a stratified share, the same at every call."""
    from sklearn.model_selection import train_test_split

    rest, carved = train_test_split(np.arange(len(split)), test_size=share, random_state=0, stratify=split.y)
    return Split(split.x[rest], split.y[rest]), Split(split.x[carved], split.y[carved])


def _obtain(raw: Path, file: str, sha256: str) -> bytes:
    """Read a file of MNIST from `raw`, packed or not; download it first if it is not there."""
    packed, plain = raw / f"{file}.gz", raw / file
    if not plain.exists() and not packed.exists():
        _download(f"{_MNIST_URL}{file}.gz", packed)
    path = plain if plain.exists() else packed
    try:
        content = gzip.decompress(path.read_bytes()) if path == packed else path.read_bytes()
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it, and it is downloaded again") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(f"{path} is not MNIST's {file}; delete it, and it is downloaded again")
    return content


def _download(url: str, path: Path) -> None:
    # The address is one of those above, so its scheme is https.
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    try:
        with urllib.request.urlopen(url, timeout=60) as response:  # noqa: S310
            partial.write_bytes(response.read())
    except OSError as error:
        raise ValueError(
            f"{path} is missing and {url} does not answer ({error}); put the file there by hand"
        ) from error
    partial.replace(path)


def parse_idx(content: bytes, name: str) -> npt.NDArray[np.uint8]:
    """Read an array of unsigned bytes from IDX, the format of MNIST.

    Raises:
        ValueError: if it is not one, or is cut short; the message names it `name`.
    """
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise ValueError(f"{name} is not an IDX file of unsigned bytes")
    header = 4 + 4 * content[3]
    if len(content) < header:
        raise ValueError(f"{name} is cut short in its header")
    shape = struct.unpack(f">{content[3]}I", content[4:header])
    if len(content) - header != math.prod(shape):
        raise ValueError(f"{name} announces {shape}, but holds {len(content) - header} bytes")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
